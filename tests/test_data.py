import dataclasses
import json
import threading
import tracemalloc
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from mmkit import MissingFile, MmkitError, load_captions, load_dataset, profile, scenes
from mmkit.facts import Scene
from mmkit.vocabulary import CATEGORIES


def coco_content(ids=(1, 2, 3), captions=2):
    return {
        "images": [{"id": i, "file_name": f"{i:012}.png"} for i in ids],
        "annotations": [
            {"id": 100 * i + k, "image_id": i, "caption": f"Caption {k} of {i}."} for k in range(captions) for i in ids
        ],
    }


def write_coco(root, content=None, name="val2017", folder=None):
    """A folder in COCO-captions layout with a 8 × 6 picture for every image; image `i` has the grey value `i`."""
    content = content or coco_content()
    pictures = root / (folder or name)
    pictures.mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    for row in content["images"]:
        Image.new("RGB", (8, 6), (int(row["id"]),) * 3).save(pictures / row["file_name"])
    (root / "annotations" / f"captions_{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return root


def write_karpathy(root, splits, path="dataset_coco.json"):
    (root / "val2014").mkdir(parents=True)
    (root / path).parent.mkdir(exist_ok=True)
    rows = []
    for i, split in enumerate(splits, start=1):
        row = {"cocoid": i, "filepath": "val2014", "filename": f"{i}.png", "split": split}
        rows.append(row | {"sentences": [{"raw": f"Caption {k} of {i}."} for k in range(2)]})
        Image.new("RGB", (8, 6)).save(root / "val2014" / f"{i}.png")
    (root / path).write_text(json.dumps({"images": rows, "dataset": "coco"}), encoding="utf-8")
    return root


def annotations_file(root):
    return next((root / "annotations").iterdir())


# --- layouts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["val2017", "images/val2017", "images"])
def test_a_coco_folder_is_read(tmp_path, folder):
    dataset = load_captions(write_coco(tmp_path, folder=folder))
    assert len(dataset) == 3 and len(dataset.captions) == 6 and dataset.faults == ()
    assert repr(dataset) == "CaptionDataset(3 images, 6 captions)"
    for i in range(3):
        picture, captions = dataset[i]
        assert picture.mode == "RGB" and picture.getpixel((0, 0)) == (dataset.image_ids[i],) * 3
        assert captions == [f"Caption {k} of {dataset.image_ids[i]}." for k in range(2)]


def test_every_caption_points_to_its_image(tmp_path):
    dataset = load_captions(write_coco(tmp_path, coco_content((30, 10, 20), captions=3)))
    for caption, image in zip(dataset.captions, dataset.caption_image, strict=True):
        assert caption.endswith(f" of {dataset.image_ids[image]}.")
    assert np.issubdtype(dataset.caption_image.dtype, np.integer)


def test_drawn_scenes_are_read_with_their_facts(dataset):
    assert (len(dataset), len(dataset.captions), len(dataset.scenes)) == (60, 300, 60)
    assert all(isinstance(scene, Scene) and scene.groups[0].category in CATEGORIES for scene in dataset.scenes)


def test_the_annotation_files_of_coco_2014_are_merged(tmp_path):
    write_coco(tmp_path, coco_content((5, 6)), "train2014")
    write_coco(tmp_path, coco_content((3, 4)), "val2014")
    dataset = load_captions(tmp_path)
    assert sorted(dataset.image_ids) == [3, 4, 5, 6] and len(dataset.captions) == 8 and dataset.faults == ()
    for i, image_id in enumerate(dataset.image_ids):
        assert dataset.image(i).getpixel((0, 0)) == (image_id,) * 3
        assert dataset.captions_of(i) == [f"Caption {k} of {image_id}." for k in range(2)]


@pytest.mark.parametrize("path", ["dataset_coco.json", "annotations/dataset_coco.json"])
def test_karpathys_splits_are_kept_and_restval_is_train(tmp_path, path):
    dataset = load_captions(write_karpathy(tmp_path, ["test", "train", "restval", "val", "train", "test"], path))
    splits = dataset.splits(0.5, 0.4, seed=3)
    ids = {name: [dataset.image_ids[i] for i in rows] for name, rows in splits.items()}
    assert ids == {"train": [2, 3, 5], "val": [4], "test": [1, 6]}
    assert dataset.captions_of(3) == ["Caption 0 of 4.", "Caption 1 of 4."]


def test_karpathys_file_is_preferred_to_coco_annotations(tmp_path):
    write_coco(tmp_path)
    assert len(load_captions(write_karpathy(tmp_path, ["train"]))) == 1


def test_captions_of_an_image_stay_in_the_order_of_the_file(tmp_path):
    content = coco_content((1, 2), captions=3)
    content["annotations"].reverse()
    dataset = load_captions(write_coco(tmp_path, content))
    assert dataset.captions_of(1) == ["Caption 2 of 2.", "Caption 1 of 2.", "Caption 0 of 2."]


def test_captions_lose_stray_white_space(tmp_path):
    content = coco_content((1,), captions=1)
    content["annotations"][0]["caption"] = " A dog\n on  grass. \n"
    assert load_captions(write_coco(tmp_path, content)).captions == ("A dog on grass.",)


# --- selections and splits -------------------------------------------------------------------


def test_select_keeps_every_caption_of_the_chosen_images(dataset):
    part = dataset.select([40, 3, 17])
    assert part.image_ids == tuple(dataset.image_ids[i] for i in (40, 3, 17))
    assert part.scenes == tuple(dataset.scenes[i] for i in (40, 3, 17))
    for i, original in enumerate((40, 3, 17)):
        assert part.captions_of(i) == dataset.captions_of(original)
        assert part.image(i).tobytes() == dataset.image(original).tobytes()
    assert part.caption_image.tolist() == [0] * 5 + [1] * 5 + [2] * 5


def test_select_keeps_given_splits(tmp_path):
    dataset = load_captions(write_karpathy(tmp_path, ["test", "train", "val"])).select([2, 0])
    assert {name: rows.tolist() for name, rows in dataset.splits(0, 0).items()} == {
        "train": [],
        "val": [0],
        "test": [1],
    }


def test_nothing_can_be_selected(dataset):
    assert len(dataset.select([])) == len(dataset.select([]).captions) == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_splits_are_disjoint_and_cover_every_image(dataset, seed):
    splits = dataset.splits(0.1, 0.2, seed)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 42, "val": 6, "test": 12}
    assert sorted(np.concatenate(list(splits.values()))) == list(range(60))
    captions = [{caption for i in rows for caption in dataset._captions_of[i]} for rows in splits.values()]
    assert sum(map(len, captions)) == 300 == len(set.union(*captions))


def test_splits_follow_the_seed(dataset):
    one, same, other = (dataset.splits(0.1, 0.2, seed) for seed in (0, 0, 1))
    assert all((one[name] == same[name]).all() for name in one)
    assert set(one["test"]) != set(other["test"])


def test_splits_do_not_depend_on_the_order_in_the_file(tmp_path):
    ids = list(range(1, 41))
    shuffled = np.random.default_rng(0).permutation(ids).tolist()
    found = []
    for name, order in (("a", ids), ("b", shuffled)):
        dataset = load_captions(write_coco(tmp_path / name, coco_content(order, captions=1)))
        splits = dataset.splits(0.2, 0.3, seed=5)
        found.append({split: {dataset.image_ids[i] for i in rows} for split, rows in splits.items()})
    assert found[0] == found[1]
    assert found[0]["val"] != set(range(1, 9))  # shuffled, not cut in order


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (-0.1, 0.2), (0.1, -0.1), (0.0, 1.0)])
def test_fractions_that_leave_no_training_images_are_refused(dataset, fractions):
    with pytest.raises(MmkitError, match="none of 60 to train on"):
        dataset.splits(*fractions)


# --- what cannot be read ---------------------------------------------------------------------


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_without_data_names_the_path_and_the_variable(tmp_path, exists):
    root = tmp_path / "nowhere"
    if exists:
        root.mkdir()
    with pytest.raises(MissingFile, match="MMKIT_COCO_ROOT") as error:
        load_captions(root)
    assert str(root) in str(error.value)


def test_annotations_without_their_folder_of_pictures_name_it(tmp_path):
    write_coco(tmp_path)
    (tmp_path / "val2017").rename(tmp_path / "elsewhere")
    with pytest.raises(MissingFile, match="no folder val2017"):
        load_captions(tmp_path)


def test_a_cut_json_file_is_named(tmp_path):
    path = annotations_file(write_coco(tmp_path))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(MmkitError, match="not complete JSON") as error:
        load_captions(tmp_path)
    assert str(path) in str(error.value) and "Remedy" in str(error.value)


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    content = coco_content()
    content["annotations"][0]["caption"] = "Ein Bär"
    path = annotations_file(write_coco(tmp_path))
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="latin-1")
    with pytest.raises(MmkitError, match="not UTF-8") as error:
        load_captions(tmp_path)
    assert str(path) in str(error.value)


ROW = {"id": 1, "file_name": f"{1:012}.png"}
TOLD = {"id": 1, "image_id": 1, "caption": "A dog."}


@pytest.mark.parametrize(
    "content",
    [
        [],
        "text",
        {},
        {"images": {}, "annotations": []},
        {"images": [ROW]},
        {"images": [ROW], "annotations": {}},
        {"images": [{"id": 1}], "annotations": [TOLD]},
        {"images": [ROW], "annotations": [{"image_id": 1}]},
        {"images": ["1.png"], "annotations": [TOLD]},
        {"images": [ROW], "annotations": [None]},
    ],
)
def test_a_file_of_another_shape_is_named(tmp_path, content):
    path = annotations_file(write_coco(tmp_path))
    path.write_text(json.dumps(content))
    with pytest.raises(MmkitError) as error:
        load_captions(tmp_path)
    assert path.name in str(error.value)


def test_a_karpathy_file_of_another_shape_is_named(tmp_path):
    path = write_karpathy(tmp_path, ["train"]) / "dataset_coco.json"
    path.write_text(json.dumps({"images": [{"cocoid": 1, "filepath": "val2014", "filename": "1.png"}]}))
    with pytest.raises(MmkitError, match=r"dataset_coco\.json.*`split`"):
        load_captions(tmp_path)


# --- what is left out ------------------------------------------------------------------------


def same_image_twice(content, root):
    content["images"].append(content["images"][1])


def two_pictures_of_one_id(content, root):
    content["images"].append(content["images"][2] | {"id": 2})


def caption_without_image(content, root):
    content["annotations"].append({"id": 9, "image_id": 99, "caption": "A dog."})


def image_without_caption(content, root):
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] != 2]


def picture_missing(content, root):
    (root / "val2017" / f"{2:012}.png").unlink()


def caption_blank(content, root):
    content["annotations"][1]["caption"] = " \n"


def caption_null(content, root):
    content["annotations"][1]["caption"] = None


def caption_twice(content, root):
    content["annotations"].append(content["annotations"][1])


@pytest.mark.parametrize(
    "damage, kind, what, where, images, captions",
    [
        (same_image_twice, "skipped", "image 2 is listed again", "captions_val2017.json", 3, 6),
        (two_pictures_of_one_id, "stops", "image id 2 names two pictures", "captions_val2017.json", 3, 6),
        (caption_without_image, "skipped", "1 captions of image 99, which is not listed", "annotations", 3, 6),
        (image_without_caption, "skipped", "image 2 has no caption", "val2017/000000000002.png", 2, 4),
        (picture_missing, "stops", "picture file is missing", "val2017/000000000002.png", 2, 4),
        (caption_blank, "skipped", "caption of image 2 is empty", "captions_val2017.json", 3, 5),
        (caption_null, "skipped", "caption of image 2 is empty", "captions_val2017.json", 3, 5),
        (caption_twice, "skipped", "caption id 200 is listed again", "captions_val2017.json", 3, 6),
    ],
)
def test_unusable_records_are_left_out_and_named(tmp_path, damage, kind, what, where, images, captions):
    content = coco_content()
    root = write_coco(tmp_path, content)
    damage(content, root)
    annotations_file(root).write_text(json.dumps(content))
    dataset = load_captions(root)
    (fault,) = dataset.faults
    assert (fault.kind, fault.where) == (kind, where) and fault.what.startswith(what) and fault.remedy
    assert (len(dataset), len(dataset.captions)) == (images, captions)
    for caption, image in zip(dataset.captions, dataset.caption_image, strict=True):
        assert caption.endswith(f" of {dataset.image_ids[image]}.")


def test_a_folder_with_no_usable_image_is_refused(tmp_path):
    for picture in (write_coco(tmp_path) / "val2017").iterdir():
        picture.unlink()
    with pytest.raises(MissingFile, match="no image that has both") as error:
        load_captions(tmp_path)
    assert str(tmp_path) in str(error.value)


# --- fingerprint and profiles ----------------------------------------------------------------


def test_the_fingerprint_is_that_of_the_content_wherever_it_lies(tmp_path):
    one, other = (load_captions(write_coco(tmp_path / name)) for name in "ab")
    assert one.fingerprint() == other.fingerprint()


def change_caption(content, root):
    content["annotations"][0]["caption"] = "Another caption."


def change_owner(content, root):
    content["annotations"][0]["image_id"] = 2


def change_id(content, root):
    for row in content["annotations"]:
        row["image_id"] += 10
    for row in content["images"]:
        row["id"] += 10


def change_picture(content, root):
    Image.new("RGB", (80, 60)).save(root / "val2017" / f"{1:012}.png")


@pytest.mark.parametrize("change", [change_caption, change_owner, change_id, change_picture])
def test_the_fingerprint_changes_with_the_content(tmp_path, change):
    content = coco_content()
    root = write_coco(tmp_path, content)
    before = load_captions(root).fingerprint()
    change(content, root)
    annotations_file(root).write_text(json.dumps(content))
    assert load_captions(root).fingerprint() != before


def test_the_fingerprint_changes_with_the_owner_of_a_caption(dataset):
    owners = dataset.caption_image.copy()
    owners[4] = 1
    assert dataclasses.replace(dataset, caption_image=owners).fingerprint() != dataset.fingerprint()


def test_the_fingerprint_of_a_part_is_another(dataset):
    assert len({dataset.fingerprint(), dataset.select([0, 1]).fingerprint(), dataset.select([1, 0]).fingerprint()}) == 3


def test_a_profile_of_scenes_draws_them_once(tmp_path):
    settings = profile("mini", cache=tmp_path, scene_count=4, scene_seed=2)
    first = load_dataset(settings)
    drawn = {path: path.stat().st_mtime_ns for path in first.root.rglob("*")}
    assert len(first) == 4 and len(drawn) == 7
    assert load_dataset(settings).fingerprint() == first.fingerprint()
    assert {path: path.stat().st_mtime_ns for path in first.root.rglob("*")} == drawn
    assert len(load_dataset(profile("mini", cache=tmp_path, scene_count=5))) == 5


def test_two_that_want_the_same_scenes_both_get_them(tmp_path, monkeypatch):
    meet, write, results = threading.Barrier(2, timeout=0.3), scenes.write_captions, []
    settings = profile("mini", cache=tmp_path, scene_count=3)

    def write_together(scene, rng):
        with suppress(threading.BrokenBarrierError):  # one may wait until the other has drawn
            meet.wait()
        return write(scene, rng)

    def load():
        try:
            results.append(load_dataset(settings))
        except OSError as error:
            results.append(error)

    monkeypatch.setattr(scenes, "write_captions", write_together)
    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0].fingerprint() == results[1].fingerprint()
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [results[0].root]


def test_a_cache_that_cannot_hold_scenes_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MmkitError, match="MMKIT_CACHE"):
        load_dataset(profile("mini", cache=tmp_path / "file" / "cache", scene_count=2))


def test_a_profile_of_a_folder_reads_it(tmp_path):
    write_coco(tmp_path)
    assert len(load_dataset(profile("mini", coco_root=tmp_path))) == 3


def test_a_profile_of_a_folder_without_one_names_the_variable():
    with pytest.raises(MissingFile, match="MMKIT_COCO_ROOT"):
        load_dataset(profile("photos"))


def test_an_unknown_given_split_is_named(dataset):
    data = dataclasses.replace(dataset.select([0, 1]), given_splits=("train", "validation"))
    with pytest.raises(MmkitError, match="validation"):
        data.splits(0.1, 0.1)


# --- full COCO ---------------------------------------------------------------------------------


def write_full_coco(root, images):
    """Karpathy's file and empty pictures, `images` of 123,287; with the token lists that make his file 144 MB."""
    words = [f"word{number}" for number in range(700)]
    chance = np.random.default_rng(0)
    (root / "val2014").mkdir(parents=True)
    rows = []
    for image in range(images):
        name = f"COCO_val2014_{image:012}.jpg"
        (root / "val2014" / name).touch()
        told = [[words[word] for word in chance.integers(0, 700, 10)] for _ in range(5)]
        sentences = [
            {"tokens": tokens, "raw": " ".join(tokens) + ".", "imgid": image, "sentid": 5 * image + k}
            for k, tokens in enumerate(told)
        ]
        rows.append(
            {
                "filepath": "val2014",
                "filename": name,
                "imgid": image,
                "split": "train",
                "cocoid": image,
                "sentences": sentences,
            }
        )
    (root / "dataset_coco.json").write_text(json.dumps({"images": rows, "dataset": "coco"}), encoding="utf-8")
    return root


def test_the_annotations_of_full_coco_fit_into_a_gigabyte(tmp_path):
    """A twentieth of it; what Python allocates grows with the file and does not depend on the machine."""
    root = write_full_coco(tmp_path, 6_164)
    tracemalloc.start()
    dataset = load_captions(root)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(dataset), len(dataset.captions)) == (6_164, 30_820)
    assert 20 * peak < 600e6, f"{20 * peak / 1e6:.0f} MB"
