"""The training loop on features that can be learnt, on pure noise and on broken ones, and its checkpoints."""

import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from torch import Tensor

import mmkit
from mmkit import (
    FUSERS,
    FalseCaptions,
    History,
    MissingFile,
    MmkitError,
    MultimodalFeatureFuser,
    MultimodalGNN,
    PairedFeatures,
    contrastive_loss,
    fit,
    load_checkpoint,
    noise_recall,
    permutation_gap,
    retrieval_report,
    save_checkpoint,
    training,
)
from mmkit.batches import Order, PairBatches
from mmkit.fusers import PairFuser, unit_scale
from mmkit.losses import sample_negatives
from mmkit.training import _mixed_precision, _PairLosses, _warmup_cosine, _weight_groups, fit_profile, validation_losses

IMAGE_DIM, TEXT_DIM, CAPTIONS = 24, 16, 2


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors as small as these gain nothing from threads, and lose much on a busy processor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield threads
    torch.set_num_threads(threads)


def learnable(
    images: int, seed: int, noise: float = 0.2, dims: tuple[int, int] = (IMAGE_DIM, TEXT_DIM), captions: int = CAPTIONS
) -> PairedFeatures:
    """Images and captions, and parts of both, that are linear views of the same six hidden numbers, with some noise."""
    views = torch.Generator().manual_seed(123)
    to_image, to_text = (torch.randn(6, dim, generator=views) for dim in dims)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(images, 6, generator=generator)
    owner = torch.arange(images).repeat_interleave(captions)
    pictures = hidden @ to_image + noise * torch.randn(images, dims[0], generator=generator)
    texts = hidden[owner] @ to_text + noise * torch.randn(len(owner), dims[1], generator=generator)
    cells, tokens = (
        part[:, None] + noise * torch.randn(len(part), count, part.shape[1], generator=generator)
        for part, count in ((pictures, 4), (texts, 3))
    )
    return PairedFeatures.from_arrays(5 * pictures + 40, texts, owner, 5 * cells + 40, tokens)


def with_nan(features: PairedFeatures) -> PairedFeatures:
    images = features.sources["images"].copy()
    images[3, 2] = np.nan
    return PairedFeatures.from_arrays(images, features.sources["captions"], features.owner)


def small_mlp(dims: tuple[int, int] = (IMAGE_DIM, TEXT_DIM), **changes: object) -> MultimodalFeatureFuser:
    torch.manual_seed(0)
    return MultimodalFeatureFuser(*dims, 32, **({"dropout": 0.1} | changes))


def small_gnn(dims: tuple[int, int] = (IMAGE_DIM, TEXT_DIM), **changes: object) -> MultimodalGNN:
    torch.manual_seed(0)
    return MultimodalGNN(*dims, 32, heads=4, neighbours=3, **({"dropout": 0.1} | changes))


class LeakingFuser(MultimodalFeatureFuser):
    """Image `i` and text `i` of a pool get the same random vector: the pairing leaks through the index."""

    def nodes(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        image_nodes, text_nodes = super().nodes(images, texts)
        tags = torch.randn(max(len(images), len(texts)), self.width, generator=torch.Generator().manual_seed(5))
        return unit_scale(image_nodes + tags[: len(images)]), unit_scale(text_nodes + tags[: len(texts)])


@contextmanager
def full_disk(room: int = 9000) -> Iterator[None]:
    """No file can be written beyond `room` bytes."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


BOTH = pytest.mark.parametrize("make", [small_mlp, small_gnn], ids=["mlp", "gnn"])
QUICK = {"batch_size": 64, "learning_rate": 5e-3, "weight_decay": 0.01}


def weights(fuser: PairFuser) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in fuser.state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


# --- learning ------------------------------------------------------------------------------------


@BOTH
def test_fit_halves_the_loss_and_finds_held_out_pairs(make):
    train, validation, held_out = learnable(200, 0), learnable(60, 1), learnable(100, 2)
    fuser = make()
    assert retrieval_report(fuser, held_out).text_to_image.r1 < 0.1
    history = fit(fuser, train, validation, epochs=10, **QUICK)
    loss = history.column("loss")
    assert len(loss) == 10 and loss[-1] < 0.5 * loss[0]
    found = retrieval_report(fuser, held_out)
    assert found.text_to_image.r1 > 0.4 and found.image_to_text.r1 > 0.4
    assert mmkit.matching_report(fuser, held_out, mmkit.choose_thresholds(fuser, validation))["random"].accuracy > 0.85


@BOTH
def test_a_fuser_trained_on_noise_is_at_chance_on_other_noise(make):
    def train(noise: PairedFeatures, validation: PairedFeatures) -> PairFuser:
        fuser = make(noise.dims, dropout=0.0)
        fit(fuser, noise, validation, epochs=4, **QUICK)
        return fuser

    held_out = 400
    chance = 1 / held_out
    four_sigma = 4 * (chance * (1 - chance) / held_out) ** 0.5
    assert noise_recall(train, (10, 8), pairs=200, held_out=held_out) < chance + four_sigma


def test_a_fuser_that_leaks_the_index_is_caught_by_both_checks():
    def train(noise: PairedFeatures, validation: PairedFeatures) -> PairFuser:
        torch.manual_seed(0)
        fuser = LeakingFuser(*noise.dims, 32)
        fit(fuser, noise, validation, epochs=2, **QUICK)
        return fuser

    assert noise_recall(train, (10, 8), pairs=100, held_out=200) > 0.2
    images, texts = (torch.randn(20, dim, generator=torch.Generator().manual_seed(0)) for dim in (10, 8))
    torch.manual_seed(0)
    assert permutation_gap(LeakingFuser(10, 8, 32), images, texts) > 0.1
    assert permutation_gap(small_mlp((10, 8)), images, texts) < 1e-4


def test_one_graph_for_both_modalities_is_caught_as_a_leak():
    class OneGraph(MultimodalGNN):
        def nodes(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
            image_nodes = self.image_graph(self.project_images(images), images)[-1]
            return unit_scale(image_nodes), unit_scale(self.text_graph(self.project_texts(texts), images)[-1])

    images, texts = (torch.randn(20, dim, generator=torch.Generator().manual_seed(0)) for dim in (10, 8))
    torch.manual_seed(0)
    assert permutation_gap(OneGraph(10, 8, 32, heads=4), images, texts) > 0.05
    assert permutation_gap(small_gnn((10, 8)), images, texts) < 1e-4


def test_features_are_standardised_by_the_training_set_alone():
    train, validation = learnable(50, 0), learnable(20, 1)
    fuser = small_mlp()
    fit(fuser, train, validation, epochs=1, **QUICK)
    torch.testing.assert_close(fuser.standardize_images.mean, train.images().mean(dim=0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        fuser.standardize_texts.deviation, train.captions().std(dim=0, correction=0), rtol=1e-4, atol=1e-4
    )
    assert not fuser.training


def test_sizes_that_differ_are_refused_before_training():
    with pytest.raises(MmkitError, match=r"\(24, 5\).*\(1, 24\).*\(1, 16\)"):
        fit(small_mlp((IMAGE_DIM, 5)), learnable(10, 0), learnable(5, 1))


# --- seeds ---------------------------------------------------------------------------------------


@BOTH
def test_the_same_seed_gives_the_same_weights_and_another_gives_others(make):
    def trained(seed: int) -> dict[str, Tensor]:
        fuser = make(feature_dropout=0.2)
        torch.manual_seed(1000 + len(runs))  # what ran before does not count
        fit(fuser, learnable(40, 0), learnable(20, 1), epochs=2, seed=seed, **QUICK)
        runs.append(weights(fuser))
        return runs[-1]

    runs: list[dict[str, Tensor]] = []
    first = trained(3)
    assert equal(first, trained(3))
    assert not equal(first, trained(4))


def test_build_fuser_draws_the_weights_from_the_profiles_seed():
    for name, kind in FUSERS.items():
        profile = mmkit.profile("mini", fusion_dim=32, hidden_dim=32, part_dim=32, heads=4)
        first, second, other = (mmkit.build_fuser(name, mmkit.profile("mini", seed=s), 24, 16) for s in (1, 1, 2))
        assert equal(first.state_dict(), second.state_dict())
        small = mmkit.build_fuser(name, profile, 24, 16)
        assert type(small) is kind and (small.image_dim, small.text_dim, small.width) == (24, 16, 32)
        if name != "cca":  # which is solved: it draws no weights and drops no features
            assert not equal(first.state_dict(), other.state_dict())
            assert small.feature_dropout.p == profile.feature_dropout


def test_an_unknown_fuser_lists_the_valid_names():
    with pytest.raises(MmkitError, match=r"'mlpp'.*mlp, gnn"):
        mmkit.build_fuser("mlpp", mmkit.profile("mini"), 24, 16)


def test_fit_profile_passes_every_setting_of_the_profile(monkeypatch):
    given = {}
    monkeypatch.setattr(mmkit.training, "fit", lambda *_, **settings: given.update(settings))
    chosen = {"epochs": 3, "batch_size": 7, "learning_rate": 0.5, "weight_decay": 0.25, "seed": 9}
    chosen |= {"contrastive_weight": 2.0, "matching_weight": 3.0, "patience": 4}
    pairs, profile = (learnable(10, 0), learnable(5, 1)), mmkit.profile("mini", **chosen)
    fit_profile(small_mlp(), *pairs, profile, Path("kept.state"), accumulate=5)
    assert given == chosen | {"state": Path("kept.state"), "false": None, "accumulate": 5}
    parts = mmkit.RegionWordGNN(IMAGE_DIM, TEXT_DIM, 8)
    fit_profile(
        parts,
        learnable(10, 0),
        learnable(5, 1),
        mmkit.profile("mini", part_batch_size=11, part_epochs=2, part_learning_rate=3.0, **chosen),
    )
    assert (given["batch_size"], given["epochs"], given["learning_rate"]) == (11, 2, 3.0)


# --- what stops a run ----------------------------------------------------------------------------


def test_nan_features_stop_the_mlp_and_the_step_is_named():
    with pytest.raises(MmkitError, match="nan in epoch 0, step 0"):
        fit(small_mlp(), with_nan(learnable(40, 0)), learnable(20, 1), epochs=2, **QUICK)


def test_nan_features_stop_the_gnn_and_are_named():
    with pytest.raises(MmkitError, match="NaN"):
        fit(small_gnn(), with_nan(learnable(40, 0)), learnable(20, 1), epochs=2, **QUICK)


@BOTH
def test_nan_in_the_validation_features_stops_too(make):
    with pytest.raises(MmkitError, match=r"(?i)nan"):
        fit(make(), learnable(40, 0), with_nan(learnable(20, 1)), epochs=2, **QUICK)


def test_a_learning_rate_that_diverges_stops_with_the_epoch_and_advice():
    with pytest.raises(MmkitError, match=r"epoch \d+.*learning_rate"):
        fit(small_mlp(), learnable(40, 0), learnable(20, 1), epochs=20, **(QUICK | {"learning_rate": 1e30}))


def test_denormals_are_flushed_on_all_threads(one_thread):
    torch.set_num_threads(one_thread)
    fit(small_mlp(), learnable(20, 0), learnable(10, 1), epochs=1, **QUICK)
    kept = (torch.full((4_000_000,), 1e-40) * 1).count_nonzero().item()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    assert kept == 0


# --- the epoch that is kept ----------------------------------------------------------------------


def test_the_kept_weights_are_those_of_the_lowest_validation_loss():
    train, validation = learnable(12, 0, noise=3.0), learnable(40, 1)
    fuser = small_mlp(dropout=0.0)
    history = fit(fuser, train, validation, epochs=12, batch_size=8, learning_rate=0.01, weight_decay=0.0, seed=2)
    losses = history.column("validation_loss")
    assert losses[history.best_epoch] == min(losses) < losses[-1] - 0.1
    contrastive, matching = validation_losses(fuser, validation, 8, 2)
    assert contrastive + matching == pytest.approx(min(losses), rel=1e-5)


def test_validation_losses_are_repeatable_and_leave_the_random_state_alone():
    fuser, features = small_mlp(dropout=0.5, feature_dropout=0.5).train(), learnable(30, 0)
    state = torch.get_rng_state()
    first = validation_losses(fuser, features, 16, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(77)
    assert validation_losses(fuser, features, 16, seed=0) == first
    assert validation_losses(fuser, features, 16, seed=1) != first


def test_the_history_weighs_the_two_losses():
    fuser, validation = small_mlp(), learnable(20, 1)
    history = fit(fuser, learnable(40, 0), validation, epochs=2, contrastive_weight=0.5, matching_weight=3.0, **QUICK)
    for row in history.rows:
        assert row["loss"] == pytest.approx(0.5 * row["contrastive"] + 3 * row["matching"])
        expected = 0.5 * row["validation_contrastive"] + 3 * row["validation_matching"]
        assert row["validation_loss"] == pytest.approx(expected)
    best = history.rows[history.best_epoch]
    assert best["temperature"] == pytest.approx(fuser.log_temperature.exp().item())


@pytest.mark.parametrize("name", ["contrastive_weight", "matching_weight"])
def test_a_loss_of_weight_zero_teaches_nothing(name):
    fuser = small_mlp()
    before = weights(fuser)
    fit(fuser, learnable(40, 0), learnable(20, 1), epochs=1, **{name: 0.0}, **(QUICK | {"weight_decay": 0.0}))
    changed = {key for key, value in fuser.state_dict().items() if not torch.equal(value, before[key])}
    assert "project_images.weight" in changed
    assert ("log_temperature" in changed) == (name == "matching_weight")
    assert ("match_head.weight" in changed) == (name == "contrastive_weight")


# --- schedule and optimizer ----------------------------------------------------------------------


def test_the_schedule_warms_up_linearly_then_falls_as_a_cosine_to_zero():
    factors = [_warmup_cosine(step, 10, 110) for step in range(111)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1 and factors[60] == pytest.approx(0.5) and factors[110] == pytest.approx(0)
    assert factors[35] == pytest.approx(0.5 * (1 + 2**-0.5))
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[10:]))


def test_fit_steps_the_schedule_once_a_batch_and_clips_the_gradient(monkeypatch):
    steps = []

    class Watched(torch.optim.AdamW):
        def step(self, *args: object, **kwargs: object) -> object:
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
            steps.append((self.param_groups[0]["lr"], norm))
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    fit(small_mlp(), learnable(40, 0), learnable(20, 1), epochs=5, batch_size=20, learning_rate=0.01, clip=0.05)
    rates, norms = zip(*steps, strict=True)
    total = 5 * 4
    assert rates == pytest.approx([0.01 * _warmup_cosine(step, 2, total) for step in range(total)])
    assert max(norms) == pytest.approx(0.05, rel=1e-3)


def test_accumulated_batches_make_one_step_of_their_mean_gradient(monkeypatch):
    steps = []

    class Watched(torch.optim.AdamW):
        def step(self, *args: object, **kwargs: object) -> object:
            steps.append((self.param_groups[0]["lr"], fuser.project_images.weight.grad.clone()))
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    train, fuser = learnable(40, 0), small_mlp(dropout=0.0)
    settings = {"epochs": 2, "batch_size": 16, "learning_rate": 0.01, "clip": 1e9, "matching_weight": 0.0}
    fit(fuser, train, learnable(20, 1), accumulate=2, **settings)  # 5 batches: 2, 2, and 1 that is left
    rates, gradients = zip(*steps, strict=True)
    assert rates == pytest.approx([0.01 * _warmup_cosine(step, 1, 6) for step in range(6)])
    fresh = small_mlp(dropout=0.0)
    fresh.observe(train)
    for rows in torch.tensor(list(Order(80, 0))).split(16)[:2]:
        image_nodes, text_nodes = fresh.nodes(train.images(train.owner[rows]), train.captions(rows))
        loss = contrastive_loss(image_nodes, text_nodes, fresh.log_temperature, train.owner[rows])
        (loss / 2).backward()
    torch.testing.assert_close(gradients[0], fresh.project_images.weight.grad, rtol=1e-4, atol=1e-6)


def test_a_launchers_accumulation_is_that_of_the_argument_and_its_schedule_ends_at_zero(monkeypatch, tmp_path):
    ended, state = [], tmp_path / "run.state"
    build = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **kwargs: ended.append(build(*args, **kwargs)) or ended[-1])

    def trained(**changes: object) -> tuple[History, dict[str, Tensor]]:
        fuser = small_mlp()  # 5 batches an epoch
        settings = {"epochs": 3, "batch_size": 16, "learning_rate": 0.01} | changes
        return fit(fuser, learnable(40, 0), learnable(20, 1), **settings), weights(fuser)

    (one, _), (expected, kept) = trained(), trained(accumulate=3, state=state)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    for told in ({}, {"accumulate": 2}, {"state": state}):
        history, found = trained(**told)
        assert history == expected != one and equal(found, kept)
    rates = [group["lr"] for optimizer in ended for group in optimizer.param_groups]
    assert len(rates) == 10 and rates == pytest.approx([0.0] * 10, abs=1e-9)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(MmkitError, match="another training"):
        trained(accumulate=3, state=state)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "0")
    with pytest.raises(MmkitError, match="accumulate is 0"):
        trained()


@pytest.fixture
def new_accelerate() -> Iterator[None]:
    """Accelerate keeps what it was told first for as long as a process lives."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@BOTH
def test_a_launchers_precision_is_computed_in(make, new_accelerate, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    seen, fuser = set(), make()
    fuser.match_head.register_forward_hook(lambda head, given, made: seen.add(made.dtype) if head.training else None)
    loss = fit(fuser, learnable(40, 0), learnable(20, 1), epochs=2, **QUICK).column("loss")
    assert seen == {torch.bfloat16} and {value.dtype for value in fuser.state_dict().values()} == {torch.float32}
    assert loss[1] < loss[0]


@pytest.mark.parametrize("device, default", [((False, False), "no"), ((True, False), "fp16"), ((True, True), "bf16")])
def test_half_precision_is_the_default_of_devices_that_have_it_and_no_more(device, default, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    for name, answer in zip(("is_available", "is_bf16_supported"), device, strict=True):
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    assert _mixed_precision() == default
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert _mixed_precision() is None


def test_hard_negatives_come_in_over_the_first_half_of_the_steps(monkeypatch):
    seen = []

    def watched(similarity: Tensor, owner: Tensor, hardness: float = 1.0) -> tuple[Tensor, Tensor]:
        seen.append((hardness, torch.is_grad_enabled()))
        return sample_negatives(similarity, owner, hardness)

    monkeypatch.setattr("mmkit.training.sample_negatives", watched)
    fit(small_mlp(), learnable(40, 0), learnable(20, 1), epochs=4, batch_size=30, learning_rate=1e-3)
    trained = [hardness for hardness, training in seen if training]
    assert trained == pytest.approx([min(1, 2 * step / len(trained)) for step in range(len(trained))])
    assert len(trained) == 12
    assert {hardness for hardness, training in seen if not training} == {1.0}, "validation keeps one measure"


def test_false_captions_of_other_images_are_refused():
    train = learnable(40, 0)
    false = FalseCaptions(learnable(30, 2), torch.zeros(90, dtype=torch.long))
    with pytest.raises(MmkitError, match=r"other images.*false_captions"):
        fit(small_mlp(), train, learnable(20, 1), epochs=1, false=false)


def test_a_fuser_of_vectors_takes_features_with_parts_as_well():
    train, validation = learnable(40, 0), learnable(20, 1)
    fuser, other = small_mlp(), small_mlp()
    fit(fuser, train, validation, epochs=1)
    fit(other, train.with_parts(), validation.with_parts(), epochs=1)
    assert equal(fuser.state_dict(), other.state_dict())
    plain, parts = (
        mmkit.matching_report(fuser, part, mmkit.choose_thresholds(fuser, part))
        for part in (validation, validation.with_parts())
    )
    assert plain == parts


def test_late_steps_take_no_longer_than_early_ones(monkeypatch):
    """With a sharp temperature, gradients sink below the smallest normal float; unflushed, that once took 50 times as
    long on an x86 processor. Others compute such numbers at full speed, and there this cannot fail."""
    ends = []

    class Watched(torch.optim.AdamW):
        def step(self, *args: object, **kwargs: object) -> object:
            ends.append(time.process_time())
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    fuser = small_mlp()
    with torch.no_grad():
        fuser.log_temperature.fill_(np.log(0.01))
    fit(fuser, learnable(160, 0), learnable(8, 1), epochs=15, batch_size=32, learning_rate=1e-2)
    steps = np.diff(ends)
    early, late = (np.median(part) for part in (steps[: len(steps) // 4], steps[-len(steps) // 4 :]))
    assert len(steps) > 100 and late <= 2 * early


@BOTH
def test_matrices_decay_and_biases_and_the_temperature_do_not(make):
    losses = _PairLosses(make())
    losses.fuser.match_head.bias.requires_grad_(False)
    decaying, free = _weight_groups(losses, 0.3)
    assert (decaying["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    named = {id(parameter): name for name, parameter in losses.named_parameters()}
    decaying, free = ({named[id(p)] for p in group["params"]} for group in (decaying, free))
    assert all(name.endswith("weight") for name in decaying) and "fuser.match_head.weight" in decaying
    assert "fuser.log_temperature" in free and all(name.endswith(("bias", "temperature")) for name in free)
    assert decaying | free == set(named.values()) - {"fuser.match_head.bias"} and not decaying & free


# --- batches -------------------------------------------------------------------------------------


def test_a_batch_holds_each_image_once_and_owners_lead_each_caption_to_its_image():
    images, captions = torch.arange(5.0)[:, None], torch.arange(9.0)[:, None]
    owner = [3, 0, 0, 4, 1, 3, 2, 2, 3]
    batches = PairBatches(PairedFeatures.from_arrays(images, captions, owner))
    assert len(batches) == 9
    for indices in ([0, 5, 8], [6, 1, 2, 7], [3], list(range(8, -1, -1))):
        found_images, found_texts, rows, denied = batches.__getitems__(indices)
        assert found_texts.flatten().tolist() == indices
        assert found_images[rows].flatten().tolist() == [owner[j] for j in indices]
        assert len(found_images) == len({owner[j] for j in indices}) and not len(denied)
    single = batches[6]
    assert [part.tolist() for part in single] == [[[2.0]], [[6.0]], [0], []]


def test_each_image_of_a_batch_brings_one_of_its_false_captions():
    images, captions = torch.arange(5.0)[:, None], torch.arange(9.0)[:, None]
    features = PairedFeatures.from_arrays(images, captions, [3, 0, 0, 4, 1, 3, 2, 2, 3])
    false_owner = [4, 0, 3, 0, 0, 3]
    false = PairedFeatures.from_arrays(images, 100 + torch.arange(6.0)[:, None], false_owner)
    true = torch.tensor([3, 2, 0, 1, 1, 8])
    batches, seen = PairBatches(features, FalseCaptions(false, true)), set()
    for _ in range(100):
        batch = batches.__getitems__([5, 1, 2, 7])  # images 3, 0, 2, of which the last has no false caption
        assert batch.texts[:4].flatten().tolist() == [5, 1, 2, 7]
        drawn = (batch.texts[4:6].flatten() - 100).long().tolist()
        assert batch.texts[6:].flatten().long().tolist() == true[drawn].tolist()
        assert [false_owner[row] for row in drawn] == batch.images[batch.denied].flatten().tolist() == [0, 3]
        seen |= set(drawn)
    assert seen == {1, 2, 3, 4, 5}


@BOTH
def test_the_last_batch_may_be_a_single_pair(make):
    history = fit(make(), learnable(5, 0), learnable(5, 1), epochs=1, batch_size=9, learning_rate=1e-3)
    assert np.isfinite(history.column("loss")).all() and np.isfinite(history.column("validation_loss")).all()


# --- checkpoints ---------------------------------------------------------------------------------


def made_by(name: str = "mlp", weights: str = "abc", data: str = "d1", false=(), accumulate: int = 1, **settings):
    profile = mmkit.profile("mini", **({"epochs": 3} | settings))
    return mmkit.training_recipe(name, profile, {"minilm-l6": weights}, data, false, accumulate)


def save(folder, fuser: PairFuser, name: str = "mlp", **changes: object):
    history = History([{"loss": 1.5, "validation_loss": 2.5}], 0)
    given = {"thresholds": {"random": 0.25, "hard": -1.5}, "history": history}
    return save_checkpoint(folder, fuser, made_by(name), **(given | changes))


@pytest.mark.parametrize(("name", "make"), [("mlp", small_mlp), ("gnn", small_gnn)])
def test_a_checkpoint_gives_back_the_fuser_and_all_that_was_chosen(name, make, tmp_path, capsys):
    fuser, features = make(), learnable(10, 0)
    fuser.standardize_images.fit(features.images())
    folder = tmp_path / "runs" / "first"
    assert save(folder, fuser, name) == folder
    loaded, training = load_checkpoint(folder)
    assert capsys.readouterr().out == ""
    assert type(loaded) is type(fuser) and not loaded.training
    expected = fuser.eval().score(features.images(), features.captions())
    assert torch.equal(loaded.score(features.images(), features.captions()), expected)
    assert training["fuser"] == name
    assert training["thresholds"] == {"random": 0.25, "hard": -1.5}
    assert training["weights"] == {"minilm-l6": "abc"}
    assert training["history"] == {"rows": [{"loss": 1.5, "validation_loss": 2.5}], "best_epoch": 0}
    assert training["profile"]["epochs"] == 3 and not training["profile"].keys() & {"cache", "coco_root"}
    assert [path.name for path in folder.parent.iterdir()] == ["first"]


@pytest.mark.parametrize("name", FUSERS)
def test_every_fuser_scores_the_same_after_a_checkpoint_and_has_a_card_of_its_own(name, tmp_path):
    profile = mmkit.profile("mini", fusion_dim=32, hidden_dim=32, part_dim=32, heads=4)
    fuser = mmkit.build_fuser(name, profile, IMAGE_DIM, TEXT_DIM).eval()
    features = fuser.view(learnable(50, 0))
    if name == "cca":
        fuser.solve(features)
    else:
        fuser.observe(features)
    folder = save(tmp_path / "run", fuser, name)
    loaded, _ = load_checkpoint(folder)
    with torch.inference_mode():
        scores = [one.score(features.images(), features.captions()) for one in (fuser, loaded)]
    assert equal(fuser.state_dict(), loaded.state_dict())
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)  # sums depend on where the weights lie in memory
    text = ModelCard.load(folder / "README.md").text
    assert type(fuser).__doc__.splitlines()[0] in text
    assert ("depends on the other images" in text) == fuser.transductive
    assert ("grids=True, tokens=True" in text) == ("the image's cells" in text) == fuser.takes_parts


def test_a_model_card_names_what_the_checkpoint_was_made_of(tmp_path):
    fuser, train, validation = small_mlp(), learnable(1200, 0), learnable(20, 1)
    thresholds = mmkit.choose_thresholds(fuser, validation)
    report = mmkit.report_json(
        validation, mmkit.matching_report(fuser, validation, thresholds), retrieval_report(fuser, validation)
    )
    encoding = {"text_encoder": f"hf:{tmp_path}/own-bert", "pooling": "cls", "max_tokens": 33}
    profile = mmkit.profile("photos", **encoding, image_size=96, squash=True, split_seed=7, val_fraction=0.125)
    history = History([{"validation_loss": value} for value in (3.0, 2.03125, 2.5)], 1)
    given = {"efficientnet-lite0": "ab" * 32, profile.text_encoder: "cd" * 32}
    by = mmkit.training_recipe("mlp", profile, given)
    folder = save_checkpoint(tmp_path / "run", fuser, by, thresholds, history, train, report)
    card = ModelCard.load(folder / "README.md")
    rows = [line.strip("| ").split(" | ") for line in card.text.splitlines() if line.startswith("| ")]
    assert ["images", "efficientnet-lite0", "24", "ab" * 32] in rows
    assert ["captions", "hf:own-bert, cls of ≤ 33 tokens", "16", "cd" * 32] in rows
    for words in ("1,200 images and 2,400 captions", "seed 7", "0.125 for", "3 epochs", "epoch 2,", "2.0312 ="):
        assert words in card.text
    shown = {row[0]: row[1:] for row in rows}
    assert shown["hard: the nearest caption of another image"] == [f"{thresholds['hard']:.4f}"]
    assert "On 20 images with 40 captions" in card.text
    recall, interval = report["retrieval"]["text_to_image"]["r5"], report["intervals"]["retrieval"]["text_to_image.r5"]
    assert shown["text→image R@5"] == [f"{recall:.3f}", f"{interval['low']:.3f} to {interval['high']:.3f}"]
    assert shown["ROC-AUC, random negatives 1:1"][0] == f"{report['matching']['random']['roc_auc']:.3f}"
    assert '"cls", 33, squash=True, image_size=96' in card.text
    assert str(tmp_path) not in card.content and "{%" not in card.content and "[More" not in card.content

    data = card.data
    assert (data.library_name, data.license, data.language, data.datasets) == ("mmkit", "mit", "en", ["imagefolder"])
    assert {"image-text-matching", "pytorch_model_hub_mixin"} <= {*data.tags} and data.model_name == "mlp"
    indexed = {one.metric_name: one.metric_value for one in data.eval_results}
    assert len(indexed) == 12 and indexed["text→image R@5"] == recall
    plain = ModelCard.load(save(tmp_path / "plain", fuser) / "README.md")
    assert plain.data.eval_results is None and "Figures" not in plain.text and "1,500 scenes drawn" in plain.text


def test_a_checkpoint_replaces_an_older_one_whole(tmp_path):
    folder = save(tmp_path / "run", small_gnn(), "gnn")
    (folder / "notes.txt").write_text("of the older one")
    save(folder, small_mlp(), "mlp", thresholds={"random": 7.0})
    fuser, training = load_checkpoint(folder)
    assert type(fuser) is MultimodalFeatureFuser and training["thresholds"] == {"random": 7.0}
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_a_save_that_fails_leaves_the_older_checkpoint_and_no_litter(tmp_path):
    folder = save(tmp_path / "run", small_mlp())
    with full_disk(), pytest.raises(MmkitError, match=r"run \(.*File too large.*what was there is kept\. Remedy"):
        save(folder, small_mlp(), thresholds={"random": 7.0})
    assert load_checkpoint(folder)[1]["thresholds"]["random"] == 0.25
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(MmkitError, match="holds other files"):
        save(tmp_path, small_mlp())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert load_checkpoint(save(empty, small_mlp()))[1]["fuser"] == "mlp"


def test_loading_what_is_no_checkpoint_names_what_it_lacks(tmp_path):
    with pytest.raises(MissingFile, match=r"lacks training.json, config.json, model.safetensors"):
        load_checkpoint(tmp_path / "nowhere")
    folder = save(tmp_path / "run", small_mlp())
    (folder / "config.json").unlink()
    with pytest.raises(MissingFile, match=r"lacks config.json\. Remedy"):
        load_checkpoint(folder)


def test_training_json_names_no_path(tmp_path):
    content = (save(tmp_path / "run", small_mlp()) / "training.json").read_text()
    assert str(tmp_path) not in content and str(mmkit.profile("mini").cache) not in content
    json.loads(content)


def test_training_takes_at_least_one_epoch():
    with pytest.raises(MmkitError, match="epochs is 0"):
        fit(small_mlp(), learnable(20, 0), learnable(10, 1), epochs=0)


@pytest.mark.parametrize("file, content", [("training.json", "{"), ("training.json", "{}"), ("model.safetensors", "x")])
def test_a_damaged_checkpoint_is_named(tmp_path, file, content):
    folder = save(tmp_path / "run", small_mlp())
    (folder / file).write_text(content)
    with pytest.raises(MmkitError, match="run is damaged"):
        mmkit.load_checkpoint(folder)
    assert not mmkit.is_trained(folder, made_by())


@pytest.mark.parametrize(
    "change",
    [
        {"name": "gnn"},
        {"weights": "abd"},
        {"data": "d2"},
        {"false": ("colour",)},
        {"accumulate": 2},
        {"epochs": 4},
        {"seed": 1},
        {"feature_dropout": 0.1},
    ],
)
def test_a_checkpoint_is_known_by_all_that_decides_a_training(change, tmp_path):
    folder = save(tmp_path / "run", small_mlp())
    assert mmkit.is_trained(folder, made_by()) and mmkit.is_trained(folder, made_by(cache=tmp_path))
    assert not mmkit.is_trained(folder, made_by(**change)) and not mmkit.is_trained(tmp_path / "none", made_by())


# --- broken off and resumed ----------------------------------------------------------------------


class Killed(Exception):
    pass


def killed_after(monkeypatch, epochs: int) -> None:
    """The training dies as its next epoch begins."""
    begun = itertools.count()
    validate = training.validation_losses

    def die(*arguments):
        if next(begun) == epochs:
            raise Killed
        return validate(*arguments)

    monkeypatch.setattr(training, "validation_losses", die)


@BOTH
@pytest.mark.parametrize("epochs", [1, 3])
def test_a_resumed_training_ends_in_the_same_bits(make, epochs, tmp_path, monkeypatch):
    train, validation = learnable(60, 0), learnable(20, 1)
    undisturbed = make()
    expected = fit(undisturbed, train, validation, epochs=5, **QUICK)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, epochs)
        fit(make(), train, validation, epochs=5, state=tmp_path / "run.state", **QUICK)
    torch.rand(7)  # whatever the process did before
    fuser = make()
    history = fit(fuser, train, validation, epochs=5, state=tmp_path / "run.state", **QUICK)
    assert history == expected and equal(weights(fuser), weights(undisturbed))
    again = make()
    assert fit(again, train, validation, epochs=5, state=tmp_path / "run.state", **QUICK) == expected
    assert equal(weights(again), weights(undisturbed))


def test_a_state_of_another_training_is_refused(tmp_path):
    train, validation, state = learnable(40, 0), learnable(20, 1), tmp_path / "run.state"
    fit(small_mlp(), train, validation, epochs=1, state=state, **QUICK)
    for changed in ({"epochs": 2}, {"epochs": 1, "seed": 1}, {"epochs": 1, "clip": 2.0}):
        with pytest.raises(MmkitError, match=r"run\.state is of another training"):
            fit(small_mlp(), train, validation, state=state, **changed, **QUICK)
    with pytest.raises(MmkitError, match="another training"):
        fit(small_gnn(), train, validation, epochs=1, state=state, **QUICK)


@pytest.mark.parametrize("kept", [0, 50, 0.7])
def test_a_damaged_state_is_named_and_left_alone(tmp_path, kept):
    train, validation, state = learnable(40, 0), learnable(20, 1), tmp_path / "run.state"
    fit(small_mlp(), train, validation, epochs=1, state=state, **QUICK)
    content = state.read_bytes()
    damaged = content[: kept if isinstance(kept, int) else int(kept * len(content))]
    state.write_bytes(damaged)
    with pytest.raises(MmkitError, match=r"run\.state holds no state of a training.*delete it"):
        fit(small_mlp(), train, validation, epochs=1, state=state, **QUICK)
    assert state.read_bytes() == damaged


def test_a_disk_that_is_full_loses_no_earlier_state(tmp_path, monkeypatch):
    train, validation, state = learnable(40, 0), learnable(20, 1), tmp_path / "run.state"
    undisturbed = small_mlp()
    expected = fit(undisturbed, train, validation, epochs=3, **QUICK)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, 1)
        fit(small_mlp(), train, validation, epochs=3, state=state, **QUICK)
    kept = state.read_bytes()
    with full_disk(), pytest.raises(MmkitError, match=r"File too large.*the last one is kept.*Remedy"):
        fit(small_mlp(), train, validation, epochs=3, state=state, **QUICK)
    assert state.read_bytes() == kept and [path.name for path in tmp_path.iterdir()] == ["run.state"]
    fuser = small_mlp()
    assert fit(fuser, train, validation, epochs=3, state=state, **QUICK) == expected
    assert equal(weights(fuser), weights(undisturbed))


def test_patience_ends_a_training_that_no_longer_gains():
    train, validation = learnable(12, 0, noise=3.0), learnable(40, 1)
    settings = {"epochs": 30, "batch_size": 8, "learning_rate": 0.02, "weight_decay": 0.0, "seed": 2}
    history = fit(small_mlp(dropout=0.0), train, validation, patience=3, **settings)
    assert len(history.rows) == history.best_epoch + 4 < 30
    whole = fit(small_mlp(dropout=0.0), train, validation, **settings)
    assert whole.rows[: len(history.rows)] == history.rows


def test_an_image_with_a_broken_feature_is_named():
    train = learnable(40, 0)
    images = train.sources["images"].copy()
    images[17, 5] = np.inf
    broken = PairedFeatures.from_arrays(images, train.sources["captions"], train.owner)
    with pytest.raises(MmkitError, match=r"epoch 0, step 0, images with features that are not finite: 17\."):
        fit(small_mlp(), broken, learnable(20, 1), epochs=1, batch_size=80)


def test_a_closed_form_is_refused_by_the_loop():
    fuser = mmkit.RegularizedCCA(IMAGE_DIM, TEXT_DIM, 8)
    with pytest.raises(MmkitError, match="solved, not stepped"):
        fit(fuser, learnable(40, 0), learnable(20, 1), epochs=1, **QUICK)
