"""Drawn scenes: words, facts, captions that are read back, pictures, and folders of them."""

import hashlib
import json
import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import PIL
import pytest
from PIL import Image, ImageDraw
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
from torchvision.transforms import v2

from mmkit import scenes
from mmkit.scenes import CATEGORIES, FACTS, GROUNDS, OUTDOOR, RELATIONS, TIMES, Group, Scene, drawing
from mmkit.support import MissingFile, MmkitError


def sampled(count, seed=11):
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        yield scenes.sample_scene(rng), rng


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_words_are_those_of_coco_and_name_one_category_each():
    assert len(CATEGORIES) == 64 and CATEGORIES.keys() <= set(
        FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    )
    words = [word for c in CATEGORIES.values() for word in {c.singular, c.plural, c.synonym, c.synonym_plural}]
    assert len(set(words)) == len(words) and all(c.synonym != c.singular for c in CATEGORIES.values())
    assert len(CATEGORIES) == 64 and set().union(*scenes.LOOKALIKES) <= set(CATEGORIES)
    assert all(RELATIONS[RELATIONS[relation][1]][1] == relation for relation in RELATIONS)


def test_sampled_scenes_are_possible_and_use_the_whole_vocabulary():
    seen = [scene for scene, _ in sampled(3000)]
    for scene in seen:
        assert len({group.category for group in scene.groups}) == len(scene.groups) == (2 if scene.relation else 1)
        assert (scene.time is None) == (scene.ground not in OUTDOOR) and not scenes.is_new_combination(scene)
    assert {group.category for scene in seen for group in scene.groups} == set(CATEGORIES)
    assert {scene.ground for scene in seen} == set(GROUNDS)
    assert {scene.time for scene in seen} == {None, *TIMES}
    assert {scene.relation for scene in seen} == {None, *RELATIONS}
    assert {sum(group.count for group in scene.groups) for scene in seen} == {1, 2, 3, 4}


def test_every_category_and_every_ground_has_combinations_that_are_held_out():
    held = list(scenes.HELD_OUT.values())
    assert set(scenes.HELD_OUT) == set(CATEGORIES) and {held.count(ground) for ground in GROUNDS} == {8}
    new = [scenes.sample_scene(np.random.default_rng([3, i]), new_combination=True) for i in range(1500)]
    pairs = [{(group.category, scene.ground) for group in scene.groups} & scenes.HELD_OUT.items() for scene in new]
    assert all(pairs) and set.union(*pairs) == set(scenes.HELD_OUT.items())


def test_no_object_becomes_one_that_its_glyph_shows_and_no_ground_moves_indoors():
    for scene, rng in sampled(3000):
        before = {group.category for group in scene.groups}
        (come,) = {group.category for group in scenes.change_fact(scene, "object", rng).groups} - before
        assert not any(come in names and names & before for names in scenes.LOOKALIKES)
        assert (scenes.change_fact(scene, "ground", rng).ground in OUTDOOR) == (scene.ground in OUTDOOR)


def test_only_a_fact_that_the_scene_has_can_be_changed():
    alone, rng = Scene("table", None, (Group("cup", 2, "medium"),), None), np.random.default_rng(0)
    lacking = [fact for fact in FACTS if scenes.change_fact(alone, fact, rng) is None]
    assert lacking == ["time", "size", "relation", "roles"]
    with pytest.raises(MmkitError, match=r"'colour'.*Valid names: object, count"):
        scenes.change_fact(alone, "colour", rng)


# --- captions: what they claim, read back from their words ---

WORDS = {}  # every word of the vocabulary → (category, whether it is a plural, None for "sheep")
for c in CATEGORIES.values():
    WORDS |= {c.plural: (c.name, True), c.synonym_plural: (c.name, True), c.synonym: (c.name, False)}
    WORDS[c.singular] = (c.name, None if c.singular == c.plural else False)
NOUNS = "|".join(sorted(map(re.escape, WORDS), key=len, reverse=True))
MENTION = re.compile(rf"\b(an?|two|three|four) (?:(small|large) )?({NOUNS})\b")
COUNTS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}
PLACES = {words: relation for relation, (wording, _, spot) in RELATIONS.items() for words in (wording, spot)}
PLACE = re.compile("|".join(rf"{place}\b" for place in PLACES))
PHRASES = {f" {words}": (("ground",), ground) for ground, phrases in GROUNDS.items() for words in phrases}
PHRASES |= {words: (("time",), time) for time, (end, start) in TIMES.items() for words in (f" {end}", f"^a {start}")}
# the kinds of fact that each of the five captions tells
TOLD = {"count", "ground", "time"}, {"count", "relation"}, {"count", "ground", "time"}, {"count", "ground"}
TOLD += ({"count", "time", "relation"},)


def arrangement(relation, one, other):
    return {("relation", one): relation, ("relation", other): RELATIONS[relation][1]}


def said(text):
    """What a caption claims, read from its words alone, in the form of `facts`, without what it does not tell."""
    text, named, claims = text.lower(), [], {}
    for number, size, noun in MENTION.findall(text):
        category, plural = WORDS[noun]
        assert plural in (None, COUNTS[number] > 1), text
        named.append(category)
        claims |= {("count", category): COUNTS[number]} | ({("size", category): size} if size else {})
    claims |= dict(claim for words, claim in PHRASES.items() if re.search(rf"{words}\b", text))
    place = PLACE.search(text)
    return claims | (arrangement(PLACES[place[0]], *named) if place else {})


def facts(scene):
    """All that can be claimed of a scene: {(kind, category) or (kind,): value}."""
    told = {(kind, group.category): getattr(group, kind) for group in scene.groups for kind in ("count", "size")}
    told |= {("ground",): scene.ground} | ({("time",): scene.time} if scene.time else {})
    return told | (arrangement(scene.relation, *(group.category for group in scene.groups)) if scene.relation else {})


def well_formed(text):
    return re.fullmatch(r"(?!.*(  | ,|\b[Aa] [aeiou]|\b[Aa]n [^aeiou]))[A-Z][a-z ,-]+[a-z]\.", text)


def test_the_five_captions_tell_the_scene_and_every_wording_of_them_is_true():
    for scene, rng in sampled(800):
        captions, true = scenes.write_captions(scene, rng), facts(scene).items()
        assert len(set(captions)) == 5 and all(map(well_formed, captions)), captions
        for manner, text in enumerate(captions):
            assert not TOLD[manner] & {kind for (kind, *_), _ in true - said(text).items()}, text
            wordings = {scenes.caption(scene, manner, variant) for variant in range(scenes.VARIANTS)}
            assert text in wordings and all(said(wording).items() <= true for wording in wordings), wordings


@pytest.mark.parametrize("fact", FACTS)
def test_a_false_caption_is_false_of_its_scene_and_differs_in_one_fact(fact):
    changed = 0
    for scene, rng in sampled(500, seed=5):
        captions = scenes.write_captions(scene, rng)
        if negative := scenes.false_caption(scene, captions, fact, rng):
            before, after = captions[negative[0]], negative[1]
            true, false = said(before), said(after)
            assert well_formed(after) and not false.items() <= facts(scene).items(), (before, after)
            if fact == "object":  # the same of another
                (gone,), (come,) = ({c for _, c in claims} for claims in (true.keys() - false, false.keys() - true))
                true = {tuple(come if word == gone else word for word in claim): true[claim] for claim in true}
            expected = {"object": set(), "roles": {"relation"}}.get(fact, {fact})
            assert {kind for (kind, *_), _ in true.items() ^ false.items()} == expected, (before, after)
            if fact == "roles":
                assert sorted(re.findall(r"\w+", before.lower())) == sorted(re.findall(r"\w+", after.lower()))
            changed += 1
    assert changed > 180


def stands(relation, one, other):
    """Whether all boxes (left, top, right, bottom) of `one` lie in that direction from all boxes of `other`."""
    if relation in ("right of", "below"):
        return stands(RELATIONS[relation][1], other, one)
    start = 0 if relation == "left of" else 1
    return all(a[start + 2] <= b[start] for a in one for b in other)


def test_boxes_show_the_facts_and_never_overlap():
    sides = {"small": set(), "medium": set(), "large": set()}
    for scene, rng in sampled(1000):
        boxes = [(x, y, x + w, y + h) for x, y, w, h in scenes.draw_scene(scene, rng)[1]]
        groups = boxes[: scene.groups[0].count], boxes[scene.groups[0].count :]
        if scene.relation:
            assert stands(scene.relation, *groups) and not stands(RELATIONS[scene.relation][1], *groups)
        for i, box in enumerate(boxes):
            assert all(any(stands(relation, [box], [other]) for relation in RELATIONS) for other in boxes[:i])
        for group, corners in zip(scene.groups, groups, strict=False):
            sides[group.size] |= {right - left for left, _, right, _ in corners}
    assert max(sides["small"]) < min(sides["medium"]) and max(sides["medium"]) < min(sides["large"])


def test_objects_are_drawn_in_their_boxes_and_nowhere_else():
    for seed, (scene, _) in enumerate(sampled(50)):
        picture, boxes = scenes.draw_scene(scene, np.random.default_rng(seed))
        empty = drawing.background(scene.ground, scene.time, int(np.random.default_rng(seed).integers(4)))
        differs = (np.asarray(picture) != np.asarray(empty)).any(axis=2)
        for x, y, w, h in boxes:
            assert differs[y : y + h, x : x + w].mean() > 0.1
            differs[y : y + h, x : x + w] = False
        assert not differs.any()


@pytest.mark.parametrize("side", [46, 66, 94])
def test_every_sticker_shows_its_own_glyph_in_colour(side):
    stickers = {name: scenes.sticker(category.glyph, side) for name, category in CATEGORIES.items()}
    for name, picture in stickers.items():
        left, top, right, bottom = picture.getchannel("A").getbbox()
        assert picture.size == (side, side) and max(right - left, bottom - top) >= side - 6, name
        assert len(picture.getcolors(side * side)) > 20, name
    missing = scenes.sticker("\U0010fffd", side)
    assert len({picture.tobytes() for picture in [missing, *stickers.values()]}) == len(CATEGORIES) + 1


def test_every_ground_and_time_is_drawn_in_its_own_way():
    dog = (Group("dog", 1, "small"),)
    places = [(ground, time) for ground in GROUNDS for time in (TIMES if ground in OUTDOOR else [None])]
    pictures = {place: scenes.draw_scene(Scene(*place, dog, None), np.random.default_rng(1))[0] for place in places}
    assert {(picture.size, picture.mode) for picture in pictures.values()} == {((288, 256), "RGB")}
    assert len({picture.tobytes() for picture in pictures.values()}) == len(places) == 18
    for ground in OUTDOOR:
        assert np.asarray(pictures[ground, "night"]).mean() < 0.75 * np.asarray(pictures[ground, "day"]).mean()
    assert len({drawing.background("beach", "day", variant).tobytes() for variant in range(4)}) == 4


def test_the_same_seed_gives_the_bytes_that_committed_figures_rest_on(tmp_path):
    files = files_of(scenes.draw_scenes(tmp_path / "scenes", 12))
    contents = files["annotations/captions_scenes.json"], b"".join(files.values())
    text, pictures = (hashlib.sha256(content).hexdigest()[:16] for content in contents)
    lock = (Path(__file__).parents[1] / "requirements.lock").read_text()
    assert text == "8861432c4374e140"
    assert pictures == "6d49b21ecc1655d2" or f"pillow=={PIL.__version__}" not in lock  # others may round otherwise


def test_scenes_depend_on_the_seed_and_not_on_the_count(scenes_folder, tmp_path):
    few, other = (files_of(scenes.draw_scenes(tmp_path / str(seed), 7, seed)) for seed in (0, 4))
    many = files_of(scenes_folder)
    assert not other.items() & many.items()
    few_told, told = (json.loads(files.pop("annotations/captions_scenes.json")) for files in (few, many))
    assert list(few) == [f"scenes/{i:012}.jpg" for i in range(1, 8)] and few.items() <= many.items()
    assert few_told["images"] == told["images"][:7] and few_told["annotations"] == told["annotations"][:35]


def test_the_annotations_follow_the_coco_layout_and_boxes_survive_the_centre_crop(scenes_folder):
    content = json.loads((scenes_folder / "annotations" / "captions_scenes.json").read_text())
    crop = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])
    assert len({row["id"] for row in content["annotations"]}) == len(content["annotations"]) == 330
    assert [row["split"] for row in content["images"]] == [""] * 60 + ["new"] * 6
    for row in content["images"]:
        with Image.open(scenes_folder / "scenes" / f"{row['id']:012}.jpg") as picture:
            assert picture.size == (row["width"], row["height"]) and picture.mode == "RGB"
        assert len(row["boxes"]) == sum(group["count"] for group in row["scene"]["groups"])
        mask = Image.new("L", picture.size)
        for x, y, w, h in row["boxes"]:
            ImageDraw.Draw(mask).rectangle((x, y, x + w - 1, y + h - 1), fill=1)
        assert np.asarray(crop(mask)).sum() == np.asarray(mask).sum() == sum(w * h for *_, w, h in row["boxes"])


def test_drawing_again_keeps_the_folder_and_other_scenes_are_not_drawn_over_it(tmp_path):
    (tmp_path / "scenes").mkdir()  # an empty folder is filled
    folder = scenes.draw_scenes(tmp_path / "scenes", 2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert scenes.draw_scenes(folder, 2) == folder and len(before) == 6
    for count, seed, message in ((3, 0, "holds other files"), (2, 1, "holds other files"), (0, 0, "count is 0")):
        with pytest.raises(MmkitError, match=message):
            scenes.draw_scenes(folder, count, seed)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("content", ["my notes", "{", "[]", '{"info": 1}', None])
def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path, content):
    mine = tmp_path / "mine" / "annotations" / "captions_scenes.json" if content else tmp_path / "mine"
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text(content or "a file in the place of the folder")
    before = files_of(tmp_path)
    with pytest.raises(MmkitError, match="mine holds other files"):
        scenes.draw_scenes(tmp_path / "mine", 2)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt("at the third"), MissingFile("no glyphs")])
def test_interrupted_drawing_leaves_nothing_behind(tmp_path, monkeypatch, error):
    failing = Mock(side_effect=[[], [], error])
    monkeypatch.setattr(drawing, "write_captions", failing)
    with pytest.raises(type(error), match=str(error)):
        scenes.draw_scenes(tmp_path / "scenes", 5)
    assert failing.call_count == 3 and list(tmp_path.iterdir()) == []


def test_two_that_draw_the_same_scenes_at_once_both_get_them(tmp_path, monkeypatch):
    others = iter([lambda: scenes.draw_scenes(tmp_path / "scenes", 3)])

    def write_after_the_other(scene, rng):
        next(others, lambda: None)()
        return scenes.write_captions(scene, rng)

    monkeypatch.setattr(drawing, "write_captions", write_after_the_other)
    assert len(files_of(scenes.draw_scenes(tmp_path / "scenes", 3))) == 4 and len(list(tmp_path.iterdir())) == 1
