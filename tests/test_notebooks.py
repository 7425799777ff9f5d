"""What every committed lesson has to keep, beside running: nbval compares nothing in cells that never ran."""

import ast
import base64
import json
import re
import runpy
import subprocess
import sys
import tomllib
from itertools import product
from pathlib import Path

import nbformat
import pytest
from PIL import Image

import mmkit
from mmkit import MmkitError
from mmkit.evaluation import NEGATIVES
from mmkit.support import ANSWERS

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NAMES = (
    "does_it_fit preprocessing feature_extraction mlp_fuser accuracy gnn_fuser leaks regions coco_training what_helps"
)
EXERCISES = tomllib.loads(ANSWERS.read_text())
execute = runpy.run_path(str(FOLDER / "run.py"))["execute"]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    nb = nbformat.read(request.param, as_version=4)
    nbformat.validate(nb)
    nb.number = request.param.stem[:2]
    return nb


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code(notebook) for output in cell.outputs]


def printed(cells):
    return "".join(output.get("text", "") for cell in cells for output in cell.outputs)


def prose(notebook):
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def pictures(notebook):
    every = [(kind, o) for o in outputs(notebook) for kind in o.get("data", {}) if kind.startswith("image/")]
    return [output.metadata[kind] for kind, output in every]


def test_the_course_has_its_lessons():
    assert [path.stem for path in NOTEBOOKS] == [f"{n:02}_{name}" for n, name in enumerate(NAMES.split())]


def test_was_executed_from_a_clean_kernel(notebook):
    counts = [cell.execution_count for cell in code(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def test_holds_no_error_and_nothing_from_standard_error(notebook):
    assert not [o for o in outputs(notebook) if o.output_type == "error" or o.get("name") == "stderr"]


def test_checked_cells_have_an_output_to_compare(notebook):
    checked = [cell for cell in code(notebook) if "NBVAL_CHECK_OUTPUT" in cell.source]
    assert all(cell.outputs for cell in checked)
    assert not [cell for cell in code(notebook) if "NBVAL_SKIP" in cell.source]


def test_outputs_hold_no_path_and_no_address_of_the_machine(notebook):
    shown = [o.get("text") or {k: v for k, v in o.data.items() if "image/" not in k} for o in outputs(notebook)]
    text = json.dumps(shown)
    assert not re.search(r"/(home|root|tmp|work|Users|usr|opt)/|site-packages| at 0x[0-9a-f]+|it/s\]", text)


def test_every_figure_has_alternative_text_and_is_sharp(notebook):
    assert pictures(notebook)
    assert all(len(one["alt"]) > 30 and one["width"] for one in pictures(notebook))


def test_has_the_shape_of_a_lesson(notebook):
    text = prose(notebook)
    assert notebook.cells[0].source.startswith(f"# {int(notebook.number)} · ")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert {"Exercises", "Three questions", "Summary", "References"} <= set(headings)
    assert all(part in text for part in ("**You will learn**", "**Needs**", "**Predict first**", "**Try it**"))
    assert "Key figure: " in printed(code(notebook))
    assert any("mmkit.diagram(" in cell.source for cell in code(notebook)), "a drawing before the class"


def test_a_lesson_is_short(notebook):
    assert len(notebook.cells) <= 45
    assert len(prose(notebook).split()) <= 1300
    lengths = [len(cell.source.splitlines()) for cell in code(notebook)]
    assert max(lengths) <= 30 and sum(lengths) / len(lengths) <= 10


def test_three_quarters_of_the_code_do_the_thing(notebook):
    told, lines = [], []
    for statement in (statement for cell in code(notebook) for statement in ast.parse(cell.source).body):
        lines.append(statement.end_lineno - statement.lineno + 1)
        call = getattr(statement, "value", None)
        name = ast.unparse(call.func) if isinstance(statement, ast.Expr) and isinstance(call, ast.Call) else ""
        told.append(bool(re.fullmatch(r"print|display|mmkit\.(plot_\w+|show\w*|diagram)", name)))
    assert sum(n for n, shows in zip(lines, told, strict=True) if shows) <= sum(lines) / 4


def test_results_are_as_expected(notebook):
    cells = [cell for cell in code(notebook) if "mmkit.expect(" in cell.source]
    lines = [line for line in printed(cells).splitlines() if line.startswith(("✓", "✗"))]
    assert lines and all(line.startswith("✓") for line in lines)


def test_a_result_outside_its_band_fails_as_a_test_wherever_it_is_told(tmp_path):
    (tmp_path / "conftest.py").write_bytes((FOLDER / "conftest.py").read_bytes())
    told = (f"import mmkit; mmkit.expect('R@1', {value}, 0.9, 1)" for value in (0.95, 0.5))
    small_notebook(tmp_path / "a.ipynb", *told)
    options = ["--nbval-lax", "--nbval-current-env", "-p", "no:cacheprovider", "-W", "ignore", tmp_path]
    done = subprocess.run([sys.executable, "-m", "pytest", *options], capture_output=True, text=True)
    assert done.returncode == 1 and "1 failed, 1 passed" in done.stdout, done.stdout
    assert "✗ R@1: expected 0.9 to 1, got 0.5. What did you change?" in done.stdout


def test_exercises_are_checked_and_their_solutions_right(notebook):
    named = {name for name in EXERCISES if re.fullmatch(rf"{notebook.number}\.\d", name)}
    assert len(named) >= 4
    asked = [cell for cell in code(notebook) if re.search(r"mmkit\.check\(.*\.\.\.\)", cell.source)]
    assert {f"{name}: no answer yet" for name in named} == set(printed(asked).splitlines())
    solutions = [cell for cell in code(notebook) if "solution" in cell.metadata.get("tags", [])]
    assert all("hide-cell" in cell.metadata.tags and cell.metadata.jupyter.source_hidden for cell in solutions)
    assert all("NBVAL_CHECK_OUTPUT" in cell.source for cell in solutions)
    assert {f"{name} ✓ right" for name in named} <= set(printed(solutions).splitlines())


def test_each_question_answers_every_choice(notebook):
    (questions,) = re.findall(r"^## Three questions\n(.+?)(?=^## |\Z)", prose(notebook), re.MULTILINE | re.DOTALL)
    choices = re.findall(r"<details><summary>\(([abc])\).+?</summary>\s*(.+?)</details>", questions, re.DOTALL)
    assert [letter for letter, _ in choices] == [*"abc"] * 3
    assert sum(answer.startswith("Right") for _, answer in choices) >= 3


def edits(notebook):
    return re.findall(r"^> - `([^`]+)` → `([^`]*)`", prose(notebook), re.MULTILINE)


def test_each_edit_of_a_try_it_box_has_its_place(notebook):
    assert len(edits(notebook)) >= 2
    assert prose(notebook).count("\n> - ") == len(edits(notebook)), "an edit that no test makes"
    every = "\n".join(cell.source for cell in code(notebook))
    assert {old: every.count(old) for old, _ in edits(notebook)} == {old: 1 for old, _ in edits(notebook)}


@pytest.mark.slow
def test_a_reader_who_makes_the_edits_of_a_try_it_box_reaches_the_end(notebook, tmp_path):
    for old, new in edits(notebook):
        for cell in code(notebook):
            cell.source = cell.source.replace(old, new)
    nbformat.write(notebook, tmp_path / "edited.ipynb")
    execute(tmp_path / "edited.ipynb", tmp_path / "out" / "edited.ipynb")


def test_links_between_notebooks_lead_somewhere(notebook):
    links = re.findall(r"\]\((\d\d_[^)#]+)", prose(notebook))
    assert all((FOLDER / link).is_file() for link in links)


def small_notebook(path, *cells):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    nbformat.write(nb, path)
    return path


def test_the_runner_gives_the_key_figure_and_leaves_no_widget(tmp_path):
    widget = "import ipywidgets; ipywidgets.IntSlider()"
    source = small_notebook(tmp_path / "a.ipynb", "x = 6 * 7", "print('Key figure: x is', x)", widget)
    assert execute(source, tmp_path / "out" / "a.ipynb") == "x is 42"
    executed = nbformat.read(tmp_path / "out" / "a.ipynb", 4)
    assert executed.cells[1].execution_count == 2 and "widget" not in json.dumps(executed.cells[2].outputs)
    assert "widgets" not in executed.metadata


@pytest.mark.slow
def test_a_cell_has_as_long_as_the_runner_is_told(tmp_path):
    source = small_notebook(tmp_path / "c.ipynb", "import time; time.sleep(4)")
    with pytest.raises(MmkitError, match=r"c\.ipynb stopped at its code cell 1: it took more than 1 s\n"):
        execute(source, tmp_path / "out" / "c.ipynb", timeout=1)
    execute(source, tmp_path / "out" / "c.ipynb", timeout=None)


def test_the_runner_names_the_cell_that_failed_and_keeps_what_ran(tmp_path):
    source = small_notebook(tmp_path / "b.ipynb", "print('before')", "raise ValueError('no luck')", "print('after')")
    with pytest.raises(MmkitError, match=r"b\.ipynb stopped at its code cell 2: ValueError: no luck"):
        execute(source, tmp_path / "out" / "b.ipynb")
    kept = nbformat.read(tmp_path / "out" / "b.ipynb", 4)
    assert "before" in kept.cells[0].outputs[0].text
    assert not kept.cells[2].outputs


# --- figures that are quoted from committed runs -------------------------------------------------


def quoted(number: str, sentence: str) -> None:
    (path,) = (path for path in NOTEBOOKS if path.stem.startswith(number))
    assert sentence in " ".join(prose(nbformat.read(path, as_version=4)).split())


def apart(name: str, variant: str, reference: str, figure: str = "rsum"):
    return mmkit.load_results(name).difference(variant, reference, figure)


def points(*difference: str) -> str:
    return f"{100 * abs(apart(*difference).mean):.1f}"


def with_interval(*difference: str, sign: int = 1) -> str:
    ends = sorted(sign * end for end in apart(*difference).interval)
    return f"{sign * apart(*difference).mean:.1f} ({ends[0]:.1f} to {ends[1]:.1f})"


def test_lesson_3_quotes_what_each_part_brings():
    r1, hard = "text_to_image.r1", "accuracy.hard"
    lost = [points("paths", "product only", "both", figure) for figure in (r1, hard)]
    quoted("03", f"Without the concatenation, R@1 loses {lost[0]} points and hard accuracy {lost[1]}.")
    lost = [points("paths", "concatenation only", "both", figure) for figure in (r1, hard)]
    quoted("03", f"Without the product they lose {lost[0]} and {lost[1]}:")
    alone = "losses", "contrastive only", "both"
    quoted("03", f"ranks at least as well, but its hard accuracy is {points(*alone, hard)} lower.")
    assert min(apart(*alone, figure).mean for figure in (r1, "image_to_text.r1", "rsum")) > 0 > apart(*alone, hard).mean
    quoted("03", f"The matching loss alone loses {points('losses', 'matching only', 'both', r1)} points of R@1.")


def test_lesson_4_quotes_photos_and_who_leads():
    random, hard = (100 * mmkit.load_results("fusers-photos").mean("mlp", f"accuracy.{kind}") for kind in NEGATIVES)
    quoted("04", f"on photos of COCO the MLP has {random:.1f} % (random) and {hard:.1f} % (hard;")
    quoted("04", "On hard negatives the MLP leads, in image→text R@1 the two-tower")
    assert max(apart("fusers-scenes", one, "mlp", "accuracy.hard").interval.high for one in ("two-tower", "cca")) < 0
    assert apart("fusers-scenes", "two-tower", "mlp", "image_to_text.r1").interval.low > 0


def test_lesson_5_quotes_what_the_parts_of_the_graph_earn():
    quoted("05", f"*No edges* costs {with_interval('graph', 'edges: none', 'gnn', sign=-1)}.")
    quoted("05", f"*Two layers* cost {with_interval('graph', '2 layers', 'gnn', sign=-1)};")
    mean, _, ends = with_interval("graph", "no MLP", "gnn").partition(" ")
    quoted("05", f"+{mean} without it {ends}.")
    quoted("05", f"gain {with_interval('graph', 'two-tower, csls', 'two-tower').replace(' (', ' rsum by CSLS (')}.")
    for name in ("4 layers", "0 layers", "heads: 1", "neighbours: 2", "neighbours: 20", "edges: attention"):
        low, high = apart("graph", name, "gnn").interval
        assert low < 0 < high, name
    quoted("05", "it ends below the MLP fuser, by little on scenes, by more on photos; in accuracy the two are equal")
    ordered = [apart(f"fusers-{data}", "gnn, as ordered", "mlp") for data in ("scenes", "photos")]
    assert ordered[1].mean < 4 * ordered[0].mean and max(one.interval.high for one in ordered) < 0
    for data in ("scenes", "photos"):
        low, high = apart(f"fusers-{data}", "gnn, as ordered", "mlp", "accuracy.random").interval
        assert low < 0 < high


def test_lesson_7_quotes_what_each_part_of_the_graph_in_a_pair_earns():
    quoted(
        "07", "Graph convolutions go without loss. Without places, or without neighbours, the roles fall almost to a"
    )
    bound, r1 = mmkit.load_results("binding"), "text_to_image.r1"
    roles = {name: bound.mean(name, "diagnostic.roles") for name in bound.variants}
    assert roles["no graph convolution"] > 0.99 and apart("binding", "no graph convolution", "region-word", r1).mean > 0
    assert max(roles["no positions"], roles["reach 0"], roles["cross-attention"]) < 0.6
    quoted("07", "Without false captions it still learns most relations, but roles only in part.")
    assert bound.mean("no false captions", "diagnostic.relation") > 0.9 > 0.8 > roles["no false captions"] > 0.7
    quoted("07", "On photos the fuser does not pay: far below the MLP, no better than a two-tower with the same short")
    assert apart("fusers-photos", "region-word", "mlp").interval.high < -10
    assert apart("fusers-photos", "region-word", "two-tower, as short and narrow as region-word").interval.low < 0


def test_lesson_8_quotes_accuracies_and_who_is_told_apart():
    both = [mmkit.load_results(f"fusers-{data}") for data in ("scenes", "photos")]
    easy, hard = ([f"{100 * data.mean('mlp', f'accuracy.{kind}'):.0f}" for data in both] for kind in NEGATIVES)
    quoted(
        "08",
        f"{easy[0]} % here, {easy[1]} % on 335 unseen photos. On hard ones the same head has {' and '.join(hard)} %",
    )
    quoted("08", "two-tower is above the MLP, the gate below, and CCA is not told apart. On these photos the gate and")
    quoted("08", "the two-tower are not told apart, and CCA is below. All three graphs of lesson 5 are below on both")
    graphs = {"gnn": -1, "hetero-gnn": -1, "gnn, as ordered": -1}
    sides = {"two-tower": 1, "gated": -1, "cca": 0} | graphs, {"gated": 0, "two-tower": 0, "cca": -1} | graphs
    for data, told in zip(both, sides, strict=True):
        for name, side in told.items():
            low, high = data.difference(name, "mlp", "rsum").interval
            assert side == (low > 0) - (high < 0), (data.name, name)
    told = [with_interval(data.name, "gnn, as ordered", "mlp", sign=-1) for data in both]
    quoted("08", f"the one as ordered by {told[0]} and {told[1]}.")


def test_lesson_9_quotes_the_suggestions_and_the_unseen_photos():
    gated, mlp = (mmkit.load_results("fusers-photos").values(name, "rsum") for name in ("gated", "mlp"))
    quoted("09", f"the gate wins by {(gated - mlp)[2]:.1f} points.")
    assert (gated > mlp).tolist() == [False, False, True, True, False]
    of = {"fusers": "gnn, as ordered", "suggestions": "gnn, attention for cosine"}
    means = [[mmkit.load_results(f"{file}-{data}").values(name, "rsum") for file, name in of.items()]
             for data in ("scenes", "photos")]  # fmt: skip
    costs = [f"{(without - changed).mean():.0f}" for without, changed in means]
    quoted("09", f"the MLP alone costs {' and '.join(costs)} points, cosine edges 5 at most.")
    short = apart("fusers-photos", "two-tower, as short and narrow as region-word", "mlp").mean
    quoted("09", f"two-tower fusers cut down likewise are {-short:.0f} points below the MLP.")
    names = [f"{name}, Lite2{more}" for name, more in product(("two-tower", "mlp"), ("", ", whole, 320 pixels"))]
    names = [*names[:2], names[3], "mlp", "two-tower, whole picture"]
    lite2, whole, best, head, crop = (apart("unseen-700", name, "two-tower") for name in names)
    quoted("09", f"brings {lite2.mean:.0f} points; the whole photo at 224 nothing. Lite2, whole, at 320 brings")
    quoted("09", f"{whole.mean:.0f}, with the MLP {best.mean:.0f}; the MLP alone {head.mean:.0f}.")
    assert crop.interval.high < 0.1


def test_the_table_of_the_readme_is_that_of_the_runs():
    readme = (FOLDER.parent / "README.md").read_text()
    scenes, photos = mmkit.load_results("fusers-scenes"), mmkit.load_results("fusers-photos")
    columns = [(photos, f"accuracy.{kind}", 100, 1) for kind in ("random", "hard")]
    columns += [(photos, "rsum", 1, 0), (photos, "training_time", 1, 1), (scenes, "rsum", 1, 0)]
    columns += [(scenes, "diagnostic.roles", 100, 0)]
    for name in ("gnn, as ordered" if name == "gnn" else name for name in mmkit.FUSERS):
        figures = [f"{scale * data.mean(name, figure):.{digits}f}" for data, figure, scale, digits in columns]
        assert f"\n| {name} | {' | '.join(figures)} |\n" in readme


def test_the_picture_of_the_house_is_of_today():
    house = runpy.run_path(str(FOLDER.parent / ".github" / "house.py"))
    with Image.open(FOLDER.parent / ".github" / "house.png") as picture:
        assert json.loads(picture.text["Description"]) == house["imports"]()


def test_the_first_picture_of_the_readme_is_that_of_lesson_0():
    (alt,) = (one["alt"] for one in pictures(nbformat.read(NOTEBOOKS[0], 4)) if "How often" in one["alt"])
    shown = (FOLDER.parent / "README.md").read_text().partition(".github/hook.png")[0]
    shares = re.findall(r"\S+ [\d.]+ %", alt)
    assert len(shares) == 5 and all(share in " ".join(shown.split()) for share in shares[:4])
    pngs = [o.data.get("image/png") for o in outputs(nbformat.read(NOTEBOOKS[0], 4)) if "data" in o]
    assert base64.b64encode((FOLDER.parent / ".github" / "hook.png").read_bytes()).decode() in pngs, "save it again"
