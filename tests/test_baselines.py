"""The baselines against generalised eigenproblems, scikit-learn and finite differences; learning by every fuser."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import scipy.linalg
import test_training
import torch
from sklearn.cross_decomposition import CCA
from torch import Tensor

import mmkit
from mmkit import FUSERS, MmkitError, PairedFeatures, build_fuser, fit_profile, noise_recall, retrieval_report
from mmkit.baselines import RegularizedCCA, TwoTower, _whitening
from mmkit.fusers import GatedFuser, PairFuser

IMAGE_DIM, TEXT_DIM, CAPTIONS = 10, 7, 3
SMALL = mmkit.profile(
    "mini",
    fusion_dim=32,
    hidden_dim=32,
    part_dim=32,
    heads=4,
    dropout=0.1,
    feature_dropout=0.0,
    batch_size=64,
    learning_rate=5e-3,
    part_epochs=12,
    part_learning_rate=5e-3,
)


learnable = partial(test_training.learnable, noise=0.5, dims=(IMAGE_DIM, TEXT_DIM), captions=CAPTIONS)


def shuffled(features: PairedFeatures, seed: int = 0) -> PairedFeatures:
    """The same pairs, their captions in another order."""
    order = torch.randperm(len(features.owner), generator=torch.Generator().manual_seed(seed))
    return PairedFeatures.from_arrays(features.images(), features.captions(order), features.owner[order])


def solved(features: PairedFeatures, width: int = TEXT_DIM, **settings: float) -> RegularizedCCA:
    fuser = RegularizedCCA(*features.dims, width, **settings)
    fuser.solve(features)
    return fuser.eval()


def pairs(features: PairedFeatures) -> tuple[np.ndarray, np.ndarray]:
    """All pairs, an image as often as it has captions, standardised."""
    sides = features.images(features.owner), features.captions()
    return tuple(((side - side.mean(0)) / side.std(0, correction=0)).double().numpy() for side in sides)


# --- every fuser learns --------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUSERS)
def test_every_fuser_learns_a_small_task(name):
    train, validation, held_out = (learnable(count, seed, noise=0.2) for seed, count in enumerate((200, 60, 100)))
    fuser = build_fuser(name, SMALL, *train.dims)
    history = fit_profile(fuser, train, validation, SMALL)
    found = retrieval_report(fuser, held_out)
    assert found.text_to_image.r1 > 0.3 and found.image_to_text.r1 > 0.3, "chance is 0.01"
    assert mmkit.matching_report(fuser, held_out, mmkit.choose_thresholds(fuser, validation))["random"].accuracy > 0.85
    assert not fuser.training and history.rows[history.best_epoch]["validation_matching"] < 0.66 < np.log(2)


@pytest.mark.parametrize("name", FUSERS)
def test_every_fuser_is_at_chance_on_noise(name):
    def train(noise: PairedFeatures, validation: PairedFeatures) -> PairFuser:
        fuser = build_fuser(name, SMALL, *noise.dims)
        fit_profile(fuser, noise, validation, replace(SMALL, epochs=4))
        return fuser

    chance = 1 / 400
    assert noise_recall(train, (10, 8), pairs=200, held_out=400) < chance + 4 * (chance * (1 - chance) / 400) ** 0.5


def test_gates_differ_from_pair_to_pair_once_they_are_trained():
    train = learnable(200, 0)
    fuser = build_fuser("gated", SMALL, *train.dims)
    assert isinstance(fuser, GatedFuser)
    fit_profile(fuser, train, learnable(60, 1), replace(SMALL, epochs=4))
    gates = fuser.gates(train.images(train.owner), train.captions())
    assert gates.shape == (600, 32) and gates.min() > 0 and gates.max() < 1 and gates.std(dim=0).mean() > 0.01


# --- cosine, scale and threshold -----------------------------------------------------------------


def test_a_cosine_logit_is_scale_times_cosine_plus_bias():
    torch.manual_seed(0)
    fuser = TwoTower(IMAGE_DIM, TEXT_DIM, 16).eval()
    images, texts = torch.randn(4, IMAGE_DIM), torch.randn(6, TEXT_DIM)
    a, b = fuser.nodes(images, texts)
    cosine = torch.cosine_similarity(a[:, None], b[None], dim=2)
    torch.testing.assert_close(
        fuser.score(images, texts), (cosine - fuser.threshold) / 0.07, rtol=1e-4, atol=1e-4, msg="before training"
    )
    with torch.no_grad():
        fuser.log_scale.copy_(torch.tensor(20.0).log())
        fuser.threshold.fill_(0.4)
    torch.testing.assert_close(fuser.score(images, texts), 20 * cosine - 8, rtol=1e-4, atol=1e-4)
    fused = fuser(images, texts[:4])
    assert fused.shape == (4, fuser.fused_dim) == (4, 16)
    torch.testing.assert_close(fused.mean(dim=1), cosine.diagonal())


def test_the_matching_loss_trains_scale_and_threshold():
    train, validation = learnable(100, 0), learnable(40, 1)
    fuser = build_fuser("two-tower", SMALL, *train.dims)
    before = {name: getattr(fuser, name).item() for name in ("log_scale", "threshold")}
    fit_profile(fuser, train, validation, replace(SMALL, epochs=1))
    assert all(getattr(fuser, name).item() != value for name, value in before.items())


# --- canonical correlations ----------------------------------------------------------------------


@pytest.mark.parametrize("regularization", [0.0, 0.3])
def test_correlations_are_those_of_the_generalised_eigenproblem(regularization):
    features = learnable(80, 0)
    x, y = pairs(features)
    n = len(x)
    within = scipy.linalg.block_diag(x.T @ x / n, y.T @ y / n)
    between = np.zeros_like(within)
    between[:IMAGE_DIM, IMAGE_DIM:] = x.T @ y / n
    ridge = regularization * np.eye(len(within))  # the mean eigenvalue of a correlation matrix is 1
    expected = scipy.linalg.eigh(between + between.T, within + ridge, eigvals_only=True)[::-1][:TEXT_DIM]
    found = solved(features, regularization=regularization).correlations
    assert found[0] > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_correlations_and_coordinates_without_regularization_are_those_of_scikit_learn():
    features = learnable(80, 0)
    fuser = solved(features, width=3, regularization=0.0, power=0.0)
    x, y = pairs(features)
    ours = x @ fuser.image_axes.numpy(), y @ fuser.text_axes.numpy()
    theirs = CCA(n_components=3, max_iter=10_000, tol=1e-12).fit(x, y).transform(x, y)
    for axis in range(3):
        correlation = np.corrcoef(theirs[0][:, axis], theirs[1][:, axis])[0, 1]
        assert fuser.correlations[axis].item() == pytest.approx(correlation, abs=1e-3)
        for our_side, their_side in zip(ours, theirs, strict=True):
            assert abs(np.corrcoef(our_side[:, axis], their_side[:, axis])[0, 1]) > 0.999


def test_coordinates_without_regularization_are_white_and_correlate_axis_by_axis():
    features = learnable(80, 0)
    fuser = solved(features, regularization=0.0, power=0.0)
    x, y = pairs(features)
    a, b = x @ fuser.image_axes.numpy(), y @ fuser.text_axes.numpy()
    np.testing.assert_allclose(a.T @ a / len(a), np.eye(TEXT_DIM), atol=1e-4)
    np.testing.assert_allclose(b.T @ b / len(b), np.eye(TEXT_DIM), atol=1e-4)
    np.testing.assert_allclose(a.T @ b / len(a), np.diag(fuser.correlations), atol=1e-4)


def test_axes_are_weighted_by_their_correlation_to_the_power():
    features = learnable(80, 0)
    plain, weighted = solved(features, power=0.0), solved(features, power=2.0)
    for name in ("image_axes", "text_axes"):
        torch.testing.assert_close(getattr(weighted, name), getattr(plain, name) * plain.correlations**2)


@pytest.mark.parametrize("chunk", [1, 17])
def test_chunks_give_what_the_whole_gives_in_any_order_of_the_captions(chunk, monkeypatch):
    features, held_out = learnable(60, 0), learnable(30, 1)
    whole = RegularizedCCA(*features.dims, 5)
    whole.solve(features, held_out)
    monkeypatch.setattr(mmkit.baselines, "_CHUNK", chunk)
    chunked = RegularizedCCA(*features.dims, 5)
    chunked.solve(shuffled(features), held_out)
    torch.testing.assert_close(chunked.correlations, whole.correlations)
    scores = [fuser.score(held_out.images(), held_out.captions()) for fuser in (whole, chunked)]
    torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-3)


def test_features_are_standardised_by_all_pairs():
    images, captions = torch.randn(40, 5) * 3 + 1000, torch.randn(55, 4)
    owner = torch.randint(40, (55,), generator=torch.Generator().manual_seed(0))  # some images without a caption
    fuser = solved(PairedFeatures.from_arrays(images, captions, owner), width=3)
    torch.testing.assert_close(fuser.standardize_images.mean, images[owner].mean(dim=0))
    torch.testing.assert_close(
        fuser.standardize_images.deviation, images[owner].std(dim=0, correction=0), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(fuser.standardize_texts.mean, captions.mean(dim=0))


@pytest.mark.parametrize("regularization", [0.0, 1.0])
def test_rank_deficient_and_constant_features_are_no_error(regularization):
    features = learnable(60, 0)
    images, captions = features.images(), features.captions()
    wide = torch.cat([images, images[:, :4] + images[:, 4:8], torch.full((60, 1), 1e4)], dim=1)
    doubled = PairedFeatures.from_arrays(wide, torch.cat([captions, captions, 0 * captions], dim=1), features.owner)
    fuser, plain = (solved(part, regularization=regularization) for part in (doubled, features))
    assert torch.isfinite(fuser.score(doubled.images(), doubled.captions())).all()
    if not regularization:
        torch.testing.assert_close(fuser.correlations, plain.correlations, rtol=1e-3, atol=1e-3)


def test_fewer_pairs_than_dimensions_are_no_error():
    fuser = solved(learnable(3, 0), regularization=0.0)
    assert torch.isfinite(fuser.image_axes).all() and fuser.correlations.max() < 1 + 1e-5


def test_whitening_is_the_inverse_root():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(30, 4, generator=generator).double()
    covariance = samples.T @ samples
    root = _whitening(covariance, 0.5)
    expected = covariance + 0.5 * torch.linalg.eigvalsh(covariance).mean() * torch.eye(4)
    torch.testing.assert_close(torch.linalg.inv(root @ root), expected)


def test_axes_beyond_the_smaller_dimension_are_zero():
    features = learnable(60, 0)
    fuser, narrow = solved(features, width=12), solved(features)
    assert not fuser.image_axes[:, TEXT_DIM:].any() and not fuser.correlations[TEXT_DIM:].any()
    scores = [one.score(features.images(), features.captions()) for one in (fuser, narrow)]
    torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-3)


# --- calibration, and the same call for every fuser ----------------------------------------------


def test_scale_and_threshold_are_the_optimum_of_the_cross_entropy():
    train, held_out = learnable(200, 0), learnable(150, 1)
    fuser = RegularizedCCA(*train.dims, 6)
    fuser.solve(train, held_out)
    logits, labels = mmkit.matching_logits(fuser, held_out, "random", seed=5)
    probability = logits.sigmoid()
    assert probability.mean() == pytest.approx(0.5, abs=0.02)
    for low, high in ((0.0, 0.2), (0.2, 0.8), (0.8, 1.0)):
        inside = (probability >= low) & (probability <= high)
        assert probability[inside].mean() == pytest.approx(labels[inside].double().mean().item(), abs=0.08)


def test_calibration_without_held_out_pairs_uses_those_of_training():
    train = learnable(100, 0)
    one, other = RegularizedCCA(*train.dims, 6), RegularizedCCA(*train.dims, 6)
    one.solve(train)
    other.solve(train, train)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_the_history_of_a_closed_form_is_one_row_without_gradient_steps():
    train, validation = learnable(100, 0), learnable(40, 1)
    fuser = build_fuser("cca", SMALL, *train.dims)
    history = fit_profile(fuser, train, validation, SMALL)
    (row,) = history.rows
    assert (history.best_epoch, row["gradient_steps"]) == (0, 0)
    assert row["validation_loss"] == pytest.approx(
        row["validation_contrastive"] + SMALL.matching_weight * row["validation_matching"]
    )
    assert row["loss"] == pytest.approx(row["contrastive"] + SMALL.matching_weight * row["matching"])
    assert row["temperature"] == pytest.approx(1 / fuser.log_scale.exp().item())


def test_two_solutions_of_the_same_pairs_are_equal():
    train = learnable(60, 0)
    states = [solved(train).state_dict() for _ in range(2)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


# --- errors --------------------------------------------------------------------------------------


def noise(images: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(images, 5, generator=generator), torch.randn(images, 4, generator=generator)


def test_a_cca_that_is_not_solved_names_the_remedy():
    fuser = RegularizedCCA(5, 4, 3)
    for call in (fuser, fuser.score, fuser.nodes):
        with pytest.raises(MmkitError, match=r"fuser\.solve"):
            call(*noise(4))


def test_features_that_a_cca_cannot_use_are_refused():
    images, texts = noise(8)
    whole = PairedFeatures.from_arrays(images, texts, range(8))
    for part, value in ((images, float("nan")), (texts, float("inf"))):
        kept, part[3, 1] = part[3, 1].item(), value
        broken = PairedFeatures.from_arrays(images, texts, range(8))
        for train, held_out in ((broken, None), (broken, whole)):
            with pytest.raises(MmkitError, match="NaN or infinity"):
                RegularizedCCA(5, 4, 3).solve(train, held_out)
        part[3, 1] = kept
    one = PairedFeatures.from_arrays(images[:1], texts, [0] * 8)
    for train, held_out in ((one, whole), (whole, one)):
        with pytest.raises(MmkitError, match="at least two images"):
            RegularizedCCA(5, 4, 3).solve(train, held_out)
    with pytest.raises(MmkitError, match="all alike"):
        RegularizedCCA(5, 4, 3).solve(PairedFeatures.from_arrays(0 * images + 3, texts, range(8)))
    with pytest.raises(MmkitError, match=r"\(5, 9\)"):
        RegularizedCCA(5, 9, 3).solve(whole)


def test_held_out_features_that_are_not_finite_are_refused():
    images, texts = noise(8)
    whole = PairedFeatures.from_arrays(images.clone(), texts, range(8))
    images[2] = torch.nan
    with pytest.raises(MmkitError, match="NaN or infinity"):
        RegularizedCCA(5, 4, 3).solve(whole, PairedFeatures.from_arrays(images, texts, range(8)))


@pytest.mark.parametrize("settings", [{"regularization": -1.0}, {"power": -0.5}])
def test_negative_settings_are_refused(settings):
    with pytest.raises(MmkitError, match="must not be negative"):
        RegularizedCCA(5, 4, 3, **settings)


def test_an_unknown_name_lists_all():
    with pytest.raises(MmkitError, match=r"'gate'.*mlp, gnn, .*gated, two-tower, cca, .*region-word"):
        build_fuser("gate", SMALL, 5, 4)
