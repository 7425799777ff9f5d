"""One store per encoder: rows of features on disk, which grow by shards and are read through memory maps."""

import hashlib
import json
import mmap
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

from .support import MmkitError, progress_bar, sha256_of

_LARGE = 2**28  # bytes; what is read of larger tables is given back to the system's cache at once
_SHARES = 8  # shards that a process makes at least, where there is work for so many: what a kill may cost
_AN_HOUR = 3600  # seconds, after which a shard that is not whole is no other process's work
DTYPES = ("float16", "float32")
Encoded = tuple[Tensor, Tensor, Tensor]  # of a batch: vectors (n, D), all parts (P, D), how many each item has (n,)
Rows = Sequence[int] | np.ndarray | Tensor | slice
Result = TypeVar("Result")


def as_index(rows: Rows) -> slice | np.ndarray:
    """Rows as numpy takes them."""
    return rows if isinstance(rows, slice) else np.asarray(rows, dtype=None if len(rows) else int)


def once(work: Callable[[], Result]) -> Result:
    """What `work` gives, done by one process of a job for all of them: while they read, disks change."""
    main = PartialState(cpu=not torch.accelerator.is_available()).is_main_process
    return broadcast_object_list([work() if main else None])[0]


class Shard(NamedTuple):
    """`vectors` `(n, D)` of n items and, where they were asked for, all their `parts` `(P, D)`, item after item, of
    which those of item i end at `ends[i]`."""

    vectors: np.ndarray
    parts: np.ndarray | None = None
    ends: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """N items of one encoder: item `i` lies in `shards[shard[i]]`, in its row `row[i]`; both int64 `(N,)`. Where they
    are not many, `held` `(N, D)` are their vectors, in memory."""

    shards: Sequence[Shard]
    shard: np.ndarray
    row: np.ndarray
    made_from: dict = field(default_factory=dict)
    held: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.row)

    @property
    def dim(self) -> int:
        """The width of a vector."""
        return self.shards[0].vectors.shape[1] if self.shards else 0

    @property
    def has_parts(self) -> bool:
        """Whether these items' parts are there too."""
        return all(shard.parts is not None for shard in self.shards)

    @classmethod
    def in_memory(cls, vectors: np.ndarray | Tensor, parts: np.ndarray | Tensor | None = None) -> "FeatureTable":
        """Vectors `(N, D)` and perhaps parts `(N, P, D)`, whose rows of zeros are padding."""
        shard = Shard(np.asarray(vectors))
        if parts is not None:
            present = (np.asarray(parts) != 0).any(axis=2)
            shard = Shard(shard.vectors, np.asarray(parts)[present], present.sum(axis=1).cumsum())
        return cls([shard], np.zeros(len(vectors), dtype=int), np.arange(len(vectors)))

    def select(self, rows: Rows) -> "FeatureTable":
        """The table of these items, in this order."""
        parts = {name: getattr(self, name) for name in ("shard", "row", "held")}
        return replace(self, **{name: part if part is None else part[as_index(rows)] for name, part in parts.items()})

    def vectors(self) -> Tensor:
        """float32 `(N, D)`."""
        return torch.from_numpy(self.stored() if self.held is None else self.held).float()  # faster than numpy's astype

    def stored(self) -> np.ndarray:
        """The vectors `(N, D)` as they are stored."""
        vectors = np.empty((len(self), self.dim), self.shards[0].vectors.dtype if self.shards else "float32")
        for number in np.unique(self.shard):
            here = np.flatnonzero(self.shard == number)
            vectors[here] = self._read(self.shards[number].vectors, self.row[here])
        return vectors

    def parts(self) -> tuple[Tensor, Tensor]:
        """float32 `(N, P, D)`, zeros behind the last part of each item, and how many each has `(N,)`."""
        items = [(self.shards[number], row) for number, row in zip(self.shard, self.row, strict=True)]
        spans = [(int(shard.ends[row - 1]) if row else 0, int(shard.ends[row])) for shard, row in items]
        counts = torch.tensor([end - start for start, end in spans], dtype=torch.long)
        stacks = torch.zeros(len(self), int(counts.max()) if len(self) else 0, self.dim)
        for item, ((shard, _), span) in enumerate(zip(items, spans, strict=True)):
            stacks[item, : counts[item]] = torch.from_numpy(self._read(shard.parts, np.arange(*span)))
        return stacks, counts

    def _read(self, source: np.ndarray, rows: np.ndarray) -> np.ndarray:
        values = source.take(rows, axis=0)
        large = source.nbytes * len(self.shards) > _LARGE
        if large and isinstance(source.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            source.base.madvise(mmap.MADV_DONTNEED)
        return values


class FeatureStore:
    """A folder of shards of one encoder, its preprocessing and precision; `made_from` says which, and the `dtype`.

    A shard is a folder with the arrays of `Shard` and `shard.json`: the keys of its rows (digests of pictures' bytes or
    of texts) and the arrays' SHA-256. It is written aside and renamed when whole, so processes need no lock."""

    def __init__(self, cache: str | Path, made_from: dict) -> None:
        if made_from["dtype"] not in DTYPES:
            raise MmkitError(f"No dtype {made_from['dtype']!r}. Valid names: {', '.join(DTYPES)}")
        digest = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
        self.made_from, self.folder = made_from, Path(cache) / "features" / digest
        self.shards: list[Path] = []
        self.places: dict[str, tuple[int, int]] = {}  # key → number of the shard, row in it

    def open(self, parts: bool, repair: bool = False) -> None:
        """Find all shards, or those with parts, and the place of each key; `repair` removes those that are damaged or
        were left by a killed process."""
        self.shards, self.places = [], {}
        for folder in sorted(self.folder.glob("*")):
            try:
                if folder.suffix == ".part":
                    if repair and time.time() - folder.stat().st_mtime > _AN_HOUR:
                        shutil.rmtree(folder, ignore_errors=True)
                    continue
                content = json.loads((folder / "shard.json").read_bytes())
                keys, sums = content["keys"], content["sha256"].items()
                if repair and any(sha256_of(folder / f"{name}.npy") != digest for name, digest in sums):
                    raise ValueError("not what was written")
            except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
                if repair:
                    shutil.rmtree(folder, ignore_errors=True)
                continue
            except OSError as error:  # no fault of the shard: it is kept
                raise MmkitError(f"The features in {folder} cannot be read ({error.strerror}).") from None
            if "parts" not in content["sha256"]:
                if parts:
                    continue
                self.places |= {key: (len(self.shards), row) for row, key in enumerate(keys)}
            for row, key in enumerate(keys):  # vectors that were there before the parts stay what they are
                self.places.setdefault(key, (len(self.shards), row))
            self.shards.append(folder)

    def fill(
        self, keys: Sequence[str], parts: bool, order: Callable[[list[int]], list[int]],
        encode: Callable[[list[list[int]]], Iterable[Encoded]], batch: int, most: int, what: str,
    ) -> FeatureTable:  # fmt: skip
        """The table of `keys`; what is missing is encoded now, by all processes of a job, each its own shards. `order`
        sorts positions in `keys` for encoding, `encode` takes batches of them; a shard has at most `most` rows."""
        state = PartialState(cpu=not torch.accelerator.is_available())

        def missing() -> list[int]:  # where those stand that no whole shard has, each once
            self.open(parts, repair=True)
            first = {key: at for at, key in reversed(list(enumerate(keys)))}
            return order(sorted(at for key, at in first.items() if key not in self.places))

        todo = once(missing)
        if todo:
            size = min(most, -(-len(todo) // (_SHARES * state.num_processes * batch)) * batch)
            shards = [todo[at : at + size] for at in range(0, len(todo), size)]
            shards = shards[state.process_index :: state.num_processes]
            coming = iter(encode([shard[at : at + batch] for shard in shards for at in range(0, len(shard), batch)]))
            with progress_bar(what, sum(map(len, shards)) * state.is_main_process, unit="items") as bar:
                for shard in shards:
                    blocks = []
                    for vectors, stack, counts in islice(coming, -(-len(shard) // batch)):
                        # a view would keep all that the encoder gave
                        blocks.append((vectors.clone(), stack if parts else stack.new_empty(0, 0), counts))
                        bar.update(len(vectors))
                    self._write([keys[at] for at in shard], self._arrays(blocks, parts))
            state.wait_for_everyone()
        self.open(parts)
        places = np.array([self.places[key] for key in keys], dtype=np.int64).reshape(-1, 2)
        used, shard = np.unique(places[:, 0], return_inverse=True)
        table = FeatureTable([self._load(number, parts) for number in used], shard, places[:, 1], self.made_from)
        large = len(table) * table.dim * np.dtype(self.made_from["dtype"]).itemsize > _LARGE
        return table if large else replace(table, held=table.stored())

    def _load(self, number: int, parts: bool) -> Shard:
        """Memory maps of a shard's arrays, each an open file."""
        names = ("vectors", "parts", "ends") if parts else ("vectors",)
        return Shard(*(np.load(self.shards[number] / f"{name}.npy", mmap_mode="r") for name in names))

    def _arrays(self, blocks: Sequence[Encoded], parts: bool) -> dict[str, np.ndarray]:
        vectors, stack, counts = (torch.cat(column).numpy(force=True) for column in zip(*blocks, strict=True))
        with np.errstate(over="ignore"):
            arrays = {"vectors": vectors.astype(self.made_from["dtype"])}
            arrays |= {"parts": stack.astype(self.made_from["dtype"])} if parts else {}
        if not all(np.isfinite(values).all() for values in arrays.values()):
            dtype = self.made_from["dtype"]
            raise MmkitError(f'Features do not fit into {dtype}. Remedy: extract_features(…, dtype="float32")')
        return arrays | ({"ends": counts.cumsum()} if parts else {})

    def _write(self, keys: Sequence[str], arrays: dict[str, np.ndarray]) -> None:
        """Add a shard. An error if the disk is full; what was written before stays."""
        name = hashlib.sha256(json.dumps([*keys, *arrays]).encode()).hexdigest()[:16]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(prefix=name, suffix=".part", dir=self.folder))
            try:
                for array, values in arrays.items():
                    np.save(beside / f"{array}.npy", values)
                sums = {array: sha256_of(beside / f"{array}.npy") for array in arrays}
                (beside / "shard.json").write_text(json.dumps({"keys": list(keys), "sha256": sums}))
                beside.chmod(0o755)
                try:
                    beside.rename(self.folder / name)
                except OSError:
                    if not (self.folder / name).is_dir():  # else another process was first
                        raise
            finally:
                shutil.rmtree(beside, ignore_errors=True)
        except OSError as error:
            raise MmkitError(
                f"Features cannot be written to {self.folder} ({error.strerror or error}); those of before are kept. "
                "Remedy: free space, or set MMKIT_CACHE to a folder on another disk."
            ) from None
