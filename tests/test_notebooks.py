"""What every committed notebook has to keep, beside running: nbval compares nothing in cells that never ran."""

import json
import re
from pathlib import Path

import nbformat
import pytest

from mmkit import MmkitError
from mmkit.course import execute

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


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
    assert sum(lengths) / len(lengths) <= 9


def test_links_between_notebooks_lead_somewhere(notebook):
    links = re.findall(r"\]\((\d\d_[^)#]+)", prose(notebook))
    assert all((FOLDER / link).is_file() for link in links)


def small_notebook(path, *cells):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    nbformat.write(nb, path)
    return path


def test_the_runner_reports_memory_and_the_key_figure(tmp_path):
    source = small_notebook(tmp_path / "a.ipynb", "x = 6 * 7", "print('Key figure: x is', x)")
    done = execute(source, tmp_path / "out" / "a.ipynb")
    assert done.key_figure == "x is 42"
    assert 2**24 < done.peak_memory < 2**31
    assert nbformat.read(tmp_path / "out" / "a.ipynb", 4).cells[1].execution_count == 2


def test_the_runner_names_the_cell_that_failed_and_keeps_what_ran(tmp_path):
    source = small_notebook(tmp_path / "b.ipynb", "print('before')", "raise ValueError('no luck')", "print('after')")
    with pytest.raises(MmkitError, match=r"b\.ipynb stopped at its code cell 2: ValueError: no luck"):
        execute(source, tmp_path / "out" / "b.ipynb")
    kept = nbformat.read(tmp_path / "out" / "b.ipynb", 4)
    assert "before" in kept.cells[0].outputs[0].text
    assert not kept.cells[2].outputs
