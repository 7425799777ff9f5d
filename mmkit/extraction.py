"""Extracts features once: in batches that several processes share, and from which an interrupted run goes on."""

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from filelock import FileLock
from PIL import Image
from torch import Tensor

from .data import CaptionDataset
from .encoders import Encoders
from .errors import MmkitError
from .features import FeatureStore, is_whole, sha256_of
from .preprocess import MultimodalPreprocessor
from .progress import progress

# small batches keep a CPU's activations in cache; captions are short
_IMAGE_BATCH = {"cpu": 4, "cuda": 128}
_CAPTION_BATCH = {"cpu": 64, "cuda": 512}
_SAVE_EVERY = 32  # batches between two marks from which an interrupted extraction goes on
_DECODERS = max(2, min(8, os.cpu_count() or 2))  # threads that decode ahead while the encoder computes
PRECISIONS = ("auto", "float32", "bfloat16")
DTYPES = ("float16", "float32")


def _autocast(encoders: Encoders, precision: str) -> tuple[torch.autocast, str]:
    """The autocast of a precision; "auto" is bfloat16 where the device computes it natively."""
    if precision not in PRECISIONS:
        raise MmkitError(f"No precision {precision!r}. Valid names: {', '.join(PRECISIONS)}")
    device = encoders.image.device.type
    if precision == "auto":
        native = torch.cuda.is_bf16_supported() if device == "cuda" else torch.cpu._is_avx512_bf16_supported()
        precision = "bfloat16" if native else "float32"
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"), precision


# --- what a store is made from -----------------------------------------------------------------


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


def _made_from(dataset: CaptionDataset, encoders: Encoders, **settings: object) -> dict:
    image, text, preprocessor = encoders.image, encoders.text, encoders.preprocessor
    return {
        "dataset": dataset.fingerprint(),
        "image_encoder": [image.name, image.digest(), _transform_digest(preprocessor)],
        "text_encoder": [text.name, text.digest(), text.pooling],
        "tokenizer": [_tokenizer_digest(preprocessor), preprocessor.max_tokens],
        **settings,
    }


# --- the work ----------------------------------------------------------------------------------


class _Texts:
    """The distinct captions in batches of equal length, so that little padding is computed."""

    def __init__(self, captions: Sequence[str], preprocessor: MultimodalPreprocessor, batch: int) -> None:
        self.rows: dict[str, list[int]] = {}
        for row, caption in enumerate(captions):
            self.rows.setdefault(caption, []).append(row)
        lengths = preprocessor.token_counts(list(self.rows))
        order = sorted(zip(lengths.tolist(), self.rows, strict=True))
        self.texts, self.batch = [text for _, text in order], batch
        self.ends = np.cumsum([length for length, _ in order], dtype=np.int64)

    def __len__(self) -> int:
        return -(-len(self.texts) // self.batch)

    def spans(self) -> np.ndarray:
        """`(M, 2)`: where each caption's tokens begin in the array of all tokens, and their number."""
        starts = np.concatenate([[0], self.ends[:-1]])
        spans = np.zeros((sum(map(len, self.rows.values())), 2), dtype=np.int64)
        for text, start, end in zip(self.texts, starts, self.ends, strict=True):
            spans[self.rows[text]] = start, end - start
        return spans


class _Work:
    """The half-written folder of an extraction: arrays, and a mark for each batch that is safely in them.

    Every process opens it; batch `b` belongs to process `b % processes`, so that the bytes do not depend on
    their number.
    """

    def __init__(self, folder: Path, state: PartialState) -> None:
        self.arrays = {path.stem: np.load(path, mmap_mode="r+") for path in folder.glob("*.npy")}
        self._state, self._unmarked = state, []

    def todo(self, kind: str) -> list[int]:
        """The batches of this process that are not done."""
        marks = self.arrays[f"{kind}_done"]
        return [batch for batch in np.flatnonzero(~marks).tolist() if self._is_mine(batch)]

    def _is_mine(self, batch: int) -> bool:
        return batch % self._state.num_processes == self._state.process_index

    def write(self, name: str, rows: slice | list[int], values: Tensor) -> None:
        array = self.arrays[name]
        with np.errstate(over="ignore"):
            converted = values.float().cpu().numpy().astype(array.dtype)
        if not np.isfinite(converted).all():
            raise MmkitError(f'Features do not fit into {array.dtype}. Remedy: extract_features(…, dtype="float32")')
        array[rows] = converted

    def finish(self, kind: str, batch: int, last: bool) -> None:
        self._unmarked.append(batch)
        if last or len(self._unmarked) == _SAVE_EVERY:
            for array in self.arrays.values():
                array.flush()
            self.arrays[f"{kind}_done"][self._unmarked] = True  # after the data
            self._unmarked.clear()


def _prepare(folder: Path, layout: dict[str, tuple[tuple[int, ...], str]]) -> None:
    """Create the arrays, or keep those of an interrupted run if they are what is needed."""
    try:
        kept = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in layout}
        if all(
            (kept[name].shape, kept[name].dtype) == (shape, np.dtype(kind)) for name, (shape, kind) in layout.items()
        ):
            return
    except (OSError, ValueError, EOFError):  # not begun, or not usable
        pass
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    need = sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in layout.values())
    free = shutil.disk_usage(folder).free
    if need > free:
        folder.rmdir()
        raise MmkitError(
            f"The features need {need / 1e9:.2f} GB and the disk of {folder.parent} has {free / 1e9:.2f} GB free. "
            "Remedy: free space, or set MMKIT_CACHE to a folder on another disk."
        )
    for name, (shape, kind) in layout.items():
        path = folder / f"{name}.npy"
        np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape).flush()
        if hasattr(os, "posix_fallocate"):  # a disk that fills up would kill the process that writes to the map
            with path.open("r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)


def _pixels(
    dataset: CaptionDataset, preprocessor: MultimodalPreprocessor, batches: Sequence[int], size: int
) -> Iterator[Tensor]:
    """The pixels of these batches, decoded ahead in threads while the encoder computes."""

    def decode(batch: int) -> Tensor:
        files = dataset.files[batch * size : (batch + 1) * size]
        return torch.stack([preprocessor.preprocess_image(dataset.root / file) for file in files])

    coming = iter(batches)
    with ThreadPoolExecutor(_DECODERS) as pool:
        ahead = deque(pool.submit(decode, batch) for batch in islice(coming, 2 * _DECODERS))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(decode, batch) for batch in islice(coming, 1))


def _encode_images(dataset: CaptionDataset, encoders: Encoders, work: _Work, size: int, show: bool = True) -> None:
    todo = work.todo("images")
    pixels = _pixels(dataset, encoders.preprocessor, todo, size)
    for batch in progress(todo, "image features", unit="batches") if show else todo:
        output = encoders.image(next(pixels))
        rows = slice(batch * size, batch * size + len(output.pooled))
        work.write("images", rows, output.pooled)
        if "grids" in work.arrays:
            work.write("grids", rows, output.grid.flatten(2).transpose(1, 2))
        work.finish("images", batch, batch == todo[-1])


def _encode_captions(texts: _Texts, encoders: Encoders, work: _Work, show: bool = True) -> None:
    todo = work.todo("captions")
    for batch in progress(todo, "caption features", unit="batches") if show else todo:
        first = batch * texts.batch
        chosen = texts.texts[first : first + texts.batch]
        output = encoders.text(**encoders.preprocessor.preprocess_text(chosen))
        rows = [texts.rows[text] for text in chosen]
        copies = torch.repeat_interleave(torch.tensor([len(same) for same in rows]))
        work.write("captions", [row for same in rows for row in same], output.pooled.cpu()[copies])
        if "tokens" in work.arrays:
            start = int(texts.ends[first - 1]) if first else 0
            end = int(texts.ends[first + len(chosen) - 1])
            work.write("tokens", slice(start, end), output.tokens[output.mask.bool()])
        work.finish("captions", batch, batch == todo[-1])


def _finish(folder: Path, beside: Path, dataset: CaptionDataset, made_from: dict, spans: np.ndarray | None) -> None:
    for name in ("images_done", "captions_done"):
        (beside / f"{name}.npy").unlink()
    np.save(beside / "image_ids.npy", np.array(dataset.image_ids, dtype=np.int64))
    np.save(beside / "caption_image.npy", np.asarray(dataset.caption_image, dtype=np.int64))
    if spans is not None:
        np.save(beside / "token_spans.npy", spans)
    sums = {path.stem: sha256_of(path) for path in sorted(beside.glob("*.npy"))}
    (beside / "manifest.json").write_text(json.dumps(made_from | {"sha256": sums}), encoding="utf-8")
    beside.replace(folder)


def extract_features(
    dataset: CaptionDataset,
    encoders: Encoders,
    cache: str | Path,
    precision: str = "auto",
    grids: bool = False,
    tokens: bool = False,
    dtype: str = "float16",
) -> FeatureStore:
    """The pooled features of all images and captions, stored under `cache`; on request the `grids` of all images
    (49 times as large) and the `tokens` of all captions (about 14 times).

    The folder's name is a digest of the dataset, the encoders, their weights, the preprocessing, the precision and
    what is stored, so that a change of any of them extracts anew; a store that holds more than is asked for will
    do. An interrupted extraction goes on where it stopped; of two processes that ask for the same features one
    extracts and the other waits; a store whose checksums are wrong is made again. The processes of one job
    (torchrun, accelerate launch) share the batches; the bytes do not depend on their number. `precision` is that of
    the encoders' arithmetic: "float32", "bfloat16", or "auto", which takes bfloat16 where the processor has it;
    `dtype` is that of the files.
    """
    autocast, precision = _autocast(encoders, precision)
    if dtype not in DTYPES:
        raise MmkitError(f"No dtype {dtype!r}. Valid names: {', '.join(DTYPES)}")
    made_from = _made_from(dataset, encoders, precision=precision, dtype=dtype)
    stored = [{"grids": cells, "tokens": words} for cells in sorted({grids, True}) for words in sorted({tokens, True})]
    folders = [_folder(cache, made_from | parts) for parts in stored]  # what is asked for, then what holds more
    state = PartialState(cpu=not torch.accelerator.is_available())
    with ExitStack() as held:
        if state.is_main_process:
            try:
                folders[0].parent.mkdir(parents=True, exist_ok=True)
                for folder in folders:
                    held.enter_context(FileLock(folder.with_suffix(".lock")))
            except OSError as error:
                raise MmkitError(
                    f"Features cannot be written to {folders[0].parent} ({error.strerror}). Remedy: set MMKIT_CACHE."
                ) from None
            for folder in folders:
                if is_whole(folder):
                    break
                shutil.rmtree(folder, ignore_errors=True)
        state.wait_for_everyone()
        folder = next((folder for folder in folders if folder.is_dir()), folders[0])
        if not folder.is_dir():
            _extract(dataset, encoders, autocast, state, folder, made_from | stored[0])
        state.wait_for_everyone()
    return FeatureStore(folder)


def _folder(cache: str | Path, made_from: dict) -> Path:
    return Path(cache) / "features" / hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]


def _extract(
    dataset: CaptionDataset,
    encoders: Encoders,
    autocast: torch.autocast,
    state: PartialState,
    folder: Path,
    made_from: dict,
) -> None:
    beside, kind = folder.with_suffix(".part"), made_from["dtype"]
    image_batch = _IMAGE_BATCH.get(encoders.image.device.type, 4)
    texts = _Texts(dataset.captions, encoders.preprocessor, _CAPTION_BATCH.get(encoders.text.device.type, 64))
    if state.is_main_process:
        layout: dict[str, tuple[tuple[int, ...], str]] = {
            "images": ((len(dataset), encoders.image.dim), kind),
            "captions": ((len(dataset.captions), encoders.text.dim), kind),
            "images_done": ((-(-len(dataset) // image_batch),), "bool"),
            "captions_done": ((len(texts),), "bool"),
        }
        if made_from["grids"]:
            cells = encoders.image(encoders.preprocessor.preprocess_image(dataset.image(0))[None]).grid[0, 0].numel()
            layout["grids"] = ((len(dataset), cells, encoders.image.dim), kind)
        if made_from["tokens"]:
            layout["tokens"] = ((int(texts.ends[-1]), encoders.text.dim), kind)
        _prepare(beside, layout)
    state.wait_for_everyone()
    work = _Work(beside, state)
    with autocast:
        _encode_images(dataset, encoders, work, image_batch, show=state.is_main_process)
        _encode_captions(texts, encoders, work, show=state.is_main_process)
    del work  # closes the maps
    state.wait_for_everyone()
    if state.is_main_process:
        _finish(folder, beside, dataset, made_from, texts.spans() if made_from["tokens"] else None)
