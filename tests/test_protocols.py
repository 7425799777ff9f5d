"""Changed facts, folds and other positives against hand counts."""

import itertools
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmkit import FACTS, DiagnosticNegatives, MmkitError, MultimodalGNN, PairedFeatures, ranks, retrieval_report
from mmkit.fusers import PairFuser
from mmkit.metrics import bootstrap
from mmkit.protocols import (
    diagnostic_pairs,
    diagnostic_report,
    eccv_scores,
    encode_texts,
    false_captions,
    folded_retrieval,
    ranked_lists,
    subset,
)


class Product(PairFuser):
    """Scores a pair by the product of its features: a fuser whose logits are known."""

    def __init__(self, dim: int = 4, transductive: bool = False) -> None:
        super().__init__(dim, dim, dim, 0.0, 0.0)
        self.transductive = transductive
        nn.init.zeros_(self.match_head.bias)
        with torch.no_grad():
            self.match_head.weight[:, :dim].fill_(1)

    def nodes(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        return images, texts


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_features(images: int = 30, captions_each: int = 5, dim: int = 4) -> PairedFeatures:
    owner = torch.arange(images).repeat_interleave(captions_each)
    return PairedFeatures.from_arrays(random(images, dim), random(len(owner), dim, seed=1), owner)


# --- one fact changed ----------------------------------------------------------------------------


def test_texts_are_encoded_as_the_store_holds_them(dataset, encoders, store):
    texts = dataset.captions[:70]
    found = encode_texts(encoders, texts, precision="float32", batch=16)
    torch.testing.assert_close(found, store.select().captions(slice(70)), rtol=0, atol=2e-3)  # float16 on disk
    assert found.dtype == torch.float32 and not found.requires_grad
    assert encode_texts(encoders, []).shape == (0, encoders.text.dim)


def test_the_pairs_are_rows_of_the_selection_and_round_as_the_store_does(dataset, encoders, store):
    chosen = [40, 3, 17, 58, 9]
    features = store.select(chosen)
    found = diagnostic_pairs(dataset, features, encoders, seed=2, precision="float32")
    again = diagnostic_pairs(dataset.select(chosen), features, encoders, ["ground"], seed=2, precision="float32")
    assert set(found) <= set(FACTS) and again["ground"][0].texts == found["ground"][0].texts
    assert torch.equal(again["ground"][1].captions(), found["ground"][1].captions())
    for fact, (pairs, false) in found.items():
        texts = false.captions()
        assert false.owner.tolist() == pairs.images.tolist() and torch.equal(false.images(), features.images())
        whole = dataset.diagnostic_negatives(fact, seed=2)
        assert len(texts) == len(pairs.texts) > 0
        assert torch.equal(texts, texts.half().float())
        assert torch.equal(features.owner[torch.from_numpy(pairs.captions)], torch.from_numpy(pairs.images))
        for row, caption, text in zip(pairs.images, pairs.captions, pairs.texts, strict=True):
            place = whole.images.tolist().index(chosen[row])
            assert whole.texts[place] == text and features.caption_rows[caption] == whole.captions[place]
    torch.testing.assert_close(
        found["ground"][1].captions(), encode_texts(encoders, found["ground"][0].texts, "float32"), rtol=0, atol=2e-3
    )
    report = diagnostic_report(
        MultimodalGNN(*features.dims, hidden_dim=8, heads=2), features, {"ground": found["ground"]}
    )
    assert report["ground"].pool == (5, 25 + 5) and report["ground"].pairs == 5


def test_pairs_of_another_dataset_are_refused(dataset, encoders, store):
    features = store.select(range(4))
    with pytest.raises(MmkitError, match=r"1 images .* id"):
        diagnostic_pairs(dataset.select(range(3)), features, encoders)
    fewer = replace(features, owner=features.owner[1:], caption_rows=features.caption_rows[1:])
    with pytest.raises(MmkitError, match=r"store\.select"):
        diagnostic_pairs(dataset, fewer, encoders)


def test_images_without_such_a_fact_have_no_false_captions(dataset, encoders, store):
    alone = [image for image, scene in enumerate(dataset.scenes) if scene.relation is None][:3]
    with pytest.raises(MmkitError, match=r"None of the 3 images .* roles, relation"):
        false_captions(dataset, store.select(alone), encoders, ("roles", "relation"))
    found = false_captions(dataset, store.select(alone), encoders, ("object",), precision="float32")
    assert {*found.features.owner.tolist()} == {0, 1, 2}
    assert store.select(alone).owner[found.captions].tolist() == found.features.owner.tolist()


def pairs_of(images: list[int], captions: list[int]) -> DiagnosticNegatives:
    return DiagnosticNegatives("count", np.array(images), np.array(captions), ("false",) * len(images))


def false_of(features: PairedFeatures, texts: Tensor) -> PairedFeatures:
    """Captions whose owners do not matter: the pairs name the images."""
    return PairedFeatures.from_arrays(features.images(), texts, [0] * len(texts))


@pytest.mark.parametrize("chunk", [2, 1024])
def test_forced_choice_counts_higher_logits_and_half_of_the_ties(chunk, monkeypatch):
    monkeypatch.setattr("mmkit.shortlist._PAIRS", chunk)
    images = torch.ones(5, 4)
    captions = torch.tensor([5.0, 1, 2, 3, 4, 0])[:, None] * torch.ones(6, 4)
    features = PairedFeatures.from_arrays(images, captions, [0, 0, 1, 2, 3, 4])
    false = torch.tensor([0.5, 2.0, 9.0, 3.5])[:, None] * torch.ones(4, 4)
    negatives = {"count": (pairs_of([0, 1, 2, 3], [1, 2, 3, 4]), false_of(features, false))}
    found = diagnostic_report(Product().train(), features, negatives)["count"]
    assert (found.fact, found.accuracy, found.ties, found.pairs) == ("count", (1 + 0.5 + 0 + 1) / 4, 1 / 4, 4)
    assert found.interval == bootstrap(np.array([1, 0.5, 0, 1]), np.ones(4))
    assert found.pool == (5, 10)


def test_a_fuser_that_is_blind_to_the_fact_is_at_chance_and_one_pair_tells_nothing():
    features = random_features(20, 1)
    pairs = pairs_of(list(range(20)), list(range(20)))
    found = diagnostic_report(Product(), features, {"count": (pairs, features)})["count"]
    assert found.accuracy == 0.5 and found.ties == 1 and found.interval == (0.5, 0.5)
    one = diagnostic_report(Product(), features, {"count": (pairs_of([3], [3]), false_of(features, random(1, 4)))})[
        "count"
    ]
    assert one.interval == (0, 1)


def test_pairs_that_are_not_of_the_features_are_refused():
    features = random_features(3, 2)
    for pairs, texts in (
        (pairs_of([0], [2]), random(1, 4)),
        (pairs_of([0], [0]), random(2, 4)),
        (pairs_of([3], [6]), random(1, 4)),
        (pairs_of([], []), random(0, 4)),
    ):
        with pytest.raises(MmkitError, match="diagnostic_pairs"):
            diagnostic_report(Product(), features, {"count": (pairs, false_of(features, texts))})
    nan = false_of(features, torch.full((1, 4), torch.nan))
    with pytest.raises(MmkitError, match="NaN"):
        diagnostic_report(Product(), features, {"count": (pairs_of([0], [0]), nan)})


# --- 1K and 5K -----------------------------------------------------------------------------------


def test_a_subset_keeps_images_with_their_captions():
    owner = [2, 0, 1, 2, 0, 3]
    features = PairedFeatures.from_arrays(random(4, 3), random(6, 5), owner)
    part = subset(features, [3, 2])
    assert part.owner.tolist() == [1, 1, 0] and part.image_ids.tolist() == [3, 2]
    assert torch.equal(part.images(), features.images([3, 2]))
    assert torch.equal(part.captions(), features.captions([0, 3, 5]))


def test_folds_are_neighbours_in_the_datasets_order_and_their_mean_is_reported():
    features = random_features(23)
    shuffled = subset(features, torch.randperm(23, generator=torch.Generator().manual_seed(3)))
    scores = features.images() @ features.captions().T
    for given in (features, shuffled):
        found = folded_retrieval(Product(), given, folds=5)
        assert [report.pool[0] for report in found.folds] == [5, 5, 5, 4, 4]
        recalls, starts = [], [0, 5, 10, 15, 19, 23]
        for first, last, report in zip(starts, starts[1:], found.folds, strict=False):
            block = scores[first:last, 5 * first : 5 * last]
            places = ranks(block, torch.arange(last - first).repeat_interleave(5))[1]
            recalls.append((places <= 1).float().mean().item())
            assert report.text_to_image.r1 == pytest.approx(recalls[-1])
        assert found.mean.text_to_image.r1 == pytest.approx(np.mean(recalls))
        assert found.spread["text_to_image.r1"] == pytest.approx((np.mean(recalls), np.std(recalls, ddof=1)))
        assert found.mean.rsum == pytest.approx(found.spread["rsum"].mean)
        assert found.mean.rsum == pytest.approx(np.mean([report.rsum for report in found.folds]))
        assert found.mean.rsum > retrieval_report(Product(), given).rsum  # a smaller pool is easier
        short = folded_retrieval(Product(), given, 5, shortlist=2)
        assert [report.rsum for report in short.folds] == [
            retrieval_report(Product(), subset(given, np.argsort(given.image_rows)[first:last]), 2).rsum
            for first, last in itertools.pairwise(starts)
        ]


@pytest.mark.parametrize("folds", [1, 6])
def test_folds_of_less_than_two_images_are_refused(folds):
    with pytest.raises(MmkitError, match=f"{folds} folds of 10 images"):
        folded_retrieval(Product(), random_features(10), folds)


# --- the positives that COCO's labels miss ---------------------------------------------------------


@pytest.mark.parametrize("transductive", [False, True])
@pytest.mark.parametrize("block", [2 * 150 * 7, 2**24])
def test_ranked_lists_are_a_sort_by_score_with_true_matches_after_ties(block, transductive, monkeypatch):
    monkeypatch.setattr("mmkit.metrics._BLOCK", block)
    features = random_features()
    features = PairedFeatures.from_arrays(features.images().round(), features.captions().round(), features.owner)
    features = replace(features, image_ids=1000 + np.arange(30))
    captions = 7 * np.arange(150)
    scores, owner = features.images() @ features.captions().T, features.owner
    to_captions, to_images = ranked_lists(Product(transductive=transductive), features, captions, depth=12)
    assert list(to_captions) == features.image_ids.tolist() and list(to_images) == captions.tolist()
    assert all(len(kept) == len(set(kept)) == 12 for kept in [*to_captions.values(), *to_images.values()])
    for image in range(30):
        kept = scores[image, torch.tensor(to_captions[1000 + image]) // 7]
        assert torch.equal(kept, scores[image].sort(descending=True).values[:12])
    for caption in range(150):
        kept = scores[torch.tensor(to_images[7 * caption]) - 1000, caption]
        assert torch.equal(kept, scores[:, caption].sort(descending=True).values[:12])
    places = ranks(scores, owner)
    for image in range(30):
        first = next(
            (at for at, caption in enumerate(to_captions[1000 + image], 1) if owner[caption // 7] == image), 13
        )
        assert first == min(13, places[0][image])
    for caption in range(150):
        kept = to_images[7 * caption]
        own = 1000 + owner[caption].item()
        assert (kept.index(own) + 1 if own in kept else 13) == min(13, places[1][caption])
    with pytest.raises(MmkitError, match="2 caption ids for 150 captions"):
        ranked_lists(Product(), features, [1, 2])


class Metrics:
    """Stands in for the package's: three test images with five captions each."""

    coco_ids = np.array([*range(50, 55), *range(20, 25), *range(80, 85)])
    coco_gts = {"t2i": {caption: [{50: 500, 20: 200, 80: 800}[caption // 10 * 10]] for caption in coco_ids.tolist()}}  # noqa: RUF012

    given: tuple = ()

    def compute_all_metrics(self, images: dict, captions: dict, target_metrics: tuple, Ks: tuple) -> dict:
        Metrics.given = images, captions, target_metrics, Ks
        return {"eccv_map_at_r": {"i2t": np.float64(0.25), "t2i": np.float64(0.5)}}


def test_the_package_receives_ids_in_its_form_and_five_captions_an_image(monkeypatch):
    monkeypatch.setitem(sys.modules, "eccv_caption", SimpleNamespace(Metrics=Metrics))
    owner = [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2]  # six captions of the second
    features = PairedFeatures.from_arrays(random(3, 4), random(16, 4, seed=1), owner)
    features = replace(features, image_ids=np.array([800, 500, 200]))
    scores = eccv_scores(Product(), features)
    assert scores == {"eccv_map_at_r": {"i2t": 0.25, "t2i": 0.5}} and type(scores["eccv_map_at_r"]["i2t"]) is float
    to_captions, to_images, figures, cuts = Metrics.given
    kept = [row for row in range(16) if row != 10]
    scores = features.images() @ features.captions().T[:, kept]
    ids = [*range(80, 85), *range(50, 55), *range(20, 25)]
    for row, image in enumerate([800, 500, 200]):
        assert to_captions[image] == [ids[column] for column in scores[row].argsort(descending=True)]
    for column, caption in enumerate(ids):
        assert to_images[caption] == [[800, 500, 200][row] for row in scores[:, column].argsort(descending=True)]
    assert all(type(key) is int for part in (to_captions, to_images) for key in part)
    assert "eccv_map_at_r" in figures and cuts == (1, 5, 10)


def test_what_the_package_cannot_judge_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "eccv_caption", SimpleNamespace(Metrics=Metrics))
    with pytest.raises(MmkitError, match=r"3 test images .* 30 images, 0 of them"):
        eccv_scores(Product(), random_features())
    four = replace(random_features(3, 4), image_ids=np.array([800, 500, 200]))
    with pytest.raises(MmkitError, match="five captions"):
        eccv_scores(Product(), four)


def test_the_package_is_named_where_it_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "eccv_caption", None)
    with pytest.raises(MmkitError, match="pip install eccv-caption"):
        eccv_scores(Product(), random_features())
