"""Figures made of pictures say what they show, and show it where it is."""

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from mmkit import MultimodalPreprocessor, image_transform, show_attention, show_region_words
from mmkit.galleries import pictures_figure


@pytest.fixture
def shown(monkeypatch):
    seen = []
    monkeypatch.setattr("mmkit.plots.display", lambda data, metadata=None, raw=False: seen.append((data, metadata)))
    return seen


def corner() -> torch.Tensor:
    """Weights of two words on nine cells: top right, and bottom left."""
    weights = torch.full((2, 9), 0.01)
    weights[0, 2] = weights[1, 6] = 1
    return weights


def test_attention_lights_up_the_cell_that_the_word_looks_at(shown, monkeypatch):
    drawn = []

    def watched(images, *rest):
        drawn.extend(images)
        return pictures_figure(images, *rest)

    monkeypatch.setattr("mmkit.galleries.pictures_figure", watched)
    show_attention(Image.new("RGB", (90, 90), "white"), ["dog", "cat"], corner(), "Where the words look")
    assert len(drawn) == 3
    dog, cat = (np.asarray(image).astype(int) for image in drawn[1:])
    assert dog[10, 80].min() > 240 and dog[80, 10].max() < 80
    assert cat[80, 10].min() > 240 and cat[10, 80].max() < 80
    (_, metadata), *_ = shown
    assert "dog: row 1, column 3; cat: row 3, column 1" in str(metadata)


def test_a_word_that_looks_everywhere_alike_divides_nothing_by_nothing(shown):
    show_attention(Image.new("RGB", (30, 30), "white"), ["the"], torch.ones(1, 4) / 4)
    assert shown


def test_the_graph_of_a_pair_names_the_places_of_its_words(shown):
    positions = torch.tensor([[0.5, -1.0], [-1.0, 0.25]])
    show_region_words(Image.new("RGB", (90, 90), "white"), ["dog", "cat"], corner(), positions, "One pair")
    (data, metadata), *_ = shown
    assert "dog: +0.50, -1.00; cat: -1.00, +0.25" in str(metadata)
    assert any(re.match("image/png", kind) for kind in data)


def test_the_encoders_view_is_cropped_and_keeps_its_colours():
    picture = Image.new("RGB", (300, 200), (200, 100, 50))
    picture.paste((0, 0, 255), (0, 0, 30, 200))  # cut off by the crop
    found = MultimodalPreprocessor().seen(picture)
    assert found.size == (224, 224)
    assert np.abs(np.asarray(found).astype(int) - [200, 100, 50]).max() <= 1
    stream = io.BytesIO()
    picture.save(stream, "png")
    squashed = MultimodalPreprocessor(image_transform(squash=True)).seen(Image.open(stream))
    assert np.asarray(squashed)[100, 5].tolist() == pytest.approx([0, 0, 255], abs=2)
