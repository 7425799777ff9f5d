"""Features of pictures and captions: extracted once, selected by image, read when asked for."""

import contextlib
import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .data import CaptionDataset
from .encoders import Encoders
from .preprocess import MultimodalPreprocessor
from .store import Encoded, FeatureStore, FeatureTable, Rows, as_index, once
from .support import MissingFile, MmkitError, sha256_of, write_whole

PRECISIONS = ("auto", "float32", "bfloat16")
PADDING = -1  # no token has this id
# small batches keep a CPU's activations in cache; captions are short
_IMAGE_BATCH, _TEXT_BATCH = {"cpu": 4, "cuda": 128}, {"cpu": 64, "cuda": 512}
_IMAGE_SHARD, _TEXT_SHARD = 1024, 8192  # rows of a shard at most
_DECODERS = max(2, min(8, os.cpu_count() or 2))  # threads that decode ahead while the encoder computes


def pad_cat(blocks: Sequence[Tensor]) -> Tensor:
    """Blocks of vectors `(n, D)`, of stacks `(n, parts, D)` or of token ids `(n, T)` along the first axis; shorter
    stacks end in zeros, shorter rows of ids in `PADDING`."""
    ids = not blocks[0].is_floating_point()
    if blocks[0].ndim == 2 and not ids:
        return torch.cat(list(blocks))
    longest, value, behind = max(block.shape[1] for block in blocks), PADDING if ids else 0, [0, 0] * (not ids)
    return torch.cat([F.pad(block, (*behind, 0, longest - block.shape[1]), value=value) for block in blocks])


@dataclass(frozen=True, eq=False)
class PairedFeatures:
    """Features of N images and of all their M captions, read when asked for; `manifest` says what they were made from,
    `image_index` int64 `(M,)` the row of each caption's image, `form` what items come as."""

    image_table: FeatureTable
    caption_table: FeatureTable
    image_index: Tensor
    image_ids: np.ndarray
    token_ids: np.ndarray | None = None
    form: Literal["vectors", "parts", "token_ids"] = "vectors"
    manifest: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.image_table)

    def __repr__(self) -> str:
        shapes = f"{len(self):,} × {self.dims[0]} images, {len(self.image_index):,} × {self.dims[1]} captions"
        parts = {"grids": self.image_table.has_parts, "tokens": self.caption_table.has_parts}
        return f"PairedFeatures({', '.join([shapes, *(name for name in parts if parts[name])])})"

    @property
    def dims(self) -> tuple[int, int]:
        """The widths of an image's and of a caption's vector."""
        return self.image_table.dim, self.caption_table.dim

    def images(self, rows: Rows = slice(None)) -> Tensor:
        """float32 `(n, image_dim)` of these images, by default of all; stacks of parts after `with_parts`."""
        table = self.image_table.select(rows)
        return _stacked(table) if self.form == "parts" else table.vectors()

    def captions(self, rows: Rows = slice(None)) -> Tensor:
        """float32 `(n, text_dim)` of these captions; stacks after `with_parts`, int64 after `with_token_ids`."""
        if self.form == "token_ids":
            ids = torch.from_numpy(self.token_ids[as_index(rows)]).long()
            return ids[:, (ids != PADDING).any(dim=0)]
        table = self.caption_table.select(rows)
        return _stacked(table) if self.form == "parts" else table.vectors()

    def grids(self, rows: Rows = slice(None)) -> Tensor:
        """float32 `(n, cells, image_dim)`: the cells of these images' feature maps, row by row (7 × 7 as a rule)."""
        return self._with("grids").image_table.select(rows).parts()[0]

    def tokens(self, rows: Rows = slice(None)) -> tuple[Tensor, Tensor]:
        """float32 `(n, T, text_dim)` of these captions' tokens, [CLS] and [SEP] too, and the mask int64 `(n, T)`, 0 on
        the padding, which is zeros."""
        tokens, counts = self._with("tokens").caption_table.select(rows).parts()
        return tokens, (torch.arange(tokens.shape[1]) < counts[:, None]).long()

    def vectors(self) -> "PairedFeatures":
        """The same pairs, each item as one vector."""
        return replace(self, form="vectors")

    def with_parts(self) -> "PairedFeatures":
        """The same pairs, each item as a stack: its vector, then its cells or tokens, then rows of zeros."""
        return replace(self._with("grids")._with("tokens"), form="parts")

    def with_token_ids(self) -> "PairedFeatures":
        """The same pairs, whose `captions` are the ids of their tokens, int64 `(n, T)`, then `PADDING`."""
        if self.token_ids is None:
            raise MmkitError("These features hold no token_ids. Remedy: tokenized(features, dataset, preprocessor)")
        return replace(self, form="token_ids")

    def select(self, images: Rows) -> "PairedFeatures":
        """The features of the images at these positions, in this order, with all their captions."""
        images = np.arange(len(self))[as_index(images)]
        by_image = np.argsort(self.image_index.numpy(), kind="stable")
        bounds = np.searchsorted(self.image_index.numpy()[by_image], [images, images + 1])
        captions = np.concatenate([by_image[:0], *(by_image[first:last] for first, last in bounds.T)])
        return replace(
            self,
            image_table=self.image_table.select(images),
            caption_table=self.caption_table.select(captions),
            image_index=torch.from_numpy(np.repeat(np.arange(len(images)), bounds[1] - bounds[0])),
            image_ids=self.image_ids[images],
            token_ids=None if self.token_ids is None else self.token_ids[captions],
        )

    def _with(self, name: Literal["grids", "tokens"]) -> "PairedFeatures":
        table = self.image_table if name == "grids" else self.caption_table
        if not table.has_parts:
            raise MmkitError(f"These features hold no {name}. Remedy: extract_features(…, {name}=True)")
        return self

    @classmethod
    def from_arrays(cls, images: np.ndarray | Tensor, captions: np.ndarray | Tensor,
                    image_index: Sequence[int] | Tensor, grids: np.ndarray | Tensor | None = None,
                    tokens: np.ndarray | Tensor | None = None) -> "PairedFeatures":  # fmt: skip
        """Features in memory: `(N, image_dim)`, `(M, text_dim)` and each caption's image; perhaps `grids` `(N, cells,
        image_dim)` and `tokens` `(M, T, text_dim)`, whose rows of zeros are padding."""
        rows = torch.as_tensor(image_index, dtype=torch.long)
        if len(rows) != len(captions) or (len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(images)):
            raise MmkitError(f"image_index must name one of {len(images)} images for each of {len(captions)} captions.")
        tables = FeatureTable.in_memory(images, grids), FeatureTable.in_memory(captions, tokens)
        return cls(*tables, rows, np.arange(len(images)))


@dataclass(frozen=True, eq=False)
class FalseCaptions:
    """`features` are captions that are false of their images, and `captions` `(F,)` the rows of the true captions, of
    the same images, that they were made from."""

    features: PairedFeatures
    captions: Tensor


def _stacked(table: FeatureTable) -> Tensor:
    return torch.cat([table.vectors()[:, None], table.parts()[0]], dim=1)


def autocast(encoders: Encoders, precision: str) -> tuple[torch.autocast, str]:
    """The autocast of a precision, and its name; "auto" is bfloat16 where the device computes it natively."""
    if precision not in PRECISIONS:
        raise MmkitError(f"No precision {precision!r}. Valid names: {', '.join(PRECISIONS)}")
    device = encoders.image.device.type
    if precision == "auto":
        native = torch.cuda.is_bf16_supported() if device == "cuda" else torch.cpu._is_avx512_bf16_supported()
        precision = "bfloat16" if native else "float32"
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"), precision


def _transform_digest(preprocessor: MultimodalPreprocessor) -> str:
    """A digest of what the transform does to a fixed picture; its name alone would not tell its settings."""
    rows, columns = np.mgrid[0:300, 0:400]
    picture = np.stack([columns * 255 // 399, rows * 255 // 299, (rows * columns) % 256], axis=2)
    tensor = preprocessor.preprocess_image(Image.fromarray(picture.astype(np.uint8)))
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def _tokenizer_digest(preprocessor: MultimodalPreprocessor) -> str:
    """A digest of the vocabulary and of what becomes of a text with capitals, accents and signs."""
    vocabulary = sorted(preprocessor.tokenizer.get_vocab().items())
    ids = preprocessor.preprocess_text("Don't: 2 DOGS, près d'un Hündchen 🐕!")["input_ids"].tolist()
    return hashlib.sha256(json.dumps([vocabulary, ids]).encode()).hexdigest()[:16]


def _picture_keys(dataset: CaptionDataset, cache: Path) -> list[str]:
    """A digest of each picture file's bytes. A file that has not changed since the last call is not read again."""
    root = hashlib.sha256(str(dataset.root.resolve()).encode()).hexdigest()[:16]
    known_at, known = cache / "pictures" / f"{root}.json", {}
    if known_at.is_file():
        with contextlib.suppress(ValueError):
            known = json.loads(known_at.read_text(encoding="utf-8"))
    try:
        states = {file: (dataset.root / file).stat() for file in dataset.files}
        marks = {file: f"{one.st_size} {one.st_mtime_ns} {one.st_ctime_ns}" for file, one in states.items()}
        changed = [file for file in marks if known.get(file, ("",))[0] != marks[file]]
        with ThreadPoolExecutor(_DECODERS) as pool:
            digests = pool.map(lambda file: sha256_of(dataset.root / file)[:32], changed)
            known |= {file: (marks[file], digest) for file, digest in zip(changed, digests, strict=True)}
    except FileNotFoundError as error:
        raise MissingFile(f"There is no picture {error.filename}.") from None
    if changed:
        write_whole(known_at, json.dumps(known))
    return [known[file][1] for file in dataset.files]


def _encode_images(dataset: CaptionDataset, encoders: Encoders, batches: Sequence[list[int]]) -> Iterator[Encoded]:
    """The features of these batches of positions, whose pictures are decoded ahead while the encoder computes."""

    def decode(batch: list[int]) -> Tensor:
        paths = [dataset.root / dataset.files[at] for at in batch]
        return torch.stack([encoders.preprocessor.preprocess_image(path) for path in paths])

    coming = iter(batches)
    with ThreadPoolExecutor(_DECODERS) as pool:
        ahead = deque(pool.submit(decode, batch) for batch in islice(coming, 2 * _DECODERS))
        while ahead:
            output = encoders.image(ahead.popleft().result())
            ahead.extend(pool.submit(decode, batch) for batch in islice(coming, 1))
            cells = output.grid.flatten(2).transpose(1, 2)
            yield output.pooled, cells.flatten(0, 1), torch.full((len(cells),), cells.shape[1])


def _encode_texts(texts: Sequence[str], encoders: Encoders, batches: Sequence[list[int]]) -> Iterator[Encoded]:
    for batch in batches:
        output = encoders.text(**encoders.preprocessor.preprocess_text([texts[at] for at in batch]))
        yield output.pooled, output.tokens[output.mask.bool()], output.mask.sum(dim=1)


def extract_texts(texts: Sequence[str], encoders: Encoders, cache: str | Path, precision: str = "auto",
                  tokens: bool = False, dtype: str = "float16") -> FeatureTable:  # fmt: skip
    """The features of `texts`, in their order; see `extract_features`. Texts of equal length are encoded together."""
    text, preprocessor, (context, precision) = encoders.text, encoders.preprocessor, autocast(encoders, precision)
    made_from = {"encoder": [text.name, text.digest(), text.pooling], "precision": precision, "dtype": dtype}
    made_from |= {"tokenizer": [_tokenizer_digest(preprocessor), preprocessor.max_tokens]}

    def by_length(positions: list[int]) -> list[int]:
        lengths = preprocessor.token_counts([texts[at] for at in positions]).tolist()
        return [at for _, _, at in sorted(zip(lengths, (texts[at] for at in positions), positions, strict=True))]

    keys = [hashlib.sha256(one.encode()).hexdigest()[:32] for one in texts]
    batch = _TEXT_BATCH.get(text.device.type, 64)
    with context:
        return FeatureStore(cache, made_from).fill(
            keys, tokens, by_length, lambda todo: _encode_texts(texts, encoders, todo), batch, _TEXT_SHARD, "captions"
        )


def extract_features(dataset: CaptionDataset, encoders: Encoders, cache: str | Path, precision: str = "auto",
                     grids: bool = False, tokens: bool = False, dtype: str = "float16") -> PairedFeatures:  # fmt: skip
    """The features of all images and captions of a dataset; what the `cache` lacks is extracted now.

    It has a store for each encoder, where rows are found by a picture's bytes or a caption's text: a folder that has
    grown costs its new photos alone. `grids` and `tokens` also keep the cells and tokens that vectors are pooled from.
    `precision` is that of the arithmetic, `dtype` that of the files. The processes of one job share the work."""
    image, (context, name) = encoders.image, autocast(encoders, precision)
    made_from = {"encoder": [image.name, image.digest(), _transform_digest(encoders.preprocessor)]}
    made_from |= {"precision": name, "dtype": dtype}
    store, batch = FeatureStore(cache, made_from), _IMAGE_BATCH.get(image.device.type, 4)
    keys = once(lambda: _picture_keys(dataset, Path(cache)))
    with context:
        images = store.fill(
            keys, grids, list, lambda todo: _encode_images(dataset, encoders, todo), batch, _IMAGE_SHARD, "pictures"
        )
    captions = extract_texts(dataset.captions, encoders, cache, precision, tokens, dtype)
    manifest = {"dataset": dataset.fingerprint(), "image_encoder": made_from["encoder"]}
    manifest |= {"text_encoder": captions.made_from["encoder"], "tokenizer": captions.made_from["tokenizer"]}
    manifest |= {"precision": name, "dtype": dtype, "grids": grids, "tokens": tokens}
    image_index = torch.as_tensor(np.asarray(dataset.image_index), dtype=torch.long)
    return PairedFeatures(images, captions, image_index, np.array(dataset.image_ids), manifest=manifest)
