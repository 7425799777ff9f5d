"""A trained fuser on disk, with all that is needed to judge it again."""

import contextlib
import io
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError

from .cards import model_card
from .errors import MissingFile, MmkitError
from .features import PairedFeatures
from .fusers import PairFuser
from .profiles import Profile
from .training import FUSERS, History


def check_free_for_checkpoint(folder: Path) -> None:
    """Refuse a place that holds anything but an earlier checkpoint; a long training asks before it starts."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "training.json").is_file()):
        raise MmkitError(f"{folder} holds other files. Remedy: name a new folder for the checkpoint.")


def training_recipe(
    name: str, profile: Profile, weights: dict[str, str], data: str = "", false: Sequence[str] = (), accumulate: int = 1
) -> dict:
    """What a training is decided by, as `training.json` keeps it.

    `weights` are the digests of the encoders, `data` one of the training and validation splits, `false` the facts in
    whose false captions it is trained too, and `accumulate` batches make a step.
    """
    settings = {key: value for key, value in asdict(profile).items() if key not in ("cache", "coco_root")}
    found = {"fuser": name, "profile": settings, "weights": weights, "data": data}
    return found | {"false": list(false), "accumulate": accumulate}


def is_trained(folder: str | Path, by: dict) -> bool:
    """Whether `folder` holds a whole checkpoint that was trained `by` this `training_recipe`."""
    try:
        training = load_checkpoint(folder)[1]
    except MmkitError:
        return False
    return all(training.get(key) == value for key, value in json.loads(json.dumps(by)).items())


def save_checkpoint(
    folder: str | Path,
    fuser: PairFuser,
    by: dict,
    thresholds: dict[str, float],
    history: History,
    train: PairedFeatures | None = None,
    report: dict | None = None,
) -> Path:
    """Write `model.safetensors`, `config.json`, `training.json` and a model card into `folder`, whole or not at all.

    `by` is the `training_recipe`; `thresholds` are the match logits chosen on the validation split, per kind of
    negatives. The card, `README.md`, also tells the size of `train`, the training split, and the figures of an
    evaluation, a `report` of `report_json`. An earlier checkpoint of that name is replaced; any other folder is left
    alone. On a full disk the earlier one stays, and the error says so.
    """
    folder = Path(folder)
    check_free_for_checkpoint(folder)
    training = by | {"thresholds": thresholds, "history": asdict(history)}
    if train is not None:
        training["train"] = {"images": len(train.image_rows), "captions": len(train.owner)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model_card(fuser, training, report).save(beside / "README.md")
        fuser.save_pretrained(beside)
        (beside / "training.json").write_text(json.dumps(training, indent=1))
        beside.chmod(0o755)
        if folder.exists():
            old = beside.with_name(beside.name + ".old")
            folder.replace(old)
            beside.replace(folder)
            shutil.rmtree(old)
        else:
            beside.replace(folder)
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        raise MmkitError(
            f"The checkpoint cannot be written to {folder} ({error}); what was there is kept. "
            "Remedy: free space on its disk."
        ) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def load_checkpoint(folder: str | Path) -> tuple[PairFuser, dict]:
    """The fuser that `save_checkpoint` wrote, in eval mode, and the content of its `training.json`."""
    folder = Path(folder)
    absent = [name for name in ("training.json", "config.json", "model.safetensors") if not (folder / name).is_file()]
    if absent:
        raise MissingFile(
            f"{folder} is no checkpoint: it lacks {', '.join(absent)}. Remedy: python -m mmkit train --out {folder}"
        )
    try:
        training = json.loads((folder / "training.json").read_text())
        with contextlib.redirect_stdout(io.StringIO()):  # the hub's mixin prints to standard output
            fuser = FUSERS[training["fuser"]].from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise MmkitError(f"The checkpoint {folder} is damaged ({error}). Remedy: train again.") from None
    return fuser.eval(), training
