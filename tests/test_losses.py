"""The two losses and the negatives, against plain loops and torch's own cross-entropy."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkit import MmkitError, contradiction_loss, contrastive_loss, matching_loss
from mmkit.losses import MAX_TEMPERATURE, MIN_TEMPERATURE, sample_negatives


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def log(temperature: float) -> Tensor:
    return torch.tensor(temperature).log()


def info_nce(images: Tensor, texts: Tensor, temperature: float, owner: list[int]) -> float:
    """InfoNCE in plain loops: each pair against the captions, and the images, of other images."""
    similarity = [
        [math.exp(F.cosine_similarity(a, b, dim=0).item() / temperature) for b in texts.double()]
        for a in images.double()
    ]
    total, n = 0.0, len(owner)
    for i in range(n):
        others = [j for j in range(n) if owner[j] != owner[i]]
        own = similarity[i][i]
        total -= math.log(own / (own + sum(similarity[i][j] for j in others))) / n
        total -= math.log(own / (own + sum(similarity[j][i] for j in others))) / n
    return total / 2


# --- contrastive loss ----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.02, 0.07, 0.4])
def test_contrastive_loss_equals_info_nce_in_plain_loops(temperature):
    images, texts = 3 * random(6, 5), random(6, 5, seed=1)
    found = contrastive_loss(images, texts, log(temperature)).item()
    assert found == pytest.approx(info_nce(images, texts, temperature, list(range(6))), rel=1e-4)


def test_contrastive_loss_leaves_out_the_other_captions_of_the_same_image():
    owner = [0, 0, 1, 2, 2, 2]
    images, texts = random(3, 5)[owner], random(6, 5, seed=1)
    found = contrastive_loss(images, texts, log(0.1), torch.tensor(owner)).item()
    assert found == pytest.approx(info_nce(images, texts, 0.1, owner), rel=1e-4)
    assert found != pytest.approx(info_nce(images, texts, 0.1, list(range(6))), rel=1e-2)


def test_captions_of_one_image_neither_attract_nor_repel_each_other():
    images = random(1, 5).repeat(4, 1).requires_grad_()
    texts = random(4, 5, seed=1).requires_grad_()
    loss = contrastive_loss(images, texts, log(0.07), torch.zeros(4, dtype=torch.long))
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(images.grad, torch.zeros(4, 5)) and torch.equal(texts.grad, torch.zeros(4, 5))


def test_another_caption_of_the_same_image_does_not_reach_a_pairs_image():
    owner = torch.tensor([0, 0, 1])

    def gradient_of_the_first_image(second_caption: Tensor, owner: Tensor | None) -> Tensor:
        images = random(2, 5)[[0, 0, 1]].requires_grad_()
        texts = torch.stack([random(5, seed=1), second_caption, random(5, seed=2)])
        contrastive_loss(images, texts, log(0.2), owner).backward()
        return images.grad[0]

    caption = random(5, seed=3)
    near, far = (gradient_of_the_first_image(sign * caption, owner) for sign in (1, -1))
    assert near.norm() > 1e-3
    torch.testing.assert_close(near, far)
    unmasked = [gradient_of_the_first_image(sign * caption, None) for sign in (1, -1)]
    assert (unmasked[0] - unmasked[1]).norm() > 1e-3


@pytest.mark.parametrize(("outside", "inside"), [(1e-4, MIN_TEMPERATURE), (50.0, MAX_TEMPERATURE)])
def test_the_temperature_is_clamped_at_both_ends(outside, inside):
    images, texts = random(6, 5), random(6, 5, seed=1)
    found, at_the_end = (contrastive_loss(images, texts, log(value)) for value in (outside, inside))
    assert found.item() == pytest.approx(at_the_end.item(), rel=1e-4)
    assert contrastive_loss(images, texts, log(0.1)).item() != pytest.approx(found.item(), rel=1e-2)


def test_the_temperature_learns_inside_the_clamp_only():
    images, texts = random(6, 5), random(6, 5, seed=1)

    def gradient(temperature: float) -> float:
        parameter = log(temperature).requires_grad_()
        contrastive_loss(images, texts, parameter).backward()
        return parameter.grad.item()

    step = 1e-3
    around = [contrastive_loss(images.double(), texts.double(), log(0.1).double() + d).item() for d in (-step, step)]
    assert gradient(0.1) == pytest.approx((around[1] - around[0]) / (2 * step), rel=1e-2)
    assert gradient(0.1) != 0
    assert gradient(1e-4) == gradient(50.0) == 0


def test_contrastive_loss_of_a_batch_of_one_is_zero():
    assert contrastive_loss(random(1, 5), random(1, 5, seed=1), log(0.07)).item() == 0


def test_nodes_that_are_not_aligned_are_refused_with_both_shapes():
    with pytest.raises(MmkitError, match=r"\(3, 5\) and \(4, 5\)"):
        contrastive_loss(random(3, 5), random(4, 5), log(0.07))


# --- matching loss -------------------------------------------------------------------------------


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
    constant = torch.zeros(9, requires_grad=True)
    matching_loss(constant, matched).backward()
    assert constant.grad.sum().item() == pytest.approx(0, abs=1e-7)


def test_matching_loss_of_one_kind_only_is_finite():
    assert matching_loss(torch.zeros(4), torch.ones(4)).item() == pytest.approx(math.log(2) / 2)
    assert matching_loss(torch.zeros(4), torch.zeros(4)).item() == pytest.approx(math.log(2) / 2)


# --- contradictions ------------------------------------------------------------------------------


def test_contradiction_loss_is_the_logistic_loss_of_the_difference():
    true, false = random(6), random(6, seed=1)
    expected = np.mean([math.log(1 + math.exp(f - t)) for t, f in zip(true.tolist(), false.tolist(), strict=True)])
    assert contradiction_loss(true, false).item() == pytest.approx(expected, rel=1e-5)
    assert contradiction_loss(true + 100, false + 100).item() == pytest.approx(expected, rel=1e-4)
    assert contradiction_loss(true + 1, false) < contradiction_loss(true, false)


# --- negatives -----------------------------------------------------------------------------------


def test_negatives_are_never_of_the_same_image():
    owner = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])
    torch.manual_seed(0)
    for _ in range(50):
        image_rows, text_rows = sample_negatives(random(8, 8), owner)
        assert len(image_rows) == len(text_rows) == 4 * len(owner)
        assert (owner[image_rows] != owner[text_rows]).all()


def test_each_pair_gets_two_captions_and_each_caption_two_images():
    owner = torch.arange(6)
    torch.manual_seed(0)
    image_rows, text_rows = sample_negatives(random(6, 6), owner)
    assert image_rows[:12].tolist() == [*range(6), *range(6)]
    assert text_rows[12:].tolist() == [*range(6), *range(6)]


def test_random_negatives_reach_all_others_and_hard_ones_the_similar():
    similarity = torch.eye(4) + torch.eye(4).roll(1, 0)  # caption i is as near to image i as to image i + 1
    torch.manual_seed(0)
    draws = [sample_negatives(similarity, torch.arange(4)) for _ in range(100)]
    image_rows, text_rows = (torch.stack(part).view(100, 4, 4) for part in zip(*draws, strict=True))
    for i in range(4):
        others = set(range(4)) - {i}
        assert set(text_rows[:, 0, i].tolist()) == others
        assert set(image_rows[:, 2, i].tolist()) == others
    assert (text_rows[:, 1] == (torch.arange(4) - 1) % 4).float().mean() > 0.95
    assert (image_rows[:, 3] == (torch.arange(4) + 1) % 4).float().mean() > 0.95


def test_hardness_leads_from_even_draws_to_those_by_similarity():
    similarity = torch.full((5, 5), 0.0)
    similarity[:, 4] = similarity[4] = 0.14  # twice the temperature
    torch.manual_seed(0)
    for hardness in (0.0, 0.5, 1.0):
        draws = [sample_negatives(similarity, torch.arange(5), hardness)[1][5:9] for _ in range(1000)]
        found = (torch.cat(draws) == 4).double().mean().item()  # of the hard captions of the first four images
        weight = math.exp(2 * hardness)
        assert found == pytest.approx(weight / (weight + 3), abs=0.03)


def test_there_are_no_negatives_if_all_pairs_share_an_image():
    image_rows, text_rows = sample_negatives(random(3, 3), torch.zeros(3, dtype=torch.long))
    assert len(image_rows) == len(text_rows) == 0


def test_negatives_carry_no_gradient():
    similarity = random(5, 5).requires_grad_()
    assert not any(rows.requires_grad for rows in sample_negatives(similarity, torch.arange(5)))
