"""One loop for every fuser: lesson 3's, with devices and processes, and a state from which a killed run goes on."""

import os
import shutil
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DataLoaderConfiguration, reduce, set_seed
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, RandomSampler

from .baselines import RegularizedCCA
from .features import FalseCaptions, PairedFeatures, pad_cat
from .fusers import PairFuser
from .losses import Batch, JointLoss
from .profiles import Profile
from .support import MmkitError, progress


@dataclass
class History:
    """What `fit` saw: a row for each epoch with mean losses, and the epoch whose weights are kept (from 0)."""

    rows: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0

    def column(self, name: str) -> list[float]:
        """A loss, epoch by epoch."""
        return [row[name] for row in self.rows]


class PairBatches(Dataset):
    """One item per caption, read a batch at a time; each image of a batch brings one of its `false` captions, drawn
    evenly. Processes that share the pairs read their own; a batch that they cannot divide starts over at its end."""

    def __init__(self, features: PairedFeatures, losses: JointLoss, false: FalseCaptions | None = None) -> None:
        self.features, self.losses, self.false = features, losses, false
        if false is not None:
            if not np.array_equal(false.features.image_ids, features.image_ids):
                raise MmkitError("The false captions are of other images. Remedy: false_captions(dataset, train, …)")
            image_index = false.features.image_index
            self.by_image = image_index.argsort(stable=True)
            self.count = image_index.bincount(minlength=len(features))
            self.first = self.count.cumsum(0) - self.count

    def __len__(self) -> int:
        return len(self.features.image_index)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        filled = -(-len(indices) // self.losses.processes) * self.losses.processes
        captions = torch.as_tensor(indices)[torch.arange(filled) % len(indices)]
        images, image_index = self.features.image_index[captions].unique(return_inverse=True)
        texts, accused = [], image_index[:0]
        if self.false is not None:
            accused = self.count[images].nonzero().flatten()
            chosen = self.first[images] + (torch.rand(len(images)) * self.count[images]).long()
            chosen = self.by_image[chosen[accused]]
            texts = [self.false.features.captions(chosen), self.features.captions(self.false.captions[chosen])]
            by_image = image_index.argsort(stable=True)  # a pair for each image
            accused = by_image[torch.searchsorted(image_index[by_image], accused)]
        share = self.losses.share_of(len(captions)) if self.losses.shares_pairs else slice(None)
        rows, share_index = image_index[share].unique(return_inverse=True)
        texts = pad_cat([self.features.captions(captions[share]), *texts])
        return Batch(self.features.images(images[rows]), texts, image_index, accused, share_index)


def warmup_cosine(step: int, steps: int) -> float:
    """A tenth of the steps as linear warm-up, then cosine annealing to zero (Loshchilov & Hutter 2017, eq. 5)."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + torch.cos(torch.tensor(torch.pi * min(1.0, done))).item())


def adamw(model: nn.Module, profile: Profile) -> Optimizer:
    """AdamW, in which matrices decay and biases, scales and the temperature do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": profile.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=profile.learning_rate, fused=True)  # fused: one pass over the weights


def fit(fuser: PairFuser, train: PairedFeatures, validation: PairedFeatures, profile: Profile, *,
        false: FalseCaptions | None = None, state: Path | None = None, accumulate: int = 1,
        optimizer: Optimizer | None = None, schedule: Callable[[int, int], float] = warmup_cosine,
        losses: JointLoss | None = None,
        on_epoch: Callable[[dict[str, float]], object] | None = None) -> History:  # fmt: skip
    """Train `fuser` in place by the profile's settings and keep the epoch of lowest validation loss. A CCA is solved.
    `false` captions, as `false_captions` makes them, have to score below the true ones. `state` names a folder that
    keeps the last epoch: a training that was broken off goes on from there to the same weights; the caller deletes it.
    Gradients of `accumulate` batches make a step. `schedule` maps a step and their number to a factor of the rate, and
    `on_epoch` is called with each row of the history."""
    if isinstance(fuser, RegularizedCCA):
        fuser.solve(train, validation, profile.seed)  # in closed form: a history of one row
        losses = JointLoss(fuser.to(_accelerator(1).device))
        row = {"gradient_steps": 0.0, "temperature": fuser.log_temperature.exp().item()}
        row |= mean_losses(losses, train, profile, "") | mean_losses(losses, validation, profile, "validation_")
        return History([row])
    if fuser.takes_parts:  # which has settings of its own
        names = "batch_size", "epochs", "learning_rate"
        profile = replace(profile, **{name: getattr(profile, f"part_{name}") for name in names})
    if profile.epochs < 1:
        raise MmkitError(f"epochs is {profile.epochs}; training takes at least one.")
    set_seed(profile.seed)
    train, validation = fuser.view(train), fuser.view(validation)
    false = false and replace(false, features=fuser.view(false.features))
    fuser.observe(train)
    accelerator, losses, order = _accelerator(accumulate), losses or JointLoss(fuser), torch.Generator()
    batches = PairBatches(train, losses, false)
    sampler = RandomSampler(batches, generator=order)
    loader = DataLoader(batches, profile.batch_size, sampler=sampler, collate_fn=lambda batch: batch)
    loader = prepare_data_loader(loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True)
    optimizer = optimizer or adamw(losses, profile)
    accumulate = accelerator.gradient_accumulation_steps  # a launcher's number wins
    steps = profile.epochs * -(-len(loader) // accumulate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    made_by = profile, losses, optimizer, train, validation, false, accelerator.num_processes, accumulate
    # a copy: what is prepared may compute in half precision, and validation does not
    prepared = loader, *accelerator.prepare(copy(losses), optimizer, scheduler)
    saved = _Saved(accelerator, fuser, state, made_by)
    history, remaining = saved.history, range(len(saved.history.rows), profile.epochs)
    for epoch in progress(remaining, "training", unit="epochs") if accelerator.is_main_process else remaining:
        if profile.patience and len(history.rows) - 1 - history.best_epoch >= profile.patience:
            break
        seed = profile.seed * 100_003 + epoch  # so that an epoch can be taken up without those before it
        set_seed(seed)
        order.manual_seed(seed)
        row = _epoch(accelerator, prepared, profile, epoch)
        row["temperature"] = fuser.log_temperature.exp().item()
        row |= mean_losses(losses, validation, profile, "validation_")
        saved.take(row)
        if on_epoch is not None and accelerator.is_main_process:
            on_epoch(row)
    fuser.load_state_dict(fuser.state_dict() | saved.best)
    fuser.eval()
    return history


def _epoch(accelerator: Accelerator, prepared: tuple, profile: Profile, epoch: int) -> dict[str, float]:
    """One pass over the pairs: the mean losses."""
    loader, model, optimizer, scheduler = prepared
    model.train()
    weights, sums = torch.tensor([profile.contrastive_weight, profile.matching_weight, 1.0]), torch.zeros(3)
    for step, batch in enumerate(loader):
        # the negatives are drawn by similarity, the more sharply the longer the training lasts: 1 from half of it on
        hardness = min(1.0, 2 * (epoch * len(loader) + step) / (profile.epochs * len(loader)))
        with accelerator.accumulate(model):
            parts = torch.stack(model(batch, hardness))
            means = reduce(parts.detach(), "mean").cpu()
            if not torch.isfinite(loss := means @ weights):
                advice = _advice(loader.dataset.features, profile)
                raise MmkitError(f"The loss is {loss.item()} in epoch {epoch}, step {step}. {advice}")
            accelerator.backward(parts @ weights.to(parts))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        sums += means
    means = sums / len(loader)
    row = dict(zip(("contrastive", "matching", "contradiction"), means.tolist(), strict=True))
    return row | {"loss": float(means @ weights)}


@torch.no_grad()
def mean_losses(losses: JointLoss, features: PairedFeatures, profile: Profile, prefix: str) -> dict[str, float]:
    """Mean losses over `features`, in batches and with negatives fixed by the profile's seed; `prefix` names them.
    Processes that share the pairs have to call it together; all get the same."""
    losses.eval()
    features, device = losses.fuser.view(features), next(losses.parameters()).device
    generator, batches = torch.Generator().manual_seed(profile.seed), PairBatches(features, losses)
    loader = DataLoader(batches, profile.batch_size, shuffle=True, generator=generator, collate_fn=lambda batch: batch)
    with torch.random.fork_rng():
        torch.manual_seed(profile.seed)
        rows = [torch.stack(losses(Batch(*(part.to(device) for part in batch)))) for batch in loader]
    contrastive, matching, _ = reduce(torch.stack(rows).mean(dim=0), "mean").tolist()
    loss = profile.contrastive_weight * contrastive + profile.matching_weight * matching
    if not np.isfinite(loss):
        raise MmkitError(f"The {prefix}loss is {loss}. {_advice(features, profile)}")
    return {f"{prefix}contrastive": contrastive, f"{prefix}matching": matching, f"{prefix}loss": loss}


def _accelerator(accumulate: int) -> Accelerator:
    """Accelerate's engine. What its launcher says wins; else half precision where a GPU has it."""
    precision = "no"
    if torch.cuda.is_available():
        precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=None if "ACCELERATE_MIXED_PRECISION" in os.environ else precision,
        gradient_accumulation_steps=accumulate,
        dataloader_config=DataLoaderConfiguration(split_batches=True),  # the schedule counts batches of all processes
    )
    if accelerator.gradient_accumulation_steps < 1:
        raise MmkitError(f"accumulate is {accelerator.gradient_accumulation_steps}; a step takes at least one batch.")
    return accelerator


def _advice(features: PairedFeatures, profile: Profile) -> str:
    """What makes a loss that is not finite: features of some images or of their captions, or the learning rate."""
    both = (features.images, torch.arange(len(features))), (features.captions, features.image_index)
    rows = [(read, row, image) for read, of in both for row, image in enumerate(of.tolist())]
    broken = {int(features.image_ids[image]) for read, row, image in rows if not read([row]).isfinite().all()}
    if not broken:
        return f"All features are finite. Remedy: lower learning_rate ({profile.learning_rate})."
    some = ", ".join(map(str, sorted(broken)[:5]))
    return f"Not finite are features of the images {some} or of their captions. Remedy: extract them again."


class _Saved:
    """History and best weights of a training, kept in its `state` folder after each epoch by Accelerate."""

    def __init__(self, accelerator: Accelerator, fuser: PairFuser, folder: Path | None, made_by: tuple) -> None:
        self.accelerator, self.fuser, self.folder = accelerator, fuser, folder
        self.made_by, self.history, self.best = "\n".join(map(repr, made_by)), History(), self._learnt()
        accelerator.register_for_checkpointing(self)
        if folder is None or not (epochs := sorted(folder.glob("epoch-*"))):
            return
        try:
            if same := (epochs[-1] / "made_by.txt").read_text(encoding="utf-8") == self.made_by:
                accelerator.load_state(str(epochs[-1]))
        except Exception as error:  # there is little that a damaged pickle may not raise
            raise MmkitError(f"{epochs[-1]} holds no state of a training ({error}). Remedy: delete {folder}") from None
        if not same:
            raise MmkitError(f"{folder} is of another training. Remedy: name another, or delete it.")

    def _learnt(self) -> dict[str, Tensor]:
        """A copy of all of its state that training may change: not the frozen weights of an adapted encoder."""
        state = self.fuser.state_dict(keep_vars=True)
        frozen = {name for name, part in state.items() if isinstance(part, nn.Parameter) and not part.requires_grad}
        return {name: part.detach().clone() for name, part in state.items() if name not in frozen}

    def take(self, row: dict[str, float]) -> None:
        """Add an epoch's row, keep the weights if they are the best, and save."""
        self.history.rows.append(row)
        if row["validation_loss"] <= min(self.history.column("validation_loss")):
            self.history.best_epoch, self.best = len(self.history.rows) - 1, self._learnt()
        if self.folder is None:
            return
        part, earlier = self.folder / "part", list(self.folder.glob("epoch-*"))
        try:
            self.accelerator.save_state(str(part))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                (part / "made_by.txt").write_text(self.made_by, encoding="utf-8")
                part.rename(self.folder / f"epoch-{len(self.history.rows):04}")
                for epoch in earlier:
                    shutil.rmtree(epoch, ignore_errors=True)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(part, ignore_errors=True)
            raise MmkitError(
                f"The state of the training cannot be written to {self.folder} ({error}); the last one is kept. "
                "Remedy: free space on its disk, and run the same again: it goes on from there."
            ) from None

    # what `register_for_checkpointing` asks for
    def state_dict(self) -> dict:
        return {"rows": self.history.rows, "best_epoch": self.history.best_epoch, "best": self.best}

    def load_state_dict(self, state: dict) -> None:
        self.history.rows[:], self.history.best_epoch, self.best = state["rows"], state["best_epoch"], state["best"]
