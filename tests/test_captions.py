import re
from dataclasses import replace

import numpy as np
import pytest
from test_scenes import boxes_of, sampled, stands

from mmkit import FACTS, MmkitError, draw_scenes, load_captions
from mmkit.captions import MANNERS, VARIANTS, caption, write_captions
from mmkit.facts import HELD_OUT, Group, Scene, change_fact, is_new_combination, sample_scene
from mmkit.scenes import draw_scene
from mmkit.vocabulary import CATEGORIES, GROUNDS, LOOKALIKES, RELATIONS, TIMES

# every word of the vocabulary → (category, whether it is a plural)
WORDS = {}
for category in CATEGORIES.values():
    WORDS |= {word: (category.name, True) for word in (category.plural, category.synonym_plural)}
    WORDS |= {word: (category.name, False) for word in (category.singular, category.synonym)}
    if category.singular == category.plural:
        WORDS[category.singular] = (category.name, None)
_NOUNS = "|".join(sorted(map(re.escape, WORDS), key=len, reverse=True))
MENTION = re.compile(rf"\b(an?|two|three|four) (?:(small|large) )?({_NOUNS})\b", re.IGNORECASE)
COUNTS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}


def mentions(caption):
    """(count, size or None, category) of every group of things that a caption names."""
    found = []
    for number, size, noun in MENTION.findall(caption):
        category, plural = WORDS[noun.lower()]
        count = COUNTS[number.lower()]
        assert plural in (None, count > 1), caption
        found.append((count, size or None, category))
    return found


# --- words ---


def test_no_word_names_two_categories():
    words = [
        (word, c.name) for c in CATEGORIES.values() for word in {c.singular, c.plural, c.synonym, c.synonym_plural}
    ]
    assert len({word for word, _ in words}) == len(words)
    assert all(c.synonym != c.singular for c in CATEGORIES.values())


def test_an_image_has_five_captions_and_no_two_are_equal(dataset):
    for image in range(len(dataset)):
        captions = dataset.captions_of(image)
        assert len(captions) == len(set(captions)) == 5
    for scene, rng in sampled(3000):
        assert len(set(write_captions(scene, rng))) == 5


def test_captions_are_well_formed():
    for scene, rng in sampled(2000):
        for text in write_captions(scene, rng):
            assert re.fullmatch(r"[A-Z][a-z ,-]+[a-z]\.", text), text
            assert "  " not in text and " ," not in text, text
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text, re.IGNORECASE), text


def test_captions_name_the_right_things_in_the_right_numbers():
    for scene, rng in sampled(2000):
        facts = {group.category: (group.count, group.size) for group in scene.groups}
        for text in write_captions(scene, rng):
            named = mentions(text)
            assert sorted(category for *_, category in named) == sorted(facts), text
            for count, size, category in named:
                assert count == facts[category][0], text
                assert size in (None, facts[category][1]), text


def test_captions_tell_the_true_ground_and_time():
    told_time = 0
    for scene, rng in sampled(1000):
        first, _, third, fourth, _ = captions = write_captions(scene, rng)
        for ground, (place, other_place, surroundings) in GROUNDS.items():
            assert (place in first) == (other_place in fourth) == (ground == scene.ground), captions
            assert ground != scene.ground or surroundings in third, captions
        for time, (moment, light) in TIMES.items():
            assert (moment in first) == (f" {light} " in third) == (time == scene.time), captions
            told_time += moment in first
    assert told_time > 300


def test_captions_tell_an_arrangement_that_the_boxes_have():
    told = {"wording": 0, "spot": 0}
    for scene, rng in sampled(1000):
        _, boxes = draw_scene(scene, rng)
        if scene.relation is None:
            continue
        place = dict(zip([group.category for group in scene.groups], boxes_of(scene, boxes), strict=True))
        _, arrangement, _, _, note = write_captions(scene, rng)
        wording = re.search("to the left of|to the right of|above|below", arrangement)[0]
        (*_, subject), (*_, thing) = mentions(arrangement)
        assert stands(wording.removeprefix("to the "), place[subject], place[thing]), arrangement
        spots = re.findall(r"on the left\b|on the right\b|at the top|at the bottom", note)
        (*_, subject), (*_, thing) = mentions(note)
        directions = {"on the left": "left of", "on the right": "right of", "at the top": "above"}
        assert stands(directions.get(spots[0], "below"), place[subject], place[thing]), note
        assert len(spots) == 2 and spots[0] != spots[1], note
        told = {"wording": told["wording"] + 1, "spot": told["spot"] + 1}
    assert min(told.values()) > 500


def test_captions_of_a_scene_change_with_its_facts():
    one = Scene("grass", "day", (Group("dog", 2, "medium"),), None)
    for other in (replace(one, ground="snow"), replace(one, groups=(Group("dog", 3, "medium"),))):
        told = [write_captions(scene, np.random.default_rng(0)) for scene in (one, other)]
        assert told[0][0] != told[1][0]


# --- what a caption says, read back from its words ---------------------------------------------


def said(text):
    """What a caption claims, read from its words alone: {kind of fact: claim}; kinds it does not tell are absent."""
    text = text.lower()
    claims = {"groups": {category: (count, size) for count, size, category in mentions(text)}}
    for ground, phrases in GROUNDS.items():
        if any(re.search(rf"\b{re.escape(phrase)}\b", text) for phrase in phrases):
            claims["ground"] = ground
    for time, (moment, light) in TIMES.items():
        if moment in text or re.search(rf"^a {light} ", text):
            claims["time"] = time
    wording = re.search(r"to the left of|to the right of|above|below", text)
    spots = re.findall(r"on the left\b|on the right\b|at the top|at the bottom", text)
    if wording or spots:
        (*_, subject), (*_, thing) = mentions(text)
        by_spot = {
            "on the left": "left of",
            "on the right": "right of",
            "at the top": "above",
            "at the bottom": "below",
        }
        relation = wording[0].removeprefix("to the ") if wording else by_spot[spots[0]]
        if relation in ("right of", "below"):  # told from the other side
            subject, thing, relation = thing, subject, RELATIONS[relation][1]
        claims["relation"] = (subject, relation, thing)
    return claims


def is_true(claims, scene):
    """Whether all that a caption claims holds in the scene."""
    facts = {group.category: (group.count, group.size) for group in scene.groups}
    for category, (count, size) in claims["groups"].items():
        if category not in facts or count != facts[category][0] or size not in (None, facts[category][1]):
            return False
    if claims.get("ground", scene.ground) != scene.ground or claims.get("time", scene.time) != scene.time:
        return False
    if "relation" in claims:
        first, relation, second = (scene.groups[0].category, scene.relation, scene.groups[-1].category)
        if relation in ("right of", "below"):
            first, relation, second = second, RELATIONS[relation][1], first
        return claims["relation"] == (first, relation, second)
    return True


def test_every_wording_of_every_manner_is_true():
    for scene, _ in sampled(600):
        for manner in range(len(MANNERS)):
            for variant in range(VARIANTS):
                text = caption(scene, manner, variant)
                assert is_true(said(text), scene), text


def test_the_reader_of_captions_tells_falsehoods():
    scene = Scene("grass", "day", (Group("dog", 1, "large"), Group("cat", 2, "medium")), "left of")
    for text in ("A dog and two cats on the beach.", "Two cats to the left of a dog.", "A small dog above two cats."):
        assert not is_true(said(text), scene), text
    for text in ("A puppy and two kittens in a green meadow.", "Two cats to the right of a large dog."):
        assert is_true(said(text), scene), text


# --- diagnostic negatives --------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return load_captions(draw_scenes(tmp_path_factory.mktemp("diagnostic") / "scenes", 400, seed=5))


def one_fact_apart(fact, true, false):
    """Whether two readings differ in that fact and in nothing else."""
    same_place = true.get("ground") == false.get("ground") and true.get("time") == false.get("time")
    groups, others = true["groups"], false["groups"]
    relation, other = true.get("relation"), false.get("relation")
    match fact:
        case "object":
            gone, come = groups.keys() - others.keys(), others.keys() - groups.keys()
            if len(gone) != 1 or len(come) != 1:
                return False
            (gone,), (come,) = gone, come
            kept = {name: told for name, told in groups.items() if name != gone}
            renamed = relation and tuple(come if word == gone else word for word in relation)
            return same_place and others == kept | {come: groups[gone]} and renamed == other
        case "count":
            changed = [name for name in groups if others.get(name) != groups[name]]
            sizes = [told[1] for told in [*groups.values(), *others.values()]]
            return (
                same_place
                and groups.keys() == others.keys()
                and len(changed) == 1
                and not any(sizes)
                and relation == other
            )
        case "size":
            changed = [name for name in groups if others.get(name) != groups[name]]
            counts = {name: told[0] for name, told in groups.items()} == {
                name: told[0] for name, told in others.items()
            }
            return same_place and counts and len(changed) == 1 and relation == other
        case "ground" | "time":
            rest = "time" if fact == "ground" else "ground"
            return (
                groups == others
                and relation == other
                and true.get(rest) == false.get(rest)
                and true[fact] != false[fact]
            )
        case _:
            return same_place and groups == others and relation[::2] == other[::-2] and relation[1] == other[1]


@pytest.mark.parametrize("fact", FACTS)
def test_a_diagnostic_negative_is_false_of_its_picture_and_differs_in_one_fact(drawn, fact):
    negatives = drawn.diagnostic_negatives(fact)
    assert len(negatives.texts) == len(negatives.images) == len(negatives.captions) > 150
    for image, position, text in zip(negatives.images, negatives.captions, negatives.texts, strict=True):
        true, scene = drawn.captions[position], drawn.scenes[image]
        assert drawn.caption_image[position] == image
        assert is_true(said(true), scene), true
        assert not is_true(said(text), scene), (true, text)
        assert one_fact_apart(fact, said(true), said(text)), (true, text)
        assert re.fullmatch(r"[A-Z][a-z ,-]+[a-z]\.", text) and not re.search(r"\ba [aeiou]|\ban [^aeiou]", text, re.I)


def test_swapped_roles_keep_every_word(drawn):
    negatives = drawn.diagnostic_negatives("roles")
    for position, text in zip(negatives.captions, negatives.texts, strict=True):
        assert sorted(re.findall(r"[a-z]+", text.lower())) == sorted(
            re.findall(r"[a-z]+", drawn.captions[position].lower())
        )


def test_the_relation_becomes_its_converse_which_the_boxes_contradict(drawn):
    for scene, rng in sampled(300):
        _, boxes = draw_scene(scene, rng)
        if changed := change_fact(scene, "relation", rng):
            assert not stands(changed.relation, *boxes_of(scene, boxes))


def test_no_object_becomes_one_that_its_glyph_shows():
    known = 0
    for scene, rng in sampled(3000):
        before = {group.category for group in scene.groups}
        (come,) = {group.category for group in change_fact(scene, "object", rng).groups} - before
        assert not any(come in alike and alike & before for alike in LOOKALIKES)
        known += any(alike & before for alike in LOOKALIKES)
    assert known > 300
    assert all(alike <= set(CATEGORIES) and len(alike) > 1 for alike in LOOKALIKES)


def test_a_fact_that_the_scene_lacks_cannot_be_changed():
    alone = Scene("table", None, (Group("cup", 2, "medium"),), None)
    rng = np.random.default_rng(0)
    assert {fact for fact in FACTS if change_fact(alone, fact, rng) is None} == {"time", "size", "relation", "roles"}


def test_diagnostic_negatives_follow_the_seed_and_not_the_selection(drawn):
    one, other = drawn.diagnostic_negatives("object", seed=1), drawn.diagnostic_negatives("object", seed=2)
    assert one.texts == drawn.diagnostic_negatives("object", seed=1).texts != other.texts
    part = drawn.select([30, 7]).diagnostic_negatives("object", seed=1)
    assert part.texts == (one.texts[30], one.texts[7])


def test_diagnostic_negatives_of_photos_or_of_no_known_fact_are_refused(drawn):
    with pytest.raises(MmkitError, match="photos carry none"):
        replace(drawn, scenes=()).diagnostic_negatives("object")
    with pytest.raises(MmkitError, match="Valid names: object, count"):
        drawn.diagnostic_negatives("colour")


# --- new combinations ------------------------------------------------------------------------


def test_every_category_and_every_ground_has_combinations_that_are_held_out():
    assert set(HELD_OUT) == set(CATEGORIES) and set(HELD_OUT.values()) == set(GROUNDS)
    held = list(HELD_OUT.values())
    assert {held.count(ground) for ground in GROUNDS} == {len(CATEGORIES) // len(GROUNDS)}


def test_held_out_combinations_are_in_the_new_part_only(drawn):
    splits = drawn.splits(0.1, 0.2)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 280, "val": 40, "test": 80, "new": 40}
    for name, rows in splits.items():
        assert all(is_new_combination(drawn.scenes[row]) == (name == "new") for row in rows)


def test_new_combinations_are_of_known_objects_and_grounds(drawn):
    seen = [drawn.scenes[row] for row in drawn.splits(0.1, 0.2)["train"]]
    new = [drawn.scenes[row] for row in drawn.splits(0.1, 0.2)["new"]]
    assert {scene.ground for scene in new} <= {scene.ground for scene in seen}
    categories = [{group.category for scene in part for group in scene.groups} for part in (seen, new)]
    assert categories[1] <= categories[0]


def test_sampled_new_combinations_use_the_whole_vocabulary():
    new = [sample_scene(np.random.default_rng([3, i]), new_combination=True) for i in range(2000)]
    pairs = {(g.category, s.ground) for s in new for g in s.groups if HELD_OUT[g.category] == s.ground}
    assert pairs == set(HELD_OUT.items())
