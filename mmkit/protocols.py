"""Protocols of the literature: changed facts, 1K and 5K, and the positives that COCO's labels miss."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .data import CaptionDataset, DiagnosticNegatives
from .encoders import Encoders
from .errors import MmkitError
from .evaluation import Recall, Retrieval, pool_nodes, retrieval_report, scorer
from .extraction import _autocast
from .facts import FACTS
from .features import FalseCaptions, PairedFeatures
from .fusers import PairFuser
from .metrics import CUTS, DIRECTIONS, Interval, Spread, bootstrap, mean_and_deviation, rows_at_a_time
from .shortlist import pair_logits
from .tuning import token_ids

_ECCV_DEPTH = 50  # an image has up to 48 positives, of which R-precision looks at the first 48
_ECCV_FIGURES = ("eccv_r1", "eccv_map_at_r", "eccv_rprecision", "coco_5k_recalls", "cxc_recalls")


def subset(features: PairedFeatures, images: Sequence[int] | np.ndarray) -> PairedFeatures:
    """The features of these rows of images, in this order, with all their captions, in the captions' order."""
    rows = torch.as_tensor(images, dtype=torch.long)
    row_of = torch.full((len(features.image_rows),), -1)
    row_of[rows] = torch.arange(len(rows))
    owner = row_of[features.owner]
    kept = (owner >= 0).nonzero().flatten()
    return replace(
        features,
        image_rows=features.image_rows[rows],
        caption_rows=features.caption_rows[kept],
        owner=owner[kept],
        image_ids=features.image_ids[rows],
    )


# --- one fact changed ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Diagnostic:
    """Two captions of one image, of which one is false in `fact` alone: the share in which the true one's logit is
    higher, ties counted half, with its 95 % interval over images. Chance is 0.5. `ties` is the share of ties, `pool`
    the images and captions that a transductive fuser saw."""

    fact: str
    accuracy: float
    interval: Interval
    ties: float
    pairs: int
    pool: tuple[int, int]


def _encode(encoders: Encoders, texts: Sequence[str], precision: str, batch: int = 64) -> tuple[Tensor, list[Tensor]]:
    """Pooled features `(len(texts), text_dim)` and the tokens `(length, text_dim)` of each, in the texts' order."""
    pooled, tokens = torch.zeros(len(texts), encoders.text.dim), [torch.empty(0)] * len(texts)
    order = torch.from_numpy(np.argsort(encoders.preprocessor.token_counts(texts), kind="stable"))
    with _autocast(encoders, precision)[0]:
        for rows in order.split(batch) if len(texts) else ():
            output = encoders.text(**encoders.preprocessor.preprocess_text([texts[row] for row in rows]))
            pooled[rows] = output.pooled.float().cpu()
            for row, found, mask in zip(rows.tolist(), output.tokens, output.mask, strict=True):
                tokens[row] = found[mask.bool()].float().cpu()
    return pooled, tokens


def encode_texts(encoders: Encoders, texts: Sequence[str], precision: str = "auto", batch: int = 64) -> Tensor:
    """Pooled features float32 `(len(texts), text_dim)` in the texts' order, computed as `extract_features` does:
    batches of equal length, in its `precision`."""
    return _encode(encoders, texts, precision, batch)[0]


def _as_features(
    features: PairedFeatures, encoders: Encoders, texts: Sequence[str], images: Sequence[int], precision: str
) -> PairedFeatures:
    """`texts` as further captions of these rows of images, rounded as the store's are: both captions of a pair must
    have come the same way."""
    pooled, tokens = _encode(encoders, texts, precision)
    kind, ends = features.sources["captions"].dtype, np.cumsum([len(found) for found in tokens], dtype=np.int64)
    sources = features.sources | {"captions": pooled.numpy().astype(kind)}
    if "tokens" in sources:
        spans = np.stack([np.concatenate([[0], ends[:-1]]), np.diff(ends, prepend=0)], axis=1)
        sources |= {"tokens": torch.cat(tokens).numpy().astype(kind), "token_spans": spans}
    if "token_ids" in sources:
        sources |= {"token_ids": token_ids(texts, encoders.preprocessor)}
    owner = torch.as_tensor(images, dtype=torch.long)
    return replace(features, sources=sources, caption_rows=np.arange(len(texts)), owner=owner)


def _dataset_of(dataset: CaptionDataset, features: PairedFeatures) -> CaptionDataset:
    """The part of the dataset that the features are of, in their order."""
    position = {image: place for place, image in enumerate(dataset.image_ids)}
    if missing := [image for image in features.image_ids.tolist() if image not in position]:
        raise MmkitError(
            f"{len(missing):,} images of the features are not in the dataset, the first with id {missing[0]}. Remedy: "
            "give the dataset that the features were extracted from."
        )
    chosen = dataset.select([position[image] for image in features.image_ids.tolist()])
    if not np.array_equal(chosen.caption_image, features.owner):
        raise MmkitError(
            "The dataset's captions are not those of the features. Remedy: features = store.select(images)"
        )
    return chosen


def diagnostic_pairs(
    dataset: CaptionDataset,
    features: PairedFeatures,
    encoders: Encoders,
    facts: Sequence[str] = FACTS,
    seed: int = 0,
    precision: str = "auto",
) -> dict[str, tuple[DiagnosticNegatives, PairedFeatures]]:
    """For each fact the false captions of these features' images, and their features as captions of those images.

    `dataset` is the one the features were extracted from, or a selection that holds their images. The positions in
    the result are rows of `features`. Facts that none of the images has are left out. `precision` is that of the
    extraction.
    """
    chosen, found = _dataset_of(dataset, features), {}
    for fact in facts:
        negatives = chosen.diagnostic_negatives(fact, seed)
        if negatives.texts:
            found[fact] = negatives, _as_features(features, encoders, negatives.texts, negatives.images, precision)
    return found


def false_captions(
    dataset: CaptionDataset,
    features: PairedFeatures,
    encoders: Encoders,
    facts: Sequence[str] = FACTS,
    seeds: Sequence[int] = (1, 2),
    precision: str = "auto",
) -> FalseCaptions:
    """Captions with one of these facts changed, for `fit` to learn from: those of every fact and seed, each text once.

    The seeds should not be the one that `diagnostic_pairs` draws from, although other images are judged.
    """
    chosen = _dataset_of(dataset, features)
    drawn = [chosen.diagnostic_negatives(fact, seed) for fact in facts for seed in seeds]
    made = {
        (int(image), int(caption), text)
        for part in drawn
        for image, caption, text in zip(part.images, part.captions, part.texts, strict=True)
    }
    if not made:
        raise MmkitError(f"None of the {len(chosen):,} images has a fact of the kinds {', '.join(facts)}.")
    images, captions, texts = zip(*sorted(made), strict=True)
    return FalseCaptions(_as_features(features, encoders, texts, images, precision), torch.tensor(captions))


@torch.inference_mode()
def diagnostic_report(
    fuser: PairFuser, features: PairedFeatures, negatives: dict[str, tuple[DiagnosticNegatives, PairedFeatures]]
) -> dict[str, Diagnostic]:
    """Two-way forced choice for each kind of changed fact (Hodosh & Hockenmaier 2016) of `diagnostic_pairs`.

    A tie counts half: the two captions look the same to the fuser, it would have to toss a coin, and so one that is
    blind to the fact is at chance. Counted against the fuser, blindness would look like a preference for falsehood.
    The false captions join the pool, which matters to transductive fusers alone.
    """
    report, captions, images = {}, len(features.owner), len(features.image_rows)
    for fact, (pairs, false) in negatives.items():
        rows, true = torch.from_numpy(pairs.images), torch.from_numpy(pairs.captions)
        fits = len(rows) == len(false.owner) > 0 and int(rows.max()) < images and int(true.max()) < captions
        if not fits or not torch.equal(features.owner[true], rows):
            raise MmkitError(
                f"The pairs of {fact!r} are not of these features. Remedy: take those that diagnostic_pairs(dataset, "
                "features, encoders) gives."
            )
        image_nodes, text_nodes = pool_nodes(fuser, features, false)
        rows, true = rows.to(text_nodes.device), true.to(text_nodes.device)
        wrong = captions + torch.arange(len(rows), device=rows.device)
        right, wrong = (pair_logits(fuser, image_nodes, text_nodes, rows, texts) for texts in (true, wrong))
        margins = (right - wrong).cpu()
        if not torch.isfinite(margins).all():
            raise MmkitError("The fuser's logits hold NaN or infinity; it cannot be evaluated.")
        won = (margins.sign().double() + 1) / 2
        rows = rows.cpu()
        sums, counts = rows.bincount(won, minlength=images), rows.bincount(minlength=images)
        seen = counts > 0
        accuracy = float(won.mean())
        report[fact] = Diagnostic(
            fact,
            accuracy,
            bootstrap(sums[seen], counts[seen]) if seen.sum() > 1 else Interval(0.0, 1.0),  # one image tells nothing
            float((margins == 0).double().mean()),
            len(won),
            (images, len(text_nodes)),
        )
    return report


# --- 1K and 5K -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoldedRetrieval:
    """`mean` over `folds`, and in `spread` mean and deviation of each figure (fractions; median ranks; rsum in
    percent), by names such as "image_to_text.r1"."""

    mean: Retrieval
    spread: dict[str, Spread]
    folds: tuple[Retrieval, ...]


def folded_retrieval(fuser: PairFuser, features: PairedFeatures, folds: int = 5, shortlist: int = 0) -> FoldedRetrieval:
    """Retrieval within disjoint folds of the images in the dataset's order, and the mean over them.

    Of COCO's 5,000 test images (Karpathy & Fei-Fei 2015) with `folds=5` this is "1K": images 0–999, 1000–1999, and
    so on; `retrieval_report` of all is "5K". Smaller pools are easier: never compare the one with the other. Each
    fold is the pool that a transductive fuser sees. The deviation is between folds and says nothing of seeds.
    `shortlist` is that of `retrieval_report`.
    """
    images = len(features.image_rows)
    if not 2 <= folds <= images // 2:
        raise MmkitError(f"{folds} folds of {images} images; there must be at least two, of at least two images each.")
    order = np.argsort(features.image_rows, kind="stable")
    parts = (subset(features, rows) for rows in np.array_split(order, folds))
    reports = tuple(retrieval_report(fuser, part, shortlist) for part in parts)
    flat = [
        {f"{name}.{key}": value for name in DIRECTIONS for key, value in vars(getattr(report, name)).items()}
        | {"rsum": report.rsum}
        for report in reports
    ]
    spread = mean_and_deviation(flat)
    means = [Recall(**{key: spread[f"{name}.{key}"].mean for key in Recall.__annotations__}) for name in DIRECTIONS]
    return FoldedRetrieval(Retrieval(*means, reports[0].pool), spread, reports)


# --- the positives that COCO's labels miss ---------------------------------------------------------


@torch.inference_mode()
def ranked_lists(
    fuser: PairFuser, features: PairedFeatures, caption_ids: Sequence[int] | np.ndarray, depth: int = 50
) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """The best `depth` matches by id, best first: image id → caption ids, and caption id → image ids.

    `caption_ids` `(M,)` are those of the features' captions. A true match comes after all others of its score.
    """
    if len(caption_ids) != len(features.owner):
        raise MmkitError(f"{len(caption_ids)} caption ids for {len(features.owner)} captions.")
    images, captions = len(features.image_rows), len(features.owner)
    score, device = scorer(fuser, features), next(fuser.parameters()).device
    owner, of_images = features.owner.to(device), []
    best = torch.empty(0, captions, dtype=torch.double, device=device)
    rows_of_best = torch.empty(0, captions, dtype=torch.long, device=device)
    for rows in torch.arange(images, device=device).split(rows_at_a_time(2 * captions)):  # in double: twice the bytes
        scores, own = score(rows).double(), owner == rows[:, None]
        scores = torch.where(own, scores - (1e-12 * scores.abs() + 1e-300), scores)  # below its ties, above all others
        of_images.append(scores.topk(min(depth, captions), dim=1).indices.cpu())
        best = torch.cat([best, scores])
        rows_of_best = torch.cat([rows_of_best, rows[:, None].expand(-1, captions)])
        best, kept = best.topk(min(depth, len(best)), dim=0)
        rows_of_best = rows_of_best.gather(0, kept)
    image_ids, caption_ids = np.asarray(features.image_ids), np.asarray(caption_ids)
    to_captions = caption_ids[torch.cat(of_images).numpy()].tolist()
    to_images = image_ids[rows_of_best.T.cpu().numpy()].tolist()
    return (
        dict(zip(image_ids.tolist(), to_captions, strict=True)),
        dict(zip(caption_ids.tolist(), to_images, strict=True)),
    )


def eccv_scores(fuser: PairFuser, features: PairedFeatures) -> dict[str, dict[str, float]]:
    """ECCV Caption (Chun et al. 2022), CxC (Parekh et al. 2021) and plain 5K figures, by the package `eccv_caption`.

    `features` are Karpathy's 5,000 COCO test images, of which the first five captions each are taken: the package
    gives their ids in that order. Fractions by figure and direction, "i2t" and "t2i"; "eccv_map_at_r" is ECCV's own.
    """
    try:
        from eccv_caption import Metrics
    except ImportError:
        raise MmkitError(
            "ECCV Caption's and CxC's positives are not installed. Remedy: pip install eccv-caption"
        ) from None
    package = Metrics()
    ids_of: dict[int, list[int]] = {}
    for caption in package.coco_ids.tolist():  # in the order of Karpathy's file
        ids_of.setdefault(package.coco_gts["t2i"][caption][0], []).append(caption)
    owner, found = features.owner.numpy(), features.image_ids.tolist()
    taken = {image: np.flatnonzero(owner == row)[: len(ids_of.get(image, ()))] for row, image in enumerate(found)}
    if set(found) != ids_of.keys() or any(len(taken[image]) != len(ids_of[image]) for image in found):
        raise MmkitError(
            f"ECCV Caption and CxC judge the {len(ids_of):,} test images of Karpathy's COCO split with five captions "
            f"each; these are {len(found):,} images, {len(set(found) & ids_of.keys()):,} of them among those. Remedy: "
            'features = store.select(dataset.splits(0, 0)["test"]) of that split'
        )
    kept = np.concatenate([taken[image] for image in found])
    five = replace(features, caption_rows=features.caption_rows[kept], owner=features.owner[kept])
    caption_ids = [caption for image in found for caption in ids_of[image]]
    lists = ranked_lists(fuser, five, caption_ids, _ECCV_DEPTH)
    scores = package.compute_all_metrics(*lists, target_metrics=_ECCV_FIGURES, Ks=CUTS)
    return {name: {way: float(value) for way, value in found.items()} for name, found in scores.items()}
