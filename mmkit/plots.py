"""Every figure of the course. Colours tell apart without colour vision (Okabe & Ito 2008); each figure has alt text."""

import base64
import html
import io
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle, product, repeat

import matplotlib
import numpy as np
import torch.nn.functional as F
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL.Image import Dither, Image, Quantize, fromarray
from torch import Tensor

from .data import CaptionDataset
from .evaluation import CUTS, DIRECTIONS, Retrieval
from .regions import cell_positions
from .results import Difference
from .training import History

Numbers = Sequence[float] | np.ndarray | Tensor
Words = Sequence[str]
COLOURS = BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#6B6B6B"
HATCHES, DASHES = ("", "///", "..", "xx", "\\\\", "++"), ("-", "--", "-.", ":", "-", "--")
LOOKS = tuple(zip(COLOURS, HATCHES, "os^Dvx", DASHES, strict=True))  # of several series
_MARKS = {"markersize": 4, "capsize": 3, "elinewidth": 1.3}  # with bars of errors
_STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9.5}


def figure(width: float, height: float, rows: int = 1, columns: int = 1, **labels: object) -> tuple[Figure, np.ndarray]:
    """A figure in the course's style and a flat array of its axes, each with `labels` (title, xlabel …); in inches."""
    with matplotlib.rc_context(_STYLE):
        fig = Figure(figsize=(width, height), layout="constrained", dpi=100)
        fig.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
        return fig, fig.subplots(rows, columns, squeeze=False, subplot_kw=labels).ravel()


def show(fig: Figure, alt: str) -> None:
    """Display a figure, and under it, folded, the same in words, since JupyterLab keeps alternative text to itself."""
    for child in (child for parent in (fig, *fig.axes) for child in parent.get_children() if isinstance(child, Text)):
        child.set_parse_math(False)  # a caption may name prices in $
    canvas, stream = FigureCanvasAgg(fig), io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        canvas.draw()
    # 256 colours take a third of the bytes; maximum coverage keeps the rare ones
    pixels = fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    pixels.quantize(256, Quantize.MAXCOVERAGE, kmeans=2, dither=Dither.NONE).save(stream, format="png", optimize=True)
    png = base64.b64encode(stream.getvalue()).decode()
    display({"image/png": png, "text/plain": "Figure"}, metadata={"image/png": {"alt": alt}}, raw=True)
    words = f"<details><summary>Figure in words</summary>{html.escape(alt)}</details>"
    display({"text/html": words, "text/plain": alt}, raw=True)


@contextmanager
def chart(
    kind: str, title: str, xlabel: str, ylabel: str, width: float = 7, height: float = 3.2, beside: bool = False
) -> Iterator[tuple[Axes, list[str]]]:
    """Axes to draw on, and a list for what the figure in words tells; shown at the end. A legend may stand `beside`."""
    fig, (axis,) = figure(width, height, title=title, xlabel=xlabel, ylabel=ylabel)
    facts: list[str] = []
    yield axis, facts
    if len(axis.get_legend_handles_labels()[1]) > 1:
        axis.legend(**({"loc": "upper left", "bbox_to_anchor": (1, 1)} if beside else {}))
    show(fig, f"{kind}. {title}. {'; '.join(facts)}.")


def _curves(axis: Axes, lines: Mapping[str, tuple[Numbers, ...]]) -> list[str]:
    """Draw curves, and say where each goes."""
    for (name, (xs, ys, *errors)), (colour, _, marker, dash) in zip(lines.items(), cycle(LOOKS), strict=False):
        axis.errorbar(xs, ys, *errors, color=colour, fmt=marker, linestyle=dash, label=name, **_MARKS)
    if all(isinstance(x, int) for xs, *_ in lines.values() for x in xs):
        axis.xaxis.get_major_locator().set_params(integer=True)
    return [f"{name} goes from {ys[0]:.3g} to {ys[-1]:.3g}" for name, (_, ys, *_) in lines.items()]


def plot_lines(lines: Mapping[str, tuple[Numbers, ...]], title: str, xlabel: str, ylabel: str, log: str = "") -> None:
    """Curves by name, `(xs, ys)` or `(xs, ys, errors)` with errors to either side; `log` may name "x", "y" or "xy"."""
    with chart("Line chart", title, xlabel, ylabel, 6.5) as (axis, facts):
        facts += _curves(axis, lines)
        axis.set(**{f"{direction}scale": "log" for direction in log})


def plot_history(history: History, title: str = "Training") -> None:
    """Contrastive and matching loss per epoch, in training and validation, and the epoch that was kept."""
    fig, axes = figure(8, 3, 1, 2, xlabel="epoch", ylabel="loss (nats)")
    column, epochs = history.column, range(1, len(history.rows) + 1)
    facts = [f"Two line charts over {len(epochs)} epochs"]
    for axis, name in zip(axes, ("contrastive", "matching"), strict=True):
        lines = {"training": (epochs, column(name)), "validation": (epochs, column(f"validation_{name}"))}
        facts.append(f"{name} loss: {'; '.join(_curves(axis, lines))}")
        axis.axvline(history.best_epoch + 1, color=GREY, linewidth=1, linestyle=":", label="kept epoch")
        axis.set(title=f"{title}: {name} loss", ylim=(0, None))
    axes[0].legend()
    show(fig, ". ".join([*facts, f"Epoch {history.best_epoch + 1} was kept."]))


def plot_histogram(
    values: Mapping[str, Numbers], title: str, xlabel: str, bins: int | Numbers = 30, ylabel: str = "count",
    line: tuple[float, str] | None = None,
) -> None:  # fmt: skip
    """Overlaid histograms by name, with the same bins, and a vertical line `(x, label)` if given."""
    with chart("Histogram", title, xlabel, ylabel, 7, 3) as (axis, facts):
        arrays = {name: np.asarray(value, dtype=float) for name, value in values.items()}
        edges = np.histogram_bin_edges(np.concatenate(list(arrays.values())), bins)
        for (name, array), (colour, hatch, *_) in zip(arrays.items(), cycle(LOOKS), strict=False):
            axis.hist(array, edges, alpha=0.6, color=colour, hatch=hatch, edgecolor="white", linewidth=0.3, label=name)
            facts.append(f"{name}: mean {array.mean():.2f}, {array.min():.2f} to {array.max():.2f}")
        if line:
            axis.axvline(line[0], color="black", linestyle="--", linewidth=1.2, label=line[1])
            facts.append(f"{line[1]} at {line[0]:.2f}")


def plot_matrix(
    array: Numbers, title: str, xlabel: str, ylabel: str, value: str = "logit", ticks: Words = (), row_ticks: Words = ()
) -> None:
    """A heat map, with numbers if it is small; `ticks` name the columns, and the rows too unless `row_ticks` do."""
    array = np.asarray(array, dtype=float)
    (rows, columns), low, high = array.shape, array.min(), array.max()
    width, digits = 0.62 * columns if array.size <= 100 else 0, 0 if (array == array.round()).all() else 2
    with chart("Heat map", title, xlabel, ylabel, max(5.4, width), 4.4) as (axis, facts):
        axis.figure.colorbar(axis.imshow(array, cmap="cividis", aspect="auto"), ax=axis, label=value)
        if ticks:
            axis.set_xticks(range(columns), ticks, rotation=35, ha="right")
            axis.set_yticks(range(rows), row_ticks or ticks)
        for (row, column), number in np.ndenumerate(array) if width else ():
            colour = "white" if number < (low + high) / 2 else "black"
            axis.text(column, row, f"{number:.{digits}f}", ha="center", va="center", color=colour)
        facts.append(f"{rows} by {columns} values from {low:.2f} to {high:.2f}")


def plot_bars(
    groups: Mapping[str, Mapping[str, float]], title: str, ylabel: str, chance: Mapping[str, float] | None = None,
    ylim: tuple[float, float] | None = None,
) -> None:  # fmt: skip
    """Grouped bars, one colour and hatch per name in `groups`, labelled with their values; `chance` as short lines."""
    labels, width = list(next(iter(groups.values()))), 0.8 / len(groups)
    middles, size = np.arange(len(labels)), 8 if len(groups) * len(labels) < 16 else 6  # as wide as a bar of many
    with chart("Bar chart", title, "", ylabel, 7.5, 3.4, beside=True) as (axis, facts):
        for n, ((name, group), (colour, hatch, *_)) in enumerate(zip(groups.items(), cycle(LOOKS), strict=False)):
            places, heights = middles + (n + 0.5) * width - 0.4, [group[label] for label in labels]
            bars = axis.bar(places, heights, width * 0.94, label=name, color=colour, hatch=hatch, edgecolor="white")
            axis.bar_label(bars, fmt="%.1f" if max(heights) > 2 else "%.2f", fontsize=size, padding=1)
            facts.append(f"{name}: " + ", ".join(f"{label} {value:.3g}" for label, value in group.items()))
        if chance:
            heights = [chance[label] for label in labels]
            axis.hlines(heights, middles - 0.45, middles + 0.45, color="black", linestyle=":", label="chance")
        axis.set(xticks=middles, xticklabels=labels, ylim=ylim or (0, axis.get_ylim()[1] * 1.08))


def plot_recalls(reports: Mapping[str, Retrieval], title: str = "Retrieval") -> None:
    """R@1, R@5 and R@10 in percent, both directions, for several fusers, beside chance."""
    images, captions = next(iter(reports.values())).pool
    groups, chance = {name: {} for name in reports}, {}
    for way, k, (name, report) in product(DIRECTIONS, CUTS, reports.items()):
        label = f"{way.replace('_to_', '→')}\nR@{k}"
        groups[name][label] = 100 * getattr(getattr(report, way), f"r{k}")
        chance[label] = 100 * min(1, k / images)
    plot_bars(groups, f"{title} ({images:,} images, {captions:,} captions)", "recall (%)", chance, (0, 112))


def plot_differences(
    differences: Mapping[str, Mapping[str, Difference]], title: str, xlabel: str, scale: float = 100
) -> None:
    """Means and intervals of `differences[group][name]`, times `scale`; a group may lack a name; 0 is "no change"."""
    names = list(dict.fromkeys(name for group in differences.values() for name in group))
    with chart("Intervals of 95 %", title, xlabel, "", 8, 0.9 + 0.38 * len(names), beside=True) as (axis, facts):
        for n, (group, by_name) in enumerate(differences.items()):
            colour, _, marker, _ = LOOKS[n % len(LOOKS)]
            places = [names.index(name) + 0.56 * ((n + 0.5) / len(differences) - 0.5) for name in by_name]
            means, lows, highs = scale * np.array([(one.mean, *one.interval) for one in by_name.values()]).T
            bars = [means - lows, highs - means]
            axis.errorbar(means, places, xerr=bars, fmt=marker, color=colour, label=group, **_MARKS)
            for name, mean, low, high in zip(by_name, means, lows, highs, strict=True):
                facts.append(f"{name}, {group}: {mean:+.1f} ({low:+.1f} to {high:+.1f})")
        axis.axvline(0, color="black", linewidth=1, linestyle=":")
        axis.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))


def plot_map(points: Mapping[str, Tensor | np.ndarray], title: str, xlabel: str, ylabel: str) -> None:
    """Points in a plane, `(N, 2)` per name, told apart by colour and marker."""
    with chart("Scatter plot", title, xlabel, ylabel, 5.5, 4.2) as (axis, facts):
        for (name, xy), (colour, _, marker, _) in zip(points.items(), cycle(LOOKS), strict=False):
            axis.scatter(*np.asarray(xy).T, s=14, color=colour, marker=marker, alpha=0.6, linewidths=0, label=name)
            facts.append(f"{len(xy)} points of {name}")


def plot_tokens(pieces: Sequence[Words], mask: Tensor, title: str = "Captions as tokens") -> None:
    """A batch of captions as rows of word pieces; padding (mask 0) is pale and hatched."""
    (rows, columns), real = mask.shape, int(mask.sum())
    size = min(11, 0.82 * columns + 0.6), 0.42 * rows + 0.9
    with chart("Word pieces", title, "position in the sequence", "caption", *size) as (axis, facts):
        for (row, column), kept in np.ndenumerate(np.asarray(mask, dtype=bool)):
            piece = pieces[row][column]
            face, ink = (ORANGE if piece.startswith("[") else BLUE, "white") if kept else ("#EEEEEE", GREY)
            look = {"facecolor": face, "hatch": "" if kept else "////", "edgecolor": "white", "alpha": 0.9}
            axis.add_patch(Rectangle((column - 0.48, row - 0.43), 0.96, 0.86, **look))
            axis.text(column, row, piece, ha="center", va="center", fontsize=7.5, color=ink)
        axis.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), xticks=range(columns))
        axis.set_yticks(range(rows), range(1, rows + 1))
        facts.append(f"{rows} rows of {columns} positions; {real} hold word pieces, {mask.numel() - real} padding")


def show_images(
    images: Sequence[Image], titles: Words, alt: str, columns: int = 4, title: str = "", frames: Words = ()
) -> None:
    """Show pictures in a grid, each under its title and, if given, in a frame of its colour."""
    cell, columns = 9 / columns, min(columns, len(images))  # inches
    rows, ticks = -(-len(images) // columns), {"xticks": [], "yticks": []}
    fig, axes = figure(cell * columns, rows * cell * 0.95 + 0.4, rows, columns, frame_on=bool(frames), **ticks)
    for axis, image, words, colour in zip(axes, images, titles, frames or repeat("black"), strict=False):
        axis.imshow(np.asarray(image))
        axis.spines[:].set(visible=True, color=colour, linewidth=4)
        words = "\n".join(textwrap.fill(line, round(12 * cell)) for line in words.splitlines())
        axis.set_title(words, loc="left", fontsize=8.5, fontweight="normal", color=colour)
    fig.suptitle(title, fontweight="bold", fontsize=11)
    show(fig, alt)


def show_pairs(dataset: CaptionDataset, indices: Sequence[int], caption: int = 0, columns: int = 4) -> None:
    """Images of a dataset, each with one of its captions (the `caption`-th) above it."""
    pictures, texts = [dataset.image(i) for i in indices], [dataset.captions_of(i)[caption] for i in indices]
    title = "Images and one caption of each" if len(texts) > 1 else ""
    show_images(pictures, texts, f"Images with their captions: {' '.join(texts)}", columns, title)


def show_retrieval(
    dataset: CaptionDataset, scores: Tensor, captions: Sequence[int], k: int = 4, title: str = "Text → image"
) -> None:
    """For some captions of `dataset` the `k` images of highest score `(N, M)`; the true one has a green frame."""
    best = scores[:, captions].topk(k, dim=0).indices.T.numpy()
    true = best == dataset.image_index[captions][:, None]
    words = [text for at in captions for text in (dataset.captions[at], *(f"rank {rank}" for rank in range(2, k + 1)))]
    alt = f"{title}: {len(captions)} captions with their {k} best images; the first is right for {true[:, 0].sum()}."
    head = f"{title}: best {k} images of a caption (green frame: its own image)"
    frames = [GREEN if right else GREY for right in true.flat]
    show_images([dataset.image(int(image)) for image in best.flat], words, alt, k, head, frames)


def show_graph(images: Sequence[Image], captions: Words, edges: Sequence[tuple[int, int, float]], title: str) -> None:
    """Images left, captions right, edges `(image, caption, weight)` as wide as they weigh, green to its own caption."""
    rows, true = max(len(images), len(captions)), sum(image == caption for image, caption, _ in edges)
    with chart("Graph", title, "", "", 9, 0.95 * rows) as (axis, facts):
        for image, caption, weight in edges:
            look = {"color": GREEN, "linestyle": "-"} if image == caption else {"color": GREY, "linestyle": "--"}
            axis.plot([1.05, 3], [-image, -caption], linewidth=0.5 + 3 * max(0, weight), alpha=0.85, zorder=1, **look)
        for row, picture in enumerate(images):
            width = 0.55 * picture.width / picture.height  # of 6.45 units in 9 inches, to keep the aspect
            axis.imshow(np.asarray(picture), extent=(1 - width, 1, -row - 0.42, -row + 0.42), aspect="auto", zorder=2)
        for row, text in enumerate(captions):
            axis.text(3.05, -row, textwrap.fill(text, 52), va="center", fontsize=9)
        axis.set(xlim=(-0.05, 6.4), ylim=(-rows + 0.45, 0.55))
        axis.axis("off")
        facts.append(
            f"{len(images)} images, {len(captions)} captions joined by {len(edges)} edges, {true} of them true"
        )


def show_attention(image: Image, words: Words, weights: Tensor, title: str = "", columns: int = 4) -> None:
    """Where each word looks: the picture as the encoder sees it, as bright as the word's weight on each cell.
    `weights` `(len(words), cells)` of a square grid, each row on a scale of its own, from smallest to largest."""
    side, (width, height) = round(weights.shape[1] ** 0.5), image.size
    low, high = weights.aminmax(dim=1, keepdim=True)
    heat = ((weights - low) / (high - low).clamp(min=1e-12)).view(-1, 1, side, side)
    light = 0.2 + 0.8 * F.interpolate(heat, size=(height, width), mode="bilinear", align_corners=False)
    shades = [fromarray((np.asarray(image) * one[..., None]).astype(np.uint8)) for one in light.squeeze(1).numpy()]
    cells = zip(words, weights.argmax(dim=1).tolist(), strict=True)
    places = "; ".join(f"{word}: row {cell // side + 1}, column {cell % side + 1}" for word, cell in cells)
    alt = f"{title}. The cell of largest weight of {side} by {side}: {places}."
    show_images([image, *shades], ["what the encoder sees", *words], alt, columns, title)


def show_region_words(image: Image, words: Words, weights: Tensor, positions: Tensor, title: str = "") -> None:
    """The graph inside a pair, drawn over the picture: edges, of `weights` `(len(words), cells)`, above a fifth of the
    word's largest, as thick as they weigh; the words' expected `positions` `(len(words), 2)` in [-1, 1] as circles."""
    centres = cell_positions(weights.shape[1]).tolist()
    edge = 1 + 1 / max(1, len(centres) ** 0.5 - 1)  # of the picture, whose outer cells have their centres at -1 and 1
    with chart("Expected place of each word", title, "", "", 7.5, 3.9) as (axis, facts):
        axis.imshow(np.asarray(image), extent=(-edge, edge, edge, -edge), zorder=1)
        for row, (word, colour, (x, y)) in enumerate(zip(words, cycle(COLOURS), positions.tolist(), strict=False)):
            height = edge * ((2 * row + 1) / len(words) - 1)
            for (across, down), share in zip(centres, (weights[row] / weights[row].max()).tolist(), strict=True):
                if share > 1 / 5:
                    axis.plot([across, 1.24 * edge], [down, height], color=colour, lw=0.4 + 1.8 * share, alpha=0.8)
                    axis.plot(across, down, "o", color=colour, ms=3 + 3 * share, mec="white", zorder=3)
            axis.plot(x, y, "o", color="none", markeredgecolor=colour, markeredgewidth=2.2, markersize=17, zorder=4)
            axis.text(1.28 * edge, height, word, va="center", fontsize=10, color=colour, fontweight="bold")
            facts.append(f"{word}: {x:+.2f} to the right, {y:+.2f} down")
        axis.set(xlim=(-1.04 * edge, 2.5 * edge), ylim=(1.04 * edge, -1.04 * edge))
        axis.axis("off")


def matching_images(dataset: CaptionDataset, words: str) -> list[int]:
    """Positions of the images that have a caption with all of these words, whole and in any order; all for none."""
    wanted = [re.compile(rf"\b{re.escape(word)}\b", re.IGNORECASE) for word in words.split()]
    captions = zip(dataset.image_index.tolist(), dataset.captions, strict=True)
    return sorted({image for image, caption in captions if all(word.search(caption) for word in wanted)})


def browse(dataset: CaptionDataset) -> None:
    """Four pictures of a dataset, and below, where a page can run widgets, a slider and a search for words to leaf."""
    import ipywidgets  # takes a while, and only this needs it

    show_pairs(dataset, range(min(4, len(dataset))))
    place, page = ipywidgets.IntSlider(max=len(dataset) - 1, continuous_update=False), ipywidgets.HTML()
    field = ipywidgets.Text(placeholder="dog snow", continuous_update=False)

    def turn(words: str, picture: int) -> None:
        matches = matching_images(dataset, words)
        if not matches:
            page.value = "No caption has these words."
            return
        image = matches[picture]
        png = base64.b64encode(dataset.image(image)._repr_png_()).decode()
        lines = [f"Image {dataset.image_ids[image]}, {picture + 1} of {len(matches):,}", *dataset.captions_of(image)]
        items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
        page.value = f'<img src="data:image/png;base64,{png}" height="300" alt=""><ul>{items}</ul>'

    def first_match(change: Mapping[str, str]) -> None:
        place.value, place.max = 0, max(0, len(matching_images(dataset, change["new"])) - 1)

    field.observe(first_match, "value")  # before `interactive` turns the page
    controls = ipywidgets.interactive(turn, words=field, picture=place, clear_output=False)
    display({**ipywidgets.VBox([controls, page])._repr_mimebundle_(), "text/plain": ""}, raw=True)
