"""One loop for every fuser."""

import json
import math
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import DataLoaderConfiguration, broadcast_object_list, set_seed
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from .baselines import RegularizedCCA, TwoTower
from .batches import ALONE, Batch, Order, PairBatches, Share, epoch_seed
from .errors import MmkitError
from .features import FalseCaptions, PairedFeatures
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


def build_fuser(name: str, profile: Profile, image_dim: int, text_dim: int, **arguments: object) -> PairFuser:
    """The fuser called `name` with the profile's sizes, its weights drawn from the profile's seed.

    Further `arguments` are those of its class, such as `paths="product"` of "mlp" or `edges="mutual"` of "gnn".
    """
    if name not in FUSERS:
        raise MmkitError(f"No fuser {name!r}. Valid names: {', '.join(FUSERS)}")
    set_seed(profile.seed)
    kind = FUSERS[name]
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
    return kind(image_dim, text_dim, **(settings | arguments))


def fit_profile(
    fuser: PairFuser,
    train: PairedFeatures,
    validation: PairedFeatures,
    profile: Profile,
    state: Path | None = None,
    false: FalseCaptions | None = None,
    accumulate: int = 1,
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
        settings |= {name: getattr(profile, f"part_{name}") for name in ("batch_size", "epochs", "learning_rate")}
    return fit(fuser, train, validation, **settings, accumulate=accumulate, state=state, false=false)


class _PairLosses(nn.Module):
    """The losses of a batch, as one module, so that an engine can wrap the whole computation.

    Where processes `share` the batch, each computes the nodes of its own images and texts, gathers the others', and
    matches the pairs of its own captions. The contrastive loss and the draws of negatives are those of the whole
    batch on every process; the other losses are the same after a mean over the processes.
    """

    def __init__(self, fuser: PairFuser, share: Share = ALONE) -> None:
        super().__init__()
        self.fuser, self.share, self.split = fuser, share, ALONE if fuser.whole_batch else share

    def forward(self, batch: Batch, hardness: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        count, owner, denied = len(batch.owner), batch.owner, batch.denied
        with self.share.own_randomness():
            own_nodes, text_nodes = self.fuser.nodes(batch.images, batch.texts)
        count_images = len(own_nodes) if self.split.count == 1 else int(owner.max()) + 1
        image_nodes = self.split.gather(own_nodes, count_images)
        text_nodes = self.split.gather(text_nodes, count + 2 * len(denied))
        similarity = self.split.gather(self.fuser.similarities(own_nodes, text_nodes[:count]), count_images)
        # index_select's backward, unlike indexing's, adds in a fixed order
        similarity = similarity.index_select(0, owner)
        contrastive = info_nce(similarity, self.fuser.log_temperature, owner)
        own, accused = self.share.of(count), self.share.of(len(denied))
        sampled = sample_negatives(similarity, owner, hardness)
        image_rows, text_rows = (rows.view(4, -1)[:, own].flatten() for rows in sampled)  # four for each caption
        captions = torch.arange(len(text_nodes), device=owner.device)
        images = torch.cat([owner[own], owner.index_select(0, image_rows), *[denied[accused]] * 2])
        texts = torch.cat([captions[own], text_rows, captions[count:].view(2, -1)[:, accused].flatten()])
        with self.share.own_randomness():
            logits = self.fuser.match(image_nodes.index_select(0, images), text_nodes.index_select(0, texts))
        positives, ranked = own.stop - own.start, accused.stop - accused.start
        pairs, false, true = logits.tensor_split((positives + len(text_rows), len(logits) - ranked))
        matched = torch.arange(len(pairs), device=logits.device) < positives
        contradiction = contradiction_loss(true, false) if ranked else logits.new_zeros(())
        matching = matching_loss(pairs, matched) * self.share.weight(count)
        return contrastive, matching, contradiction * self.share.weight(len(denied))


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


def _mixed_precision() -> str | None:
    """What Accelerate computes in: what its launcher says, else half precision where the device has it, as GPUs do."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return None  # Accelerate reads it where it is given nothing
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
    accumulate: int = 1,
    patience: int = 0,
    seed: int = 0,
    state: Path | None = None,
    false: FalseCaptions | None = None,
) -> History:
    """Train `fuser` in place by contrastive + cross-entropy loss, and keep the epoch of lowest validation loss.

    AdamW with a peak of `learning_rate`, a tenth of the steps as warm-up, then cosine annealing; gradients are
    clipped to norm `clip`. Input features are standardised by the training set's statistics. With `patience` the
    training ends after so many epochs without a lower validation loss. The device, the processes and, on a GPU,
    half precision are Accelerate's: what its launcher or its environment variables say wins, for the precision as for
    `accumulate`. A loss that is not finite stops with the step, the images and advice.

    The processes of a job (torchrun, accelerate launch) share each batch: `batch_size` is that of all together, the
    contrastive loss sees all its pairs, and without dropout, which each process draws for itself, losses and weights
    are those of a single process but for rounding. Where nodes depend on the whole batch, as in a graph over it, each
    process computes all nodes. Gradients of `accumulate` batches make one step; the negatives of a pair are still
    those of its own batch, so that this is no larger batch for the contrastive loss.

    `state` names a file in which the main process keeps each finished epoch; a training that was broken off goes on
    from there, and ends in the same weights on the same device. The caller deletes the file when the fuser is safe.

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

    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=_mixed_precision(),
        gradient_accumulation_steps=accumulate,
        dataloader_config=DataLoaderConfiguration(split_batches=True),  # the schedule counts batches of all processes
    )
    accumulate = accelerator.gradient_accumulation_steps  # a launcher's number wins
    if accumulate < 1:
        raise MmkitError(f"accumulate is {accumulate}; a step takes at least one batch.")
    share = Share(accelerator.process_index, accelerator.num_processes)
    losses, order = _PairLosses(fuser, share), Order(len(train.owner), seed)
    batches = PairBatches(train, false, losses.split)
    loader = DataLoader(batches, batch_size, sampler=order, collate_fn=lambda batch: batch)
    loader = prepare_data_loader(loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True)
    # fused: one pass over the weights, which every process of a job takes over all of them
    optimizer = torch.optim.AdamW(_weight_groups(losses, weight_decay), lr=learning_rate, fused=True)
    steps = epochs * -(-len(loader) // accumulate)
    scheduler = LambdaLR(optimizer, lambda step: _warmup_cosine(step, max(1, steps // 10), steps))
    losses, optimizer, scheduler = accelerator.prepare(losses, optimizer, scheduler)
    history, best = History(), _learnt(fuser)
    weights = torch.tensor([contrastive_weight, matching_weight, 1.0])
    settings = [epochs, batch_size, learning_rate, weight_decay, contrastive_weight, matching_weight, clip, seed]
    sizes = [sum(p.numel() for p in fuser.parameters()), len(train.owner), len(validation.owner)]
    sizes.append(len(false.captions) if false is not None else 0)
    made_by = [type(fuser).__name__, sizes, [*settings, accumulate]]
    if state is not None:
        kept = [load_state(state) if accelerator.is_main_process and state.is_file() else None]
        if (found := broadcast_object_list(kept)[0]) is not None:
            history, best = _resume(state, found, made_by, fuser, optimizer, scheduler)
    remaining = range(len(history.rows), epochs)
    for epoch in progress(remaining, "training", unit="epochs") if accelerator.is_main_process else remaining:
        if patience and len(history.rows) - 1 - history.best_epoch >= patience:
            break
        set_seed(epoch_seed(seed, epoch))
        order.epoch = epoch
        losses.train()
        sums = torch.zeros(3)
        for step, batch in enumerate(loader):
            done = (epoch * len(loader) + step) / (epochs * len(loader))
            with accelerator.accumulate(losses):
                parts = torch.stack(losses(batch, min(1.0, 2 * done)))
                means = share.mean(parts.detach()).cpu()
                if not torch.isfinite(loss := means @ weights):
                    images = _suspects(train, order, step, batch_size)
                    raise MmkitError(
                        f"The loss is {loss.item()} in epoch {epoch}, step {step}, images {images}. "
                        f"Remedy: lower learning_rate ({learning_rate}), or look for NaN in the features."
                    )
                accelerator.backward(parts @ weights.to(parts))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(losses.parameters(), clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            sums += means
        means = sums / len(loader)
        row = dict(zip(("contrastive", "matching", "contradiction"), means.tolist(), strict=True))
        row |= {"temperature": fuser.log_temperature.exp().item(), "loss": float(means @ weights)}
        held_out = validation_losses(fuser, validation, batch_size, seed, share)
        row |= {f"validation_{name}": value for name, value in zip(("contrastive", "matching"), held_out, strict=True)}
        row["validation_loss"] = contrastive_weight * held_out[0] + matching_weight * held_out[1]
        if not math.isfinite(row["validation_loss"]):
            raise MmkitError(
                f"The validation loss is {row['validation_loss']} after epoch {epoch}. Remedy: lower learning_rate "
                f"({learning_rate}), or look for NaN in the features of the validation split."
            )
        history.rows.append(row)
        if row["validation_loss"] <= min(history.column("validation_loss")):
            history.best_epoch, best = epoch, _learnt(fuser)
        if state is not None and accelerator.is_main_process:
            facts = {"made_by": made_by, "history": asdict(history), "scheduler": scheduler.scheduler.state_dict()}
            modules = {"fuser": _learnt(fuser), "best": best}
            save_state(state, modules, optimizer.optimizer.state_dict(), facts)
    _restore(fuser, best)
    fuser.eval()
    return history


def _learnt(fuser: PairFuser) -> dict[str, Tensor]:
    """A copy of all of its state that training may change: not the frozen weights of an adapted encoder."""
    frozen = {name for name, weight in fuser.named_parameters(remove_duplicate=False) if not weight.requires_grad}
    return {name: value.detach().clone() for name, value in fuser.state_dict().items() if name not in frozen}


def _restore(fuser: PairFuser, learnt: dict[str, Tensor]) -> None:
    fuser.load_state_dict(fuser.state_dict() | learnt)


def _suspects(train: PairedFeatures, order: Order, step: int, batch_size: int) -> str:
    """The images of a step whose features are not finite, or of all the step, for an error message."""
    captions = list(order)[step * batch_size : (step + 1) * batch_size]
    rows = train.owner[captions].unique()
    broken = [row for row in rows.tolist() if not torch.isfinite(train.images([row])).all()]
    ids = train.image_ids[broken or rows].tolist()
    what = "with features that are not finite" if broken else "of the batch"
    return f"{what}: {', '.join(map(str, ids[:5]))}{', …' if len(ids) > 5 else ''}"


def _resume(
    state: Path,
    found: tuple,
    made_by: list,
    fuser: PairFuser,
    optimizer: AcceleratedOptimizer,
    scheduler: AcceleratedScheduler,
) -> tuple[History, dict[str, Tensor]]:
    """Put all back to where the state `found` in a file was; its history, and the best weights so far."""
    modules, optimizer_state, facts = found
    if facts["made_by"] != json.loads(json.dumps(made_by)):
        raise MmkitError(f"{state} is of another training. Remedy: name another file, or delete it to start again.")
    _restore(fuser, modules["fuser"])
    optimizer.optimizer.load_state_dict(optimizer_state)
    scheduler.scheduler.load_state_dict(facts["scheduler"])
    return History(**facts["history"]), modules["best"]


@torch.no_grad()
def validation_losses(
    fuser: PairFuser, features: PairedFeatures, batch_size: int, seed: int, share: Share = ALONE
) -> tuple[float, float]:
    """Mean contrastive and matching loss over `features`, in batches and with negatives fixed by `seed`.

    Processes that `share` the batches have to call it together; all get the same.
    """
    fuser.eval()
    features = fuser.view(features)
    device = next(fuser.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    losses = _PairLosses(fuser, share)
    batches = PairBatches(features, share=losses.split)
    loader = DataLoader(batches, batch_size, shuffle=True, generator=generator, collate_fn=lambda batch: batch)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rows = [torch.stack(losses(Batch(*(part.to(device) for part in batch)))) for batch in loader]
    contrastive, matching, _ = share.mean(torch.stack(rows).mean(dim=0)).tolist()
    return contrastive, matching
