"""What every committed notebook has to keep, beside running: nbval compares nothing in cells that never ran."""

import json
import re
import runpy
from pathlib import Path

import nbformat
import pytest
from PIL import Image

import mmkit
from mmkit import MmkitError

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
execute = runpy.run_path(str(FOLDER / "run.py"))["execute"]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    nb = nbformat.read(request.param, as_version=4)
    nbformat.validate(nb)
    return nb


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code(notebook) for output in cell.outputs]


def prose(notebook):
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def test_the_course_has_its_six_notebooks():
    first = ["01_preprocessing", "02_feature_extraction", "03_mlp_fuser", "04_gnn_fuser"]
    assert [path.stem for path in NOTEBOOKS] == [*first, "05_coco_training", "06_what_helps"]


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
    text = json.dumps(
        [o.get("text") or {k: v for k, v in o.data.items() if k != "image/png"} for o in outputs(notebook)]
    )
    assert not re.search(r"/(home|root|tmp|work|Users|usr|opt)/|site-packages| at 0x[0-9a-f]+|it/s\]", text)


def test_every_figure_has_alternative_text(notebook):
    figures = [o for o in outputs(notebook) if "image/png" in o.get("data", {})]
    assert figures
    assert all(len(o.metadata["image/png"]["alt"]) > 30 for o in figures)


def test_has_the_shape_of_a_lesson(notebook):
    assert notebook.cells[0].source.startswith("# ")
    headings = re.findall(r"^## (.+)$", prose(notebook), re.MULTILINE)
    assert {"Exercises", "Summary", "References"} <= set(headings)
    assert all(part in prose(notebook) for part in ("**You will learn**", "**Needs**", "**Try it**"))
    assert sum("solution" in cell.metadata.get("tags", []) for cell in code(notebook)) >= 1
    assert "Key figure: " in "".join(o.get("text", "") for o in outputs(notebook))


def test_code_cells_stay_small(notebook):
    lengths = [len(cell.source.splitlines()) for cell in code(notebook)]
    assert max(lengths) <= 20
    assert sum(lengths) / len(lengths) <= 10


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
    assert sentence in prose(nbformat.read(path, as_version=4))


def test_notebook_3_quotes_what_each_part_brings():
    quoted("03", "falls by 4.3 points; without the product it falls by 3.3, and rsum by 24.")
    paths, losses = mmkit.load_results("paths"), mmkit.load_results("losses")
    hard = {name: 100 * paths.mean(name, "accuracy.hard") for name in paths.variants}
    assert round(hard["both"] - hard["product only"], 1) == 4.3
    assert round(hard["both"] - hard["concatenation only"], 1) == 3.3
    assert round(paths.difference("both", "concatenation only", "rsum").mean) == 24
    quoted(
        "03", "The contrastive loss alone ranks best; the matching loss beside it brings one point on hard negatives"
    )
    assert max(losses.variants, key=lambda name: losses.mean(name, "rsum")) == "contrastive only"
    assert round(100 * losses.difference("both", "contrastive only", "accuracy.hard").mean) == 1
    quoted("03", "after six on all of them, over five seeds, it is still below them")
    scenes = mmkit.load_results("fusers-scenes")
    pooled = min(scenes.mean(name, "text_to_image.r1") for name in ("mlp", "gated", "two-tower", "cca"))
    assert scenes.mean("cross-attention", "text_to_image.r1") < pooled


def test_notebook_4_quotes_what_the_graph_costs_on_photos():
    quoted("04", "On photos the MLP had lost half; and there four layers in place of one lose as much again")
    photos = mmkit.load_results("suggestions-photos")
    whole = photos.difference("mlp", "gnn", "rsum").mean
    assert photos.difference("gnn, no MLP", "gnn", "rsum").mean / whole == pytest.approx(0.5, abs=0.05)
    assert photos.difference("gnn", "gnn, 4 layers", "rsum").mean / whole == pytest.approx(1, abs=0.05)


def test_notebook_4_quotes_what_false_captions_cost_cross_attention():
    quoted("04", "the false captions cost it recall instead (without them it has 90 %")
    scenes, bound = mmkit.load_results("fusers-scenes"), mmkit.load_results("binding")
    assert round(100 * scenes.mean("cross-attention", "text_to_image.r1")) == 90
    assert bound.mean("cross-attention", "text_to_image.r1") < 0.8
    assert bound.difference("cross-attention", "mlp", "diagnostic.roles").interval.low < 0
    assert bound.variants["cross-attention"]["settings"] == bound.variants["region-word"]["settings"]  # as many epochs


def test_notebook_5_quotes_who_is_behind_on_photos_and_the_accuracies():
    quoted("05", "are 22 to 34 points behind the MLP, the latter two kinds at 1.7 to 3.2 times its training time")
    photos, scenes = mmkit.load_results("fusers-photos"), mmkit.load_results("fusers-scenes")
    apart = {name: photos.difference(name, "mlp", "rsum") for name in mmkit.FUSERS if name != "mlp"}
    near = {name for name, row in apart.items() if row.interval.high > 0}
    assert near == {"gated", "two-tower"}
    behind = [round(-row.mean) for name, row in apart.items() if name not in near]
    assert (min(behind), max(behind)) == (22, 34)
    dear = [round(photos.mean(name, "training_time"), 1) for name in apart if name not in {*near, "cca"}]
    assert (min(dear), max(dear)) == (1.7, 3.2)
    quoted("05", "99 % on the scenes, 93 % on 2,233 photos of COCO. On *hard* ones the same head has 87 and 58 %.")
    figures = [data.mean("mlp", f"accuracy.{kind}") for kind in ("random", "hard") for data in (scenes, photos)]
    assert [round(100 * figure) for figure in figures] == [99, 93, 87, 58]


def test_notebook_6_quotes_the_suggestions():
    scenes, photos = (mmkit.load_results(f"suggestions-{data}") for data in ("scenes", "photos"))
    quoted("06", "the rsum rises on both, by 13 points on the scenes and 17 on photos.")
    alone = [data.difference("gnn, no MLP", "gnn", "rsum") for data in (scenes, photos)]
    assert [round(row.mean) for row in alone] == [13, 17] and min(row.interval.low for row in alone) > 0
    quoted("06", "its 4 points of rsum on photos come without a rise of text→image R@1 or accuracy")
    attention = {
        figure: photos.difference("gnn, attention for cosine", "gnn", figure)
        for figure in ("rsum", "text_to_image.r1", "accuracy.random")
    }
    assert round(attention["rsum"].mean) == 4
    assert attention["text_to_image.r1"].mean < 0.002 and attention["accuracy.random"].mean < 0.002
    quoted("06", "More layers never gain; four lose 34 points of rsum on photos")
    deeper = [data.difference(f"gnn, {n} layers", "gnn", "rsum") for data in (scenes, photos) for n in (2, 4)]
    assert round(deeper[-1].mean) == -34 and all(row.mean < 0 for row in deeper)
    quoted("06", "on the 335 photos no gain of theirs is beyond the interval")
    larger = [
        photos.difference(name, "mlp", figure)
        for name in ("Lite1", "Lite2")
        for figure in ("rsum", "text_to_image.r1", "accuracy.random")
    ]
    assert all(row.interval.low < 0 for row in larger)
    quoted("06", "bring no recall, for up to nine times the training")
    every = mmkit.load_results("fusers-scenes")
    assert round(max(every.mean(name, "training_time") for name in ("gated", "cross-attention", "region-word"))) == 9


def test_notebook_6_quotes_the_unseen_photos():
    unseen, sharp = mmkit.load_results("unseen-700"), ", Lite2, whole, 320 pixels"
    quoted("06", "Lite2 alone brings 4 points of rsum, the whole picture at 224 pixels nothing")
    quoted(
        "06", "Both with 320 pixels bring 21, and the MLP fuser on them is 29 above where we began: 94.5 % accuracy."
    )
    quoted("06", "the MLP instead of the two towers brings 7 or 8")
    against = {name: unseen.difference(name, "two-tower", "rsum") for name in unseen.variants if name != "two-tower"}
    whole = against.pop("two-tower, whole picture")
    assert whole.mean < 0 < whole.interval.high
    assert round(against["two-tower, Lite2"].mean) == 4
    assert [round(against[f"{name}{sharp}"].mean) for name in ("two-tower", "mlp")] == [21, 29]
    assert round(100 * unseen.mean(f"mlp{sharp}", "accuracy.random"), 1) == 94.5
    heads = [against["mlp"], unseen.difference(f"mlp{sharp}", f"two-tower{sharp}", "rsum")]
    assert [round(row.mean) for row in heads] == [7, 8]


def test_the_table_of_the_readme_is_that_of_the_runs():
    readme = (FOLDER.parent / "README.md").read_text()
    scenes, photos = mmkit.load_results("fusers-scenes"), mmkit.load_results("fusers-photos")
    columns = [(photos, f"accuracy.{kind}", 100, 1) for kind in ("random", "hard")]
    columns += [(photos, "rsum", 1, 0), (photos, "training_time", 1, 1), (scenes, "rsum", 1, 0)]
    columns += [(scenes, "diagnostic.roles", 100, 0)]
    for name in mmkit.FUSERS:
        figures = [f"{scale * data.mean(name, figure):.{digits}f}" for data, figure, scale, digits in columns]
        assert f"\n| {name} | {' | '.join(figures)} |\n" in readme


def test_the_picture_of_the_house_is_of_today():
    house = runpy.run_path(str(FOLDER.parent / ".github" / "house.py"))
    with Image.open(FOLDER.parent / ".github" / "house.png") as picture:
        assert json.loads(picture.text["Description"]) == house["imports"]()
