"""Every figure of the course. Colours tell apart without colour vision (Okabe & Ito 2008); each figure has alt text."""

import base64
import html
import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import torch
from IPython.display import display
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from .evaluation import Retrieval
from .results import Difference
from .training import History

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#6B6B6B"
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, GREY)
_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.labelsize": 10,
    "font.size": 9.5,
    "legend.frameon": False,
    "image.interpolation": "nearest",
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "lines.linewidth": 1.8,
}


def figure(
    width: float = 7.0, height: float = 3.2, rows: int = 1, columns: int = 1, **keywords
) -> tuple[Figure, np.ndarray]:
    """A figure in the course's style and a flat array of its axes; sizes in inches."""
    with matplotlib.rc_context(_STYLE):
        fig = Figure(figsize=(width, height), layout="constrained")
        fig.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
        return fig, np.atleast_1d(fig.subplots(rows, columns, **keywords)).ravel()


def _png(fig: Figure) -> bytes:
    """The figure as a PNG of 256 colours, a third of the bytes; maximum coverage keeps the rare ones."""
    drawn, small = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        fig.savefig(drawn, format="png", dpi=100, facecolor="white")
    colours = (
        Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
    )
    colours.save(small, format="png", optimize=True)
    return small.getvalue()


def show(fig: Figure, alt: str, live: Mapping[str, object] | None = None) -> None:
    """Display a figure, and under it, folded, the same in words.

    The words are the picture's alternative text too; but JupyterLab does not hand that to a screen reader.
    `live` is a widget's output by media type: a page that can run it shows it in place of the figure and the words.
    """
    picture = {"image/png": base64.b64encode(_png(fig)).decode(), "text/plain": "Figure"}
    display({**(live or {}), **picture}, metadata={"image/png": {"alt": alt}}, raw=True)
    if live:
        return
    words = f"<details><summary>Figure in words</summary>{html.escape(alt)}</details>"
    display({"text/html": words, "text/plain": alt}, raw=True)


def plot_history(history: History, title: str = "Training") -> None:
    """Contrastive and matching loss per epoch, in training and validation, and the epoch that was kept."""
    fig, axes = figure(8, 3, 1, 2)
    epochs = range(1, len(history.rows) + 1)
    for axis, name in zip(axes, ("contrastive", "matching"), strict=True):
        axis.plot(epochs, history.column(name), "o-", color=BLUE, markersize=3, label="training")
        axis.plot(epochs, history.column(f"validation_{name}"), "s--", color=ORANGE, markersize=3, label="validation")
        axis.axvline(history.best_epoch + 1, color=GREY, linewidth=1, linestyle=":", label="kept epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set(title=f"{title}: {name} loss", xlabel="epoch", ylabel="loss (nats)", ylim=(0, None))
    axes[0].legend()
    first, last = history.rows[0], history.rows[-1]
    words = (
        f"Two line charts over {len(history.rows)} epochs. Contrastive loss falls from {first['contrastive']:.2f} to "
        f"{last['contrastive']:.2f} in training and ends at {last['validation_contrastive']:.2f} in validation; "
        f"matching loss ends at {last['matching']:.2f} and {last['validation_matching']:.2f}. "
        f"Epoch {history.best_epoch + 1} was kept."
    )
    show(fig, words)


def plot_histogram(
    values: Mapping[str, Sequence[float] | Tensor],
    title: str,
    xlabel: str,
    bins: int | Sequence[float] = 30,
    ylabel: str = "count",
    line: tuple[float, str] | None = None,
) -> None:
    """Overlaid histograms by name, with the same bins, and a vertical line `(x, label)` if given."""
    fig, (axis,) = figure(7, 3)
    arrays = {name: np.asarray(value, dtype=float) for name, value in values.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(arrays.values())), bins)
    for (name, array), colour, hatch in zip(arrays.items(), COLOURS, ("", "///", "..", "xx"), strict=False):
        axis.hist(array, edges, alpha=0.6, color=colour, hatch=hatch, edgecolor="white", linewidth=0.3, label=name)
    if line:
        axis.axvline(line[0], color="black", linestyle="--", linewidth=1.2, label=line[1])
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if len(arrays) > 1 or line:
        axis.legend()
    facts = "; ".join(
        f"{name}: mean {array.mean():.2f}, {array.min():.2f} to {array.max():.2f}" for name, array in arrays.items()
    )
    show(fig, f"Histogram. {title}. {facts}." + (f" {line[1]} at {line[0]:.2f}." if line else ""))


def plot_matrix(
    matrix: Tensor | np.ndarray,
    title: str,
    xlabel: str,
    ylabel: str,
    value: str = "logit",
    ticks: Sequence[str] | None = None,
    row_ticks: Sequence[str] | None = None,
) -> None:
    """A matrix as a heat map with a colour bar; small ones carry their numbers. `ticks` name the columns, and the
    rows too unless `row_ticks` do."""
    array = np.asarray(matrix, dtype=float)
    fig, (axis,) = figure(max(5.4, 0.62 * array.shape[1] if array.size <= 100 else 0), 4.4)
    image = axis.imshow(array, cmap="cividis", aspect="auto")
    fig.colorbar(image, ax=axis, label=value)
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if ticks is not None:
        axis.set_xticks(range(len(ticks)), ticks, rotation=35, ha="right")
        axis.set_yticks(range(len(row_ticks or ticks)), row_ticks or ticks)
    if array.size <= 100:
        digits = 0 if (array == array.round()).all() else 2
        middle = (array.min() + array.max()) / 2
        for (row, column), number in np.ndenumerate(array):
            axis.text(
                column,
                row,
                f"{number:.{digits}f}",
                ha="center",
                va="center",
                color="white" if number < middle else "black",
            )
    shape, values = f"{array.shape[0]} by {array.shape[1]}", f"{array.min():.2f} to {array.max():.2f}"
    show(fig, f"Heat map of {shape}: {title}. Values from {values}.")


def plot_bars(
    groups: Mapping[str, Mapping[str, float]],
    title: str,
    ylabel: str,
    chance: Mapping[str, float] | None = None,
    ylim: tuple[float, float] | None = None,
) -> None:
    """Grouped bars, one colour and hatch per name in `groups`, labelled with their values; `chance` as short lines."""
    fig, (axis,) = figure(7.5, 3.4)
    names, labels = list(groups), list(next(iter(groups.values())))
    width = 0.8 / len(names)
    for n, (name, hatch) in enumerate(zip(names, ("", "///", "..", "xx", "\\\\", "++"), strict=False)):
        places = np.arange(len(labels)) + (n - (len(names) - 1) / 2) * width
        heights = [groups[name][label] for label in labels]
        bars = axis.bar(places, heights, width * 0.94, label=name, color=COLOURS[n], hatch=hatch, edgecolor="white")
        size = 8 if len(names) * len(labels) < 16 else 6  # as wide as a bar of many
        axis.bar_label(bars, fmt="%.1f" if max(heights) > 2 else "%.2f", fontsize=size, padding=1)
    for place, label in enumerate(labels):
        if chance and label in chance:
            axis.hlines(
                chance[label],
                place - 0.45,
                place + 0.45,
                color="black",
                linestyle=":",
                label="chance" if place == 0 else None,
            )
    axis.set_xticks(range(len(labels)), labels)
    axis.set(title=title, ylabel=ylabel)
    axis.set_ylim(*(ylim or (0, axis.get_ylim()[1] * 1.08)))
    if len(names) > 1 or chance:
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    facts = "; ".join(f"{name}: " + ", ".join(f"{k} {v:.3g}" for k, v in row.items()) for name, row in groups.items())
    show(fig, f"Bar chart. {title}. {facts}.")


def plot_differences(
    differences: Mapping[str, Mapping[str, Difference]], title: str, xlabel: str, scale: float = 100
) -> None:
    """Mean differences with their intervals, a line per name and within it a mark per group; zero is "no change".

    `differences[group][name]`: a group may lack a name. Numbers are multiplied by `scale`, fractions to points.
    """
    names = list(dict.fromkeys(name for row in differences.values() for name in row))
    fig, (axis,) = figure(8, 0.9 + 0.38 * len(names))
    apart, facts = 0.56 / max(1, len(differences)), []
    for n, ((group, row), colour, marker) in enumerate(zip(differences.items(), COLOURS, "osD^vx", strict=False)):
        places = [names.index(name) + (n - (len(differences) - 1) / 2) * apart for name in row]
        ends = scale * np.array([(found.mean, *found.interval) for found in row.values()])
        means, lows, highs = ends.T
        look = {"fmt": marker, "color": colour, "markersize": 5, "capsize": 3, "elinewidth": 1.4}
        axis.errorbar(means, places, xerr=[means - lows, highs - means], label=group, **look)
        facts += [
            f"{name}, {group}: {m:+.1f} ({a:+.1f} to {b:+.1f})" for name, (m, a, b) in zip(row, ends, strict=True)
        ]
    axis.axvline(0, color="black", linewidth=1, linestyle=":")
    axis.set_yticks(range(len(names)), names)
    axis.set(title=title, xlabel=xlabel, ylim=(len(names) - 0.5, -0.5))
    if len(differences) > 1:
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    show(fig, f"Differences with 95 % intervals. {title}. {'; '.join(facts)}.")


def plot_recalls(reports: Mapping[str, Retrieval], title: str = "Retrieval") -> None:
    """R@1, R@5 and R@10 in percent, both directions, for several fusers, beside chance."""
    groups, chance = {}, {}
    for name, report in reports.items():
        images, captions = report.pool
        recalls = {"image→text": report.image_to_text, "text→image": report.text_to_image}
        groups[name] = {
            f"{arrow}\nR@{k}": 100 * getattr(recall, f"r{k}") for arrow, recall in recalls.items() for k in (1, 5, 10)
        }
        chance = {label: 100 * min(1, int(label.split("@")[1]) / images) for label in groups[name]}
    plot_bars(groups, f"{title} ({images:,} images, {captions:,} captions)", "recall (%)", chance, (0, 112))


def plot_lines(
    lines: Mapping[str, tuple[Sequence[float], ...]], title: str, xlabel: str, ylabel: str, log: str = ""
) -> None:
    """Curves by name, each `(xs, ys)` or `(xs, ys, errors)`, told apart by colour, marker and dash; errors are drawn as
    bars of that length to either side. `log` may name "x", "y" or "xy"."""
    fig, (axis,) = figure(6.5, 3.2)
    for (name, (xs, ys, *errors)), colour, marker, dash in zip(
        lines.items(), COLOURS, "os^Dvx", ("-", "--", "-.", ":", "-", "--"), strict=False
    ):
        look = {"color": colour, "marker": marker, "linestyle": dash, "markersize": 4}
        axis.errorbar(xs, ys, *errors, capsize=3, elinewidth=1.2, label=name, **look)
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if all(isinstance(x, int) for xs, *_ in lines.values() for x in xs):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for direction in log:
        getattr(axis, f"set_{direction}scale")("log")
    axis.legend()
    facts = "; ".join(f"{name} goes from {ys[0]:.3g} to {ys[-1]:.3g}" for name, (_, ys, *_) in lines.items())
    show(fig, f"Line chart. {title}. {facts}.")


def plot_map(points: Mapping[str, Tensor | np.ndarray], title: str, xlabel: str, ylabel: str) -> None:
    """Points in a plane, `(N, 2)` per name, told apart by colour and marker."""
    fig, (axis,) = figure(5.5, 4.2)
    for (name, xy), colour, marker in zip(points.items(), COLOURS, "o^sD", strict=False):
        xy = np.asarray(xy)
        axis.scatter(xy[:, 0], xy[:, 1], s=14, color=colour, marker=marker, alpha=0.6, linewidths=0, label=name)
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axis.legend()
    show(
        fig, f"Scatter plot. {title}. " + "; ".join(f"{len(xy)} points of {name}" for name, xy in points.items()) + "."
    )


def plot_tokens(pieces: Sequence[Sequence[str]], mask: Tensor, title: str = "Captions as tokens") -> None:
    """A batch of captions as rows of word pieces; padding (mask 0) is pale and hatched."""
    rows, columns = mask.shape
    fig, (axis,) = figure(min(11, 0.82 * columns + 0.6), 0.42 * rows + 0.9)
    for row in range(rows):
        for column in range(columns):
            real, piece = bool(mask[row, column]), pieces[row][column]
            colour = GREY if not real else ORANGE if piece.startswith("[") else BLUE
            axis.add_patch(
                Rectangle(
                    (column, row),
                    0.96,
                    0.86,
                    facecolor=colour if real else "#EEEEEE",
                    hatch="" if real else "////",
                    edgecolor="white",
                    alpha=0.9,
                )
            )
            axis.text(
                column + 0.48,
                row + 0.43,
                piece,
                ha="center",
                va="center",
                fontsize=7.5,
                color="white" if real else GREY,
            )
    axis.set(xlim=(0, columns), ylim=(rows, 0), title=title, xlabel="position in the sequence", ylabel="caption")
    axis.set_yticks([r + 0.43 for r in range(rows)], [str(r + 1) for r in range(rows)])
    axis.set_xticks([c + 0.48 for c in range(columns)], [str(c) for c in range(columns)])
    real = int(mask.sum())
    show(fig, f"{title}: {rows} rows of {columns} positions; {real} hold word pieces, {mask.numel() - real} padding.")


def principal_plane(points: Tensor) -> tuple[Tensor, Tensor]:
    """The two directions of largest variance: mean `(D,)` and axes `(D, 2)`, for `(points - mean) @ axes`."""
    mean = points.mean(dim=0)
    _, _, directions = torch.linalg.svd(points - mean, full_matrices=False)
    return mean, directions[:2].T
