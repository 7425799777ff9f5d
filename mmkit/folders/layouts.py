"""Reads a folder of pictures and captions into `Records`: COCO 2014 and 2017, subsets, drawn scenes, Karpathy's file.

What happens to a fault is decided here and in `check`, once, by its kind. It **stops**: `load_dataset` refuses the
folder (a missing picture). Or the record is **skipped** (an image without captions), **repaired** (control characters
become spaces) or **kept**: used as it is, and named because it may surprise (an emoji).
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from ..support import MissingFile, MmkitError
from .pictures import PictureIndex, stays_inside

KINDS = ("stops", "skipped", "repaired", "kept")
LONG_CAPTION = 2000  # characters; about 512 word pieces, the most that BERT reads
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
BEYOND_LATIN = re.compile(r"[\u0370-\u1dff\u2300-\u2bff\u2e80-\ufdff\U00010000-\U0010ffff]")  # letters, symbols, emoji


class Fault(NamedTuple):
    """Something unusual in a folder: its kind (see the module), what it is, in which file, and the remedy."""

    kind: str
    what: str
    where: str
    remedy: str


@dataclass(frozen=True, eq=False)
class Records:
    """`N` images that have a file (relative to `root`) and captions; `image_index` `(M,)` is the image of each caption.

    `splits` (names, "" where none is given) and `scenes` (facts of drawn scenes, raw) have N entries, or none."""

    root: Path
    image_ids: tuple[int, ...]
    files: tuple[str, ...]
    captions: tuple[str, ...]
    image_index: np.ndarray
    splits: tuple[str, ...]
    scenes: tuple[dict[str, Any], ...]
    faults: tuple[Fault, ...]


class Collector:
    """What a reader found so far: by image id the file, whether it is there, split and facts; captions; faults."""

    def __init__(self, root: Path) -> None:
        self.root, self._index = root, PictureIndex(root)
        self.images: dict[int, tuple[str, bool, str, dict[str, Any] | None]] = {}
        self.captions: dict[int, list[str]] = {}
        self.faults: list[Fault] = []

    def fault(self, kind: str, what: str, where: str, remedy: str = "none needed") -> None:
        self.faults.append(Fault(kind, what, where, remedy))

    def add_image(self, source: Path, image_id: int, folder: str, name: str, split: str, scene: Any = None) -> None:
        """The file `source` lists the picture `folder/name`. Raises `MmkitError` if that leaves the root."""
        if not (stays_inside(name) and stays_inside(folder)):
            raise MmkitError(f"{source}: {folder}/{name} leaves the folder. Remedy: fetch this file from its source.")
        file = self._index.find(folder, name)
        image = (file or f"{folder}/{name}", file is not None, split, scene)
        earlier = self.images.setdefault(image_id, image)
        if earlier != image:
            what = f"image id {image_id} names two pictures, {earlier[0]} and {image[0]}"
            self.fault("stops", what, source.name, "remove one of the records")
        elif earlier is not image:
            self.fault("skipped", f"image {image_id} is listed again", source.name)

    def add_caption(self, source: Path, image_id: int, raw: str | None) -> None:
        """The file `source` holds a caption of that image, which may be listed later."""
        raw = " ".join((raw or "").split())
        if raw.isascii() and raw.isprintable() and 0 < len(raw) <= LONG_CAPTION:  # as nearly all are: nothing to mend
            return self.captions.setdefault(image_id, []).append(raw)
        whose, where = f"caption of image {image_id}", source.name
        text = " ".join(CONTROL.sub(" ", raw).split())
        if text != raw:
            self.fault("repaired", f"{whose} held control characters, now spaces", where)
        if not text:
            return self.fault("skipped", f"{whose} is empty", where, "write one, or remove the record")
        if len(text) > LONG_CAPTION:
            what = f"{whose} has {len(text):,} characters; the preprocessor cuts it at the token limit"
            self.fault("repaired", what, where, "shorten it")
        if strange := BEYOND_LATIN.search(text):
            what = f"{whose} holds {strange[0]!r}, which BERT's word pieces may not know"
            self.fault("kept", what, where, "a multilingual text encoder")
        self.captions.setdefault(image_id, []).append(text)

    def records(self, skip_missing: bool) -> Records:
        """The images that have both their file and a caption; all that is left out becomes a fault."""
        for image_id in sorted(self.captions.keys() - self.images.keys()):
            what = f"{len(self.captions[image_id])} captions of image {image_id}, which is not listed"
            self.fault("skipped", what, "annotations", "list the image, or remove them")
        kept, kind = [], "skipped" if skip_missing else "stops"
        for image_id, (file, there, _, _) in self.images.items():
            if image_id not in self.captions:
                self.fault("skipped", f"image {image_id} has no caption", file, "write one, or remove the record")
            elif there:
                kept.append(image_id)
            else:
                self.fault(kind, "picture file is missing", file, "bring it, or leave it out with --skip-missing")
        if not kept:
            first = "".join(f" The first of {len(self.faults):,} faults: {f.where}: {f.what}." for f in self.faults[:1])
            raise MissingFile(f"{self.root} holds no image that has both its file and a caption.{first}")
        files, _, splits, scenes = zip(*(self.images[image_id] for image_id in kept), strict=True)
        splits, scenes = splits if any(splits) else (), scenes if all(scenes) else ()
        captions = tuple(text for image_id in kept for text in self.captions[image_id])
        image_index = np.repeat(np.arange(len(kept)), [len(self.captions[image_id]) for image_id in kept])
        return Records(self.root, tuple(kept), files, captions, image_index, splits, scenes, tuple(self.faults))


def decode(path: Path, **fields: Any) -> Any:
    """A JSON object's `fields` of the types named, others passed over. An `MmkitError` names the file and the place."""
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        return msgspec.json.decode(raw, type=msgspec.defstruct("File", list(fields.items())))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # "Expected `int`, got `str` - at `$.images[3].id`"
        raise MmkitError(f"{path} is no COCO or Karpathy JSON: {error}. Remedy: mend it, or fetch it again.") from None


class _Sentence(msgspec.Struct, gc=False):
    raw: str | None


class KarpathyImage(msgspec.Struct, gc=False):
    """A picture of COCO 2014 in Karpathy's file."""

    cocoid: int
    filepath: str
    filename: str
    split: str
    sentences: list[_Sentence]


def read_karpathy(collector: Collector) -> bool:
    """`dataset_coco.json`, which lists COCO 2014 in splits, at the top or in `annotations/`; False without one."""
    places = collector.root / "dataset_coco.json", collector.root / "annotations/dataset_coco.json"
    if (path := next(filter(Path.is_file, places), None)) is None:
        return False
    for image in decode(path, images=list[KarpathyImage]).images:
        collector.add_image(path, image.cocoid, image.filepath, image.filename, image.split)
        for sentence in image.sentences:
            collector.add_caption(path, image.cocoid, sentence.raw)
    return True


class _CocoImage(msgspec.Struct, gc=False):
    id: int
    file_name: str
    split: str = ""
    scene: dict[str, Any] | None = None


class _CocoCaption(msgspec.Struct, gc=False, frozen=True):
    image_id: int
    caption: str | None
    id: int | None = None


def read_coco(collector: Collector) -> bool:
    """`annotations/captions_NAME.json`, one or more, with their pictures in `NAME/`, `images/NAME/` or `images/`."""
    root, folders = collector.root, {}
    for path in sorted(root.glob("annotations/captions_*.json")):
        name = path.stem.removeprefix("captions_")
        folders[path] = [folder for folder in (name, f"images/{name}", "images") if (root / folder).is_dir()]
        if not folders[path]:
            collector.fault("skipped", f"there is no folder {name} with its pictures", path.name, "bring them")
    of_2017 = any("2017" in path.stem for path in folders if folders[path])
    for path in filter(folders.get, folders):
        if of_2017 and "2014" in path.stem:
            collector.fault("skipped", "the same photos as the files of 2017", path.name)
            continue
        content, seen = decode(path, images=list[_CocoImage], annotations=list[_CocoCaption]), {}
        for image in content.images:
            collector.add_image(path, image.id, folders[path][0], image.file_name, image.split, image.scene)
        for row in content.annotations:
            earlier = seen.setdefault(row.id, row) if row.id is not None else row
            if earlier is not row and earlier == row:
                collector.fault("skipped", f"caption id {row.id} is listed again", path.name)
                continue
            if earlier is not row:
                collector.fault("kept", f"caption id {row.id} is the id of two captions", path.name)
            collector.add_caption(path, row.image_id, row.caption)
    return bool(folders)


def read_folder(root: str | Path, skip_missing: bool = False) -> Records:
    """Read the annotations under `root`, and see which picture files are there.

    A missing picture is a fault that stops training, or with `skip_missing` is left out with its record. Raises
    `MissingFile` without a folder, annotations or usable images, `MmkitError` for JSON broken or leading outside."""
    collector, layout = Collector(Path(root)), "annotations/captions_*.json"
    remedy = f"Remedy: set MMKIT_COCO_ROOT (or --coco-root) to a folder that holds {layout} and its pictures."
    if not collector.root.is_dir():
        raise MissingFile(f"There is no folder {root}. {remedy}")
    if not (read_karpathy(collector) or read_coco(collector)):
        raise MissingFile(f"{root} holds no {layout} and no dataset_coco.json. {remedy}")
    return collector.records(skip_missing)
