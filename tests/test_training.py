"""The loop on features that can be learnt, on noise and on broken ones; its parts, its batches, and its state."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

import mmkit
from helpers import DIMS, equal, learnable, noise_features, settings, weights
from mmkit import FalseCaptions, MmkitError, MultimodalFeatureFuser, MultimodalGNN, PairedFeatures, PairFuser, fit
from mmkit.losses import Batch, JointLoss
from mmkit.training import PairBatches, adamw, mean_losses, warmup_cosine

BOTH = pytest.mark.parametrize("kind", [MultimodalFeatureFuser, MultimodalGNN])
DATA = learnable(40, 0), learnable(20, 1)  # 80 and 40 pairs
PAIRS = PairedFeatures.from_arrays(torch.arange(5.0)[:, None], torch.arange(9.0)[:, None], [3, 0, 0, 4, 1, 3, 2, 2, 3])


def small(kind: type[PairFuser] = MultimodalFeatureFuser, **changes: float) -> PairFuser:
    torch.manual_seed(0)
    sizes = {"heads": 4, "neighbours": 3} if kind is MultimodalGNN else {}
    return kind(*DIMS, 32, **({"dropout": 0.1} | sizes | changes))


def denied(features: PairedFeatures) -> FalseCaptions:
    """Each caption with some of its features turned round."""
    turned = features.captions() * torch.ones(DIMS[1]).index_fill(0, torch.arange(5), -1)
    false = PairedFeatures.from_arrays(features.images(), turned, features.image_index)
    return FalseCaptions(false, torch.arange(len(turned)))


def watched(model: nn.Module) -> tuple[torch.optim.Optimizer, list[float], list[list[Tensor]]]:
    """An optimizer, and the rate and the gradients of each of its steps."""
    optimizer, rates, gradients = torch.optim.AdamW(model.parameters(), lr=0.01), [], []
    optimizer.register_step_pre_hook(lambda one, *_: rates.append(one.param_groups[0]["lr"]))
    optimizer.register_step_pre_hook(lambda *_: gradients.append([part.grad.clone() for part in model.parameters()]))
    return optimizer, rates, gradients


@BOTH
def test_fit_halves_the_loss_and_finds_held_out_pairs(kind):
    train, validation, held_out = learnable(200, 0), learnable(60, 1), learnable(100, 2)
    fuser = small(kind)
    assert mmkit.retrieval_report(fuser, held_out).text_to_image.r1 < 0.1
    loss = fit(fuser, train, validation, settings()).column("loss")
    assert len(loss) == 10 and loss[-1] < 0.5 * loss[0] and not fuser.training
    report = mmkit.retrieval_report(fuser, held_out)
    assert report.text_to_image.r1 > 0.4 and report.image_to_text.r1 > 0.4
    assert mmkit.matching_report(fuser, held_out, mmkit.choose_thresholds(fuser, validation))["random"].accuracy > 0.85
    assert (fuser.standardize_images.mean - train.images().mean(dim=0)).abs().max() < 1e-4


@BOTH
def test_a_fuser_trained_on_noise_is_at_chance_on_other_noise(kind):
    fuser, chance = small(kind, dropout=0.0), 1 / 400
    fit(fuser, noise_features(200, 0), noise_features(200, 1), settings(epochs=4))
    recall = mmkit.retrieval_report(fuser, noise_features(400, 2, captions=1)).text_to_image.r1
    assert recall < chance + 4 * (chance * (1 - chance) / 400) ** 0.5


@BOTH
def test_the_same_seed_gives_the_same_bits_and_another_gives_others(kind):
    runs: list[dict[str, Tensor]] = []
    for seed in (3, 3, 4):
        fuser = small(kind, feature_dropout=0.2)
        torch.manual_seed(len(runs))  # what ran before does not count
        fit(fuser, *DATA, settings(epochs=2, seed=seed))
        runs.append(weights(fuser))
    assert equal(*runs[:2]) and not equal(*runs[1:])


def test_false_captions_come_to_score_below_the_true_ones():
    train, validation, held_out = learnable(200, 0), learnable(60, 1), learnable(100, 2)
    fuser, images = small(), held_out.images(held_out.image_index)
    column = fit(fuser, train, validation, settings(), false=denied(train)).column("contradiction")
    true, false = (fuser.match_head(fuser(images, part.captions())) for part in (held_out, denied(held_out).features))
    assert column[-1] < 0.5 * column[0] and (true > false).double().mean() > 0.95


def test_a_closed_form_is_solved_and_judged_by_the_same_losses():
    fuser, other = mmkit.RegularizedCCA(*DIMS, 8), mmkit.RegularizedCCA(*DIMS, 8)
    (row,) = fit(fuser, *DATA, settings(seed=3)).rows
    other.solve(*DATA, seed=3)
    assert equal(weights(fuser), weights(other)) and fuser.correlations.any() and row["gradient_steps"] == 0
    for part, prefix in zip(DATA, ("", "validation_"), strict=True):
        assert row.items() >= mean_losses(JointLoss(fuser), part, settings(seed=3), prefix).items()


def test_fusers_of_parts_have_settings_of_their_own(monkeypatch):
    given = []
    monkeypatch.setattr("mmkit.training.adamw", lambda model, profile: given.append(profile) or adamw(model, profile))
    profile = settings(part_epochs=2, part_batch_size=11, part_learning_rate=0.25)
    assert len(fit(mmkit.RegionWordGNN(*DIMS, 8), *DATA, profile).rows) == 2
    assert (given[0].batch_size, given[0].epochs, given[0].learning_rate) == (11, 2, 0.25)


def test_bad_input_is_refused_with_advice():
    with pytest.raises(MmkitError, match="epochs is 0"):
        fit(small(), *DATA, settings(epochs=0))
    with pytest.raises(MmkitError, match=r"\(24, 5\).*\(1, 24\).*\(1, 16\)"):
        fit(MultimodalFeatureFuser(24, 5, 8), *DATA, settings())
    with pytest.raises(MmkitError, match=r"other images.*false_captions"):
        fit(small(), *DATA, settings(), false=denied(learnable(30, 2)))
    with pytest.raises(MmkitError, match=r"loss is nan.* All features are finite.*lower learning_rate \(1e\+30"):
        fit(small(), *DATA, settings(learning_rate=1e30))


@pytest.mark.parametrize("split, where", [(0, "nan in epoch 0, step 0"), (1, "validation_loss is nan")])
@pytest.mark.parametrize("which, images", [(0, "3, 17"), (1, "1, 8")])
def test_images_with_broken_features_are_named(split, where, which, images):
    data, parts = list(DATA), [DATA[split].images(), DATA[split].captions()]
    parts[which][[3, 17], 2] = torch.tensor([torch.nan, torch.inf])
    data[split] = PairedFeatures.from_arrays(*parts, DATA[split].image_index)
    with pytest.raises(MmkitError, match=rf"{where}\. Not finite are .* images {images} or .*Remedy: extract"):
        fit(small(), *data, settings())
    with pytest.raises(MmkitError, match=r"(?i)nan"):
        fit(small(MultimodalGNN), *data, settings())


def test_denormals_are_flushed_on_all_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    kept = (torch.full((4_000_000,), 1e-40) * 1).count_nonzero().item()
    torch.set_num_threads(threads)
    assert kept == 0 or not torch.set_flush_denormal(True)  # which some processors cannot


def test_the_kept_weights_are_those_of_the_lowest_validation_loss_and_patience_ends_what_no_longer_gains():
    data = learnable(12, 0, noise=3.0), learnable(40, 1)
    profile, fuser = {"epochs": 12, "batch_size": 8, "learning_rate": 0.01, "seed": 2}, small(dropout=0.5)
    history = fit(fuser, *data, settings(**profile))
    column, state = history.column("validation_loss"), torch.get_rng_state()
    assert column[history.best_epoch] == min(column) < column[-1] - 0.1
    losses = JointLoss(fuser).train()
    kept, again, other = (mean_losses(losses, data[1], settings(**profile | {"seed": s}), "") for s in (2, 2, 3))
    assert kept["loss"] == pytest.approx(min(column), rel=1e-5) and kept == again != other
    assert torch.equal(state, torch.get_rng_state())
    assert history.rows[history.best_epoch]["temperature"] == fuser.log_temperature.exp().item()
    short = fit(small(dropout=0.5), *data, settings(patience=3, **profile))
    assert len(short.rows) == short.best_epoch + 4 < 12 and short.rows == history.rows[: len(short.rows)]


@pytest.mark.parametrize("name", ["contrastive_weight", "matching_weight"])
def test_the_losses_are_weighed_and_one_of_weight_zero_teaches_nothing(name):
    chosen, fuser = {"contrastive_weight": 0.5, "matching_weight": 3.0} | {name: 0.0}, small()
    before = weights(fuser)
    (row,) = fit(fuser, *DATA, settings(epochs=1, weight_decay=0.0, **chosen)).rows
    for prefix in ("", "validation_"):
        expected = sum(chosen[f"{part}_weight"] * row[prefix + part] for part in ("contrastive", "matching"))
        assert row[f"{prefix}loss"] == pytest.approx(expected)
    changed = {key for key, value in fuser.state_dict().items() if not torch.equal(value, before[key])}
    assert ("log_temperature" in changed) == (name == "matching_weight") and "project_images.weight" in changed
    assert ("match_head.weight" in changed) == (name == "contrastive_weight")


def test_the_schedule_warms_up_linearly_then_falls_as_a_cosine_to_zero():
    factors = [warmup_cosine(step, 110) for step in range(111)]
    assert factors[:11] == pytest.approx([(step + 1) / 11 for step in range(11)])
    assert factors[11:] == pytest.approx([0.5 * (1 + np.cos(np.pi * step / 99)) for step in range(100)], abs=1e-6)
    assert warmup_cosine(0, 1) == 1


def test_matrices_decay_and_biases_and_the_temperature_do_not():
    losses = JointLoss(small(MultimodalGNN))
    losses.fuser.match_head.bias.requires_grad_(False)
    groups = adamw(losses, settings(weight_decay=0.3, learning_rate=0.5)).param_groups
    assert [(group["weight_decay"], group["lr"]) for group in groups] == [(0.3, 0.5), (0.0, 0.5)]
    names = {id(part): name for name, part in losses.named_parameters()}
    decaying, free = ({names[id(part)] for part in group["params"]} for group in groups)
    assert all(name.endswith("weight") for name in decaying) and "fuser.match_head.weight" in decaying
    assert "fuser.log_temperature" in free and all(name.endswith(("bias", "temperature")) for name in free)
    assert decaying | free == {*names.values()} - {"fuser.match_head.bias"} and not decaying & free


def test_a_given_optimizer_schedule_losses_and_callback_take_effect():
    class Recorded(JointLoss):
        def forward(self, batch: Batch, hardness: float = 1.0) -> tuple[Tensor, ...]:
            seen[self.training].append(hardness)
            return super().forward(batch, hardness)

    fuser, rows, seen = small(dropout=0.0), [], {True: [], False: []}
    (optimizer, rates, gradients), profile = watched(fuser), settings(epochs=4, batch_size=30)
    given = {"optimizer": optimizer, "losses": Recorded(fuser), "on_epoch": lambda row: rows.append(dict(row))}
    assert fit(fuser, *DATA, profile, schedule=lambda step, steps: (step + 1) / steps, **given).rows == rows
    assert rates == pytest.approx([0.01 * (step + 1) / 12 for step in range(12)])
    norms = [torch.stack([part.norm() for part in parts]).norm().item() for parts in gradients]
    assert max(norms) == pytest.approx(1, rel=1e-3), "clipped"
    assert seen[True] == pytest.approx([min(1, 2 * step / 12) for step in range(12)]), "how hard the negatives are"
    assert set(seen[False]) == {1.0}, "validation keeps one measure"


def test_accumulated_batches_make_one_step_of_their_mean_gradient():
    fuser, fresh = small(dropout=0.0), small(dropout=0.0)
    (optimizer, rates, gradients), train = watched(fuser), DATA[0]
    fit(fuser, *DATA, settings(epochs=2, batch_size=16, matching_weight=0.0), accumulate=2, optimizer=optimizer)
    assert rates == pytest.approx([0.01 * warmup_cosine(step, 6) for step in range(6)])  # of 2, 2 and 1
    fresh.observe(train)
    losses, order = JointLoss(fresh), torch.randperm(80, generator=torch.Generator().manual_seed(0))
    for rows in order.split(16)[:2]:
        contrastive, matching, _ = losses(PairBatches(train, losses).__getitems__(rows.tolist()))
        ((contrastive + 0 * matching) / 2).backward()
    nn.utils.clip_grad_norm_(fresh.parameters(), 1.0)
    torch.testing.assert_close(gradients[0], [part.grad for part in fresh.parameters()], rtol=1e-4, atol=1e-6)


def test_what_accelerates_launcher_says_wins(monkeypatch, tmp_path):
    def trained(**changes: object) -> mmkit.History:
        return fit(small(), *DATA, settings(epochs=2, batch_size=16), **changes)

    one, expected = trained(), trained(accumulate=3, state=tmp_path)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    assert trained() == trained(accumulate=2) == trained(state=tmp_path) == expected != one
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(MmkitError, match="another training"):
        trained(accumulate=3, state=tmp_path)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "0")
    with pytest.raises(MmkitError, match="accumulate is 0"):
        trained()


def test_a_launchers_precision_is_trained_in_and_validation_keeps_its_own(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps for life what it was told first
    seen, fuser = {True: set(), False: set()}, small()
    fuser.match_head.register_forward_hook(lambda head, given, made: seen[head.training].add(made.dtype))
    loss = fit(fuser, *DATA, settings(epochs=2)).column("loss")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert seen == {True: {torch.bfloat16}, False: {torch.float32}} and loss[1] < loss[0]
    assert {value.dtype for value in fuser.state_dict().values()} == {torch.float32}


def test_a_batch_holds_each_image_once_and_leads_each_caption_to_its_own():
    for indices in ([0, 5, 8], [6, 1, 2, 7], [3], list(range(8, -1, -1))):
        batch, images = PairBatches(PAIRS, JointLoss(small())).__getitems__(indices), PAIRS.image_index[indices]
        assert batch.texts.flatten().tolist() == indices and not len(batch.accused)
        assert torch.equal(batch.images[batch.image_index].flatten(), images.float())
        assert len(batch.images) == len(images.unique()) and torch.equal(batch.share_index, batch.image_index)


def test_each_image_of_a_batch_brings_one_of_its_false_captions():
    false_images, true = [4, 0, 3, 0, 0, 3], torch.tensor([3, 2, 0, 1, 1, 8])
    false = PairedFeatures.from_arrays(PAIRS.images(), 100 + torch.arange(6.0)[:, None], false_images)
    batches, seen = PairBatches(PAIRS, JointLoss(small()), FalseCaptions(false, true)), set()
    for _ in range(100):
        batch = batches.__getitems__([5, 1, 2, 7])  # images 3, 0, 0, 2, of which the last has no false caption
        assert batch.texts[:4].flatten().tolist() == [5, 1, 2, 7]
        drawn = (batch.texts[4:6].flatten() - 100).long().tolist()
        assert batch.texts[6:].flatten().long().tolist() == true[drawn].tolist()
        accused = batch.images[batch.image_index[batch.accused]].flatten().tolist()
        assert [false_images[row] for row in drawn] == accused == [0, 3]
        seen |= set(drawn)
    assert seen == {1, 2, 3, 4, 5}


def broken_off(fuser: PairFuser, state: Path, step: int) -> None:
    """A training of five epochs that is interrupted in a step, counted from 0; there are two in an epoch."""

    def interrupt(head: nn.Module, given: tuple) -> None:
        if head.training and next(steps) == step:
            raise KeyboardInterrupt

    steps = itertools.count()
    fuser.match_head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(fuser, *DATA, settings(epochs=5), state=state)


@BOTH
def test_a_resumed_training_ends_in_the_same_bits(kind, tmp_path):
    def make() -> PairFuser:
        fuser = small(kind)  # with a layer of two names and one that is not trained, as in an adapted encoder
        fuser.again, fuser.frozen = fuser.match_head, nn.Linear(3, 3).requires_grad_(False)
        return fuser

    undisturbed = make()
    expected = fit(undisturbed, *DATA, settings(epochs=5))
    broken_off(make(), tmp_path, 5)  # in the middle of epoch 3
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-0002"]
    broken_off(make(), tmp_path, 3)  # and of epoch 4
    torch.rand(7)  # whatever the process did before
    for resumed in (make(), make()):  # the second finds it finished
        assert fit(resumed, *DATA, settings(epochs=5), state=tmp_path) == expected
        assert equal(weights(resumed), weights(undisturbed))


def test_a_state_of_another_training_is_refused(tmp_path):
    one, optimizer = settings(epochs=1), watched(other := small())[0]
    fit(small(), *DATA, one, state=tmp_path)
    for fuser, train, profile, given in (
        (small(), DATA[0], settings(epochs=2), {}),
        (small(), DATA[0], settings(epochs=1, seed=1), {}),
        (small(), learnable(41, 0), one, {}),
        (small(MultimodalGNN), DATA[0], one, {}),
        (small(), DATA[0], one, {"false": denied(DATA[0])}),
        (small(), DATA[0], one, {"accumulate": 2}),
        (other, DATA[0], one, {"optimizer": optimizer}),
    ):
        with pytest.raises(MmkitError, match=rf"{tmp_path} is of another training\. Remedy"):
            fit(fuser, train, DATA[1], profile, state=tmp_path, **given)


@pytest.mark.parametrize("kept", [0, 0.1, 0.7])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin", "scheduler.bin", "custom_checkpoint_0.pkl"])
def test_a_damaged_state_is_named_and_left_alone(tmp_path, file, kept):
    fit(small(), *DATA, settings(epochs=1), state=tmp_path)
    damaged = tmp_path / "epoch-0001" / file
    content = damaged.read_bytes()
    damaged.write_bytes(content[: int(kept * len(content))])
    for _ in range(2):
        with pytest.raises(MmkitError, match=rf"(?s)epoch-0001 holds no state of a training .*delete {tmp_path}"):
            fit(small(), *DATA, settings(epochs=1), state=tmp_path)
        damaged.unlink(missing_ok=True)


def test_a_disk_that_is_full_loses_no_earlier_state(tmp_path):
    resource = pytest.importorskip("resource")
    broken_off(small(), tmp_path, 3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
    try:
        with pytest.raises(MmkitError, match=r"cannot be written.*the last one is kept.*Remedy"):
            fit(small(), *DATA, settings(epochs=5), state=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-0001"]
