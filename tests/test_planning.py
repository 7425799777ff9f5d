from argparse import Namespace
from dataclasses import replace
from functools import partial

import pytest
import torch

from mmkit import FUSERS, MissingFile, MmkitError, costs, planning, profile
from mmkit.costs import Cost, Measured, Work
from mmkit.planning import A100, Entry, Workload, entries, plan, plan_table, read_measured, seconds_of
from mmkit.results import write_whole

TINY = profile("coco", fusion_dim=16, hidden_dim=16, part_dim=16, batch_size=32, part_batch_size=16)
RUN = Workload(images=30_000, captions=150_000, held_out=5_000, epochs=3, part_epochs=2, gpus=4)
GPU = A100._replace(images=1000.0, tokens=2000.0, half=1e12, single=1e11, bandwidth=1e10)


def cost(**changes: object) -> Cost:
    small, large = (50, 1.0, Work(1e9, 0, 0)), (100, 3.0, Work(4e9, 0, 0))
    return replace(Cost(500, 0.5, 0.01, 0.0, Work(1e10, 2e8, 100), 10**9, [small, large]), **changes)


def measured(**fusers: Cost) -> Measured:
    sizes = {"images": 4096.0, "grids": 200_704.0, "captions": 1536.0, "tokens": 15_360.0}
    settings = {"name": "coco", "image_encoder": "resnet50", "text_encoder": "bert-base-uncased"}
    facts = {"machine": "CPU, 2 cores", "threads": 2, "profile": settings}
    return Measured("command", facts, {"images": 10.0, "captions": 50.0, "decoded": 100.0}, sizes, fusers)


def figure(found: list[Entry], step: str, where: str) -> tuple[float, str]:
    (entry,) = [entry for entry in found if (entry.step, entry.where) == (step, where)]
    return entry.figure, entry.how


def test_extraction_is_counts_over_rates_and_the_slower_of_gpu_and_decoding():
    found = entries(measured(), RUN, GPU)
    assert figure(found, "extract images", "here") == (3000.0, "measured")
    assert figure(found, "extract captions", "here") == (3000.0, "measured")
    # eight cores decode 800 images/s, the GPU would take 1,000; captions have 10 tokens, so 200 of them a second
    assert figure(found, "extract images", "1 GPU") == (37.5, "computed")
    assert figure(found, "extract captions", "1 GPU") == (750.0, "computed")
    assert figure(found, "extract captions", "4 GPUs") == (pytest.approx(750 / 4 / 0.84), "computed")
    slow = entries(measured(), RUN, GPU._replace(images=300.0))
    assert figure(slow, "extract images", "1 GPU")[0] == 100.0
    assert figure(found, "extract images", "disk") == (30_000 * 4096, "measured")
    assert figure(found, "extract captions with tokens", "disk") == (150_000 * 16_896, "measured")


def test_a_row_of_training_computed_by_hand():
    found = entries(measured(mlp=cost()), RUN, GPU)
    # 100,000 captions to train on and a third of 25,000 to validate on, in batches of 500, three times
    steps = 3 * (100_000 + 25_000 / 3) / 500
    assert figure(found, "train mlp", "here") == (pytest.approx(0.5 * steps), "measured")
    assert figure(found, "train mlp", "memory") == (10**9, "measured")
    # 1e10 operations at a tenth of 1e12/s take 0.1 s, 2e8 bytes at 1e10/s 0.02 s, 100 starts 1 ms; then 0.01 s to read
    assert figure(found, "train mlp", "1 GPU") == (pytest.approx(0.11 * steps), "computed")
    assert figure(found, "train mlp", "4 GPUs")[0] == pytest.approx(0.11 * steps / 4 / 0.84)


def test_each_bound_of_a_step_binds():
    assert seconds_of(Work(1e10, 0, 0), 1e12, GPU) == pytest.approx(0.1)
    assert seconds_of(Work(1e10, 5e9, 0), 1e12, GPU) == pytest.approx(0.5)
    assert seconds_of(Work(1e10, 5e9, 10**5), 1e12, GPU) == pytest.approx(1.0)
    assert seconds_of(Work(1e10, 5e9, 10**5), 1e12, GPU, share=0.1) == pytest.approx(1.0)  # starts do not divide
    assert seconds_of(Work(1e10, 5e9, 0), 1e12, GPU, share=0.1) == pytest.approx(0.05)


def test_what_does_not_divide_takes_as_long_on_several_gpus():
    found = entries(measured(gnn=cost(), cca=cost(step=None, fixed_seconds=7.0)), RUN, GPU)
    for name in ("gnn", "cca"):
        assert figure(found, f"train {name}", "1 GPU") == figure(found, f"train {name}", "4 GPUs")
    # a closed form is the processor's, and takes one pass
    assert figure(found, "train cca", "1 GPU")[0] == pytest.approx(7 + 0.5 * (100_000 + 25_000 / 3) / 500)


def test_parts_have_their_own_epochs_and_are_read_from_a_disk():
    found = entries(measured(**{"region-word": cost(captions=50)}), RUN, GPU)
    steps = 2 * (100_000 + 25_000 / 3) / 50
    assert figure(found, "train region-word", "here")[0] == pytest.approx(0.5 * steps)
    read = 50 * (4096 + 200_704 + 1536 + 15_360) / 1e9  # more than the 0.01 s in memory
    assert figure(found, "train region-word", "1 GPU")[0] == pytest.approx((0.1 + read) * steps)


def test_evaluations_grow_as_pairs_or_through_a_shortlist_as_the_pool():
    found = entries(measured(mlp=cost(), **{"cross-attention": cost()}), RUN, GPU)
    # 1 s for 50 images and 3 s for 100: a share that grows as the square, and one that is fixed
    each = (3 - 1) / (100**2 - 50**2)
    assert figure(found, "evaluate mlp", "here")[0] == pytest.approx(3 - each * 100**2 + each * 5000**2)
    assert figure(found, "evaluate cross-attention", "here")[0] == pytest.approx(-1 + 5000 * (3 - 1) / 50)
    # in float32, and by one process however many there are
    assert figure(found, "evaluate mlp", "1 GPU")[0] == pytest.approx(
        1e9 * (1 + (4 - 1) * (5000**2 - 2500) / 7500) / 1e10
    )
    assert figure(found, "evaluate mlp", "1 GPU") == figure(found, "evaluate mlp", "4 GPUs")


def test_the_table_marks_what_is_computed_and_names_sources_and_assumptions():
    lines = plan_table(measured(mlp=cost(memory=0), gnn=cost()), RUN, GPU).splitlines()
    rows = {line[:30].strip(): line[30:].split() for line in lines}
    assert rows["extract images"] == ["50", "min", "37.5", "s*", "11.2", "s*", "123", "MB"]
    assert rows["train mlp"][-1] == "–"
    assert rows["train gnn"][-2:] == ["1", "GB"]
    text = "\n".join(lines)
    assert lines[0] == "profile coco: resnet50, bert-base-uncased; 30,000 images, 150,000 captions"
    assert lines[1] == "here: CPU, 2 cores, 2 threads"
    assert planning.SOURCES in text
    assert planning.ASSUMPTIONS in text
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    "changes", [{"images": 10_000}, {"captions": 0}, {"gpus": 1}, {"epochs": 0}, {"held_out": 0}], ids=str
)
def test_a_run_that_makes_no_sense_is_an_error(changes):
    with pytest.raises(MmkitError, match=r"has no plan.*Remedy"):
        entries(measured(), RUN._replace(**changes))


def test_published_figures_are_in_the_sources():
    assert f"{A100.images:,}" in planning.SOURCES
    assert f"{A100.tokens:,.0f} tokens/s" in planning.SOURCES
    assert f"{A100.half / 1e12:.0f} TFLOPS" in planning.SOURCES


# --- measuring -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "cells"), [("mlp", 0), ("cca", 0), ("cross-attention", 4)])
def test_costs_are_measured_and_survive_a_file(name, cells, tmp_path):
    found = costs._cost(name, TINY, (12, 10), cells, steps=1, pool=8)
    assert found.captions == (16 if cells else 32)
    assert 0 < found.read_seconds < 1
    assert found.step_seconds >= 0
    assert (found.step is None) == (name == "cca")
    assert [images for images, _, _ in found.evaluations] == [4, 8]
    path = tmp_path / "planning.json"
    write_whole(path, planning.msgspec.json.encode(measured(**{name: found})).decode())
    assert read_measured(path) == measured(**{name: found})


def test_work_is_that_of_the_products_and_of_the_distances():
    left, right = torch.rand(3, 5), torch.rand(4, 5)
    work = costs._Counted().of(lambda: (left @ right.T, torch.cdist(left, right, p=1.0)))
    assert work == Work(2 * 3 * 4 * 5 + 3 * 3 * 4 * 5, 3 * 2 * 3 * 4 * 4, 2)  # the transposition moves nothing


def test_a_step_of_the_mlp_has_the_operations_of_its_layers():
    found = costs._cost("mlp", replace(TINY, batch_size=64, fusion_dim=32), (24, 20), 0, steps=1, pool=8)
    nodes, pairs = 2 * 64 * 32 * (24 + 20), 2 * 4 * 64 * 2 * 32 * 32
    assert 2 * nodes + 3 * pairs < found.step.flops < 2 * (2 * nodes + 3 * pairs)


# --- the command ---------------------------------------------------------------------------------


def arguments(**given: object) -> Namespace:
    return Namespace(**({"measure": False, "out": planning.FILE, "images": None, "captions": None} | given))


def test_the_command_prints_the_committed_measurements(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_whole(tmp_path / planning.FILE, planning.msgspec.json.encode(measured(mlp=cost())).decode())
    assert plan(arguments(images=RUN.images, captions=RUN.captions)) == 0
    expected = plan_table(measured(mlp=cost()), Workload(RUN.images, RUN.captions))
    assert capsys.readouterr().out == f"{expected}\n"
    monkeypatch.chdir(tmp_path / "notebooks")  # where a notebook is at work
    assert read_measured() == measured(mlp=cost())


def test_measuring_anew_replaces_the_file(tmp_path, monkeypatch, capsys):
    settings = replace(TINY, image_encoder="efficientnet-lite0", text_encoder="minilm-l6")
    monkeypatch.setattr(costs, "FUSERS", {"two-tower": FUSERS["two-tower"]})
    monkeypatch.setattr(planning, "measure", partial(costs.measure, settings, 14, 1, 8))
    path = tmp_path / "planning.json"
    path.write_text("of old")
    assert plan(arguments(measure=True, out=path)) == 0
    assert "train two-tower" in capsys.readouterr().out
    assert str(tmp_path.parent) not in path.read_text()
    found = read_measured(path)
    assert found.conditions["profile"]["batch_size"] == 32
    assert set(found.rates) == {"images", "captions", "decoded"}
    assert min(found.rates.values()) > 0
    assert (found.bytes["images"], found.bytes["captions"]) == (2 * 1280, 2 * 384)  # float16
    assert found.bytes["grids"] == 49 * found.bytes["images"]
    assert 10 < found.bytes["tokens"] / found.bytes["captions"] < 18


def test_without_measurements_the_error_tells_how_to_take_them(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "_CHECKOUT", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFile, match=r"planning.json.*Remedy: python -m mmkit plan --measure"):
        plan(arguments())
    (tmp_path / "planning.json").write_text('{"command": 3}')
    with pytest.raises(MmkitError, match=r"planning.json cannot be read.*Remedy"):
        plan(arguments())


def test_the_committed_measurements_are_of_the_profile_coco():
    committed = read_measured()
    assert committed.fusers.keys() == FUSERS.keys()
    assert committed.conditions["profile"]["name"] == "coco"
    assert {entry.how for entry in entries(committed)} == {"measured", "computed"}
