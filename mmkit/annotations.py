"""Reads the JSON of a COCO-captions folder: COCO 2014 and 2017, subsets, drawn scenes, and Karpathy's file.

What happens to a fault is decided once, here and in `check`, by its kind:

- **stops**: training on the folder would be wrong or break; `load_dataset` refuses it. JSON that cannot be read,
  one image id with two pictures, pictures that are missing or cannot be decoded.
- **skipped**: the record is left out and counted. Empty captions, captions of no listed image, images without
  a caption, repeated records, annotation files whose picture folder is not there.
- **repaired**: used after a change, and counted. Control characters become spaces, captions over the token limit
  are cut by the preprocessor, pictures of any mode become upright RGB.
- **kept**: used as it is, and named because it may surprise. Captions beyond the Latin alphabet, tiny pictures.
"""

import json
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from .errors import MissingFile, MmkitError
from .facts import Scene
from .pictures import PictureIndex, stays_inside

KINDS = ("stops", "skipped", "repaired", "kept")
LONG_CAPTION = 2000  # characters; about 512 word pieces, the most that BERT reads


@dataclass(frozen=True, slots=True)
class Fault:
    """Something unusual in a dataset: its kind (see the module), what it is, in which file, and the remedy."""

    kind: str
    what: str
    where: str
    remedy: str


# The fields that we read; msgspec passes over all others without building them.
class _CocoImage(msgspec.Struct, gc=False):
    id: int
    file_name: str
    split: str = ""
    scene: Scene | None = None


class _CocoCaption(msgspec.Struct, gc=False):
    image_id: int
    caption: str | None
    id: int | None = None


class _CocoFile(msgspec.Struct):
    images: list[_CocoImage]
    annotations: list[_CocoCaption]


class _Sentence(msgspec.Struct, gc=False):
    raw: str | None


class _KarpathyImage(msgspec.Struct, gc=False):
    cocoid: int
    filepath: str
    filename: str
    split: str
    sentences: list[_Sentence]


class _KarpathyFile(msgspec.Struct):
    images: list[_KarpathyImage]


_Content = TypeVar("_Content", _CocoFile, _KarpathyFile)


def _decode(path: Path, layout: type[_Content]) -> _Content:
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        return msgspec.json.decode(raw, type=layout)
    except msgspec.ValidationError as error:  # names the field: "Expected `int`, got `str` - at `$.images[3].id`"
        raise MmkitError(
            f"{path} is no COCO-captions or Karpathy file: {error}. Remedy: mend that field, or fetch the file again."
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    try:  # the standard library tells where
        json.loads(raw.decode())
        problem = "is not JSON: it holds NaN or half a surrogate pair"
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 (byte {error.start:,})"
    except json.JSONDecodeError as error:
        problem = f"is not complete JSON (line {error.lineno}, column {error.colno:,}: {error.msg})"
    raise MmkitError(f"{path} {problem}. Remedy: fetch the file again.")


@dataclass
class Annotations:
    """What the JSON says: by image id its picture file, split and facts; captions with their image's id; the ids
    whose picture file is `missing`; and the faults."""

    images: dict[int, tuple[str, str, Scene | None]] = field(default_factory=dict)
    missing: set[int] = field(default_factory=set)
    captions: list[tuple[int, str]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def add_image(self, row: _CocoImage | _KarpathyImage, folder: str, index: PictureIndex, source: Path) -> None:
        coco = isinstance(row, _CocoImage)
        image_id, name = (row.id, row.file_name) if coco else (row.cocoid, row.filename)
        if not (stays_inside(name) and stays_inside(folder)):
            raise MmkitError(
                f"{source}: the file name {folder}/{name} of image {image_id} leaves the folder. "
                "Remedy: do not trust this file; fetch it again from its source."
            )
        file = index.find(folder, name)
        found = (file or f"{folder}/{name}", row.split, row.scene if coco else None)
        if image_id not in self.images:
            self.images[image_id] = found
            if file is None:
                self.missing.add(image_id)
        elif self.images[image_id] == found:
            self.faults.append(Fault("skipped", f"image {image_id} is listed again", source.name, "none needed"))
        else:
            what = f"image id {image_id} names two pictures, {self.images[image_id][0]} and {found[0]}"
            self.faults.append(Fault("stops", what, source.name, "remove one of the records"))

    def add_caption(self, image_id: int, text: str | None, source: Path) -> None:
        def fault(kind: str, what: str, remedy: str = "none needed") -> None:
            self.faults.append(Fault(kind, f"caption of image {image_id} {what}", source.name, remedy))

        text = text or ""
        tidy = " ".join(text.split())
        if tidy and tidy.isascii() and tidy.isprintable() and len(tidy) <= LONG_CAPTION:
            self.captions.append((image_id, text if text == tidy else tidy))
            return
        if not text.isprintable():
            clean = "".join(" " if unicodedata.category(sign) == "Cc" else sign for sign in text)
            if clean.split() != text.split():
                fault("repaired", "held control characters, now spaces")
            text = clean
        text = " ".join(text.split())
        if not text:
            fault("skipped", "is empty", "write one, or remove the record")
            return
        if len(text) > LONG_CAPTION:
            fault(
                "repaired", f"has {len(text):,} characters; the preprocessor cuts it at the token limit", "shorten it"
            )
        if not text.isascii() and (strange := _beyond_latin(text)):
            fault("kept", f"holds {strange!r}, which BERT's word pieces may not know", "a multilingual text encoder")
        self.captions.append((image_id, text))


def _beyond_latin(text: str) -> str:
    """The first letter of another alphabet, or the first emoji or sign, else an empty string."""
    for sign in text:
        category = unicodedata.category(sign)
        emoji = category == "So" and sign > "\u2000"  # not the degree sign or ®
        if emoji or (category[0] == "L" and "LATIN" not in unicodedata.name(sign, "")):
            return sign
    return ""


def _picture_folder(root: Path, annotations: Path) -> str | None:
    """captions_val2017.json → "val2017", "images/val2017" or "images", the first that is there."""
    name = annotations.stem.removeprefix("captions_")
    return next((folder for folder in (name, f"images/{name}", "images") if (root / folder).is_dir()), None)


def _annotation_files(root: Path, faults: list[Fault]) -> list[Path]:
    if not root.is_dir():
        raise MissingFile(
            f"There is no folder {root}. Remedy: set MMKIT_COCO_ROOT (or --coco-root) to a folder that holds "
            "annotations/captions_*.json and its pictures."
        )
    karpathy = [path for path in (root / "dataset_coco.json", root / "annotations/dataset_coco.json") if path.is_file()]
    if karpathy:
        return karpathy[:1]
    found = sorted((root / "annotations").glob("captions_*.json"))
    if not found:
        raise MissingFile(
            f"{root} holds no annotations/captions_*.json and no dataset_coco.json. Remedy: set MMKIT_COCO_ROOT "
            "(or --coco-root) to a folder in COCO-captions layout."
        )
    usable = [path for path in found if _picture_folder(root, path)]
    if not usable:
        names = " or ".join(path.stem.removeprefix("captions_") for path in found)
        raise MissingFile(f"{root} has no folder {names} with the pictures of its annotations.")
    for path in found:
        if path not in usable:
            name = path.stem.removeprefix("captions_")
            faults.append(Fault("skipped", f"there is no folder {name} with its pictures", path.name, "bring them"))
    if any("2017" in path.stem for path in usable):  # the photos of 2017 are those of 2014, cut otherwise
        for path in [path for path in usable if "2014" in path.stem]:
            faults.append(Fault("skipped", "the same photos as the files of 2017", path.name, "none needed"))
            usable.remove(path)
    return usable


def read_annotations(root: Path) -> Annotations:
    """Read the annotation files under `root`: Karpathy's `dataset_coco.json` if it is there, else `captions_*.json`.

    Of full COCO with 616,767 captions it holds what `Annotations` holds and, while reading, the bytes of one file.
    Raises `MissingFile` without a folder or annotations, `MmkitError` where a file is not JSON, not UTF-8, of
    another shape (with the field), or names a picture outside the folder.
    """
    annotations, index = Annotations(), PictureIndex(root)
    for path in _annotation_files(root, annotations.faults):
        if path.name == "dataset_coco.json":
            for image in _decode(path, _KarpathyFile).images:
                annotations.add_image(image, image.filepath, index, path)
                for sentence in image.sentences:
                    annotations.add_caption(image.cocoid, sentence.raw, path)
            continue
        content, folder = _decode(path, _CocoFile), _picture_folder(root, path)
        for image in content.images:
            annotations.add_image(image, folder or "", index, path)
        first: dict[int, _CocoCaption] = {}
        for row in content.annotations:
            earlier = first.setdefault(row.id, row) if row.id is not None else row
            if earlier is not row:
                same = (earlier.image_id, earlier.caption) == (row.image_id, row.caption)
                kind, what = ("skipped", "is listed again") if same else ("kept", "is the id of two captions")
                annotations.faults.append(Fault(kind, f"caption id {row.id} {what}", path.name, "none needed"))
                if same:
                    continue
            annotations.add_caption(row.image_id, row.caption, path)
    _name_loose_ends(annotations)
    return annotations


def _name_loose_ends(annotations: Annotations) -> None:
    """Faults for captions without an image and images without a caption."""
    captions_of = Counter(image_id for image_id, _ in annotations.captions)
    for image_id in sorted(captions_of.keys() - annotations.images.keys()):
        what = f"{captions_of[image_id]} captions of image {image_id}, which is not listed"
        annotations.faults.append(Fault("skipped", what, "annotations", "list the image, or remove them"))
    for image_id, (file, _, _) in annotations.images.items():
        if not captions_of[image_id]:
            what = f"image {image_id} has no caption"
            annotations.faults.append(Fault("skipped", what, file, "write one, or remove the record"))
