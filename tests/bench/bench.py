"""Measures the package against plain baselines, side by side: python tests/bench/bench.py [--only PART] [--out FILE]

A ratio above 1 means that the package is better. The measurements are in contests.py.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from contests import Contest, contests
from mmkit.support import write_whole


def seconds(contest: Contest, ours: bool) -> float:
    """For one unit of the work."""
    start = time.perf_counter()
    (contest.ours if ours else contest.baseline)()
    return (time.perf_counter() - start) / (contest.ours_amount if ours else contest.baseline_amount)


def measure(contest: Contest, rounds: int) -> dict[str, object]:
    """Alternate, so that what else the machine does falls on both. The check that both agree has warmed them up.

    Medians over the rounds; `ratio` is the median of the rounds' ratios, above 1 where ours is better.
    """
    pairs = []
    for number in range(1, rounds + 1):
        print(f"{contest.name}: round {number} of {rounds}", file=sys.stderr, flush=True)
        pairs.append((seconds(contest, True), seconds(contest, False)))
    ours, baseline = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(slow / fast for fast, slow in pairs)
    if contest.unit != "s":
        ours, baseline = 1 / ours, 1 / baseline
    figures = {"ratio": round(ratio, 2), "ours": float(f"{ours:.4g}"), "baseline": float(f"{baseline:.4g}")}
    return {"name": contest.name} | figures | {"unit": contest.unit, "what": contest.what}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"))
    # threads that wait for each other make a busy machine's figures a lottery
    parser.add_argument("--threads", type=int, default=1, help="of torch, on both sides (default: 1)")
    parser.add_argument("--only", default="", metavar="PART", help="names that contain PART")
    parser.add_argument("--rounds", type=int, default=3, help="of which medians are taken (default: 3)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(contest, arguments.rounds) for contest in contests(Path(folder), arguments.only)]
    write_whole(arguments.out, json.dumps({"threads": arguments.threads, "rows": rows}, indent=1, ensure_ascii=False))
    print(f"\n{'':<28} {'ratio':>7} {'ours':>9} {'baseline':>9}")
    for row in rows:
        print(f"{row['name']:<28} {row['ratio']:>6.2f}× {row['ours']:>9.4g} {row['baseline']:>9.4g} {row['unit']}")
    for row in rows:
        print(f"\n{row['name']}: {row['what']}.")
    print(f"\n{time.perf_counter() - start:.0f} s; written to {arguments.out}")


if __name__ == "__main__":
    main()
