"""Takes the runs that the JSON files beside this script do not hold yet, and writes the tables of README.md."""

import argparse
import functools
import json
import os
import platform
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import torch

import mmkit
from mmkit.evaluation import CUTS, DIRECTIONS, NEGATIVES
from mmkit.profiles import CHECKOUT
from mmkit.results import FIGURES, Results, Run, read_results
from mmkit.scenes import SCENES_VERSION
from mmkit.support import write_whole

HERE = Path(__file__).resolve().parent
MARKER = "<!-- what follows is written by make results -->"
NEGATIVES_SEED = 0  # one for all runs: variants and seeds are judged on the same pairs
ENCODING = ("image_encoder", "image_size", "squash", "text_encoder", "pooling", "max_tokens")
# settings of the profile that are no condition, or stand elsewhere among the conditions
APART = {"cache", "coco_root", "seed", "data", "scene_count", "scene_seed"}
PACKAGES = ("mmkit", "torch", "transformers", "timm", "torch-geometric")


# --- what is compared ------------------------------------------------------------------------------


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of the things compared: a name of `FUSERS`, changes of the profile, and further arguments of its class.

    `false` are facts: it learns from captions that are false in one of them too. `corrected` may be "csls",
    the correction of the trained fuser's scores for hubs. `lora`, where not 0, is the rank of adapters in the text
    encoder, which the trained fuser is then trained on with, under the profile as `tuning` changes it.
    """

    fuser: str = "mlp"
    settings: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    false: list[str] = []
    corrected: Literal["", "csls"] = ""
    lora: int = 0
    tuning: dict[str, Any] = {}

    @property
    def encoding(self) -> dict[str, Any]:
        """Those of `settings` that features depend on."""
        return {name: value for name, value in self.settings.items() if name in ENCODING}


class Experiment(msgspec.Struct, frozen=True, eq=False, forbid_unknown_fields=True):
    """A question, and the runs that answer it: every one of the `variants` with every seed from 0 to `seeds` - 1.

    `profile` is "mini" (drawn scenes) or "photos", with `settings` changed for all variants. With `unseen` so many
    images are the test split, and a tenth of the rest validates. The table shows `columns`, and for `compared` the
    difference to `reference`.
    """

    name: str
    question: str
    profile: str
    variants: dict[str, Variant]
    reference: str
    columns: tuple[str, ...]
    compared: str = "rsum"
    seeds: int = 5
    unseen: int = 0
    settings: dict[str, Any] = {}


def read_experiments(path: Path) -> dict[str, Experiment]:
    """The experiments of a TOML file by name; one that is `like` another takes from it what it does not name."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        for name, table in tables.items():
            tables[name] = tables.get(table.pop("like", ""), {}) | table | {"name": name}
        return msgspec.convert(tables, dict[str, Experiment])
    except ValueError as error:  # tomllib's and msgspec's errors are ValueErrors
        raise mmkit.MmkitError(f"{path}: {error}. Remedy: run.py says what an experiment and a variant hold.") from None


# --- what it is compared on ------------------------------------------------------------------------


class Material(NamedTuple):
    """The profile, the dataset and its encoders, the features of each split, and the test images' false captions."""

    profile: mmkit.Profile
    dataset: mmkit.CaptionDataset
    encoders: mmkit.Encoders
    splits: dict[str, mmkit.PairedFeatures]
    changed: dict[str, tuple[mmkit.DiagnosticNegatives, mmkit.PairedFeatures]]

    @property
    def made_from(self) -> dict[str, Any]:
        """What the features were made from."""
        manifest = self.splits["train"].manifest
        return {key: manifest[key] for key in sorted(manifest.keys() - {"dataset", "grids", "tokens"})}


@functools.cache
def prepare(experiment: Experiment, profile: mmkit.Profile) -> Material:
    """What the variants with this profile's features are trained and judged on."""
    variants = experiment.variants.values()
    parts = any(mmkit.FUSERS[variant.fuser].takes_parts for variant in variants)
    dataset, encoders = mmkit.load_dataset(profile), mmkit.encoders_of(profile)
    features = mmkit.extract_features(dataset, encoders, profile.cache, profile.precision, grids=parts, tokens=parts)
    if experiment.unseen:
        share = experiment.unseen / max(1, len(dataset) - sum(map(bool, dataset.given_splits)))
        profile = replace(profile, test_fraction=share, val_fraction=(1 - share) / 10)
    images = dataset.splits(profile.val_fraction, profile.test_fraction, profile.split_seed)
    if experiment.unseen not in (0, len(images["test"])):
        raise mmkit.MmkitError(
            f"{experiment.name} tests on {experiment.unseen:,} images, and the folder's own test split has "
            f"{len(images['test']):,}. Remedy: a folder without a split, such as a part of COCO's val2017."
        )
    splits, changed = {name: features.select(chosen) for name, chosen in images.items()}, {}
    if dataset.scenes:
        shared = encoders, profile.cache
        changed = mmkit.diagnostic_pairs(dataset, splits["test"], *shared, precision=profile.precision)
    if any(variant.lora for variant in variants):
        read = functools.partial(mmkit.tokenized, preprocessor=encoders.preprocessor)
        splits = {name: read(part, dataset) for name, part in splits.items()}
        changed = {fact: (pairs, read(captions, pairs.texts)) for fact, (pairs, captions) in changed.items()}
    return Material(profile, dataset, encoders, splits, changed)


def conditions(material: Material, others: Mapping[str, Material]) -> dict[str, Any]:
    """All that figures depend on besides variant, seed and code, as JSON holds it; no path. `others` are the materials
    of variants with features of their own."""
    profile, splits = material.profile, material.splits
    sizes = {name: {"images": len(part), "captions": len(part.image_index)} for name, part in splits.items()}
    data: dict[str, Any] = {"kind": profile.data, "fingerprint": splits["train"].manifest["dataset"]}
    data |= {key: sum(size[key] for size in sizes.values()) for key in ("images", "captions")}
    if profile.data == "scenes":
        data |= {"count": profile.scene_count, "seed": profile.scene_seed, "version": SCENES_VERSION}
    device = "GPU" if torch.accelerator.is_available() else "CPU"
    return {
        "data": data,
        "splits": {"seed": profile.split_seed, "sizes": sizes},
        "features": material.made_from,
        **({"other_features": {name: other.made_from for name, other in others.items()}} if others else {}),
        "protocol": {
            "negatives": f"{' and '.join(NEGATIVES)}, 1:1",
            "negatives_seed": NEGATIVES_SEED,
            "threshold": "of highest accuracy on val",
            "pool": "all images and captions of test",
            "changed_captions": {fact: len(pairs.texts) for fact, (pairs, _) in material.changed.items()},
        },
        "profile": {key: value for key, value in asdict(profile).items() if key not in APART},
        "machine": f"{device}, {os.cpu_count()} cores, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in PACKAGES},
    }


# --- runs ------------------------------------------------------------------------------------------


def train(fuser: mmkit.PairFuser, material: Material, profile: mmkit.Profile, facts: list[str]) -> float:
    """Train, and the seconds that it took: of the processor, since other programs on the machine do not add to that, or
    of the clock where a GPU works."""
    _, dataset, encoders, splits, _ = material
    false, clock = None, time.perf_counter if torch.accelerator.is_available() else time.process_time
    if facts:
        shared = encoders, profile.cache, facts
        false = mmkit.false_captions(dataset, splits["train"], *shared, precision=profile.precision)
    start = clock()
    mmkit.fit(fuser, splits["train"], splits["val"], profile, false=false)
    return clock() - start


def measure(fuser: mmkit.PairFuser, material: Material) -> dict[str, float]:
    """The figures of a trained fuser, by the names of `mmkit.results.FIGURES`."""
    splits, test = material.splits, material.splits["test"]
    pool, thresholds = mmkit.encode_pool(fuser, test), mmkit.choose_thresholds(fuser, splits["val"], NEGATIVES_SEED)
    matching = mmkit.matching_report(fuser, test, thresholds, NEGATIVES_SEED, pool)
    retrieval = mmkit.retrieval_report(fuser, test, pool=pool)
    rates = ("accuracy", "roc_auc")
    figures = {f"{rate}.{kind}": getattr(row, rate) for kind, row in matching.items() for rate in rates}
    figures |= {f"{way}.r{k}": getattr(getattr(retrieval, way), f"r{k}") for way in DIRECTIONS for k in CUTS}
    figures["rsum"] = retrieval.rsum
    report = mmkit.diagnostic_report(fuser, test, material.changed, pool)
    figures |= {f"diagnostic.{fact}": row.accuracy for fact, row in report.items()}
    if "new" in splits:  # pools of one size, for a larger one is harder
        first = range(min(len(splits["new"]), len(test)))
        for name, part in (("known", test), ("new", splits["new"])):
            retrieval = mmkit.retrieval_report(fuser, part.select(first))
            figures |= {f"{name}.{way}.r1": getattr(retrieval, way).r1 for way in DIRECTIONS}
    return figures


def take(name: str, variant: Variant, seed: int, material: Material) -> Run:
    """Train and judge once."""
    profile = replace(material.profile, **variant.settings, seed=seed)
    fuser = mmkit.build_fuser(variant.fuser, profile, *material.splits["train"].dims, **variant.arguments)
    seconds = train(fuser, material, profile, variant.false)
    if variant.lora:
        fuser = mmkit.LoRATextFuser(fuser, material.encoders.text, variant.lora)
        seconds += train(fuser, material, replace(profile, **variant.tuning), variant.false)
    if variant.corrected:
        fuser = mmkit.HubnessCorrected(fuser)
    return Run(name, seed, round(seconds, 3), measure(fuser, material), commit())


@functools.cache
def commit() -> str:
    """The commit of the code that runs, with "-dirty" where it has been changed since; "" without git."""
    git = functools.partial(subprocess.run, capture_output=True, text=True, cwd=CHECKOUT, check=False)
    try:
        head = git(["git", "rev-parse", "HEAD"]).stdout.strip()
        changed = git(["git", "status", "--porcelain", "mmkit", "notebooks/results/run.py"]).stdout
    except OSError:
        return ""
    return f"{head}-dirty" if changed else head


def kept(path: Path, fresh: Results) -> Results:
    """`fresh` with the runs of the file whose conditions and settings are still the same; a line says what is not.
    Settings that did not exist yet when the file was written have been at their defaults."""
    if not path.is_file():
        return fresh
    old = read_results(path)
    defaults = {f.name: f.default for f in fields(mmkit.Profile) if f.name not in APART and f.default is not MISSING}
    before = old.conditions | {"profile": defaults | old.conditions.get("profile", {})}
    if changed := [key for key in fresh.conditions if before.get(key) != fresh.conditions[key]]:
        print(f"{fresh.name}: other {', '.join(changed)} than in {path.name}; it starts anew", flush=True)
        return fresh
    usual = msgspec.to_builtins(Variant())
    same = {name for name, settings in old.variants.items() if fresh.variants.get(name) == usual | settings}
    if dropped := sorted({run.variant for run in old.runs} - same):
        print(f"{fresh.name}: the runs of {', '.join(dropped)} were of other settings; they are dropped", flush=True)
    return replace(fresh, runs=tuple(run for run in old.runs if run.variant in same))


def run_experiment(experiment: Experiment, out: Path, seeds: int | None = None) -> None:
    """Take the runs of an experiment that `out` does not hold yet, and keep each as soon as it is finished. Without a
    folder of photos an experiment on photos is skipped."""
    name, variants = experiment.name, experiment.variants
    profile = mmkit.profile(experiment.profile, **experiment.settings)
    if profile.data == "folder" and profile.coco_root is None:
        return print(f"{name}: skipped, it needs photos. Remedy: set MMKIT_COCO_ROOT", flush=True)
    of = {variant: prepare(experiment, replace(profile, **one.encoding)) for variant, one in variants.items()}
    others = {variant: of[variant] for variant, one in variants.items() if one.encoding}
    measured_under, settings = conditions(of[experiment.reference], others), msgspec.to_builtins(variants)
    fresh = Results(name, experiment.reference, experiment.columns, measured_under, settings)
    path = out / f"{name}.json"
    results, order = kept(path, fresh), {variant: place for place, variant in enumerate(variants)}
    done = {(run.variant, run.seed) for run in results.runs}
    todo = [one for one in product(range(seeds or experiment.seeds), variants) if one[::-1] not in done]
    print(f"{name}: {len(todo)} runs to take, {len(done)} taken before", flush=True)
    if not path.is_file() or read_results(path) != results:  # the columns may be new
        write_json(path, results)
    for seed, variant in todo:
        start, run = time.perf_counter(), take(variant, variants[variant], seed, of[variant])
        runs = sorted([*results.runs, run], key=lambda run: (run.seed, order[run.variant]))
        results = replace(results, runs=tuple(runs))
        write_json(path, results)
        told = f"accuracy {100 * run.figures['accuracy.random']:.1f} %, rsum {run.figures['rsum']:.0f}"
        print(f"{name}: {variant}, seed {seed}: {told}; {time.perf_counter() - start:.1f} s", flush=True)


def write_json(path: Path, results: Results) -> None:
    """Write results whole, as `read_results` takes them."""
    write_whole(path, json.dumps(asdict(results), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


# --- tables ----------------------------------------------------------------------------------------


def markdown(experiment: Experiment, results: Results) -> str:
    """The question, a table with the difference to the reference, and the conditions in a line."""
    label, scale, decimals = FIGURES[experiment.compared]
    seeds = {variant: {run.seed for run in results.runs if run.variant == variant} for variant in results.variants}
    rows = []
    for variant in results.variants:
        against = "–"
        if variant != results.reference and len(seeds[variant] & seeds[results.reference]) > 1:
            apart = results.difference(variant, results.reference, experiment.compared)
            mean, low, high = (f"{scale * x:+.{decimals}f}".replace("-", "−") for x in (apart.mean, *apart.interval))
            against = f"{mean} ({low} to {high}): {apart.verdict}"
        rows.append([variant, *(results.cell(variant, figure) for figure in results.columns), against])
    labels = (FIGURES[figure][0] for figure in results.columns)
    head = ["", *labels, f"{label} against {results.reference}, 95 % interval"]
    rule = ["---", *("---:" for _ in results.columns), "---"]
    lines = [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]
    data, sizes = results.conditions["data"], results.conditions["splits"]["sizes"]
    pictures = f"{data['images']:,} {'drawn scenes' if data['kind'] == 'scenes' else 'photos'}"
    parts = ", ".join(f"{name} {size['images']:,}" for name, size in sizes.items())
    encoders = " and ".join(results.conditions["features"][f"{kind}_encoder"][0] for kind in ("image", "text"))
    counts = sorted({len(taken) for taken in seeds.values()})
    told = "–".join(map(str, sorted({counts[0], counts[-1]}))) + (" seed" if counts[-1] == 1 else " seeds")
    told += f"; {pictures} ({parts}); {encoders}, frozen; negatives 1:1; {results.conditions['machine']}."
    return "\n".join([f"**{results.name}.** {experiment.question}", "", *lines, "", told])


def write_tables(out: Path, experiments: Mapping[str, Experiment]) -> None:
    """Write the tables of the JSON in `out` into its README.md, below what README.md beside this script explains."""
    explained = (HERE / "README.md").read_text(encoding="utf-8").partition(MARKER)[0]
    paths = {name: out / f"{name}.json" for name in experiments if (out / f"{name}.json").is_file()}
    tables = [markdown(experiments[name], read_results(path)) for name, path in paths.items()]
    if tables:
        write_whole(out / "README.md", "\n\n".join([explained + MARKER, *tables]) + "\n")
        print(f"{out.name}/README.md: {len(tables)} tables written from the JSON", flush=True)


def main(experiments: Mapping[str, Experiment]) -> None:
    """Take the runs of the experiments asked for. One that cannot be run does not keep the others from it; what stopped
    it is told at the end."""
    parser = argparse.ArgumentParser(prog="python -m mmkit results", description=__doc__)
    parser.add_argument("--only", nargs="+", default=("",), metavar="NAME", help="experiments whose name begins so")
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds of each variant (default: the experiment's)")
    parser.add_argument("--out", type=Path, default=HERE, metavar="DIR", help="where the JSON and README.md are kept")
    parser.add_argument("--tables", action="store_true", help="take no runs, only write the tables")
    asked = parser.parse_args()
    if asked.seeds is not None and asked.seeds < 1:
        raise mmkit.MmkitError(f"--seeds {asked.seeds}: an experiment takes at least one.")
    chosen = [one for name, one in experiments.items() if name.startswith(tuple(asked.only))]
    if not chosen:
        raise mmkit.MmkitError(f"No experiment {' '.join(asked.only)}. Valid names: {', '.join(experiments)}")
    failed: dict[str, list[str]] = {}  # by message: what one fault stops is told once
    for experiment in [] if asked.tables else chosen:
        try:
            run_experiment(experiment, asked.out, asked.seeds)
        except mmkit.MmkitError as error:
            failed.setdefault(str(error), []).append(experiment.name)
    write_tables(asked.out, experiments)
    if failed:
        raise mmkit.MmkitError("\n".join(f"not finished: {', '.join(names)}. {why}" for why, names in failed.items()))


if __name__ == "__main__":
    try:
        main(read_experiments(HERE / "experiments.toml"))
    except mmkit.MmkitError as error:
        print(f"mmkit: {error}", file=sys.stderr)
        sys.exit(2)
