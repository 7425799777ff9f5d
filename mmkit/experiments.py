"""The runs that `make results` takes: each kept as soon as it is finished, with all that it depends on."""

import ast
import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .data import CaptionDataset, DiagnosticNegatives, load_dataset
from .encoders import Encoders, TextEncoder
from .errors import MmkitError
from .evaluation import NEGATIVES, choose_thresholds, matching_report, retrieval_report
from .extraction import extract_features
from .features import FalseCaptions, FeatureStore, PairedFeatures
from .fusers import PairFuser
from .hubness import HubnessCorrected
from .metrics import CUTS, DIRECTIONS
from .profiles import Profile, profile
from .protocols import diagnostic_pairs, diagnostic_report, false_captions, subset
from .questions import EXPERIMENTS, Experiment, Variant
from .results import FOLDER, Results, Run, read_results, results_section, with_section, write_results, write_whole
from .scenes import SCENES_VERSION
from .training import FUSERS, build_fuser, fit_profile
from .tuning import LoRATextFuser, tokenized
from .zoo import encoders_of

_PROFILES = {"scenes": "mini", "photos": "photos"}
_NEGATIVES_SEED = 0  # one for all runs: variants and seeds are judged on the same pairs
_PACKAGES = ("mmkit", "torch", "transformers", "timm", "torch-geometric")
# Settings that are no condition, or stand elsewhere among the conditions.
_OWN = {"cache", "coco_root", "seed", "data", "scene_count", "scene_seed"}
# Modules that no figure depends on.
_OTHER_CODE = {
    "__init__",
    "__main__",
    "browser",
    "cards",
    "check",
    "checkpoints",
    "costs",
    "course",
    "download",
    "galleries",
    "planning",
    "plots",
    "questions",
    "results",
}


# --- what a run depends on -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Material:
    """The profile and its encoder of texts, the features of each split, the false captions of the test images, and
    those of the training images by the facts that a variant learns from."""

    profile: Profile
    text_encoder: TextEncoder
    made_from: dict[str, Any]
    splits: dict[str, PairedFeatures]
    changed: dict[str, tuple[DiagnosticNegatives, PairedFeatures]]
    false: dict[tuple[str, ...], FalseCaptions]


_Loaded = tuple[CaptionDataset, Encoders, FeatureStore]


def _load(settings: Profile, parts: bool) -> _Loaded:
    dataset = load_dataset(settings)
    encoders = encoders_of(settings)
    store = extract_features(dataset, encoders, settings.cache, settings.precision, grids=parts, tokens=parts)
    return dataset, encoders, store


def _material(
    experiment: Experiment, settings: Profile, load: Callable[[Profile, bool], _Loaded], variants: list[Variant]
) -> _Material:
    """What these variants of an experiment are trained and judged on."""
    parts = any(FUSERS[variant.fuser].takes_parts for variant in variants)
    dataset, encoders, store = load(settings, parts)
    if experiment.unseen:
        share = experiment.unseen / max(1, len(dataset) - sum(map(bool, dataset.given_splits)))
        settings = replace(settings, test_fraction=share, val_fraction=(1 - share) / 10)
    rows = dataset.splits(settings.val_fraction, settings.test_fraction, settings.split_seed)
    if experiment.unseen not in (0, len(rows["test"])):
        raise MmkitError(
            f"{experiment.name} tests on {experiment.unseen:,} images, and the folder's own test split has "
            f"{len(rows['test']):,}. Remedy: a folder without a split, such as a part of COCO's val2017."
        )
    splits = {name: store.select(chosen) for name, chosen in rows.items()}
    if any(variant.lora for variant in variants):  # false captions made from these then have token ids too
        splits = {name: tokenized(part, dataset, encoders.preprocessor) for name, part in splits.items()}
    changed = {}
    if dataset.scenes:
        changed = diagnostic_pairs(dataset, splits["test"], encoders, precision=settings.precision)
    false = {
        facts: false_captions(dataset, splits["train"], encoders, facts, precision=settings.precision)
        for facts in {variant.false for variant in variants} - {()}
    }
    return _Material(settings, encoders.text, store.manifest, splits, changed, false)


def _materials(
    experiment: Experiment, settings: Profile, load: Callable[[Profile, bool], _Loaded]
) -> dict[str, _Material]:
    """The material of each variant; those whose features are made alike share it."""
    alike: dict[str, list[str]] = {}
    for name, variant in experiment.variants.items():
        alike.setdefault(json.dumps(variant.encoding, sort_keys=True), []).append(name)
    found: dict[str, _Material] = {}
    for names in alike.values():
        variants = [experiment.variants[name] for name in names]
        material = _material(experiment, replace(settings, **variants[0].encoding), load, variants)
        found |= dict.fromkeys(names, material)
    return found


def _machine() -> str:
    device = "GPU" if torch.accelerator.is_available() else "CPU"
    return f"{device}, {os.cpu_count()} cores, {platform.machine()}"


def _features(material: _Material) -> dict[str, Any]:
    """What a material's features were made from."""
    made_from = material.made_from.keys() - {"dataset", "sha256", "grids", "tokens"}
    return {key: material.made_from[key] for key in sorted(made_from)}


def _conditions(material: _Material, others: dict[str, _Material]) -> dict[str, Any]:
    """All that the figures of an experiment depend on besides variant, seed and code, as JSON holds it; no path.

    `others` are the materials of the variants with features of their own.
    """
    settings, sizes = material.profile, {}
    for name, part in material.splits.items():
        sizes[name] = {"images": len(part.image_rows), "captions": len(part.owner)}
    data: dict[str, Any] = {"kind": settings.data, "fingerprint": material.made_from["dataset"]}
    data |= {key: sum(size[key] for size in sizes.values()) for key in ("images", "captions")}
    if settings.data == "scenes":
        data |= {"count": settings.scene_count, "seed": settings.scene_seed, "version": SCENES_VERSION}
    features = {"features": _features(material)}
    if others:
        features["other_features"] = {name: _features(other) for name, other in others.items()}
    return {
        "data": data,
        "splits": {"seed": settings.split_seed, "sizes": sizes},
        **features,
        "protocol": {
            "negatives": f"{' and '.join(NEGATIVES)}, 1:1",
            "negatives_seed": _NEGATIVES_SEED,
            "threshold": "of highest accuracy on val",
            "pool": "all images and captions of test",
            "changed_captions": {fact: len(pairs.texts) for fact, (pairs, _) in material.changed.items()},
        },
        "profile": {key: value for key, value in asdict(settings).items() if key not in _OWN},
        "machine": _machine(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in _PACKAGES},
    }


def _statements(path: Path) -> str:
    """A module without comments and docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:]
    return ast.dump(tree)


@functools.cache
def code_digest() -> str:
    """A digest of the statements that figures depend on, of all modules of the package."""
    modules = [path for path in sorted(Path(__file__).parent.glob("*.py")) if path.stem not in _OTHER_CODE]
    return hashlib.sha256(json.dumps([[path.stem, _statements(path)] for path in modules]).encode()).hexdigest()[:16]


# --- runs ----------------------------------------------------------------------------------------


def _measure(fuser: PairFuser, material: _Material) -> dict[str, float]:
    """The figures of a trained fuser, by the names of `results.FIGURES`."""
    splits, test = material.splits, material.splits["test"]
    thresholds = choose_thresholds(fuser, splits["val"], _NEGATIVES_SEED)
    matching = matching_report(fuser, test, thresholds, _NEGATIVES_SEED)
    retrieval = retrieval_report(fuser, test)
    figures = {
        f"{name}.{kind}": getattr(row, name) for kind, row in matching.items() for name in ("accuracy", "roc_auc")
    }
    figures |= {f"{way}.r{k}": getattr(getattr(retrieval, way), f"r{k}") for way in DIRECTIONS for k in CUTS}
    figures["rsum"] = retrieval.rsum
    if material.changed:
        report = diagnostic_report(fuser, test, material.changed)
        figures |= {f"diagnostic.{fact}": row.accuracy for fact, row in report.items()}
    if "new" in splits:  # pools of one size, for a larger one is harder
        size = min(len(splits["new"].image_rows), len(test.image_rows))
        for name, part in (("known", test), ("new", splits["new"])):
            report = retrieval_report(fuser, subset(part, range(size)))
            figures |= {f"{name}.{way}.r1": getattr(report, way).r1 for way in DIRECTIONS}
    return figures


def _run(variant: Variant, seed: int, material: _Material) -> tuple[float, dict[str, float]]:
    """Train and judge once: the seconds of training, and the figures."""
    settings = replace(material.profile, **variant.settings, seed=seed)
    fuser = build_fuser(variant.fuser, settings, *material.splits["train"].dims, **variant.arguments)
    seconds = _train(fuser, material, settings, variant.false)
    if variant.lora:
        fuser = LoRATextFuser(fuser, material.text_encoder, variant.lora)
        seconds += _train(fuser, material, replace(settings, **variant.tuning), variant.false)
    if variant.corrected:
        fuser = HubnessCorrected(fuser, variant.corrected)
    return seconds, _measure(fuser, material)


def _train(fuser: PairFuser, material: _Material, settings: Profile, false: tuple[str, ...]) -> float:
    """Train, and the seconds that it took."""
    # processor time, since other programs on the machine do not add to it; it does not see a GPU's work
    clock = time.perf_counter if torch.accelerator.is_available() else time.process_time
    start, splits = clock(), material.splits
    fit_profile(fuser, splits["train"], splits["val"], settings, false=material.false.get(false))
    return clock() - start


def _as_of_today(old: Results) -> Results:
    """Settings that did not exist yet when it was written get their defaults, which are what was done then."""
    defaults = {field.name: field.default for field in fields(Profile) if field.default is not MISSING}
    profile = {key: value for key, value in defaults.items() if key not in _OWN} | old.conditions.get("profile", {})
    variants = {name: json.loads(json.dumps(asdict(Variant(**settings)))) for name, settings in old.variants.items()}
    return replace(old, conditions=old.conditions | {"profile": profile}, variants=variants)


def _kept(path: Path, fresh: Results) -> Results:
    """`fresh` with the runs of the file whose conditions are still the same; a line says what is not."""
    if not path.is_file():
        return fresh
    old = _as_of_today(read_results(path))
    if changed := [key for key in fresh.conditions if old.conditions.get(key) != fresh.conditions[key]]:
        print(f"{fresh.name}: other {', '.join(changed)} than in {path.name}; it starts anew", flush=True)
        return fresh
    same = {name for name, settings in fresh.variants.items() if old.variants.get(name) == settings}
    runs = tuple(run for run in old.runs if run.variant in same)
    if len(runs) < len(old.runs):
        dropped = ", ".join(sorted({run.variant for run in old.runs} - same))
        print(f"{fresh.name}: the runs of {dropped} were of other settings; they are dropped", flush=True)
    if stale := sum(run.code != code_digest() for run in runs):
        print(f"{fresh.name}: {stale} runs are of earlier code; to take them anew delete {path.name}", flush=True)
    return replace(fresh, runs=runs)


def run_experiment(
    experiment: Experiment, folder: Path, seeds: int | None = None, load: Callable[[Profile, bool], _Loaded] = _load
) -> Results | None:
    """Take the runs of an experiment that `folder` does not hold yet, and keep each as soon as it is finished.

    A run that is there is taken again only if its conditions (see `Results.conditions`) or its variant's settings have
    changed. Without a folder of photos an experiment on photos is skipped, and None is returned.
    """
    seeds = experiment.seeds if seeds is None else seeds
    if seeds < 1:
        raise MmkitError(f"seeds is {seeds}; an experiment takes at least one.")
    code = code_digest()  # before anything is computed: the files may change while it runs
    settings = profile(_PROFILES[experiment.data], **experiment.settings)
    if settings.data == "folder" and settings.coco_root is None:
        print(f"{experiment.name}: skipped, it needs photos. Remedy: set MMKIT_COCO_ROOT", flush=True)
        return None
    of = _materials(experiment, settings, load)
    others = {name: of[name] for name in of if experiment.variants[name].encoding}
    path = folder / f"{experiment.name}.json"
    fresh = Results(
        **{key: getattr(experiment, key) for key in ("name", "question", "reference", "columns", "compared")},
        command=f"python -m mmkit results --only {experiment.name}",
        conditions=_conditions(of[experiment.reference], others),
        variants=json.loads(json.dumps({name: asdict(variant) for name, variant in experiment.variants.items()})),
    )
    results = _kept(path, fresh)
    done, names = {(run.variant, run.seed) for run in results.runs}, list(experiment.variants)
    todo = [run for run in experiment.runs(seeds) if run not in done]
    print(f"{experiment.name}: {len(todo)} runs to take, {len(done)} taken before", flush=True)
    for name, seed in todo:
        start = time.perf_counter()
        seconds, figures = _run(experiment.variants[name], seed, of[name])
        run = Run(name, seed, code, round(seconds, 3), figures)
        runs = sorted((*results.runs, run), key=lambda run: (run.seed, names.index(run.variant)))
        results = replace(results, runs=tuple(runs))
        write_results(path, results)
        found = f"accuracy {100 * figures['accuracy.random']:.1f} %, rsum {figures['rsum']:.0f}"
        print(f"{experiment.name}: {name}, seed {seed}: {found}; {time.perf_counter() - start:.1f} s", flush=True)
    write_results(path, results)  # the question or the columns may be new
    return results


def run_experiments(folder: Path, only: Sequence[str] = (), seeds: int | None = None) -> None:
    """`run_experiment` for all of `EXPERIMENTS`, or those whose name begins with one of `only`.

    One that cannot be run does not keep the others from it; its error comes at the end. README's tables are written
    from the JSON, if `folder` is the checkout's `notebooks/results`.
    """
    chosen = [experiment for name, experiment in EXPERIMENTS.items() if not only or name.startswith(tuple(only))]
    if not chosen:
        raise MmkitError(f"No experiment {' '.join(only)}. Valid names: {', '.join(EXPERIMENTS)}")
    load = functools.cache(_load)  # experiments on the same data share it
    failed: dict[str, list[str]] = {}  # by message: what one fault stops is told once
    for experiment in chosen:
        try:
            run_experiment(experiment, folder, seeds, load)
        except MmkitError as error:
            failed.setdefault(str(error), []).append(experiment.name)
    folder = folder.resolve()
    if folder.parts[-len(FOLDER.parts) :] == FOLDER.parts:
        _rewrite_tables(folder.parents[len(FOLDER.parts) - 1] / "README.md", folder)
    if failed:
        raise MmkitError("\n".join(f"not finished: {', '.join(names)}. {why}" for why, names in failed.items()))


def _rewrite_tables(readme: Path, folder: Path) -> None:
    if readme.is_file():
        text = readme.read_text(encoding="utf-8")
        write_whole(readme, with_section(text, results_section(folder, list(EXPERIMENTS))))
        print("README.md: tables written from the JSON", flush=True)
