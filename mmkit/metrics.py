"""Figures of numbers alone: thresholds, constants, calibration, ranks, and how sure a figure is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import MmkitError

RESAMPLES = 1000
DIRECTIONS, CUTS = ("image_to_text", "text_to_image"), (1, 5, 10)  # of the recalls
_BLOCK = 2**22  # logits held at a time while ranks are counted: 16 MB, and as much again for each comparison
_DRAWS = 2**22  # images drawn at a time by the bootstrap: 32 MB


class Interval(NamedTuple):
    """Where a figure lies with the confidence asked for, in the figure's unit."""

    low: float
    high: float


class Spread(NamedTuple):
    """Mean of several runs and their sample standard deviation (n − 1)."""

    mean: float
    deviation: float


# --- matching ------------------------------------------------------------------------------------


def best_threshold(logits: Tensor, labels: Tensor) -> float:
    """The threshold of highest accuracy of `logits > threshold`, halfway between two neighbouring logits."""
    order = logits.argsort()
    ordered, matched = logits[order].double(), labels[order].long()
    # cut k: the k lowest logits are called unmatched
    correct = torch.cat([matched.new_zeros(1), (1 - matched).cumsum(0)]) + matched.sum()
    correct[1:] -= matched.cumsum(0)
    allowed = torch.cat([torch.tensor([True]), ordered[1:] > ordered[:-1], torch.tensor([True])])
    cut = int(torch.where(allowed, correct, -1).argmax())
    edges = torch.cat([ordered[:1] - 1, ordered, ordered[-1:] + 1])
    return float((edges[cut] + edges[cut + 1]) / 2)


def constant_scores(labels: Tensor) -> dict[str, dict[str, float]]:
    """What the answers "always" and "never" score at the balance of `labels` `(P,)` in {0, 1}.

    With a share p of matched pairs "always" has accuracy p and F1 2p / (1 + p), "never" 1 − p and 0; neither sorts,
    so the average precision of both is p. A figure means something only beside these.
    """
    share = float(labels.double().mean()) if len(labels) else 0.0
    if not 0 < share < 1:
        raise MmkitError(
            "Constants are defined where there are matched and unmatched pairs; these are all of one kind."
        )
    return {
        "always": {"accuracy": share, "f1": 2 * share / (1 + share), "average_precision": share},
        "never": {"accuracy": 1 - share, "f1": 0.0, "average_precision": share},
    }


@dataclass(frozen=True, eq=False)
class Reliability:
    """A reliability curve: for each of B bins between two `edges` `(B + 1,)` the mean probability that was claimed
    (`confidence`), the share of pairs that did match (`accuracy`), both NaN where `count` is 0, all `(B,)`.

    `ece` is the expected calibration error: the mean of |accuracy − confidence| over the bins, weighted by count.
    """

    edges: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray
    ece: float


def reliability(logits: Tensor, labels: Tensor, bins: int = 10) -> Reliability:
    """How well sigmoid(logit) is a probability: `logits` and `labels` in {0, 1}, both `(P,)`.

    Guo et al. 2017, section 2, on the two-class case: the claimed probability is that of "matched", so the bins
    (equal widths, open on the left) run from 0 to 1. The logit is taken as it is: a threshold chosen for accuracy
    moves the decision and not the claim. It holds at the labels' balance only; at 1:7 the same fuser is overconfident.
    """
    if bins < 1 or len(logits) != len(labels) or not len(logits):
        raise MmkitError(
            f"{bins} bins of {len(logits)} logits and {len(labels)} labels; at least one of each is needed."
        )
    if torch.isnan(logits).any():
        raise MmkitError("The logits hold NaN; they claim no probability.")
    claimed, matched = torch.sigmoid(logits.double()).cpu().numpy(), labels.cpu().numpy()
    edges = np.linspace(0, 1, bins + 1)
    place = np.searchsorted(edges[1:-1], claimed)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin
        confidence, accuracy = (np.bincount(place, part, bins) / count for part in (claimed, matched))
    ece = float(np.nansum(np.abs(accuracy - confidence) * count) / len(claimed))
    return Reliability(edges, confidence, accuracy, count, ece)


# --- ranks ---------------------------------------------------------------------------------------


def count_ranks(
    score_rows: Callable[[Tensor], Tensor], own: Tensor, owner: Tensor, images: int, block: int
) -> tuple[Tensor, Tensor]:
    """`ranks`, with `block` rows of the scores at a time: `score_rows(rows)` gives `(len(rows), M)`, and `own` `(M,)`
    is each caption's score with its image."""
    image_ranks, caption_ranks = [], torch.zeros_like(owner)
    for rows in torch.arange(images, device=owner.device).split(block):
        scores, others = score_rows(rows), owner != rows[:, None]
        if torch.isnan(scores).any():
            raise MmkitError("The scores hold NaN; they cannot be ranked.")
        best = scores.masked_fill(others, -torch.inf).amax(dim=1, keepdim=True)
        image_ranks.append(1 + ((scores >= best) & others).sum(dim=1))
        caption_ranks += ((scores >= own) & others).sum(dim=0)
    return torch.cat(image_ranks), 1 + caption_ranks


def rows_at_a_time(captions: int) -> int:
    """How many images' logits with so many captions are held at once."""
    return max(1, _BLOCK // max(1, captions))


def ranks(scores: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks from 1 of the true matches in `scores` `(N, M)`: per image `(N,)` and per caption `(M,)`.

    An image's rank is that of its best caption among the captions of other images; a caption's that of its image. They
    are counted, not sorted, and ties are resolved against the model. `owner[j]` is caption `j`'s image.
    """
    if scores.shape[1] != len(owner):
        raise MmkitError(f"scores have {scores.shape[1]} columns for {len(owner)} captions.")
    owner = owner.to(scores.device)
    own = scores[owner, torch.arange(len(owner), device=scores.device)]
    return count_ranks(lambda rows: scores[rows], own, owner, len(scores), rows_at_a_time(len(owner)))


# --- how sure a figure is ------------------------------------------------------------------------


def resampled(sums: np.ndarray, counts: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """`(resamples, K)`: K means, each Σ sums / Σ counts over as many images as there are, drawn with replacement.

    `sums` and `counts` `(N, K)` are those of each image, over its captions or pairs. All K means of a resample are of
    the same images, so that sums of them (rsum) vary as they should. NaN where the images drawn count nothing.
    """
    images, means = len(sums), []
    rng = np.random.default_rng(seed)
    for first in range(0, resamples, step := max(1, _DRAWS // images)):
        some = min(step, resamples - first)
        drawn = rng.integers(images, size=(some, images)) + images * np.arange(some)[:, None]
        times = np.bincount(drawn.ravel(), minlength=some * images).reshape(some, images).astype(float)
        with np.errstate(invalid="ignore"):
            means.append((times @ sums) / (times @ counts))
    return np.concatenate(means)


def percentiles(figures: np.ndarray, level: float = 0.95) -> Interval:
    """The percentile interval of resampled `figures` `(resamples,)`, those that are NaN left out."""
    tail = (1 - level) / 2
    return Interval(*map(float, np.nanquantile(figures, [tail, 1 - tail])))


def bootstrap(
    sums: np.ndarray | Tensor,
    counts: np.ndarray | Tensor,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The bootstrap interval of a mean over captions or pairs: `sums` and `counts` of each image, `(N,)` both.

    The percentile interval of Efron & Tibshirani 1993, chapter 13. The captions of an image are dependent, so whole
    images are drawn, each with all its captions. The pool stays what it was: the interval tells how the figure varies
    with the queries and not with the size of the pool. A figure of exactly 0 or 1 gets an interval of no width, for
    the sample holds no other outcome; of n images that all agree, up to 3 / n of all others may not.
    """
    sums, counts = (np.asarray(part, dtype=float) for part in (sums, counts))
    if sums.ndim != 1 or sums.shape != counts.shape or len(sums) < 2 or not counts.sum() > 0:
        raise MmkitError(
            f"An interval needs sums and counts of the same images, at least two; these have shapes {sums.shape} and "
            f"{counts.shape}."
        )
    return percentiles(resampled(sums[:, None], counts[:, None], resamples, seed)[:, 0], level)


def retrieval_intervals(
    image_ranks: Tensor, caption_ranks: Tensor, owner: Tensor, seed: int = 0
) -> dict[str, Interval]:
    """The 95 % intervals of the six recalls, as fractions, and of rsum, in percent; see `bootstrap`.

    From the ranks `(N,)` and `(M,)`: an image is drawn together with its captions, in both directions at once.
    """
    images = len(image_ranks)
    if images < 2:
        return {}
    owner, ones = owner.cpu(), torch.ones(images, dtype=torch.double)
    captions = owner.bincount(minlength=images).double()
    found = [(image_ranks.cpu() <= k).double() for k in CUTS]
    found += [owner.bincount((caption_ranks.cpu() <= k).double(), minlength=images) for k in CUTS]
    counts = [ones] * len(CUTS) + [captions] * len(CUTS)
    figures = resampled(torch.stack(found, dim=1).numpy(), torch.stack(counts, dim=1).numpy(), seed=seed)
    names = [f"{direction}.r{k}" for direction in DIRECTIONS for k in CUTS]
    intervals = {name: percentiles(column) for name, column in zip(names, figures.T, strict=True)}
    return intervals | {"rsum": percentiles(100 * figures.sum(axis=1))}


def mean_and_deviation(reports: Sequence[Mapping]) -> dict:
    """Reports of several seeds, as dicts of numbers or of such dicts, → the same shape with a `Spread` for each number.

    The deviation is the sample's (n − 1), so at least two reports are needed; all must have the same names.
    """
    if len(reports) < 2:
        raise MmkitError("A deviation needs at least two reports. Remedy: evaluate with several seeds.")
    first = reports[0]
    if any(report.keys() != first.keys() for report in reports):
        raise MmkitError(f"The reports have different names: {[sorted(report) for report in reports]}")
    found = {}
    for name, value in first.items():
        values = [report[name] for report in reports]
        if isinstance(value, Mapping):
            found[name] = mean_and_deviation(values)
        else:
            found[name] = Spread(float(np.mean(values)), float(np.std(values, ddof=1)))
    return found
