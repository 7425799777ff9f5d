"""Figures of several seeds, read from the JSON that `make results` wrote: means, paired differences, tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pandas as pd
from scipy import stats

from .evaluation import CUTS, DIRECTIONS, NEGATIVES, Interval
from .profiles import CHECKOUT
from .scenes import FACTS
from .support import MissingFile, MmkitError

_RECALLS = {f"{way}.r{k}": f"{way.replace('_to_', '→')} R@{k}" for way in DIRECTIONS for k in CUTS}
_PERCENT = {f"accuracy.{kind}": f"accuracy, {kind}" for kind in NEGATIVES} | _RECALLS
_PERCENT |= {f"roc_auc.{kind}": f"ROC-AUC, {kind}" for kind in NEGATIVES}
_PERCENT |= {f"{pool}.{name}": f"{pool}: {label}" for pool in ("known", "new") for name, label in _RECALLS.items()}
_PERCENT |= {f"diagnostic.{fact}": f"{fact} changed" for fact in FACTS}
# Figure → its label, and the factor and the decimals that it is shown with; fractions are shown in percent
FIGURES = {name: (f"{label}, %", 100, 1) for name, label in _PERCENT.items()}
FIGURES |= {"rsum": ("rsum", 1, 0), "training_time": ("training time, ratio", 1, 1)}


class Difference(NamedTuple):
    """The mean difference of a figure to a reference's over `seeds` pairs of equal seeds, with its 95 % interval."""

    mean: float
    interval: Interval
    seeds: int

    @property
    def verdict(self) -> str:
        """Whether the interval leaves out zero, and on which side of it the figure lies."""
        side = "higher," if self.interval.low > 0 else "lower," if self.interval.high < 0 else "not"
        return f"{side} beyond the interval"


@dataclass(frozen=True)
class Run:
    """One training: seconds of processor time (with a GPU, of wall time), `FIGURES`, and the git commit of its code."""

    variant: str
    seed: int
    seconds: float
    figures: dict[str, float]
    commit: str = ""


@dataclass(frozen=True)
class Results:
    """What an experiment measured under its `conditions`: the settings of its `variants`, the `reference` of training
    times, the `columns` of its table. The split is the same in all runs: deviations are of the training's seed."""

    name: str
    reference: str
    columns: tuple[str, ...]
    conditions: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    runs: tuple[Run, ...] = ()

    def values(self, variant: str, figure: str) -> pd.Series:
        """The figure of each run of a variant, by seed; "training_time" is its ratio to the reference's same seed."""
        runs = [run for run in self.runs if run.variant == variant]
        values = {run.seed: run.figures[figure] for run in runs if figure in run.figures}
        if figure == "training_time":
            times = {run.seed: run.seconds for run in self.runs if run.variant == self.reference}
            values = {run.seed: run.seconds / times[run.seed] for run in runs if run.seed in times}
        if not values:
            there = f"Variants: {', '.join(self.variants)}; figures: {', '.join(FIGURES)}"
            raise MmkitError(f"{self.name}.json has no {figure!r} of {variant!r}. {there}. Remedy: make results")
        return pd.Series(values).sort_index()

    def mean(self, variant: str, figure: str) -> float:
        """The mean of the figure over a variant's seeds."""
        return float(self.values(variant, figure).mean())

    def difference(self, variant: str, reference: str, figure: str) -> Difference:
        """How far a variant's figure lies above that of `reference`, in pairs of one seed, with Student's interval:
        mean ± t(0.975, n − 1) · deviation / √n. Of many comparisons at once one in twenty lies beyond it by chance."""
        apart = (self.values(variant, figure) - self.values(reference, figure)).dropna()
        if len(apart) < 2:
            raise MmkitError(f"{self.name}: {variant!r} and {reference!r} share no two seeds. Remedy: make results")
        mean, half = float(apart.mean()), float(stats.t.ppf(0.975, len(apart) - 1) * apart.sem())
        return Difference(mean, Interval(mean - half, mean + half), len(apart))

    def cell(self, variant: str, figure: str) -> str:
        """Mean ± deviation as a table shows them, of one seed the figure alone; "–" before the first run."""
        if figure in FIGURES and variant in self.variants.keys() - {run.variant for run in self.runs}:
            return "–"
        values, (_, scale, decimals) = self.values(variant, figure), FIGURES[figure]
        return " ± ".join(f"{scale * shown:.{decimals}f}" for shown in [values.mean(), values.std()][: len(values)])

    def table(self, columns: Sequence[str] = (), variants: Sequence[str] = ()) -> pd.DataFrame:
        """A cell for each of the `variants` in each of the `columns` (names of `FIGURES`), as a notebook shows it."""
        columns, variants = columns or self.columns, variants or list(self.variants)
        rows = {variant: [self.cell(variant, figure) for figure in columns] for variant in variants}
        return pd.DataFrame.from_dict(rows, orient="index", columns=[FIGURES[figure][0] for figure in columns])


def read_results(path: Path) -> Results:
    """The results in a JSON file. One that is damaged is an error that names the file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Results)
    except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
        raise MmkitError(f"{path} holds no results ({error}). Remedy: git checkout, or make results") from None


def load_results(name: str) -> Results:
    """Committed results, such as "losses", found from the notebooks, the checkout's top, or by its installation."""
    folders = CHECKOUT / "notebooks" / "results", Path("notebooks", "results"), Path("results")
    files = {path.stem: path for folder in folders for path in sorted(folder.glob("*.json"))}
    if name not in files:
        raise MissingFile(f"No results {name!r} in notebooks/results, but {', '.join(files)}. Remedy: make results")
    return read_results(files[name])
