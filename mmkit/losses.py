"""The losses that fusers are trained with, and the joint loss of a batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather, pad_across_processes, reduce
from torch import Tensor, nn

from .features import pad_cat
from .fusers import TEMPERATURE, PairFuser, cosines
from .support import MmkitError

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 0.5


def contrastive_loss(
    image_nodes: Tensor, text_nodes: Tensor, log_temperature: Tensor, image_index: Tensor | None = None
) -> Tensor:
    """Symmetric InfoNCE of aligned pairs `(B, D)` (van den Oord et al. 2018, eq. 4; Radford et al. 2021, figure 3).
    Nodes are normalised here, and the temperature clamped to [0.01, 0.5]. Pairs with the same `image_index` `(B,)` have
    the same image: its other captions are no negatives, and are masked."""
    if image_nodes.shape != text_nodes.shape:
        raise MmkitError(f"Aligned nodes differ in shape: {tuple(image_nodes.shape)} and {tuple(text_nodes.shape)}.")
    return info_nce(cosines(image_nodes, text_nodes), log_temperature, image_index)


def info_nce(sims: Tensor, log_temperature: Tensor, image_index: Tensor | None = None) -> Tensor:
    """`contrastive_loss` of similarities `(B, B)` in [-1, 1] that are known already, images in rows."""
    temperature = log_temperature.exp().clamp(MIN_TEMPERATURE, MAX_TEMPERATURE)
    logits = sims / temperature
    if image_index is not None:
        itself = torch.eye(len(image_index), dtype=torch.bool, device=image_index.device)
        logits = logits.masked_fill((image_index[:, None] == image_index) & ~itself, -torch.inf)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def matching_loss(logits: Tensor, matched: Tensor) -> Tensor:
    """Cross-entropy of logits `(P,)` with labels `(P,)` in {0, 1}; both kinds weigh the same, however many."""
    matched = matched.to(logits.dtype)
    loss = F.binary_cross_entropy_with_logits(logits, matched, reduction="none")
    positives, negatives = matched.sum().clamp(min=1), (1 - matched).sum().clamp(min=1)
    return ((loss * matched).sum() / positives + (loss * (1 - matched)).sum() / negatives) / 2


def contradiction_loss(true: Tensor, false: Tensor) -> Tensor:
    """`log(1 + exp(false - true))`, RankNet's (Burges et al. 2005, section 3), of match logits `(F,)` of captions and
    of the same with a fact changed, of the same images."""
    return F.softplus(false - true).mean()


@torch.no_grad()
def sample_negatives(sims: Tensor, image_index: Tensor, hardness: float = 1.0) -> tuple[Tensor, Tensor]:
    """Unmatched pairs from a batch of aligned ones: for each image a random caption of another, and one drawn from its
    row of `sims` `(B, B)` in proportion to exp(hardness · similarity / 0.07), with `hardness` 1 ALBEF's hard negative
    (Li et al. 2021, section 3.2); likewise for each caption. Returns rows of images and of texts, `(≤ 4B,)`."""
    other = image_index[:, None] != image_index
    rows = other.any(dim=1).nonzero().squeeze(1)
    if not len(rows):
        return rows, rows
    sims = (hardness * sims / TEMPERATURE).nan_to_num()  # the losses report what is not finite, not the sampling
    random = other[rows].float()
    hard_texts = sims.masked_fill(~other, -torch.inf)[rows].softmax(dim=1)
    hard_images = sims.T.masked_fill(~other, -torch.inf)[rows].softmax(dim=1)
    texts = [weights.multinomial(1).squeeze(1) for weights in (random, hard_texts)]
    images = [weights.multinomial(1).squeeze(1) for weights in (random, hard_images)]
    return torch.cat([rows, rows, *images]), torch.cat([*texts, rows, rows])


class Batch(NamedTuple):
    """B pairs, and F captions that are false of one of their images. Where processes share the pairs, `images` and the
    captions are those of this process's share."""

    images: Tensor  # (U, image_dim), each once
    texts: Tensor  # (B + 2·F, text_dim): captions, false captions, and the true ones that those were made from
    image_index: Tensor  # (B,), the image of each caption: its row in `images`, where pairs are not shared
    accused: Tensor  # (F,), a pair of the image of each false caption
    share_index: Tensor  # (B,) or the share of this process, rows of `images`


class _Gather(torch.autograd.Function):
    """Rows of all processes, as many of each; the gradient of a row is the sum of what all processes find for it."""

    @staticmethod
    def forward(ctx, part: Tensor) -> Tensor:
        ctx.rows = len(part)
        return gather(part)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return reduce(gradient, "sum").split(ctx.rows)[PartialState().process_index]


def gathered(part: Tensor) -> Tensor:
    """Rows of `part` and those of all other processes, with gradients, as open_clip's; shorter stacks end in zeros."""
    return _Gather.apply((pad_across_processes(part, dim=1) if part.ndim == 3 else part).contiguous())


class JointLoss(nn.Module):
    """The contrastive, matching and contradiction losses of a batch. A subclass that replaces one of them, or the
    negatives, is given to `fit(losses=MyLoss(fuser))`.
    Of several processes each maps its share of the pairs to nodes (or, where nodes depend on the whole batch, all),
    gathers the others', draws the same negatives, and matches its own pairs; the loss is the mean over processes."""

    def __init__(self, fuser: PairFuser) -> None:
        super().__init__()
        state = PartialState(cpu=not torch.accelerator.is_available())
        self.fuser, self.process, self.processes = fuser, state.process_index, state.num_processes
        self.shares_pairs = self.processes > 1 and not fuser.transductive

    def share_of(self, total: int) -> slice:
        """This process's share of `total` pairs."""
        return slice(self.process * total // self.processes, (self.process + 1) * total // self.processes)

    @contextmanager
    def own_randomness(self) -> Iterator[None]:
        """Inside, each process draws other numbers (dropout); what all draw alike goes on as if there had been none."""
        devices, several = [torch.cuda.current_device()] if torch.cuda.is_available() else [], self.processes > 1
        with torch.random.fork_rng(devices, enabled=several):
            if several:
                torch.manual_seed(int(torch.randint(2**62, ())) + self.process)
            yield

    def nodes(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Nodes of images and of all texts, for each pair the row of its image's node `(B,)`, and `sims` `(B, B)`."""
        with self.own_randomness():
            image_nodes, text_nodes = self.fuser.nodes(batch.images, batch.texts)
        if not self.shares_pairs:
            sims = self.fuser.similarities(image_nodes, text_nodes[: len(batch.image_index)])
            # index_select's backward, unlike indexing's, adds in a fixed order
            return image_nodes, text_nodes, batch.image_index, sims.index_select(0, batch.image_index)
        captions = gathered(text_nodes[: len(batch.share_index)])
        sims = gathered(self.fuser.similarities(image_nodes, captions).index_select(0, batch.share_index))
        images = gathered(image_nodes.index_select(0, batch.share_index))
        text_nodes = pad_cat([captions, text_nodes[len(batch.share_index) :]])
        return images, text_nodes, torch.arange(len(images), device=images.device), sims

    def contrastive(self, sims: Tensor, image_index: Tensor) -> Tensor:
        """The loss of similarities `(B, B)` of aligned pairs, by default `info_nce` at the fuser's temperature."""
        return info_nce(sims, self.fuser.log_temperature, image_index)

    negatives, matching = staticmethod(sample_negatives), staticmethod(matching_loss)

    def forward(self, batch: Batch, hardness: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        image_nodes, text_nodes, image_of, sims = self.nodes(batch)
        contrastive = self.contrastive(sims, batch.image_index)
        negatives, share = self.negatives(sims, batch.image_index, hardness), self.share_of(len(sims))
        image_rows, text_rows = (rows.view(4, -1)[:, share].flatten() for rows in negatives)  # four for each caption
        captions = torch.arange(len(text_nodes), device=sims.device)
        images = torch.cat([image_of[share], image_of.index_select(0, image_rows), *[image_of[batch.accused]] * 2])
        texts = torch.cat([captions[share], text_rows, captions[len(sims) :]])
        with self.own_randomness():
            logits = self.fuser.match(image_nodes.index_select(0, images), text_nodes.index_select(0, texts))
        count = len(batch.accused)
        pairs, false, true = logits.tensor_split((len(logits) - 2 * count, len(logits) - count))
        matched = torch.arange(len(pairs), device=logits.device) < share.stop - share.start
        contradiction = contradiction_loss(true, false) if count else logits.new_zeros(())
        return contrastive, self.matching(pairs, matched), contradiction
