"""The words of a drawn scene: five captions in the manner of five people, and false ones that differ in one fact."""

from collections.abc import Sequence

import numpy as np

from .facts import Group, Scene, change_fact
from .vocabulary import CATEGORIES, GROUNDS, NUMBERS, RELATIONS, TIMES

MANNERS = ("plain", "arrangement", "surroundings", "other words", "note")  # of five people
VARIANTS = 6  # at most so many wordings has a manner: two of its choices are of two and of three
# The manners that tell a fact in a scene of one group, and of two. A count is changed only where no size is told:
# "a large dog" → "three dogs" would take back the size as well.
_TOLD_BY: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "object": ((0, 1, 2, 3, 4), (0, 1, 2, 3, 4)),
    "count": ((0, 2, 3, 4), (0, 2, 3, 4)),
    "ground": ((0, 1, 2, 3, 4), (0, 2, 3)),
    "time": ((0, 2, 4), (0, 2, 4)),
    "size": ((1,), (1,)),
    "relation": ((), (1, 4)),
    "roles": ((), (1, 4)),
}


def _noun(group: Group, synonym: bool = False, sized: bool = False) -> str:
    """A group in words: "a dog", "two puppies", "a large dog"."""
    words = CATEGORIES[group.category]
    if group.count > 1:
        return f"{NUMBERS[group.count]} {words.synonym_plural if synonym else words.plural}"
    noun = words.synonym if synonym else words.singular
    if sized and group.size != "medium":
        noun = f"{group.size} {noun}"
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def caption(scene: Scene, manner: int, variant: int = 0) -> str:
    """The caption in `MANNERS[manner]`; `variant` 0 … `VARIANTS` - 1 chooses among its wordings."""
    place, other_place, surroundings = GROUNDS[scene.ground]
    moment, light = TIMES[scene.time] if scene.time else ("", "")
    wording, converse, spot = RELATIONS[scene.relation] if scene.relation else ("", "", "")
    first, last = scene.groups[0], scene.groups[-1]
    things = " and ".join(_noun(group) for group in scene.groups)
    match MANNERS[manner]:
        case "plain":
            words = [things, place, moment]
        case "arrangement" if scene.relation is None:
            opening = ("a picture of", "we see", "there is" if first.count == 1 else "there are")[variant % 3]
            words = [opening, _noun(first, sized=True), place]
        case "arrangement":
            if variant % 2:
                first, last, wording = last, first, RELATIONS[converse][0]
            words = [_noun(first, sized=True), wording, _noun(last, sized=True)]
        case "surroundings":
            words = ["a", light, surroundings, ("with", "showing")[variant % 2], things]
        case "other words":
            words = [" and ".join(_noun(group, synonym=True) for group in reversed(scene.groups)), other_place]
        case _:
            # the synonym stays with its object whichever comes first, so that swapped roles swap nothing else
            other_word = min(group.category for group in scene.groups) if variant % 3 == 0 else None
            nouns = [_noun(group, synonym=group.category == other_word) for group in scene.groups]
            places = [f" {spot}", f" {RELATIONS[converse][2]}"] if scene.relation else [f", {surroundings}"]
            notes = [noun + where for noun, where in zip(nouns, places, strict=True)]
            words = [", ".join([*notes, moment] if moment else notes)]
    text = " ".join(word for word in words if word)
    return text[0].upper() + text[1:] + "."


def write_captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Five captions in the manner of five people; each tells another part of the truth."""
    return [caption(scene, manner, int(rng.integers(VARIANTS))) for manner in range(len(MANNERS))]


def false_caption(scene: Scene, captions: Sequence[str], fact: str, rng: np.random.Generator) -> tuple[int, str] | None:
    """Which of a scene's `captions` is made false, and the text with that fact changed; None if it has no such fact."""
    if (changed := change_fact(scene, fact, rng)) is None:
        return None
    manners = _TOLD_BY[fact][len(scene.groups) - 1]
    manner = manners[rng.integers(len(manners))]
    wording = next(variant for variant in range(VARIANTS) if caption(scene, manner, variant) == captions[manner])
    return manner, caption(changed, manner, wording)
