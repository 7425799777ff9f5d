"""Draws the house, .github/house.png, from the imports of the package: python .github/house.py"""

import ast
import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

TOP = Path(__file__).parent.parent
# Rooms from the ground up, each with its place from the left; an arrow of an import leads down, past all other rooms.
ROWS = (
    {"support": 3.0},
    {"scenes": 4.2, "folders": 6.8, "profiles": 9.8},
    {"data": 4.8, "preprocess": 7.8},
    {"store": 1.4, "encoders": 9.4},
    {"features": 6.0},
    {"fusers": 6.0},
    {"baselines": 1.0, "losses": 3.8},
    {"lora": 0.6, "training": 3.2, "evaluation": 6.4, "regions": 9.2, "graphs": 12.0},
    {"diagnostics": 1.2, "results": 5.4, "checkpoints": 9.8},
    {"plots": 4.6, "__main__": 9.8},
)
WHAT = {
    "support": "errors, progress", "profiles": "the one knob", "scenes": "draws the dataset", "folders": "reads yours",
    "data": "pictures, captions, splits", "preprocess": "pixels, tokens", "encoders": "frozen, by name",
    "store": "rows on disk", "features": "extracted once", "fusers": "the contract, MLP", "baselines": "towers, CCA",
    "losses": "contrastive, matching", "training": "the loop", "evaluation": "matching, ranks",
    "diagnostics": "one fact changed, leaks", "graphs": "GCN over a pool", "regions": "graph in a pair",
    "lora": "adapters", "checkpoints": "fusers by name, on disk", "results": "tables of seeds", "plots": "every figure",
    "__main__": "the same in a terminal",
}  # fmt: skip


def imports() -> dict[str, list[str]]:
    """Room → the rooms that it imports from, without what is reached through another anyway."""
    rooms, direct = [room for row in ROWS for room in row], {}
    for room in rooms:
        files = [TOP / "mmkit" / f"{room}.py"]
        files = files if files[0].is_file() else sorted((TOP / "mmkit" / room).glob("*.py"))
        nodes = [
            node for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)
        ]
        names = {(node.module or "").removeprefix("mmkit.").split(".")[0] for node in nodes}
        if len(files) > 1:  # within a sub-package only what is below it counts
            names &= {"support", "profiles"}
        direct[room] = (names & set(rooms)) - {room}

    def reached(room: str) -> set[str]:
        return direct[room].union(*(reached(other) for other in direct[room]))

    return {room: sorted(direct[room] - set().union(*(reached(o) for o in direct[room]))) for room in rooms}


def draw(arrows: dict[str, list[str]]) -> Figure:
    figure = Figure(figsize=(9, 8.2), layout="constrained")
    axis, boxes = figure.add_subplot(), {}
    for height, row in enumerate(ROWS):
        for room, x in row.items():
            core = room not in ("plots", "__main__", "support", "profiles", "scenes", "folders")
            box = {"boxstyle": "round,pad=0.45", "facecolor": "#FBE9C6" if core else "#D9E8F3", "edgecolor": "#444444"}
            says = {"ha": "center", "va": "center", "fontsize": 8.5, "linespacing": 1.35, "zorder": 3}
            boxes[room] = axis.text(x, height, f"{room}\n{WHAT[room]}", bbox=box, **says)
    for room, others in arrows.items():
        for other in others:
            ends = {"patchA": boxes[room].get_bbox_patch(), "patchB": boxes[other].get_bbox_patch()}
            look = {"arrowstyle": "->", "color": "#6B6B6B", "shrinkA": 1, "shrinkB": 2}
            axis.annotate("", boxes[other].get_position(), boxes[room].get_position(), arrowprops=look | ends)
    axis.set(xlim=(-0.8, 13.2), ylim=(-0.4, len(ROWS) - 0.6))
    axis.axis("off")
    return figure


if __name__ == "__main__":
    arrows = imports()
    # the arrows are kept in the picture, so that a test can tell whether it is of today
    FigureCanvasAgg(draw(arrows)).print_png(TOP / ".github" / "house.png", metadata={"Description": json.dumps(arrows)})
