"""Picture files: where a COCO folder keeps them, how each becomes upright RGB, and what is wrong with one."""

import re
import warnings
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..support import MissingFile, MmkitError

# Above Image.MAX_IMAGE_PIXELS (89 million) Pillow only warns; a folder of photos holds no such picture.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


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
    except Exception as error:  # Pillow's decoders raise nearly anything
        raise MmkitError(f"The picture {path} cannot be decoded ({error}). Remedy: bring the file again.") from None


class Examined(NamedTuple):
    """A picture's size in pixels, what `to_rgb` changes in it, and why it cannot be decoded (None if it can)."""

    width: int
    height: int
    changes: tuple[str, ...]
    problem: str | None


def examine(path: Path) -> Examined:
    """Decode a picture file completely (a JPEG at an eighth of its size, which reads every byte) and tell its state."""
    try:
        with Image.open(path) as image:
            changes = {
                "rotated by EXIF, turned upright": image.getexif().get(0x0112, 1) in range(2, 9),
                "animated, its first frame is used": getattr(image, "n_frames", 1) > 1,
                "16 or 32 bits a channel, cut to 8": image.mode.startswith(("I", "F")),
                "transparent, laid on white": "A" in image.getbands() or "transparency" in image.info,
                "CMYK, turned into RGB": image.mode == "CMYK",
                "palette, turned into RGB": image.mode == "P",
                "grey, repeated in three channels": image.mode in ("1", "L", "LA"),
            }
            examined = Examined(*image.size, tuple(filter(changes.get, changes)), None)
            image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
            return examined
    except UnidentifiedImageError:
        problem = "not an image" if path.stat().st_size else "empty file"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        problem = f"decompression bomb, more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    except Exception as error:
        problem = f"cannot be decoded ({error})"
    return Examined(0, 0, (), problem)


def stays_inside(name: str) -> bool:
    """Whether a file name from a JSON file stays in the folder that it is relative to, on every system."""
    path = PureWindowsPath(name)  # understands "/" and "\\", drives and shares
    return bool(name) and not path.anchor and "\0" not in name and ".." not in path.parts


class PictureIndex:
    """Finds pictures below `root`. Folders are listed once, so that 123,287 look-ups take a moment."""

    def __init__(self, root: Path) -> None:
        self._files = cache(lambda above: {path.name for path in (root / above).glob("*")})

    def find(self, folder: str, name: str) -> str | None:
        """Where the picture `folder/name` lies, relative to the root: there, under `images/`, or one of COCO 2014 under
        its name of 2017 (the photos are the same). None if nowhere."""
        paths = [f"{folder}/{name}", f"images/{folder}/{name}", f"images/{name}"]
        if year_2014 := re.fullmatch(r"COCO_(?:train|val)2014_(\d{12}\.jpg)", name):
            paths += [f"{above}{part}2017/{year_2014[1]}" for above in ("", "images/") for part in ("train", "val")]
        return next((str(path) for path in map(PurePosixPath, paths) if path.name in self._files(path.parent)), None)
