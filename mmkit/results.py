"""Figures of several seeds, read from the JSON that `make results` wrote: means, paired differences, tables."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from scipy.stats import t as students_t

from .errors import MissingFile, MmkitError
from .facts import FACTS
from .metrics import CUTS, DIRECTIONS, Interval, Spread, mean_and_deviation
from .profiles import _CHECKOUT

FOLDER = Path("notebooks", "results")
_MARKERS = "<!-- results: written by make results -->", "<!-- end of results -->"
_MANY = 2  # seeds that a deviation needs


class _Shown(NamedTuple):
    label: str
    scale: float
    decimals: int


def _percent(label: str) -> _Shown:
    return _Shown(f"{label}, %", 100, 1)


# Figure → how it is shown. They are kept as fractions, rsum in percent, the training time as a ratio.
FIGURES: dict[str, _Shown] = {
    **{f"accuracy.{kind}": _percent(f"accuracy, {kind}") for kind in ("random", "hard")},
    **{f"roc_auc.{kind}": _percent(f"ROC-AUC, {kind}") for kind in ("random", "hard")},
    **{
        f"{prefix}{way}.r{k}": _percent(f"{where}{way.replace('_to_', '→')} R@{k}")
        for prefix, where, cuts in (("", "", CUTS), ("known.", "known: ", CUTS[:1]), ("new.", "new: ", CUTS[:1]))
        for way in DIRECTIONS
        for k in cuts
    },
    "rsum": _Shown("rsum", 1, 0),
    **{f"diagnostic.{fact}": _percent(f"{fact} changed") for fact in FACTS},
    "training_time": _Shown("training time, ratio", 1, 1),
}


class Difference(NamedTuple):
    """The mean difference of a figure to that of a reference over `seeds` pairs of equal seeds, and its 95 % interval,
    in the figure's unit."""

    mean: float
    interval: Interval
    seeds: int

    @property
    def verdict(self) -> str:
        """In words: whether the interval leaves out zero, and on which side of it the figure lies."""
        if self.interval.low <= 0 <= self.interval.high:
            return "not beyond the interval"
        return f"{'higher' if self.mean > 0 else 'lower'}, beyond the interval"


@dataclass(frozen=True)
class Run:
    """One training: its `figures` (see `FIGURES`), the `seconds` of processor time that it took (with a GPU, of wall
    time), and a digest of the `code` that ran."""

    variant: str
    seed: int
    code: str
    seconds: float
    figures: dict[str, float]


@dataclass(frozen=True)
class Results:
    """What an experiment found, and the conditions that it holds under.

    `variants` are the settings of each; `reference` is the variant that differences and training times refer to, and
    `compared` the figure whose differences its table shows. The split is the same in all runs: deviations and intervals
    are of the training's seed, and say nothing of other images (for those see `bootstrap`).
    """

    name: str
    question: str
    reference: str
    columns: tuple[str, ...]
    compared: str
    command: str
    conditions: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    runs: tuple[Run, ...] = ()

    def seeds(self, variant: str) -> tuple[int, ...]:
        """The seeds that a variant was trained with, from low to high."""
        if variant not in self.variants:
            raise MmkitError(f"{self.name} has no variant {variant!r}. Valid names: {', '.join(self.variants)}")
        return tuple(sorted(run.seed for run in self.runs if run.variant == variant))

    def values(self, variant: str, figure: str) -> tuple[float, ...]:
        """The figure of each run of a variant, by seed; "training_time" is its ratio to the reference's same seed."""
        return tuple(self._by_seed(variant, figure).values())

    def _by_seed(self, variant: str, figure: str) -> dict[int, float]:
        runs = {(run.variant, run.seed): run for run in self.runs}
        chosen = {seed: runs[variant, seed] for seed in self.seeds(variant)}
        if figure == "training_time":
            both = {seed: (run, runs.get((self.reference, seed))) for seed, run in chosen.items()}
            found = {seed: run.seconds / other.seconds for seed, (run, other) in both.items() if other}
        elif known := [run.figures for run in chosen.values() if figure not in run.figures]:
            names = ", ".join([*known[0], "training_time"])
            raise MmkitError(f"{self.name} has no figure {figure!r}. Valid names: {names}")
        else:
            found = {seed: run.figures[figure] for seed, run in chosen.items()}
        if not found:
            raise MmkitError(f"{self.name} has no runs of {variant!r} with {figure!r} yet. Remedy: {self.command}")
        return found

    def mean(self, variant: str, figure: str) -> float:
        """The mean of the figure over a variant's seeds."""
        return float(np.mean(self.values(variant, figure)))

    def spread(self, variant: str, figure: str) -> Spread:
        """Mean and sample deviation (n − 1) of the figure over a variant's seeds; at least two are needed."""
        return mean_and_deviation([{figure: value} for value in self.values(variant, figure)])[figure]

    def difference(self, variant: str, reference: str, figure: str) -> Difference:
        """How far a variant's figure lies above that of `reference`, in pairs of the same seed.

        The interval is Student's on the n paired differences, mean ± t(0.975, n − 1) · deviation / √n: it takes them to
        be about normal, and many comparisons at once will have one in twenty beyond it by chance.
        """
        by_seed = [self._by_seed(one, figure) for one in (variant, reference)]
        shared = sorted(by_seed[0].keys() & by_seed[1].keys())
        if len(shared) < _MANY:
            raise MmkitError(
                f"{self.name} has {len(shared)} seeds with both {variant!r} and {reference!r}; a paired difference "
                f"needs two. Remedy: {self.command} --seeds 5"
            )
        apart = np.array([by_seed[0][seed] - by_seed[1][seed] for seed in shared])
        mean, half = apart.mean(), students_t.ppf(0.975, len(apart) - 1) * apart.std(ddof=1) / len(apart) ** 0.5
        return Difference(float(mean), Interval(float(mean - half), float(mean + half)), len(apart))

    def table(self, columns: Sequence[str] = (), variants: Sequence[str] = ()) -> str:
        """A table in plain text: mean ± deviation of the `columns` (names of `FIGURES`) for each of the `variants`."""
        rows = self._rows(columns or self.columns, variants or tuple(self.variants))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "   ".join(cell.rjust(width) if at else cell.ljust(width) for at, (cell, width) in enumerate(pairs))
            for pairs in ([*zip(row, widths, strict=True)] for row in rows)
        ]
        return "\n".join(line.rstrip() for line in lines)

    def markdown(self) -> str:
        """The question, a table with the difference to the reference, and the conditions in a line."""
        head, *rows = self._rows(self.columns, tuple(self.variants))
        head = [*head, f"{FIGURES[self.compared].label} against {self.reference}, 95 % interval"]
        rows = [[*row, self._against_reference(row[0])] for row in rows]
        rule = ["---", *("---:" for _ in self.columns), "---"]
        lines = [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]
        return "\n".join([f"**{self.name}.** {self.question}", "", *lines, "", self._conditions_in_a_line()])

    def _rows(self, columns: Sequence[str], variants: Sequence[str]) -> list[list[str]]:
        if unknown := set(columns) - FIGURES.keys():
            raise MmkitError(f"No figure {', '.join(sorted(unknown))}. Valid names: {', '.join(FIGURES)}")
        head = ["", *(FIGURES[column].label for column in columns)]
        return [head, *([variant, *(self._cell(variant, column) for column in columns)] for variant in variants)]

    def _cell(self, variant: str, figure: str) -> str:
        if not self.seeds(variant):
            return "–"
        _, scale, decimals = FIGURES[figure]
        mean = f"{scale * self.mean(variant, figure):.{decimals}f}"
        if len(self.values(variant, figure)) < _MANY:
            return mean
        return f"{mean} ± {scale * self.spread(variant, figure).deviation:.{decimals}f}"

    def _against_reference(self, variant: str) -> str:
        if variant == self.reference or len({*self.seeds(variant)} & {*self.seeds(self.reference)}) < _MANY:
            return "–"
        found, (_, scale, decimals) = self.difference(variant, self.reference, self.compared), FIGURES[self.compared]
        mean, low, high = (f"{scale * x:+.{decimals}f}".replace("-", "−") for x in (found.mean, *found.interval))
        return f"{mean} ({low} to {high}): {found.verdict}"

    def _conditions_in_a_line(self) -> str:
        data, splits, counts = self.conditions["data"], self.conditions["splits"], sorted(self._seed_counts())
        drawn = "drawn scenes" if data["kind"] == "scenes" else "photos"
        parts = ", ".join(f"{name} {size['images']:,}" for name, size in splits["sizes"].items())
        seeds = "–".join(map(str, sorted({counts[0], counts[-1]}))) + (" seed" if counts[-1] == 1 else " seeds")
        encoders = " and ".join(self.conditions["features"][f"{kind}_encoder"][0] for kind in ("image", "text"))
        return (
            f"{seeds}; {data['images']:,} {drawn} ({parts}); {encoders}, frozen; negatives 1:1; "
            f"{self.conditions['machine']}."
        )

    def _seed_counts(self) -> list[int]:
        return [len(self.seeds(variant)) for variant in self.variants]


# --- files ---------------------------------------------------------------------------------------


def read_results(path: Path) -> Results:
    """The results in a JSON file. One that is damaged is an error that names the file."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Results)
        if found.reference not in found.variants or any(run.variant not in found.variants for run in found.runs):
            raise ValueError("its runs are not of its variants")
    except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
        raise MmkitError(
            f"{path} holds no results ({error}). Remedy: bring back the committed file, or delete it and make results"
        ) from None
    return found


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all; an earlier one is replaced in a single step."""
    beside = path.with_name(f"{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise MmkitError(
            f"{path} cannot be written ({error.strerror or error}). Remedy: free space, or name another with --out"
        ) from None


def write_results(path: Path, results: Results) -> None:
    """Write the JSON by `write_whole`."""
    text = json.dumps(asdict(results), indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(path, f"{text}\n")


def load_results(name: str) -> Results:
    """The committed results of an experiment, such as "losses".

    They are found from a notebook's working directory (`notebooks/`) and from the top of the checkout.
    """
    places = (FOLDER.relative_to("notebooks"), FOLDER, _CHECKOUT / FOLDER)
    for folder in places:
        if (path := folder / f"{name}.json").is_file():
            return read_results(path)
    there = sorted({path.stem for folder in places for path in folder.glob("*.json")})
    raise MissingFile(
        f"There are no results {name!r} in {FOLDER}; there are: {', '.join(there) or 'none'}. Remedy: make results"
    )


# --- README --------------------------------------------------------------------------------------


def results_section(folder: Path, names: Sequence[str]) -> str:
    """Markdown of those experiments, in this order, whose JSON is in `folder`."""
    paths = [folder / f"{name}.json" for name in names]
    return "\n\n".join(read_results(path).markdown() for path in paths if path.is_file())


def with_section(readme: str, section: str) -> str:
    """The text of README with `section` between the two comments that mark its place."""
    start, end = _MARKERS
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(readme)) != 1:
        raise MmkitError(f"README.md has no place for results. Remedy: one line {start!r}, and one {end!r} after it.")
    return pattern.sub(lambda _: f"{start}\n\n{section}\n\n{end}", readme)
