"""The one knob of the course: every size, encoder, path and epoch count, by name."""

import os
from dataclasses import dataclass, fields
from pathlib import Path

from .support import MmkitError

CHECKOUT = Path(__file__).resolve().parent.parent


def _cache_folder() -> Path:
    """`MMKIT_CACHE`, else `build/cache` of a source checkout, else the user's cache folder."""
    if os.environ.get("MMKIT_CACHE"):
        return Path(os.environ["MMKIT_CACHE"]).expanduser().resolve()
    if (CHECKOUT / "pyproject.toml").is_file():
        return CHECKOUT / "build" / "cache"
    return Path.home() / ".cache" / "mmkit"


def _coco_folder(root: str | Path) -> Path:
    """A relative path counts from the working directory, or else (a notebook's is `notebooks/`) from the checkout."""
    root = Path(root).expanduser()
    return (CHECKOUT / root if not root.exists() and (CHECKOUT / root).exists() else root).resolve()


@dataclass(frozen=True)
class Profile:
    """Every setting of a run. Make one with `profile()`; change it there too.

    `image_size` is the side of the square that an encoder sees, in pixels, 0 for its own; `squash` shows it the whole
    picture, deformed, instead of the centre. `skip_missing` leaves out images without their file, an error otherwise.
    `max_tokens` counts [CLS] and [SEP]; fractions are of images; `neighbours` is k of the k-nearest-neighbour graph.
    `part_…` are the settings of fusers of parts, whose steps cost more; `learning_rate` is AdamW's peak; where
    `patience` is not 0, training ends after so many epochs without a lower validation loss."""

    name: str
    data: str  # "scenes": drawn by the package; "folder": a COCO-captions folder on disk
    cache: Path
    coco_root: Path | None = None
    skip_missing: bool = False
    scene_count: int = 1500
    scene_seed: int = 0
    image_encoder: str = "efficientnet-lite0"
    image_size: int = 0
    squash: bool = False
    text_encoder: str = "minilm-l6"
    pooling: str = "mean"
    max_tokens: int = 64
    val_fraction: float = 0.1
    test_fraction: float = 0.2
    split_seed: int = 0
    precision: str = "auto"
    fusion_dim: int = 256
    hidden_dim: int = 256
    part_dim: int = 128
    dropout: float = 0.3
    feature_dropout: float = 0.3
    heads: int = 8
    layers: int = 1
    neighbours: int = 5
    epochs: int = 12
    batch_size: int = 512
    part_batch_size: int = 64
    part_epochs: int = 6
    part_learning_rate: float = 1e-3
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    contrastive_weight: float = 1.0
    matching_weight: float = 0.2
    patience: int = 0
    seed: int = 0

    def __repr__(self) -> str:  # a readable table without any path of the machine
        scenes = f"{self.scene_count:,} drawn scenes, seed {self.scene_seed}, and a tenth with new combinations"
        data = scenes if self.data == "scenes" else "a COCO-captions folder (MMKIT_COCO_ROOT)"
        apart = {"name", "data", "cache", "coco_root", "skip_missing", "scene_count", "scene_seed"}
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        shown = {"profile": self.name, "data": data} | shown
        return "\n".join(f"{key:<18} {value}" for key, value in shown.items())


_PROFILES: dict[str, dict[str, object]] = {
    "mini": dict(data="scenes"),
    "photos": dict(test_fraction=0.15, fusion_dim=512, hidden_dim=512, feature_dropout=0.6, epochs=16,
                   learning_rate=1e-3),
    "coco": dict(  # the sizes and the learning rate of the articles
        image_encoder="resnet50", text_encoder="bert-base-uncased", max_tokens=512, fusion_dim=1024, hidden_dim=512,
        epochs=30, learning_rate=1e-4,
    ),
}  # fmt: skip


def profile(name: str | None = None, **changes: object) -> Profile:
    """The settings called `name` (default: `MMKIT_PROFILE`, else "mini"), with `changes` applied (`epochs=20`)."""
    name = name or os.environ.get("MMKIT_PROFILE") or "mini"
    if name not in _PROFILES:
        raise MmkitError(f"No profile {name!r}. Valid names: {', '.join(_PROFILES)}")
    known = {f.name for f in fields(Profile)}
    if unknown := set(changes) - known:
        raise MmkitError(f"No setting {', '.join(sorted(unknown))}. Valid settings: {', '.join(sorted(known))}")
    settings = {"name": name, "data": "folder", "cache": _cache_folder()} | _PROFILES[name]
    if changes.get("coco_root"):  # a folder that is named is read, whatever the profile
        settings["data"] = "folder"
    settings |= changes
    settings["cache"] = Path(settings["cache"]).expanduser()
    root = settings.get("coco_root") or os.environ.get("MMKIT_COCO_ROOT")
    if settings["data"] == "folder" and root:
        settings["coco_root"] = _coco_folder(root)
    return Profile(**settings)  # type: ignore[arg-type]
