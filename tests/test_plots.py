"""Figures say in words what they show, show it where it is, and draw captions as they are written."""

import base64
import html
import io
import re

import numpy as np
import pytest
import torch
from matplotlib.mathtext import MathTextParser
from PIL import Image

import mmkit
from mmkit import plots
from mmkit.evaluation import Interval
from mmkit.results import Difference

PRICE = r"<b>$5$</b> & $\nothing$"  # no TeX, no HTML
CORNERS = torch.full((2, 9), 0.01)  # weights of two words on nine cells: top right, and bottom left
CHANGE = Difference(0.01, Interval(-0.02, 0.04), 3)
EDGES = torch.tensor([[0, 1], [1, 2]])
CORNERS[0, 2] = CORNERS[1, 6] = 1
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
        (lambda: mmkit.plot_differences({"g": {"a": CHANGE}}, "T", "x"), r"a, g: \+1.0 \(-2.0 to \+4.0\)"),
        (lambda: mmkit.plot_lines({"a": ([1, 10], [3, 4], [1, 1])}, "T", "x", "y"), "a goes from 3 to 4"),
        (lambda: mmkit.plot_map({"before": {"a": torch.eye(2)}}, "T", "x", "y"), "before: 2 points of a"),
        (lambda: mmkit.plot_tokens([["[CLS]", "a"]], torch.tensor([[1, 0]])), "1 hold word pieces, 1 padding"),
        (lambda: mmkit.show_images([WHITE] * 5, [PRICE] * 5, PRICE), re.escape(PRICE)),
        (lambda: mmkit.diagram({"a": (0, 0, "image"), PRICE: (1, 1)}, [("a", PRICE, "$x$")], "T"), r"a → \$x\$ → <b>"),
        (lambda: mmkit.plot_graph(EDGES, [[1, 0, 2], [0.5, 1, 1]], ["a", "b"], "T"), "2 edges.* a: 1, 0, 2; b: 0.5, 1"),
        (lambda: mmkit.show_attention(WHITE, ["dog", "$cat$"], CORNERS, PRICE), "dog: row 1, column 3; .*: row 3, col"),
        (lambda: mmkit.show_attention(WHITE, ["the"], torch.ones(1, 4) / 4), "2 by 2"),
        (lambda: mmkit.show_attention(WHITE, ["a", "b"], CORNERS, positions=torch.eye(2)), "places: a: .1.00 to the"),
    ],
)  # fmt: skip
def test_a_figure_is_a_picture_that_says_what_it_shows_without_tex(draw, words, shown, monkeypatch):
    monkeypatch.setattr("matplotlib.mathtext.MathTextParser.parse", None)
    draw()
    (picture, metadata), (folded, _) = shown
    ((kind, data),) = ((kind, data) for kind, data in picture.items() if kind.startswith("image/"))
    alt, pixels = metadata[kind]["alt"], Image.open(io.BytesIO(base64.b64decode(data)))
    assert re.search(words, alt, re.DOTALL)
    assert folded["text/html"] == f"<details><summary>Figure in words</summary>{html.escape(alt)}</details>"
    assert pixels.format == kind[6:].upper() and pixels.width == 2 * metadata[kind]["width"] + pixels.width % 2


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


def test_pictures_keep_all_their_colours_and_titles_their_style(shown):
    ramp = Image.fromarray(np.arange(256 * 256 * 3, dtype=np.uint32).reshape(256, 256, 3).astype(np.uint8))
    mmkit.show_images([ramp], ["a"], "A ramp.")
    pixels = Image.open(io.BytesIO(base64.b64decode(shown[0][0]["image/jpeg"])))
    assert len(pixels.getcolors(2**24)) > 1000
    with plots.chart("Line chart", "T", "x", "y") as (axis, _):
        axis.plot([1], label="a")
        axis.plot([2], label="b")
    assert axis.get_title(loc="left") == "T" and not axis.get_legend().get_frame_on()
