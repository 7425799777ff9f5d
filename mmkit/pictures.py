"""Picture files: where a COCO folder keeps them, how each becomes upright RGB, and what is wrong with one."""

import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import MissingFile, MmkitError

# Above Image.MAX_IMAGE_PIXELS (89 million) Pillow only warns; a folder of photos holds no such picture.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_UNREADABLE = (OSError, ValueError, RuntimeError, SyntaxError, EOFError, *_BOMB)
_NAME_2014 = re.compile(r"COCO_(?:train|val)2014_(\d{12}\.jpg)")


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
    except _UNREADABLE as error:
        raise MmkitError(f"The picture {path} cannot be decoded ({error}). Remedy: bring the file again.") from None


@dataclass(frozen=True)
class Examined:
    """What a picture file turned out to be: its size in pixels, what `to_rgb` changes in it, and why it cannot
    be decoded (`problem`, None for a sound file)."""

    width: int
    height: int
    changes: tuple[str, ...]
    problem: str | None


def _changes(image: Image.Image) -> tuple[str, ...]:
    found = {
        "rotated by EXIF, turned upright": image.getexif().get(0x0112, 1) in range(2, 9),
        "animated, its first frame is used": getattr(image, "n_frames", 1) > 1,
        "16 or 32 bits a channel, cut to 8": image.mode.startswith(("I", "F")),
        "transparent, laid on white": "A" in image.getbands() or "transparency" in image.info,
        "CMYK, turned into RGB": image.mode == "CMYK",
        "palette, turned into RGB": image.mode == "P",
        "grey, repeated in three channels": image.mode in ("1", "L", "LA"),
    }
    return tuple(change for change, there in found.items() if there)


def examine(path: Path) -> Examined:
    """Decode a picture file completely (a JPEG at an eighth of its size, which reads every byte) and tell its state."""
    width, height, changes, problem = 0, 0, (), None
    try:
        if not path.stat().st_size:
            problem = "empty file"
        else:
            with Image.open(path) as image:
                (width, height), changes = image.size, _changes(image)
                image.draft(None, (max(1, width // 8), max(1, height // 8)))
                image.load()
    except FileNotFoundError:
        problem = "file is missing"
    except UnidentifiedImageError:
        problem = "not an image"
    except _BOMB:
        problem = f"decompression bomb, more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    except _UNREADABLE as error:
        problem = f"cannot be decoded ({error})"
    return Examined(width, height, changes, problem)


def stays_inside(name: str) -> bool:
    """Whether a file name from an archive or a JSON file stays in the folder that it is relative to."""
    windows = PureWindowsPath(name)  # understands "/" and "\\", drives and shares
    return (
        bool(name)
        and "\0" not in name
        and not windows.anchor
        and ".." not in (*windows.parts, *PurePosixPath(name).parts)
    )


class PictureIndex:
    """Finds pictures below `root`. Folders are listed once, so that 123,287 look-ups take a moment."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._listed: dict[str, frozenset[str]] = {}

    def _has(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        if folder not in self._listed:
            there = self.root / folder
            self._listed[folder] = frozenset(e.name for e in os.scandir(there)) if there.is_dir() else frozenset()
        return name in self._listed[folder]

    def find(self, folder: str, name: str) -> str | None:
        """Where the picture `folder/name` lies, relative to the root, or None.

        It may also lie under `images/`, and a picture of COCO 2014 under its name of 2017, in `train2017/` or
        `val2017/`: the photos are the same.
        """
        paths = [f"{folder}/{name}", f"images/{folder}/{name}", f"images/{name}"]
        if year_2014 := _NAME_2014.fullmatch(name):
            paths += [f"{above}{part}2017/{year_2014[1]}" for above in ("", "images/") for part in ("train", "val")]
        return next((path for path in paths if self._has(path)), None)
