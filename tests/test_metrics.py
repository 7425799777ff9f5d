"""Intervals against simulation, scipy and hand counts; calibration and constants against scikit-learn."""

import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.metrics import accuracy_score, average_precision_score, f1_score

from mmkit import MmkitError
from mmkit.metrics import (
    Interval,
    Spread,
    bootstrap,
    constant_scores,
    mean_and_deviation,
    ranks,
    reliability,
    resampled,
    retrieval_intervals,
)

# --- bootstrap -----------------------------------------------------------------------------------


def clusters(rng: np.random.Generator, images: int = 100, captions: int = 5) -> np.ndarray:
    """Right answers among each image's captions, which agree: each image has its own probability, 0.7 on average."""
    return rng.binomial(captions, rng.beta(0.7, 0.3, size=images))


def test_the_interval_covers_the_truth_as_often_as_it_says_and_one_over_captions_does_not():
    rng = np.random.default_rng(0)
    runs, counts = 600, np.full(100, 5)
    inside = by_captions = 0
    for run in range(runs):
        right = clusters(rng)
        low, high = bootstrap(right, counts, seed=run)
        inside += low <= 0.7 <= high
        captions = (np.arange(5) < right[:, None]).ravel()
        low, high = bootstrap(captions, np.ones(500), resamples=300, seed=run)
        by_captions += low <= 0.7 <= high
    assert 0.92 < inside / runs < 0.98
    assert by_captions / runs < 0.85


def test_on_independent_data_the_interval_is_scipys():
    answers = np.random.default_rng(1).random(400) < 0.8
    theirs = stats.bootstrap(
        (answers.astype(float),), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(2)
    ).confidence_interval
    ours = bootstrap(answers, np.ones(400), resamples=4000)
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.004)
    narrower = bootstrap(answers, np.ones(400), resamples=4000, level=0.5)
    assert ours.low < narrower.low < answers.mean() < narrower.high < ours.high
    assert narrower.high - narrower.low == pytest.approx(2 * 0.6745 * (0.16 / 400) ** 0.5, rel=0.1)


def test_where_the_captions_of_an_image_agree_the_interval_is_as_wide_as_of_images():
    right = np.random.default_rng(3).random(200) < 0.6
    over_images = bootstrap(5 * right, np.full(200, 5))
    assert over_images == pytest.approx(bootstrap(right, np.ones(200)))
    over_captions = bootstrap(np.repeat(right, 5), np.ones(1000))
    width = [interval.high - interval.low for interval in (over_images, over_captions)]
    assert width[0] / width[1] == pytest.approx(5**0.5, rel=0.15)


def test_a_resample_is_the_ratio_of_sums_over_the_images_drawn(monkeypatch):
    sums, counts = np.array([[1.0, 5], [0, 7], [3, 9]]), np.array([[1.0, 1], [2, 1], [4, 1]])
    whole = resampled(sums, counts, 50, seed=4)
    monkeypatch.setattr("mmkit.metrics._DRAWS", 3 * 7)  # in pieces the draws are the same
    np.testing.assert_array_equal(resampled(sums, counts, 50, seed=4), whole)
    possible = {tuple(sums[list(drawn)].sum(axis=0) / counts[list(drawn)].sum(axis=0)) for drawn in np.ndindex(3, 3, 3)}
    assert {tuple(row) for row in whole} <= possible and len({tuple(row) for row in whole}) > 5
    assert not np.array_equal(whole, resampled(sums, counts, 50, seed=5))


def test_images_without_pairs_do_not_disturb_the_interval():
    low, high = bootstrap(np.array([1, 0, 0, 0]), np.array([1, 1, 0, 0]), seed=1)
    assert 0 == low < high == 1
    assert bootstrap([4, 4, 4], [4, 4, 4]) == Interval(1, 1)


@pytest.mark.parametrize(("sums", "counts"), [([1], [1]), ([1, 2], [1, 1, 1]), ([0, 0], [0, 0]), ([[1, 2]], [[1, 2]])])
def test_intervals_of_what_has_none_are_refused(sums, counts):
    with pytest.raises(MmkitError, match="at least two"):
        bootstrap(np.array(sums), np.array(counts))


def test_the_intervals_of_the_recalls_draw_captions_with_their_images():
    rng = np.random.default_rng(5)
    scores = torch.from_numpy(rng.normal(size=(40, 100)))
    owner = torch.from_numpy(np.concatenate([np.arange(40), rng.integers(40, size=60)]))
    scores[owner, torch.arange(100)] += 1.5
    found = ranks(scores, owner)
    intervals = retrieval_intervals(*found, owner, seed=6)
    draws = np.random.default_rng(6).integers(40, size=(1000, 40))
    captions_of = [np.flatnonzero(owner == image) for image in range(40)]
    figures: dict[str, list[float]] = {name: [] for name in intervals}
    for drawn in draws:
        parts = (found[0][drawn], found[1][np.concatenate([captions_of[image] for image in drawn])])
        recalls = {
            f"{direction}.r{k}": (part <= k).double().mean().item()
            for direction, part in zip(("image_to_text", "text_to_image"), parts, strict=True)
            for k in (1, 5, 10)
        }
        for name, value in (recalls | {"rsum": 100 * sum(recalls.values())}).items():
            figures[name].append(value)
    assert len(intervals) == 7
    for name, interval in intervals.items():
        assert interval == pytest.approx(np.quantile(figures[name], [0.025, 0.975])) and interval.low < interval.high


# --- constants and calibration -------------------------------------------------------------------


@pytest.mark.parametrize("unmatched", [1, 7], ids=["1:1", "1:7"])
def test_the_constants_score_as_scikit_learn_says_and_as_the_papers_do(unmatched):
    labels = torch.tensor([1] + [0] * unmatched).repeat(10)
    found = constant_scores(labels)
    for name, called in {"always": torch.ones_like(labels), "never": torch.zeros_like(labels)}.items():
        assert found[name]["accuracy"] == pytest.approx(accuracy_score(labels, called))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UndefinedMetricWarning)
            assert found[name]["f1"] == pytest.approx(f1_score(labels, called))
        assert found[name]["average_precision"] == pytest.approx(average_precision_score(labels, called))
    by_hand = {1: (1 / 2, 2 / 3, 1 / 2, 1 / 2), 7: (1 / 8, 2 / 9, 1 / 8, 7 / 8)}[unmatched]
    assert (*found["always"].values(), found["never"]["accuracy"]) == pytest.approx(by_hand)


@pytest.mark.parametrize("labels", [[], [1, 1], [0]])
def test_constants_need_both_kinds_of_pairs(labels):
    with pytest.raises(MmkitError, match="matched and unmatched"):
        constant_scores(torch.tensor(labels))


def logit(probabilities: list[float]) -> torch.Tensor:
    return torch.logit(torch.tensor(probabilities, dtype=torch.double))


def test_the_calibration_error_equals_a_hand_computation():
    found = reliability(logit([0.1, 0.3, 0.6, 0.7, 0.9]), torch.tensor([0, 1, 0, 1, 1]), bins=4)
    assert found.edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert found.count.tolist() == [1, 1, 2, 1]
    assert found.confidence.tolist() == pytest.approx([0.1, 0.3, 0.65, 0.9])
    assert found.accuracy.tolist() == [0, 1, 0.5, 1]
    assert found.ece == pytest.approx((0.1 + 0.7 + 2 * 0.15 + 0.1) / 5)


def test_bins_are_open_on_the_left_hold_both_ends_and_may_be_empty():
    found = reliability(torch.tensor([-torch.inf, 0.0, torch.inf]), torch.tensor([0, 1, 1]), bins=2)
    assert found.count.tolist() == [2, 1] and found.accuracy.tolist() == [0.5, 1]
    found = reliability(torch.tensor([3.0, 3.0]), torch.tensor([1, 0]))
    assert found.count.tolist() == [0] * 9 + [2] and np.isnan(found.confidence[:9]).all()
    assert found.ece == pytest.approx(torch.sigmoid(torch.tensor(3.0)).item() - 0.5)


def test_the_curve_is_scikit_learns_and_honest_probabilities_are_calibrated():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, generator=generator)
    labels = torch.bernoulli(torch.sigmoid(logits), generator=generator).long()
    found = reliability(logits, labels)
    accuracy, confidence = calibration_curve(labels, torch.sigmoid(logits.double()), n_bins=10)
    np.testing.assert_allclose(found.accuracy, accuracy)
    np.testing.assert_allclose(found.confidence, confidence)
    assert found.ece < 0.015 < 0.1 < reliability(4 * logits, labels).ece


def test_a_curve_that_cannot_be_is_refused():
    for logits, labels, bins in (([1.0], [1, 0], 10), ([], [], 10), ([1.0], [1], 0)):
        with pytest.raises(MmkitError, match="at least one"):
            reliability(torch.tensor(logits), torch.tensor(labels), bins)
    with pytest.raises(MmkitError, match="NaN"):
        reliability(torch.tensor([float("nan")]), torch.tensor([1]))


# --- several seeds -------------------------------------------------------------------------------


def test_mean_and_sample_deviation_of_each_figure():
    reports = [{"rsum": value, "matching": {"accuracy": value / 10}} for value in (1.0, 2.0, 6.0)]
    found = mean_and_deviation(reports)
    assert found["rsum"] == Spread(3, pytest.approx(7**0.5))
    assert found["matching"]["accuracy"] == pytest.approx((0.3, 0.7**0.5 / 10**0.5))
    with pytest.raises(MmkitError, match="at least two"):
        mean_and_deviation(reports[:1])
    with pytest.raises(MmkitError, match=r"different names.*'rsum'"):
        mean_and_deviation([{"r1": 0.1}, {"rsum": 0.1}])
