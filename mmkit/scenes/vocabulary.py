"""What drawn scenes are made of: COCO categories with their glyphs and words, grounds, times, relations."""

import re
from typing import NamedTuple


class Category(NamedTuple):
    """A COCO category: its OpenMoji glyph, its words for one and for many, and a synonym's."""

    name: str
    glyph: str
    plural: str
    synonym: str
    synonym_plural: str
    singular: str


# COCO's name, the glyph, a synonym
_TABLE = """
person 🧍 pedestrian, bicycle 🚲 bike, car 🚗 automobile, motorcycle 🏍 motorbike, airplane ✈ plane, bus 🚌 coach,
train 🚂 locomotive, truck 🚚 lorry, boat ⛵ sailboat, traffic light 🚦 traffic signal, stop sign 🛑 red stop sign,
bird 🐦 little brown bird, cat 🐈 kitten, dog 🐕 puppy, horse 🐎 pony, sheep 🐑 lamb, cow 🐄 calf,
elephant 🐘 gray elephant, bear 🐻 brown bear, zebra 🦓 striped zebra, giraffe 🦒 tall giraffe,
backpack 🎒 rucksack, umbrella ☂ purple parasol, handbag 👜 purse, tie 👔 necktie, suitcase 🧳 travel case,
frisbee 🥏 flying disc, skis 🎿 ski boot, sports ball ⚽ football, kite 🪁 pink kite,
skateboard 🛹 board with wheels, bottle 🍾 champagne bottle, wine glass 🍷 glass of wine, cup ☕ steaming mug,
fork 🍴 piece of cutlery, knife 🔪 blade, spoon 🥄 teaspoon, bowl 🥣 white dish, banana 🍌 yellow banana,
apple 🍎 red apple, sandwich 🥪 toasted sandwich, orange 🍊 tangerine, broccoli 🥦 green vegetable,
carrot 🥕 orange vegetable, hot dog 🌭 sausage in a bun, pizza 🍕 slice of pizza, donut 🍩 doughnut,
cake 🎂 birthday cake, chair 🪑 wooden seat, couch 🛋 blue sofa, potted plant 🪴 house plant, bed 🛏 single bed,
toilet 🚽 lavatory, tv 📺 television, laptop 💻 notebook computer, mouse 🖱 computer mouse,
keyboard ⌨ computer keyboard, cell phone 📱 smartphone, book 📕 red book, clock 🕰 mantel clock,
vase 🏺 ancient jar, scissors ✂ cutting tool, teddy bear 🧸 stuffed toy, toothbrush 🪥 blue brush,
"""
_SINGULARS = {"skis": "pair of skis", "scissors": "pair of scissors"}  # of the others it is the name
_PLURALS = {  # of the others it has a regular -s
    "person": "people", "bus": "buses", "coach": "coaches", "lorry": "lorries", "puppy": "puppies",
    "pony": "ponies", "sheep": "sheep", "calf": "calves", "skis": "pairs of skis",
    "board with wheels": "boards with wheels", "wine glass": "wine glasses",
    "glass of wine": "glasses of wine", "piece of cutlery": "pieces of cutlery", "knife": "knives",
    "white dish": "white dishes", "sandwich": "sandwiches", "toasted sandwich": "toasted sandwiches",
    "broccoli": "heads of broccoli", "sausage in a bun": "sausages in buns",
    "slice of pizza": "slices of pizza", "couch": "couches", "lavatory": "lavatories",
    "mouse": "computer mice", "computer mouse": "computer mice", "scissors": "pairs of scissors",
    "toothbrush": "toothbrushes", "blue brush": "blue brushes",
}  # fmt: skip


def _category(name: str, glyph: str, synonym: str) -> Category:
    plural, synonym_plural = (_PLURALS.get(word, f"{word}s") for word in (name, synonym))
    return Category(name, glyph, plural, synonym, synonym_plural, _SINGULARS.get(name, name))


CATEGORIES = {row[0]: _category(*row) for row in re.findall(r"([a-z][a-z ]*) (\S) ([a-z ]+),", _TABLE)}

# A glyph that also shows another category, or a synonym that fits one: 🥣 holds a spoon, 🍴 is a fork and a knife
# ("a piece of cutlery"), 💻 has a keyboard. Naming one of them instead of another would not be false.
LOOKALIKES: tuple[set[str], ...] = (
    {"fork", "knife", "spoon", "bowl"}, {"cup", "bowl"}, {"bottle", "wine glass"}, {"laptop", "keyboard"},
    {"laptop", "tv"}, {"bear", "teddy bear"},
)  # fmt: skip

# ground: (as a place "… on the grass", the same in other words, as a noun without its article)
GROUNDS: dict[str, tuple[str, str, str]] = {
    "grass": ("on the grass", "in a green meadow", "meadow"),
    "beach": ("on the beach", "on the sand by the sea", "sandy beach"),
    "snow": ("in the snow", "on snow-covered ground", "snowy field"),
    "street": ("on the street", "on a paved road", "city street"),
    "forest": ("in the forest", "in front of some trees", "clearing in the woods"),
    "table": ("on a wooden table", "on a brown table top", "wooden table"),
    "kitchen": ("on a tiled floor", "on kitchen tiles", "tiled kitchen floor"),
    "carpet": ("on a carpet", "on a red rug", "red carpet"),
}
OUTDOOR = ("grass", "beach", "snow", "street", "forest")

# time of day: (a phrase for the end of a sentence, an adjective)
TIMES = {"day": ("in the daytime", "sunny"), "sunset": ("at sunset", "glowing"), "night": ("at night", "dark")}

# relation: (its wording, the converse relation, where its subject is)
RELATIONS: dict[str, tuple[str, str, str]] = {
    "left of": ("to the left of", "right of", "on the left"),
    "right of": ("to the right of", "left of", "on the right"),
    "above": ("above", "below", "at the top"),
    "below": ("below", "above", "at the bottom"),
}
NUMBERS = ("", "a", "two", "three", "four")
