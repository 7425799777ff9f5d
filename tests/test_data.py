"""Datasets of pictures and captions: selections, splits, false captions, fingerprints, and those of a profile."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mmkit.data import CaptionDataset, load_captions, load_dataset
from mmkit.profiles import profile
from mmkit.scenes import CATEGORIES, FACTS, Scene, draw_scenes, is_new_combination
from mmkit.support import MissingFile, MmkitError


def coco_content(ids=(1, 2, 3), captions=2):
    return {
        "images": [{"id": i, "file_name": f"{i:012}.png"} for i in ids],
        "annotations": [
            {"id": 100 * i + k, "image_id": i, "caption": f"Caption {k} of {i}."} for k in range(captions) for i in ids
        ],
    }


def write_coco(root, content=None):
    """A folder in COCO-captions layout with a 8 × 6 picture for every image; image `i` has the grey value `i`."""
    content = content or coco_content()
    (root / "val2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    for row in content["images"]:
        Image.new("RGB", (8, 6), (row["id"],) * 3).save(root / "val2017" / row["file_name"])
    (root / "annotations" / "captions_val2017.json").write_text(json.dumps(content), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """400 scenes and 40 new combinations."""
    return load_captions(draw_scenes(tmp_path_factory.mktemp("drawn") / "scenes", 400, seed=5))


# --- items and selections ---


def test_items_are_pictures_with_their_captions(tmp_path):
    dataset = load_captions(write_coco(tmp_path, coco_content((30, 10, 20), captions=3)))
    assert repr(dataset) == "CaptionDataset(3 images, 9 captions)" and dataset.faults == ()
    for i, (picture, captions) in enumerate(dataset[i] for i in range(3)):
        assert picture.mode == "RGB" and picture.getpixel((0, 0)) == (dataset.image_ids[i],) * 3
        assert captions == [f"Caption {k} of {dataset.image_ids[i]}." for k in range(3)] == dataset.captions_of(i)
    assert dataset.image_index.dtype == np.int64 and dataset.image_index.tolist() == [0] * 3 + [1] * 3 + [2] * 3


def test_drawn_scenes_are_read_with_their_facts(dataset):
    assert (len(dataset), len(dataset.captions), len(dataset.scenes)) == (60, 300, 60)
    assert all(isinstance(scene, Scene) and scene.groups[0].category in CATEGORIES for scene in dataset.scenes)


def test_facts_of_no_scene_are_named(tmp_path):
    path = draw_scenes(tmp_path / "scenes", 2) / "annotations" / "captions_scenes.json"
    content = json.loads(path.read_text())
    content["images"][1]["scene"]["groups"][0]["count"] = "two"
    path.write_text(json.dumps(content))
    with pytest.raises(MmkitError, match=r"/scenes .*Expected `int`, got `str`.*\[1\]\.groups\[0\]\.count.*Remedy"):
        load_captions(tmp_path / "scenes")


def test_select_keeps_all_that_belongs_to_the_chosen_images(dataset):
    given = replace(dataset, given_splits=tuple(f"split {i}" for i in range(60)))
    part = given.select(np.array([40, 3, 17]))
    assert part.image_index.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    for i, original in enumerate((40, 3, 17)):
        for values in ("image_ids", "files", "scenes", "given_splits"):
            assert getattr(part, values)[i] == getattr(given, values)[original]
        assert part.captions_of(i) == dataset.captions_of(original)
        assert part.image(i).tobytes() == dataset.image(original).tobytes()
    nothing = dataset.select([])
    assert len(nothing) == len(nothing.captions) == len(nothing.image_index) == 0


# --- splits ---


@pytest.mark.parametrize("seed", [0, 1])
def test_splits_are_disjoint_and_cover_every_image(dataset, seed):
    splits = dataset.splits(0.1, 0.2, seed)
    assert {name: len(images) for name, images in splits.items()} == {"train": 42, "val": 6, "test": 12}
    assert sorted(np.concatenate(list(splits.values()))) == list(range(60))
    same, other = dataset.splits(0.1, 0.2, seed), dataset.splits(0.1, 0.2, seed + 1)
    assert all((splits[name] == same[name]).all() for name in splits)
    assert set(splits["test"]) != set(other["test"])


def test_given_splits_are_kept_and_restval_is_train(tmp_path):
    given = ("test", "train", "restval", "val", "train", "test", "", "", "", "")
    dataset = replace(load_captions(write_coco(tmp_path, coco_content(range(1, 11)))), given_splits=given)
    splits = {name: images.tolist() for name, images in dataset.splits(0.5, 0.25, seed=3).items()}
    assert [len(images) for images in splits.values()] == [4, 3, 3]
    assert all(given[i] in ("", "restval" if i == 2 else name) for name, images in splits.items() for i in images)
    assert dataset.select(range(6)).splits(0, 0)["val"].tolist() == [3]
    with pytest.raises(MmkitError, match=r"unknown splits \['validation'\].*Remedy.*restval"):
        replace(dataset, given_splits=("validation", *given[1:])).splits(0.1, 0.1)


def test_splits_do_not_depend_on_the_order_in_the_file(tmp_path):
    ids, parts = list(range(1, 41)), []
    for name, order in (("a", ids), ("b", np.random.default_rng(0).permutation(ids).tolist())):
        dataset = load_captions(write_coco(tmp_path / name, coco_content(order, captions=1)))
        splits = dataset.splits(0.2, 0.3, seed=5)
        parts.append({split: {dataset.image_ids[i] for i in images} for split, images in splits.items()})
    assert parts[0] == parts[1]
    assert parts[0]["val"] != set(range(1, 9))  # shuffled, not cut in order


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (-0.1, 0.2), (0.1, -0.1), (0.0, 1.0)])
def test_fractions_that_leave_no_training_images_are_refused(dataset, fractions):
    with pytest.raises(MmkitError, match=r"none of 60 to train on.*Remedy"):
        dataset.splits(*fractions)


def test_new_combinations_of_known_objects_and_grounds_are_in_the_new_part_only(drawn):
    splits = drawn.splits(0.1, 0.2)
    assert {name: len(images) for name, images in splits.items()} == {"train": 280, "val": 40, "test": 80, "new": 40}
    for name, images in splits.items():
        assert all(is_new_combination(drawn.scenes[image]) == (name == "new") for image in images)
    seen, new = ([drawn.scenes[image] for image in splits[name]] for name in ("train", "new"))
    assert {scene.ground for scene in new} <= {scene.ground for scene in seen}
    seen, new = ({group.category for scene in part for group in scene.groups} for part in (seen, new))
    assert new <= seen


# --- diagnostic negatives ---


@pytest.mark.parametrize("fact", FACTS)
def test_a_diagnostic_negative_stands_beside_a_true_caption_of_its_image(drawn, fact):
    negatives = drawn.diagnostic_negatives(fact)
    assert negatives.fact == fact and len(negatives.texts) == len(negatives.captions) > 150
    assert (drawn.image_index[negatives.captions] == negatives.image_index).all()
    assert len(set(negatives.image_index.tolist())) == len(negatives.image_index)  # one caption of an image
    assert not any(text in drawn.captions_of(i) for text, i in zip(negatives.texts, negatives.image_index, strict=True))


def test_diagnostic_negatives_follow_the_seed_and_not_the_selection(drawn):
    one, other = drawn.diagnostic_negatives("object", seed=1), drawn.diagnostic_negatives("object", seed=2)
    assert one.texts == drawn.diagnostic_negatives("object", seed=1).texts != other.texts
    part = drawn.select([30, 7]).diagnostic_negatives("object", seed=1)
    assert part.texts == (one.texts[30], one.texts[7])


def test_diagnostic_negatives_of_photos_or_of_no_known_fact_are_refused(drawn):
    with pytest.raises(MmkitError, match=r"Photos carry no facts.*Remedy"):
        replace(drawn, scenes=()).diagnostic_negatives("object")
    with pytest.raises(MmkitError, match="Valid names: object, count"):
        drawn.diagnostic_negatives("colour")


# --- fingerprints ---


def test_the_fingerprint_is_that_of_the_content_wherever_it_lies(tmp_path, dataset):
    one, other = (load_captions(write_coco(tmp_path / name)) for name in "ab")
    assert one.fingerprint() == other.fingerprint()
    assert len({dataset.select(images).fingerprint() for images in (range(60), [0, 1], [1, 0])}) == 3
    (tmp_path / "é.jpg").write_bytes(b"picture")
    known = CaptionDataset(tmp_path, (7,), ("é.jpg",), ("Ein Bär.", "A bear."), np.array([0, 0]))
    assert known.fingerprint() == "f25292d7030b1594"  # committed results name such digests


@pytest.mark.parametrize("change", ["caption", "image of a caption", "id", "picture"])
def test_the_fingerprint_changes_with_the_content(tmp_path, change):
    dataset = load_captions(write_coco(tmp_path))
    before = dataset.fingerprint()
    match change:
        case "caption":
            dataset = replace(dataset, captions=("Another.", *dataset.captions[1:]))
        case "image of a caption":
            dataset = replace(dataset, image_index=np.array([0, 1, 1, 1, 2, 2]))
        case "id":
            dataset = replace(dataset, image_ids=(1, 2, 4))
        case "picture":
            Image.new("RGB", (80, 60)).save(tmp_path / dataset.files[0])
    assert dataset.fingerprint() != before


# --- profiles ---


def test_a_profile_of_scenes_draws_them_once(tmp_path):
    settings = profile("mini", cache=tmp_path / "cache", scene_count=4, scene_seed=2)
    first = load_dataset(settings)
    files = {path: path.stat().st_mtime_ns for path in first.root.rglob("*")}
    assert len(first) == 4 and len(files) == 7
    assert load_dataset(settings).fingerprint() == first.fingerprint()
    assert {path: path.stat().st_mtime_ns for path in first.root.rglob("*")} == files
    assert len(load_dataset(replace(settings, scene_count=5))) == 5
    (tmp_path / "file").touch()
    with pytest.raises(MmkitError, match=r"cannot be written.*MMKIT_CACHE"):
        load_dataset(replace(settings, cache=tmp_path / "file" / "cache"))


def test_a_profile_of_a_folder_reads_it_and_refuses_faults_that_stop_training(tmp_path):
    settings = profile("photos", coco_root=write_coco(tmp_path))
    assert len(load_dataset(settings)) == 3
    (tmp_path / "val2017" / f"{2:012}.png").unlink()
    with pytest.raises(MmkitError, match=rf"{2:012}\.png: picture file is missing.*1 faults of .*mmkit check") as error:
        load_dataset(settings)
    assert re.search(f"check {re.escape(str(tmp_path))}$", str(error.value))
    assert len(load_dataset(replace(settings, skip_missing=True))) == 2


def test_a_profile_of_a_folder_without_one_names_the_variable():
    with pytest.raises(MissingFile, match="MMKIT_COCO_ROOT"):
        load_dataset(profile("photos"))
