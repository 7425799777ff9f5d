"""Extract features once, keep them on disk, read them as memory maps."""

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from .data import CaptionDataset
from .encoders import Encoders
from .errors import MmkitError
from .preprocess import MultimodalPreprocessor
from .progress import progress

# small batches keep a CPU's activations in cache; captions are short
_IMAGE_BATCH = {"cpu": 4, "cuda": 128}
_CAPTION_BATCH = {"cpu": 64, "cuda": 512}
_SAVE_EVERY = 32  # batches between two marks from which an interrupted extraction goes on
_ARRAYS = ("images.npy", "captions.npy")
Rows = Sequence[int] | np.ndarray | Tensor | slice
PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, eq=False)
class PairedFeatures:
    """Features of some images and of all their captions, read from the store's memory maps when asked for.

    `owner[j]` is the row of caption `j`'s image, int64 `(M,)`; `image_ids` `(N,)` are the dataset's.
    """

    image_source: np.ndarray
    caption_source: np.ndarray
    image_rows: np.ndarray
    caption_rows: np.ndarray
    owner: Tensor
    image_ids: np.ndarray

    def images(self, rows: Rows = slice(None)) -> Tensor:
        """float32 `(n, image_dim)` of these images, by default of all."""
        return torch.from_numpy(self.image_source[_at(self.image_rows, rows)].astype(np.float32))

    def captions(self, rows: Rows = slice(None)) -> Tensor:
        """float32 `(n, text_dim)` of these captions, by default of all."""
        return torch.from_numpy(self.caption_source[_at(self.caption_rows, rows)].astype(np.float32))

    @property
    def dims(self) -> tuple[int, int]:
        return self.image_source.shape[1], self.caption_source.shape[1]

    def __repr__(self) -> str:
        n, m = len(self.image_rows), len(self.caption_rows)
        return f"PairedFeatures({n:,} × {self.dims[0]} images, {m:,} × {self.dims[1]} captions)"

    @classmethod
    def from_arrays(
        cls, images: np.ndarray | Tensor, captions: np.ndarray | Tensor, owner: Sequence[int]
    ) -> "PairedFeatures":
        """Features held in memory: `(N, image_dim)`, `(M, text_dim)` and the image row of each caption."""
        rows = torch.as_tensor(owner, dtype=torch.long)
        if len(rows) != len(captions) or (len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(images)):
            raise MmkitError(f"owner must name one of {len(images)} images for each of {len(captions)} captions.")
        return cls(
            np.asarray(images),
            np.asarray(captions),
            np.arange(len(images)),
            np.arange(len(captions)),
            rows,
            np.arange(len(images)),
        )


def _at(table: np.ndarray, rows: Rows) -> np.ndarray:
    return table[rows if isinstance(rows, slice) else np.asarray(rows)]


class FeatureStore:
    """A folder of features: `images.npy` `(N, image_dim)`, `captions.npy` `(M, text_dim)`, `manifest.json`.

    The arrays are memory maps: opening is instant and reading touches only the rows asked for.
    """

    def __init__(self, folder: Path) -> None:
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.image_features, self.caption_features = (np.load(folder / name, mmap_mode="r") for name in _ARRAYS)
        self.caption_image = np.array(self.manifest["caption_image"])
        self.image_ids = np.array(self.manifest["image_ids"])

    def __repr__(self) -> str:
        return f"FeatureStore({self.image_features.shape} images, {self.caption_features.shape} captions)"

    def select(self, images: Sequence[int] | np.ndarray | None = None) -> PairedFeatures:
        """The features of the images at these positions (default: all) with all their captions."""
        rows = np.arange(len(self.image_ids))
        if images is not None:  # positions, negative ones from the end, or a mask
            rows = rows[np.asarray(images) if len(images) else np.array([], dtype=int)]
        by_image = np.argsort(self.caption_image, kind="stable")
        bounds = np.searchsorted(self.caption_image[by_image], [rows, rows + 1])
        captions = np.concatenate([by_image[:0], *(by_image[first:last] for first, last in bounds.T)])
        owner = torch.from_numpy(np.repeat(np.arange(len(rows)), bounds[1] - bounds[0]))
        return PairedFeatures(self.image_features, self.caption_features, rows, captions, owner, self.image_ids[rows])


def _autocast(encoders: Encoders, precision: str) -> tuple[torch.autocast, str]:
    """The autocast of a precision; "auto" is bfloat16 where the device computes it natively."""
    if precision not in PRECISIONS:
        raise MmkitError(f"No precision {precision!r}. Valid names: {', '.join(PRECISIONS)}")
    device = encoders.image.device.type
    if precision == "auto":
        native = torch.cuda.is_bf16_supported() if device == "cuda" else torch.cpu._is_avx512_bf16_supported()
        precision = "bfloat16" if native else "float32"
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"), precision


def _pixels(dataset: CaptionDataset, preprocessor: MultimodalPreprocessor, first: int, size: int) -> Iterator[Tensor]:
    """Batches of pixels from image `first` on, decoded ahead in threads while the encoder computes."""

    def decode(start: int) -> Tensor:
        stop = min(start + size, len(dataset))
        return torch.stack([preprocessor.preprocess_image(dataset.root / dataset.files[i]) for i in range(start, stop)])

    starts = iter(range(first, len(dataset), size))
    with ThreadPoolExecutor(2) as pool:
        ahead = deque(pool.submit(decode, start) for start in islice(starts, 4))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(decode, start) for start in islice(starts, 1))


class _Unfinished:
    """The half-written folder of an extraction: arrays, and a mark of the batches that are safely in them."""

    def __init__(self, folder: Path, shapes: dict[str, tuple[int, int]]) -> None:
        self._mark = folder / "done.json"
        try:
            self.done = json.loads(self._mark.read_text())
            self.arrays = {name: np.lib.format.open_memmap(folder / name, mode="r+") for name in shapes}
        except (OSError, ValueError):  # not begun, or not usable
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self.done = dict.fromkeys(shapes, 0)
            self.arrays = {
                name: np.lib.format.open_memmap(folder / name, mode="w+", dtype=np.float16, shape=shape)
                for name, shape in shapes.items()
            }
        self._save()

    def advance(self, name: str, last: bool) -> None:
        self.done[name] += 1
        if last or self.done[name] % _SAVE_EVERY == 0:
            self.arrays[name].flush()
            self._save()

    def _save(self) -> None:
        beside = self._mark.with_suffix(".new")
        beside.write_text(json.dumps(self.done))
        beside.replace(self._mark)


def _encode_images(dataset: CaptionDataset, encoders: Encoders, work: _Unfinished) -> None:
    array, size = work.arrays["images.npy"], _IMAGE_BATCH.get(encoders.image.device.type, 4)
    batches, first = -(-len(dataset) // size), work.done["images.npy"]
    pixels = _pixels(dataset, encoders.preprocessor, first * size, size)
    for batch in progress(range(first, batches), "image features", unit="batches"):
        pooled = encoders.image(next(pixels)).pooled.float().cpu().numpy()
        array[batch * size : batch * size + len(pooled)] = pooled
        work.advance("images.npy", batch + 1 == batches)


def _encode_captions(dataset: CaptionDataset, encoders: Encoders, work: _Unfinished) -> None:
    """Each distinct caption once, in batches of similar length, so that little padding is computed."""
    array, size = work.arrays["captions.npy"], _CAPTION_BATCH.get(encoders.text.device.type, 64)
    rows_of: dict[str, list[int]] = {}
    for row, caption in enumerate(dataset.captions):
        rows_of.setdefault(caption, []).append(row)
    texts = sorted(rows_of, key=lambda text: (text.count(" "), len(text), text))
    batches, first = -(-len(texts) // size), work.done["captions.npy"]
    for batch in progress(range(first, batches), "caption features", unit="batches"):
        chosen = texts[batch * size : (batch + 1) * size]
        pooled = encoders.text(**encoders.preprocessor.preprocess_text(chosen)).pooled.float().cpu().numpy()
        for text, vector in zip(chosen, pooled, strict=True):
            array[rows_of[text]] = vector
        work.advance("captions.npy", batch + 1 == batches)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_whole(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return all(_sha256(folder / name) == manifest["sha256"][name] for name in _ARRAYS)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def extract_features(
    dataset: CaptionDataset, encoders: Encoders, cache: str | Path, precision: str = "auto"
) -> FeatureStore:
    """The pooled features of all images and captions, stored as float16 under `cache`.

    The folder's name is a digest of the dataset, the encoders, their weights, the preprocessing and the precision, so
    that a change of any of them extracts anew. An interrupted extraction goes on where it stopped; of two processes
    that ask for the same features one extracts and the other waits; a store whose checksums are wrong is
    made again. `precision` is that of the encoders' arithmetic: "float32", "bfloat16", or "auto", which
    takes bfloat16 where the processor has it.
    """
    autocast, precision = _autocast(encoders, precision)
    made_from = {
        "dataset": dataset.fingerprint(),
        "image_encoder": [encoders.image.name, encoders.image.digest(), str(encoders.preprocessor.transform)],
        "text_encoder": [
            encoders.text.name,
            encoders.text.digest(),
            encoders.text.pooling,
            encoders.preprocessor.max_tokens,
        ],
        "precision": precision,
        "dtype": "float16",
    }
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
    folder = Path(cache) / "features" / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder.with_suffix(".lock")).acquire()
    except OSError as error:
        raise MmkitError(
            f"Features cannot be written to {folder.parent} ({error.strerror}). Remedy: set MMKIT_CACHE."
        ) from None
    with held:
        if not _is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
            beside = folder.with_suffix(".part")
            shapes = zip(
                _ARRAYS, [(len(dataset), encoders.image.dim), (len(dataset.captions), encoders.text.dim)], strict=True
            )
            work = _Unfinished(beside, dict(shapes))
            with autocast:
                _encode_images(dataset, encoders, work)
                _encode_captions(dataset, encoders, work)
            manifest = made_from | {
                "image_ids": list(dataset.image_ids),
                "caption_image": dataset.caption_image.tolist(),
                "sha256": {name: _sha256(beside / name) for name in _ARRAYS},
            }
            (beside / "manifest.json").write_text(json.dumps(manifest))
            (beside / "done.json").unlink()
            beside.replace(folder)
    return FeatureStore(folder)
