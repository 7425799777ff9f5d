"""The embedded dataset: pictures drawn from known facts, with true captions and false ones. Without torch."""

from .captions import MANNERS, VARIANTS, caption, false_caption, write_captions
from .drawing import SCENES_VERSION, draw_scene, draw_scenes, sticker
from .facts import FACTS, HELD_OUT, Group, Scene, change_fact, is_new_combination, sample_scene
from .vocabulary import CATEGORIES, GROUNDS, LOOKALIKES, OUTDOOR, RELATIONS, TIMES

__all__ = [
    "CATEGORIES", "FACTS", "GROUNDS", "Group", "HELD_OUT", "LOOKALIKES", "MANNERS", "OUTDOOR", "RELATIONS",
    "SCENES_VERSION", "Scene", "TIMES", "VARIANTS", "caption", "change_fact", "draw_scene", "draw_scenes",
    "false_caption", "is_new_combination", "sample_scene", "sticker", "write_captions",
]  # fmt: skip
