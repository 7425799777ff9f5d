"""Folders of pictures and captions: what is read, what is left out and named, and what cannot be trusted."""

import io
import json
import random
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from mmkit.folders import Fault, check_folder, examine, open_image, read_folder
from mmkit.folders.check import TINY
from mmkit.folders.layouts import LONG_CAPTION
from mmkit.folders.pictures import PictureIndex, stays_inside
from mmkit.support import MissingFile, MmkitError


def photo(seed=0, width=80, height=60):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def drawn(mode, pixels, colours=()):
    image = Image.new(mode, (len(pixels), 1))
    if colours:
        image.putpalette(colours)
    image.putdata(pixels)
    return image


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


BLACK, WHITE, RAMP = [0] * 3, [255] * 3, [[0] * 3, [100] * 3, [255] * 3]
PALETTE = drawn("P", [0, 1, 2], [10, 20, 30, 40, 50, 60, 70, 80, 90])
INKS = drawn("CMYK", [(0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 255)])
ALPHA = drawn("RGBA", [(200, 0, 0, 255), (200, 0, 0, 0), (200, 0, 0, 51)])
DEEP = Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
COLOURS = drawn("RGB", [(1, 2, 3), (9, 9, 9)])
RGB = {
    "grey": ("png", drawn("L", [0, 100, 255]), {}, RAMP),
    "bilevel": ("png", drawn("1", [0, 1]), {}, [BLACK, WHITE]),
    "CMYK": ("tif", INKS, {}, [WHITE, [0, 255, 255], BLACK]),
    "alpha": ("png", ALPHA, {}, [[200, 0, 0], WHITE, [244, 204, 204]]),
    "grey with alpha": ("png", drawn("LA", [(30, 255), (30, 0)]), {}, [[30] * 3, WHITE]),
    "palette": ("png", PALETTE, {"transparency": 1}, [[10, 20, 30], WHITE, [70, 80, 90]]),
    "a transparent colour": ("png", COLOURS, {"transparency": (9, 9, 9)}, [[1, 2, 3], WHITE]),
    "16 bits": ("png", DEEP, {}, RAMP),
    "bytes in 32 bits": ("tif", Image.fromarray(np.array([[0, 100, 255]], np.int32)), {}, RAMP),
}


@pytest.mark.parametrize("kind, image, options, expected", RGB.values(), ids=RGB)
def test_every_mode_becomes_rgb(tmp_path, kind, image, options, expected):
    image.save(tmp_path / f"a.{kind}", **options)
    opened = open_image(tmp_path / f"a.{kind}")
    assert opened.mode == "RGB" and np.abs(np.asarray(opened).astype(int) - [expected]).max() <= 1


@pytest.mark.parametrize("orientation, quarters", [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_exif_rotation_is_applied(tmp_path, orientation, quarters):
    photo(0, 4, 2).save(tmp_path / "a.png", exif=turned(orientation))
    assert (np.asarray(open_image(tmp_path / "a.png")) == np.rot90(np.asarray(photo(0, 4, 2)), quarters)).all()


def saved(image, kind="JPEG", **options):
    image.save(stream := io.BytesIO(), kind, **options)
    return stream.getvalue()


BROKEN = {
    "empty": b"",
    "text": b"<html>404 Not Found</html>",
    # a header chunk that is too short, and a width that is no number: Pillow raises ValueError
    "png": b"\x89PNG\r\n\x1a\n\x00\x00\x00\x05IHDR\x00\x00\x00\x08\x00\xfb\xac\xc3\xb7",
    "ppm": b"P6\nx 6\n255\n" + bytes(99),
}
for kind in ("JPEG", "PNG", "WEBP", "BMP", "progressive JPEG"):
    whole = saved(photo(0, 640, 480), kind.removeprefix("progressive "), progressive="progressive" in kind)
    BROKEN |= {f"{kept:.0%} of a {kind}": whole[: int(kept * len(whole))] for kept in (0.02, 0.5, 0.9, 0.99)}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_no_whole_picture_is_named(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    assert examine(tmp_path / "a.jpg").problem  # also where it decodes a photo at an eighth of its size
    for name, error, what in (("a.jpg", MmkitError, "cannot be decoded.*Remedy"), ("none.jpg", MissingFile, "is no ")):
        with pytest.raises(error, match=what) as raised:
            open_image(tmp_path / name)
        assert name in str(raised.value)


@pytest.mark.parametrize("times", [1.5, 3])  # Pillow only warns up to twice its limit
def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch, times):
    photo(0, 200, 200).save(tmp_path / "bomb.png")
    assert examine(tmp_path / "bomb.png") == (200, 200, (), None)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(200 * 200 / times))
    assert "decompression bomb" in examine(tmp_path / "bomb.png").problem
    with pytest.raises(MmkitError, match=r"bomb\.png cannot be decoded"):
        open_image(tmp_path / "bomb.png")


INSIDE = ["a.jpg", "val2014/a.jpg", "a..b.jpg", "..a/b.jpg", "å 1.jpg"]
OUTSIDE = ["", "../a.jpg", "a/../../b", "/etc/passwd", "C:\\a.jpg", "C:a.jpg", "\\\\host\\a", "a\\..\\..\\b", "a\0b"]


@pytest.mark.parametrize("name", [*INSIDE, *OUTSIDE])
def test_names_that_leave_their_folder(name):
    assert stays_inside(name) == (name in INSIDE)


PLACES = [f"{above}val2014/COCO_val2014_000000000042.jpg" for above in ("", "images/")]
PLACES += [f"{above}{part}2017/000000000042.jpg" for above in ("", "images/") for part in ("train", "val")]


@pytest.mark.parametrize("place", [*PLACES, "images/COCO_val2014_000000000042.jpg"])
def test_a_picture_of_coco_2014_is_found_wherever_people_keep_it(tmp_path, place):
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).touch()
    assert PictureIndex(tmp_path).find("val2014", "COCO_val2014_000000000042.jpg") == place
    assert PictureIndex(tmp_path).find("val2014", "COCO_val2014_000000000043.jpg") is None


def coco_content(ids=(1, 2, 3), captions=2):
    told = [{"id": 100 * i + k, "image_id": i, "caption": f"Caption {k} of {i}."} for k in range(captions) for i in ids]
    return {"images": [{"id": i, "file_name": f"{i:012}.jpg"} for i in ids], "annotations": told}


def write_coco(root, content=None, name="val2017", folder=None):
    """A folder in COCO-captions layout; image `i` is `photo(i)`."""
    content, pictures = content or coco_content(), root / (folder or name)
    pictures.mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    for row in content["images"]:
        photo(row["id"]).save(pictures / row["file_name"])
    (root / "annotations" / f"captions_{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return root


def write_karpathy(root, splits, path="dataset_coco.json"):
    (root / "val2014").mkdir(parents=True)
    (root / path).parent.mkdir(exist_ok=True)
    rows = []
    for i, split in enumerate(splits, start=1):
        row = {"cocoid": i, "filepath": "val2014", "filename": f"{i}.jpg", "split": split}
        rows.append(row | {"sentences": [{"raw": f"Caption {k} of {i}."} for k in range(2)]})
        photo(i).save(root / "val2014" / f"{i}.jpg")
    (root / path).write_text(json.dumps({"images": rows, "dataset": "coco"}), encoding="utf-8")
    return root


def annotations(root):
    return root / "annotations" / "captions_val2017.json"


def captions_of(records, image):
    return [text for text, row in zip(records.captions, records.image_index, strict=True) if row == image]


@pytest.fixture
def folder(tmp_path):
    return write_coco(tmp_path)


@pytest.mark.parametrize("place", ["val2017", "images/val2017", "images"])
def test_a_coco_folder_is_read(tmp_path, place):
    records = read_folder(write_coco(tmp_path, coco_content((30, 10, 20), captions=3), folder=place))
    assert records.image_ids == (30, 10, 20) and records.root == tmp_path
    assert records.files == tuple(f"{place}/{i:012}.jpg" for i in (30, 10, 20))
    assert records.captions == tuple(f"Caption {k} of {i}." for i in (30, 10, 20) for k in range(3))
    assert records.image_index.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and records.image_index.dtype == np.int64
    assert records.splits == records.scenes == records.faults == ()


def test_the_annotation_files_of_coco_2014_are_merged(tmp_path):
    write_coco(tmp_path, coco_content((5, 6)), "train2014")
    content = coco_content((3, 4))
    content["annotations"].reverse()
    records = read_folder(write_coco(tmp_path, content, "val2014"))
    assert records.image_ids == (5, 6, 3, 4) and len(records.captions) == 8 and records.faults == ()
    assert captions_of(records, 2) == ["Caption 1 of 3.", "Caption 0 of 3."]  # in the order of the file


@pytest.mark.parametrize("path", ["dataset_coco.json", "annotations/dataset_coco.json"])
def test_karpathys_file_is_read_with_its_splits_and_preferred(tmp_path, path):
    write_karpathy(tmp_path, ["test", "restval", "val"], path)
    records = read_folder(write_coco(tmp_path, coco_content((7, 8))))
    assert records.image_ids == (1, 2, 3) and records.splits == ("test", "restval", "val")
    assert captions_of(records, 1) == ["Caption 0 of 2.", "Caption 1 of 2."] and records.scenes == ()
    (tmp_path / path).write_text('{"images": [{"cocoid": 1, "filepath": "val2014", "filename": "1.jpg"}]}')
    with pytest.raises(MmkitError, match=r"dataset_coco\.json.*`split`"):
        read_folder(tmp_path)


def test_the_facts_of_drawn_scenes_and_their_splits_are_kept_raw(tmp_path):
    content = coco_content((1, 2))
    content["images"][0] |= {"scene": {"ground": "beach"}}
    content["images"][1] |= {"scene": {"ground": "road"}, "split": "new"}
    records = read_folder(write_coco(tmp_path, content))
    assert records.scenes == ({"ground": "beach"}, {"ground": "road"}) and records.splits == ("", "new")
    content["images"][1]["scene"] = None  # then they are photos
    assert read_folder(write_coco(tmp_path, content)).scenes == ()
    content["images"][1]["scene"] = "road"
    with pytest.raises(MmkitError, match=r"\$\.images\[1\]\.scene"):
        read_folder(write_coco(tmp_path, content))


def test_of_several_annotation_files_those_with_pictures_of_their_own_are_read(folder):
    """annotations_trainval2017.zip brings both files, and many have only the pictures of val2017."""
    (folder / "annotations" / "captions_train2017.json").write_text("{}")
    write_coco(folder, coco_content((4, 5)), "val2014")
    assert read_folder(folder).image_ids == (1, 2, 3) and read_folder(folder).faults == (
        Fault("skipped", "there is no folder train2017 with its pictures", "captions_train2017.json", "bring them"),
        Fault("skipped", "the same photos as the files of 2017", "captions_val2014.json", "none needed"),
    )


LONG, JSON_FILE, PICTURE = "word" * (LONG_CAPTION // 4), "captions_val2017.json", "val2017/000000000002.jpg"
CAPTIONS = {
    "empty": ("", "", "skipped", "is empty"),
    "blank": (" \n\t ", "", "skipped", "is empty"),
    "null": (None, "", "skipped", "is empty"),
    "control characters": ("A\x00 dog\x07\x1b[0m.", "A dog [0m.", "repaired", "held control characters"),
    "too long": (f"{LONG}s", f"{LONG}s", "repaired", "has 2,001 characters"),
    "Cyrillic": ("Собака в снегу.", "Собака в снегу.", "kept", "holds 'С'"),
    "Chinese": ("一只狗在雪地里。", "一只狗在雪地里。", "kept", "holds '一'"),
    "emoji": ("A dog 🐕 in snow.", "A dog 🐕 in snow.", "kept", "holds '🐕'"),
    "white space": ("A dog\r\n  runs. ", "A dog runs.", None, ""),
    "Latin": ("Ein Bär — “naïve” … 20 °C.", "Ein Bär — “naïve” … 20 °C.", None, ""),
    "long": (LONG, LONG, None, ""),
}


@pytest.mark.parametrize("text, read, kind, what", CAPTIONS.values(), ids=CAPTIONS)
def test_captions_are_read_and_unusual_ones_named(folder, text, read, kind, what):
    content = coco_content()
    content["annotations"][1]["caption"] = text
    annotations(folder).write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())  # a byte order mark
    records = read_folder(folder)
    assert captions_of(records, 1) == [*filter(None, [read]), "Caption 1 of 2."]
    assert [(fault.kind, fault.where) for fault in records.faults] == ([(kind, JSON_FILE)] if kind else [])
    assert all(fault.what.startswith(f"caption of image 2 {what}") and fault.remedy for fault in records.faults)


def add(content, part, **change):
    """The second record of a part once more, changed."""
    content[part].append(content[part][1] | change)


RECORDS = [
    (lambda c: add(c, "images"), "skipped", "image 2 is listed again", JSON_FILE),
    (lambda c: add(c, "images", file_name="3.jpg"), "stops", "image id 2 names two pictures", JSON_FILE),
    (lambda c: add(c, "images", id=9), "skipped", "image 9 has no caption", PICTURE),
    (lambda c: add(c, "annotations", id=9, image_id=99), "skipped", "1 captions of image 99", "annotations"),
    (lambda c: add(c, "annotations"), "skipped", "caption id 200 is listed again", JSON_FILE),
]


@pytest.mark.parametrize("damage, kind, what, where", RECORDS, ids=[row[2] for row in RECORDS])
def test_unusable_records_are_left_out_and_named(folder, damage, kind, what, where):
    content = coco_content()
    damage(content)
    annotations(folder).write_text(json.dumps(content))
    (fault,) = (records := read_folder(folder)).faults
    assert (fault.kind, fault.where) == (kind, where) and fault.what.startswith(what) and fault.remedy
    assert records.image_ids == (1, 2, 3) and records.image_index.tolist() == [0, 0, 1, 1, 2, 2]
    assert records.captions == tuple(f"Caption {k} of {i}." for i in (1, 2, 3) for k in (0, 1))


@pytest.mark.parametrize("skip, kind", [(False, "stops"), (True, "skipped")])
def test_missing_pictures_can_be_left_out_on_purpose(folder, skip, kind):
    (folder / PICTURE).unlink()
    report = check_folder(folder, skip)
    assert report.safe == skip and report.records.image_ids == (1, 3)
    assert [fault[:3] for fault in report.faults] == [(kind, "picture file is missing", PICTURE)]


JSON = {
    "cut": (lambda raw: raw[:-30], "Input data was truncated"),
    "empty": (lambda raw: b"", "Input data was truncated"),
    "not UTF-8": (lambda raw: raw.replace(b"Caption 1", b"C\xfcption 1"), "can't decode byte 0xfc in position"),
    "no images": (lambda raw: raw.replace(b'"images"', b'"pictures"'), "missing required field `images`"),
    "a name of another type": (lambda raw: raw.replace(b'"000000000002.jpg"', b"7"), "at `$.images[1].file_name`"),
    "a number": (lambda raw: raw.replace(b'"Caption 0 of 2."', b"5"), "$.annotations[1].caption"),
    "not a number": (lambda raw: raw.replace(b'"id": 3,', b'"id": 3, "score": NaN,'), "invalid character (byte 119)"),
    "half a surrogate pair": (lambda raw: raw.replace(b"Caption 1", b"\\ud83d"), "surrogate pair (byte 380)"),
    "a path that leaves": (lambda raw: raw.replace(b"000000000002.jpg", b"../../secret.jpg"), "leaves the folder"),
}


@pytest.mark.parametrize("damage, what", JSON.values(), ids=JSON)
def test_json_that_cannot_be_trusted_stops_and_names_file_and_place(folder, damage, what):
    annotations(folder).write_bytes(damage(annotations(folder).read_bytes()))
    with pytest.raises(MmkitError, match="Remedy") as error:
        read_folder(folder)
    assert str(annotations(folder)) in str(error.value) and what in str(error.value)
    report = check_folder(folder)
    (fault,) = report.faults
    assert fault.kind == "stops" and what in fault.what and fault.remedy in report.table() and not report.safe


def test_an_id_of_two_captions_is_named_and_both_are_kept(folder):
    content = json.loads(annotations(folder).read_text())
    add(content, "annotations", caption="Another one.")
    annotations(folder).write_text(json.dumps(content))
    records = read_folder(folder)
    assert [fault[:2] for fault in records.faults] == [("kept", "caption id 200 is the id of two captions")]
    assert "Another one." in records.captions and len(records.captions) == 7


def test_random_damage_to_the_json_never_ends_in_another_error(folder):
    sound, chance, refused = annotations(folder).read_bytes(), random.Random(4), 0
    for _ in range(400):
        raw = bytearray(sound)
        for _ in range(chance.randint(1, 3)):
            at, width = chance.randrange(len(raw)), chance.choice([0, 1, 5])
            raw[at : at + width] = bytes(chance.randrange(256) for _ in range(chance.choice([0, 1, 3])))
        annotations(folder).write_bytes(raw)
        try:
            read_folder(folder)
        except MmkitError as error:
            refused += str(folder) in str(error)
    assert refused > 100


def test_a_folder_without_data_or_pictures_names_the_path_and_the_variable(tmp_path):
    with pytest.raises(MissingFile, match=r"no folder .*nowhere\. Remedy.*MMKIT_COCO_ROOT"):
        check_folder(tmp_path / "nowhere")
    with pytest.raises(MissingFile, match=rf"{tmp_path} holds no annotations/captions_.*MMKIT_COCO_ROOT"):
        read_folder(tmp_path)
    annotations(write_coco(tmp_path)).write_text(json.dumps(coco_content((8, 9))))
    with pytest.raises(MissingFile, match=r"no image that has both.* first of 2 faults: val2017/000000000008\.jpg"):
        read_folder(tmp_path)
    (tmp_path / "val2017").rename(tmp_path / "elsewhere")
    with pytest.raises(MissingFile, match="no folder val2017"):
        read_folder(tmp_path)


DAMAGED = {
    "empty": (b"", "stops", "empty file"),
    "truncated": (saved(photo())[:-900], "stops", "cannot be decoded"),
    "not an image": (BROKEN["text"], "stops", "not an image"),
    "grey": (saved(photo().convert("L")), "repaired", "grey"),
    "CMYK": (saved(photo().convert("CMYK")), "repaired", "CMYK"),
    "palette": (saved(photo().convert("P"), "PNG"), "repaired", "palette"),
    "palette with alpha": (saved(photo().convert("P"), "PNG", transparency=0), "repaired", "transparent"),
    "alpha": (saved(photo().convert("RGBA"), "PNG"), "repaired", "transparent"),
    "16-bit": (saved(Image.fromarray(np.full((60, 80), 900, np.uint16)), "PNG"), "repaired", "16 or 32 bits"),
    "animated": (saved(photo(), "GIF", save_all=True, append_images=[photo(9)]), "repaired", "first frame"),
    "turned": (saved(photo(), exif=turned(3)), "repaired", "EXIF"),
    "tiny": (saved(photo(0, TINY, TINY - 1)), "kept", "32 × 31 pixels"),
}


@pytest.mark.parametrize("content, kind, what", DAMAGED.values(), ids=DAMAGED)
def test_a_faulty_picture_is_named_with_its_kind_file_and_remedy(folder, content, kind, what):
    (folder / PICTURE).write_bytes(content)
    report = check_folder(folder)
    (fault,) = [fault for fault in report.faults if what in fault.what]
    assert fault.kind == kind and {one.where for one in report.faults} == {PICTURE}
    assert report.safe == (kind != "stops")
    assert f"  {kind:<9} {PICTURE}: {fault.what}. Remedy: {fault.remedy}" in report.table().splitlines()
    assert kind == "stops" or open_image(folder / PICTURE).mode == "RGB"


def test_the_table_counts_what_is_there(tmp_path):
    root = write_karpathy(tmp_path, ["train", "train", "val", ""])
    photo(1, 120, TINY).save(root / "val2014" / "1.jpg")
    path = root / "dataset_coco.json"
    path.write_text(path.read_text().replace('"Caption 1 of 4."', '"A second one, of six words."'))
    assert check_folder(root).table().splitlines() == [
        "images              4",
        "splits              train: 2   val: 1   to be cut: 1",
        "captions            8",
        "captions per image  2: 4 images",
        "words per caption   4 to 6, median 4",
        "width, pixels       80 to 120, median 80",
        "height, pixels      32 to 60, median 60",
        "faults              stops: 0   skipped: 0   repaired: 0   kept: 0",
        "This folder is safe to train on.",
    ]


def test_the_grave_faults_come_first_and_many_are_cut(folder):
    photo(0, 1, 1).save(folder / "val2017" / f"{1:012}.jpg")
    photo(0).convert("L").save(folder / PICTURE)
    (folder / "val2017" / f"{3:012}.jpg").write_bytes(b"")
    report = check_folder(folder)
    assert [line.split()[0] for line in report.table().splitlines() if line[0] == " "] == ["stops", "repaired", "kept"]
    assert report.sizes.tolist() == [[1, 1], [80, 60]]
    assert "  stops     … and 1 more (--show 1)" in report.table(show=0).splitlines()


def test_the_annotations_of_full_coco_fit_into_a_gigabyte(tmp_path):
    """A twentieth of it, with the token lists that make Karpathy's file 144 MB; what Python allocates grows with it."""
    rows, words = [], [f"word{number}" for number in range(10)]
    (tmp_path / "val2014").mkdir()
    for image in range(6_164):
        (tmp_path / "val2014" / f"{image}.jpg").touch()
        row = {"filepath": "val2014", "filename": f"{image}.jpg", "imgid": image, "split": "train", "cocoid": image}
        rows.append(row | {"sentences": [{"tokens": words, "raw": " ".join(words), "imgid": image}] * 5})
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": rows}), encoding="utf-8")
    tracemalloc.start()
    records = read_folder(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(records.files), len(records.captions)) == (6_164, 30_820)
    assert 20 * peak < 600e6, f"{20 * peak / 1e6:.0f} MB"
