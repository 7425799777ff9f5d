"""Matching and retrieval under named protocols, and how sure a figure is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from torch import Tensor

from .features import PairedFeatures, pad_cat
from .fusers import PairFuser
from .support import MmkitError

NEGATIVES = ("random", "hard")
DIRECTIONS, CUTS = ("image_to_text", "text_to_image"), (1, 5, 10)  # of the recalls
RESAMPLES, _ENDS = 1000, (0.025, 0.975)  # of the bootstrap, and of its intervals
_VECTORS, _STACKS, _PAIRS = 4096, 256, 1024  # items, stacks of parts, and pairs of nodes that are mapped at a time
_BLOCK = 2**22  # logits held at a time while ranks are counted: 16 MB, and as much again for each comparison


class Interval(NamedTuple):
    """Where a figure lies with 95 % confidence, in the figure's unit."""

    low: float
    high: float


@dataclass(frozen=True)
class Matching:
    """Matched against unmatched pairs, 1:1. Fractions; `intervals` holds the 95 % interval of the "accuracy"."""

    accuracy: float
    f1: float
    roc_auc: float
    average_precision: float
    pairs: int
    intervals: dict[str, Interval] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Recall:
    """Fractions of queries with a true match in the first 1, 5 and 10, and the median rank (1 is best)."""

    r1: float
    r5: float
    r10: float
    median_rank: float


@dataclass(frozen=True)
class Retrieval:
    """Both directions over a pool of `pool` images and captions. `intervals` holds the 95 % intervals of
    "image_to_text.r1" … "text_to_image.r10" and "rsum", bootstrapped over images; it is empty for a single image."""

    image_to_text: Recall
    text_to_image: Recall
    pool: tuple[int, int]
    intervals: dict[str, Interval] = field(default_factory=dict, compare=False, repr=False)

    @property
    def rsum(self) -> float:
        """The sum of the six recalls, in percent."""
        return 100 * sum(recall.r1 + recall.r5 + recall.r10 for recall in (self.image_to_text, self.text_to_image))


@dataclass(frozen=True, eq=False)
class Pool:
    """The nodes of N images and M captions, from which every figure of a report comes."""

    fuser: PairFuser
    image_nodes: Tensor
    text_nodes: Tensor
    image_index: Tensor

    @torch.inference_mode()
    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """Match logits `(P,)` of the pairs of these rows `(P,)`; an error where one is not finite."""
        blocks = zip(*(part.to(self.image_index.device).split(_PAIRS) for part in (images, texts)), strict=True)
        logits = torch.cat([self.fuser.match(self.image_nodes[rows], self.text_nodes[cols]) for rows, cols in blocks])
        if not torch.isfinite(logits).all():
            raise MmkitError("The fuser's logits hold NaN or infinity; it cannot be evaluated.")
        return logits


@torch.inference_mode()
def encode_pool(fuser: PairFuser, features: PairedFeatures, *false: PairedFeatures) -> Pool:
    """The nodes of all images and captions, and of `false` captions at the end. A transductive fuser sees the whole
    pool; of any other the features of a block of items are held at a time."""
    fuser.eval()
    device = next(fuser.parameters()).device
    views, image_index = [fuser.view(part) for part in (features, *false)], features.image_index.to(device)
    if fuser.transductive:
        texts = pad_cat([view.captions() for view in views])
        return Pool(fuser, *fuser.nodes(views[0].images().to(device), texts.to(device)), image_index)
    block = _STACKS if fuser.takes_parts else _VECTORS
    one_image, one_text = views[0].images([0]).to(device), views[0].captions([0]).to(device)
    images = torch.arange(len(features)).split(block)
    image_nodes = [fuser.nodes(views[0].images(rows).to(device), one_text)[0] for rows in images]
    texts = [(view, rows) for view in views for rows in torch.arange(len(view.image_index)).split(block)]
    text_nodes = [fuser.nodes(one_image, view.captions(rows).to(device))[1] for view, rows in texts]
    return Pool(fuser, pad_cat(image_nodes), pad_cat(text_nodes), image_index)


def negative_pairs(features: PairedFeatures, kind: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """One unmatched pair per caption: rows of images and rows of captions, `(M,)` each.

    "random": with another image, drawn by `seed`. "hard": the image with the nearest caption (cosine) of another."""
    if kind not in NEGATIVES:
        raise MmkitError(f"No negatives {kind!r}. Valid names: {', '.join(NEGATIVES)}")
    image_index = features.image_index
    if len(image_index.unique()) < 2:
        raise MmkitError("Unmatched pairs need captions of at least two images.")
    captions = torch.arange(len(image_index))
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        shift = torch.randint(1, len(features), captions.shape, generator=generator)
        return (image_index + shift) % len(features), captions
    texts = F.normalize(features.vectors().captions(), dim=-1)
    nearest = [(texts[rows] @ texts.T).masked_fill(image_index[rows, None] == image_index, -torch.inf).argmax(dim=1)
               for rows in captions.split(_VECTORS)]  # fmt: skip
    return image_index, torch.cat(nearest)


def matching_logits(fuser: PairFuser, features: PairedFeatures, kind: str, seed: int = 0,
                    pool: Pool | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Match logits `(2M,)` of all true pairs and as many unmatched ones, and their labels in {0, 1}."""
    pool = pool or encode_pool(fuser, features)
    images, texts = negative_pairs(features, kind, seed)
    images = torch.cat([features.image_index, images])
    texts = torch.cat([torch.arange(len(features.image_index)), texts])
    return pool.logits(images, texts).cpu(), (torch.arange(len(images)) < len(features.image_index)).long()


def best_threshold(logits: Tensor, labels: Tensor) -> float:
    """The threshold of highest accuracy of `logits > threshold`, halfway between two neighbouring logits."""
    order = logits.argsort()
    ordered, matched = logits[order].double(), labels[order].long()
    # cut k: the k lowest logits are called unmatched
    correct = torch.cat([matched.new_zeros(1), (1 - 2 * matched).cumsum(0)]) + matched.sum()
    allowed = torch.cat([torch.tensor([True]), ordered[1:] > ordered[:-1], torch.tensor([True])])
    cut = int(torch.where(allowed, correct, -1).argmax())
    edges = torch.cat([ordered[:1] - 1, ordered, ordered[-1:] + 1])
    return float((edges[cut] + edges[cut + 1]) / 2)


def choose_thresholds(fuser: PairFuser, validation: PairedFeatures, seed: int = 0) -> dict[str, float]:
    """The threshold of each kind of negatives, chosen on the validation split and nowhere else."""
    pool = encode_pool(fuser, validation)
    return {kind: best_threshold(*matching_logits(fuser, validation, kind, seed, pool)) for kind in NEGATIVES}


def matching_report(fuser: PairFuser, features: PairedFeatures, thresholds: dict[str, float], seed: int = 0,
                    pool: Pool | None = None) -> dict[str, Matching]:  # fmt: skip
    """Accuracy, F1, ROC-AUC and average precision for each kind of negatives, at thresholds from `choose_thresholds`.

    At 1:1 any constant has accuracy 0.5, and "always matched" has F1 0.667. A logit on the threshold is unmatched."""
    report, pool = {}, pool or encode_pool(fuser, features)
    by_pair = features.image_index.repeat(2)
    counts = by_pair.bincount(minlength=len(features))
    for kind, threshold in thresholds.items():
        logits, labels = matching_logits(fuser, features, kind, seed, pool)
        called = logits.double() > threshold  # a threshold may lie between two neighbouring float32
        correct = (called == labels.bool()).double()
        sums = by_pair.bincount(correct, minlength=len(features))
        figures = f1_score(labels, called), roc_auc_score(labels, logits), average_precision_score(labels, logits)
        intervals = {"accuracy": bootstrap(sums, counts, seed)}
        report[kind] = Matching(float(correct.mean()), *map(float, figures), len(labels), intervals)
    return report


def ranks(scores: Tensor, image_index: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks from 1 of the true matches in `scores` `(N, M)`: per image `(N,)` and per caption `(M,)`.

    An image's rank is that of its best caption among those of other images. Ties are resolved against the model."""
    if scores.shape[1] != len(image_index):
        raise MmkitError(f"scores have {scores.shape[1]} columns for {len(image_index)} captions.")
    image_index = image_index.to(scores.device)
    true = scores[image_index, torch.arange(len(image_index), device=scores.device)]
    return _count_ranks(lambda rows: scores[rows], true, image_index, len(scores))


def _count_ranks(score_rows: Callable[[Tensor], Tensor], true: Tensor, image_index: Tensor,
                 images: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`ranks`, a block of images at a time; `true` `(M,)` is each caption's score with its image."""
    image_ranks, caption_ranks = [], torch.zeros_like(image_index)
    for rows in torch.arange(images, device=image_index.device).split(max(1, _BLOCK // max(1, len(image_index)))):
        scores, others = score_rows(rows), image_index != rows[:, None]
        if torch.isnan(scores).any():
            raise MmkitError("The scores hold NaN; they cannot be ranked.")
        best = scores.masked_fill(others, -torch.inf).amax(dim=1, keepdim=True)
        image_ranks.append(1 + ((scores >= best) & others).sum(dim=1))
        caption_ranks += ((scores >= true) & others).sum(dim=0)
    return torch.cat(image_ranks), 1 + caption_ranks


@torch.inference_mode()
def pool_ranks(pool: Pool) -> tuple[Tensor, Tensor]:
    """`ranks` of a pool of any size: a block of logits is held at a time, unless the fuser is transductive."""
    fuser, image_index, images = pool.fuser, pool.image_index, len(pool.image_nodes)
    texts, block = pool.text_nodes[: len(image_index)], max(1, _BLOCK // len(image_index))
    if fuser.transductive or block >= images:
        return ranks(fuser.score_nodes(pool.image_nodes, texts), image_index)
    true = pool.image_nodes.new_zeros(len(texts))
    for rows in torch.arange(images, device=image_index.device).split(block):
        captions = torch.isin(image_index, rows).nonzero().flatten()
        scores = fuser.score_nodes(pool.image_nodes[rows], texts[captions])
        true[captions] = scores[image_index[captions] - rows[0], torch.arange(len(captions), device=rows.device)]
    return _count_ranks(lambda rows: fuser.score_nodes(pool.image_nodes[rows], texts), true, image_index, images)


@torch.inference_mode()
def shortlist_ranks(pool: Pool, size: int) -> tuple[Tensor, Tensor]:
    """`ranks`, where of each query the `size` candidates of the largest `fuser.shortlist_scores` are ranked by their
    match logits, and all others after them by that cheap score, of which all `(N, M)` are held."""
    if size < 1:
        raise MmkitError(f"A shortlist of {size} candidates; it takes at least one.")
    images, texts = pool.image_nodes, pool.text_nodes[: len(pool.image_index)]
    cheap = pool.fuser.shortlist_scores(images, texts)
    nothing, logits = torch.zeros_like(cheap, dtype=torch.bool), torch.zeros_like(cheap, dtype=torch.double)
    of_images = nothing.scatter(1, cheap.topk(min(size, len(texts)), dim=1).indices, True)
    of_captions = nothing.scatter(0, cheap.topk(min(size, len(images)), dim=0).indices, True)
    for row, candidates in enumerate(of_images | of_captions):
        # an image with all its candidates at once: its node is read once, and a fuser's way to score all pairs serves
        logits[row, candidates] = pool.fuser.score_nodes(images[row, None], texts[candidates])[0].double()
    behind = cheap.double() - (cheap.max() - logits.min() + 1)  # in double, or neighbours would become ties
    image_ranks, _ = ranks(torch.where(of_images, logits, behind), pool.image_index)
    return image_ranks, ranks(torch.where(of_captions, logits, behind), pool.image_index)[1]


def retrieval_report(fuser: PairFuser, features: PairedFeatures, shortlist: int = 0,
                     pool: Pool | None = None) -> Retrieval:  # fmt: skip
    """Rank all captions for each image and all images for each caption; with a `shortlist` see `shortlist_ranks`."""
    pool = pool or encode_pool(fuser, features)
    both = [part.cpu().numpy() for part in (shortlist_ranks(pool, shortlist) if shortlist else pool_ranks(pool))]
    recalls = [Recall(*(float((part <= k).mean()) for k in CUTS), median_rank=float(np.median(part))) for part in both]
    intervals = _recall_intervals(both, features.image_index.numpy())
    return Retrieval(*recalls, (len(features), len(features.image_index)), intervals)


def bootstrap(sums: np.ndarray | Tensor, counts: np.ndarray | Tensor, seed: int = 0) -> Interval:
    """The 95 % bootstrap interval of a mean over captions or pairs: `sums` and `counts` of each image, `(N,)` both.

    The percentile interval of Efron & Tibshirani 1993, chapter 13. The captions of an image are dependent, so whole
    images are drawn. The pool stays what it was. Where all n images agree, up to 3 / n of all others may not."""
    sums, counts = (np.asarray(part, dtype=float) for part in (sums, counts))
    if sums.ndim != 1 or sums.shape != counts.shape or len(sums) < 2 or not counts.sum() > 0:
        raise MmkitError(f"An interval needs sums and counts of two images or more, not {sums.shape}, {counts.shape}.")
    return Interval(*np.nanquantile(_resampled(sums, counts, seed), _ENDS).tolist())


def _resampled(sums: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """Means `(RESAMPLES, …)`, Σ sums / Σ counts of `(N, …)` both, over the same N images drawn with replacement."""
    rng, images, means = np.random.default_rng(seed), len(sums), []
    for _ in range(RESAMPLES):
        times = np.bincount(rng.integers(images, size=images), minlength=images).astype(float)
        with np.errstate(invalid="ignore"):
            means.append(times @ sums / (times @ counts))
    return np.stack(means)


def _recall_intervals(both: list[np.ndarray], image_index: np.ndarray) -> dict[str, Interval]:
    """The intervals of the six recalls and of rsum, from the ranks of images `(N,)` and of captions `(M,)`."""
    image_ranks, caption_ranks = both
    if (images := len(image_ranks)) < 2:
        return {}
    sums = [image_ranks <= k for k in CUTS]
    sums += [np.bincount(image_index, caption_ranks <= k, images) for k in CUTS]
    counts = [np.ones(images)] * 3 + [np.bincount(image_index, minlength=images)] * 3
    figures = _resampled(np.stack(sums, axis=1), np.stack(counts, axis=1), 0)
    ends = np.nanquantile(np.column_stack([figures, 100 * figures.sum(axis=1)]), _ENDS, axis=0).T.tolist()
    names = [*(f"{way}.r{k}" for way in DIRECTIONS for k in CUTS), "rsum"]
    return {name: Interval(*pair) for name, pair in zip(names, ends, strict=True)}
