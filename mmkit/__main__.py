"""The steps of the course for a terminal or a cluster job: `mmkit COMMAND --help`, or `python -m mmkit COMMAND`."""

from __future__ import annotations  # a command imports what it needs: checking a folder needs no torch

import argparse
import hashlib
import json
import os
import runpy
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import mmkit
from mmkit.data import SPLITS
from mmkit.profiles import CHECKOUT
from mmkit.scenes import FACTS

_PATIENCE = 10  # seconds in which a launcher ends the other processes after the main one


def _settings(arguments: argparse.Namespace) -> mmkit.Profile:
    """The profile that the options name; a folder without a profile means the profile "photos"."""
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


def _load(profile: mmkit.Profile, **parts: bool) -> tuple[mmkit.CaptionDataset, mmkit.Encoders, mmkit.PairedFeatures]:
    dataset = mmkit.load_dataset(profile)
    if faults := Counter(fault.kind for fault in dataset.faults):
        counted = ", ".join(f"{count:,} {kind}" for kind, count in faults.items())
        print(f"records with faults: {counted}; see: python -m mmkit check", file=sys.stderr)
    encoders = mmkit.encoders_of(profile)
    return dataset, encoders, mmkit.extract_features(dataset, encoders, profile.cache, profile.precision, **parts)


def _split(
    profile: mmkit.Profile, dataset: mmkit.CaptionDataset, features: mmkit.PairedFeatures, name: str
) -> mmkit.PairedFeatures:
    if name == "all":
        return features
    images = dataset.splits(profile.val_fraction, profile.test_fraction, profile.split_seed)[name]
    if len(images) < 2:
        raise mmkit.MmkitError(f"The split {name} has {len(images)} images. Remedy: --split all, or a larger folder.")
    return features.select(images)


def _weights(encoders: mmkit.Encoders) -> dict[str, str]:
    return {encoder.name: encoder.digest() for encoder in (encoders.image, encoders.text)}


def _shown(report: dict) -> str:
    """The figures of `evaluate` as lines to read."""

    def between(part: str, name: str) -> str:
        if name not in report["intervals"][part]:
            return ""
        (low, high), digits = report["intervals"][part][name].values(), 0 if name == "rsum" else 3
        return f" ({low:.{digits}f} to {high:.{digits}f})"

    sizes = report["sizes"]
    lines = [f"{sizes['images']:,} images, {sizes['captions']:,} captions; 95 % intervals over images in brackets"]
    for kind, row in report["matching"].items():
        figures = (f"{name} {value:.3f}{between(kind, name)}" for name, value in row.items())
        lines.append(f"matching, {kind} negatives 1:1   " + "   ".join(figures))
    for way, row in report["retrieval"].items():
        recalls = "   ".join(f"R@{k} {row[f'r{k}']:.3f}{between('retrieval', f'{way}.r{k}')}" for k in (1, 5, 10))
        lines.append(f"{way:<15} {recalls}   median rank {row['median_rank']:.0f}")
    lines.append(f"rsum {report['rsum']:.1f}{between('retrieval', 'rsum')}")
    for fact, row in report.get("diagnostic", {}).items():
        lines.append(f"one changed fact, {fact:<9} {row['accuracy']:.3f}{between('diagnostic', fact)}")
    return "\n".join(lines)


# --- the commands ----------------------------------------------------------------------------------


def scenes(arguments: argparse.Namespace) -> None:
    folder = mmkit.draw_scenes(arguments.folder, arguments.count, arguments.seed)
    drawn = len(mmkit.load_captions(folder))
    print(f"{drawn:,} scenes, {drawn - arguments.count:,} of new combinations, {5 * drawn:,} captions in {folder}")


def check(arguments: argparse.Namespace) -> int:
    report = mmkit.check_folder(arguments.folder, arguments.skip_missing)
    print(report.table(arguments.show))
    return int(not report.safe)


def download(arguments: argparse.Namespace) -> None:
    folder = mmkit.download_coco(arguments.folder, arguments.images, arguments.connections)
    dataset = mmkit.load_captions(folder)
    parts = ", ".join(f"{name} {len(images):,}" for name, images in dataset.splits(0, 0).items())
    print(f"{len(dataset):,} images, {len(dataset.captions):,} captions in {folder} ({parts})")


def extract(arguments: argparse.Namespace) -> None:
    from accelerate import PartialState

    _, _, features = _load(_settings(arguments), grids=arguments.grids, tokens=arguments.tokens)
    if PartialState().is_main_process:  # of the processes of torchrun or accelerate launch
        print(features)


def train(arguments: argparse.Namespace) -> None:
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    from mmkit.checkpoints import check_free_for_checkpoint

    if arguments.fuser not in mmkit.FUSERS:
        raise mmkit.MmkitError(f"No fuser {arguments.fuser!r}. Valid names: {', '.join(mmkit.FUSERS)}")
    profile, out = _settings(arguments), arguments.out
    check_free_for_checkpoint(out)
    changes = {"epochs": arguments.epochs, "part_epochs": arguments.epochs, "seed": arguments.seed}
    profile = replace(profile, **{name: value for name, value in changes.items() if value is not None})
    parts = mmkit.FUSERS[arguments.fuser].takes_parts
    dataset, encoders, features = _load(profile, grids=parts, tokens=parts)
    pairs, validation = (_split(profile, dataset, features, name) for name in ("train", "val"))
    ids = [dataset.fingerprint(), pairs.image_ids.tolist(), validation.image_ids.tolist()]
    weights_and_data = (_weights(encoders), hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16])
    recipe = mmkit.training_recipe(arguments.fuser, profile, *weights_and_data, arguments.false, arguments.accumulate)
    main = PartialState().is_main_process  # of the processes of torchrun or accelerate launch
    state = out.with_name(f"{out.name}.state")  # the same command goes on from here
    if broadcast_object_list([main and is_trained(out, recipe)])[0]:
        if main:
            shutil.rmtree(state, ignore_errors=True)  # of a run that was killed when all was saved
            print(f"{out} is this training, finished; to repeat it, delete it or name another --out")
        return
    drawn_from = (dataset, pairs, encoders, profile.cache, arguments.false)
    false = mmkit.false_captions(*drawn_from, precision=profile.precision) if arguments.false else None
    fuser = mmkit.build_fuser(arguments.fuser, profile, *pairs.dims)
    options = {"false": false, "state": state, "accumulate": arguments.accumulate}
    history = mmkit.fit(fuser, pairs, validation, profile, **options)
    if not main:
        return
    thresholds = mmkit.choose_thresholds(fuser, validation, profile.seed)
    mmkit.save_checkpoint(out, fuser, recipe, thresholds, history, pairs)
    shutil.rmtree(state, ignore_errors=True)
    best = history.rows[history.best_epoch]
    closed = "gradient_steps" in best
    steps = "solved in closed form" if closed else f"{len(history.rows)} epochs, kept epoch {history.best_epoch + 1}"
    print(f"{arguments.fuser}: {len(pairs):,} images, {steps}")
    print(f"validation loss {best['validation_loss']:.3f}; saved as {out}")


def is_trained(folder: Path, recipe: dict) -> bool:
    """Whether `folder` holds a whole checkpoint that was trained by this `training_recipe`."""
    try:
        training = mmkit.load_checkpoint(folder)[1]
    except mmkit.MmkitError:
        return False
    return all(training.get(key) == value for key, value in json.loads(json.dumps(recipe)).items())


def evaluate(arguments: argparse.Namespace) -> None:
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
    dataset, encoders, features = _load(profile, grids=fuser.takes_parts, tokens=fuser.takes_parts)
    if _weights(encoders) != training["weights"]:
        raise mmkit.MmkitError(f"{arguments.checkpoint} is of other encoder weights. Remedy: train again.")
    features, pairs = _split(profile, dataset, features, arguments.split), {}
    if dataset.scenes:
        pairs = mmkit.diagnostic_pairs(dataset, features, encoders, profile.cache, precision=profile.precision)
    if not PartialState().is_main_process:  # processes share the extraction; one judges
        return
    pool = mmkit.encode_pool(fuser, features)
    matching = mmkit.matching_report(fuser, features, training["thresholds"], profile.seed, pool)
    retrieval = mmkit.retrieval_report(fuser, features, arguments.shortlist, pool)
    report = mmkit.report_json(features, matching, retrieval)
    if dataset.scenes:
        facts = mmkit.diagnostic_report(fuser, features, pairs, pool)
        report["diagnostic"] = {fact: {"accuracy": row.accuracy, "pairs": row.pairs} for fact, row in facts.items()}
        report["intervals"]["diagnostic"] = {fact: row.interval._asdict() for fact, row in facts.items()}
    print(json.dumps(report) if arguments.json else _shown(report))


def script(arguments: argparse.Namespace) -> None:
    """`run` and `results`: hand the options to the script that lies beside what it makes."""
    path = CHECKOUT / arguments.path
    if not path.is_file():
        raise mmkit.MissingFile(f"{arguments.path} is part of a checkout. Remedy: clone the project, and run there.")
    sys.argv = [str(path), *arguments.options]
    runpy.run_path(str(path), run_name="__main__")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmkit", description="Image–text fusion, learnt by building it.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    data, changed, missing = (argparse.ArgumentParser(add_help=False) for _ in range(3))
    data.add_argument("--profile", help="mini, photos or coco (default: MMKIT_PROFILE, else mini)")
    data.add_argument("--coco-root", metavar="DIR", help="a folder in COCO-captions layout (default: MMKIT_COCO_ROOT)")
    changed.add_argument("--set", nargs="+", default=(), metavar="NAME=VALUE", help="settings, such as image_size=320")
    missing.add_argument("--skip-missing", action="store_true", help="leave out images whose file is not there")

    def command(name: str, help: str, example: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        epilog = f"example: python -m mmkit {name} {example}"
        added = commands.add_parser(name, help=help, description=help, epilog=epilog, parents=parents)
        added.set_defaults(command=globals()[name])
        return added

    def count(one: argparse.ArgumentParser, name: str, help: str, default: int | None = None) -> None:
        one.add_argument(name, type=int, metavar="N", default=default, help=help)

    one = command("scenes", "draw the embedded dataset into a folder", "/tmp/scenes --count 300")
    one.add_argument("folder", type=Path)
    count(one, "--count", "scenes, and a tenth as many of new combinations (default: 1500)", 1500)
    count(one, "--seed", "other scenes (default: 0)", 0)
    one = command("download", "bring COCO 2014 with Karpathy's split", "coco ~/coco --images 2000")
    one.add_argument("dataset", choices=["coco"])
    one.add_argument("folder", type=Path)
    count(one, "--images", "only so many, with a tenth for val and 15 %% for test")
    count(one, "--connections", "transfers at once (default: 8)", 8)
    one = command("check", "read a COCO-captions folder and name every fault", "/tmp/scenes", missing)
    one.add_argument("folder", type=Path)
    count(one, "--show", "faults of each kind to print (default: 20)", 20)
    one = command("extract", "extract the features of a dataset", "--coco-root ~/coco", data, missing, changed)
    one.add_argument("--grids", action="store_true", help="also the cells of each feature map (49 times the disk)")
    one.add_argument("--tokens", action="store_true", help="also the tokens of each caption (14 times the disk)")
    one = command("train", "train a fuser, write a checkpoint", "--fuser mlp --out runs/mlp", data, missing, changed)
    names = "mlp, gnn, hetero-gnn, gated, two-tower, cca, cross-attention or region-word (default: mlp)"
    one.add_argument("--fuser", default="mlp", help=names)
    one.add_argument("--out", type=Path, required=True, metavar="DIR")
    count(one, "--epochs", "passes over the training split (default: the profile's)")
    count(one, "--seed", "of the weights and of all that is drawn (default: the profile's)")
    count(one, "--accumulate", "gradients of so many batches make one step (default: 1)", 1)
    facts = f"drawn scenes: learn from captions false in these facts, of {', '.join(FACTS)}"
    one.add_argument("--false", nargs="+", default=(), choices=FACTS, metavar="FACT", help=facts)
    one = command("evaluate", "judge a checkpoint", "runs/mlp --split all --json", data, missing)
    one.add_argument("checkpoint", type=Path)
    one.add_argument("--split", choices=[*SPLITS, "all"], default="test")
    count(one, "--shortlist", "rank only so many candidates (default: all)", 0)
    one.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    for name, help in (("run", "execute the notebooks in order"), ("results", "take the runs behind the tables again")):
        one = commands.add_parser(name, help=help, add_help=False)
        folder = "notebooks/results" if name == "results" else "notebooks"
        one.set_defaults(command=script, path=f"{folder}/run.py")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; exit status 0, 1 where `check` found faults, 2 for bad input."""
    try:
        parser = _parser()
        parsed, parsed.options = parser.parse_known_args(arguments)
        if parsed.options and parsed.command is not script:
            parser.error(f"unrecognized arguments: {' '.join(parsed.options)}")
        return parsed.command(parsed) or 0
    except mmkit.MmkitError as error:
        process, (rank, count) = "", (os.environ.get(name) for name in ("RANK", "WORLD_SIZE"))
        if rank not in (None, "0"):  # printed once for a job: it waits to be ended, and if not, it alone has failed
            time.sleep(_PATIENCE)
            process = f"process {rank} of {count}: "
        print(f"mmkit: {process}{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nmmkit: interrupted. The same command goes on where it can.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
