"""One loop for every fuser, and the checkpoints it leaves."""

import contextlib
import copy
import io
import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from .errors import MissingFile, MmkitError
from .features import PairedFeatures
from .fusers import MultimodalFeatureFuser, PairFuser
from .graphs import MultimodalGNN
from .losses import contrastive_loss, matching_loss, sample_negatives
from .profiles import Profile
from .progress import progress

FUSERS: dict[str, type[PairFuser]] = {"mlp": MultimodalFeatureFuser, "gnn": MultimodalGNN}


def build_fuser(name: str, profile: Profile, image_dim: int, text_dim: int) -> PairFuser:
    """The fuser called `name` with the profile's sizes, its weights drawn from the profile's seed."""
    if name not in FUSERS:
        raise MmkitError(f"No fuser {name!r}. Valid names: {', '.join(FUSERS)}")
    set_seed(profile.seed)
    dropouts = {"dropout": profile.dropout, "feature_dropout": profile.feature_dropout}
    if name == "mlp":
        return MultimodalFeatureFuser(image_dim, text_dim, profile.fusion_dim, **dropouts)
    return MultimodalGNN(
        image_dim, text_dim, profile.hidden_dim, profile.heads, profile.layers, profile.neighbours, **dropouts
    )


def fit_profile(fuser: PairFuser, train: PairedFeatures, validation: PairedFeatures, profile: Profile) -> "History":
    """`fit` with the profile's settings."""
    names = ("epochs", "batch_size", "learning_rate", "weight_decay", "contrastive_weight", "matching_weight", "seed")
    return fit(fuser, train, validation, **{name: getattr(profile, name) for name in names})


class PairBatches(Dataset):
    """One item per caption, read a whole batch at a time.

    A batch of `B` captions is `images` `(U, image_dim)`, each image once, `texts` `(B, text_dim)`, and `owner`
    `(B,)`, the row in `images` of each caption's image.
    """

    def __init__(self, features: PairedFeatures) -> None:
        self.features = features

    def __len__(self) -> int:
        return len(self.features.owner)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        images, owner = self.features.owner[list(indices)].unique(return_inverse=True)
        return self.features.images(images), self.features.captions(indices), owner


class _PairLosses(nn.Module):
    """The losses of a batch, as one module, so that an engine can wrap the whole computation."""

    def __init__(self, fuser: PairFuser) -> None:
        super().__init__()
        self.fuser = fuser

    def forward(self, images: Tensor, texts: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
        image_nodes, text_nodes = self.fuser.nodes(images, texts)
        image_nodes = image_nodes.index_select(0, owner)  # whose backward, unlike indexing's, adds in a fixed order
        contrastive = contrastive_loss(image_nodes, text_nodes, self.fuser.log_temperature, owner)
        image_rows, text_rows = sample_negatives(image_nodes, text_nodes, owner)
        logits = self.fuser.match(
            torch.cat([image_nodes, image_nodes.index_select(0, image_rows)]),
            torch.cat([text_nodes, text_nodes.index_select(0, text_rows)]),
        )
        matched = torch.arange(len(logits), device=logits.device) < len(owner)
        return contrastive, matching_loss(logits, matched)


@dataclass
class History:
    """What `fit` saw: one row per epoch with mean losses, and the epoch whose weights were kept (from 0)."""

    rows: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.rows]


def _warmup_cosine(step: int, warmup: int, total: int) -> float:
    """A linear warm-up, then cosine annealing to zero (Loshchilov & Hutter 2017, eq. 5)."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1 + torch.cos(torch.tensor(torch.pi * min(1.0, done))).item())


def _weight_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; biases, scales and the temperature do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def fit(
    fuser: PairFuser,
    train: PairedFeatures,
    validation: PairedFeatures,
    *,
    epochs: int = 15,
    batch_size: int = 256,
    learning_rate: float = 1e-4,
    weight_decay: float = 0.01,
    contrastive_weight: float = 1.0,
    matching_weight: float = 1.0,
    clip: float = 1.0,
    seed: int = 0,
) -> History:
    """Train `fuser` in place by contrastive + cross-entropy loss, and keep the epoch of lowest validation loss.

    AdamW with a peak of `learning_rate`, a tenth of the steps as warm-up, then cosine annealing; gradients are
    clipped to norm `clip`. Input features are standardised by the training set's statistics. The device and
    the processes are Accelerate's. A loss that is not finite stops with the step and advice.
    """
    if epochs < 1:
        raise MmkitError(f"epochs is {epochs}; training takes at least one.")
    set_seed(seed)
    rows = torch.randperm(len(train.image_rows))[:20_000]
    fuser.check_sizes(train.images(rows[:1]), train.captions(slice(0, 1)))
    fuser.standardize_images.fit(train.images(rows))
    fuser.standardize_texts.fit(train.captions(torch.randperm(len(train.owner))[:20_000]))

    accelerator = Accelerator()
    losses = _PairLosses(fuser)
    loader = DataLoader(PairBatches(train), batch_size, shuffle=True, collate_fn=lambda batch: batch)
    optimizer = torch.optim.AdamW(_weight_groups(losses, weight_decay), lr=learning_rate)
    total = epochs * len(loader)
    scheduler = LambdaLR(optimizer, lambda step: _warmup_cosine(step, max(1, total // 10), total))
    losses, optimizer, loader, scheduler = accelerator.prepare(losses, optimizer, loader, scheduler)
    history, best = History(), copy.deepcopy(fuser.state_dict())
    for epoch in progress(range(epochs), "training", unit="epochs"):
        losses.train()
        sums = torch.zeros(2)
        for step, batch in enumerate(loader):
            contrastive, matching = losses(*batch)
            loss = contrastive_weight * contrastive + matching_weight * matching
            if not torch.isfinite(loss):
                raise MmkitError(
                    f"The loss is {loss.item()} in epoch {epoch}, step {step}. Remedy: lower learning_rate "
                    f"({learning_rate}), or look for NaN in the features."
                )
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(losses.parameters(), clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            sums += torch.stack([contrastive, matching]).detach().cpu()
        contrastive, matching = (sums / len(loader)).tolist()
        row = {"contrastive": contrastive, "matching": matching, "temperature": fuser.log_temperature.exp().item()}
        row["loss"] = contrastive_weight * contrastive + matching_weight * matching
        held_out = validation_losses(fuser, validation, batch_size, seed)
        row |= {f"validation_{name}": value for name, value in zip(("contrastive", "matching"), held_out, strict=True)}
        row["validation_loss"] = contrastive_weight * held_out[0] + matching_weight * held_out[1]
        if not math.isfinite(row["validation_loss"]):
            raise MmkitError(
                f"The validation loss is {row['validation_loss']} after epoch {epoch}. Remedy: lower learning_rate "
                f"({learning_rate}), or look for NaN in the features of the validation split."
            )
        history.rows.append(row)
        if row["validation_loss"] <= min(history.column("validation_loss")):
            history.best_epoch, best = epoch, copy.deepcopy(fuser.state_dict())
    fuser.load_state_dict(best)
    fuser.eval()
    return history


@torch.no_grad()
def validation_losses(fuser: PairFuser, features: PairedFeatures, batch_size: int, seed: int) -> tuple[float, float]:
    """Mean contrastive and matching loss over `features`, in batches and with negatives fixed by `seed`."""
    fuser.eval()
    device = next(fuser.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        PairBatches(features), batch_size, shuffle=True, generator=generator, collate_fn=lambda batch: batch
    )
    losses = _PairLosses(fuser)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rows = [torch.stack(losses(*(part.to(device) for part in batch))) for batch in loader]
    contrastive, matching = torch.stack(rows).mean(dim=0).tolist()
    return contrastive, matching


# --- checkpoints -------------------------------------------------------------------------------


def check_free_for_checkpoint(folder: Path) -> None:
    """Refuse a place that holds anything but an earlier checkpoint; a long training asks before it starts."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "training.json").is_file()):
        raise MmkitError(f"{folder} holds other files. Remedy: name a new folder for the checkpoint.")


def save_checkpoint(
    folder: str | Path,
    fuser: PairFuser,
    name: str,
    profile: Profile,
    thresholds: dict[str, float],
    history: History,
    weights: dict[str, str],
) -> Path:
    """Write `model.safetensors`, `config.json` and `training.json` into `folder`, whole or not at all.

    `thresholds` are the match logits chosen on the validation split, per kind of negatives; `weights` the digests
    of the encoders. An earlier checkpoint of that name is replaced; any other folder is left alone.
    """
    folder = Path(folder)
    check_free_for_checkpoint(folder)
    settings = {key: value for key, value in asdict(profile).items() if key not in ("cache", "coco_root")}
    training = {
        "fuser": name,
        "profile": settings,
        "thresholds": thresholds,
        "weights": weights,
        "history": asdict(history),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
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
