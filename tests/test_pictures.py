import numpy as np
import pytest
from PIL import Image

from mmkit import MissingFile, MmkitError, open_image, to_rgb
from mmkit.pictures import PictureIndex, examine, stays_inside


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


def reopened(image, path, **options):
    image.save(path, **options)
    return pixels(open_image(path))


def test_grey_becomes_three_equal_channels(tmp_path):
    grey = Image.fromarray(np.array([[0, 100, 255]], np.uint8))
    assert reopened(grey, tmp_path / "a.png") == [[[0] * 3, [100] * 3, [255] * 3]]
    assert pixels(to_rgb(Image.new("1", (1, 1), 1))) == [[[255] * 3]]


def test_cmyk_becomes_rgb(tmp_path):
    inks = Image.new("CMYK", (3, 1))
    inks.putdata([(0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 255)])
    assert reopened(inks, tmp_path / "a.tif") == [[[255, 255, 255], [0, 255, 255], [0, 0, 0]]]


def test_transparency_shows_white(tmp_path):
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([(200, 0, 0, 255), (200, 0, 0, 0), (200, 0, 0, 51)])
    found = np.array(reopened(rgba, tmp_path / "a.png"))
    assert np.abs(found - [[[200, 0, 0], [255, 255, 255], [244, 204, 204]]]).max() <= 1
    grey = Image.new("LA", (2, 1))
    grey.putdata([(30, 255), (30, 0)])
    assert reopened(grey, tmp_path / "b.png") == [[[30] * 3, [255] * 3]]


def test_a_transparent_palette_colour_shows_white(tmp_path):
    palette = Image.new("P", (3, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.putdata([0, 1, 2])
    expected = [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]
    assert reopened(palette, tmp_path / "a.png", transparency=1) == expected
    assert reopened(palette, tmp_path / "a.gif", transparency=1) == expected


def test_a_colour_declared_transparent_shows_white(tmp_path):
    colour = Image.new("RGB", (2, 1), (1, 2, 3))
    colour.putpixel((1, 0), (9, 9, 9))
    assert reopened(colour, tmp_path / "a.png", transparency=(9, 9, 9)) == [[[1, 2, 3], [255] * 3]]


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    deep = Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
    assert reopened(deep, tmp_path / "a.png") == [[[0] * 3, [100] * 3, [255] * 3]]
    assert pixels(to_rgb(Image.fromarray(np.array([[0, 100, 255]], np.int32)))) == [[[0] * 3, [100] * 3, [255] * 3]]


UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_rotation_is_applied(tmp_path, orientation):
    stored = np.random.default_rng(0).integers(0, 255, (2, 4, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = reopened(Image.fromarray(stored), tmp_path / "a.png", exif=exif)
    assert found == UPRIGHT[orientation](stored).tolist()


def test_a_missing_picture_is_named(tmp_path):
    with pytest.raises(MissingFile, match=r"none\.jpg"):
        open_image(tmp_path / "none.jpg")


@pytest.mark.parametrize("kind", ["jpg", "png", "gif", "webp", "bmp"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9])
def test_a_truncated_picture_is_named(tmp_path, kind, kept):
    path = tmp_path / f"a.{kind}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(MmkitError, match=rf"a\.{kind} cannot be decoded") as error:
        open_image(path)
    assert "Remedy" in str(error.value)


GARBAGE = {
    "empty": b"",
    "text": b"<html>404 Not Found</html>",
    # a header chunk that is too short, and a width that is no number: Pillow raises ValueError
    "png": b"\x89PNG\r\n\x1a\n\x00\x00\x00\x05IHDR\x00\x00\x00\x08\x00\xfb\xac\xc3\xb7",
    "ppm": b"P6\nx 6\n255\n" + bytes(99),
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_a_file_that_is_no_picture_is_named(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(MmkitError, match=r"a\.jpg cannot be decoded"):
        open_image(tmp_path / "a.jpg")


def test_a_folder_in_the_place_of_a_picture_is_named(tmp_path):
    (tmp_path / "a.jpg").mkdir()
    with pytest.raises(MmkitError, match=r"a\.jpg cannot be decoded"):
        open_image(tmp_path / "a.jpg")


# --- what is wrong with a picture ------------------------------------------------------------


def colourful(width=64, height=48):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return {"exif": exif}


CHANGED = {
    "grey": ("a.jpg", colourful().convert("L"), {}, "grey"),
    "bilevel": ("a.png", colourful().convert("1"), {}, "grey"),
    "CMYK": ("a.jpg", colourful().convert("CMYK"), {}, "CMYK"),
    "palette": ("a.png", colourful().convert("P"), {}, "palette"),
    "palette with alpha": ("a.png", colourful().convert("P"), {"transparency": 3}, "transparent"),
    "alpha": ("a.png", colourful().convert("RGBA"), {}, "transparent"),
    "16-bit": ("a.png", Image.fromarray(np.arange(48 * 64, dtype=np.uint16).reshape(48, 64)), {}, "16"),
    "animated": (
        "a.gif",
        colourful(),
        {"save_all": True, "append_images": [colourful(64, 48).rotate(90)]},
        "first frame",
    ),
    "turned": ("a.jpg", colourful(), turned(), "EXIF"),
}


@pytest.mark.parametrize("name, image, options, change", CHANGED.values(), ids=CHANGED)
def test_a_change_to_rgb_is_named(tmp_path, name, image, options, change):
    image.save(tmp_path / name, **options)
    found = examine(tmp_path / name)
    assert (found.width, found.height, found.problem) == (64, 48, None)
    assert any(change in text for text in found.changes)
    assert open_image(tmp_path / name).mode == "RGB"


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_a_sound_picture_has_neither_change_nor_problem(tmp_path, kind):
    colourful(300, 200).save(tmp_path / f"a.{kind}")
    found = examine(tmp_path / f"a.{kind}")
    assert (found.width, found.height, found.changes, found.problem) == (300, 200, (), None)


def test_a_progressive_picture_is_read_whole(tmp_path):
    path = tmp_path / "a.jpg"
    colourful(300, 200).save(path, progressive=True)
    assert examine(path).problem is None
    path.write_bytes(path.read_bytes()[:-200])
    assert "cannot be decoded" in examine(path).problem


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.9, 0.99])
def test_a_truncated_photo_is_found_at_an_eighth_of_its_size(tmp_path, kept):
    path = tmp_path / "a.jpg"
    colourful(640, 480).save(path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    assert examine(path).problem


def test_problems_are_told_apart(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_bytes(GARBAGE["text"])
    assert examine(tmp_path / "none.jpg").problem == "file is missing"
    assert examine(tmp_path / "empty.jpg").problem == "empty file"
    assert examine(tmp_path / "text.jpg").problem == "not an image"


@pytest.mark.parametrize("times", [1.5, 3])
def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch, times):
    colourful(200, 200).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(200 * 200 / times))
    assert "decompression bomb" in examine(tmp_path / "bomb.png").problem
    with pytest.raises(MmkitError, match=r"bomb\.png cannot be decoded"):
        open_image(tmp_path / "bomb.png")


# --- names and places ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jpg", "val2014/a.jpg", "a..b.jpg", "..a/b.jpg", "å 1.jpg"])
def test_names_that_stay_in_their_folder(name):
    assert stays_inside(name)


@pytest.mark.parametrize(
    "name", ["", "../a.jpg", "a/../../b", "/etc/passwd", "C:\\a.jpg", "C:a.jpg", "\\\\host\\a", "a\\..\\..\\b", "a\0b"]
)
def test_names_that_leave_their_folder(name):
    assert not stays_inside(name)


@pytest.mark.parametrize(
    "place",
    [
        "val2014/COCO_val2014_000000000042.jpg",
        "images/val2014/COCO_val2014_000000000042.jpg",
        "images/COCO_val2014_000000000042.jpg",
        "train2017/000000000042.jpg",
        "val2017/000000000042.jpg",
        "images/train2017/000000000042.jpg",
    ],
)
def test_a_picture_of_coco_2014_is_found_wherever_people_keep_it(tmp_path, place):
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).touch()
    assert PictureIndex(tmp_path).find("val2014", "COCO_val2014_000000000042.jpg") == place
    assert PictureIndex(tmp_path).find("val2014", "COCO_val2014_000000000043.jpg") is None
