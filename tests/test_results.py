"""Tables of several seeds against scipy, and what a damaged or missing file says."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from scipy import stats

from mmkit import MissingFile, MmkitError, load_results
from mmkit.profiles import CHECKOUT
from mmkit.results import Results, Run, read_results


def made(by_variant: dict[str, list[float]], figure: str = "rsum") -> Results:
    """Results of made-up figures; the seconds of variant n are n + seed + 1."""
    runs = [
        Run(variant, seed, n + seed + 1.0, {figure: value})
        for n, (variant, values) in enumerate(by_variant.items())
        for seed, value in enumerate(values)
    ]
    return Results("made", next(iter(by_variant)), (figure,), {}, {name: {} for name in by_variant}, tuple(runs))


def test_means_and_paired_differences_are_those_of_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(500, 5, 5).tolist(), rng.normal(504, 5, 5).tolist()
    results = made({"a": a, "b": b})
    assert list(results.values("b", "rsum")) == b and results.mean("b", "rsum") == pytest.approx(np.mean(b))
    apart, expected = results.difference("b", "a", "rsum"), stats.ttest_rel(b, a).confidence_interval(0.95)
    assert apart.interval == pytest.approx(tuple(expected))
    assert (apart.mean, apart.seeds) == (pytest.approx(np.mean(b) - np.mean(a)), 5)
    assert list(results.values("b", "training_time")) == [2 / 1, 3 / 2, 4 / 3, 5 / 4, 6 / 5]
    expected = stats.ttest_rel(b[:3], a[:3]).confidence_interval(0.95)
    assert made({"a": a[:3], "b": b}).difference("b", "a", "rsum").interval == pytest.approx(tuple(expected))
    sides = ([3, 4, 5], "higher, b"), ([-3, -4, -5], "lower, b"), ([-3, 4, 5], "not b"), ([0] * 3, "not b")
    for changes, verdict in sides:
        results = made({"a": [500, 510, 520], "b": np.add([500, 510, 520], changes).tolist()})
        assert results.difference("b", "a", "rsum").verdict == f"{verdict}eyond the interval"


def test_tables_show_percent_and_whole_rsums():
    results = made({"a": [0.5, 0.52], "long": [0.9123]}, "accuracy.hard")
    assert results.table().to_dict("list") == {"accuracy, hard, %": ["51.0 ± 1.4", "91.2"]}
    assert list(results.table().index) == ["a", "long"]
    assert results.table(["training_time"], ["long"]).to_dict() == {"training time, ratio": {"long": "2.0"}}
    results = made({"a": [500.4, 501.4, 502.6], "b": []})
    assert results.table().to_dict() == {"rsum": {"a": "501 ± 1", "b": "–"}}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda made: made.values("c", "rsum"), "made.json has no 'rsum' of 'c'. Variants: a, b, none; fig"),
        (lambda made: made.table((), ["c"]), "of 'c'"),
        (lambda made: made.mean("a", "sum"), "has no 'sum' of 'a'."),
        (lambda made: made.values("none", "rsum"), "of 'none'. Variants: a, b, none; figures: accuracy.random, "),
        (lambda made: made.table(["sum"]), "rsum, training_time. Remedy: make results"),
        (lambda made: made.difference("a", "b", "rsum"), "made: 'a' and 'b' share no two seeds. Remedy: "),
    ],
)
def test_what_is_not_there_is_named(wrong, message):
    with pytest.raises(MmkitError) as error:
        wrong(made({"a": [1.0, 2.0], "b": [3.0], "none": []}))
    assert message in str(error.value)


@pytest.fixture
def folder(tmp_path):
    """A checkout's top with results of made-up figures."""
    path = tmp_path / "notebooks" / "results" / "made.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(asdict(made({"a": [1.0, 2.0], "b": [3.0]}))), "utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("right", "wrong"), [('"seed": 0', '"seed": "zero"'), ('"runs"', '"walks'), ('"variants"', '"kinds"')]
)
def test_a_damaged_file_is_named(right, wrong, folder):
    path = folder / "notebooks" / "results" / "made.json"
    path.write_text(path.read_text("utf-8").replace(right, wrong), "utf-8")
    with pytest.raises(MmkitError, match=r"made\.json holds no results .*Remedy: "):
        read_results(path)


def test_results_are_found_from_the_top_from_a_notebook_and_from_anywhere(folder, monkeypatch):
    for place in (folder, folder / "notebooks"):
        monkeypatch.chdir(place)
        assert load_results("made") == made({"a": [1.0, 2.0], "b": [3.0]})
    monkeypatch.chdir("/")
    assert load_results("graph") == read_results(CHECKOUT / "notebooks" / "results" / "graph.json")
    with pytest.raises(MissingFile, match=r"No results 'made' in notebooks/results, but binding, .*Remedy"):
        load_results("made")
