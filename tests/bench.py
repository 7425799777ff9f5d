"""Measures the package against plain baselines, side by side: python tests/bench.py [--only PART] [--out FILE]

A ratio above 1 means that the package is better. The measurements are in contests.py.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from contests import Contest, contests, seconds


@dataclass(frozen=True)
class Entry:
    """Medians over the rounds; `ratio` is the median of the rounds' ratios, above 1 where ours is better."""

    name: str
    ratio: float
    ours: float
    baseline: float
    unit: str
    what: str


def measure(contest: Contest, rounds: int) -> Entry:
    """Alternate, so that what else the machine does falls on both. The check that both agree has warmed them up."""
    if contest.unit == "KiB":  # memory, measured when the contest was made
        ours, baseline = contest.ours(), contest.baseline()
        return Entry(contest.name, round(baseline / ours, 2), ours, baseline, contest.unit, contest.what)
    pairs = []
    for number in range(1, rounds + 1):
        print(f"{contest.name}: round {number} of {rounds}", file=sys.stderr, flush=True)
        first = seconds(contest.ours) / contest.ours_amount
        pairs.append((first, seconds(contest.baseline) / contest.baseline_amount))
    ours, baseline = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(slow / fast for fast, slow in pairs)
    if contest.unit != "s":
        ours, baseline = 1 / ours, 1 / baseline
    ours, baseline = (float(f"{value:.4g}") for value in (ours, baseline))
    what = f"{contest.what}; torch threads: {torch.get_num_threads()}"
    return Entry(contest.name, round(ratio, 2), ours, baseline, contest.unit, what)


def write(path: Path, entries: list[Entry]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps([asdict(entry) for entry in entries], indent=1, ensure_ascii=False), encoding="utf-8")
    beside.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"))
    # threads that wait for each other make a busy machine's figures a lottery
    parser.add_argument("--threads", type=int, default=1, help="of torch, on both sides (default: 1)")
    parser.add_argument("--only", default="", metavar="PART", help="names that contain PART")
    parser.add_argument("--rounds", type=int, default=3, help="of which medians are taken (default: 3)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start, entries = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        for contest in contests(Path(folder), arguments.only):
            entries.append(measure(contest, arguments.rounds))
    write(arguments.out, entries)
    print(f"\n{'':<28} {'ratio':>7} {'ours':>9} {'baseline':>9}")
    for entry in entries:
        print(f"{entry.name:<28} {entry.ratio:>6.2f}× {entry.ours:>9.4g} {entry.baseline:>9.4g} {entry.unit}")
    for entry in entries:
        print(f"\n{entry.name}: {entry.what}.")
    print(f"\n{time.perf_counter() - start:.0f} s; written to {arguments.out}")


if __name__ == "__main__":
    main()
