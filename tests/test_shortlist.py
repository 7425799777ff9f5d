"""Ranks through a shortlist, against a brute-force ranking of every pair."""

import pytest
import torch
from torch import Tensor

import mmkit.shortlist
from mmkit import MmkitError, MultimodalFeatureFuser, PairedFeatures, RegionWordGNN, ranks, retrieval_report
from mmkit.evaluation import pool_nodes, ranked
from mmkit.fusers import PairFuser
from mmkit.shortlist import shortlist_ranks


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def features(images: int = 12) -> PairedFeatures:
    owner = torch.arange(images).repeat_interleave(2)[torch.randperm(2 * images)]
    tokens = random(2 * images, 3, 5, seed=1)
    tokens[::2, 2] = 0
    return PairedFeatures.from_arrays(
        random(images, 6), random(2 * images, 5, seed=2), owner, random(images, 4, 6), tokens
    )


def made(name: str) -> PairFuser:
    torch.manual_seed(0)
    fuser = MultimodalFeatureFuser(6, 5, 8) if name == "mlp" else RegionWordGNN(6, 5, width=8)
    with torch.no_grad():
        for parameter in fuser.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return fuser.eval()


def by_hand(cheap: Tensor, logits: Tensor, owner: Tensor, size: int) -> tuple[list[int], list[int]]:
    """The definition: the shortlist in the order of the logits, then the others in that of the cheap score."""

    def rank(cheap: Tensor, logits: Tensor, true: Tensor) -> int:
        everyone = list(range(len(cheap)))
        chosen = sorted(everyone, key=lambda item: -cheap[item].item())[:size]
        order = sorted(chosen, key=lambda item: -logits[item].item())
        order += sorted(set(everyone) - set(chosen), key=lambda item: -cheap[item].item())
        false = [item for item in order if not true[item]]
        first = min(order.index(item) for item in everyone if true[item])
        return 1 + sum(order.index(item) < first for item in false)

    images = [rank(cheap[i], logits[i], owner == i) for i in range(len(cheap))]
    captions = [rank(cheap[:, j], logits[:, j], torch.arange(len(cheap)) == owner[j]) for j in range(len(owner))]
    return images, captions


@pytest.mark.parametrize("name", ["mlp", "region-word"])
@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("block", [5, 2**22])
def test_the_shortlist_is_ranked_by_logits_and_the_rest_by_the_cheap_score(name, size, block, monkeypatch):
    monkeypatch.setattr(mmkit.shortlist, "_BLOCK", block)
    monkeypatch.setattr(mmkit.shortlist, "_PAIRS", 7)
    torch.manual_seed(1)
    fuser, pairs = made(name), features()
    with torch.inference_mode():
        nodes = pool_nodes(fuser, pairs)
        cheap, logits = fuser.shortlist_scores(*nodes), fuser.score_nodes(*nodes)
        found = shortlist_ranks(fuser, *nodes, pairs.owner, size)
    assert tuple(part.tolist() for part in found) == by_hand(cheap, logits, pairs.owner, size)
    assert not torch.equal(cheap.argmax(dim=1), logits.argmax(dim=1)), "or the order would not matter"


def test_a_shortlist_of_all_is_the_full_ranking():
    torch.manual_seed(1)
    fuser, pairs = made("region-word"), features()
    with torch.inference_mode():
        full = ranks(fuser.score_nodes(*pool_nodes(fuser, pairs)), pairs.owner)
    for size in (24, 1000):
        found = ranked(fuser, pairs, shortlist=size)
        assert all(torch.equal(a, b) for a, b in zip(found, full, strict=True))
    report = retrieval_report(fuser, pairs, shortlist=2)
    assert (
        report.pool == (12, 24)
        and report.text_to_image.r1 == (ranked(fuser, pairs, shortlist=2)[1] == 1).double().mean()
    )


class Constant(MultimodalFeatureFuser):
    """Knows nothing in either step."""

    value = 0.0

    def shortlist_scores(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        return torch.zeros(len(image_nodes), len(text_nodes))

    def score_nodes(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        return torch.full((len(image_nodes), len(text_nodes)), self.value)


def test_ties_count_against_the_model_and_nan_is_an_error():
    fuser, pairs = Constant(6, 5, 8), features()
    image_ranks, caption_ranks = ranked(fuser, pairs, shortlist=24)
    assert (image_ranks == 23).all() and (caption_ranks == 12).all()
    few = ranked(fuser, pairs, shortlist=3)  # inside a shortlist of equals, or behind all
    assert set(few[1].tolist()) <= {3, 12} and 12 in few[1]
    fuser.value = torch.nan
    with pytest.raises(MmkitError, match="NaN"):
        ranked(fuser, pairs, shortlist=3)
    with pytest.raises(MmkitError, match="at least one"):
        shortlist_ranks(fuser, *pool_nodes(fuser, pairs), pairs.owner, 0)
