"""Draws the house, .github/house.png, from the imports of the package: python .github/house.py"""

import ast
import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

TOP = Path(__file__).parent.parent
# Rooms from the ground up; a row is a lesson or two.
ROWS = (
    ("support", "profiles"),
    ("scenes", "folders"),
    ("data", "preprocess", "encoders"),
    ("store", "features"),
    ("fusers", "baselines", "losses"),
    ("training", "evaluation", "diagnostics"),
    ("graphs", "regions", "lora"),
    ("checkpoints", "results"),
    ("plots", "__main__"),
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
        direct[room] = {
            name for name in names if name in rooms and name != room and (len(files) == 1 or name in ROWS[0])
        }

    def reached(room: str) -> set[str]:
        return direct[room].union(*(reached(other) for other in direct[room]))

    return {room: sorted(direct[room] - set().union(*(reached(o) for o in direct[room]))) for room in rooms}


def draw(arrows: dict[str, list[str]]) -> Figure:
    figure = Figure(figsize=(9, 8.2), layout="constrained")
    axis, place = figure.add_subplot(), {}
    for height, row in enumerate(ROWS):
        for at, room in enumerate(row):
            place[room] = (at + 0.5) * 12 / len(row) + (0.5 if height % 2 else -0.5), height * 1.3
    for room, others in arrows.items():
        for other in others:
            (x, y), (u, v) = place[room], place[other]
            look = {"arrowstyle": "->", "color": "#6B6B6B", "lw": 1, "alpha": 0.75, "connectionstyle": "arc3,rad=0.06"}
            side = (1.1 if u > x else -1.1) if v == y else 0  # of a room in the same row
            ends = ((u - side, v), (x + side, y)) if side else ((u, v + 0.36), (x, y - 0.36))
            axis.annotate("", *ends, arrowprops=look)
    for room, (x, y) in place.items():
        colour = "#D9E8F3" if room in ("plots", "__main__", "support", "profiles", "scenes", "folders") else "#FBE9C6"
        box = {"boxstyle": "round,pad=0.45", "facecolor": colour, "edgecolor": "#444444", "linewidth": 0.8}
        axis.text(x, y, f"{room}\n{WHAT[room]}", ha="center", va="center", fontsize=8.5, bbox=box, linespacing=1.35)
    axis.set(xlim=(-1, 13), ylim=(-0.7, (len(ROWS) - 1) * 1.3 + 0.7))
    axis.axis("off")
    return figure


if __name__ == "__main__":
    found = imports()
    # the arrows are kept in the picture, so that a test can tell whether it is of today
    FigureCanvasAgg(draw(found)).print_png(TOP / ".github" / "house.png", metadata={"Description": json.dumps(found)})
