"""Figures of the reports against brute force, hand counts and scikit-learn."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, roc_auc_score
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mmkit
from mmkit import (
    MmkitError,
    MultimodalFeatureFuser,
    MultimodalGNN,
    PairedFeatures,
    best_threshold,
    choose_thresholds,
    matching_logits,
    matching_report,
    negative_pairs,
    noise_recall,
    ranks,
    report_json,
    retrieval_report,
)
from mmkit.evaluation import ranked
from mmkit.fusers import PairFuser
from mmkit.metrics import bootstrap, mean_and_deviation, retrieval_intervals

IMAGE_DIM, TEXT_DIM = 6, 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_features(images: int = 12, captions: int = 30, seed: int = 0) -> PairedFeatures:
    """Each image has at least one caption, and the captions' order does not follow the images'."""
    generator = torch.Generator().manual_seed(seed)
    owner = torch.cat([torch.arange(images), torch.randint(images, (captions - images,), generator=generator)])
    owner = owner[torch.randperm(captions, generator=generator)]
    return PairedFeatures.from_arrays(
        random(images, IMAGE_DIM, seed=seed), random(captions, TEXT_DIM, seed=seed), owner
    )


def random_fuser(kind: type[PairFuser] = MultimodalFeatureFuser) -> PairFuser:
    torch.manual_seed(0)
    fuser = kind(IMAGE_DIM, TEXT_DIM, 8)
    torch.nn.init.normal_(fuser.match_head.weight)
    return fuser.eval()


def constant_fuser(logit: float = 0.25) -> PairFuser:
    fuser = random_fuser()
    torch.nn.init.zeros_(fuser.match_head.weight)
    torch.nn.init.constant_(fuser.match_head.bias, logit)
    return fuser


BOTH = pytest.mark.parametrize("kind", [MultimodalFeatureFuser, MultimodalGNN], ids=["mlp", "gnn"])


# --- negatives -----------------------------------------------------------------------------------


def test_random_negatives_are_another_image_and_every_other_one_is_as_likely():
    owner = torch.arange(4).repeat(300)
    features = PairedFeatures.from_arrays(random(4, IMAGE_DIM), random(1200, TEXT_DIM), owner)
    images, captions = negative_pairs(features, "random", seed=1)
    assert captions.tolist() == list(range(1200))
    for own in range(4):
        counts = images[owner == own].bincount(minlength=4)
        assert counts[own] == 0
        assert all(100 - 50 < counts[other] < 100 + 50 for other in range(4) if other != own)  # six deviations


def test_random_negatives_follow_the_seed():
    features = random_features()
    first, again, other = (negative_pairs(features, "random", seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("chunk", [7, 4096])
def test_hard_negatives_are_the_nearest_caption_of_another_image(chunk, monkeypatch):
    monkeypatch.setattr(mmkit.evaluation, "_CHUNK", chunk)
    features = random_features()
    texts, owner = features.captions(), features.owner.tolist()
    images, captions = negative_pairs(features, "hard")
    assert images.tolist() == owner
    for j, found in enumerate(captions.tolist()):
        others = [i for i in range(len(owner)) if owner[i] != owner[j]]
        assert found == max(others, key=lambda i: F.cosine_similarity(texts[i], texts[j], dim=0).item())


def test_negatives_that_cannot_be_are_refused():
    with pytest.raises(MmkitError, match=r"'hardest'.*random, hard"):
        negative_pairs(random_features(), "hardest")
    alone = PairedFeatures.from_arrays(random(1, IMAGE_DIM), random(3, TEXT_DIM), [0, 0, 0])
    for kind in ("random", "hard"):
        with pytest.raises(MmkitError, match="at least two images"):
            negative_pairs(alone, kind)


# --- matching ------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("negatives", ["random", "hard"])
@pytest.mark.parametrize("chunk", [7, 4096])
def test_matching_logits_are_the_scores_of_the_true_and_the_unmatched_pairs(kind, negatives, chunk, monkeypatch):
    monkeypatch.setattr(mmkit.evaluation, "_CHUNK", chunk)
    fuser, features = random_fuser(kind), random_features()
    logits, labels = matching_logits(fuser.train(), features, negatives, seed=3)
    scores = fuser.eval().score(features.images(), features.captions()).detach()
    images, captions = negative_pairs(features, negatives, seed=3)
    expected = torch.cat([scores[features.owner, torch.arange(30)], scores[images, captions]])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert labels.tolist() == [1] * 30 + [0] * 30


@pytest.mark.parametrize("seed", range(30))
def test_the_best_threshold_is_as_accurate_as_any_cut(seed):
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.randint(1, 25, (), generator=generator))
    labels = torch.randint(2, (size,), generator=generator)
    logits = torch.randint(8, (size,), generator=generator) / 2 + labels * (seed % 3)  # many ties
    if seed % 5 == 0:
        logits = -logits
    values = sorted(set(logits.tolist()))
    cuts = [values[0] - 1, *((a + b) / 2 for a, b in itertools.pairwise(values)), values[-1] + 1]

    def accuracy(cut: float) -> float:
        return sum((x > cut) == bool(y) for x, y in zip(logits.tolist(), labels.tolist(), strict=True)) / size

    threshold = best_threshold(logits, labels)
    assert accuracy(threshold) == max(accuracy(cut) for cut in cuts)
    assert any(abs(threshold - cut) <= 0.5 for cut in cuts) and threshold not in values


def test_the_best_threshold_lies_halfway_between_two_neighbours():
    assert best_threshold(torch.tensor([3.0, 1.0, 8.0, 2.0]), torch.tensor([0, 0, 1, 0])) == 5.5
    assert best_threshold(torch.tensor([1.0, 2.0]), torch.tensor([1, 1])) < 1
    assert best_threshold(torch.tensor([1.0, 2.0]), torch.tensor([0, 0])) > 2
    assert best_threshold(torch.zeros(4), torch.tensor([1, 0, 1, 1])) < 0


@BOTH
def test_the_matching_report_agrees_with_scikit_learn(kind):
    fuser, features = random_fuser(kind), random_features()
    thresholds = {"random": 0.3, "hard": -0.2}
    report = matching_report(fuser, features, thresholds, seed=2)
    assert report.keys() == {"random", "hard"}
    for negatives, row in report.items():
        logits, labels = (part.numpy() for part in matching_logits(fuser, features, negatives, seed=2))
        called = logits > thresholds[negatives]
        assert 0 < called.sum() < len(called)
        assert row.accuracy == pytest.approx(accuracy_score(labels, called))
        assert row.f1 == pytest.approx(f1_score(labels, called))
        assert row.roc_auc == pytest.approx(roc_auc_score(labels, logits))
        assert row.average_precision == pytest.approx(average_precision_score(labels, logits))
        above = [(a > b) + (a == b) / 2 for a in logits[labels == 1] for b in logits[labels == 0]]
        assert row.roc_auc == pytest.approx(sum(above) / len(above))
        hits, calls = (called & (labels == 1)).sum(), called.sum()
        assert row.f1 == pytest.approx(2 * hits / (calls + 30))
        assert (row.negatives, row.threshold, row.pairs, row.pool) == (negatives, thresholds[negatives], 60, (12, 30))


def test_the_threshold_comes_from_the_validation_split_alone():
    fuser, validation, test = random_fuser(), random_features(seed=1), random_features(seed=2)
    thresholds = choose_thresholds(fuser, validation, seed=4)
    for kind, threshold in thresholds.items():
        assert threshold == best_threshold(*matching_logits(fuser, validation, kind, seed=4))
        logits, labels = matching_logits(fuser, test, kind, seed=4)
        at_validations = accuracy_score(labels, logits > threshold)
        at_its_own = accuracy_score(labels, logits > best_threshold(logits, labels))
        assert at_validations < at_its_own
        row = matching_report(fuser, test, thresholds, seed=4)[kind]
        assert row.accuracy == pytest.approx(at_validations) and row.threshold == threshold


def test_a_threshold_between_two_neighbouring_floats_still_parts_them(monkeypatch):
    low = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    high = torch.nextafter(low, torch.tensor(2.0))
    logits, labels = torch.stack([high, high, low, low]), torch.tensor([1, 1, 0, 0])
    monkeypatch.setattr(mmkit.evaluation, "matching_logits", lambda *_: (logits, labels))
    report = matching_report(random_fuser(), random_features(2, 2), {"random": best_threshold(logits, labels)})
    assert report["random"].accuracy == 1


def test_a_constant_fuser_scores_as_the_constants_do():
    fuser, features = constant_fuser(), random_features()
    always = matching_report(fuser, features, choose_thresholds(fuser, features))
    never = matching_report(fuser, features, {"random": 1.0, "hard": 1.0})
    for kind in ("random", "hard"):
        assert always[kind].roc_auc == never[kind].roc_auc == 0.5
        assert always[kind].accuracy == never[kind].accuracy == 0.5
        assert always[kind].f1 == pytest.approx(2 / 3) and never[kind].f1 == 0


def test_a_fuser_whose_logits_are_nan_is_refused():
    fuser, features = random_fuser(), random_features()
    torch.nn.init.constant_(fuser.match_head.bias, float("nan"))
    with pytest.raises(MmkitError, match="NaN"):
        matching_report(fuser, features, {"random": 0.0})
    with pytest.raises(MmkitError, match="NaN"):
        retrieval_report(fuser, features)


# --- retrieval -----------------------------------------------------------------------------------


def brute_force_ranks(scores: list[list[float]], owner: list[int]) -> tuple[list[int], list[int]]:
    """Sort, with true matches after all others of the same score, and look for the first true one."""
    n, m = len(scores), len(owner)
    image_ranks, caption_ranks = [], []
    for i in range(n):
        order = sorted(range(m), key=lambda j: (-scores[i][j], owner[j] == i))
        image_ranks.append(next((place for place, j in enumerate(order, 1) if owner[j] == i), m + 1))
    for j in range(m):
        order = sorted(range(n), key=lambda i: (-scores[i][j], owner[j] == i))
        caption_ranks.append(order.index(owner[j]) + 1)
    return image_ranks, caption_ranks


@pytest.mark.parametrize("levels", [2, 5, None], ids=["two levels", "five levels", "no ties"])
@pytest.mark.parametrize("seed", range(5))
def test_ranks_equal_a_sort_with_ties_against_the_model(levels, seed):
    scores, owner = random(9, 20, seed=seed), random_features(9, 20, seed=seed).owner
    if levels:
        scores = torch.randint(levels, (9, 20), generator=torch.Generator().manual_seed(seed)).float()
    found = ranks(scores, owner)
    expected = brute_force_ranks(scores.tolist(), owner.tolist())
    assert tuple(part.tolist() for part in found) == expected


def test_an_image_without_captions_ranks_below_all():
    scores, owner = random(3, 4), torch.tensor([0, 0, 2, 2])
    assert ranks(scores, owner)[0].tolist() == brute_force_ranks(scores.tolist(), owner.tolist())[0]
    assert ranks(scores, owner)[0][1] == 5


def test_ranks_of_a_pool_larger_than_one_block():
    n = 4200
    assert n * n > 2**24
    place = torch.arange(n) % 11
    distance = (torch.arange(n) - torch.arange(n)[:, None] + place[:, None]) % n
    image_ranks, caption_ranks = ranks(-distance.float(), torch.arange(n))
    assert torch.equal(image_ranks, place + 1)
    for j in (0, 5, 3999, n - 1):
        assert caption_ranks[j] == 1 + (distance[:, j] < place[j]).sum() + (distance[:, j] == place[j]).sum() - 1


def test_equal_scores_put_the_true_match_last():
    image_ranks, caption_ranks = ranks(torch.zeros(3, 6), torch.tensor([0, 0, 1, 1, 2, 2]))
    assert image_ranks.tolist() == [5] * 3 and caption_ranks.tolist() == [3] * 6
    found = retrieval_report(constant_fuser(), random_features(40, 80))
    assert (found.image_to_text.r10, found.text_to_image.r10, found.rsum) == (0, 0, 0)
    assert found.text_to_image.median_rank == 40


def test_scores_that_cannot_be_ranked_are_refused():
    scores = torch.zeros(2, 3)
    with pytest.raises(MmkitError, match="3 columns for 4 captions"):
        ranks(scores, torch.tensor([0, 0, 1, 1]))
    scores[1, 2] = float("nan")
    with pytest.raises(MmkitError, match="NaN"):
        ranks(scores, torch.tensor([0, 1, 1]))


def test_a_perfect_fuser_finds_everything():
    torch.manual_seed(0)
    fuser = MultimodalFeatureFuser(IMAGE_DIM, IMAGE_DIM, IMAGE_DIM)
    for projection in (fuser.project_images, fuser.project_texts):
        torch.nn.init.eye_(projection.weight)
        torch.nn.init.zeros_(projection.bias)
    images, owner = random(30, IMAGE_DIM), torch.arange(60) % 30
    features = PairedFeatures.from_arrays(images, 3 * images[owner], owner)
    found = retrieval_report(fuser.train(), features)
    for recall in (found.image_to_text, found.text_to_image):
        assert (recall.r1, recall.r5, recall.r10, recall.median_rank) == (1, 1, 1, 1)
    assert found.rsum == 600 and found.pool == (30, 60)
    assert matching_report(fuser, features, choose_thresholds(fuser, features))["hard"].accuracy == 1


@BOTH
def test_the_retrieval_report_counts_the_ranks_of_the_scores(kind):
    fuser, features = random_fuser(kind), random_features(25, 60)
    scores = fuser.score(features.images(), features.captions())
    found = retrieval_report(fuser, features)
    by_hand = brute_force_ranks(scores.tolist(), features.owner.tolist())
    recalls = []
    for recall, places in zip((found.image_to_text, found.text_to_image), by_hand, strict=True):
        expected = [sum(place <= k for place in places) / len(places) for k in (1, 5, 10)]
        assert [recall.r1, recall.r5, recall.r10] == pytest.approx(expected)
        middle = sorted(places)[(len(places) - 1) // 2 : len(places) // 2 + 1]
        assert recall.median_rank == sum(middle) / len(middle)
        recalls += expected
    assert 0 < sum(recalls) < 6 and found.rsum == pytest.approx(100 * sum(recalls))


@BOTH
@pytest.mark.parametrize("block", [1, 7, 24, 25, None])
def test_ranks_of_a_fuser_in_blocks_are_those_of_all_its_scores(kind, block):
    fuser, features = random_fuser(kind), random_features(25, 60)
    scores = fuser.score(features.images(), features.captions())
    found = ranked(fuser.train(), features, block)
    assert all(torch.equal(part, other) for part, other in zip(found, ranks(scores, features.owner), strict=True))
    assert [part.shape for part in found] == [(25,), (60,)]


def test_ties_go_against_the_fuser_whatever_the_block():
    features = random_features(40, 80)
    whole = ranked(constant_fuser(), features)
    assert torch.equal(whole[0], 81 - features.owner.bincount()) and whole[1].tolist() == [40] * 80
    for part, other in zip(ranked(constant_fuser(), features, block=9), whole, strict=True):
        assert torch.equal(part, other)


class _Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that an operation gives."""

    numel = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        given = operation(*arguments, **(keywords or {}))
        for part in given if isinstance(given, (tuple, list)) else [given]:
            if isinstance(part, Tensor):
                self.numel = max(self.numel, part.numel())
        return given


def test_a_large_pool_is_ranked_without_all_its_scores(monkeypatch):
    monkeypatch.setattr(mmkit.fusers, "_BLOCK", 2**14)
    monkeypatch.setattr(mmkit.metrics, "_BLOCK", 2**14)
    fuser, features = random_fuser(), random_features(300, 1500)
    with _Largest() as seen:
        found = ranked(fuser, features)
    assert seen.numel <= 2**14 < 300 * 1500 / 20
    scores = fuser.score(features.images(), features.captions())
    for part, other in zip(found, ranks(scores, features.owner), strict=True):
        assert torch.equal(part, other)
    with _Largest() as seen, torch.no_grad():
        fuser.score(features.images(), features.captions())
    assert seen.numel == 300 * 1500


def test_the_reports_carry_intervals_over_images():
    fuser, features = random_fuser(), random_features(25, 60)
    torch.nn.init.normal_(fuser.concatenation[0].weight)
    thresholds = {"random": 0.3, "hard": -0.2}
    for kind, row in matching_report(fuser, features, thresholds, seed=2).items():
        logits, labels = matching_logits(fuser, features, kind, seed=2)
        correct = ((logits > thresholds[kind]) == labels.bool()).view(2, 60).sum(dim=0)
        sums = [correct[features.owner == image].sum() for image in range(25)]
        counts = 2 * features.owner.bincount()
        assert row.intervals == {"accuracy": bootstrap(torch.tensor(sums), counts, seed=2)}
        assert row.intervals["accuracy"].low < row.accuracy < row.intervals["accuracy"].high
    found = retrieval_report(fuser, features)
    assert found.intervals == retrieval_intervals(*ranked(fuser, features), features.owner)
    assert found.intervals["rsum"].low < found.rsum < found.intervals["rsum"].high
    low, high = found.intervals["text_to_image.r10"]
    assert low < found.text_to_image.r10 < high
    alone = PairedFeatures.from_arrays(random(1, IMAGE_DIM), random(3, TEXT_DIM), [0, 0, 0])
    assert retrieval_report(fuser, alone).intervals == {}


def test_average_precision_calls_tied_pairs_together(monkeypatch):
    logits, labels = torch.tensor([3.0, 2.0, 2.0, 1.0, 2.0, 1.0]), torch.tensor([1, 1, 1, 0, 0, 0])
    monkeypatch.setattr(mmkit.evaluation, "matching_logits", lambda *_: (logits, labels))
    row = matching_report(random_fuser(), random_features(3, 3), {"random": 2.0})["random"]
    assert row.average_precision == pytest.approx(1 / 3 * 1 + 2 / 3 * 3 / 4)
    assert row.roc_auc == pytest.approx((3 + 2 * 2.5) / 9)
    assert row.accuracy == pytest.approx(4 / 6) and row.f1 == pytest.approx(1 / 2)  # on the threshold: unmatched


def test_reports_of_several_seeds_have_a_mean_and_a_deviation():
    features = random_features()
    reports = [
        report_json(features, matching_report(fuser, features, {"random": 0.0}), retrieval_report(fuser, features))
        for fuser in (random_fuser(), constant_fuser())
    ]
    found = mean_and_deviation(reports)
    accuracies = [report["matching"]["random"]["accuracy"] for report in reports]
    assert found["matching"]["random"]["accuracy"] == pytest.approx(
        (sum(accuracies) / 2, abs(accuracies[0] - accuracies[1]) / 2**0.5)
    )
    assert found["sizes"]["images"] == (12, 0)


def test_the_json_report_holds_sizes_and_fractions_of_both_tasks():
    fuser, features = random_fuser(), random_features()
    matching, retrieval = (
        matching_report(fuser, features, {"random": 0.0, "hard": 0.0}),
        retrieval_report(fuser, features),
    )
    report = report_json(features, matching, retrieval)
    assert report["sizes"] == {"images": 12, "captions": 30}
    assert report["matching"].keys() == {"random", "hard"}
    assert report["matching"]["hard"]["f1"] == matching["hard"].f1
    assert report["matching"]["random"].keys() >= {"accuracy", "f1", "roc_auc"}
    assert report["retrieval"]["image_to_text"]["r5"] == retrieval.image_to_text.r5
    assert report["retrieval"]["text_to_image"].keys() >= {"r1", "r5", "r10"}
    assert report["rsum"] == retrieval.rsum
    assert report["constants"]["always"] == pytest.approx({"accuracy": 0.5, "f1": 2 / 3, "average_precision": 0.5})
    low, high = matching["hard"].intervals["accuracy"]
    assert report["intervals"]["hard"] == {"accuracy": {"low": low, "high": high}}
    assert report["intervals"]["retrieval"].keys() == retrieval.intervals.keys()
    assert json.loads(json.dumps(report)) == report


# --- checks of honesty ---------------------------------------------------------------------------


def test_noise_recall_judges_on_noise_that_training_has_not_seen():
    seen = []

    def train(noise: PairedFeatures, validation: PairedFeatures) -> PairFuser:
        seen.extend([noise, validation])
        return random_fuser()

    judged = []
    report = mmkit.evaluation.retrieval_report
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmkit.evaluation, "retrieval_report", lambda *given: (judged.append(given[1]), report(*given))[1])
        recall = noise_recall(train, (IMAGE_DIM, TEXT_DIM), pairs=30, held_out=20)
    noise, validation, held_out = *seen, *judged
    assert [len(part.owner) for part in (noise, validation, held_out)] == [30, 20, 20]
    assert held_out.owner.tolist() == list(range(20))
    assert not torch.isin(held_out.images(), torch.cat([noise.images(), validation.images()])).any()
    assert recall == report(random_fuser(), held_out).text_to_image.r1
