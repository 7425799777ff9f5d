"""Matching and retrieval under named protocols, and two checks that expose a leak."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from torch import Tensor

from .errors import MmkitError
from .features import PairedFeatures
from .fusers import PairFuser

NEGATIVES = ("random", "hard")
_CHUNK = 4096


@dataclass(frozen=True)
class Matching:
    """Matched against unmatched pairs, 1:1. Fractions; `negatives` names the protocol, `pool` the images and captions
    that a transductive fuser saw."""

    negatives: str
    accuracy: float
    f1: float
    roc_auc: float
    average_precision: float
    threshold: float
    pairs: int
    pool: tuple[int, int]


@dataclass(frozen=True)
class Recall:
    """Fractions of queries with a true match in the first 1, 5 and 10, and the median rank (1 is best)."""

    r1: float
    r5: float
    r10: float
    median_rank: float


@dataclass(frozen=True)
class Retrieval:
    """Both directions over a pool of `pool` images and captions. `rsum` is the sum of the six recalls in percent."""

    image_to_text: Recall
    text_to_image: Recall
    pool: tuple[int, int]

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
    texts = F.normalize(features.captions(), dim=-1)
    nearest = []
    for rows in captions.split(_CHUNK):
        similarity = (texts[rows] @ texts.T).masked_fill(owner[rows, None] == owner, -torch.inf)
        nearest.append(similarity.argmax(dim=1))
    return owner, torch.cat(nearest)


@torch.inference_mode()
def matching_logits(fuser: PairFuser, features: PairedFeatures, kind: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Match logits `(2M,)` of all true pairs and as many unmatched ones, and their labels in {0, 1}."""
    fuser.eval()
    device = next(fuser.parameters()).device
    image_nodes, text_nodes = fuser.nodes(features.images().to(device), features.captions().to(device))
    negative_images, negative_texts = negative_pairs(features, kind, seed)
    images = torch.cat([features.owner, negative_images]).to(device)
    texts = torch.cat([torch.arange(len(features.owner)), negative_texts]).to(device)
    logits = [
        fuser.match(image_nodes[i], text_nodes[t])
        for i, t in zip(images.split(_CHUNK), texts.split(_CHUNK), strict=True)
    ]
    labels = torch.arange(len(images)) < len(features.owner)
    return torch.cat(logits).cpu(), labels.long()


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


def choose_thresholds(fuser: PairFuser, validation: PairedFeatures, seed: int = 0) -> dict[str, float]:
    """The threshold of each kind of negatives, chosen on the validation split and nowhere else."""
    return {kind: best_threshold(*matching_logits(fuser, validation, kind, seed)) for kind in NEGATIVES}


def matching_report(
    fuser: PairFuser, features: PairedFeatures, thresholds: dict[str, float], seed: int = 0
) -> dict[str, Matching]:
    """Accuracy, F1, ROC-AUC and average precision for each kind of negatives, at thresholds from `choose_thresholds`.

    Beside it stand the constants: at 1:1 any constant has accuracy 0.5, and "always matched" has F1 0.667.
    """
    report = {}
    for kind in thresholds:
        logits, labels = matching_logits(fuser, features, kind, seed)
        if not torch.isfinite(logits).all():
            raise MmkitError("The fuser's logits hold NaN or infinity; it cannot be evaluated.")
        called = logits.double() > thresholds[kind]  # a threshold may lie between two neighbouring float32
        report[kind] = Matching(
            negatives=kind,
            accuracy=float((called == labels.bool()).double().mean()),
            f1=float(f1_score(labels, called)),
            roc_auc=float(roc_auc_score(labels, logits)),
            average_precision=float(average_precision_score(labels, logits)),
            threshold=thresholds[kind],
            pairs=len(labels),
            pool=(len(features.image_rows), len(features.owner)),
        )
    return report


def ranks(scores: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks from 1 of the true matches in `scores` `(N, M)`: per image `(N,)` and per caption `(M,)`.

    An image's rank is that of its best caption among the captions of other images; a caption's that of its image. They
    are counted, not sorted, and ties are resolved against the model. `owner[j]` is caption `j`'s image.
    """
    if scores.shape[1] != len(owner):
        raise MmkitError(f"scores have {scores.shape[1]} columns for {len(owner)} captions.")
    if torch.isnan(scores).any():
        raise MmkitError("The scores hold NaN; they cannot be ranked.")
    columns = torch.arange(len(owner), device=scores.device)
    owner = owner.to(scores.device)
    own = scores[owner, columns]
    best = scores.new_full((len(scores),), -torch.inf).scatter_reduce(0, owner, own, "amax")
    image_ranks, caption_ranks = [], torch.zeros_like(owner)
    for rows in torch.arange(len(scores), device=scores.device).split(max(1, 2**24 // len(owner))):
        block, others = scores[rows], owner != rows[:, None]
        image_ranks.append(1 + ((block >= best[rows, None]) & others).sum(dim=1))
        caption_ranks += ((block >= own) & others).sum(dim=0)
    return torch.cat(image_ranks), 1 + caption_ranks


def _recall(found: Tensor) -> Recall:
    places = found.cpu().numpy()
    return Recall(*(float((places <= k).mean()) for k in (1, 5, 10)), median_rank=float(np.median(places)))


@torch.inference_mode()
def retrieval_report(fuser: PairFuser, features: PairedFeatures) -> Retrieval:
    """Rank all captions for each image and all images for each caption of `features`."""
    fuser.eval()
    device = next(fuser.parameters()).device
    scores = fuser.score(features.images().to(device), features.captions().to(device))
    image_ranks, caption_ranks = ranks(scores, features.owner)
    return Retrieval(_recall(image_ranks), _recall(caption_ranks), tuple(scores.shape))


def report_json(features: PairedFeatures, matching: dict[str, Matching], retrieval: Retrieval) -> dict:
    """Both reports as plain numbers, fractions but for the sizes and the median rank."""
    directions = {name: getattr(retrieval, name) for name in ("image_to_text", "text_to_image")}
    return {
        "sizes": {"images": len(features.image_rows), "captions": len(features.owner)},
        "matching": {
            kind: {name: getattr(row, name) for name in ("accuracy", "f1", "roc_auc", "average_precision")}
            for kind, row in matching.items()
        },
        "retrieval": {name: asdict(recall) for name, recall in directions.items()},
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
) -> float:
    """Caption→image R@1 on held-out pairs of pure noise, after `train(noise, validation)` has seen others.

    There is nothing to learn, so an honest fuser is at chance, 1 / `held_out`. Anything more is a leak: the
    pairing reaches the scores by another way than the features.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(n: int) -> PairedFeatures:
        images, texts = (torch.randn(n, dim, generator=generator) for dim in dims)
        return PairedFeatures.from_arrays(images, texts, range(n))

    fuser = train(noise(pairs), noise(held_out))
    return retrieval_report(fuser, noise(held_out)).text_to_image.r1
