"""Experiments that really train: killed, taken up again, with other conditions; and that README says what JSON says."""

import functools
import json
import os
import platform
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import mmkit
from mmkit import FUSERS, HubnessCorrected, MissingFile, MmkitError, build_fuser, experiments, load_results
from mmkit.__main__ import main
from mmkit.experiments import _PROFILES, code_digest, run_experiment, run_experiments
from mmkit.questions import EXPERIMENTS, Experiment, Variant
from mmkit.results import (
    FIGURES,
    FOLDER,
    Results,
    Run,
    read_results,
    results_section,
    with_section,
    write_results,
    write_whole,
)

TOP = Path(__file__).parent.parent
README = (TOP / "README.md").read_text(encoding="utf-8")
COMMITTED = sorted((TOP / FOLDER).glob("*.json"))
SMALL = {"epochs": 6, "fusion_dim": 32, "batch_size": 64}
TINY = Experiment(
    "tiny",
    "Does a narrow fuser lose?",
    "scenes",
    {"wide": Variant(), "narrow": Variant(settings={"fusion_dim": 8})},
    "wide",
    settings={"scene_count": 60, **SMALL},
    seeds=2,
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory) -> Path:
    """A cache of its own, for this process and those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield Path(os.environ["MMKIT_CACHE"])


@pytest.fixture(scope="module")
def load(encoders):
    def read(settings, parts):
        dataset = mmkit.load_dataset(settings)
        return dataset, encoders, mmkit.extract_features(dataset, encoders, settings.cache, grids=parts, tokens=parts)

    return functools.cache(read)


@pytest.fixture(scope="module")
def folder(load, tmp_path_factory) -> Path:
    """The folder of an undisturbed experiment."""
    out = tmp_path_factory.mktemp("results")
    run_experiment(TINY, out, load=load)
    return out


@pytest.fixture
def results(folder) -> Results:
    return read_results(folder / "tiny.json")


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    (tmp_path / "tiny.json").write_bytes((folder / "tiny.json").read_bytes())
    return tmp_path


def without_seconds(results: Results) -> Results:
    return replace(results, runs=tuple(replace(run, seconds=0) for run in results.runs))


def pairs(results: Results) -> list[tuple[str, int]]:
    return [(run.variant, run.seed) for run in results.runs]


# --- runs ----------------------------------------------------------------------------------------


def test_a_killed_experiment_goes_on_and_ends_like_an_undisturbed_one(folder, results, load, tmp_path, capsys):
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path;"
        "import test_experiments as t; t.run_experiment(t.TINY, Path(sys.argv[1]))"
    )
    child = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    while "seed 0" not in child.stdout.readline():
        assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    before = read_results(tmp_path / "tiny.json").runs
    assert 1 <= len(before) < 4
    after = run_experiment(TINY, tmp_path, load=load)
    assert f"{4 - len(before)} runs to take, {len(before)} taken before" in capsys.readouterr().out
    assert after.runs[: len(before)] == before  # to the millisecond: they were not taken again
    assert without_seconds(read_results(tmp_path / "tiny.json")) == without_seconds(after) == without_seconds(results)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.json"]


def test_finished_runs_are_kept_and_further_seeds_are_added(copied, results, load, capsys):
    kept = (copied / "tiny.json").read_bytes()
    run_experiment(TINY, copied, load=load)
    assert "0 runs to take, 4 taken before" in capsys.readouterr().out
    assert (copied / "tiny.json").read_bytes() == kept
    more = run_experiment(TINY, copied, seeds=3, load=load)
    assert pairs(more) == [(name, seed) for seed in range(3) for name in ("wide", "narrow")]
    assert more.runs[:4] == results.runs
    assert run_experiment(TINY, copied, seeds=1, load=load).runs == more.runs  # asking for fewer deletes none
    with pytest.raises(MmkitError, match="seeds is 0"):
        run_experiment(TINY, copied, seeds=0, load=load)


@pytest.mark.parametrize(("settings", "part"), [({"epochs": 1}, "profile"), ({"split_seed": 1}, "splits")])
def test_other_conditions_start_anew_and_say_so(settings, part, copied, results, load, capsys):
    changed = replace(TINY, settings=TINY.settings | settings)
    fresh = run_experiment(changed, copied, seeds=1, load=load)
    said = capsys.readouterr().out
    assert "starts anew" in said and part in said.partition(" than in ")[0] and "2 runs to take, 0 taken" in said
    assert pairs(fresh) == [("wide", 0), ("narrow", 0)]
    assert fresh.runs[0].figures != results.runs[0].figures


def test_a_changed_variant_costs_its_own_runs_alone(copied, results, load, capsys):
    variants = {"wide": Variant(), "narrow": Variant(settings={"fusion_dim": 4}), "towers": Variant("two-tower")}
    changed = run_experiment(replace(TINY, variants=variants), copied, load=load)
    said = capsys.readouterr().out
    assert "runs of narrow were of other settings" in said and "4 runs to take, 2 taken before" in said
    assert [run for run in changed.runs if run.variant == "wide"] == [
        run for run in results.runs if run.variant == "wide"
    ]
    assert changed.seeds("towers") == changed.seeds("narrow") == (0, 1)
    assert changed.values("narrow", "rsum") != results.values("narrow", "rsum")


def test_settings_that_came_later_have_been_at_their_defaults(copied, results, load, capsys):
    found = json.loads((copied / "tiny.json").read_text())
    del found["conditions"]["profile"]["squash"]
    for variant in found["variants"].values():
        del variant["lora"], variant["tuning"]
    (copied / "tiny.json").write_text(json.dumps(found))
    assert run_experiment(TINY, copied, load=load) == results
    assert "0 runs to take, 4 taken before" in capsys.readouterr().out
    found["conditions"]["profile"]["squash"] = True
    (copied / "tiny.json").write_text(json.dumps(found))
    assert pairs(run_experiment(TINY, copied, seeds=1, load=load)) == [("wide", 0), ("narrow", 0)]


def test_a_variant_may_have_encoders_of_its_own_or_train_the_one_of_texts(tmp_path):
    variants = {
        "cached": Variant("two-tower"),
        "squashed": Variant("two-tower", {"squash": True, "image_size": 96}),
        "lora": Variant("two-tower", lora=2, tuning={"learning_rate": 0.02}),
    }
    settings = {"scene_count": 40, "epochs": 1, "batch_size": 64}
    experiment = replace(TINY, variants=variants, reference="cached", settings=settings, seeds=1)
    found = run_experiment(experiment, tmp_path)
    named = found.conditions["other_features"]
    assert named.keys() == {"squashed"}
    assert named["squashed"]["image_encoder"][:2] == found.conditions["features"]["image_encoder"][:2]
    assert named["squashed"]["image_encoder"][2] != found.conditions["features"]["image_encoder"][2]
    figures = [run.figures for run in found.runs]
    assert figures[0] != figures[1] and figures[0] != figures[2]
    assert figures[0].keys() == figures[1].keys() == figures[2].keys()  # of changed captions too
    assert found.mean("lora", "training_time") > 2


def test_runs_of_earlier_code_are_kept_and_counted(copied, results, load, capsys):
    old = replace(results.runs[0], code="another")
    write_results(copied / "tiny.json", replace(results, runs=(old, *results.runs[1:])))
    assert run_experiment(TINY, copied, load=load).runs[0] == old
    assert "1 runs are of earlier code" in capsys.readouterr().out
    assert results.runs[0].code == code_digest()


def test_comments_and_docstrings_are_no_code(tmp_path):
    def statements(text: str) -> str:
        (tmp_path / "some.py").write_text(text)
        return experiments._statements(tmp_path / "some.py")

    plain = 'X = 1\ndef f(x):\n    "says"\n    return x'
    assert statements(plain) == statements('"What."\nX = 1  # one\ndef f(x):\n    return x')
    assert statements(plain) != statements(plain.replace("return x", "return -x"))
    assert statements(plain) != statements(plain.replace("X = 1", "X = 2"))


def by_sorting(scores: torch.Tensor, owner: torch.Tensor, k: int) -> tuple[float, float]:
    """R@k of both directions, by sorting scores that have no ties."""
    best_texts, best_images = scores.argsort(dim=1, descending=True)[:, :k], scores.argsort(dim=0, descending=True)[:k]
    there = (owner[best_texts] == torch.arange(len(scores))[:, None]).any(dim=1)
    return there.double().mean().item(), (best_images == owner).any(dim=0).double().mean().item()


def test_the_figures_are_those_of_the_training_that_they_name(results, load):
    settings = mmkit.profile("mini", **TINY.settings | {"fusion_dim": 8}, seed=1)
    dataset, encoders, store = load(replace(settings, fusion_dim=32, seed=0), False)
    rows = dataset.splits(settings.val_fraction, settings.test_fraction, settings.split_seed)
    split = {name: store.select(chosen) for name, chosen in rows.items()}
    fuser = mmkit.build_fuser("mlp", settings, *store.select().dims)
    mmkit.fit_profile(fuser, split["train"], split["val"], settings)
    found = next(run.figures for run in results.runs if (run.variant, run.seed) == ("narrow", 1))
    test, new = split["test"], split["new"]
    with torch.no_grad():
        scores = fuser.score(test.images(), test.captions())
        new_scores = fuser.score(new.images(), new.captions())
    recalls = [by_sorting(scores, test.owner, k) for k in (1, 5, 10)]
    assert [found[f"image_to_text.r{k}"] for k in (1, 5, 10)] == pytest.approx([recall[0] for recall in recalls])
    assert [found[f"text_to_image.r{k}"] for k in (1, 5, 10)] == pytest.approx([recall[1] for recall in recalls])
    assert found["rsum"] == pytest.approx(100 * np.sum(recalls))
    expected = by_sorting(new_scores, new.owner, 1)
    assert (found["new.image_to_text.r1"], found["new.text_to_image.r1"]) == pytest.approx(expected)
    first = slice(0, 5 * len(new.image_rows))  # as many known ones, with five captions each
    expected = by_sorting(scores[: len(new.image_rows), first], test.owner[first], 1)
    assert (found["known.image_to_text.r1"], found["known.text_to_image.r1"]) == pytest.approx(expected)
    for kind in ("random", "hard"):
        logits, labels = mmkit.matching_logits(fuser, split["val"], kind)
        cuts = torch.cat([logits - 1e-4, logits + 1e-4])
        best = max(((logits > cut) == labels).double().mean().item() for cut in cuts)
        threshold = mmkit.best_threshold(logits, labels)
        assert ((logits > threshold) == labels).double().mean().item() == pytest.approx(best)
        logits, labels = mmkit.matching_logits(fuser, test, kind)
        assert found[f"accuracy.{kind}"] == ((logits > threshold) == labels).double().mean().item()
    changed = mmkit.diagnostic_pairs(dataset, test, encoders)
    report = mmkit.diagnostic_report(fuser, test, changed)
    assert {fact: found[f"diagnostic.{fact}"] for fact in report} == {f: row.accuracy for f, row in report.items()}
    assert found.keys() <= FIGURES.keys()


# --- photos --------------------------------------------------------------------------------------


def strings(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.items() for part in item for text in strings(part)]
    if isinstance(value, list):
        return [text for part in value for text in strings(part)]
    return [value] if isinstance(value, str) else []


def tells_where(path: Path) -> list[str]:
    """Strings of a JSON file that look like a path, a picture or this machine."""
    own = (platform.node() or "?", str(Path.home()), ".jpg", "/", "\\")
    return [text for text in strings(json.loads(path.read_text("utf-8"))) if any(part in text for part in own)]


def test_an_experiment_on_photos_tells_no_path_and_tests_on_as_many_as_it_says(
    scenes_folder, load, tmp_path, monkeypatch
):
    monkeypatch.setenv("MMKIT_COCO_ROOT", str(scenes_folder))
    on_photos = replace(TINY, data="photos", settings=SMALL, unseen=20)
    found = run_experiment(on_photos, tmp_path, seeds=1, load=load)
    assert found.conditions["data"]["kind"] == "folder"
    sizes = {name: part["images"] for name, part in found.conditions["splits"]["sizes"].items()}
    assert (sizes["test"], sizes["val"]) == (20, 4)  # a tenth of the other 40, of which none is a new combination
    assert not tells_where(tmp_path / "tiny.json")
    (tmp_path / "told.json").write_text(json.dumps({"a": [str(scenes_folder)], "000000000001.jpg": 1}))
    assert len(tells_where(tmp_path / "told.json")) == 2
    with pytest.raises(MmkitError, match=r"leave none|tests on 70"):
        run_experiment(replace(on_photos, unseen=70), tmp_path, load=load)


def test_without_photos_their_experiments_are_skipped(tmp_path, capsys):
    assert main(["results", "--only", "fusers-photos", "unseen-1000", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said] == ["fusers-photos", "unseen-1000"]
    assert all("MMKIT_COCO_ROOT" in line for line in said) and not list(tmp_path.iterdir())
    assert main(["results", "--only", "nothing"]) == 2
    assert "Valid names: fusers-scenes" in capsys.readouterr().err


# --- definitions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=lambda experiment: experiment.name)
def test_every_variant_can_be_built_and_every_column_shown(experiment):
    assert {*experiment.columns, experiment.compared} <= FIGURES.keys() and experiment.reference in experiment.variants
    for variant in experiment.variants.values():
        settings = mmkit.profile(_PROFILES[experiment.data], **experiment.settings, **variant.settings, hidden_dim=32)
        fuser = build_fuser(variant.fuser, replace(settings, fusion_dim=32), 24, 16, **variant.arguments)
        assert type(fuser) is FUSERS[variant.fuser]
        assert variant.arguments.items() <= fuser._hub_mixin_config.items()
        if variant.corrected:
            HubnessCorrected(fuser, variant.corrected)


def test_a_fuser_with_arguments_starts_from_the_same_weights():
    settings = mmkit.profile("mini", fusion_dim=16, seed=3)
    default, named = (build_fuser("mlp", settings, 24, 16, **more) for more in ({}, {"paths": "both"}))
    torch.testing.assert_close(default.state_dict(), named.state_dict(), rtol=0, atol=0)
    assert default._hub_mixin_config == named._hub_mixin_config


# --- reading -------------------------------------------------------------------------------------


def made(values: dict[str, list[float]], figure: str = "rsum") -> Results:
    runs = [
        Run(name, seed, "code", 2.0 + seed if name == "b" else 1.0, {figure: value})
        for name, row in values.items()
        for seed, value in enumerate(row)
    ]
    return Results("made", "Why?", "a", (figure,), figure, "make it", {}, {name: {} for name in values}, tuple(runs))


def test_means_deviations_and_paired_differences_are_those_of_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(500, 5, 5).tolist(), rng.normal(504, 5, 5).tolist()
    results = made({"a": a, "b": b})
    assert results.values("b", "rsum") == tuple(b) and results.mean("b", "rsum") == pytest.approx(np.mean(b))
    assert results.spread("b", "rsum").deviation == pytest.approx(stats.tstd(b))
    found, expected = results.difference("b", "a", "rsum"), stats.ttest_rel(b, a).confidence_interval(0.95)
    assert found.interval == pytest.approx((expected.low, expected.high))
    assert (found.mean, found.seeds) == (pytest.approx(np.mean(b) - np.mean(a)), 5)
    assert results.values("b", "training_time") == (2.0, 3.0, 4.0, 5.0, 6.0)
    uneven = made({"a": a[:3], "b": b})
    assert uneven.difference("b", "a", "rsum").interval == pytest.approx(
        stats.ttest_rel(b[:3], a[:3]).confidence_interval(0.95)
    )


@pytest.mark.parametrize(
    ("apart", "verdict"),
    [
        ([3, 4, 5], "higher, beyond the interval"),
        ([-3, -4, -5], "lower, beyond the interval"),
        ([-3, 4, 5], "not beyond the interval"),
        ([0, 0, 0], "not beyond the interval"),
    ],
)
def test_the_verdict_says_whether_zero_is_in_the_interval(apart, verdict):
    assert made({"a": [500, 510, 520], "b": np.add([500, 510, 520], apart).tolist()}).difference(
        "b", "a", "rsum"
    ).verdict == verdict  # fmt: skip


def test_tables_show_percent_and_whole_rsums():
    results = made({"a": [0.5, 0.52], "long": [0.9123]}, "accuracy.hard")
    assert results.table() == "       accuracy, hard, %\na             51.0 ± 1.4\nlong                91.2"
    assert results.table(["training_time"], ["long"]) == "       training time, ratio\nlong                    1.0"
    rsums = made({"a": [500.4, 501.4, 502.6], "b": [490.1, 492.4, 493.1], "c": []})
    rsums = replace(
        rsums,
        conditions={
            "data": {"kind": "scenes", "images": 1650},
            "splits": {"sizes": {"train": {"images": 1050}, "test": {"images": 300}}},
            "features": {"image_encoder": ["lite"], "text_encoder": ["lm"]},
            "machine": "CPU",
        },
    )
    # differences −10.3, −9.0, −9.5: mean −9.6, deviation 0.656, t(0.975, 2) = 4.303, so ± 1.63
    assert rsums.markdown().splitlines() == [
        "**made.** Why?",
        "",
        "|  | rsum | rsum against a, 95 % interval |",
        "| --- | ---: | --- |",
        "| a | 501 ± 1 | – |",
        "| b | 492 ± 2 | −10 (−11 to −8): lower, beyond the interval |",
        "| c | – | – |",
        "",
        "0–3 seeds; 1,650 drawn scenes (train 1,050, test 300); lite and lm, frozen; negatives 1:1; CPU.",
    ]


def test_what_is_not_there_is_named():
    results = made({"a": [1.0, 2.0], "b": [3.0]})
    for wrong, message in (
        (lambda: results.values("c", "rsum"), "no variant 'c'. Valid names: a, b"),
        (lambda: results.mean("a", "sum"), "no figure 'sum'. Valid names: rsum, training_time"),
        (lambda: results.table(["sum"]), "No figure sum"),
        (lambda: results.difference("a", "b", "rsum"), "needs two. Remedy: make it --seeds 5"),
        (lambda: made({"a": []}).values("a", "rsum"), "no runs of 'a' with 'rsum' yet. Remedy: make it"),
    ):
        with pytest.raises(MmkitError) as error:
            wrong()
        assert message in str(error.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"rsum":', '"sum of":').replace('"seed": 0', '"seed": "zero"'),
        lambda text: text.replace('"variant": "narrow"', '"variant": "thin"'),
        lambda text: text.replace('"reference": "wide"', '"reference": "tall"'),
        lambda text: text.replace('"runs"', '"walks"').replace('"variants"', '"kinds"'),
        lambda text: "",
    ],
)
def test_a_damaged_file_is_named_and_left_alone(damage, copied, load):
    path = copied / "tiny.json"
    path.write_text(damaged := damage(path.read_text("utf-8")), "utf-8")
    for read in (lambda: read_results(path), lambda: run_experiment(TINY, copied, load=load)):
        with pytest.raises(MmkitError, match=r"tiny\.json holds no results .*Remedy: "):
            read()
    assert path.read_text("utf-8") == damaged


def test_results_are_found_from_the_top_from_a_notebook_and_from_anywhere(folder, results, tmp_path, monkeypatch):
    (tmp_path / FOLDER).mkdir(parents=True)
    (tmp_path / FOLDER / "tiny.json").write_bytes((folder / "tiny.json").read_bytes())
    for place in (tmp_path, tmp_path / "notebooks"):
        monkeypatch.chdir(place)
        assert load_results("tiny") == results
    monkeypatch.chdir("/")
    with pytest.raises(MissingFile, match=r"no results 'tiny' in notebooks.*Remedy: make results"):
        load_results("tiny")
    for path in COMMITTED:
        assert load_results(path.stem) == read_results(path)


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path):
    write_whole(tmp_path / "file", "earlier")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "file", "later \ud800")
    assert (tmp_path / "file").read_text() == "earlier"


def test_a_folder_that_cannot_be_written_is_named(results, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MmkitError, match=r"cannot be written .*Remedy: "):
        write_results(tmp_path / "file" / "tiny.json", results)


# --- README and the committed files --------------------------------------------------------------


def test_readme_says_what_the_committed_files_say():
    assert with_section(README, results_section(TOP / FOLDER, list(EXPERIMENTS))) == README


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_files_are_whole_of_today_and_tell_no_path(path):
    found, experiment = read_results(path), EXPERIMENTS[path.stem]
    assert not tells_where(path)
    assert {n: Variant(**v) for n, v in found.variants.items()} == {
        n: Variant(**json.loads(json.dumps(asdict(v)))) for n, v in experiment.variants.items()
    }
    assert {*pairs(found)} >= {*experiment.runs()}
    for key in ("name", "question", "reference", "columns", "compared"):
        assert getattr(found, key) == getattr(experiment, key)


def test_the_tables_of_a_checkout_are_rewritten_and_nothing_else(folder, results, tmp_path, monkeypatch, capsys):
    text = "before\n<!-- results: written by make results -->\nold\n<!-- end of results -->\nafter\n"
    out = tmp_path / FOLDER
    out.mkdir(parents=True)
    write_results(out / "unseen-1000.json", replace(results, name="unseen-1000"))
    (tmp_path / "README.md").write_text(text)
    run_experiments(out, ["unseen-1000"])  # skipped, since there are no photos
    table = replace(results, name="unseen-1000").markdown()
    assert (tmp_path / "README.md").read_text() == text.replace("old", f"\n{table}\n")
    with pytest.raises(MmkitError, match="no place for results"):
        with_section("no markers", table)
    capsys.readouterr()
    (tmp_path / "README.md").unlink()
    for place in (out, tmp_path / "notebooks" / "other", Path("/")):  # no README, or none of theirs
        run_experiments(place, ["unseen-1000"])
    assert "tables written" not in capsys.readouterr().out


def test_an_experiment_that_cannot_be_run_keeps_no_other_from_it(tmp_path, monkeypatch):
    taken = []

    def take(experiment, *_):
        taken.append(experiment.name)
        if experiment.name in ("graph", "paths"):
            raise MmkitError("no luck")
        if experiment.name == "counts":
            raise MmkitError("no number")

    monkeypatch.setattr(experiments, "run_experiment", take)
    with pytest.raises(MmkitError, match=r"^not finished: counts\. no number\nnot finished: graph, paths\. no luck$"):
        run_experiments(tmp_path)
    assert taken == list(EXPERIMENTS)
