"""Checks a COCO-captions folder: one table of what it holds and of every fault, with the file and the remedy."""

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from .annotations import KINDS, Fault
from .data import CaptionDataset, load_captions
from .errors import MissingFile, MmkitError
from .pictures import Examined, examine
from .progress import progress

TINY = 32  # pixels; less shows no picture to an encoder of 224
_AT_ONCE = 512  # pictures handed to the threads, so that the queue does not grow with the folder


@dataclass(frozen=True)
class CheckReport:
    """What `check_folder` found. `dataset` is None if its JSON cannot be read; `sizes` `(N, 2)` holds width and
    height in pixels of the N pictures that can be decoded."""

    folder: Path
    dataset: CaptionDataset | None
    sizes: np.ndarray
    faults: tuple[Fault, ...]

    @property
    def safe(self) -> bool:
        """Whether no fault stops training."""
        return not any(fault.kind == "stops" for fault in self.faults)

    def table(self, show: int | None = None) -> str:
        """The report as text; with `show`, at most so many faults of a kind."""
        return "\n".join([*self._counts(), *self._faults(show), self._verdict()])

    def _counts(self) -> Iterator[str]:
        def row(name: str, value: str) -> str:
            return f"{name:<19} {value}"

        data = self.dataset
        if data is not None:
            yield row("images", f"{len(data):,}")
            if data.given_splits:
                counted = Counter(name or "to be cut" for name in data.given_splits)
                yield row("splits", "   ".join(f"{name}: {count:,}" for name, count in counted.items()))
            yield row("captions", f"{len(data.captions):,}")
            per_image = Counter(np.bincount(data.caption_image).tolist())
            yield row(
                "captions per image", "   ".join(f"{n}: {count:,} images" for n, count in sorted(per_image.items()))
            )
            words = np.array([len(caption.split()) for caption in data.captions])
            yield row("words per caption", f"{words.min()} to {words.max():,}, median {np.median(words):.0f}")
        if len(self.sizes):
            ranges = [f"{side.min():,} to {side.max():,}, median {np.median(side):.0f}" for side in self.sizes.T]
            yield row("width, pixels", ranges[0])
            yield row("height, pixels", ranges[1])
        counted = Counter(fault.kind for fault in self.faults)
        yield row("faults", "   ".join(f"{kind}: {counted[kind]:,}" for kind in KINDS))

    def _faults(self, show: int | None) -> Iterator[str]:
        for kind in KINDS:
            found = sorted((fault for fault in self.faults if fault.kind == kind), key=lambda f: (f.what, f.where))
            for fault in found[:show]:
                yield f"  {kind:<9} {fault.where}: {fault.what}. Remedy: {fault.remedy}"
            if show is not None and len(found) > show:
                yield f"  {kind:<9} … and {len(found) - show:,} more (--show {len(found)})"

    def _verdict(self) -> str:
        return "This folder is safe to train on." if self.safe else "This folder is NOT safe to train on."


def _examine_all(dataset: CaptionDataset, workers: int) -> tuple[np.ndarray, list[Fault]]:
    def examined(pool: ThreadPoolExecutor) -> Iterator[Examined]:
        for start in range(0, len(dataset), _AT_ONCE):
            yield from pool.map(lambda file: examine(dataset.root / file), dataset.files[start : start + _AT_ONCE])

    sizes, faults = [], []
    with ThreadPoolExecutor(workers) as pool:  # Pillow decodes outside the interpreter's lock
        pictures = progress(examined(pool), "decoding", len(dataset), "images")
        for file, picture in zip(dataset.files, pictures, strict=True):
            fault = partial(Fault, where=file)
            if picture.problem:
                faults.append(fault("stops", picture.problem, remedy="bring the file again, or remove its records"))
                continue
            sizes.append((picture.width, picture.height))
            faults += [fault("repaired", change, remedy="none needed") for change in picture.changes]
            if min(picture.width, picture.height) < TINY:
                what = f"{picture.width} × {picture.height} pixels show no picture"
                faults.append(fault("kept", what, remedy="remove its records"))
    return np.array(sizes, dtype=int).reshape(-1, 2), faults


def check_folder(folder: str | Path, skip_missing: bool = False, workers: int | None = None) -> CheckReport:
    """Read a folder's annotations and decode every picture with `workers` threads (default: one per CPU core).

    Every fault is named with its kind (see `annotations`); JSON that cannot be read is one that stops.
    Raises `MissingFile` if there is no folder, or no annotations in it.
    """
    folder = Path(folder)
    try:
        dataset = load_captions(folder, skip_missing)
    except MissingFile:
        raise
    except MmkitError as error:
        what, _, remedy = str(error).partition(" Remedy: ")
        fault = Fault("stops", what.rstrip("."), "annotations", remedy.rstrip("."))
        return CheckReport(folder, None, np.empty((0, 2), dtype=int), (fault,))
    sizes, faults = _examine_all(dataset, workers or os.cpu_count() or 1)
    return CheckReport(folder, dataset, sizes, (*dataset.faults, *faults))
