"""The facts of a drawn scene, the combinations kept from training, and scenes with exactly one fact changed."""

from dataclasses import dataclass, replace

import numpy as np

from .errors import MmkitError
from .vocabulary import CATEGORIES, GROUNDS, LOOKALIKES, OUTDOOR, RELATIONS, TIMES


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


# Every category is kept from one ground and every ground lacks eight of 64 categories: 64 of 512 pairs.
HELD_OUT: dict[str, str] = {
    category: list(GROUNDS)[(3 * index + index // 8) % len(GROUNDS)] for index, category in enumerate(CATEGORIES)
}


def is_new_combination(scene: Scene) -> bool:
    """Whether an object of the scene stands on the ground that is kept from it in training."""
    return any(HELD_OUT[group.category] == scene.ground for group in scene.groups)


def _any_scene(rng: np.random.Generator) -> Scene:
    ground = str(rng.choice(list(GROUNDS)))
    time = str(rng.choice(list(TIMES))) if ground in OUTDOOR else None
    names = [str(name) for name in rng.choice(list(CATEGORIES), size=2, replace=False)]
    if rng.random() < 0.2:
        counts, names, relation = [int(rng.integers(1, 5))], names[:1], None
    else:
        pairs = [(1, 1), (1, 1), (1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (2, 2)]
        counts, relation = list(pairs[rng.integers(len(pairs))]), str(rng.choice(list(RELATIONS)))
    sizes = [str(rng.choice(["small", "medium", "large"])) if n == 1 else "medium" for n in counts]
    groups = tuple(Group(name, n, size) for name, n, size in zip(names, counts, sizes, strict=True))
    return Scene(ground, time, groups, relation)


def sample_scene(rng: np.random.Generator, new_combination: bool = False) -> Scene:
    """Draw the facts of one scene: one to four objects in all, two groups in four scenes of five.

    Only with `new_combination` does an object stand on the ground in `HELD_OUT`, and then at least one does.
    """
    while is_new_combination(scene := _any_scene(rng)) != new_combination:
        pass
    return scene


# The kinds of fact that a diagnostic negative changes, each alone.
FACTS = ("object", "count", "ground", "time", "size", "relation", "roles")


def change_fact(scene: Scene, fact: str, rng: np.random.Generator) -> Scene | None:
    """The scene with exactly one fact changed, so that what it says is false of the original picture.

    None where the scene has no such fact: no relation or roles in a single group, no time indoors, no size
    that a caption would tell. An object never becomes one that its glyph also shows (`LOOKALIKES`), a
    relation becomes its converse (the only one that is surely false), a ground stays indoors or outdoors.
    """
    if fact not in FACTS:
        raise MmkitError(f"No fact {fact!r}. Valid names: {', '.join(FACTS)}")

    def pick(values: list[str]) -> str:
        return values[rng.integers(len(values))]

    def with_group(index: int, **changes: object) -> Scene:
        groups = list(scene.groups)
        groups[index] = replace(groups[index], **changes)  # type: ignore[arg-type]
        return replace(scene, groups=tuple(groups))

    if fact in ("relation", "roles"):
        if scene.relation is None:
            return None
        if fact == "roles":
            return replace(scene, groups=scene.groups[::-1])
        return replace(scene, relation=RELATIONS[scene.relation][1])
    if fact == "time":
        return replace(scene, time=pick([time for time in TIMES if time != scene.time])) if scene.time else None
    if fact == "ground":
        alike = [ground for ground in GROUNDS if (ground in OUTDOOR) == (scene.ground in OUTDOOR)]
        return replace(scene, ground=pick([ground for ground in alike if ground != scene.ground]))
    if fact == "size":
        told = [index for index, group in enumerate(scene.groups) if group.size != "medium"]
        if not told:
            return None
        index = told[rng.integers(len(told))]
        return with_group(index, size="small" if scene.groups[index].size == "large" else "large")
    index = int(rng.integers(len(scene.groups)))
    if fact == "count":
        return with_group(index, count=int(rng.choice([n for n in range(1, 5) if n != scene.groups[index].count])))
    shown = {group.category for group in scene.groups}
    shown = shown.union(*(alike for alike in LOOKALIKES if alike & shown))
    return with_group(index, category=pick([name for name in CATEGORIES if name not in shown]))
