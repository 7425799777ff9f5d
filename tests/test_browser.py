import base64
import io
import json
import re
import sys
from dataclasses import replace

import nbformat
import numpy as np
import pytest
from PIL import Image

from mmkit import browse
from mmkit.browser import _LIVE, _widget, matching_images
from mmkit.course import execute
from mmkit.galleries import pictures_figure
from mmkit.plots import show


@pytest.fixture
def shown(monkeypatch):
    """What the cell displays: a list of (data by media type, metadata)."""
    seen = []
    monkeypatch.setattr("mmkit.plots.display", lambda data, metadata=None, raw=False: seen.append((data, metadata)))
    return seen


def parts(widget):
    (words, found), place, (picture, text) = (getattr(child, "children", child) for child in widget.children)
    return words, found, place, picture, text


def test_the_cell_shows_the_widget_and_a_figure_for_pages_that_cannot_run_it(dataset, shown):
    browse(dataset)
    ((data, metadata),) = shown
    assert _LIVE in data and data["image/png"]
    assert dataset.captions_of(3)[0] in metadata["image/png"]["alt"]


def test_without_ipywidgets_the_figure_stands_alone(dataset, shown, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    browse(dataset)
    assert all(_LIVE not in data for data, _ in shown) and shown[0][0]["image/png"]


def test_a_dataset_of_one_picture_can_be_browsed(dataset, shown):
    browse(dataset.select([5]))
    assert len(shown) == 1


def test_the_slider_turns_the_page(dataset):
    _, _, place, picture, text = parts(_widget(dataset))
    before = picture.value
    assert place.max == 59 and dataset.captions_of(0)[1] in text.value
    place.value = 7
    assert dataset.captions_of(7)[4] in text.value and picture.value != before and picture.value[:4] == b"\x89PNG"


def test_a_search_keeps_the_pictures_with_all_words(dataset):
    words, found, place, _, text = parts(_widget(dataset))
    place.value = 30
    words.value = "on SNOW two"
    hits = [
        i
        for i in range(60)
        if any(set(re.findall(r"\w+", t.lower())) >= {"on", "snow", "two"} for t in dataset.captions_of(i))
    ]
    assert matching_images(dataset, "on SNOW two") == hits and hits
    assert found.value == f"{len(hits)} pictures" and place.value == 0 and place.max == len(hits) - 1
    assert dataset.captions_of(hits[0])[0] in text.value


def test_a_search_for_nothing_that_is_there_keeps_the_page(dataset):
    words, found, place, _, text = parts(_widget(dataset))
    before = text.value
    words.value = "xylophone"
    assert "no caption" in found.value and text.value == before and place.max == 59
    words.value = ""
    assert found.value == "60 pictures"


def test_words_are_whole_and_no_patterns(dataset):
    assert matching_images(dataset, "o") == [] and matching_images(dataset, ".*") == []


def test_captions_are_shown_as_text(dataset):
    strange = replace(dataset.select([0]), captions=("<b onclick=x>1 & 2</b>",) * 5, scenes=())
    *_, text = parts(_widget(strange))
    assert "&lt;b onclick=x&gt;1 &amp; 2" in text.value and "Facts" not in text.value


def test_a_saved_notebook_keeps_the_figure_and_drops_the_widget(tmp_path, scenes_folder):
    cell = f"import mmkit\nmmkit.browse(mmkit.load_captions({str(scenes_folder)!r}))"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)]), tmp_path / "a.ipynb")
    execute(tmp_path / "a.ipynb", tmp_path / "b.ipynb")
    saved = json.loads((tmp_path / "b.ipynb").read_text())
    (output,) = saved["cells"][0]["outputs"]
    assert set(output["data"]) == {"image/png", "text/plain"} and "widgets" not in saved["metadata"]


def test_a_figure_keeps_its_rare_colours_in_a_third_of_the_bytes(dataset, shown):
    pictures = [dataset.image(index) for index in range(8)]
    for offset, colour in enumerate([(150, 90, 200), (10, 200, 180), (250, 20, 120)]):
        pictures[offset].paste(colour, (40, 40, 46, 46))
    fig = pictures_figure(pictures, ["scene"] * 8)
    whole = io.BytesIO()
    fig.savefig(whole, format="png", dpi=100, facecolor="white")
    show(fig, "Eight scenes with a small square each.")
    small = base64.b64decode(shown[0][0]["image/png"])
    found, exact = (np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), int) for png in (small, whole.getvalue()))
    assert len(small) < len(whole.getvalue()) / 3
    assert np.abs(found - exact).max() < 48
