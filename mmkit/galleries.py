"""Figures made of pictures: pairs, graphs over them, what is retrieved, and where a word looks."""

import textwrap
from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from .data import CaptionDataset
from .plots import BLUE, GREEN, GREY, ORANGE, figure, show


def _picture(axis, image: Image.Image | np.ndarray, title: str = "", width: int = 30, colour: str = "black") -> None:
    axis.imshow(np.asarray(image))
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(colour != "black")
        spine.set(color=colour, linewidth=4)
    axis.set_title(textwrap.fill(title, width), fontsize=8.5, fontweight="normal", loc="left", color=colour)


def pictures_figure(images: Sequence[Image.Image], titles: Sequence[str], columns: int = 4, title: str = "") -> Figure:
    """Pictures in a grid, each under its title."""
    cell, columns = 9 / columns, min(columns, len(images))  # inches
    rows = -(-len(images) // columns)
    fig, axes = figure(cell * columns, rows * cell * 0.95 + 0.4, rows, columns)
    for axis in axes[len(images) :]:
        axis.axis("off")
    for axis, image, words in zip(axes, images, titles, strict=False):
        _picture(axis, image, words, width=round(12 * cell))
    fig.suptitle(title, fontweight="bold", fontsize=11)
    return fig


def show_images(
    images: Sequence[Image.Image], titles: Sequence[str], alt: str, columns: int = 4, title: str = ""
) -> None:
    """Show pictures in a grid, each under its title."""
    show(pictures_figure(images, titles, columns, title), alt)


def show_pairs(dataset: CaptionDataset, indices: Sequence[int], caption: int = 0, columns: int = 4) -> None:
    """Images of a dataset, each with one of its captions (the `caption`-th) above it."""
    texts = [dataset.captions_of(i)[caption] for i in indices]
    title = "Images and one caption of each" if len(texts) > 1 else ""
    alt = "Images with their captions: " + " ".join(texts)
    show_images([dataset.image(i) for i in indices], texts, alt, columns, title)


def show_graph(
    images: Sequence[Image.Image], captions: Sequence[str], edges: Sequence[tuple[int, int, float]], title: str
) -> None:
    """A bipartite graph: images left, captions right, edges `(image, caption, weight)` whose width is their weight.

    Edges to an image's own caption (same position) are green and solid, the others grey and dashed.
    """
    fig, (axis,) = figure(9, 0.95 * max(len(images), len(captions)))
    for image, caption, weight in edges:
        own = image == caption
        axis.plot(
            [1.05, 3.0],
            [-image, -caption],
            color=GREEN if own else GREY,
            linestyle="-" if own else "--",
            linewidth=0.5 + 3 * max(0.0, weight),
            alpha=0.85,
            zorder=1,
        )
    for row, picture in enumerate(images):
        width = 0.55 * picture.width / picture.height  # of 6.45 units in 9 inches, to keep the aspect
        axis.imshow(np.asarray(picture), extent=(1 - width, 1, -row - 0.42, -row + 0.42), aspect="auto", zorder=2)
    for row, text in enumerate(captions):
        axis.text(3.05, -row, textwrap.fill(text, 52), va="center", fontsize=9)
    axis.set(xlim=(-0.05, 6.4), ylim=(-max(len(images), len(captions)) + 0.45, 0.55), title=title)
    axis.axis("off")
    own = sum(image == caption for image, caption, _ in edges)
    sizes = f"{len(images)} images and {len(captions)} captions joined by {len(edges)} edges"
    show(fig, f"{title}. {sizes}, {own} of them to the image's own caption.")


def show_retrieval(
    dataset: CaptionDataset, scores: Tensor, captions: Sequence[int], k: int = 4, title: str = "Text → image"
) -> None:
    """For some captions of `dataset` the `k` images of highest score `(N, M)`; the true one has a green frame."""
    fig, axes = figure(9, 2.25 * len(captions), len(captions), k, squeeze=False)
    right = 0
    for row, caption in enumerate(captions):
        best = scores[:, caption].topk(k).indices.tolist()
        for rank, image in enumerate(best):
            own = image == dataset.caption_image[caption]
            right += own and rank == 0
            words = dataset.captions[caption] if rank == 0 else f"rank {rank + 1}"
            _picture(axes[row * k + rank], dataset.image(image), words, 30, GREEN if own else GREY)
    fig.suptitle(f"{title}: best {k} images of a caption (green frame: its own image)", fontweight="bold", fontsize=11)
    show(fig, f"{title}: {len(captions)} captions with their {k} best images; the first is right for {right} of them.")


def show_attention(
    image: Image.Image, words: Sequence[str], weights: Tensor, title: str = "", columns: int = 4
) -> None:
    """Where each word looks: the picture as the encoder sees it, as bright as the word's weight on each cell.

    `weights` `(len(words), cells)` of a square grid, each row on a scale of its own, from its smallest to its largest.
    """
    side = round(weights.shape[1] ** 0.5)
    low, high = weights.min(dim=1, keepdim=True).values, weights.max(dim=1, keepdim=True).values
    heat = ((weights - low) / (high - low).clamp(min=1e-12)).view(-1, 1, side, side)
    heat = F.interpolate(heat, size=image.size[::-1], mode="bilinear", align_corners=False).squeeze(1)
    shades = [
        Image.fromarray((np.asarray(image) * (0.2 + 0.8 * light[..., None])).astype(np.uint8)) for light in heat.numpy()
    ]
    strongest = [divmod(int(cell), side) for cell in weights.argmax(dim=1)]
    places = "; ".join(
        f"{word}: row {row + 1}, column {column + 1}" for word, (row, column) in zip(words, strongest, strict=True)
    )
    alt = f"{title}. The cell of largest weight of {side} by {side}: {places}."
    show(pictures_figure([image, *shades], ["what the encoder sees", *words], columns, title), alt)


def show_region_words(
    image: Image.Image, words: Sequence[str], weights: Tensor, positions: Tensor, title: str = ""
) -> None:
    """The graph inside one pair, drawn over the picture: words right, the edges from the cells to each.

    `weights` `(len(words), cells)` are the edges' weights; those above a fifth of the word's largest are drawn,
    as thick as they weigh; `positions` `(len(words), 2)` in [-1, 1] are the expected places that the words receive,
    drawn as circles.
    """
    side, span = round(weights.shape[1] ** 0.5), 1.0
    fig, (axis,) = figure(7.5, 3.9)
    axis.imshow(np.asarray(image), extent=(0, span, span, 0), zorder=1)
    colours = (BLUE, ORANGE, GREEN, "#CC79A7", "#D55E00", "#000000")
    for row, word in enumerate(words):
        colour, height = colours[row % len(colours)], (row + 0.5) / len(words)
        for cell in (weights[row] > weights[row].max() / 5).nonzero().flatten().tolist():
            x, y = (cell % side + 0.5) / side, (cell // side + 0.5) / side
            share = float(weights[row, cell] / weights[row].max())
            axis.plot([x, 1.12], [y, height], color=colour, linewidth=0.4 + 1.8 * share, alpha=0.8, zorder=2)
            axis.plot(x, y, "o", color=colour, markersize=3 + 3 * share, markeredgecolor="white", zorder=3)
        x, y = ((positions[row] + 1) / 2 * (side - 1) / side + 0.5 / side).tolist()
        axis.plot(x, y, "o", color="none", markeredgecolor=colour, markeredgewidth=2.2, markersize=17, zorder=4)
        axis.text(1.14, height, word, va="center", fontsize=10, color=colour, fontweight="bold")
    axis.set(xlim=(-0.02, 1.75), ylim=(1.02, -0.02), title=title)
    axis.axis("off")
    places = "; ".join(f"{word}: {x:+.2f}, {y:+.2f}" for word, (x, y) in zip(words, positions.tolist(), strict=True))
    show(fig, f"{title}. Expected place of each word, right and down from the middle: {places}.")
