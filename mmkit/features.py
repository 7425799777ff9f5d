"""A store of extracted features on disk, read through memory maps."""

import hashlib
import json
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .errors import MmkitError

_LARGE = 2**28  # bytes; pages of larger maps are given back after each read
PADDING = -1  # no token has this id
Rows = Sequence[int] | np.ndarray | Tensor | slice
# Array → what it holds, for N images, M captions, C grid cells and T tokens of all distinct captions together.
ARRAYS = {
    "image_ids": "(N,) the dataset's ids",
    "caption_image": "(M,) the position of each caption's image",
    "images": "(N, image_dim) pooled image features",
    "captions": "(M, text_dim) pooled caption features",
    "grids": "(N, C, image_dim) the cells of the feature map, row by row; optional",
    "tokens": "(T, text_dim) the tokens of the distinct captions; optional, with",
    "token_spans": "(M, 2) where a caption's tokens begin in `tokens`, and their number",
    "token_ids": "(M, longest) the ids of the captions' tokens, then PADDING; in memory alone, see `tokenized`",
}


def _at(table: np.ndarray, rows: Rows) -> np.ndarray:
    return table[rows if isinstance(rows, slice) else np.asarray(rows)]


def _float32(source: np.ndarray, rows: np.ndarray) -> Tensor:
    values = torch.from_numpy(source[rows]).float()  # twice as fast as numpy's astype
    if source.nbytes > _LARGE and isinstance(source.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):  # not Windows
        source.base.madvise(
            mmap.MADV_DONTNEED
        )  # what was read stays in the system's cache, not in this process's memory
    return values


def cat_parts(blocks: Sequence[Tensor]) -> Tensor:
    """Blocks of vectors `(n, D)`, of stacks `(n, parts, D)` or of token ids `(n, T)` along the first axis; shorter
    stacks end in zeros, shorter rows of ids in `PADDING`."""
    ids = not blocks[0].is_floating_point()
    if blocks[0].ndim == 2 and not ids:
        return torch.cat(list(blocks))
    longest, value, behind = max(block.shape[1] for block in blocks), PADDING if ids else 0, [0, 0] * (not ids)
    return torch.cat([F.pad(block, (*behind, 0, longest - block.shape[1]), value=value) for block in blocks])


@dataclass(frozen=True, eq=False)
class PairedFeatures:
    """Features of some images and of all their captions, read from the store's memory maps when asked for.

    `owner[j]` is the row of caption `j`'s image, int64 `(M,)`; `image_ids` `(N,)` are the dataset's. `sources` are
    the arrays of the whole store (see `ARRAYS`), `image_rows` and `caption_rows` the chosen positions in them; `form`
    tells what items come as: vectors, stacks of their parts (see `with_parts`), or vectors of images and token ids of
    captions (see `with_token_ids`).
    """

    sources: dict[str, np.ndarray]
    image_rows: np.ndarray
    caption_rows: np.ndarray
    owner: Tensor
    image_ids: np.ndarray
    form: Literal["vectors", "parts", "token_ids"] = "vectors"

    def images(self, rows: Rows = slice(None)) -> Tensor:
        """float32 `(n, image_dim)` of these images, by default of all; stacks of parts after `with_parts`."""
        pooled = _float32(self.sources["images"], _at(self.image_rows, rows))
        return torch.cat([pooled[:, None], self.grids(rows)], dim=1) if self.form == "parts" else pooled

    def captions(self, rows: Rows = slice(None)) -> Tensor:
        """float32 `(n, text_dim)` of these captions, by default of all; stacks of parts after `with_parts`, int64
        `(n, T)` after `with_token_ids`."""
        if self.form == "token_ids":
            ids = torch.from_numpy(self.sources["token_ids"][_at(self.caption_rows, rows)]).long()
            return ids[:, (ids != PADDING).any(dim=0)]
        pooled = _float32(self.sources["captions"], _at(self.caption_rows, rows))
        if self.form == "vectors":
            return pooled
        return torch.cat([pooled[:, None], self.tokens(rows)[0]], dim=1)

    def vectors(self) -> "PairedFeatures":
        """The same pairs, each item as one vector."""
        return replace(self, form="vectors")

    def with_parts(self) -> "PairedFeatures":
        """The same pairs, each item as a stack of its parts: the pooled vector, then the cells or the tokens.

        `images` gives `(n, 1 + cells, image_dim)` and `captions` `(n, 1 + T, text_dim)`, where T is the number of
        tokens of the longest caption asked for; shorter ones end in rows of zeros, which are no parts.
        """
        for name in ("grids", "tokens"):
            self._optional(name)
        return replace(self, form="parts")

    def with_token_ids(self) -> "PairedFeatures":
        """The same pairs, whose `captions` are the ids of their tokens, int64 `(n, T)`, for an encoder that is trained.

        T is the number of tokens of the longest caption asked for; shorter ones end in `PADDING`. Images stay vectors.
        """
        if len(self.sources.get("token_ids", ())) != len(self.sources["captions"]):
            raise MmkitError("This store holds no token_ids. Remedy: tokenized(features, dataset, preprocessor)")
        return replace(self, form="token_ids")

    def grids(self, rows: Rows = slice(None)) -> Tensor:
        """float32 `(n, cells, image_dim)`: the cells of these images' feature maps, row by row (7 × 7 as a rule)."""
        return _float32(self._optional("grids"), _at(self.image_rows, rows))

    def tokens(self, rows: Rows = slice(None)) -> tuple[Tensor, Tensor]:
        """float32 `(n, T, text_dim)` of these captions' tokens, padded with zeros to the longest, and the mask
        int64 `(n, T)`, 0 on padding. [CLS] and [SEP] are tokens too."""
        source, chosen = self._optional("tokens"), _at(self.caption_rows, rows)
        spans = self.sources["token_spans"][chosen]
        parts = [torch.from_numpy(source[start : start + size].astype(np.float32)) for start, size in spans]
        if not parts:
            return torch.zeros(0, 0, source.shape[1]), torch.zeros(0, 0, dtype=torch.long)
        mask = torch.arange(int(spans[:, 1].max())) < torch.from_numpy(spans[:, 1:].astype(np.int64))
        return pad_sequence(parts, batch_first=True), mask.long()

    def _optional(self, name: str) -> np.ndarray:
        if name not in self.sources:
            raise MmkitError(f"This store holds no {name}. Remedy: extract_features(…, {name}=True)")
        return self.sources[name]

    @property
    def dims(self) -> tuple[int, int]:
        return self.sources["images"].shape[1], self.sources["captions"].shape[1]

    def __repr__(self) -> str:
        n, m = len(self.image_rows), len(self.caption_rows)
        return f"PairedFeatures({n:,} × {self.dims[0]} images, {m:,} × {self.dims[1]} captions)"

    @classmethod
    def from_arrays(
        cls,
        images: np.ndarray | Tensor,
        captions: np.ndarray | Tensor,
        owner: Sequence[int],
        grids: np.ndarray | Tensor | None = None,
        tokens: np.ndarray | Tensor | None = None,
    ) -> "PairedFeatures":
        """Features held in memory: `(N, image_dim)`, `(M, text_dim)` and the image row of each caption; where there
        are parts, `grids` `(N, cells, image_dim)` and `tokens` `(M, T, text_dim)`, whose rows of zeros are padding."""
        rows = torch.as_tensor(owner, dtype=torch.long)
        if len(rows) != len(captions) or (len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(images)):
            raise MmkitError(f"owner must name one of {len(images)} images for each of {len(captions)} captions.")
        sources = {"images": np.asarray(images), "captions": np.asarray(captions)}
        if grids is not None:
            sources["grids"] = np.asarray(grids)
        if tokens is not None:
            tokens = np.asarray(tokens)
            present = (tokens != 0).any(axis=2)
            counts = present.sum(axis=1)
            sources |= {"tokens": tokens[present]}
            sources |= {"token_spans": np.stack([counts.cumsum() - counts, counts], axis=1)}
        return cls(sources, np.arange(len(images)), np.arange(len(captions)), rows, np.arange(len(images)))


@dataclass(frozen=True, eq=False)
class FalseCaptions:
    """`features` are captions that are false of their images, and `captions` `(F,)` the rows of the true captions, of
    the same images, that they were made from."""

    features: PairedFeatures
    captions: Tensor


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_whole(folder: Path) -> bool:
    """Whether a store's manifest can be read and each array has the checksum that it names."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        sums = manifest["sha256"]
        needed = {"image_ids", "caption_image", "images", "captions"}
        return needed <= sums.keys() and all(sha256_of(folder / f"{name}.npy") == sums[name] for name in sums)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


class FeatureStore:
    """A folder of features: the arrays in `ARRAYS`, and `manifest.json`, which says what they were made from.

    The arrays are memory maps: opening is instant and reading touches only the rows asked for.
    """

    def __init__(self, folder: Path) -> None:
        self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in self.manifest["sha256"]}
        self.image_features, self.caption_features = self.arrays["images"], self.arrays["captions"]
        self.caption_image, self.image_ids = (np.array(self.arrays[name]) for name in ("caption_image", "image_ids"))

    def __repr__(self) -> str:
        more = [f"{self.arrays[name].shape} {name}" for name in ("grids", "tokens") if name in self.arrays]
        shapes = [f"{self.image_features.shape} images", f"{self.caption_features.shape} captions", *more]
        return f"FeatureStore({', '.join(shapes)})"

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(array.nbytes for array in self.arrays.values())

    def select(self, images: Sequence[int] | np.ndarray | None = None) -> PairedFeatures:
        """The features of the images at these positions (default: all) with all their captions."""
        rows = np.arange(len(self.image_ids))
        if images is not None:  # positions, negative ones from the end, or a mask
            rows = rows[np.asarray(images) if len(images) else np.array([], dtype=int)]
        by_image = np.argsort(self.caption_image, kind="stable")
        bounds = np.searchsorted(self.caption_image[by_image], [rows, rows + 1])
        captions = np.concatenate([by_image[:0], *(by_image[first:last] for first, last in bounds.T)])
        owner = torch.from_numpy(np.repeat(np.arange(len(rows)), bounds[1] - bounds[0]))
        return PairedFeatures(self.arrays, rows, captions, owner, self.image_ids[rows])
