import json

import numpy as np
import pytest
from PIL import Image, ImageDraw
from torchvision.transforms import v2

from mmkit import MmkitError, draw_scenes, scenes
from mmkit.facts import Group, Scene, sample_scene
from mmkit.scenes import draw_scene
from mmkit.vocabulary import CATEGORIES, GROUNDS, OUTDOOR, RELATIONS, TIMES

COCO = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
)


def sampled(count, seed=11):
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        scene = sample_scene(rng)
        yield scene, rng


def boxes_of(scene, boxes):
    """The boxes of each group, as corners (left, top, right, bottom)."""
    corners = iter([(x, y, x + w, y + h) for x, y, w, h in boxes])
    return [[next(corners) for _ in range(group.count)] for group in scene.groups]


def stands(relation, one, other):
    """Whether all boxes of `one` lie in that direction from all boxes of `other`."""
    left, top, right, bottom = range(4)
    one_side, other_side, sign = {
        "left of": (right, left, 1),
        "right of": (left, right, -1),
        "above": (bottom, top, 1),
        "below": (top, bottom, -1),
    }[relation]
    return all(sign * a[one_side] <= sign * b[other_side] for a in one for b in other)


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def annotations_of(folder):
    return json.loads((folder / "annotations" / "captions_scenes.json").read_text(encoding="utf-8"))


def forget_drawings():
    scenes._background.cache_clear()
    scenes._sticker.cache_clear()


def test_the_categories_are_those_of_coco():
    assert len(CATEGORIES) >= 60
    assert set(CATEGORIES) <= set(COCO.split(","))
    assert all(name == category.name for name, category in CATEGORIES.items())


def test_every_relation_has_its_converse():
    assert all(RELATIONS[RELATIONS[relation][1]][1] == relation for relation in RELATIONS)


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    first = files_of(draw_scenes(tmp_path / "a", 8, seed=3))
    forget_drawings()
    assert len(first) == 9
    assert files_of(draw_scenes(tmp_path / "b", 8, seed=3)) == first


def test_another_seed_gives_other_pictures_and_captions(tmp_path):
    one, other = draw_scenes(tmp_path / "a", 5, seed=3), draw_scenes(tmp_path / "b", 5, seed=4)
    assert all((other / "scenes" / p.name).read_bytes() != p.read_bytes() for p in (one / "scenes").iterdir())
    assert annotations_of(one)["annotations"] != annotations_of(other)["annotations"]


def test_the_first_scenes_do_not_depend_on_the_count(scenes_folder, tmp_path):
    forget_drawings()
    few = draw_scenes(tmp_path / "few", 7)
    names = sorted(path.name for path in (few / "scenes").iterdir())
    assert names == [f"{i:012}.jpg" for i in range(1, 8)]
    assert all((few / "scenes" / n).read_bytes() == (scenes_folder / "scenes" / n).read_bytes() for n in names)
    few, many = annotations_of(few), annotations_of(scenes_folder)
    assert few["images"] == many["images"][:7]
    assert few["annotations"] == many["annotations"][:35]


def test_the_annotations_follow_the_coco_layout(scenes_folder):
    content = annotations_of(scenes_folder)
    assert len(content["images"]) == 66 and len(content["annotations"]) == 330
    assert len({row["id"] for row in content["annotations"]}) == 330
    assert [row["split"] for row in content["images"]] == [""] * 60 + ["new"] * 6
    for row in content["images"]:
        with Image.open(scenes_folder / "scenes" / row["file_name"]) as picture:
            assert picture.size == (row["width"], row["height"]) and picture.mode == "RGB"
        assert row["file_name"] == f"{row['id']:012}.jpg"
        assert len(row["boxes"]) == sum(group["count"] for group in row["scene"]["groups"])


def test_sampled_scenes_are_possible_and_use_the_whole_vocabulary():
    seen = [scene for scene, _ in sampled(3000)]
    for scene in seen:
        assert 1 <= sum(group.count for group in scene.groups) <= 4
        assert len({group.category for group in scene.groups}) == len(scene.groups)
        assert (scene.relation is None) == (len(scene.groups) == 1)
        assert (scene.time is None) == (scene.ground not in OUTDOOR)
    assert {group.category for scene in seen for group in scene.groups} == set(CATEGORIES)
    assert {scene.ground for scene in seen} == set(GROUNDS)
    assert {scene.time for scene in seen} == {None, *TIMES}
    assert {scene.relation for scene in seen} == {None, *RELATIONS}
    assert {sum(group.count for group in scene.groups) for scene in seen} == {1, 2, 3, 4}


def test_boxes_show_the_relation_and_never_overlap():
    for scene, rng in sampled(1000):
        _, boxes = draw_scene(scene, rng)
        groups = boxes_of(scene, boxes)
        if scene.relation:
            assert stands(scene.relation, *groups)
            assert not stands(RELATIONS[scene.relation][1], *groups)
        corners = [box for group in groups for box in group]
        for i, (left, top, right, bottom) in enumerate(corners):
            for other in corners[:i]:
                assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


def test_sizes_are_told_apart_by_the_boxes():
    sides = {"small": set(), "medium": set(), "large": set()}
    for scene, rng in sampled(1000):
        _, boxes = draw_scene(scene, rng)
        for group, corners in zip(scene.groups, boxes_of(scene, boxes), strict=True):
            sides[group.size] |= {right - left for left, _, right, _ in corners}
    assert max(sides["small"]) < min(sides["medium"]) and max(sides["medium"]) < min(sides["large"])


def test_boxes_lie_in_the_picture_and_survive_the_centre_crop(scenes_folder):
    crop = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])
    for row in annotations_of(scenes_folder)["images"]:
        mask = Image.new("L", (row["width"], row["height"]))
        for x, y, w, h in row["boxes"]:
            assert x >= 0 and y >= 0 and x + w <= row["width"] and y + h <= row["height"]
            ImageDraw.Draw(mask).rectangle((x, y, x + w - 1, y + h - 1), fill=1)
        assert np.asarray(crop(mask)).sum() == np.asarray(mask).sum() == sum(w * h for *_, w, h in row["boxes"])


def test_objects_are_drawn_in_their_boxes_and_nowhere_else():
    def drawn(*categories):
        groups = (Group(categories[0], 3, "medium"), Group(categories[1], 1, "large"))
        return draw_scene(Scene("grass", "day", groups, "above"), np.random.default_rng(5))

    (one, boxes), (other, other_boxes) = drawn("dog", "car"), drawn("cat", "bus")
    assert boxes == other_boxes
    differs = (np.asarray(one) != np.asarray(other)).any(axis=2)
    for x, y, w, h in boxes:
        assert differs[y : y + h, x : x + w].mean() > 0.1
        differs[y : y + h, x : x + w] = False
    assert not differs.any()


def test_every_glyph_is_in_the_font():
    def rendered(glyph):
        canvas = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(canvas).text((80, 80), glyph, font=scenes._font(64), embedded_color=True, anchor="mm")
        return canvas.tobytes()

    blank, missing = bytes(160 * 160 * 4), rendered("\U0010fffd")
    drawings = [rendered(category.glyph) for category in CATEGORIES.values()]
    assert blank not in drawings and missing not in drawings
    assert len(set(drawings)) == len(drawings)


@pytest.mark.parametrize("side", [46, 66, 94])
def test_every_sticker_fills_its_box_in_colour(side):
    for category in CATEGORIES.values():
        sticker = scenes._sticker(category.glyph, side)
        assert sticker.size == (side, side)
        left, top, right, bottom = sticker.getchannel("A").getbbox()
        assert max(right - left, bottom - top) >= side - 6, category.name
        assert len(sticker.getcolors(side * side)) > 20, category.name


def test_every_ground_and_time_is_drawn_in_its_own_way():
    group = (Group("dog", 1, "small"),)
    places = [(ground, time) for ground in GROUNDS for time in (TIMES if ground in OUTDOOR else [None])]
    pictures = {}
    for ground, time in places:
        pictures[ground, time], _ = draw_scene(Scene(ground, time, group, None), np.random.default_rng(1))
        assert pictures[ground, time].size == (288, 256) and pictures[ground, time].mode == "RGB"
        assert np.asarray(pictures[ground, time]).std() > 10
    assert len({picture.tobytes() for picture in pictures.values()}) == len(places) == 18
    for ground in OUTDOOR:
        assert np.asarray(pictures[ground, "night"]).mean() < 0.75 * np.asarray(pictures[ground, "day"]).mean()


def test_the_background_varies_between_scenes_of_one_ground():
    scene = Scene("beach", "day", (Group("dog", 1, "small"),), None)
    pictures = [draw_scene(scene, np.random.default_rng(seed))[0] for seed in range(12)]
    skies = {picture.crop((0, 0, 288, 15)).tobytes() for picture in pictures}
    assert len(skies) > 1


def test_drawing_again_keeps_the_folder(tmp_path):
    folder = draw_scenes(tmp_path / "scenes", 2)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert draw_scenes(folder, 2) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("changes", [{"count": 3}, {"seed": 1}])
def test_other_scenes_are_not_drawn_over_those_that_are_there(tmp_path, changes):
    folder = draw_scenes(tmp_path / "scenes", 2)
    before = files_of(folder)
    with pytest.raises(MmkitError, match="holds other files"):
        draw_scenes(folder, **({"count": 2} | changes))
    assert files_of(folder) == before


@pytest.mark.parametrize("content", ["my notes", "{", "[]", '{"info": 1}'])
def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path, content):
    (tmp_path / "mine" / "annotations").mkdir(parents=True)
    (tmp_path / "mine" / "annotations" / "captions_scenes.json").write_text(content)
    before = files_of(tmp_path)
    with pytest.raises(MmkitError, match="mine holds other files"):
        draw_scenes(tmp_path / "mine", 2)
    assert files_of(tmp_path) == before


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(MmkitError, match="taken"):
        draw_scenes(tmp_path / "taken", 2)
    assert (tmp_path / "taken").read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    assert len(list((draw_scenes(tmp_path / "empty", 2) / "scenes").iterdir())) == 2


def test_a_dataset_of_no_scene_is_refused(tmp_path):
    with pytest.raises(MmkitError, match="count is 0"):
        draw_scenes(tmp_path / "none", 0)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_drawing_leaves_nothing_behind(tmp_path, monkeypatch):
    drawn = []

    def stop_at_third(scene, rng):
        drawn.append(scene)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw_scene(scene, rng)

    monkeypatch.setattr(scenes, "draw_scene", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        draw_scenes(tmp_path / "scenes", 5)
    assert len(drawn) == 3
    assert list(tmp_path.iterdir()) == []
