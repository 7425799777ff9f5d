"""Checks a folder of pictures and captions: a table of what it holds and of every fault, with file and remedy."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

from ..support import MissingFile, MmkitError, progress
from .layouts import KINDS, Fault, Records, read_folder
from .pictures import examine

TINY = 32  # pixels; less shows no picture to an encoder of 224


@dataclass(frozen=True, eq=False)
class CheckReport:
    """`sizes` `(N, 2)` holds width and height of all pictures that can be decoded; `records` is None where the JSON
    cannot be read."""

    records: Records | None
    sizes: np.ndarray
    faults: tuple[Fault, ...]

    @property
    def safe(self) -> bool:
        """Whether no fault stops training."""
        return all(fault.kind != "stops" for fault in self.faults)

    def table(self, show: int | None = None) -> str:
        """The report as text; with `show`, at most so many faults of a kind."""
        lines = [f"{name:<19} {value}" for name, value in (self._counts() if self.records else ())]
        for kind in KINDS:
            faults = sorted((fault for fault in self.faults if fault.kind == kind), key=lambda f: (f.what, f.where))
            lines += [f"  {kind:<9} {f.where}: {f.what}. Remedy: {f.remedy}" for f in faults[:show]]
            if left := len(faults) - len(faults[:show]):
                lines.append(f"  {kind:<9} … and {left:,} more (--show {len(faults)})")
        return "\n".join([*lines, f"This folder is {'safe' if self.safe else 'NOT safe'} to train on."])

    def _counts(self) -> Iterator[tuple[str, str]]:
        records = self.records
        splits = Counter(name or "to be cut" for name in records.splits)
        per_image = Counter(np.bincount(records.image_index).tolist())
        words = np.array([len(caption.split()) for caption in records.captions])
        yield "images", f"{len(records.files):,}"
        if splits:
            yield "splits", "   ".join(f"{name}: {count:,}" for name, count in splits.items())
        yield "captions", f"{len(records.captions):,}"
        yield "captions per image", "   ".join(f"{n}: {count:,} images" for n, count in sorted(per_image.items()))
        yield "words per caption", f"{words.min()} to {words.max():,}, median {np.median(words):.0f}"
        for name, side in zip(("width", "height"), self.sizes.T, strict=True) if len(self.sizes) else ():
            yield f"{name}, pixels", f"{side.min():,} to {side.max():,}, median {np.median(side):.0f}"
        counts = Counter(fault.kind for fault in self.faults)
        yield "faults", "   ".join(f"{kind}: {counts[kind]:,}" for kind in KINDS)


def check_folder(folder: str | Path, skip_missing: bool = False) -> CheckReport:
    """Read a folder (see `read_folder`), decode every picture on all cores, and name every fault with its kind.

    JSON that cannot be read is one that stops; without a folder or annotations it is a `MissingFile`."""
    try:
        records = read_folder(folder, skip_missing)
    except MissingFile:
        raise
    except MmkitError as error:
        what, _, remedy = str(error).partition(" Remedy: ")
        return CheckReport(None, np.empty((0, 2), int), (Fault("stops", what.rstrip("."), "annotations", remedy),))
    sizes, faults = [], list(records.faults)
    with ThreadPool() as pool:  # Pillow decodes outside the interpreter's lock
        examined = pool.imap(lambda file: examine(records.root / file), records.files, chunksize=8)
        pictures = progress(examined, "decoding", len(records.files), "images")
        for file, (*size, changes, problem) in zip(records.files, pictures, strict=True):
            if problem:
                faults.append(Fault("stops", problem, file, "bring the file again, or remove its records"))
                continue
            sizes.append(size)
            faults += [Fault("repaired", change, file, "none needed") for change in changes]
            if min(size) < TINY:
                what = f"{size[0]} × {size[1]} pixels show no picture"
                faults.append(Fault("kept", what, file, "remove its records"))
    return CheckReport(records, np.array(sizes, dtype=int).reshape(-1, 2), tuple(faults))
