"""Reads and checks a folder in COCO-captions layout, and splits it by image."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from .errors import MissingFile, MmkitError
from .profiles import Profile
from .progress import progress
from .scenes import draw_scenes

SPLITS = ("train", "val", "test")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as upright RGB: EXIF rotation applied, transparency laid on white, 16 bits cut to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        image = Image.fromarray((values / (257 if values.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def open_image(path: str | Path) -> Image.Image:
    """Decode a picture file to RGB. A missing or broken file gives an error that names it."""
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except FileNotFoundError:
        raise MissingFile(f"There is no picture {path}.") from None
    except (OSError, ValueError, RuntimeError, SyntaxError, Image.DecompressionBombError) as error:
        raise MmkitError(f"The picture {path} cannot be decoded ({error}). Remedy: bring the file again.") from None


@dataclass(frozen=True)
class Fault:
    """Something wrong in a dataset: what, in which file, and the remedy. `unsafe` faults must be mended
    before training; the others are left out and counted."""

    what: str
    where: str
    remedy: str
    unsafe: bool = False


@dataclass(frozen=True, eq=False)
class CaptionDataset(Dataset):
    """Images with their captions. Item `i` is `(image, captions)`: a Pillow RGB image and a list of strings.

    `caption_image[j]` is the position (not the id) of caption `j`'s image. `scenes[i]` holds the facts of a
    drawn scene, and is empty for photos. `faults` are the records left out while reading.
    """

    root: Path
    image_ids: tuple[int, ...]
    files: tuple[str, ...]
    captions: tuple[str, ...]
    caption_image: np.ndarray
    given_splits: tuple[str, ...] = ()
    scenes: tuple[dict, ...] = ()
    faults: tuple[Fault, ...] = ()
    _captions_of: list[list[int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        captions_of: list[list[int]] = [[] for _ in self.image_ids]
        for caption, image in enumerate(self.caption_image):
            captions_of[image].append(caption)
        object.__setattr__(self, "_captions_of", captions_of)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Image.Image, list[str]]:
        return self.image(index), self.captions_of(index)

    def __repr__(self) -> str:
        return f"CaptionDataset({len(self):,} images, {len(self.captions):,} captions)"

    def image(self, index: int) -> Image.Image:
        """The picture at position `index`, decoded to RGB."""
        return open_image(self.root / self.files[index])

    def captions_of(self, index: int) -> list[str]:
        """All captions of the image at position `index`."""
        return [self.captions[j] for j in self._captions_of[index]]

    def select(self, images: Sequence[int] | np.ndarray) -> "CaptionDataset":
        """The dataset of the images at these positions, with all their captions."""
        images = [int(i) for i in images]
        chosen = [j for i in images for j in self._captions_of[i]]
        return replace(
            self,
            image_ids=tuple(self.image_ids[i] for i in images),
            files=tuple(self.files[i] for i in images),
            captions=tuple(self.captions[j] for j in chosen),
            caption_image=np.repeat(np.arange(len(images)), [len(self._captions_of[i]) for i in images]),
            given_splits=tuple(self.given_splits[i] for i in images) if self.given_splits else (),
            scenes=tuple(self.scenes[i] for i in images) if self.scenes else (),
        )

    def splits(self, val_fraction: float, test_fraction: float, seed: int = 0) -> dict[str, np.ndarray]:
        """Positions of the images of "train", "val" and "test": no image, so no caption, is in two of them.

        A split that the annotations give (Karpathy's) is kept, its "restval" counted as train; otherwise
        the images are shuffled by `seed`, whatever their order in the file, and cut by the fractions.
        """
        if self.given_splits:
            names = np.array(["train" if s == "restval" else s for s in self.given_splits])
            if unknown := set(names.tolist()) - set(SPLITS):
                raise MmkitError(
                    f"The annotations name unknown splits {sorted(unknown)}. Valid: train, restval, val, test"
                )
            return {name: np.flatnonzero(names == name) for name in SPLITS}
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            raise MmkitError(f"val_fraction {val_fraction} and test_fraction {test_fraction} leave no training images.")
        by_id = np.argsort(self.image_ids, kind="stable")
        order = by_id[np.random.default_rng(seed).permutation(len(self))]
        val, test = round(len(self) * val_fraction), round(len(self) * test_fraction)
        parts = {"train": order[val + test :], "val": order[:val], "test": order[val : val + test]}
        return {name: np.sort(part) for name, part in parts.items()}

    def fingerprint(self) -> str:
        """A short digest of ids, captions, and names and sizes of the picture files."""
        digest = hashlib.sha256()
        sizes = [(self.root / name).stat().st_size for name in self.files]
        rows = zip(self.image_ids, self.files, sizes, strict=True)
        digest.update(json.dumps([list(rows), self.captions, self.caption_image.tolist()]).encode())
        return digest.hexdigest()[:16]


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise MmkitError(f"{path} is not UTF-8 (byte {error.start}). Remedy: fetch the file again.") from None
    except json.JSONDecodeError as error:
        raise MmkitError(
            f"{path} is not complete JSON (line {error.lineno}: {error.msg}). Remedy: fetch the file again."
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise MmkitError(f'{path} has no list "images". Remedy: use a COCO-captions or Karpathy JSON file.')
    return content


def _image_folder(root: Path, annotations: Path) -> str:
    """captions_val2017.json → "val2017"; its pictures may also lie in "images" or beside the annotations."""
    name = annotations.stem.removeprefix("captions_")
    for folder in (name, f"images/{name}", "images"):
        if (root / folder).is_dir():
            return folder
    raise MissingFile(f"{root} has no folder {name} with the pictures of {annotations.name}.")


def _coco_rows(root: Path, path: Path, content: dict) -> tuple[list[tuple], list[tuple]]:
    """Image rows (id, file, split, scene) and caption rows (image id, caption) of a COCO-captions file."""
    if not isinstance(content.get("annotations"), list):
        raise MmkitError(f'{path} has no list "annotations". Remedy: use a COCO-captions file.')
    folder = _image_folder(root, path)
    try:
        images = [(row["id"], f"{folder}/{row['file_name']}", "", row.get("scene")) for row in content["images"]]
        captions = [(row["image_id"], row["caption"]) for row in content["annotations"]]
    except (KeyError, TypeError) as error:
        raise MmkitError(f"{path}: a record lacks the field {error}. Remedy: fetch the file again.") from None
    return images, captions


def _karpathy_rows(root: Path, path: Path, content: dict) -> tuple[list[tuple], list[tuple]]:
    """The same rows of a Karpathy file (dataset_coco.json), which names a split for every image."""
    try:
        images = [
            (row["cocoid"], f"{row['filepath']}/{row['filename']}", row["split"], None) for row in content["images"]
        ]
        captions = [(row["cocoid"], sentence["raw"]) for row in content["images"] for sentence in row["sentences"]]
    except (KeyError, TypeError) as error:
        raise MmkitError(f"{path}: a record lacks the field {error}. Remedy: fetch the file again.") from None
    return images, captions


def _annotation_files(root: Path) -> list[Path]:
    if not root.is_dir():
        raise MissingFile(
            f"There is no folder {root}. Remedy: set MMKIT_COCO_ROOT (or --coco-root) to a folder that holds "
            "annotations/captions_*.json and its pictures."
        )
    karpathy = [path for path in (root / "dataset_coco.json", root / "annotations/dataset_coco.json") if path.is_file()]
    found = karpathy[:1] or sorted((root / "annotations").glob("captions_*.json"))
    if not found:
        raise MissingFile(
            f"{root} holds no annotations/captions_*.json and no dataset_coco.json. Remedy: set MMKIT_COCO_ROOT "
            "(or --coco-root) to a folder in COCO-captions layout."
        )
    return found


def load_captions(root: str | Path) -> CaptionDataset:
    """Read a folder in COCO-captions layout: COCO 2014 or 2017, a subset, drawn scenes, or Karpathy's JSON.

    What makes the file unreadable stops with an `MmkitError`. Records that cannot be used are left out and
    named in `faults`: doubled image ids, captions without an image, empty captions, images without captions or
    without their file.
    """
    root = Path(root)
    images: dict[int, tuple] = {}
    captions: list[tuple[int, str]] = []
    faults: list[Fault] = []
    for path in _annotation_files(root):
        content = _read_json(path)
        reader = _karpathy_rows if path.name.startswith("dataset_") else _coco_rows
        image_rows, caption_rows = reader(root, path, content)
        for row in image_rows:
            if row[0] in images:
                faults.append(Fault(f"image id {row[0]} appears twice", path.name, "remove one", unsafe=True))
            else:
                images[row[0]] = row
        for image_id, caption in caption_rows:
            if not isinstance(caption, str) or not caption.strip():
                faults.append(Fault(f"empty caption of image {image_id}", path.name, "left out"))
            else:
                captions.append((image_id, " ".join(caption.split())))
    known = Counter(image_id for image_id, _ in captions)
    for image_id in known.keys() - images.keys():
        faults.append(
            Fault(f"{known[image_id]} captions of image {image_id}, which is not listed", "annotations", "left out")
        )
    kept: dict[int, tuple] = {}
    for image_id, row in images.items():
        if not known[image_id]:
            faults.append(Fault(f"image {image_id} has no caption", row[1], "left out"))
        elif not (root / row[1]).is_file():
            faults.append(Fault("picture file is missing", row[1], "bring the file", unsafe=True))
        else:
            kept[image_id] = row
    if not kept:
        raise MissingFile(
            f"{root} holds no image that has both its file and a caption. Run: python -m mmkit check {root}"
        )
    position = {image_id: index for index, image_id in enumerate(kept)}
    usable = sorted(
        ((position[image_id], caption) for image_id, caption in captions if image_id in position),
        key=lambda row: row[0],  # stable: an image's captions stay in the file's order
    )
    rows = list(kept.values())
    return CaptionDataset(
        root=root,
        image_ids=tuple(row[0] for row in rows),
        files=tuple(row[1] for row in rows),
        captions=tuple(caption for _, caption in usable),
        caption_image=np.array([index for index, _ in usable]),
        given_splits=tuple(row[2] for row in rows) if rows[0][2] else (),
        scenes=tuple(row[3] for row in rows) if rows[0][3] else (),
        faults=tuple(faults),
    )


def load_dataset(profile: Profile) -> CaptionDataset:
    """The dataset of a profile: the drawn scenes (drawn now if they are not in the cache) or its COCO folder."""
    if profile.data == "scenes":
        folder = profile.cache / f"scenes-{profile.scene_count}-{profile.scene_seed}"
        try:
            profile.cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MmkitError(
                f"Scenes cannot be written to {profile.cache} ({error.strerror}). Remedy: set MMKIT_CACHE."
            ) from None
        with FileLock(folder.with_suffix(".lock")):  # two notebooks opened at once draw once
            return load_captions(draw_scenes(folder, profile.scene_count, profile.scene_seed))
    if profile.coco_root is None:
        raise MissingFile(
            f"The profile {profile.name!r} reads a COCO folder, and none is named. Remedy: set MMKIT_COCO_ROOT "
            "(or --coco-root) to a folder that holds annotations/captions_*.json and its pictures."
        )
    return load_captions(profile.coco_root)


def check_images(dataset: CaptionDataset) -> list[Fault]:
    """Decode every picture; one fault for each that cannot be."""
    faults = []
    for index in progress(range(len(dataset)), "decoding", unit="images"):
        try:
            dataset.image(index)
        except MmkitError:
            faults.append(Fault("picture cannot be decoded", dataset.files[index], "bring the file again", unsafe=True))
    return faults
