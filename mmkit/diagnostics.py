"""What a recall does not show: is a caption known from one with a single fact changed, and does the pairing leak?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .data import CaptionDataset, DiagnosticNegatives
from .encoders import Encoders
from .evaluation import Interval, Pool, bootstrap, encode_pool, retrieval_report
from .features import FalseCaptions, PairedFeatures, extract_texts, pad_cat
from .fusers import PairFuser
from .scenes import FACTS
from .support import MmkitError


@dataclass(frozen=True)
class Diagnostic:
    """Two captions of one image, of which one is false in `fact` alone: the share in which the true one's logit is
    higher, ties counted half, with its 95 % interval over images. Chance is 0.5."""

    fact: str
    accuracy: float
    interval: Interval
    pairs: int


def _as_captions(features: PairedFeatures, texts: Sequence[str], images: Sequence[int], encoders: Encoders,
                 cache: str | Path, precision: str) -> PairedFeatures:  # fmt: skip
    """`texts` as further captions of these images, which have come the same way as the features' own."""
    dtype, image_index = features.manifest.get("dtype", "float16"), torch.tensor(images, dtype=torch.long)
    table = extract_texts(texts, encoders, cache, precision, features.caption_table.has_parts, dtype)
    return replace(features, caption_table=table, image_index=image_index, token_ids=None, form="vectors")


def diagnostic_pairs(
    dataset: CaptionDataset, features: PairedFeatures, encoders: Encoders, cache: str | Path,
    facts: Sequence[str] = FACTS, seed: int = 0, precision: str = "auto",
) -> dict[str, tuple[DiagnosticNegatives, PairedFeatures]]:  # fmt: skip
    """For each fact the false captions of these features' images, and their features as captions of those images.

    `dataset` is the one that the features were extracted from; `cache` and `precision` are those of the extraction.
    The positions in the result are rows of `features`. Facts that none of the images has are left out."""
    chosen, pairs, start = dataset.of_features(features.image_ids.tolist(), features.image_index.numpy()), {}, 0
    every = [one for one in (chosen.diagnostic_negatives(fact, seed) for fact in facts) if one.texts]
    texts = [text for one in every for text in one.texts]
    images = [image for one in every for image in one.image_index.tolist()]
    captions = _as_captions(features, texts, images, encoders, cache, precision)
    for one in every:
        part = slice(start, start := start + len(one.texts))
        table = captions.caption_table.select(part)
        pairs[one.fact] = one, replace(captions, caption_table=table, image_index=captions.image_index[part])
    return pairs


def false_captions(
    dataset: CaptionDataset, features: PairedFeatures, encoders: Encoders, cache: str | Path,
    facts: Sequence[str] = FACTS, seeds: Sequence[int] = (1, 2), precision: str = "auto",
) -> FalseCaptions:  # fmt: skip
    """Captions with one of these facts changed, for `fit` to learn from: those of every fact and seed, each text once.

    The seeds should not be the one that `diagnostic_pairs` draws from, although other images are judged."""
    chosen = dataset.of_features(features.image_ids.tolist(), features.image_index.numpy())
    made: set[tuple[int, int, str]] = set()
    for part in (chosen.diagnostic_negatives(fact, seed) for fact in facts for seed in seeds):
        made |= {*zip(part.image_index.tolist(), part.captions.tolist(), part.texts, strict=True)}
    if not made:
        raise MmkitError(f"None of the {len(chosen):,} images has a fact of the kinds {', '.join(facts)}.")
    images, captions, texts = zip(*sorted(made), strict=True)
    return FalseCaptions(_as_captions(features, texts, images, encoders, cache, precision), torch.tensor(captions))


def diagnostic_report(
    fuser: PairFuser, features: PairedFeatures, negatives: dict[str, tuple[DiagnosticNegatives, PairedFeatures]],
    pool: Pool | None = None,
) -> dict[str, Diagnostic]:  # fmt: skip
    """Two-way forced choice for each kind of changed fact (Hodosh & Hockenmaier 2016) of `diagnostic_pairs`.

    A tie counts half, so a fuser that is blind to the fact is at chance. The false captions join the pool, which
    matters to transductive fusers alone: the nodes of any other may be given as `pool`."""
    report, captions, images, few = {}, len(features.image_index), len(features), features.select([0])
    pool = pool or (None if fuser.transductive else encode_pool(fuser, features))
    for fact, (pairs, false) in negatives.items():
        rows, true = torch.from_numpy(pairs.image_index), torch.from_numpy(pairs.captions)
        fits = len(rows) == len(false.image_index) > 0 and int(true.max()) < captions
        if not fits or not torch.equal(features.image_index[true], rows):
            raise MmkitError(f"{fact!r} has pairs of other features. Remedy: diagnostic_pairs(dataset, features, …)")
        judged = encode_pool(fuser, features if fuser.transductive else few, false)
        if not fuser.transductive:
            texts = judged.text_nodes[len(few.image_index) :]
            judged = replace(pool, text_nodes=pad_cat([pool.text_nodes[:captions], texts]))
        margins = (judged.logits(rows, true) - judged.logits(rows, captions + torch.arange(len(rows)))).cpu()
        won = (margins.sign().double() + 1) / 2
        sums, counts = rows.bincount(won, minlength=images), rows.bincount(minlength=images)
        seen = counts > 0
        interval = bootstrap(sums[seen], counts[seen]) if seen.sum() > 1 else Interval(0.0, 1.0)  # one tells nothing
        report[fact] = Diagnostic(fact, float(won.mean()), interval, len(won))
    return report


@torch.inference_mode()
def permutation_gap(fuser: PairFuser, images: Tensor, texts: Tensor, seed: int = 0) -> float:
    """The largest change of a pair's logit when the pool is reordered, over the logits' spread.

    A fuser that reads only content gives (nearly) 0; one that reads positions, and so the pairing, does not."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(len(part), generator=generator) for part in (images, texts))
    fuser.eval()
    scores, reordered = fuser.score(images, texts), fuser.score(images[rows], texts[columns])
    return float((scores[rows][:, columns] - reordered).abs().max() / scores.std().clamp(min=1e-12))


def noise_recall(train: Callable[[PairedFeatures, PairedFeatures], PairFuser], dims: tuple[int, int], pairs: int = 200,
                 held_out: int = 200, seed: int = 0, parts: tuple[int, int] = (4, 3)) -> float:  # fmt: skip
    """Caption→image R@1 on held-out pairs of pure noise, after `train(noise, validation)` has seen others.

    An honest fuser is at chance, 1 / `held_out`. Anything more is a leak: the pairing reaches the scores by another
    way than the features. `parts` are the numbers of cells and tokens."""
    generator = torch.Generator().manual_seed(seed)

    def noise(n: int) -> PairedFeatures:
        vectors = [torch.randn(n, dim, generator=generator) for dim in dims]
        stacks = [torch.randn(n, count, dim, generator=generator) for count, dim in zip(parts, dims, strict=True)]
        return PairedFeatures.from_arrays(*vectors, range(n), *stacks)

    fuser = train(noise(pairs), noise(held_out))
    return retrieval_report(fuser, noise(held_out)).text_to_image.r1
