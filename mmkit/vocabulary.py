"""What drawn scenes are made of: COCO categories with their glyphs and words, grounds, times, relations."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Category:
    """A COCO category: its OpenMoji glyph, its words for one and for many, and a synonym's."""

    name: str
    glyph: str
    plural: str
    synonym: str
    synonym_plural: str
    singular: str


# COCO's name | glyph | plural | synonym | plural of the synonym | singular where it is not the name
# ("=" where a regular -s will do)
_TABLE = """
person|🧍|people|pedestrian|=
bicycle|🚲|=|bike|=
car|🚗|=|automobile|=
motorcycle|🏍|=|motorbike|=
airplane|✈|=|plane|=
bus|🚌|buses|coach|coaches
train|🚂|=|locomotive|=
truck|🚚|=|lorry|lorries
boat|⛵|=|sailboat|=
traffic light|🚦|=|traffic signal|=
stop sign|🛑|=|red stop sign|=
bird|🐦|=|little brown bird|=
cat|🐈|=|kitten|=
dog|🐕|=|puppy|puppies
horse|🐎|=|pony|ponies
sheep|🐑|sheep|lamb|=
cow|🐄|=|calf|calves
elephant|🐘|=|gray elephant|=
bear|🐻|=|brown bear|=
zebra|🦓|=|striped zebra|=
giraffe|🦒|=|tall giraffe|=
backpack|🎒|=|rucksack|=
umbrella|☂|=|purple parasol|=
handbag|👜|=|purse|=
tie|👔|=|necktie|=
suitcase|🧳|=|travel case|=
frisbee|🥏|=|flying disc|=
skis|🎿|pairs of skis|ski boot|=|pair of skis
sports ball|⚽|=|football|=
kite|🪁|=|pink kite|=
skateboard|🛹|=|board with wheels|boards with wheels
bottle|🍾|=|champagne bottle|=
wine glass|🍷|wine glasses|glass of wine|glasses of wine
cup|☕|=|steaming mug|=
fork|🍴|=|piece of cutlery|pieces of cutlery
knife|🔪|knives|blade|=
spoon|🥄|=|teaspoon|=
bowl|🥣|=|white dish|white dishes
banana|🍌|=|yellow banana|=
apple|🍎|=|red apple|=
sandwich|🥪|sandwiches|toasted sandwich|toasted sandwiches
orange|🍊|=|tangerine|=
broccoli|🥦|heads of broccoli|green vegetable|=
carrot|🥕|=|orange vegetable|=
hot dog|🌭|=|sausage in a bun|sausages in buns
pizza|🍕|=|slice of pizza|slices of pizza
donut|🍩|=|doughnut|=
cake|🎂|=|birthday cake|=
chair|🪑|=|wooden seat|=
couch|🛋|couches|blue sofa|=
potted plant|🪴|=|house plant|=
bed|🛏|=|single bed|=
toilet|🚽|=|lavatory|lavatories
tv|📺|=|television|=
laptop|💻|=|notebook computer|=
mouse|🖱|computer mice|computer mouse|computer mice
keyboard|⌨|=|computer keyboard|=
cell phone|📱|=|smartphone|=
book|📕|=|red book|=
clock|🕰|=|mantel clock|=
vase|🏺|=|ancient jar|=
scissors|✂|pairs of scissors|cutting tool|=|pair of scissors
teddy bear|🧸|=|stuffed toy|=
toothbrush|🪥|toothbrushes|blue brush|blue brushes
"""


def _category(row: str) -> Category:
    name, glyph, plural, synonym, synonym_plural, *singular = row.split("|")
    return Category(
        name=name,
        glyph=glyph,
        plural=name + "s" if plural == "=" else plural,
        synonym=synonym,
        synonym_plural=synonym + "s" if synonym_plural == "=" else synonym_plural,
        singular=singular[0] if singular else name,
    )


CATEGORIES: dict[str, Category] = {c.name: c for c in map(_category, _TABLE.split("\n")[1:-1])}

# A glyph that also shows another category, or a synonym that fits one: 🥣 holds a spoon, 🍴 is a fork and a knife
# ("a piece of cutlery"), 💻 has a keyboard. Naming one of them instead of another would not be false.
LOOKALIKES: tuple[frozenset[str], ...] = (
    frozenset({"fork", "knife", "spoon", "bowl"}),
    frozenset({"laptop", "keyboard"}),
    frozenset({"bear", "teddy bear"}),
    frozenset({"cup", "bowl"}),
    frozenset({"bottle", "wine glass"}),
    frozenset({"tv", "laptop"}),
)

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
TIMES: dict[str, tuple[str, str]] = {
    "day": ("in the daytime", "sunny"),
    "sunset": ("at sunset", "glowing"),
    "night": ("at night", "dark"),
}

# relation: (its wording, the converse relation, where its subject is)
RELATIONS: dict[str, tuple[str, str, str]] = {
    "left of": ("to the left of", "right of", "on the left"),
    "right of": ("to the right of", "left of", "on the right"),
    "above": ("above", "below", "at the top"),
    "below": ("below", "above", "at the bottom"),
}
NUMBERS = ("", "a", "two", "three", "four")
