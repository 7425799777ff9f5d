"""Brings COCO 2014 in Karpathy's split: captions, and the pictures by archive or one by one."""

import random
import shutil
import stat
import sys
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import filelock
import msgspec

from .errors import MmkitError
from .pictures import PictureIndex, stays_inside
from .progress import Bar, progress_bar
from .transfer import AGAIN, Published, Workers, bring, part_of, picture_problem, size_of

_IMAGE_BYTES = 170_000  # of an average picture
_ARCHIVE_FROM = 0.2  # share of an archive's pictures that are missing: from here on it beats single pictures
_JSON = "dataset_coco.json"
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, KeyError)


@dataclass(frozen=True)
class CocoSource:
    """Where COCO 2014 is published: the archive with Karpathy's `dataset_coco.json`, an archive of pictures for each
    folder, and the URL to which a picture's path (`train2014/COCO_….jpg`) is appended."""

    captions: Published
    archives: Mapping[str, Published]
    image_url: str


# Sizes and hashes are those of TensorFlow Datasets: tensorflow_datasets/url_checksums/coco_captions.txt
COCO = CocoSource(
    Published(
        "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
        36_745_453,
        "4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817",
    ),
    {
        "train2014": Published(
            "http://images.cocodataset.org/zips/train2014.zip",
            13_510_573_713,
            "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
        ),
        "val2014": Published(
            "http://images.cocodataset.org/zips/val2014.zip",
            6_645_013_297,
            "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0",
        ),
    },
    "http://images.cocodataset.org/",
)


class _Record(msgspec.Struct):
    filepath: str
    filename: str
    split: Literal["train", "restval", "val", "test"]

    @property
    def path(self) -> str:
        return f"{self.filepath}/{self.filename}"


class _Captions(msgspec.Struct):
    images: list[msgspec.Raw]
    dataset: str


def _belongs(name: str, folder: str) -> bool:
    """Whether the name in an archive or a record lies directly in `folder`, on every system."""
    path = PurePosixPath(name)
    return stays_inside(name) and "\\" not in name and str(path) == name and str(path.parent) == folder


def _read(archive: Path, folders: Collection[str]) -> tuple[bytes, list[msgspec.Raw], list[_Record]]:
    """The JSON as published, its image records byte for byte, and what we need of each."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            content = zipped.read(_JSON)
        raw = msgspec.json.decode(content, type=_Captions).images
        records = [msgspec.json.decode(record, type=_Record) for record in raw]
    except (*_BROKEN, msgspec.MsgspecError) as error:
        archive.unlink()  # else the next run would stop here again
        raise MmkitError(f"{archive}: its {_JSON} cannot be read ({error}); it was removed. {AGAIN}") from None
    for record in records:
        if record.filepath not in folders or not _belongs(record.path, record.filepath):
            raise MmkitError(
                f"{archive}: a record names the picture {record.path!r}, outside {', '.join(folders)}. "
                "Remedy: take the archive from where it is published."
            )
    return content, raw, records


def _choose(records: list[_Record], images: int) -> list[int]:
    """Positions of the chosen records, ascending. A smaller choice is part of every larger one."""
    if images > len(records):
        raise MmkitError(f"images is {images:,}; there are {len(records):,}. Remedy: name no number to bring all.")
    positions: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for position, record in enumerate(records):
        positions["train" if record.split == "restval" else record.split].append(position)
    test = min(round(0.15 * images), len(positions["test"]))
    val = min(round(0.1 * images), len(positions["val"]))
    for split in positions.values():
        random.Random(0).shuffle(split)
    counts = {"train": images - test - val, "val": val, "test": test}
    return sorted(position for split, count in counts.items() for position in positions[split][:count])


def _unpack(workers: Workers, archive: Path, records: list[_Record], bar: Bar) -> list[str]:
    """Unpack the records' pictures that are not there in their size; the messages of those that cannot be."""
    root, folder, index = archive.parent, archive.stem, PictureIndex(archive.parent)
    (root / folder).mkdir(exist_ok=True)
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = {member.filename: member for member in zipped.infolist()}
            for name, member in members.items():
                link = stat.S_ISLNK(member.external_attr >> 16)
                if name != f"{folder}/" and (link or not _belongs(name, folder)):
                    return [f"{archive}: its member {name!r} is a link or lies outside {folder}; nothing was unpacked."]

            def unpack(record: _Record) -> None:
                found, target = index.find(record.filepath, record.filename), root / record.path
                try:
                    if (member := members.get(record.path)) is None:
                        raise zipfile.BadZipFile("is missing")
                    if not found or size_of(root / found) != member.file_size:
                        with zipped.open(member) as packed, part_of(target).open("wb") as stream:
                            shutil.copyfileobj(packed, stream)
                        if problem := picture_problem(part_of(target)):
                            raise zipfile.BadZipFile(problem)
                        part_of(target).replace(target)
                except _BROKEN as error:
                    part_of(target).unlink(missing_ok=True)
                    raise MmkitError(f"{archive}: its member {record.path}: {error}.") from None
                bar.update()

            return workers.run(unpack, records)
    except zipfile.BadZipFile as error:
        return [f"{archive} is no whole ZIP archive ({error})."]


# --- the whole -------------------------------------------------------------------------------


def _check_space(folder: Path, source: CocoSource, shares: Mapping[str, float], singles: int) -> None:
    """Stop unless there is room for the captions, the archives of which these shares are to be unpacked, and
    `singles` pictures."""
    files = {"caption_datasets.zip": source.captions} | {f"{name}.zip": source.archives[name] for name in shares}
    packed = sum(
        max(0, published.size - max(size_of(folder / name), size_of(part_of(folder / name))))
        for name, published in files.items()
    )
    unpacked = sum(share * source.archives[name].size for name, share in shares.items()) + singles * _IMAGE_BYTES
    captions = 0 if (folder / _JSON).is_file() else 4 * source.captions.size  # the JSON packs to a quarter
    need, free = packed + unpacked + captions, shutil.disk_usage(folder).free
    if need > free:
        raise MmkitError(
            f"{folder} needs {need / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free. "
            "Remedy: free space, name a folder on another disk, or bring fewer images."
        )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; another process that holds it is waited for."""
    lock = filelock.FileLock(folder / ".download.lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        print(f"Another process downloads to {folder}. Waiting until it ends.", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        with suppress(OSError):  # while held: who waits sees that the file has gone, and locks a new one
            Path(lock.lock_file).unlink()
        lock.release()


def _plan(folder: Path, records: Mapping[str, list[_Record]], whole: bool) -> tuple[dict[str, float], list[_Record]]:
    """What is missing of each archive's records: the share, where the archive is worth it, and the other pictures."""
    index, shares, singles = PictureIndex(folder), {}, []
    for name, there in records.items():
        absent = []
        for record in there:
            found = index.find(name, record.filename)
            if found is None or not size_of(folder / found):
                absent.append(record)
        fetched = (folder / f"{name}.zip").is_file()
        if whole and absent and (fetched or len(absent) > _ARCHIVE_FROM * len(there)):
            shares[name] = len(absent) / len(there)
        else:
            singles += absent
    return shares, singles


def _bring_pictures(
    folder: Path, records: Mapping[str, list[_Record]], whole: bool, workers: Workers, source: CocoSource
) -> None:
    """Bring what is missing; one error for all that did not come."""
    shares, singles = _plan(folder, records, whole)
    _check_space(folder, source, shares, len(singles))
    archives = {folder / f"{name}.zip": source.archives[name] for name in shares}
    problems = bring(workers, archives, "archives")
    fetched = [path for path in archives if path.is_file()]
    if fetched:
        with progress_bar("unpacking", sum(len(records[path.stem]) for path in fetched), unit="images") as bar:
            for path in fetched:
                problems += _unpack(workers, path, records[path.stem], bar)
                path.unlink()
    if singles:
        with progress_bar("images", len(singles), unit="images") as bar:

            def fetch(record: _Record) -> None:
                workers.fetch(source.image_url + record.path, folder / record.path, picture_problem)
                bar.update()

            problems += workers.run(fetch, singles)
    if problems:
        listed = "\n".join(problems[:5]) + ("\n…" if len(problems) > 5 else "")
        number = "1 file" if len(problems) == 1 else f"{len(problems):,} files"
        raise MmkitError(f"{number} could not be brought to {folder}:\n{listed}\n{AGAIN}")


def _download(folder: Path, images: int | None, workers: Workers, source: CocoSource) -> None:
    captions, target, whole = folder / "caption_datasets.zip", folder / _JSON, images is None
    if not any(next(folder.glob(pictures), None) for pictures in ("*/*.jpg", "*/*/*.jpg")):  # all is to come
        _check_space(folder, source, dict.fromkeys(source.archives, 1.0) if whole else {}, images or 0)
    if problems := bring(workers, {captions: source.captions}, "captions"):
        raise MmkitError(f"{problems[0]} {AGAIN}")
    content, raw, records = _read(captions, source.archives)
    if images is not None:
        chosen = _choose(records, images)
        content = msgspec.json.encode(_Captions([raw[position] for position in chosen], "coco"))
        records = [records[position] for position in chosen]
    by_folder = {name: [record for record in records if record.filepath == name] for name in source.archives}
    _bring_pictures(folder, by_folder, whole, workers, source)

    leftovers = [part_of(target)]  # of runs that were broken off
    for name in source.archives:
        leftovers += [*(folder / name).glob("*.part"), part_of(folder / f"{name}.zip")]
        leftovers += [folder / f"{name}.zip"] if whole else []
    for path in leftovers:
        path.unlink(missing_ok=True)
    if not target.is_file() or target.read_bytes() != content:
        part_of(target).write_bytes(content)
        part_of(target).replace(target)


def download_coco(
    folder: str | Path, images: int | None = None, connections: int = 8, source: CocoSource = COCO
) -> Path:
    """Bring COCO 2014 in Karpathy's split (113,287 / 5,000 / 5,000 images) into `folder`, and return the folder.

    Writes `dataset_coco.json`, last, so that a folder that has it is whole; the pictures in `train2014/` and
    `val2014/`; and keeps `caption_datasets.zip`. Takes 20 GB, and 40 GB while archives are unpacked; they are removed
    afterwards. `images` brings so many only, each by itself: 15 % from Karpathy's test split, 10 % from val, the rest
    from train and restval, always the same ones, and the smaller choice is part of a larger one. Pictures that are
    in the folder are used, also those of COCO 2017. `connections` transfers run at once.

    A run that was broken off goes on where it stopped. An `MmkitError` names the files that did not come, or says
    that the folder cannot be written or its disk is too small.
    """
    folder = Path(folder)
    if connections < 1 or (images is not None and images < 10):
        raise MmkitError(f"images={images}, connections={connections}: at least 10 images and 1 connection are needed.")
    if folder.is_file():
        raise MmkitError(f"{folder} is a file. Remedy: name a folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            _download(folder, images, Workers(connections), source)
    except MmkitError:
        raise
    except OSError as error:
        raise MmkitError(
            f"{folder} cannot be written to ({error}). "
            "Remedy: name a folder in which you may write, on a disk with room."
        ) from None
    return folder
