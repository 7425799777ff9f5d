"""Figures of the reports against brute force, hand counts, scikit-learn and scipy."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, roc_auc_score
from torch import Tensor

import mmkit
from mmkit import evaluation
from mmkit.evaluation import best_threshold, bootstrap, choose_thresholds, matching_report, ranks, retrieval_report
from mmkit.features import PairedFeatures
from mmkit.fusers import MultimodalFeatureFuser, PairFuser
from mmkit.graphs import MultimodalGNN
from mmkit.regions import RegionWordGNN
from mmkit.support import MmkitError

THRESHOLDS = {"random": 0.3, "hard": -0.2}
BOTH = pytest.mark.parametrize("kind", [MultimodalFeatureFuser, MultimodalGNN], ids=["mlp", "gnn"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pairs(images: int = 12, captions: int = 30, seed: int = 0) -> PairedFeatures:
    """Each image has at least one caption, and the captions' order does not follow the images'."""
    generator = torch.Generator().manual_seed(seed)
    image_index = torch.cat([torch.arange(images), torch.randint(images, (captions - images,), generator=generator)])
    image_index = image_index[torch.randperm(captions, generator=generator)]
    tokens = random(captions, 3, 5, seed=seed + 1)
    tokens[::2, 2] = 0
    vectors, texts = random(images, 6, seed=seed), random(captions, 5, seed=seed)
    return PairedFeatures.from_arrays(vectors, texts, image_index, random(images, 4, 6), tokens)


def random_fuser(kind: type[PairFuser] = MultimodalFeatureFuser) -> PairFuser:
    """One whose cheap scores and match logits rank differently, for its weights are off their start."""
    torch.manual_seed(0)
    fuser = kind(6, 5, width=8) if kind is RegionWordGNN else kind(6, 5, 8)
    with torch.no_grad():
        for parameter in fuser.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return fuser.eval()


def constant_fuser(logit: float = 0.25) -> PairFuser:
    fuser = random_fuser()
    torch.nn.init.zeros_(fuser.match_head.weight)
    torch.nn.init.constant_(fuser.match_head.bias, logit)
    return fuser


def all_scores(fuser: PairFuser, features: PairedFeatures) -> Tensor:
    view = fuser.view(features)
    return fuser.score(view.images(), view.captions()).detach()


# --- matching --------------------------------------------------------------------------------------


def test_random_negatives_are_another_image_and_every_other_one_is_as_likely():
    image_index = torch.arange(4).repeat(300)
    features = PairedFeatures.from_arrays(random(4, 6), random(1200, 5), image_index)
    images, captions = mmkit.negative_pairs(features, "random", seed=1)
    assert captions.tolist() == list(range(1200))
    for image in range(4):
        counts = images[image_index == image].bincount(minlength=4).tolist()
        assert counts[image] == 0 and all(50 < count < 150 for count in counts[:image] + counts[image + 1 :])
    again, other = (mmkit.negative_pairs(features, "random", seed)[0] for seed in (1, 2))
    assert torch.equal(images, again) and not torch.equal(images, other)


@pytest.mark.parametrize("block", [7, 4096])
def test_hard_negatives_are_the_nearest_caption_of_another_image(block, monkeypatch):
    monkeypatch.setattr(evaluation, "_VECTORS", block)
    features = pairs()
    texts, image_index = features.captions(), features.image_index.tolist()
    images, captions = mmkit.negative_pairs(features, "hard")
    assert images.tolist() == image_index
    for caption, nearest in enumerate(captions.tolist()):
        others = [other for other in range(30) if image_index[other] != image_index[caption]]
        assert nearest == max(others, key=lambda i: F.cosine_similarity(texts[i], texts[caption], dim=0).item())


@BOTH
@pytest.mark.parametrize("negatives", ["random", "hard"])
@pytest.mark.parametrize("block", [7, 4096])
def test_matching_logits_are_the_scores_of_the_true_and_the_unmatched_pairs(kind, negatives, block, monkeypatch):
    monkeypatch.setattr(evaluation, "_PAIRS", block)
    fuser, features = random_fuser(kind), pairs()
    logits, labels = mmkit.matching_logits(fuser.train(), features, negatives, seed=3)
    scores, (images, captions) = all_scores(fuser.eval(), features), mmkit.negative_pairs(features, negatives, seed=3)
    expected = torch.cat([scores[features.image_index, torch.arange(30)], scores[images, captions]])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert labels.tolist() == [1] * 30 + [0] * 30


@pytest.mark.parametrize("seed", range(20))
def test_the_best_threshold_lies_halfway_between_two_logits_and_is_as_accurate_as_any_other(seed):
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.randint(1, 25, (), generator=generator))
    labels = torch.randint(2, (size,), generator=generator)
    logits = torch.randint(8, (size,), generator=generator) / 2 + labels * (seed % 3)  # many ties
    logits = -logits if seed % 5 == 0 else logits
    values = sorted(set(logits.tolist()))
    cuts = [values[0] - 0.5, *((a + b) / 2 for a, b in itertools.pairwise(values)), values[-1] + 0.5]
    accuracies = {cut: ((logits > cut) == labels).double().mean() for cut in cuts}
    assert accuracies[best_threshold(logits, labels)] == max(accuracies.values())


@BOTH
def test_the_matching_report_agrees_with_scikit_learn(kind):
    fuser, features = random_fuser(kind), pairs()
    report = matching_report(fuser, features, THRESHOLDS, seed=2)
    assert report.keys() == THRESHOLDS.keys()
    for negatives, row in report.items():
        logits, labels = (part.numpy() for part in mmkit.matching_logits(fuser, features, negatives, seed=2))
        called = logits > THRESHOLDS[negatives]
        assert 0 < called.sum() < len(called)
        assert row.accuracy == pytest.approx(accuracy_score(labels, called))
        assert row.f1 == pytest.approx(f1_score(labels, called))
        assert row.roc_auc == pytest.approx(roc_auc_score(labels, logits))
        assert row.average_precision == pytest.approx(average_precision_score(labels, logits))
        assert row.pairs == 60
        correct = (called == labels).reshape(2, 30).sum(axis=0)
        sums = np.bincount(features.image_index, correct, 12)
        assert row.intervals == {"accuracy": bootstrap(sums, 2 * features.image_index.bincount(), seed=2)}
        assert row.intervals["accuracy"].low < row.accuracy < row.intervals["accuracy"].high


def test_the_threshold_comes_from_the_validation_split_alone():
    fuser, validation, test = random_fuser(), pairs(seed=1), pairs(seed=2)
    thresholds = choose_thresholds(fuser, validation, seed=4)
    report = matching_report(fuser, test, thresholds, seed=4)
    for kind, threshold in thresholds.items():
        assert threshold == best_threshold(*mmkit.matching_logits(fuser, validation, kind, seed=4))
        logits, labels = mmkit.matching_logits(fuser, test, kind, seed=4)
        given, own = (accuracy_score(labels, logits > cut) for cut in (threshold, best_threshold(logits, labels)))
        assert report[kind].accuracy == pytest.approx(given) and given < own


def test_ties_and_thresholds_between_neighbouring_floats(monkeypatch):
    logits, labels = torch.tensor([3.0, 2.0, 2.0, 1.0, 2.0, 1.0]), torch.tensor([1, 1, 1, 0, 0, 0])
    monkeypatch.setattr(evaluation, "matching_logits", lambda *_: (logits, labels))
    row = matching_report(random_fuser(), pairs(3, 3), {"random": 2.0})["random"]
    assert row.average_precision == pytest.approx(1 / 3 * 1 + 2 / 3 * 3 / 4), "tied pairs are called together"
    assert row.roc_auc == pytest.approx((3 + 2 * 2.5) / 9), "and count half here"
    assert row.accuracy == pytest.approx(4 / 6) and row.f1 == pytest.approx(1 / 2), "on the threshold: unmatched"
    logits, labels = 1 + torch.tensor([2.0**-22, 2.0**-22, 2.0**-23, 2.0**-23]), torch.tensor([1, 1, 0, 0])
    assert matching_report(random_fuser(), pairs(2, 2), {"hard": best_threshold(logits, labels)})["hard"].accuracy == 1


# --- retrieval -------------------------------------------------------------------------------------


def sorted_ranks(scores: Tensor, image_index: Tensor) -> tuple[list[int], list[int]]:
    """Sort, with true matches after all others of the same score, and look for the first true one."""
    scores, image_index = scores.tolist(), image_index.tolist()
    image_ranks, caption_ranks = [], []
    for i, row in enumerate(scores):
        order = sorted(range(len(row)), key=lambda j: (-row[j], image_index[j] == i))
        image_ranks.append(next((place for place, j in enumerate(order, 1) if image_index[j] == i), len(row) + 1))
    for j, image in enumerate(image_index):
        order = sorted(range(len(scores)), key=lambda i: (-scores[i][j], i == image))
        caption_ranks.append(order.index(image) + 1)
    return image_ranks, caption_ranks


def assert_counts(report: evaluation.Retrieval, image_ranks: list[int], caption_ranks: list[int]) -> None:
    """That the recalls and median ranks are those of these ranks."""
    both = report.image_to_text, report.text_to_image
    for recall, places in zip(both, (image_ranks, caption_ranks), strict=True):
        expected = [*(np.mean([place <= k for place in places]) for k in (1, 5, 10)), np.median(places)]
        assert list(vars(recall).values()) == pytest.approx(expected)
    assert report.rsum == pytest.approx(100 * sum(recall.r1 + recall.r5 + recall.r10 for recall in both))


@pytest.mark.parametrize("levels", [1, 2, 5, 0], ids=["all equal", "two levels", "five levels", "no ties"])
@pytest.mark.parametrize("block", [1, 50, 2**22])
def test_ranks_equal_a_sort_with_ties_against_the_model(levels, block, monkeypatch):
    monkeypatch.setattr(evaluation, "_BLOCK", block)
    for seed in range(3):
        scores, image_index = random(9, 20, seed=seed), pairs(8, 20, seed).image_index  # the last image has no caption
        if levels:
            scores = torch.randint(levels, (9, 20), generator=torch.Generator().manual_seed(seed)).float()
        assert tuple(part.tolist() for part in ranks(scores, image_index)) == sorted_ranks(scores, image_index)


@BOTH
@pytest.mark.parametrize("images", [1, 7, 24, 25])
def test_the_retrieval_report_counts_the_ranks_of_all_scores_of_which_a_block_is_held(kind, images, monkeypatch):
    monkeypatch.setattr(evaluation, "_BLOCK", 60 * images)
    fuser, features, blocks, score_nodes = random_fuser(kind), pairs(25, 60), [], kind.score_nodes
    by_hand = sorted_ranks(all_scores(fuser, features), features.image_index)
    monkeypatch.setattr(kind, "score_nodes", lambda *nodes: blocks.append(score_nodes(*nodes)) or blocks[-1])
    report = retrieval_report(fuser.train(), features)
    assert max(block.numel() for block in blocks) == 60 * (25 if fuser.transductive else images)
    assert_counts(report, *by_hand)
    assert 0 < report.rsum < 600 and report.pool == (25, 60)
    monkeypatch.undo()
    constant = retrieval_report(constant_fuser(), features).text_to_image
    assert (constant.r10, constant.median_rank) == (0, 25), "ties go against the fuser, whatever the block"


def shortlisted(cheap: Tensor, logits: Tensor, true: Tensor, size: int) -> int:
    """The definition: the shortlist in the order of the logits, then the others in that of the cheap score."""
    order = cheap.argsort(descending=True).tolist()
    order = sorted(order[:size], key=lambda item: -logits[item].item()) + order[size:]
    first = min(order.index(item) for item in true.nonzero().flatten().tolist())
    return 1 + sum(not true[item] for item in order[:first])


@pytest.mark.parametrize("kind", [MultimodalFeatureFuser, RegionWordGNN], ids=["mlp", "region-word"])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_the_shortlist_is_ranked_by_logits_and_the_rest_by_the_cheap_score(kind, size):
    fuser, features = random_fuser(kind), pairs(24, 40)
    pool, logits = mmkit.encode_pool(fuser, features), all_scores(fuser, features)
    cheap, image_index = fuser.shortlist_scores(pool.image_nodes, pool.text_nodes), features.image_index
    assert not torch.equal(cheap.argmax(dim=1), logits.argmax(dim=1)), "or the order would not matter"
    report = retrieval_report(fuser, features, size, pool)
    images = [shortlisted(cheap[i], logits[i], image_index == i, size) for i in range(24)]
    captions = [shortlisted(cheap[:, j], logits[:, j], torch.arange(24) == i, size) for j, i in enumerate(image_index)]
    assert_counts(report, images, captions)
    for large in (40, 1000):
        assert retrieval_report(fuser, features, large) == retrieval_report(fuser, features) != report


# --- how sure a figure is --------------------------------------------------------------------------


def test_the_interval_is_scipys_percentile_interval_and_as_wide_as_theory_says():
    answers = np.random.default_rng(1).random(400) < 0.8
    rng = np.random.default_rng(5)
    theirs = stats.bootstrap((answers.astype(float),), np.mean, method="percentile", n_resamples=1000, rng=rng)
    ours = bootstrap(answers, np.ones(400), seed=5)
    assert ours == pytest.approx(tuple(theirs.confidence_interval), abs=1e-12)
    assert ours.high - ours.low == pytest.approx(2 * 1.96 * (0.16 / 400) ** 0.5, rel=0.1)
    assert ours == bootstrap(5 * answers, np.full(400, 5), seed=5), "five captions that agree tell no more than one"
    assert ours != bootstrap(answers, np.ones(400), seed=6)


def test_images_without_captions_do_not_disturb_an_interval_and_one_image_has_none():
    assert bootstrap([1, 0, 0, 0], [1, 1, 0, 0], seed=1) == (0, 1)
    assert bootstrap([4, 4, 4], [4, 4, 4]) == (1, 1)
    bare = PairedFeatures.from_arrays(random(3, 6), random(2, 5), [0, 2])
    assert not np.isnan(list(retrieval_report(random_fuser(), bare).intervals.values())).any()
    assert retrieval_report(random_fuser(), ALONE).intervals == {}


def test_the_intervals_of_the_recalls_draw_captions_with_their_images():
    fuser, features = random_fuser(), pairs(40, 100)
    report, both = retrieval_report(fuser, features), ranks(all_scores(fuser, features), features.image_index)
    captions_of = [np.flatnonzero(features.image_index == image) for image in range(40)]
    figures = []
    for drawn in np.random.default_rng(0).integers(40, size=(1000, 40)):
        places = both[0][drawn], both[1][np.concatenate([captions_of[image] for image in drawn])]
        recalls = [(part <= k).double().mean().item() for part in places for k in (1, 5, 10)]
        figures.append([*recalls, 100 * sum(recalls)])
    assert list(report.intervals)[2:] == ["image_to_text.r10", *(f"text_to_image.r{k}" for k in (1, 5, 10)), "rsum"]
    for interval, column in zip(report.intervals.values(), np.transpose(figures), strict=True):
        assert interval == pytest.approx(np.quantile(column, [0.025, 0.975])) and interval.low < interval.high


@BOTH
def test_a_pool_gives_every_figure_and_its_nodes_are_encoded_once(kind, monkeypatch):
    fuser, features, calls, nodes = random_fuser(kind), pairs(), [], kind.nodes
    expected = [matching_report(fuser, features, THRESHOLDS), *(retrieval_report(fuser, features, k) for k in (0, 2))]
    monkeypatch.setattr(kind, "nodes", lambda *given: calls.append(given) or nodes(*given))
    once = 1 if fuser.transductive else 2  # the whole pool, or images and then captions
    pool = mmkit.encode_pool(fuser.train(), features)
    report = [retrieval_report(fuser, features, k, pool) for k in (0, 2)]
    assert [matching_report(fuser, features, THRESHOLDS, pool=pool), *report] == expected
    assert len(calls) == once and not fuser.training
    for report in (choose_thresholds, lambda *given: matching_report(*given, THRESHOLDS)):
        calls.clear()
        report(fuser, features)
        assert len(calls) == once, "once for both kinds of negatives"
    larger = mmkit.encode_pool(fuser, features, pairs(12, 13, seed=1))  # further captions are seen, and not ranked
    assert (len(larger.text_nodes), retrieval_report(fuser, features, pool=larger).pool) == (43, (12, 30))


ALONE = PairedFeatures.from_arrays(random(1, 6), random(3, 5), [0, 0, 0])
WRONG = {
    "no such negatives": (lambda: mmkit.negative_pairs(pairs(), "hardest"), r"'hardest'.*random, hard"),
    "no other image": (lambda: mmkit.negative_pairs(ALONE, "random"), "at least two images"),
    "columns": (lambda: ranks(torch.zeros(2, 3), torch.tensor([0, 0, 1, 1])), "3 columns for 4 captions"),
    "sizes": (lambda: retrieval_report(MultimodalFeatureFuser(7, 5, 8), pairs()), r"\(7, 5\).*\(12, 6\).*\(1, 5\)"),
    "NaN, matching": (lambda: matching_report(constant_fuser(torch.nan), pairs(), THRESHOLDS), "NaN"),
    "NaN, retrieval": (lambda: retrieval_report(constant_fuser(torch.nan), pairs()), "NaN"),
    "NaN, shortlist": (lambda: retrieval_report(constant_fuser(torch.nan), pairs(), 3), "NaN"),
    "no shortlist": (lambda: retrieval_report(random_fuser(), pairs(), -1), "at least one"),
    "one image": (lambda: bootstrap(np.ones(1), np.ones(1)), "two images or more"),
    "other images": (lambda: bootstrap(np.ones(2), np.ones(3)), "two images or more"),
    "no pairs": (lambda: bootstrap(np.zeros(2), np.zeros(2)), "two images or more"),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_judged_is_refused(call, message):
    with pytest.raises(MmkitError, match=message):
        call()
