"""Brings COCO 2014 in Karpathy's split: captions, and the pictures by archive or one by one."""

import random
import shutil
import threading
import zipfile
from collections.abc import Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import msgspec
import requests
from filelock import FileLock
from tqdm import tqdm

from ..support import MmkitError, progress, progress_bar, sha256_of, write_whole
from .layouts import KarpathyImage
from .pictures import PictureIndex, examine

TIMEOUT = 30.0  # seconds, to connect and between two arrivals
CHUNK = 1 << 16  # bytes read at once
TRIES = 5  # answers in a row that are wrong, or break off no later than one before
PAUSE = 1.0  # seconds after the first of them; after the others 3, 7, and so on
LONGEST = 120.0  # seconds, however long the server wants us to wait
HOPELESS = 10  # files that did not come: the server is down
ARCHIVE_FROM = 0.2  # share of an archive's pictures that are missing: from here on it beats single pictures


class Published(NamedTuple):
    """A file on a server: its URL, its bytes and SHA-256 in hex; of a picture the usual bytes, and no SHA-256."""

    url: str
    size: int = 170_000
    sha256: str | None = None

    def problem(self, path: Path) -> str | None:
        """How a file differs from the published one, or why it is no picture; None if it is as it should be."""
        if self.sha256 is None:
            return examine(path).problem
        digest = sha256_of(path)
        return None if digest == self.sha256 else f"its SHA-256 is {digest}, published is {self.sha256}"


# Sizes and hashes are those of TensorFlow Datasets: tensorflow_datasets/url_checksums/coco_captions.txt
COCO = {
    "caption_datasets.zip": Published(
        "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip", 36_745_453,
        "4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817"),
    "train2014.zip": Published("http://images.cocodataset.org/zips/train2014.zip", 13_510_573_713,
        "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775"),
    "val2014.zip": Published("http://images.cocodataset.org/zips/val2014.zip", 6_645_013_297,
        "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0"),
}  # fmt: skip


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


class _Transfers:
    """Brings files over HTTP, several at once, as .part until they are whole; archives go on where their parts end."""

    def __init__(self, connections: int) -> None:
        self._connections, self._session = connections, requests.Session()
        self._session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=connections))

    def bring(self, wanted: Mapping[Path, Published], what: str) -> list[str]:
        """Fetch the files that are not there as published; the messages of those that did not come."""
        self._stop, total = threading.Event(), sum(one.size for one in wanted.values())
        with progress_bar(what, total, "B", True) as bar, ThreadPoolExecutor(self._connections) as pool:
            try:
                done = as_completed([pool.submit(self._fetch, *item, bar) for item in wanted.items()])
                return list(islice(filter(None, (future.result() for future in done)), HOPELESS))
            finally:  # also after Ctrl-C
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, target: Path, published: Published, bar: tqdm) -> str | None:
        """Bring one file; why it did not come, None if it did."""
        if target.is_file() and published.problem(target) is None:
            return None
        target.unlink(missing_ok=True)
        target.parent.mkdir(exist_ok=True)
        part, faults, reached, wait = target.with_suffix(".part"), 0, 0, 0.0
        while faults < TRIES:
            self._stop.wait(max(wait, PAUSE * (2**faults - 1)))
            try:
                if published.sha256 is None or _size_of(part) < published.size:
                    self._append(part, published, bar)
                if (problem := published.problem(part)) is None:
                    part.replace(target)
                    return None
                part.unlink()
            except requests.RequestException as error:
                problem, headers = str(error), {} if error.response is None else error.response.headers
                said = headers.get("Retry-After", "")
                wait = min(float(said), LONGEST) if said.isdigit() else 0.0
            faults = 1 if _size_of(part) > reached else faults + 1
            reached = max(reached, _size_of(part))
        return f"{published.url}: {problem} (tried {TRIES} times)"

    def _append(self, part: Path, published: Published, bar: tqdm) -> None:
        """Ask for what is missing of an archive's part, or for a whole picture."""
        have = _size_of(part) if published.sha256 else 0
        rest = {"Range": f"bytes={have}-"}
        with self._session.get(published.url, headers=rest, stream=True, timeout=TIMEOUT) as answer:
            answer.raise_for_status()
            if have and answer.status_code != 206:  # a proxy's page, say: it must not cost the part
                raise requests.RequestException(f"not the bytes from {have:,} came, which were asked for")
            with part.open("ab" if have else "wb") as stream:
                for chunk in answer.iter_content(CHUNK):
                    if self._stop.is_set():
                        raise CancelledError
                    stream.write(chunk)
                    bar.update(len(chunk))


def _choose(records: list[KarpathyImage], images: int) -> list[int]:
    """Positions of the chosen records, ascending. A smaller choice is part of every larger one."""
    if images > len(records):
        raise MmkitError(f"images is {images:,}; there are {len(records):,}. Remedy: name no number to bring all.")
    splits = ["train" if record.split == "restval" else record.split for record in records]
    counts = {name: min(round(share * images), splits.count(name)) for name, share in (("val", 0.1), ("test", 0.15))}
    chosen = []
    for name, count in {"train": images - sum(counts.values()), **counts}.items():
        positions = [position for position, split in enumerate(splits) if split == name]
        random.Random(0).shuffle(positions)
        chosen += positions[:count]
    return sorted(chosen)


def _download(folder: Path, images: int | None, transfers: _Transfers, source: Mapping[str, Published]) -> list[str]:
    """Bring all; the messages of what did not come."""
    captions, *archives = source
    if problems := transfers.bring({folder / captions: source[captions]}, "captions"):
        return problems
    with zipfile.ZipFile(folder / captions) as zipped:
        content = zipped.read("dataset_coco.json")
    listed = msgspec.json.decode(content, type=dict[str, msgspec.Raw])["images"]
    records = msgspec.json.decode(listed, type=list[KarpathyImage])
    if images is not None:
        chosen, raw = _choose(records, images), msgspec.json.decode(listed, type=list[msgspec.Raw])
        content = msgspec.json.encode({"images": [raw[position] for position in chosen], "dataset": "coco"})
        records = [records[position] for position in chosen]

    index, wanted, packed, need = PictureIndex(folder), {}, {}, 0
    for path, archive in ((folder / name, source[name]) for name in archives):
        there = [record for record in records if record.filepath == path.stem]
        absent = [one for one in there if not _size_of(folder / (index.find(path.stem, one.filename) or "absent"))]
        if images is None and path.is_file():  # its unpacking may have been broken off
            wanted[path], packed[path] = archive, there
        elif images is None and len(absent) > ARCHIVE_FROM * len(there):
            wanted[path], packed[path] = archive, absent
            need += 2 * archive.size - _size_of(path.with_suffix(".part"))
        else:  # by itself a picture lies at the URL of its archive, but for "zips/" and ".zip"
            above = archive.url.replace("/zips/", "/").removesuffix(".zip")
            wanted |= {path.with_suffix("") / one.filename: Published(f"{above}/{one.filename}") for one in absent}
    if need > (free := shutil.disk_usage(folder).free):
        problem = f"{folder} needs {need / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free."
        raise MmkitError(f"{problem} Remedy: free space, name a folder on another disk, or bring fewer images.")

    problems = transfers.bring(wanted, "pictures")
    for path in filter(Path.is_file, packed):
        with zipfile.ZipFile(path) as zipped:
            for one in progress(packed[path], f"unpacking {path.name}", unit="images"):
                zipped.extract(f"{one.filepath}/{one.filename}", folder)
        path.unlink()
    if not problems:
        write_whole(folder / "dataset_coco.json", content.decode())
    return problems


def download_coco(
    folder: str | Path, images: int | None = None, connections: int = 8, source: Mapping[str, Published] = COCO
) -> Path:
    """Bring COCO 2014 in Karpathy's split (113,287 / 5,000 / 5,000 images) into `folder`, and return the folder.

    Takes 20 GB, and as much again until the archives are unpacked. `images` brings so many only, one by one, always the
    same: 15 % from Karpathy's test split, 10 % from val, the others from train. Pictures that are there are used, also
    those of COCO 2017, and a run that was broken off goes on where it stopped: `dataset_coco.json` is written last. An
    `MmkitError` names the files that did not come, or what is wrong with the folder."""
    folder = Path(folder)
    if connections < 1 or (images is not None and images < 10):
        raise MmkitError(f"images={images}, connections={connections}: at least 10 images and 1 connection are needed.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".download.lock", blocking=False):
            problems = _download(folder, images, _Transfers(connections), source)
    except OSError as error:  # a lock of another process too
        remedy = "Remedy: name a folder in which you may write and no other process downloads, on a disk with room."
        raise MmkitError(f"{folder} cannot be written to ({error}). {remedy}") from None
    if problems:
        listed, again = "\n".join(problems), "Remedy: run the same command again; what came is kept."
        raise MmkitError(f"{len(problems):,} files could not be brought to {folder}:\n{listed}\n{again}")
    return folder
