"""The facts of a drawn scene, the combinations kept from training, and scenes with exactly one fact changed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..support import MmkitError
from .vocabulary import CATEGORIES, GROUNDS, LOOKALIKES, OUTDOOR, RELATIONS, TIMES

FACTS = ("object", "count", "ground", "time", "size", "relation", "roles")  # a diagnostic negative changes just one
# Every category is kept from one ground, and every ground lacks eight of 64 categories: 64 of 512 pairs.
HELD_OUT = {name: tuple(GROUNDS)[(3 * i + i // 8) % len(GROUNDS)] for i, name in enumerate(CATEGORIES)}


@dataclass(frozen=True)
class Group:
    """`count` objects of one COCO category; `size` is "small", "medium" or "large"."""

    category: str
    count: int
    size: str


@dataclass(frozen=True)
class Scene:
    """The facts of a picture: one group, or two of which the first stands in `relation` to the second."""

    ground: str
    time: str | None  # None indoors
    groups: tuple[Group, ...]
    relation: str | None


def is_new_combination(scene: Scene) -> bool:
    """Whether an object of the scene stands on the ground that is kept from it in training."""
    return any(HELD_OUT[group.category] == scene.ground for group in scene.groups)


def sample_scene(rng: np.random.Generator, new_combination: bool = False) -> Scene:
    """Draw a scene of one to four objects; just with `new_combination` one stands on its ground in `HELD_OUT`."""
    while True:
        ground = str(rng.choice(list(GROUNDS)))
        time = str(rng.choice(list(TIMES))) if ground in OUTDOOR else None
        names = [str(name) for name in rng.choice(list(CATEGORIES), size=2, replace=False)]
        if rng.random() < 0.2:
            counts, names, relation = [int(rng.integers(1, 5))], names[:1], None
        else:
            pairs = [(1, 1), (1, 1), (1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (2, 2)]
            counts, relation = list(pairs[rng.integers(len(pairs))]), str(rng.choice(list(RELATIONS)))
        sizes = [str(rng.choice(["small", "medium", "large"])) if count == 1 else "medium" for count in counts]
        scene = Scene(ground, time, tuple(map(Group, names, counts, sizes)), relation)
        if is_new_combination(scene) == new_combination:
            return scene


def change_fact(scene: Scene, fact: str, rng: np.random.Generator) -> Scene | None:
    """The scene with exactly one fact changed, so that what it says is false of the original picture.

    None where the scene has no such fact: no relation or roles in a single group, no time indoors, no size that a
    caption tells. A relation becomes its converse, the only one surely false; no ground moves indoors or out."""

    def pick(values: Sequence[Any]) -> Any:
        return values[rng.integers(len(values))]

    def with_group(index: int, **changes: Any) -> Scene:
        changed = replace(scene.groups[index], **changes)
        return replace(scene, groups=(*scene.groups[:index], changed, *scene.groups[index + 1 :]))

    match fact:
        case "roles":
            return replace(scene, groups=scene.groups[::-1]) if scene.relation else None
        case "relation":
            return replace(scene, relation=RELATIONS[scene.relation][1]) if scene.relation else None
        case "time":
            return replace(scene, time=pick([time for time in TIMES if time != scene.time])) if scene.time else None
        case "ground":
            alike = [ground for ground in GROUNDS if (ground in OUTDOOR) == (scene.ground in OUTDOOR)]
            return replace(scene, ground=pick([ground for ground in alike if ground != scene.ground]))
        case "size" if told := [index for index, group in enumerate(scene.groups) if group.size != "medium"]:
            index = pick(told)
            return with_group(index, size="small" if scene.groups[index].size == "large" else "large")
        case "size":
            return None
        case "count":
            index = pick(range(len(scene.groups)))
            return with_group(index, count=pick([n for n in range(1, 5) if n != scene.groups[index].count]))
        case "object":
            index, shown = pick(range(len(scene.groups))), {group.category for group in scene.groups}
            shown = shown.union(*(alike for alike in LOOKALIKES if alike & shown))
            return with_group(index, category=pick([name for name in CATEGORIES if name not in shown]))
    raise MmkitError(f"No fact {fact!r}. Valid names: {', '.join(FACTS)}")
