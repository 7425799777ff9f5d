"""The fusers by name, and a trained one on disk with all that is needed to judge it again."""

import contextlib
import inspect
import io
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from accelerate.utils import set_seed
from huggingface_hub import ModelCard
from safetensors import SafetensorError

from .baselines import RegularizedCCA, TwoTower
from .evaluation import DIRECTIONS, Matching, Retrieval
from .features import PairedFeatures
from .fusers import GatedFuser, MultimodalFeatureFuser, PairFuser
from .graphs import HeteroGNN, MultimodalGNN
from .profiles import Profile
from .regions import CrossAttentionFuser, RegionWordGNN
from .support import MissingFile, MmkitError
from .training import History

FUSERS: dict[str, type[PairFuser]] = {
    "mlp": MultimodalFeatureFuser,
    "gnn": MultimodalGNN,
    "hetero-gnn": HeteroGNN,
    "gated": GatedFuser,
    "two-tower": TwoTower,
    "cca": RegularizedCCA,
    "cross-attention": CrossAttentionFuser,
    "region-word": RegionWordGNN,
}
_FILES = ("training.json", "config.json", "model.safetensors")


def build_fuser(name: str, profile: Profile, image_dim: int, text_dim: int, **arguments: object) -> PairFuser:
    """The fuser called `name` with the profile's sizes, its weights drawn from the profile's seed.

    Further `arguments` are those of its class, such as `paths="product"` of "mlp" or `edges="attention"` of "gnn"."""
    if name not in FUSERS:
        raise MmkitError(f"No fuser {name!r}. Valid names: {', '.join(FUSERS)}")
    set_seed(profile.seed)
    dropouts = {"dropout": profile.dropout, "feature_dropout": profile.feature_dropout}
    graph = {"layers": profile.layers, "neighbours": profile.neighbours}
    settings: dict[str, object] = {
        "mlp": {"fusion_dim": profile.fusion_dim} | dropouts,
        "gated": {"fusion_dim": profile.fusion_dim} | dropouts,
        "gnn": {"hidden_dim": profile.hidden_dim, "heads": profile.heads} | graph | dropouts,
        "hetero-gnn": {"hidden_dim": profile.hidden_dim} | graph | dropouts,
        "two-tower": {"width": profile.fusion_dim, "feature_dropout": profile.feature_dropout},
        "cca": {"width": profile.fusion_dim},
        "cross-attention": {"width": profile.part_dim, "heads": profile.heads} | dropouts,
        "region-word": {"width": profile.part_dim, "feature_dropout": profile.feature_dropout} | graph,
    }[name]
    return FUSERS[name](image_dim, text_dim, **(settings | arguments))


def check_free_for_checkpoint(folder: Path) -> None:
    """Refuse a place that holds anything but an earlier checkpoint; a long training asks before it starts."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "training.json").is_file()):
        raise MmkitError(f"{folder} holds other files. Remedy: name a new folder for the checkpoint.")


def training_recipe(name: str, profile: Profile, weights: dict[str, str], data: str = "", false: Sequence[str] = (),
                    accumulate: int = 1) -> dict:  # fmt: skip
    """What a training is decided by, as `training.json` keeps it: `weights` are the digests of the encoders, `data` one
    of the splits, `false` the facts of the false captions that are learnt from, and `accumulate` batches a step."""
    settings = {key: value for key, value in asdict(profile).items() if key not in ("cache", "coco_root")}
    recipe = {"fuser": name, "profile": settings, "weights": weights, "data": data}
    return recipe | {"false": list(false), "accumulate": accumulate}


def save_checkpoint(folder: str | Path, fuser: PairFuser, recipe: dict, thresholds: dict[str, float], history: History,
                    train: PairedFeatures | None = None, report: dict | None = None) -> Path:  # fmt: skip
    """Write `model.safetensors`, `config.json`, `training.json` and a model card into `folder`, whole or not at all.

    `recipe` is the `training_recipe`; the card, `README.md`, also tells the size of `train`, the training split, and
    figures of a `report` of `report_json`. An earlier checkpoint is replaced; any other folder is left alone."""
    folder = Path(folder)
    check_free_for_checkpoint(folder)
    training = recipe | {"thresholds": thresholds, "history": asdict(history)}
    if train is not None:
        training["train"] = {"images": len(train), "captions": len(train.image_index)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model_card(fuser, training, report).save(beside / "README.md")
        fuser.save_pretrained(beside)
        (beside / "training.json").write_text(json.dumps(training, indent=1))
        beside.chmod(0o755)
        old = beside.with_name(f"{beside.name}.old")
        if folder.exists():
            folder.replace(old)
        beside.replace(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        what = f"The checkpoint cannot be written to {folder} ({error}); what was there is kept."
        raise MmkitError(f"{what} Remedy: free space on its disk.") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def load_checkpoint(folder: str | Path) -> tuple[PairFuser, dict]:
    """The fuser that `save_checkpoint` wrote, in eval mode, and the content of its `training.json`."""
    folder = Path(folder)
    if absent := [name for name in _FILES if not (folder / name).is_file()]:
        remedy = f"python -m mmkit train --out {folder}"
        raise MissingFile(f"{folder} is no checkpoint: it lacks {', '.join(absent)}. Remedy: {remedy}")
    try:
        training = json.loads((folder / "training.json").read_text())
        with contextlib.redirect_stdout(io.StringIO()):  # the hub's mixin prints to standard output
            fuser = FUSERS[training["fuser"]].from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise MmkitError(f"The checkpoint {folder} is damaged ({error}). Remedy: train again.") from None
    return fuser.eval(), training


def report_json(features: PairedFeatures, matching: dict[str, Matching], retrieval: Retrieval) -> dict:
    """Both reports as plain numbers, fractions but for sizes, median ranks and rsum (percent); "constants" is what the
    answers "always" and "never" score at 1:1."""
    intervals = {kind: row.intervals for kind, row in matching.items()} | {"retrieval": retrieval.intervals}
    figures = ("accuracy", "f1", "roc_auc", "average_precision")
    return {
        "sizes": {"images": len(features), "captions": len(features.image_index)},
        "matching": {kind: {name: getattr(row, name) for name in figures} for kind, row in matching.items()},
        "retrieval": {name: asdict(getattr(retrieval, name)) for name in DIRECTIONS},
        "rsum": retrieval.rsum,
        "constants": {
            name: {"accuracy": 0.5, "f1": f1, "average_precision": 0.5}
            for name, f1 in (("always", 2 / 3), ("never", 0.0))
        },
        "intervals": {part: {name: row._asdict() for name, row in rows.items()} for part, rows in intervals.items()},
    }


def model_card(fuser: PairFuser, training: dict, report: dict | None = None) -> ModelCard:
    """The card of a fuser, from `card.md`, the content of a checkpoint's `training.json` and perhaps the `report` of an
    evaluation. It holds no path of the machine."""
    profile, history, data = training["profile"], training["history"], fuser.generate_model_card().data
    data.language, data.tags = "en", [*data.tags, "image-text-matching", "image-text-retrieval"]
    data.datasets = ["drawn-scenes" if profile["data"] == "scenes" else "imagefolder"]  # of one's own: the hub's word
    names = [profile["image_encoder"], profile["text_encoder"]]
    folders = [Path(name.removeprefix("hf:")) for name in names]
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("card.md")),
        fuser=fuser,
        training=training,
        what=inspect.getdoc(type(fuser)).splitlines()[0],
        encoders=[f"hf:{path.name}" if path.is_absolute() else name for name, path in zip(names, folders, strict=True)],
        digests=[training["weights"].get(name, "not recorded") for name in names],
        best=history["rows"][history["best_epoch"]] if history["rows"] else None,
        report=report,
    )
