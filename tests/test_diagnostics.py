"""Captions with one fact changed against hand counts, and leaks that have to be seen."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mmkit
from helpers import learnable, settings
from mmkit import diagnostics, evaluation
from mmkit.data import DiagnosticNegatives
from mmkit.evaluation import bootstrap, encode_pool
from mmkit.features import PairedFeatures, extract_texts
from mmkit.fusers import MultimodalFeatureFuser, PairFuser, unit_scale
from mmkit.graphs import MultimodalGNN
from mmkit.regions import RegionWordGNN
from mmkit.support import MmkitError


class Product(PairFuser):
    """Scores a pair by the product of its features: a fuser whose logits are known."""

    def __init__(self) -> None:
        super().__init__(4, 4, 4, 0.0, 0.0)
        nn.init.zeros_(self.match_head.bias)
        with torch.no_grad():
            self.match_head.weight[:, :4].fill_(1)

    def nodes(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        return images, texts


def given(features: PairedFeatures, images: list[int], captions: list[int], texts: Tensor) -> dict:
    """`texts` as false captions of these images, made from these captions."""
    negatives = DiagnosticNegatives("count", np.array(images), np.array(captions), ("false",) * len(images))
    return {"count": (negatives, PairedFeatures.from_arrays(features.images(), texts, [0] * len(texts)))}


def test_the_pairs_are_rows_of_the_selection_and_come_as_its_captions_did(dataset, features, encoders, cache):
    chosen = [40, 3, 17, 58, 9]
    part, options = features.select(chosen), {"seed": 2, "precision": "float32"}
    pairs = mmkit.diagnostic_pairs(dataset, part, encoders, cache, **options)
    again = mmkit.diagnostic_pairs(dataset.select(chosen), part.with_parts(), encoders, cache, ["ground"], **options)
    assert again["ground"][0].texts == pairs["ground"][0].texts and len(pairs) > 4
    assert torch.equal(again["ground"][1].captions(), pairs["ground"][1].captions())
    captions = dataset.select(chosen).captions
    for fact, (negatives, false) in pairs.items():
        whole = dataset.diagnostic_negatives(fact, seed=2)
        assert false.image_index.tolist() == negatives.image_index.tolist() and false.tokens()[0].shape[2] == 384
        expected = extract_texts(negatives.texts, encoders, cache, "float32", tokens=True)
        assert torch.equal(false.captions(), expected.vectors()) and torch.equal(false.images(), part.images())
        for image, caption, text in zip(negatives.image_index, negatives.captions, negatives.texts, strict=True):
            place = whole.image_index.tolist().index(chosen[image])
            assert whole.texts[place] == text and dataset.captions[whole.captions[place]] == captions[caption]
            assert part.image_index[caption] == image


def test_false_captions_are_those_of_every_fact_and_seed_once_and_of_this_dataset(dataset, features, encoders, cache):
    alone = [image for image, scene in enumerate(dataset.scenes) if scene.relation is None][:3]
    part = features.select(alone)
    with pytest.raises(MmkitError, match=r"None of the 3 images .* roles, relation"):
        mmkit.false_captions(dataset, part, encoders, cache, ("roles", "relation"))
    false = mmkit.false_captions(dataset, part, encoders, cache, ("object", "ground"), (1, 1, 2), "float32")
    drawn = [dataset.select(alone).diagnostic_negatives(fact, seed) for fact in ("object", "ground") for seed in (1, 2)]
    texts = {(image, text) for one in drawn for image, text in zip(one.image_index.tolist(), one.texts, strict=True)}
    assert len(false.captions) == len(texts) and {*false.features.image_index.tolist()} == {0, 1, 2}
    assert torch.equal(part.image_index[false.captions], false.features.image_index)
    with pytest.raises(MmkitError, match=r"1 images .* id"):
        mmkit.diagnostic_pairs(dataset.select(range(3)), features.select(range(4)), encoders, cache)
    with pytest.raises(MmkitError, match=r"features\.select"):
        mmkit.false_captions(dataset, replace(features, image_index=features.image_index[1:]), encoders, cache)


@pytest.mark.parametrize("block", [2, 1024])
def test_forced_choice_counts_higher_logits_and_half_of_the_ties(block, monkeypatch):
    monkeypatch.setattr(evaluation, "_PAIRS", block)
    captions = torch.tensor([5.0, 1, 2, 3, 4, 0])[:, None].expand(6, 4)
    features = PairedFeatures.from_arrays(torch.ones(5, 4), captions, [0, 0, 1, 2, 3, 4])
    negatives = given(features, [0, 1, 2, 3], [1, 2, 3, 4], torch.tensor([0.5, 2.0, 9.0, 3.5])[:, None].expand(4, 4))
    row = mmkit.diagnostic_report(Product().train(), features, negatives)["count"]
    assert (row.fact, row.accuracy) == ("count", (1 + 0.5 + 0 + 1) / 4)
    assert row.pairs == 4
    assert row.interval == bootstrap(np.array([1, 0.5, 0, 1]), np.ones(4))
    blind = given(features, [0, 1, 2], [1, 2, 3], captions[1:4])
    row = mmkit.diagnostic_report(Product(), features, blind)["count"]
    assert row.accuracy == 0.5 and row.interval == (0.5, 0.5), "blind to the fact: chance"
    row = mmkit.diagnostic_report(Product(), features, given(features, [4], [5], torch.ones(1, 4)))["count"]
    assert row.accuracy == 0 and row.interval == (0, 1), "one pair tells nothing"


@pytest.mark.parametrize("kind", [MultimodalFeatureFuser, RegionWordGNN, MultimodalGNN])
def test_only_a_transductive_fuser_sees_the_false_captions_in_its_pool(kind, monkeypatch):
    torch.manual_seed(0)
    fuser, features, other = kind(24, 16, 16).eval(), learnable(12, 0), learnable(12, 1)
    other = replace(other, caption_table=other.caption_table.select(range(12)), image_index=torch.arange(12))
    negatives = DiagnosticNegatives("count", np.arange(12), np.arange(0, 24, 2), ("false",) * 12)
    pool, alone = encode_pool(fuser, features, other), encode_pool(fuser, features)
    true, false = (pool.logits(torch.arange(12), rows) for rows in (torch.arange(0, 24, 2), torch.arange(24, 36)))
    calls, nodes = [], kind.nodes
    monkeypatch.setattr(kind, "nodes", lambda *given: calls.append(len(given[1]) + len(given[2])) or nodes(*given))
    row = mmkit.diagnostic_report(fuser, features, {"count": (negatives, other)}, alone)["count"]
    assert row.accuracy == (true > false).double().mean()
    assert sum(calls) == 48 if fuser.transductive else sum(calls) < 36, "the pool's nodes are not encoded again"
    assert row == mmkit.diagnostic_report(fuser, features, {"count": (negatives, other)})["count"]


def test_pairs_that_are_not_of_the_features_are_refused():
    features = PairedFeatures.from_arrays(torch.ones(3, 4), torch.ones(6, 4), [0, 0, 1, 1, 2, 2])
    for images, captions, texts in (([0], [2], 1), ([0], [0], 2), ([3], [6], 1), ([], [], 0)):
        with pytest.raises(MmkitError, match=r"'count'.*diagnostic_pairs"):
            mmkit.diagnostic_report(Product(), features, given(features, images, captions, torch.ones(texts, 4)))
    with pytest.raises(MmkitError, match="NaN"):
        mmkit.diagnostic_report(Product(), features, given(features, [0], [0], torch.full((1, 4), torch.nan)))


class Leaking(MultimodalFeatureFuser):
    """Image `i` and text `i` of a pool get the same random vector: the pairing leaks through the index."""

    def nodes(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        image_nodes, text_nodes = super().nodes(images, texts)
        tags = torch.randn(max(len(images), len(texts)), self.width, generator=torch.Generator().manual_seed(5))
        return unit_scale(image_nodes + tags[: len(images)]), unit_scale(text_nodes + tags[: len(texts)])


@pytest.mark.parametrize("kind", [MultimodalFeatureFuser, MultimodalGNN, Leaking])
def test_a_fuser_that_reads_positions_changes_with_the_order_of_the_pool(kind):
    images, texts = (torch.randn(20, dim, generator=torch.Generator().manual_seed(0)) for dim in (10, 8))
    torch.manual_seed(0)
    gap = mmkit.permutation_gap(kind(10, 8, 32), images, texts)
    assert gap > 0.05 if kind is Leaking else gap < 1e-4


@pytest.mark.parametrize("kind", [MultimodalFeatureFuser, Leaking])
def test_a_fuser_that_is_trained_on_noise_is_at_chance_on_other_noise_unless_it_cheats(kind, monkeypatch):
    seen, report = [], diagnostics.retrieval_report
    monkeypatch.setattr(diagnostics, "retrieval_report", lambda *given: seen.append(given[1]) or report(*given))

    def train(noise: PairedFeatures, validation: PairedFeatures) -> PairFuser:
        seen.extend([noise, validation])
        torch.manual_seed(0)
        fuser = kind(*noise.dims, 32)
        mmkit.fit(fuser, noise, validation, settings(epochs=2))
        return fuser

    recall, chance = mmkit.noise_recall(train, (10, 8), pairs=100, held_out=200), 1 / 200
    assert recall > 0.2 if kind is Leaking else recall < chance + 4 * (chance / 200) ** 0.5
    assert [len(part) for part in seen] == [100, 200, 200]
    assert not torch.isin(seen[2].images(), torch.cat([part.images() for part in seen[:2]])).any()
