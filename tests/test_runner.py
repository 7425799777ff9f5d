"""The runner of `make results`: killed, taken up again, under other conditions; and what is committed."""

import importlib.util
import json
import platform
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

import mmkit
from mmkit import MmkitError, load_results
from mmkit.profiles import CHECKOUT
from mmkit.results import FIGURES, Results, read_results

FOLDER = CHECKOUT / "notebooks" / "results"
SPEC = importlib.util.spec_from_file_location("run", FOLDER / "run.py")
runner = sys.modules["run"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(runner)
Variant, EXPERIMENTS = runner.Variant, runner.read_experiments(FOLDER / "experiments.toml")
SMALL = {"epochs": 6, "fusion_dim": 32, "batch_size": 64}
WIDTHS = {"wide": Variant(), "narrow": Variant(settings={"fusion_dim": 8})}
SETTINGS = {"seeds": 2, "settings": {"scene_count": 60, **SMALL}}
TINY = runner.Experiment("tiny", "Worse?", "mini", WIDTHS, "wide", ("accuracy.hard", "rsum"), **SETTINGS)


def take(folder: Path, seeds: int | None = None, **changes: object) -> Results:
    """The results of TINY, with changes, after the runs that the folder lacks."""
    runner.run_experiment(msgspec.structs.replace(TINY, **changes), folder, seeds)
    return read_results(folder / "tiny.json")


def ask(monkeypatch, *options: object) -> None:
    """What `python -m mmkit results` does."""
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, options)])
    runner.main(EXPERIMENTS)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of its own, for this process and those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    """Of an undisturbed experiment."""
    return take(tmp_path_factory.mktemp("results"))


@pytest.fixture
def folder(results, tmp_path) -> Path:
    """A folder with a copy of them."""
    runner.write_json(tmp_path / "tiny.json", results)
    return tmp_path


def pairs(results: Results) -> list[tuple[str, int]]:
    return [(run.variant, run.seed) for run in results.runs]


# --- runs ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_experiment_goes_on_and_ends_like_an_undisturbed_one(results, tmp_path, capsys):
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path;"
        "import torch; torch.set_num_threads(1); import test_runner as t; t.take(Path(sys.argv[1]))"
    )
    child = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    while "seed 0" not in child.stdout.readline():
        assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    before = read_results(tmp_path / "tiny.json").runs
    assert 1 <= len(before) < 4
    after = take(tmp_path)
    assert f"{4 - len(before)} runs to take, {len(before)} taken before" in capsys.readouterr().out
    assert after.runs[: len(before)] == before  # to the millisecond: they were not taken again
    for run, undisturbed in zip(after.runs, results.runs, strict=True):
        assert replace(run, seconds=undisturbed.seconds) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.json"]


def test_finished_runs_are_kept_and_further_seeds_are_added(folder, results, capsys):
    kept = (folder / "tiny.json").read_bytes()
    take(folder)
    assert "0 runs to take, 4 taken before" in capsys.readouterr().out and (folder / "tiny.json").read_bytes() == kept
    more = take(folder, 3)
    assert pairs(more) == [(name, seed) for seed in range(3) for name in ("wide", "narrow")]
    assert more.runs[:4] == results.runs and take(folder, 1).runs == more.runs  # asking for fewer deletes none
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=CHECKOUT, capture_output=True, text=True).stdout.strip()
    assert more.runs[-1].commit.removesuffix("-dirty") == head


def test_other_conditions_start_anew_and_say_so(folder, results, capsys):
    fresh = take(folder, 1, settings=TINY.settings | {"epochs": 1, "split_seed": 1})
    said = capsys.readouterr().out
    assert (
        "tiny: other splits, protocol, profile than in tiny.json; it starts anew\ntiny: 2 runs to take, 0 taken" in said
    )
    assert pairs(fresh) == [("wide", 0), ("narrow", 0)] and fresh.runs[0].figures != results.runs[0].figures


def test_a_changed_variant_costs_its_own_runs_alone(folder, results, capsys):
    narrower = {"narrow": Variant(settings={"fusion_dim": 4}), "towers": Variant("two-tower")}
    changed = take(folder, variants=TINY.variants | narrower)
    said = capsys.readouterr().out
    assert "runs of narrow were of other settings" in said and "4 runs to take, 2 taken before" in said
    assert [run for run in changed.runs if run.variant == "wide"] == [*results.runs[::2]]
    assert len(changed.values("towers", "rsum")) == 2
    assert changed.mean("narrow", "rsum") != results.mean("narrow", "rsum")


def test_settings_that_came_later_have_been_at_their_defaults(folder, results, capsys):
    earlier = json.loads((folder / "tiny.json").read_text())
    del earlier["conditions"]["profile"]["squash"]
    for variant in earlier["variants"].values():
        del variant["lora"], variant["tuning"]
    (folder / "tiny.json").write_text(json.dumps(earlier))
    assert take(folder) == results and "0 runs to take, 4 taken before" in capsys.readouterr().out


def test_a_variant_may_have_encoders_of_its_own_or_train_the_one_of_texts(tmp_path):
    variants = {
        "cached": Variant("two-tower"),
        "false": Variant("two-tower", false=["roles"]),
        "squashed": Variant("two-tower", {"squash": True, "image_size": 96}),
        "lora": Variant("two-tower", lora=2, tuning={"learning_rate": 0.02}),
        "csls": Variant("two-tower", corrected="csls"),
    }
    settings = {"scene_count": 40, "epochs": 1, "batch_size": 64}
    results = take(tmp_path, 1, variants=variants, reference="cached", settings=settings)
    others, features = results.conditions["other_features"], results.conditions["features"]
    assert others.keys() == {"squashed"} and others["squashed"]["image_encoder"][:2] == features["image_encoder"][:2]
    assert others["squashed"]["image_encoder"][2] != features["image_encoder"][2]
    figures = [run.figures for run in results.runs]
    assert all(figures[0] != other and figures[0].keys() == other.keys() for other in figures[1:])
    assert results.mean("lora", "training_time") > 2


def by_sorting(scores: torch.Tensor, image_index: torch.Tensor, k: int) -> list[float]:
    """R@k of both directions, by sorting scores that have no ties."""
    texts, images = scores.argsort(dim=1, descending=True)[:, :k], scores.argsort(dim=0, descending=True)[:k]
    there = (image_index[texts] == torch.arange(len(scores))[:, None]).any(dim=1)
    return [there.double().mean().item(), (images == image_index).any(dim=0).double().mean().item()]


def test_the_figures_are_those_of_the_training_that_they_name(results):
    profile = mmkit.profile("mini", **TINY.settings | {"fusion_dim": 8}, seed=1)
    dataset, encoders = mmkit.load_dataset(profile), mmkit.encoders_of(profile)
    features = mmkit.extract_features(dataset, encoders, profile.cache, profile.precision)
    images = dataset.splits(profile.val_fraction, profile.test_fraction, profile.split_seed)
    split = {name: features.select(chosen) for name, chosen in images.items()}
    fuser, test, new = mmkit.build_fuser("mlp", profile, *features.dims), split["test"], split["new"]
    mmkit.fit(fuser, split["train"], split["val"], profile)
    figures = next(run.figures for run in results.runs if (run.variant, run.seed) == ("narrow", 1))
    scores, new_scores = (fuser.score(part.images(), part.captions()).detach() for part in (test, new))
    recalls = {f"r{k}": by_sorting(scores, test.image_index, k) for k in (1, 5, 10)}
    first = slice(0, 5 * len(new))  # as many known ones, with five captions each
    known = by_sorting(scores[: len(new), first], test.image_index[first], 1)
    new = by_sorting(new_scores, new.image_index, 1)
    for place, way in enumerate(("image_to_text", "text_to_image")):
        assert [figures[f"{way}.{cut}"] for cut in recalls] == pytest.approx([row[place] for row in recalls.values()])
        assert [figures[f"new.{way}.r1"], figures[f"known.{way}.r1"]] == pytest.approx([new[place], known[place]])
    assert figures["rsum"] == pytest.approx(100 * np.sum([*recalls.values()]))
    thresholds = mmkit.choose_thresholds(fuser, split["val"])
    for kind, threshold in thresholds.items():
        logits, labels = mmkit.matching_logits(fuser, test, kind)
        assert figures[f"accuracy.{kind}"] == ((logits > threshold) == labels).double().mean().item()
    changed = mmkit.diagnostic_pairs(dataset, test, encoders, profile.cache)
    report = mmkit.diagnostic_report(fuser, test, changed)
    assert {fact: figures[f"diagnostic.{fact}"] for fact in report} == {f: row.accuracy for f, row in report.items()}


def tells_where(text: str) -> list[str]:
    """Strings of JSON that look like a path, a picture or this machine."""
    own = (platform.node() or "?", str(Path.home()), ".jpg", "/", "\\")
    return [part for part in text.split('"')[1::2] if any(mark in part for mark in own)]


def test_an_experiment_on_photos_tells_no_path_and_tests_on_as_many_as_it_says(scenes_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MMKIT_COCO_ROOT", str(scenes_folder))
    results = take(tmp_path, 1, profile="photos", settings=SMALL, unseen=20)
    sizes = {name: part["images"] for name, part in results.conditions["splits"]["sizes"].items()}
    assert (sizes["test"], sizes["val"]) == (20, 4)  # a tenth of the other 40, of which none is a new combination
    assert not tells_where((tmp_path / "tiny.json").read_text()) and tells_where(json.dumps([str(scenes_folder)]))
    with pytest.raises(MmkitError, match=r"leave none|tests on 70"):
        take(tmp_path, profile="photos", settings=SMALL, unseen=70)


def test_without_photos_their_experiments_are_skipped(tmp_path, monkeypatch, capsys):
    ask(monkeypatch, "--only", "fusers-photos", "unseen-1000", "--out", tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said] == ["fusers-photos", "unseen-1000"]
    assert all("MMKIT_COCO_ROOT" in line for line in said) and not list(tmp_path.iterdir())
    for options, message in ((("--only", "nothing"), "Valid names: fusers-scenes"), (("--seeds", 0), "--seeds 0")):
        with pytest.raises(MmkitError, match=message):
            ask(monkeypatch, *options)


def test_an_experiment_that_cannot_be_run_keeps_no_other_from_it(tmp_path, monkeypatch):
    taken = []

    def run_experiment(experiment, *_):
        taken.append(experiment.name)
        if experiment.name in ("graph", "paths", "counts"):
            raise MmkitError("no number" if experiment.name == "counts" else "no luck")

    monkeypatch.setattr(runner, "run_experiment", run_experiment)
    with pytest.raises(MmkitError, match=r"^not finished: counts\. no number\nnot finished: graph, paths\. no luck$"):
        ask(monkeypatch, "--out", tmp_path)
    assert taken == list(EXPERIMENTS)


# --- files -----------------------------------------------------------------------------------------


def test_an_experiment_that_is_written_wrongly_is_named(tmp_path):
    path, text = tmp_path / "experiments.toml", (FOLDER / "experiments.toml").read_text("utf-8")
    for right, wrong in (('fuser = "gnn"', 'fusor = "gnn"'), ("seeds = 3", 'seeds = "three"'), ("[losses]", "[losses")):
        path.write_text(text.replace(right, wrong), "utf-8")
        with pytest.raises(MmkitError, match=r"experiments\.toml: .*Remedy: "):
            runner.read_experiments(path)


def test_the_committed_tables_say_what_the_committed_files_say(tmp_path, monkeypatch):
    for path in FOLDER.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    ask(monkeypatch, "--tables", "--out", tmp_path)
    assert (tmp_path / "README.md").read_text("utf-8") == (FOLDER / "README.md").read_text("utf-8")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_committed_files_are_whole_and_of_today_and_tell_no_path(name, encoders):
    results, experiment = load_results(name), EXPERIMENTS[name]
    assert not tells_where((FOLDER / f"{name}.json").read_text("utf-8"))
    assert results.variants == msgspec.to_builtins(experiment.variants)
    assert {*pairs(results)} >= {(variant, seed) for variant in experiment.variants for seed in range(experiment.seeds)}
    assert (results.reference, results.columns) == (experiment.reference, experiment.columns)
    assert {*experiment.columns, experiment.compared, *results.runs[0].figures} <= FIGURES.keys()
    digests = {kind: results.conditions["features"][f"{kind}_encoder"][1] for kind in ("image", "text")}
    assert digests == {"image": encoders.image.digest(), "text": encoders.text.digest()}
    profile = mmkit.profile(experiment.profile, coco_root="/", **experiment.settings)
    for variant in experiment.variants.values():
        fuser = mmkit.build_fuser(variant.fuser, replace(profile, **variant.settings), 64, 64, **variant.arguments)
        assert not variant.corrected or mmkit.HubnessCorrected(fuser).transductive
