"""Every figure of the course. Colours tell apart without colour vision (Okabe & Ito 2008); each figure has alt text."""

import base64
import html
import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle, repeat

import matplotlib
import numpy as np
import torch.nn.functional as F
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import ImageDraw
from PIL.Image import Dither, Image, Quantize, fromarray
from torch import Tensor

from .data import CaptionDataset
from .results import Difference
from .training import History

Numbers = Sequence[float] | np.ndarray | Tensor
Words = Sequence[str]
COLOURS = BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#6B6B6B"
KINDS = {"image": BLUE, "text": ORANGE, "both": GREEN, "loss": RED, "": GREY}  # of the boxes of a diagram
HATCHES, DASHES = ("", "///", "..", "xx", "\\\\", "++"), ("-", "--", "-.", ":", "-", "--")
LOOKS = tuple(zip(COLOURS, HATCHES, "os^Dvx", DASHES, strict=True))  # of several series
_MARKS = {"markersize": 4, "capsize": 3, "elinewidth": 1.3}  # with bars of errors
_STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.titlesize": 11,
    "axes.titleweight": "bold", "font.size": 9.5, "legend.frameon": False, "legend.fontsize": 9,
}  # fmt: skip
_DPI = 200  # of the file; a page shows it half as large, sharp on any screen


def figure(width: float, height: float, rows: int = 1, columns: int = 1, **labels: object) -> tuple[Figure, np.ndarray]:
    """A figure in the course's style and a flat array of its axes, each with `labels` (title, xlabel …); in inches."""
    matplotlib.rcParams.update(_STYLE)  # legends and titles that a cell adds later take it too
    fig = Figure(figsize=(width, height), layout="constrained", dpi=_DPI)
    fig.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return fig, fig.subplots(rows, columns, squeeze=False, subplot_kw=labels).ravel()


def plain_text(fig: Figure) -> None:
    """Draw titles and texts as they are written, not as TeX: a caption may name prices in $."""
    for child in (child for parent in (fig, *fig.axes) for child in parent.get_children() if isinstance(child, Text)):
        child.set_parse_math(False)


def show(fig: Figure, alt: str, photos: bool = False) -> None:
    """Display a figure, and under it, folded, the same in words, since JupyterLab keeps alternative text to itself.
    One with `photos` is a JPEG of all colours; the few of a chart fit into a PNG of 256."""
    plain_text(fig)
    canvas, stream, kind = FigureCanvasAgg(fig), io.BytesIO(), f"image/{'jpeg' if photos else 'png'}"
    canvas.draw()
    pixels = fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    if photos:
        pixels.save(stream, format="jpeg", quality=88, optimize=True)
    else:  # maximum coverage keeps the rare colours
        pixels = pixels.quantize(256, Quantize.MAXCOVERAGE, kmeans=2, dither=Dither.NONE)
        pixels.save(stream, format="png", optimize=True)
    data, look = base64.b64encode(stream.getvalue()).decode(), {"alt": alt, "width": pixels.width // 2}
    display({kind: data, "text/plain": "Figure"}, metadata={kind: look}, raw=True)
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
    show(fig, f"{kind}. {title}. {'; '.join(facts)}.", photos=any(image.get_array().ndim == 3 for image in axis.images))


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


def plot_map(panels: Mapping[str, Mapping[str, Tensor | np.ndarray]], title: str, xlabel: str, ylabel: str) -> None:
    """Points in a plane, `panels[panel][name]` `(N, 2)`, told apart by colour and marker; panels side by side."""
    fig, axes = figure(4.4 * len(panels) if len(panels) > 1 else 5.5, 4, 1, len(panels), xlabel=xlabel, ylabel=ylabel)
    facts = []
    for axis, (panel, points) in zip(axes, panels.items(), strict=True):
        for (name, xy), (colour, _, marker, _) in zip(points.items(), cycle(LOOKS), strict=False):
            axis.scatter(*np.asarray(xy).T, s=14, color=colour, marker=marker, alpha=0.6, linewidths=0, label=name)
            facts.append(f"{panel}: {len(xy)} points of {name}")
        axis.set_title(panel)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    fig.suptitle(title, fontweight="bold", fontsize=11)
    show(fig, f"Scatter plot. {title}. {'; '.join(facts)}.")


def diagram(boxes: Mapping[str, tuple], arrows: Sequence[tuple[str, ...]], title: str) -> None:
    """An architecture: `boxes[name]` is `(column, row)` or `(column, row, kind)`, a kind one of `KINDS`, and an arrow
    `(from, to)` or `(from, to, label)`. Rows count downwards; the name is what stands in the box."""
    columns, rows = (max(place[axis] for place in boxes.values()) + 1 for axis in (0, 1))
    with chart("Diagram", title, "", "", 9, 0.95 * rows + 0.5) as (axis, facts):
        for name, (column, row, *kind) in boxes.items():
            colour = KINDS[kind[0] if kind else ""]
            look = {"boxstyle": "round,pad=0.5", "facecolor": f"{colour}22", "edgecolor": colour, "linewidth": 1.5}
            axis.text(column, row, name, ha="center", va="center", fontsize=9, bbox=look, zorder=3)
        axis.set(xlim=(-0.55, columns - 0.45), ylim=(rows - 0.45, -0.55))
        axis.axis("off")
        patches = {text.get_text(): text for text in axis.texts}
        plain_text(axis.figure)
        FigureCanvasAgg(axis.figure).draw()  # only then has a box its size
        for source, target, *label in arrows:
            ends = [patches[source].get_position(), patches[target].get_position()]
            shape = {"arrowstyle": "-|>", "color": GREY, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 3}
            shape |= {"patchA": patches[source].get_bbox_patch(), "patchB": patches[target].get_bbox_patch()}
            axis.annotate("", ends[1], ends[0], arrowprops=shape, zorder=2)
            middle = [sum(pair) / 2 for pair in zip(*ends, strict=True)]
            look = {"facecolor": "white", "edgecolor": "none", "pad": 1} if label else None
            axis.text(*middle, "".join(label), ha="center", va="center", fontsize=8, color=GREY, bbox=look)
            facts.append(" → ".join((source, *label, target)).replace("\n", " "))


def plot_graph(edges: Tensor, values: Numbers, titles: Words, title: str) -> None:
    """Nodes in a row, as circles with their value, and messages as arrows along `edges` `(2, E)`: a panel under a title
    for each row of `values` `(panels, N)`."""
    values = np.atleast_2d(np.asarray(values, dtype=float))
    (panels, count), scale, facts = values.shape, {"vmin": values.min(), "vmax": 1.6 * values.max() + 1e-9}, []
    places = np.column_stack([np.arange(count), np.zeros(count)])
    fig, axes = figure(9, 0.5 + 1.25 * panels, panels, frame_on=False, xticks=[], yticks=[])
    for axis, row, name in zip(axes, values, titles, strict=True):
        axis.set_title(name)
        for sender, receiver in np.asarray(edges).T:
            look = {
                "arrowstyle": "-|>",
                "connectionstyle": "arc3,rad=0.25",
                "color": GREY,
                "shrinkA": 14,
                "shrinkB": 14,
            }
            axis.annotate("", places[receiver], places[sender], arrowprops=look)
        axis.scatter(*places.T, s=620, c=row, cmap="Blues", edgecolors=BLUE, zorder=3, **scale)
        for (x, y), value in zip(places, row, strict=True):
            axis.text(x, y, f"{value:.3g}", ha="center", va="center", fontsize=9, zorder=4)
        axis.margins(0.12, 0.6)
        facts.append(f"{name}: {', '.join(f'{value:.3g}' for value in row)}")
    fig.suptitle(title, fontweight="bold", fontsize=11)
    show(fig, f"Graph. {title}. {count} nodes, {np.shape(edges)[1]} edges. Values of the nodes: {'; '.join(facts)}.")


def plot_tokens(pieces: Sequence[Words], mask: Tensor, title: str = "Captions as tokens") -> None:
    """A batch of captions as rows of word pieces; padding (mask 0) is pale and hatched."""
    (rows, columns), real = mask.shape, int(mask.sum())
    size = min(11, 0.82 * columns + 0.6), 0.42 * rows + 0.9
    with chart("Word pieces", title, "position in the sequence", "caption", *size) as (axis, facts):
        for (row, column), kept in np.ndenumerate(np.asarray(mask, dtype=bool)):
            piece = pieces[row][column]
            special = piece.startswith("[")
            face, ink = (ORANGE if special else BLUE, "black" if special else "white") if kept else ("#EEEEEE", GREY)
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
    show(fig, alt, photos=True)


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


def show_attention(
    image: Image, words: Words, weights: Tensor, title: str = "", columns: int = 4, positions: Tensor | None = None
) -> None:
    """Where each word looks: the picture as the encoder sees it, as bright as the word's weight on each cell.
    `weights` `(len(words), cells)` of a square grid, each row on a scale of its own, from smallest to largest. A circle
    marks a word's expected place, `positions` `(len(words), 2)` in [-1, 1] as `cell_positions` has them."""
    side, (width, height) = round(weights.shape[1] ** 0.5), image.size
    low, high = weights.aminmax(dim=1, keepdim=True)
    heat = ((weights - low) / (high - low).clamp(min=1e-12)).view(-1, 1, side, side)
    light = 0.2 + 0.8 * F.interpolate(heat, size=(height, width), mode="bilinear", align_corners=False)
    shades = [fromarray((np.asarray(image) * one[..., None]).astype(np.uint8)) for one in light.squeeze(1).numpy()]
    cells = zip(words, weights.argmax(dim=1).tolist(), strict=True)
    places = "; ".join(f"{word}: row {cell // side + 1}, column {cell % side + 1}" for word, cell in cells)
    if positions is not None:
        edge = 1 + 1 / max(1, side - 1)  # of the picture: its outer cells have their centres at -1 and 1
        for shade, (x, y) in zip(shades, ((positions + edge) / (2 * edge)).tolist(), strict=True):
            x, y, radius = x * width, y * height, width / 14
            box = [x - radius, y - radius, x + radius, y + radius]
            ImageDraw.Draw(shade).ellipse(box, outline=ORANGE, width=max(2, width // 60))
        told = [
            f"{word}: {x:+.2f} to the right, {y:+.2f} down"
            for word, (x, y) in zip(words, positions.tolist(), strict=True)
        ]
        places += f". Expected places: {'; '.join(told)}"
    alt = f"{title}. The cell of largest weight of {side} by {side}: {places}."
    show_images([image, *shades], ["what the encoder sees", *words], alt, columns, title)
