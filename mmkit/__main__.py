"""The steps of the course for a terminal or a cluster job: `python -m mmkit COMMAND --help`."""

from __future__ import annotations  # a command imports what it needs: checking a folder needs no torch

import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import mmkit
from mmkit.course import run_course
from mmkit.data import SPLITS
from mmkit.facts import FACTS

_PATIENCE = 10  # seconds in which a launcher ends the other processes after the main one


def _settings(arguments: argparse.Namespace) -> mmkit.Profile:
    """The profile that the options name; a COCO folder without a profile means the profile "photos"."""
    name, root = arguments.profile or os.environ.get("MMKIT_PROFILE"), arguments.coco_root
    changes = _changes(getattr(arguments, "set", ())) | ({"coco_root": root} if root else {})
    return mmkit.profile(name or ("photos" if root else None), skip_missing=arguments.skip_missing, **changes)


def _changes(pairs: Sequence[str]) -> dict[str, object]:
    """`NAME=VALUE` as changes of the profile, each value of its setting's kind."""
    known = {f.name: type(f.default) for f in fields(mmkit.Profile) if isinstance(f.default, bool | int | float | str)}
    changes: dict[str, object] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name not in known:
            raise mmkit.MmkitError(f"--set {pair}: no such setting. Valid settings: {', '.join(known)}")
        try:
            kind = known[name]
            changes[name] = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            wanted = "true or false" if kind is bool else {int: "a whole number", float: "a number"}[kind]
            raise mmkit.MmkitError(f"--set {pair}: {name} is {wanted}.") from None
    return changes


def _load(profile: mmkit.Profile, **optional: bool) -> tuple[mmkit.CaptionDataset, mmkit.Encoders, mmkit.FeatureStore]:
    dataset = mmkit.load_dataset(profile)
    if faults := Counter(fault.kind for fault in dataset.faults):
        counted = ", ".join(f"{count:,} {kind}" for kind, count in faults.items())
        print(f"records with faults: {counted}; see: python -m mmkit check", file=sys.stderr)
    encoders = mmkit.encoders_of(profile)
    return dataset, encoders, mmkit.extract_features(dataset, encoders, profile.cache, profile.precision, **optional)


def _split(
    profile: mmkit.Profile, dataset: mmkit.CaptionDataset, store: mmkit.FeatureStore, name: str
) -> mmkit.PairedFeatures:
    if name == "all":
        return store.select()
    rows = dataset.splits(profile.val_fraction, profile.test_fraction, profile.split_seed)[name]
    if len(rows) < 2:
        raise mmkit.MmkitError(f"The split {name} has {len(rows)} images. Remedy: --split all, or a larger folder.")
    return store.select(rows)


def _needs(fuser: mmkit.PairFuser | type[mmkit.PairFuser]) -> dict[str, bool]:
    return {"grids": True, "tokens": True} if fuser.takes_parts else {}


def _weights(encoders: mmkit.Encoders) -> dict[str, str]:
    return {encoder.name: encoder.digest() for encoder in (encoders.image, encoders.text)}


def _digest(dataset: mmkit.CaptionDataset, parts: dict[str, mmkit.PairedFeatures]) -> str:
    """Of the dataset, and of which images are in each part."""
    rows = [dataset.fingerprint(), *(part.image_ids.tolist() for part in parts.values())]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _print_report(report: dict) -> None:
    def between(part: str, name: str) -> str:
        if name not in report["intervals"][part]:
            return ""
        interval, percent = report["intervals"][part][name], name == "rsum"
        return f" ({interval['low']:.{0 if percent else 3}f} to {interval['high']:.{0 if percent else 3}f})"

    sizes = report["sizes"]
    print(f"{sizes['images']:,} images, {sizes['captions']:,} captions; 95 % intervals over images in brackets")
    for kind, row in report["matching"].items():
        figures = (f"{name} {value:.3f}{between(kind, name)}" for name, value in row.items())
        print(f"matching, {kind} negatives 1:1   " + "   ".join(figures))
    for direction, row in report["retrieval"].items():
        recalls = "   ".join(f"R@{k} {row[f'r{k}']:.3f}{between('retrieval', f'{direction}.r{k}')}" for k in (1, 5, 10))
        print(f"{direction:<15} {recalls}   median rank {row['median_rank']:.0f}")
    print(f"rsum {report['rsum']:.1f}{between('retrieval', 'rsum')}")
    if folds := report.get("folds"):
        for way in report["retrieval"]:
            recalls = "   ".join(f"R@{k} {folds[way][f'r{k}']:.3f}" for k in (1, 5, 10))
            print(f"mean of {folds['count']} folds, {way:<15} {recalls}")
        print(f"mean of {folds['count']} folds, rsum {folds['rsum']:.1f}")
    for name, row in report.get("eccv", {}).items():
        print(f"{name:<20}" + "   ".join(f"{way} {value:.3f}" for way, value in row.items()))
    for fact, row in report.get("diagnostic", {}).items():
        print(f"one changed fact, {fact:<9} {row['accuracy']:.3f}{between('diagnostic', fact)}")


def scenes(arguments: argparse.Namespace) -> int:
    folder = mmkit.draw_scenes(arguments.folder, arguments.count, arguments.seed)
    drawn = len(mmkit.load_captions(folder))
    print(f"{drawn:,} scenes, {drawn - arguments.count:,} of new combinations, {5 * drawn:,} captions in {folder}")
    return 0


def check(arguments: argparse.Namespace) -> int:
    report = mmkit.check_folder(arguments.folder, arguments.skip_missing)
    print(report.table(arguments.show))
    return int(not report.safe)


def download(arguments: argparse.Namespace) -> int:
    folder = mmkit.download_coco(arguments.folder, arguments.images, arguments.connections)
    dataset = mmkit.load_captions(folder)
    parts = ", ".join(f"{name} {len(rows):,}" for name, rows in dataset.splits(0, 0).items())
    print(f"{len(dataset):,} images, {len(dataset.captions):,} captions in {folder} ({parts})")
    return 0


def extract(arguments: argparse.Namespace) -> int:
    from accelerate import PartialState

    _, _, store = _load(_settings(arguments), grids=arguments.grids, tokens=arguments.tokens)
    if PartialState().is_main_process:  # of the processes of torchrun or accelerate launch
        for name in ("images", "captions", "grids", "tokens"):
            if name in store.arrays:
                array = store.arrays[name]
                print(f"{name:<9} {array.shape!s:<20} {array.dtype}  {array.nbytes / 1e6:,.1f} MB")
    return 0


def encoders(arguments: argparse.Namespace) -> int:
    print(mmkit.encoder_table())
    return 0


def train(arguments: argparse.Namespace) -> int:
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    from mmkit.checkpoints import check_free_for_checkpoint

    profile = _settings(arguments)
    check_free_for_checkpoint(arguments.out)
    changes = {name: getattr(arguments, name) for name in ("epochs", "seed") if getattr(arguments, name) is not None}
    changes |= {"part_epochs": arguments.epochs} if arguments.epochs is not None else {}
    profile = replace(profile, **changes)
    dataset, encoders, store = _load(profile, **_needs(mmkit.FUSERS[arguments.fuser]))
    parts = {name: _split(profile, dataset, store, name) for name in ("train", "val")}
    learnt = (_weights(encoders), _digest(dataset, parts), arguments.false, arguments.accumulate)
    by, false = mmkit.training_recipe(arguments.fuser, profile, *learnt), None
    main = PartialState().is_main_process  # of the processes of torchrun or accelerate launch
    state = arguments.out.with_name(f"{arguments.out.name}.state")  # the same command goes on from here
    if broadcast_object_list([main and mmkit.is_trained(arguments.out, by)])[0]:
        if main:
            state.unlink(missing_ok=True)  # of a run that was killed when all was saved
            print(f"{arguments.out} is this training, finished; to repeat it, delete it or name another --out")
        return 0
    if arguments.false:
        false = mmkit.false_captions(dataset, parts["train"], encoders, arguments.false, (1, 2), profile.precision)
    fuser = mmkit.build_fuser(arguments.fuser, profile, *parts["train"].dims)
    history = mmkit.fit_profile(fuser, parts["train"], parts["val"], profile, state, false, arguments.accumulate)
    if not main:
        return 0
    thresholds = mmkit.choose_thresholds(fuser, parts["val"], profile.seed)
    mmkit.save_checkpoint(arguments.out, fuser, by, thresholds, history, parts["train"])
    state.unlink(missing_ok=True)
    best = history.rows[history.best_epoch]
    closed = "gradient_steps" in best
    steps = "solved in closed form" if closed else f"{len(history.rows)} epochs, kept epoch {history.best_epoch + 1}"
    print(f"{arguments.fuser}: {len(parts['train'].image_rows):,} images, {steps}")
    print(f"validation loss {best['validation_loss']:.3f}; saved as {arguments.out}")
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    from accelerate import PartialState

    fuser, training = mmkit.load_checkpoint(arguments.checkpoint)
    known = {field.name for field in fields(mmkit.Profile)}
    trained = {key: value for key, value in training["profile"].items() if key in known}
    if arguments.profile:
        chosen = mmkit.profile(arguments.profile)
        trained |= {key: getattr(chosen, key) for key in ("name", "data", "scene_count", "scene_seed")}
    root = {"coco_root": arguments.coco_root, "data": "folder"} if arguments.coco_root else {}
    root |= {"skip_missing": True} if arguments.skip_missing else {}
    profile = mmkit.profile(trained.pop("name"), **(trained | root))
    dataset, encoders, store = _load(profile, **_needs(fuser))
    if _weights(encoders) != training["weights"]:
        raise mmkit.MmkitError(
            f"{arguments.checkpoint} was trained on features of other encoder weights. Remedy: train again."
        )
    if not PartialState().is_main_process:  # processes share the extraction; one judges
        return 0
    features = _split(profile, dataset, store, arguments.split)
    report = mmkit.report_json(
        features,
        mmkit.matching_report(fuser, features, training["thresholds"], profile.seed),
        mmkit.retrieval_report(fuser, features, arguments.shortlist),
    )
    if arguments.folds:
        folded = mmkit.folded_retrieval(fuser, features, arguments.folds, arguments.shortlist)
        report["folds"] = {"count": arguments.folds, "rsum": folded.mean.rsum}
        report["folds"] |= {way: asdict(getattr(folded.mean, way)) for way in report["retrieval"]}
    if arguments.eccv:
        report["eccv"] = mmkit.eccv_scores(fuser, features)
    if dataset.scenes:
        pairs = mmkit.diagnostic_pairs(dataset, features, encoders, precision=profile.precision)
        facts = mmkit.diagnostic_report(fuser, features, pairs)
        report["diagnostic"] = {fact: {"accuracy": row.accuracy, "pairs": row.pairs} for fact, row in facts.items()}
        report["intervals"]["diagnostic"] = {fact: row.interval._asdict() for fact, row in facts.items()}
    if arguments.json:
        print(json.dumps(report))
    else:
        _print_report(report)
    return 0


def run(arguments: argparse.Namespace) -> int:
    profile = _settings(arguments)
    dataset = mmkit.load_dataset(profile)
    print(f"profile {profile.name}: {len(dataset):,} images, {len(dataset.captions):,} captions", flush=True)
    run_course(arguments.notebooks, arguments.out, profile, arguments.only, arguments.in_place)
    return 0


def plan(arguments: argparse.Namespace) -> int:
    from mmkit.planning import plan as planned

    return planned(arguments)


def results(arguments: argparse.Namespace) -> int:
    from mmkit.experiments import run_experiments

    run_experiments(arguments.out, arguments.only, arguments.seeds)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mmkit", description="Image–text fusion, learnt by running it.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("--profile", help="mini, photos or coco (default: MMKIT_PROFILE, else mini)")
    data.add_argument("--coco-root", metavar="DIR", help="a folder in COCO-captions layout (default: MMKIT_COCO_ROOT)")
    changed = argparse.ArgumentParser(add_help=False)
    changed.add_argument(
        "--set", nargs="+", default=(), metavar="NAME=VALUE", help="settings of the profile, such as image_size=320"
    )
    missing = argparse.ArgumentParser(add_help=False)
    missing.add_argument("--skip-missing", action="store_true", help="leave out images whose file is not there")

    def command(
        name: str, help: str, example: str, parents: Sequence[argparse.ArgumentParser] = ()
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=help, description=help, epilog=f"example: python -m mmkit {example}", parents=parents
        )
        added.set_defaults(command=globals()[name])
        return added

    one = command("scenes", "draw the embedded dataset into a folder", "scenes /tmp/scenes --count 300")
    one.add_argument("folder", type=Path)
    one.add_argument("--count", type=int, default=1500)
    one.add_argument("--seed", type=int, default=0)
    one = command("download", "bring COCO 2014 with Karpathy's split", "download coco ~/coco --images 2000")
    one.add_argument("dataset", choices=["coco"])
    one.add_argument("folder", type=Path)
    one.add_argument("--images", type=int, metavar="N", help="only so many, with a tenth for val and 15 %% for test")
    one.add_argument("--connections", type=int, default=8, metavar="N", help="transfers at once (default: 8)")
    one = command("check", "read a COCO-captions folder and name every fault", "check /tmp/scenes", [missing])
    one.add_argument("folder", type=Path)
    one.add_argument("--show", type=int, default=20, metavar="N", help="faults of each kind to print (default: 20)")
    command("encoders", "list the encoders: sizes, operations, licences, sources", "encoders")
    one = command(
        "extract", "extract and cache the features of a dataset", "extract --coco-root ~/coco", [data, missing, changed]
    )
    one.add_argument("--grids", action="store_true", help="also the cells of each feature map (49 times the disk)")
    one.add_argument("--tokens", action="store_true", help="also the tokens of each caption (14 times the disk)")
    one = command(
        "train", "train a fuser and write a checkpoint", "train --fuser mlp --out runs/mlp", [data, missing, changed]
    )
    one.add_argument(
        "--fuser",
        default="mlp",
        help="mlp, gnn, hetero-gnn, gated, two-tower, cca, cross-attention or region-word (default: mlp)",
    )
    one.add_argument("--out", type=Path, required=True, metavar="DIR")
    one.add_argument("--epochs", type=int)
    one.add_argument("--seed", type=int)
    one.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="gradients of so many batches make one step (default: 1)"
    )
    one.add_argument(
        "--false",
        nargs="+",
        default=(),
        choices=FACTS,
        metavar="FACT",
        help=f"drawn scenes: learn from captions false in these facts, of {', '.join(FACTS)}",
    )
    one = command(
        "evaluate", "matching and retrieval of a checkpoint", "evaluate runs/mlp --split all --json", [data, missing]
    )
    one.add_argument("checkpoint", type=Path)
    one.add_argument("--split", choices=[*SPLITS, "all"], default="test")
    one.add_argument(
        "--shortlist", type=int, default=0, metavar="N", help="rank only so many candidates (default: all)"
    )
    one.add_argument(
        "--folds", type=int, default=0, metavar="N", help="also the mean over N disjoint pools (COCO's 1K: 5)"
    )
    one.add_argument("--eccv", action="store_true", help="also ECCV Caption and CxC, of Karpathy's 5,000 test images")
    one.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    one = command("run", "execute the notebooks in order", "run --only 03 04", [data, missing])
    one.add_argument("--only", nargs="+", default=(), metavar="NAME", help="notebooks whose name begins so")
    one.add_argument("--notebooks", type=Path, default=Path("notebooks"), metavar="DIR")
    one.add_argument("--out", type=Path, default=Path("build"), metavar="DIR")
    one.add_argument("--in-place", action="store_true", help="write the executed notebooks over the sources")
    one = command("plan", "what a full run takes: time, memory and disk", "plan --images 20000 --captions 100000")
    one.add_argument("--measure", action="store_true", help="measure this machine anew first (some minutes)")
    one.add_argument("--out", type=Path, default=Path("notebooks/planning.json"), metavar="FILE", help="with --measure")
    for name in ("images", "captions", "held-out", "epochs", "part-epochs", "gpus"):
        one.add_argument(f"--{name}", type=int, metavar="N")
    one = command("results", "take the runs behind the course's tables, and write them", "results --only losses")
    one.add_argument("--only", nargs="+", default=(), metavar="NAME", help="experiments whose name begins so")
    one.add_argument("--seeds", type=int, metavar="N", help="seeds of each variant (default: 5)")
    one.add_argument("--out", type=Path, default=Path("notebooks/results"), metavar="DIR")
    return parser


def _print_error(error: mmkit.MmkitError) -> None:
    """Print it once for a job: a process beside the main one waits to be ended, and if not, it alone has failed."""
    rank, process = os.environ.get("RANK", "0"), ""
    if rank != "0":
        time.sleep(_PATIENCE)
        process = f"process {rank} of {os.environ.get('WORLD_SIZE', '?')}: "
    print(f"mmkit: {process}{error}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; exit status 0, 1 where `check` or a notebook found faults, 2 for bad input."""
    try:
        parsed = _parser().parse_args(arguments)
        if "fuser" in parsed and parsed.fuser not in mmkit.FUSERS:
            raise mmkit.MmkitError(f"No fuser {parsed.fuser!r}. Valid names: {', '.join(mmkit.FUSERS)}")
        return parsed.command(parsed)
    except mmkit.MmkitError as error:
        _print_error(error)
        return 2
    except KeyboardInterrupt:
        print("\nmmkit: interrupted. The same command goes on where it can.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
