"""The baselines against generalised eigenproblems, scikit-learn and hand computation; learning by every fuser."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from sklearn.cross_decomposition import CCA

import mmkit
from helpers import equal, learnable, settings, weights
from mmkit import FUSERS, HubnessCorrected, MmkitError, PairedFeatures, RegularizedCCA, TwoTower, build_fuser, fit

IMAGE_DIM, TEXT_DIM = 10, 7
SHORT = settings(fusion_dim=32, hidden_dim=32, part_dim=32, heads=4, dropout=0.1, feature_dropout=0.0)

task = partial(learnable, noise=0.5, dims=(IMAGE_DIM, TEXT_DIM), captions=3)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def solved(train: PairedFeatures, held_out: PairedFeatures | None = None, width: int = 7, **changes) -> RegularizedCCA:
    fuser = RegularizedCCA(*train.dims, width, **changes)
    fuser.solve(train, held_out)
    return fuser.eval()


def pairs(features: PairedFeatures) -> tuple[np.ndarray, np.ndarray]:
    """All pairs, an image as often as it has captions, standardised."""
    sides = features.images(features.image_index), features.captions()
    return tuple(((side - side.mean(0)) / side.std(0, correction=0)).double().numpy() for side in sides)


def towers() -> TwoTower:
    torch.manual_seed(0)
    return TwoTower(IMAGE_DIM, TEXT_DIM, 16).eval()


@pytest.mark.parametrize("name", FUSERS)
def test_every_fuser_learns_a_small_task(name):
    train, validation, held_out = (task(count, seed, noise=0.2) for seed, count in enumerate((200, 60, 100)))
    fuser = build_fuser(name, SHORT, *train.dims)
    history = fit(fuser, train, validation, SHORT)
    retrieval = mmkit.retrieval_report(fuser, held_out)
    assert retrieval.text_to_image.r1 > 0.3 and retrieval.image_to_text.r1 > 0.3, "chance is 0.01"
    thresholds = mmkit.choose_thresholds(fuser, validation)
    assert mmkit.matching_report(fuser, held_out, thresholds)["random"].accuracy > 0.85
    assert not fuser.training and history.rows[history.best_epoch]["validation_matching"] < 0.66 < np.log(2)


@pytest.mark.parametrize("name", FUSERS)
def test_every_fuser_is_at_chance_on_noise(name):
    def train(noise: PairedFeatures, validation: PairedFeatures) -> mmkit.PairFuser:
        fuser = build_fuser(name, SHORT, *noise.dims)
        fit(fuser, noise, validation, replace(SHORT, epochs=4, part_epochs=4))
        return fuser

    chance = 1 / 400
    recall = mmkit.noise_recall(train, (10, 8), pairs=200, held_out=400)
    assert recall < chance + 4 * (chance * (1 - chance) / 400) ** 0.5, "four standard errors"


def test_a_cosine_logit_is_scale_times_cosine_less_threshold_and_both_are_trained():
    fuser, images, texts = towers(), random(4, IMAGE_DIM), random(6, TEXT_DIM)
    a, b = fuser.nodes(images, texts)
    cosine = F.cosine_similarity(a[:, None], b[None], dim=2)
    torch.testing.assert_close(fuser.score(images, texts), (cosine - 0.3) / 0.07, rtol=1e-4, atol=1e-4)
    fuser.log_scale.data.copy_(torch.tensor(20.0).log())
    fuser.threshold.data.fill_(0.4)
    torch.testing.assert_close(fuser.score(images, texts), 20 * cosine - 8, rtol=1e-4, atol=1e-4)
    fused = fuser(images, texts[:4])
    assert fused.shape == (4, fuser.fused_dim) == (4, 16)
    torch.testing.assert_close(fused.mean(dim=1), cosine.diagonal())
    fit(fuser, task(100, 0), task(40, 1), replace(SHORT, epochs=1))
    assert fuser.log_scale.exp() != 20 and fuser.threshold != 0.4, "the matching loss trains both"


@pytest.mark.parametrize("regularization", [0.0, 0.3])
def test_correlations_are_those_of_the_generalised_eigenproblem(regularization):
    features = task(80, 0)
    (x, y), n = pairs(features), len(features.image_index)
    within = scipy.linalg.block_diag(x.T @ x / n, y.T @ y / n)
    between = np.zeros_like(within)
    between[:IMAGE_DIM, IMAGE_DIM:] = x.T @ y / n
    ridge = regularization * np.eye(len(within))  # the mean eigenvalue of a correlation matrix is 1
    expected = scipy.linalg.eigh(between + between.T, within + ridge, eigvals_only=True)[::-1][:TEXT_DIM]
    correlations = solved(features, regularization=regularization).correlations
    assert correlations[0] > 0.5
    np.testing.assert_allclose(correlations, expected, rtol=0, atol=1e-5)


def test_without_regularization_axes_are_those_of_scikit_learn_weighted_by_their_correlation():
    features = task(80, 0)
    fuser, wide, (x, y) = *(solved(features, width=width, regularization=0.0) for width in (7, 12)), pairs(features)
    a, b, c = x @ fuser.image_axes.numpy(), y @ fuser.text_axes.numpy(), fuser.correlations.numpy()
    for product, expected in ((a.T @ a, c**2), (b.T @ b, c**2), (a.T @ b, c**3)):  # white, but for the weights
        np.testing.assert_allclose(product / len(a), np.diag(expected), atol=1e-4)
    theirs = CCA(n_components=3, max_iter=10_000, tol=1e-12).fit(x, y).transform(x, y)
    for axis in range(3):
        assert c[axis] == pytest.approx(np.corrcoef(theirs[0][:, axis], theirs[1][:, axis])[0, 1], abs=1e-3)
        for ours, of_sklearn in zip((a, b), theirs, strict=True):
            assert abs(np.corrcoef(ours[:, axis], of_sklearn[:, axis])[0, 1]) > 0.999
    for name in ("image_axes", "text_axes"):  # those beyond the smaller dimension are zero
        assert torch.equal(getattr(wide, name), F.pad(getattr(fuser, name), (0, 12 - TEXT_DIM)))


@pytest.mark.parametrize("chunk", [1, 17])
def test_chunks_give_what_the_whole_gives_in_any_order_of_the_captions(chunk, monkeypatch):
    features, held_out, order = task(60, 0), task(30, 1), torch.randperm(180)
    shuffled = features.images(), features.captions(order), features.image_index[order]
    whole = solved(features, held_out, width=5)
    monkeypatch.setattr(mmkit.baselines, "_CHUNK", chunk)
    chunked = solved(PairedFeatures.from_arrays(*shuffled), held_out, width=5)
    torch.testing.assert_close(chunked.correlations, whole.correlations)
    scores = [fuser.score(held_out.images(), held_out.captions()) for fuser in (whole, chunked)]
    torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-3)


def test_features_are_standardised_by_all_pairs():
    images, captions = random(40, 5) * 3 + 1000, random(55, 4)
    index = torch.randint(40, (55,), generator=torch.Generator().manual_seed(0))  # some images without a caption
    fuser, of_captions = solved(PairedFeatures.from_arrays(images, captions, index), width=3), images[index]
    for standardize, features in ((fuser.standardize_images, of_captions), (fuser.standardize_texts, captions)):
        torch.testing.assert_close(standardize.mean, features.mean(dim=0))
        torch.testing.assert_close(standardize.deviation, features.std(dim=0, correction=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("regularization", [0.0, 1.0])
def test_rank_deficient_and_constant_features_and_few_pairs_are_no_error(regularization):
    features = task(60, 0)
    images, captions = features.images(), features.captions()
    wide = torch.cat([images, images[:, :4] + images[:, 4:8], torch.full((60, 1), 1e4)], dim=1)
    doubled = torch.cat([captions, captions, 0 * captions], dim=1)
    degenerate = PairedFeatures.from_arrays(wide, doubled, features.image_index)
    fuser, plain, few = (solved(part, regularization=regularization) for part in (degenerate, features, task(3, 0)))
    assert torch.isfinite(fuser.score(wide, doubled)).all()
    assert torch.isfinite(few.image_axes).all() and few.correlations.max() < 1 + 1e-5
    if not regularization:
        torch.testing.assert_close(fuser.correlations, plain.correlations, rtol=1e-3, atol=1e-3)


def test_scale_and_threshold_are_the_optimum_of_the_cross_entropy_on_held_out_pairs_or_those_of_training():
    train, held_out = task(200, 0), task(150, 1)
    logits, labels = mmkit.matching_logits(solved(train, held_out), held_out, "random", seed=5)
    probability = logits.sigmoid()
    assert probability.mean() == pytest.approx(0.5, abs=0.02)
    for low, high in ((0.0, 0.2), (0.2, 0.8), (0.8, 1.0)):
        inside = (probability >= low) & (probability <= high)
        assert probability[inside].mean() == pytest.approx(labels[inside].double().mean().item(), abs=0.08)
    assert equal(weights(solved(train, train)), weights(solved(train)))


def test_features_that_a_cca_cannot_use_are_refused():
    make, images, texts, column = PairedFeatures.from_arrays, random(8, 5), random(8, 4), torch.tensor([1])
    whole, one = (make(images, texts, index) for index in (range(8), [0] * 8))
    alike = make(0 * images + 3, texts, range(8))
    refused = [("at least two images", one, whole), ("at least two images", whole, one), ("all alike", alike, whole)]
    for sides in ((images.index_fill(1, column, torch.nan), texts), (images, texts.index_fill(1, column, torch.inf))):
        broken = make(*sides, range(8))
        refused += [("NaN or infinity", *parts) for parts in ((broken, None), (broken, whole), (whole, broken))]
    for message, train, held_out in refused:
        with pytest.raises(MmkitError, match=message):
            RegularizedCCA(5, 4, 3).solve(train, held_out)
    with pytest.raises(MmkitError, match=r"\(5, 9\)"):
        RegularizedCCA(5, 9, 3).solve(whole)
    with pytest.raises(MmkitError, match=r"no axes yet\. Remedy: fuser\.solve"):
        RegularizedCCA(5, 4, 3)(images, texts)
    with pytest.raises(MmkitError, match="must not be negative"):
        RegularizedCCA(5, 4, 3, regularization=-1.0)


@pytest.mark.parametrize(("images", "texts"), [(14, 12), (1, 1), (3, 20)])
def test_csls_equals_the_papers_formula(images, texts):
    fuser, a, b = towers(), random(images, IMAGE_DIM), random(texts, TEXT_DIM, seed=1)
    cosine = fuser.similarities(*fuser.nodes(a, b))
    near_images, near_texts = (side.sort(descending=True).values[:, :10].mean(dim=1) for side in (cosine, cosine.T))
    expected = fuser.log_scale.exp() * (2 * cosine - near_images[:, None] - near_texts)
    torch.testing.assert_close(HubnessCorrected(fuser).score(a, b), expected, rtol=1e-4, atol=1e-4)


def test_a_corrected_fuser_keeps_the_contract(monkeypatch):
    fuser, images, texts = HubnessCorrected(towers()).eval(), random(9, IMAGE_DIM), random(9, TEXT_DIM, seed=1)
    (a, b), scores = fuser.nodes(images, texts), fuser.score(images, texts)
    assert a.shape == b.shape == fuser(images, texts).shape == (9, fuser.width) == (9, fuser.fused_dim)
    by_pair = torch.stack([torch.cat([fuser.match(image[None], text[None]) for text in b]) for image in a])
    torch.testing.assert_close(scores, by_pair, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores, fuser.similarities(a, b) * fuser.fuser.log_scale.exp())
    assert mmkit.permutation_gap(fuser, images, texts) < 1e-4
    assert fuser.transductive and (fuser.score(images[:4], texts[:4]) - scores[:4, :4]).abs().max() > 0.01
    monkeypatch.setattr(mmkit.baselines, "_BLOCK_ROWS", 2)
    torch.testing.assert_close(fuser.score(images, texts), scores)


def test_a_correction_frees_the_captions_of_a_hub_in_the_reports():
    fuser = TwoTower(6, 6, 6)
    for layer in (fuser.project_images, fuser.project_texts):
        layer.weight.data.copy_(torch.eye(6))
        layer.bias.data.zero_()
    images = torch.cat([torch.eye(6)[:5] * 0.35 + torch.eye(6)[5] * 0.3, torch.ones(1, 6)])  # the last is near to all
    features = PairedFeatures.from_arrays(images, torch.eye(6)[:5] + 0.9, range(5))
    plain, freed = (mmkit.retrieval_report(one, features) for one in (fuser, HubnessCorrected(fuser)))
    assert (plain.text_to_image.r1, freed.text_to_image.r1, freed.pool) == (0, 1, (6, 5))


def test_what_cannot_be_corrected_is_refused():
    with pytest.raises(MmkitError, match="MultimodalFeatureFuser does not score by cosine"):
        HubnessCorrected(mmkit.MultimodalFeatureFuser(IMAGE_DIM, TEXT_DIM, 16))
