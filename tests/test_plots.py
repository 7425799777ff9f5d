"""Figures say in words what they show, show it where it is, and draw captions as they are written."""

import base64
import html
import io
import re
from dataclasses import replace

import ipywidgets
import numpy as np
import pytest
import torch
from matplotlib.mathtext import MathTextParser
from PIL import Image

import mmkit
from mmkit import plots
from mmkit.evaluation import Interval, Recall, Retrieval
from mmkit.results import Difference

LIVE = "application/vnd.jupyter.widget-view+json"
PRICE = r"<b>$5$</b> & $\nothing$"  # no TeX, no HTML
CORNERS = torch.full((2, 9), 0.01)  # weights of two words on nine cells: top right, and bottom left
CORNERS[0, 2] = CORNERS[1, 6] = 1
RECALL = Retrieval(Recall(0.4, 0.7, 0.8, 2), Recall(0.3, 0.6, 0.7, 3), (300, 1500))
ROW = dict.fromkeys(("contrastive", "matching", "validation_contrastive", "validation_matching"), 0.5)
WHITE = Image.new("RGB", (90, 90), "white")


@pytest.fixture
def shown(monkeypatch):
    """What a cell displays: a list of (data by media type, metadata)."""
    seen = []
    monkeypatch.setattr(plots, "display", lambda data, metadata=None, raw=False: seen.append((data, metadata)))
    return seen


@pytest.fixture
def drawn(monkeypatch, shown):
    """The arguments of `show_images`."""
    calls, show_images = [], plots.show_images
    monkeypatch.setattr(plots, "show_images", lambda *args, **more: (calls.append(args), show_images(*args, **more)))
    return calls


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda: mmkit.plot_history(mmkit.History([ROW, ROW], 1)), "over 2 epochs.*from 0.5 to 0.5.*Epoch 2 was kept"),
        (lambda: mmkit.plot_histogram({"a": [1, 2]}, "T", "x", line=(1.5, "cut")), "a: mean 1.50.*; cut at 1.50."),
        (lambda: mmkit.plot_matrix(torch.eye(2), "T", "x", "y", ticks=["a", "b"]), "T. 2 by 2 values from 0.00 to 1"),
        (lambda: mmkit.plot_bars({"a": {"x": 0.5}}, "T", "y", {"x": 0.1}), "T. a: x 0.5."),
        (lambda: mmkit.plot_bars({f"{n}": {"x": n} for n in range(9)}, "T", "y"), "0: x 0;.*; 8: x 8."),
        (lambda: mmkit.plot_recalls({"mlp": RECALL}), r"300 images, 1,500 captions.*image→text\nR@5 70"),
        (
            lambda: mmkit.plot_differences({"g": {"a": Difference(0.01, Interval(-0.02, 0.04), 3)}}, "T", "x"),
            r"a, g: \+1.0 \(-2.0 to \+4.0\)",
        ),
        (lambda: mmkit.plot_lines({"a": ([1, 10], [3, 4], [1, 1])}, "T", "x", "y"), "a goes from 3 to 4"),
        (lambda: mmkit.plot_map({"a": torch.eye(2)}, "T", "x", "y"), "2 points of a"),
        (lambda: mmkit.plot_tokens([["[CLS]", "a"]], torch.tensor([[1, 0]])), "1 hold word pieces, 1 padding"),
        (lambda: mmkit.show_images([WHITE] * 5, [PRICE] * 5, PRICE), re.escape(PRICE)),
        (lambda: mmkit.show_graph([WHITE] * 2, [PRICE] * 2, [(0, 0, 0.5), (1, 0, -1)], PRICE), "by 2 edges, 1 of them"),
        (lambda: mmkit.show_attention(WHITE, ["dog", "$cat$"], CORNERS, PRICE), "dog: row 1, column 3; .*: row 3, col"),
        (lambda: mmkit.show_attention(WHITE, ["the"], torch.ones(1, 4) / 4), "2 by 2"),
        (lambda: mmkit.show_region_words(WHITE, ["dog", "$cat$"], CORNERS, torch.eye(2), PRICE), "dog: .1.00 to the"),
    ],
)  # fmt: skip
def test_a_figure_is_a_png_that_says_what_it_shows_without_tex(draw, words, shown, monkeypatch):
    monkeypatch.setattr("matplotlib.mathtext.MathTextParser.parse", None)
    draw()
    (picture, metadata), (folded, _) = shown
    alt = metadata["image/png"]["alt"]
    assert re.search(words, alt, re.DOTALL)
    assert folded["text/html"] == f"<details><summary>Figure in words</summary>{html.escape(alt)}</details>"
    assert Image.open(io.BytesIO(base64.b64decode(picture["image/png"]))).format == "PNG"


def test_a_figure_keeps_its_rare_colours_in_a_third_of_the_bytes(dataset, shown):
    fig, axes = plots.figure(9, 4.5, 2, 4, xticks=[], yticks=[])
    for axis, index, colour in zip(axes, range(8), [(150, 90, 200), (10, 200, 180)] * 4, strict=True):
        picture = dataset.image(index)
        picture.paste(colour, (40, 40, 46, 46))
        axis.imshow(picture)
    plots.show(fig, "Eight scenes with a small square each.")
    whole, small = io.BytesIO(), base64.b64decode(shown[0][0]["image/png"])
    fig.savefig(whole, format="png", dpi=100, facecolor="white")
    exact, kept = (np.asarray(Image.open(stream).convert("RGB"), int) for stream in (whole, io.BytesIO(small)))
    assert len(small) < len(whole.getvalue()) / 3 and np.abs(kept - exact).max() < 48


def test_a_logarithmic_axis_has_powers_for_ticks(shown, monkeypatch):
    parsed, parse = [], MathTextParser.parse
    monkeypatch.setattr(MathTextParser, "parse", lambda *a, **k: parsed.append(a[1]) or parse(*a, **k))
    mmkit.plot_lines({"a": ([1, 10], [3, 4])}, "$T$", "x", "y", log="x")
    assert any("10^{1}" in text for text in parsed) and "$T$" not in parsed


def test_attention_lights_up_the_cell_that_the_word_looks_at(drawn):
    mmkit.show_attention(WHITE, ["dog", "cat"], CORNERS)
    dog, cat = (np.asarray(image).astype(int) for image in drawn[0][0][1:])
    assert dog[10, 80].min() > 240 and dog[80, 10].max() < 80
    assert cat[80, 10].min() > 240 and cat[10, 80].max() < 80


def test_retrieval_shows_the_best_images_with_a_green_frame_around_the_true_one(dataset, drawn, shown):
    scores = torch.zeros(60, 300)
    scores[[3, 4], 0], scores[[1, 7], 5] = torch.tensor([2.0, 1.0]), torch.tensor([2.0, 1.0])
    mmkit.show_retrieval(dataset, scores, [0, 5], k=2)  # captions of images 0 and 1
    images, words, alt, columns, _, frames = drawn[0]
    assert all(np.array_equal(image, dataset.image(at)) for image, at in zip(images, (3, 4, 1, 7), strict=True))
    assert words == [dataset.captions[0], "rank 2", dataset.captions[5], "rank 2"] and columns == 2
    assert frames == [plots.GREY, plots.GREY, plots.GREEN, plots.GREY] and alt.endswith("the first is right for 1.")


# --- leafing through a dataset ---------------------------------------------------------------------


@pytest.fixture
def widget(monkeypatch):
    """The boxes of `browse`, with the controls and the page."""
    made, box = [], ipywidgets.VBox
    monkeypatch.setattr(ipywidgets, "VBox", lambda children: made.append(box(children)) or made[-1])
    return made


def test_the_slider_turns_the_page_and_a_search_keeps_the_pictures_with_all_words(dataset, shown, widget):
    mmkit.browse(dataset)
    (picture, metadata), _, (data, _) = shown  # a page without widgets shows pictures, and nothing below
    assert picture["image/png"] and dataset.captions_of(3)[0] in metadata["image/png"]["alt"]
    assert LIVE in data and data["text/plain"] == ""
    controls, page = widget[0].children
    words, place, _ = controls.children
    before = page.value
    place.value = 7
    assert place.max == 59 and all(caption in page.value for caption in dataset.captions_of(7))
    assert "8 of 60" in page.value and page.value[:60] == before[:60] and page.value[:9000] != before[:9000]
    words.value = "on SNOW two"
    hits = [
        i
        for i in range(60)
        if any({"on", "snow", "two"} <= {*re.findall(r"\w+", text.lower())} for text in dataset.captions_of(i))
    ]
    assert plots.matching_images(dataset, "on SNOW two") == hits and len(hits) > 1
    assert place.value == 0 and place.max == len(hits) - 1
    assert f"1 of {len(hits)}" in page.value and dataset.captions_of(hits[0])[0] in page.value
    words.value = "xylophone"
    assert page.value == "No caption has these words."
    words.value = ""
    assert "1 of 60" in page.value and place.max == 59


def test_words_are_whole_and_no_patterns(dataset):
    assert plots.matching_images(dataset, "o") == [] and plots.matching_images(dataset, ".*") == []


def test_a_dataset_of_one_picture_can_be_browsed_and_its_captions_are_shown_as_text(dataset, shown, widget):
    mmkit.browse(replace(dataset.select([0]), captions=(PRICE,) * 5, scenes=()))
    assert html.escape(PRICE) in widget[0].children[1].value and PRICE not in widget[0].children[1].value
