"""The losses and the negatives, against plain loops and torch's own cross-entropy, and the joint loss of a batch."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import DIMS, learnable
from mmkit import FalseCaptions, MmkitError, MultimodalFeatureFuser, contradiction_loss, contrastive_loss, matching_loss
from mmkit.losses import MAX_TEMPERATURE, MIN_TEMPERATURE, JointLoss, info_nce, sample_negatives
from mmkit.training import PairBatches


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def log(temperature: float) -> Tensor:
    return torch.tensor(temperature).log()


def in_loops(images: Tensor, texts: Tensor, temperature: float, image_index: list[int]) -> float:
    """InfoNCE in plain loops: each pair against the captions, and the images, of other images."""
    weight = F.cosine_similarity(images.double()[:, None], texts.double(), dim=-1).div(temperature).exp().tolist()
    total, n = 0.0, len(image_index)
    for i in range(n):
        others = [j for j in range(n) if image_index[j] != image_index[i]]
        total -= math.log(weight[i][i] / (weight[i][i] + sum(weight[i][j] for j in others))) / n
        total -= math.log(weight[i][i] / (weight[i][i] + sum(weight[j][i] for j in others))) / n
    return total / 2


@pytest.mark.parametrize("temperature", [0.02, 0.07, 0.4])
def test_contrastive_loss_equals_info_nce_in_plain_loops(temperature):
    images, texts = 3 * random(6, 5), random(6, 5, seed=1)
    loss = contrastive_loss(images, texts, log(temperature)).item()
    assert loss == pytest.approx(in_loops(images, texts, temperature, list(range(6))), rel=1e-4)
    assert contrastive_loss(images[:1], texts[:1], log(temperature)).item() == 0


def test_contrastive_loss_leaves_out_the_other_captions_of_the_same_image():
    image_index = [0, 0, 1, 2, 2, 2]
    images, texts = random(3, 5)[image_index], random(6, 5, seed=1)
    loss = contrastive_loss(images, texts, log(0.1), torch.tensor(image_index)).item()
    assert loss == pytest.approx(in_loops(images, texts, 0.1, image_index), rel=1e-4)
    assert loss != pytest.approx(in_loops(images, texts, 0.1, list(range(6))), rel=1e-2)


def test_captions_of_one_image_neither_attract_nor_repel_each_other():
    images, texts = random(1, 5).repeat(4, 1).requires_grad_(), random(4, 5, seed=1).requires_grad_()
    loss = contrastive_loss(images, texts, log(0.07), torch.zeros(4, dtype=torch.long))
    assert loss.item() == 0
    loss.backward()
    assert not images.grad.any() and not texts.grad.any()


@pytest.mark.parametrize(("outside", "inside"), [(1e-4, MIN_TEMPERATURE), (50.0, MAX_TEMPERATURE)])
def test_the_temperature_is_clamped_and_learns_inside_the_clamp_only(outside, inside):
    images, texts = random(6, 5), random(6, 5, seed=1)
    gradients = []
    for temperature in (outside, 0.1):
        parameter = log(temperature).requires_grad_()
        contrastive_loss(images, texts, parameter).backward()
        gradients.append(parameter.grad.item())
    clamped, at_the_end, free = (contrastive_loss(images, texts, log(value)).item() for value in (outside, inside, 0.1))
    assert clamped == pytest.approx(at_the_end, rel=1e-4) and clamped != pytest.approx(free, rel=1e-2)
    step = 1e-3
    below, above = (contrastive_loss(images.double(), texts.double(), log(0.1) + d).item() for d in (-step, step))
    assert gradients[0] == 0 != gradients[1] == pytest.approx((above - below) / (2 * step), rel=1e-2)


def test_nodes_that_are_not_aligned_are_refused_with_both_shapes():
    with pytest.raises(MmkitError, match=r"\(3, 5\) and \(4, 5\)"):
        contrastive_loss(random(3, 5), random(4, 5), log(0.07))


def test_matching_loss_of_a_balanced_set_is_torchs_cross_entropy():
    logits, matched = 3 * random(8), torch.tensor([1, 0, 1, 1, 0, 0, 1, 0])
    expected = F.binary_cross_entropy_with_logits(logits, matched.float())
    torch.testing.assert_close(matching_loss(logits, matched), expected)
    torch.testing.assert_close(matching_loss(logits, matched.bool()), expected)


def test_matching_loss_weighs_both_kinds_the_same_however_many_there_are():
    logits, matched = 3 * random(9), torch.tensor([1, 0, 0, 1, 0, 0, 0, 0, 0])
    positive = sum(math.log1p(math.exp(-x)) for x in logits[matched == 1].tolist()) / 2
    negative = sum(math.log1p(math.exp(x)) for x in logits[matched == 0].tolist()) / 7
    assert matching_loss(logits, matched).item() == pytest.approx((positive + negative) / 2, rel=1e-5)
    for only in (torch.ones(4), torch.zeros(4)):
        assert matching_loss(torch.zeros(4), only).item() == pytest.approx(math.log(2) / 2)


def test_contradiction_loss_is_the_logistic_loss_of_the_difference():
    true, false = random(6), random(6, seed=1)
    expected = sum(math.log(1 + math.exp(f - t)) for t, f in zip(true.tolist(), false.tolist(), strict=True)) / 6
    assert contradiction_loss(true, false).item() == pytest.approx(expected, rel=1e-5)
    assert contradiction_loss(true + 1, false) < contradiction_loss(true, false)


def test_each_pair_gets_two_captions_and_each_caption_two_images_never_its_own():
    image_index, sims = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3]), random(8, 8).requires_grad_()
    torch.manual_seed(0)
    for _ in range(50):
        image_rows, text_rows = sample_negatives(sims, image_index)
        assert image_rows[:16].tolist() == text_rows[16:].tolist() == [*range(8), *range(8)]
        assert (image_index[image_rows] != image_index[text_rows]).all()
    assert [len(rows) for rows in sample_negatives(sims, torch.zeros(8, dtype=torch.long))] == [0, 0]
    assert len(sample_negatives(sims * torch.nan, image_index)[0]) == 32  # the losses report that, not the draw


def test_random_negatives_are_even_and_hard_ones_follow_similarity_by_hardness():
    sims = torch.zeros(5, 5)
    sims[:, 4] = sims[4] = 0.14  # twice the temperature
    torch.manual_seed(0)
    for hardness in (0.0, 0.5, 1.0):
        draws = [sample_negatives(sims, torch.arange(5), hardness) for _ in range(1000)]
        image_rows, text_rows = (torch.stack(rows).view(1000, 4, 5)[:, :, :4] for rows in zip(*draws, strict=True))
        share = math.exp(2 * hardness) / (math.exp(2 * hardness) + 3)
        for chosen, expected in ((text_rows[:, 0], 1 / 4), (text_rows[:, 1], share), (image_rows[:, 3], share)):
            assert (chosen == 4).double().mean().item() == pytest.approx(expected, abs=0.03)


def test_the_joint_loss_of_a_batch_is_the_three_losses_of_its_pairs():
    torch.manual_seed(0)
    fuser, features, false = MultimodalFeatureFuser(*DIMS, 32).eval(), learnable(10, 0), learnable(10, 1)
    losses, true = JointLoss(fuser), torch.arange(20) ^ 1
    pairs, logit = [3, 8, 9, 15, 0], lambda image, text: fuser.match_head(fuser(image[None], text[None])).squeeze()
    image_index, images, texts = features.image_index[pairs], features.images(), features.captions()
    torch.manual_seed(1)
    batch = PairBatches(features, losses, FalseCaptions(false, true)).__getitems__(pairs)
    contrastive, matching, contradiction = losses(batch, 0.5)
    torch.manual_seed(1)
    drawn = 2 * image_index.unique() + (torch.rand(4) * 2).long()  # of an image's two false captions
    nodes = fuser.nodes(images[image_index], texts[pairs])
    sims = F.cosine_similarity(nodes[0][:, None], nodes[1], dim=-1)
    torch.testing.assert_close(contrastive, info_nce(sims, fuser.log_temperature, image_index))
    negatives = sample_negatives(sims, image_index, 0.5)
    matched = [logit(images[i], texts[j]) for i, j in zip(image_index, pairs, strict=True)]
    unmatched = [logit(images[image_index[i]], texts[pairs[j]]) for i, j in zip(*negatives, strict=True)]
    labels = torch.tensor([1] * 5 + [0] * 20)
    torch.testing.assert_close(matching, matching_loss(torch.stack(matched + unmatched), labels))
    of_true = [logit(images[i], texts[true[j]]) for i, j in zip(image_index.unique(), drawn, strict=True)]
    of_false = [logit(images[i], false.captions()[j]) for i, j in zip(image_index.unique(), drawn, strict=True)]
    torch.testing.assert_close(contradiction, contradiction_loss(torch.stack(of_true), torch.stack(of_false)))


def test_a_subclass_replaces_one_loss_or_the_negatives():
    class Hinge(JointLoss):
        def contrastive(self, sims, image_index):
            return (0.2 + sims - sims.diagonal()[:, None]).clamp(min=0).mean()

        def negatives(self, sims, image_index, hardness):
            return sample_negatives(sims, image_index, 0.0)

    torch.manual_seed(0)
    fuser = MultimodalFeatureFuser(*DIMS, 16).eval()
    batch = PairBatches(learnable(12, 0), JointLoss(fuser)).__getitems__(range(24))
    torch.manual_seed(1)
    hinge, matching, _ = Hinge(fuser)(batch)
    torch.manual_seed(1)
    plain = JointLoss(fuser)(batch, hardness=0.0)
    sims = JointLoss(fuser).nodes(batch)[3]
    assert hinge == (0.2 + sims - sims.diagonal()[:, None]).clamp(min=0).mean() != plain[0]
    torch.testing.assert_close(matching, plain[1])
