import json
import random
import re

import numpy as np
import pytest
from PIL import Image

from mmkit import MissingFile, MmkitError, check_folder, load_captions, load_dataset, profile
from mmkit.__main__ import main
from mmkit.annotations import LONG_CAPTION
from mmkit.check import TINY


def photo(seed=0, width=80, height=60):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Six sound photos in COCO's layout with two captions each."""
    (tmp_path / "val2017").mkdir()
    (tmp_path / "annotations").mkdir()
    for i in range(1, 7):
        photo(i).save(tmp_path / "val2017" / f"{i:012}.jpg")
    images = [{"id": i, "file_name": f"{i:012}.jpg"} for i in range(1, 7)]
    captions = [
        {"id": 10 * i + k, "image_id": i, "caption": f"Number {i}, told {k}."} for i in range(1, 7) for k in (0, 1)
    ]
    write(tmp_path, {"images": images, "annotations": captions})
    return tmp_path


def annotations(folder):
    return folder / "annotations" / "captions_val2017.json"


def write(folder, content):
    annotations(folder).write_text(json.dumps(content), encoding="utf-8")


def change(folder, **caption):
    content = json.loads(annotations(folder).read_text(encoding="utf-8"))
    content["annotations"][2] |= caption
    write(folder, content)


def third_photo(folder):
    return folder / "val2017" / f"{3:012}.jpg"


# --- pictures --------------------------------------------------------------------------------


def broken(how):
    def damage(path):
        if how == "missing":
            path.unlink()
        elif how == "empty":
            path.write_bytes(b"")
        elif how == "truncated":
            path.write_bytes(path.read_bytes()[:-900])
        else:
            path.write_text("<html>404</html>")

    return damage


def saved(image, **options):
    def damage(path):
        image.save(path, format=options.pop("format", "JPEG"), **options)

    return damage


def turned():
    exif = Image.Exif()
    exif[0x0112] = 3
    return exif


PICTURES = {
    "missing": (broken("missing"), "stops", "picture file is missing"),
    "empty": (broken("empty"), "stops", "empty file"),
    "truncated": (broken("truncated"), "stops", "cannot be decoded"),
    "not an image": (broken("html"), "stops", "not an image"),
    "grey": (saved(photo().convert("L")), "repaired", "grey"),
    "CMYK": (saved(photo().convert("CMYK")), "repaired", "CMYK"),
    "palette with alpha": (saved(photo().convert("P"), format="PNG", transparency=0), "repaired", "transparent"),
    "16-bit": (saved(Image.fromarray(np.full((60, 80), 900, np.uint16)), format="PNG"), "repaired", "16"),
    "animated": (saved(photo(), format="GIF", save_all=True, append_images=[photo(9)]), "repaired", "animated"),
    "turned": (saved(photo(), exif=turned()), "repaired", "EXIF"),
    "1×1": (saved(photo(0, 1, 1)), "kept", "1 × 1 pixels"),
}


@pytest.mark.parametrize("damage, kind, what", PICTURES.values(), ids=PICTURES)
def test_a_faulty_picture_is_named_with_its_kind_file_and_remedy(folder, damage, kind, what):
    damage(third_photo(folder))
    report = check_folder(folder)
    found = [fault for fault in report.faults if what in fault.what]
    assert [(fault.kind, fault.where) for fault in found] == [(kind, "val2017/000000000003.jpg")] and found[0].remedy
    assert report.safe == (kind != "stops")
    assert {fault.where for fault in report.faults} == {"val2017/000000000003.jpg"}
    assert all(text in report.table() for text in (what, "val2017/000000000003.jpg", found[0].remedy))
    assert main(["check", str(folder)]) == int(kind == "stops")


def test_a_bomb_is_named(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80 * 60)
    photo(3, 100, 100).save(third_photo(folder))
    (fault,) = check_folder(folder).faults
    assert fault.kind == "stops" and "decompression bomb" in fault.what and fault.where.endswith("03.jpg")


def test_the_limit_of_a_tiny_picture(folder):
    photo(3, TINY, TINY).save(third_photo(folder))
    assert check_folder(folder).faults == ()


# --- captions --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", " \n\t ", None])
def test_an_empty_caption_is_skipped(folder, text):
    change(folder, caption=text)
    (fault,) = check_folder(folder).faults
    assert fault.kind == "skipped" and "caption of image 2 is empty" in fault.what
    assert len(load_captions(folder).captions) == 11


def test_control_characters_become_spaces(folder):
    change(folder, caption="A\x00 dog\x07runs\x1b[0m.")
    (fault,) = check_folder(folder).faults
    assert fault.kind == "repaired" and "control characters" in fault.what
    assert load_captions(folder).captions_of(1)[0] == "A dog runs [0m."


def test_line_breaks_are_tidied_without_a_word(folder):
    change(folder, caption="A dog\r\n  runs. ")
    assert check_folder(folder).faults == () and load_captions(folder).captions_of(1)[0] == "A dog runs."


@pytest.mark.parametrize("length", [LONG_CAPTION + 1, 100_000])
def test_a_very_long_caption_is_kept_whole_and_cut_by_the_preprocessor(folder, length, dataset):
    text = ("word " * length)[:length].strip() + "."
    change(folder, caption=text)
    (fault,) = check_folder(folder).faults
    assert fault.kind == "repaired" and f"{len(text):,} characters" in fault.what
    assert load_captions(folder).captions_of(1)[0] == text


@pytest.mark.parametrize(
    "text", ["Собака в снегу.", "一只狗在雪地里。", "A dog 🐕 in snow.", "كلب", "A dog 👩‍👩‍👧 runs."]
)
def test_captions_beyond_the_latin_alphabet_are_kept_and_named(folder, text):
    change(folder, caption=text)
    (fault,) = check_folder(folder).faults
    assert fault.kind == "kept" and "image 2" in fault.what
    assert load_captions(folder).captions_of(1)[0] == text


@pytest.mark.parametrize("text", ["Un café près de l'eau.", "Ein Bär — 20 °C, “naïve” …"])
def test_latin_letters_with_accents_are_nothing_unusual(folder, text):
    change(folder, caption=text)
    assert check_folder(folder).faults == ()


# --- the JSON --------------------------------------------------------------------------------


JSON = {
    "cut": (lambda raw: raw[:-30], "not complete JSON (line 1"),
    "empty": (lambda raw: b"", "not complete JSON"),
    "not UTF-8": (lambda raw: raw.replace(b"Number 4", b"N\xfcmber 4"), "not UTF-8 (byte"),
    "a list": (lambda raw: b"[1, 2]", "Expected `object`, got `array`"),
    "no images": (lambda raw: raw.replace(b'"images"', b'"pictures"'), "missing required field `images`"),
    "an id of another type": (lambda raw: raw.replace(b'"id": 4,', b'"id": [4],'), "at `$.images[3].id`"),
    "a name of another type": (lambda raw: raw.replace(b'"000000000002.jpg"', b"7"), "at `$.images[1].file_name`"),
    "a caption that is a number": (lambda raw: raw.replace(b'"Number 1, told 1."', b"5"), "$.annotations[1].caption"),
    "not a number": (lambda raw: raw.replace(b'"id": 4,', b'"id": 4, "score": NaN,'), "NaN or half a surrogate"),
    "half a surrogate pair": (lambda raw: raw.replace(b"told 1", b"\\ud83d"), "NaN or half a surrogate"),
    "a path that leaves": (lambda raw: raw.replace(b"000000000002.jpg", b"../../secret.jpg"), "leaves the folder"),
    "an absolute path": (lambda raw: raw.replace(b"000000000002.jpg", b"/etc/passwd"), "leaves the folder"),
}


@pytest.mark.parametrize("damage, what", JSON.values(), ids=JSON)
def test_json_that_cannot_be_trusted_stops_and_names_file_and_place(folder, damage, what, capsys):
    annotations(folder).write_bytes(damage(annotations(folder).read_bytes()))
    with pytest.raises(MmkitError) as error:
        load_captions(folder)
    assert str(annotations(folder)) in str(error.value) and what in str(error.value) and "Remedy" in str(error.value)
    assert main(["check", str(folder)]) == 1
    said = capsys.readouterr().out
    assert what in said and "NOT safe" in said and said.count("stops") == 2  # its count and the fault


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_does_no_harm(folder, mark):
    annotations(folder).write_bytes(mark + annotations(folder).read_bytes())
    assert check_folder(folder).faults == ()


def test_random_damage_to_the_json_never_ends_in_another_error(folder):
    sound = annotations(folder).read_bytes()
    chance = random.Random(4)
    refused = 0
    for _ in range(400):
        raw = bytearray(sound)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(raw))
            raw[at : at + chance.choice([0, 1, 5])] = bytes(
                chance.randrange(256) for _ in range(chance.choice([0, 1, 3]))
            )
        annotations(folder).write_bytes(raw)
        try:
            load_captions(folder)
        except MmkitError as error:
            refused += 1
            assert "Traceback" not in str(error) and str(folder) in str(error)
    assert refused > 100


# --- the report ------------------------------------------------------------------------------


def test_the_table_counts_what_is_there(folder, capsys):
    content = json.loads(annotations(folder).read_text())
    content["annotations"] += [{"id": 99, "image_id": 6, "caption": "A third one, of seven words, it is."}]
    write(folder, content)
    photo(1, 120, 40).save(third_photo(folder))
    assert main(["check", str(folder)]) == 0
    rows = [re.split(" {2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["images", "6"],
        ["captions", "13"],
        ["captions per image", "2: 5 images   3: 1 images"],
        ["words per caption", "4 to 8, median 4"],
        ["width, pixels", "80 to 120, median 80"],
        ["height, pixels", "40 to 60, median 60"],
        ["faults", "stops: 0   skipped: 0   repaired: 0   kept: 0"],
        ["This folder is safe to train on."],
    ]


def test_the_grave_faults_come_first(folder):
    photo(0, 1, 1).save(folder / "val2017" / f"{1:012}.jpg")
    photo(0).convert("L").save(folder / "val2017" / f"{2:012}.jpg")
    third_photo(folder).write_bytes(b"")
    kinds = [line.split()[0] for line in check_folder(folder).table().splitlines() if line.startswith("  ")]
    assert kinds == ["stops", "repaired", "kept"]


def test_the_photos_of_a_split_of_2017_alone_are_enough(folder):
    """annotations_trainval2017.zip brings both files; many have only the pictures of val2017."""
    (folder / "annotations" / "captions_train2017.json").write_text("{}")
    report = check_folder(folder)
    (fault,) = report.faults
    assert report.safe and fault.kind == "skipped" and fault.where == "captions_train2017.json"
    assert len(load_captions(folder)) == 6


def test_of_coco_2014_and_2017_together_one_is_read(folder):
    (folder / "val2014").mkdir()
    (folder / "annotations" / "captions_val2014.json").write_bytes(annotations(folder).read_bytes())
    (fault,) = load_captions(folder).faults
    assert (fault.kind, fault.where) == ("skipped", "captions_val2014.json") and len(load_captions(folder)) == 6


def test_missing_pictures_stop_training_unless_they_are_left_out_on_purpose(folder, capsys):
    third_photo(folder).unlink()
    with pytest.raises(MmkitError, match=r"000000000003\.jpg: picture file is missing.*skip_missing.*1 faults"):
        load_dataset(profile("photos", coco_root=folder))
    assert len(load_dataset(profile("photos", coco_root=folder, skip_missing=True))) == 5
    assert main(["check", str(folder)]) == 1
    assert main(["check", str(folder), "--skip-missing"]) == 0
    assert "skipped   val2017/000000000003.jpg: picture file is missing" in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_no_fault_of_its_content(tmp_path, capsys):
    with pytest.raises(MissingFile, match="There is no folder"):
        check_folder(tmp_path / "none")
    assert main(["check", str(tmp_path / "none")]) == 2


def test_real_layouts_have_the_same_report_with_any_number_of_threads(folder):
    photo(0).convert("L").save(third_photo(folder))
    one, four = check_folder(folder, workers=1), check_folder(folder, workers=4)
    assert one.faults == four.faults and (one.sizes == four.sizes).all() and one.table() == four.table()
