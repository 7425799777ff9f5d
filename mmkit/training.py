"""One loop for every fuser."""

import copy
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Sampler

from .baselines import RegularizedCCA, TwoTower
from .errors import MmkitError
from .features import FalseCaptions, PairedFeatures, cat_parts
from .fusers import GatedFuser, MultimodalFeatureFuser, PairFuser
from .graphs import HeteroGNN, MultimodalGNN
from .losses import contradiction_loss, info_nce, matching_loss, sample_negatives
from .parts import CrossAttentionFuser, RegionWordGNN
from .profiles import Profile
from .progress import progress
from .states import load_state, save_state

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


def build_fuser(name: str, profile: Profile, image_dim: int, text_dim: int) -> PairFuser:
    """The fuser called `name` with the profile's sizes, its weights drawn from the profile's seed."""
    if name not in FUSERS:
        raise MmkitError(f"No fuser {name!r}. Valid names: {', '.join(FUSERS)}")
    set_seed(profile.seed)
    sizes = (image_dim, text_dim, profile.hidden_dim if "gnn" in name else profile.fusion_dim)
    dropouts = {"dropout": profile.dropout, "feature_dropout": profile.feature_dropout}
    if name == "gnn":
        return MultimodalGNN(*sizes, profile.heads, profile.layers, profile.neighbours, **dropouts)
    if name == "hetero-gnn":
        return HeteroGNN(*sizes, profile.layers, profile.neighbours, **dropouts)
    if name == "two-tower":
        return TwoTower(*sizes, profile.feature_dropout)
    if name == "cca":
        return RegularizedCCA(*sizes)
    if name == "cross-attention":
        return CrossAttentionFuser(*sizes[:2], profile.part_dim, profile.heads, **dropouts)
    if name == "region-word":
        return RegionWordGNN(*sizes[:2], profile.part_dim, profile.layers, profile.neighbours, **dropouts)
    return FUSERS[name](*sizes, **dropouts)


def fit_profile(
    fuser: PairFuser,
    train: PairedFeatures,
    validation: PairedFeatures,
    profile: Profile,
    state: Path | None = None,
    false: FalseCaptions | None = None,
) -> "History":
    """`fit` with the profile's settings. A closed form is solved: its history is one row, with 0 gradient steps."""
    if isinstance(fuser, RegularizedCCA):
        fuser.solve(train, validation, profile.seed)
        weights, row = (profile.contrastive_weight, profile.matching_weight), {"gradient_steps": 0.0}
        row["temperature"] = fuser.log_temperature.exp().item()
        for prefix, part in (("", train), ("validation_", validation)):
            losses = validation_losses(fuser, part, profile.batch_size, profile.seed)
            row |= {f"{prefix}contrastive": losses[0], f"{prefix}matching": losses[1]}
            row[f"{prefix}loss"] = weights[0] * losses[0] + weights[1] * losses[1]
        return History([row])
    names = ("epochs", "batch_size", "learning_rate", "weight_decay", "contrastive_weight", "matching_weight")
    settings = {name: getattr(profile, name) for name in (*names, "patience", "seed")}
    if fuser.takes_parts:
        settings["batch_size"] = profile.part_batch_size
    return fit(fuser, train, validation, **settings, state=state, false=false)


class Batch(NamedTuple):
    """`images` `(U, image_dim)`, each image once; `texts` `(B + 2·F, text_dim)`: B captions, F false ones, and the F
    true ones that those were made from; `owner` `(B,)`, the row in `images` of each caption's image, and `denied`
    `(F,)`, that of each false caption's. Images and texts are stacks where the fuser takes parts.
    """

    images: Tensor
    texts: Tensor
    owner: Tensor
    denied: Tensor


class PairBatches(Dataset):
    """One item per caption, read a whole batch at a time; each image of a batch brings one of its `false` captions,
    drawn evenly, if it has any."""

    def __init__(self, features: PairedFeatures, false: FalseCaptions | None = None) -> None:
        self.features, self.false = features, false
        if false is not None:
            owner = false.features.owner
            self.by_image = owner.argsort(stable=True)
            self.count = owner.bincount(minlength=len(features.image_rows))
            self.first = self.count.cumsum(0) - self.count

    def __len__(self) -> int:
        return len(self.features.owner)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        images, owner = self.features.owner[list(indices)].unique(return_inverse=True)
        texts, denied = self.features.captions(indices), owner[:0]
        if self.false is not None:
            denied = self.count[images].nonzero().flatten()
            chosen = self.first[images] + (torch.rand(len(images)) * self.count[images]).long()
            chosen = self.by_image[chosen[denied]]
            true = self.features.captions(self.false.captions[chosen])
            texts = cat_parts([texts, self.false.features.captions(chosen), true])
        return Batch(self.features.images(images), texts, owner, denied)


class _Order(Sampler[int]):
    """The captions of an epoch in an order that depends on the seed and the epoch alone, so that it can be resumed."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.epoch = count, seed, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(_epoch_seed(self.seed, self.epoch))
        return iter(torch.randperm(self.count, generator=generator).tolist())


def _epoch_seed(seed: int, epoch: int) -> int:
    return seed * 100_003 + epoch


class _PairLosses(nn.Module):
    """The losses of a batch, as one module, so that an engine can wrap the whole computation."""

    def __init__(self, fuser: PairFuser) -> None:
        super().__init__()
        self.fuser = fuser

    def forward(self, batch: Batch, hardness: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        count, owner = len(batch.owner), batch.owner
        image_nodes, text_nodes = self.fuser.nodes(batch.images, batch.texts)
        # index_select's backward, unlike indexing's, adds in a fixed order
        similarity = self.fuser.similarities(image_nodes, text_nodes[:count]).index_select(0, owner)
        contrastive = info_nce(similarity, self.fuser.log_temperature, owner)
        image_rows, text_rows = sample_negatives(similarity, owner, hardness)
        images = torch.cat([owner, owner.index_select(0, image_rows), batch.denied, batch.denied])
        captions = torch.arange(len(text_nodes), device=owner.device)
        texts = torch.cat([captions[:count], text_rows, captions[count:]])
        logits = self.fuser.match(image_nodes.index_select(0, images), text_nodes.index_select(0, texts))
        pairs, false, true = logits.tensor_split((count + len(text_rows), len(logits) - len(batch.denied)))
        matched = torch.arange(len(pairs), device=logits.device) < count
        contradiction = contradiction_loss(true, false) if len(false) else logits.new_zeros(())
        return contrastive, matching_loss(pairs, matched), contradiction


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


def _mixed_precision() -> str:
    """What Accelerate computes in: half precision where the device has it, as GPUs do."""
    if not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


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
    patience: int = 0,
    seed: int = 0,
    state: Path | None = None,
    false: FalseCaptions | None = None,
) -> History:
    """Train `fuser` in place by contrastive + cross-entropy loss, and keep the epoch of lowest validation loss.

    AdamW with a peak of `learning_rate`, a tenth of the steps as warm-up, then cosine annealing; gradients are
    clipped to norm `clip`. Input features are standardised by the training set's statistics. With `patience` the
    training ends after so many epochs without a lower validation loss. The device, the processes and, on a GPU,
    half precision are Accelerate's. A loss that is not finite stops with the step, the images and advice.

    `state` names a file in which each finished epoch is kept; a training that was broken off goes on from there, and
    ends in the same weights on the same device. The caller deletes the file when the fuser is safe.

    The matching loss meets, for each pair, a random unmatched one and one that is drawn by similarity, the more sharply
    the longer the training lasts: its `hardness` (see `sample_negatives`) goes from 0 to 1 over the first half of the
    steps. `false` are captions with a fact changed, as `false_captions` makes them: each image of a batch brings one
    of its own, which has to have a lower logit than the true one (`contradiction_loss`).
    """
    if epochs < 1:
        raise MmkitError(f"epochs is {epochs}; training takes at least one.")
    if isinstance(fuser, RegularizedCCA):
        raise MmkitError("A CCA is solved, not stepped. Remedy: fit_profile, or fuser.solve(train, validation)")
    set_seed(seed)
    train, validation = fuser.view(train), fuser.view(validation)
    false = replace(false, features=fuser.view(false.features)) if false is not None else None
    fuser.observe(train)

    accelerator = Accelerator(mixed_precision=_mixed_precision())
    losses, order = _PairLosses(fuser), _Order(len(train.owner), seed)
    loader = DataLoader(PairBatches(train, false), batch_size, sampler=order, collate_fn=lambda batch: batch)
    optimizer = torch.optim.AdamW(_weight_groups(losses, weight_decay), lr=learning_rate)
    total = epochs * len(loader)
    scheduler = LambdaLR(optimizer, lambda step: _warmup_cosine(step, max(1, total // 10), total))
    losses, optimizer, loader, scheduler = accelerator.prepare(losses, optimizer, loader, scheduler)
    history, best = History(), copy.deepcopy(fuser.state_dict())
    weights = torch.tensor([contrastive_weight, matching_weight, 1.0])
    settings = [epochs, batch_size, learning_rate, weight_decay, contrastive_weight, matching_weight, clip, seed]
    sizes = [sum(p.numel() for p in fuser.parameters()), len(train.owner), len(validation.owner)]
    sizes.append(len(false.captions) if false is not None else 0)
    made_by = [type(fuser).__name__, sizes, settings]
    if state is not None and state.is_file():
        history, best = _resume(state, made_by, fuser, optimizer, scheduler)
    for epoch in progress(range(len(history.rows), epochs), "training", unit="epochs"):
        if patience and len(history.rows) - 1 - history.best_epoch >= patience:
            break
        set_seed(_epoch_seed(seed, epoch))
        order.epoch = epoch
        losses.train()
        sums = torch.zeros(3)
        for step, batch in enumerate(loader):
            parts = torch.stack(losses(batch, min(1.0, 2 * (epoch * len(loader) + step) / total)))
            loss = parts @ weights.to(parts)
            if not torch.isfinite(loss):
                images = _suspects(train, order, step, batch_size)
                raise MmkitError(
                    f"The loss is {loss.item()} in epoch {epoch}, step {step}, images {images}. "
                    f"Remedy: lower learning_rate ({learning_rate}), or look for NaN in the features."
                )
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(losses.parameters(), clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            sums += parts.detach().cpu()
        means = sums / len(loader)
        row = dict(zip(("contrastive", "matching", "contradiction"), means.tolist(), strict=True))
        row |= {"temperature": fuser.log_temperature.exp().item(), "loss": float(means @ weights)}
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
        if state is not None and accelerator.is_main_process:
            facts = {"made_by": made_by, "history": asdict(history), "scheduler": scheduler.scheduler.state_dict()}
            modules = {"fuser": fuser.state_dict(), "best": best}
            save_state(state, modules, optimizer.optimizer.state_dict(), facts)
    fuser.load_state_dict(best)
    fuser.eval()
    return history


def _suspects(train: PairedFeatures, order: _Order, step: int, batch_size: int) -> str:
    """The images of a step whose features are not finite, or of all the step, for an error message."""
    captions = list(order)[step * batch_size : (step + 1) * batch_size]
    rows = train.owner[captions].unique()
    broken = [row for row in rows.tolist() if not torch.isfinite(train.images([row])).all()]
    ids = train.image_ids[broken or rows].tolist()
    what = "with features that are not finite" if broken else "of the batch"
    return f"{what}: {', '.join(map(str, ids[:5]))}{', …' if len(ids) > 5 else ''}"


def _resume(
    state: Path, made_by: list, fuser: PairFuser, optimizer: AcceleratedOptimizer, scheduler: AcceleratedScheduler
) -> tuple[History, dict[str, Tensor]]:
    """Put all back to where the kept state was; its history, and the best weights so far."""
    modules, optimizer_state, facts = load_state(state)
    if facts["made_by"] != json.loads(json.dumps(made_by)):
        raise MmkitError(f"{state} is of another training. Remedy: name another file, or delete it to start again.")
    fuser.load_state_dict(modules["fuser"])
    optimizer.optimizer.load_state_dict(optimizer_state)
    scheduler.scheduler.load_state_dict(facts["scheduler"])
    return History(**facts["history"]), modules["best"]


@torch.no_grad()
def validation_losses(fuser: PairFuser, features: PairedFeatures, batch_size: int, seed: int) -> tuple[float, float]:
    """Mean contrastive and matching loss over `features`, in batches and with negatives fixed by `seed`."""
    fuser.eval()
    features = fuser.view(features)
    device = next(fuser.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        PairBatches(features), batch_size, shuffle=True, generator=generator, collate_fn=lambda batch: batch
    )
    losses = _PairLosses(fuser)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rows = [torch.stack(losses(Batch(*(part.to(device) for part in batch)))) for batch in loader]
    contrastive, matching, _ = torch.stack(rows).mean(dim=0).tolist()
    return contrastive, matching
