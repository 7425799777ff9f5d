"""Matching and retrieval under named protocols, and two checks that expose a leak."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from torch import Tensor

from .errors import MmkitError
from .features import PairedFeatures, cat_parts
from .fusers import PairFuser
from .metrics import (
    CUTS,
    DIRECTIONS,
    Interval,
    best_threshold,
    bootstrap,
    constant_scores,
    count_ranks,
    ranks,
    retrieval_intervals,
    rows_at_a_time,
)
from .shortlist import pair_logits, shortlist_ranks

NEGATIVES = ("random", "hard")
_CHUNK = 4096  # items that are vectors
_STACKS = 256  # items that are stacks of parts


@dataclass(frozen=True)
class Matching:
    """Matched against unmatched pairs, 1:1. Fractions; `negatives` names the protocol, `pool` the images and captions
    that a transductive fuser saw. `intervals` holds the 95 % interval of the "accuracy", bootstrapped over images."""

    negatives: str
    accuracy: float
    f1: float
    roc_auc: float
    average_precision: float
    threshold: float
    pairs: int
    pool: tuple[int, int]
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
    """Both directions over a pool of `pool` images and captions. `rsum` is the sum of the six recalls in percent.

    `intervals` holds the 95 % intervals of "image_to_text.r1" … "text_to_image.r10" and "rsum", bootstrapped over
    images; it is empty for a single image.
    """

    image_to_text: Recall
    text_to_image: Recall
    pool: tuple[int, int]
    intervals: dict[str, Interval] = field(default_factory=dict, compare=False, repr=False)

    @property
    def rsum(self) -> float:
        directions = (self.image_to_text, self.text_to_image)
        return 100 * sum(recall.r1 + recall.r5 + recall.r10 for recall in directions)


def negative_pairs(features: PairedFeatures, kind: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """One unmatched pair per caption: rows of images and rows of captions, `(M,)` each.

    "random": the caption with another image, drawn evenly by `seed`. "hard": the caption's image with the nearest
    caption (cosine of text features) of another image.
    """
    if kind not in NEGATIVES:
        raise MmkitError(f"No negatives {kind!r}. Valid names: {', '.join(NEGATIVES)}")
    owner, n = features.owner, len(features.image_rows)
    if len(owner.unique()) < 2:
        raise MmkitError("Unmatched pairs need captions of at least two images.")
    captions = torch.arange(len(owner))
    if kind == "random":
        shift = torch.randint(1, n, (len(owner),), generator=torch.Generator().manual_seed(seed))
        return (owner + shift) % n, captions
    texts = F.normalize(features.vectors().captions(), dim=-1)
    nearest = []
    for rows in captions.split(_CHUNK):
        similarity = (texts[rows] @ texts.T).masked_fill(owner[rows, None] == owner, -torch.inf)
        nearest.append(similarity.argmax(dim=1))
    return owner, torch.cat(nearest)


def pool_nodes(fuser: PairFuser, features: PairedFeatures, *false: PairedFeatures) -> tuple[Tensor, Tensor]:
    """The nodes of a pool: its images and its captions, to which the captions of `false` are added at the end.

    A transductive fuser sees the whole pool; any other takes it block by block, so that the features of all items are
    never held at once. Call it under inference mode.
    """
    fuser.eval()
    device = next(fuser.parameters()).device
    views = [fuser.view(part) for part in (features, *false)]
    if fuser.transductive:
        return fuser.nodes(views[0].images().to(device), cat_parts([view.captions() for view in views]).to(device))
    block = _STACKS if fuser.takes_parts else _CHUNK
    one_image, one_text = (part.to(device) for part in (views[0].images([0]), views[0].captions([0])))
    images = torch.arange(len(features.image_rows)).split(block)
    image_nodes = [fuser.nodes(views[0].images(rows).to(device), one_text)[0] for rows in images]
    text_nodes = [
        fuser.nodes(one_image, view.captions(rows).to(device))[1]
        for view in views
        for rows in torch.arange(len(view.owner)).split(block)
        if len(rows)
    ]
    return cat_parts(image_nodes), cat_parts(text_nodes)


@torch.inference_mode()
def matching_logits(fuser: PairFuser, features: PairedFeatures, kind: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Match logits `(2M,)` of all true pairs and as many unmatched ones, and their labels in {0, 1}."""
    image_nodes, text_nodes = pool_nodes(fuser, features)
    device = text_nodes.device
    negative_images, negative_texts = negative_pairs(features, kind, seed)
    images = torch.cat([features.owner, negative_images]).to(device)
    texts = torch.cat([torch.arange(len(features.owner)), negative_texts]).to(device)
    logits = pair_logits(fuser, image_nodes, text_nodes, images, texts)
    labels = torch.arange(len(images)) < len(features.owner)
    return logits.cpu(), labels.long()


def choose_thresholds(fuser: PairFuser, validation: PairedFeatures, seed: int = 0) -> dict[str, float]:
    """The threshold of each kind of negatives, chosen on the validation split and nowhere else."""
    return {kind: best_threshold(*matching_logits(fuser, validation, kind, seed)) for kind in NEGATIVES}


def matching_report(
    fuser: PairFuser, features: PairedFeatures, thresholds: dict[str, float], seed: int = 0
) -> dict[str, Matching]:
    """Accuracy, F1, ROC-AUC and average precision for each kind of negatives, at thresholds from `choose_thresholds`.

    Beside it stand the constants (`constant_scores`): at 1:1 any constant has accuracy 0.5, and "always matched" has
    F1 0.667. A logit on the threshold counts as unmatched; ties between logits count half in ROC-AUC and are called
    together in average precision.
    """
    report = {}
    for kind in thresholds:
        logits, labels = matching_logits(fuser, features, kind, seed)
        if not torch.isfinite(logits).all():
            raise MmkitError("The fuser's logits hold NaN or infinity; it cannot be evaluated.")
        called = logits.double() > thresholds[kind]  # a threshold may lie between two neighbouring float32
        correct = called == labels.bool()
        report[kind] = Matching(
            negatives=kind,
            accuracy=float(correct.double().mean()),
            f1=float(f1_score(labels, called)),
            roc_auc=float(roc_auc_score(labels, logits)),
            average_precision=float(average_precision_score(labels, logits)),
            threshold=thresholds[kind],
            pairs=len(labels),
            pool=(len(features.image_rows), len(features.owner)),
            intervals={"accuracy": bootstrap(*_per_image(correct, features), seed=seed)},
        )
    return report


def _per_image(correct: Tensor, features: PairedFeatures) -> tuple[Tensor, Tensor]:
    """Sums of `correct` and numbers of pairs, `(N,)` each. Both pairs of a caption count for the image it belongs to,
    since they share the caption."""
    owner = features.owner.repeat(len(correct) // len(features.owner))
    images = len(features.image_rows)
    return owner.bincount(correct.double(), minlength=images), owner.bincount(minlength=images)


def scorer(fuser: PairFuser, features: PairedFeatures) -> Callable[..., Tensor]:
    """A function `(rows, columns)` → the logits of these images and captions of the pool (by default all captions).

    A transductive fuser's logits depend on the pool, so it scores the whole pool once, and all N·M logits are held;
    of any other the nodes are held, and logits are computed when they are asked for. Call it under inference mode.
    """
    image_nodes, text_nodes = pool_nodes(fuser, features)
    if fuser.transductive:
        scores = fuser.score_nodes(image_nodes, text_nodes)
        return lambda rows, columns=slice(None): scores[rows][:, columns]
    return lambda rows, columns=slice(None): fuser.score_nodes(image_nodes[rows], text_nodes[columns])


@torch.inference_mode()
def ranked(
    fuser: PairFuser, features: PairedFeatures, block: int | None = None, shortlist: int = 0
) -> tuple[Tensor, Tensor]:
    """`ranks` of a pool of any size: per image `(N,)` and per caption `(M,)`, on the fuser's device.

    The logits of `block` images with all captions are held at a time (by default 16 MB of them), never all N·M, unless
    the fuser is transductive (see `scorer`). The price: the true pairs are scored twice. With a `shortlist` only so
    many candidates of each query are scored (see `shortlist_ranks`), which the fusers of parts need in large pools.
    """
    if shortlist:
        image_nodes, text_nodes = pool_nodes(fuser, features)
        return shortlist_ranks(fuser, image_nodes, text_nodes, features.owner.to(text_nodes.device), shortlist)
    weight = next(fuser.parameters())
    score, owner = scorer(fuser, features), features.owner.to(weight.device)
    images, block = len(features.image_rows), block or rows_at_a_time(len(features.owner))
    if block >= images:
        return ranks(score(torch.arange(images, device=owner.device)), owner)
    own = weight.new_zeros(len(owner))
    for rows in torch.arange(images, device=owner.device).split(block):
        mine = torch.isin(owner, rows).nonzero().flatten()
        own[mine] = score(rows, mine)[owner[mine] - rows[0], torch.arange(len(mine), device=owner.device)]
    return count_ranks(score, own, owner, images, block)


def _recall(found: Tensor) -> Recall:
    places = found.cpu().numpy()
    return Recall(*(float((places <= k).mean()) for k in CUTS), median_rank=float(np.median(places)))


def retrieval_report(fuser: PairFuser, features: PairedFeatures, shortlist: int = 0) -> Retrieval:
    """Rank all captions for each image and all images for each caption of `features`; with a `shortlist`, only so many
    candidates of each query by the match logit, and the rest after them by a cheap score (see `shortlist_ranks`)."""
    image_ranks, caption_ranks = ranked(fuser, features, shortlist=shortlist)
    return Retrieval(
        _recall(image_ranks),
        _recall(caption_ranks),
        (len(image_ranks), len(caption_ranks)),
        retrieval_intervals(image_ranks, caption_ranks, features.owner),
    )


def report_json(features: PairedFeatures, matching: dict[str, Matching], retrieval: Retrieval) -> dict:
    """Both reports as plain numbers, fractions but for the sizes, the median rank and rsum (percent).

    "constants" is what "always" and "never" score at these pairs' balance; "intervals" the 95 % intervals, by the name
    of the negatives and under "retrieval".
    """
    directions = {name: getattr(retrieval, name) for name in DIRECTIONS}
    intervals = {kind: row.intervals for kind, row in matching.items()} | {"retrieval": retrieval.intervals}
    return {
        "sizes": {"images": len(features.image_rows), "captions": len(features.owner)},
        "matching": {
            kind: {name: getattr(row, name) for name in ("accuracy", "f1", "roc_auc", "average_precision")}
            for kind, row in matching.items()
        },
        "retrieval": {name: asdict(recall) for name, recall in directions.items()},
        "rsum": retrieval.rsum,
        "constants": constant_scores(torch.tensor([1, 0])),  # 1:1
        "intervals": {
            part: {name: interval._asdict() for name, interval in found.items()} for part, found in intervals.items()
        },
    }


# --- checks of honesty ---------------------------------------------------------------------------


@torch.inference_mode()
def permutation_gap(fuser: PairFuser, images: Tensor, texts: Tensor, seed: int = 0) -> float:
    """The largest change of a pair's logit when the pool is reordered, over the logits' spread.

    A fuser that reads only content gives (nearly) 0; one that reads positions, and so the pairing, does not.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(len(part), generator=generator) for part in (images, texts))
    fuser.eval()
    scores, reordered = fuser.score(images, texts), fuser.score(images[rows], texts[columns])
    return float((scores[rows][:, columns] - reordered).abs().max() / scores.std().clamp(min=1e-12))


def noise_recall(
    train: Callable[[PairedFeatures, PairedFeatures], PairFuser],
    dims: tuple[int, int],
    pairs: int = 200,
    held_out: int = 200,
    seed: int = 0,
    parts: tuple[int, int] = (4, 3),
) -> float:
    """Caption→image R@1 on held-out pairs of pure noise, after `train(noise, validation)` has seen others.

    There is nothing to learn, so an honest fuser is at chance, 1 / `held_out`. Anything more is a leak: the
    pairing reaches the scores by another way than the features. `parts` are the numbers of cells and tokens, which
    fusers of parts look at.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(n: int) -> PairedFeatures:
        images, texts = (torch.randn(n, dim, generator=generator) for dim in dims)
        cells, tokens = (
            torch.randn(n, count, dim, generator=generator) for count, dim in zip(parts, dims, strict=True)
        )
        return PairedFeatures.from_arrays(images, texts, range(n), cells, tokens)

    fuser = train(noise(pairs), noise(held_out))
    return retrieval_report(fuser, noise(held_out)).text_to_image.r1
