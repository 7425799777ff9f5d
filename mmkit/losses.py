"""The two losses that every fuser is trained with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import denormals  # noqa: F401  # for its effect
from .errors import MmkitError

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 0.5


def contrastive_loss(
    image_nodes: Tensor, text_nodes: Tensor, log_temperature: Tensor, owner: Tensor | None = None
) -> Tensor:
    """Symmetric InfoNCE of aligned pairs (van den Oord et al. 2018, eq. 4; Radford et al. 2021, figure 3).

    Row `i` of `(B, D)` and `(B, D)` is a pair; nodes are L2-normalised here. `log_temperature` is a learnable
    scalar, clamped so that the temperature stays in [0.01, 0.5]. Pairs with the same `owner` `(B,)` have the same
    image: the other captions of an image are no negatives, and are masked.
    """
    if image_nodes.shape != text_nodes.shape:
        raise MmkitError(f"Aligned nodes differ in shape: {tuple(image_nodes.shape)} and {tuple(text_nodes.shape)}.")
    temperature = log_temperature.exp().clamp(MIN_TEMPERATURE, MAX_TEMPERATURE)
    logits = F.normalize(image_nodes, dim=-1) @ F.normalize(text_nodes, dim=-1).T / temperature
    if owner is not None:
        same_image = (owner[:, None] == owner) & ~torch.eye(len(owner), dtype=torch.bool, device=owner.device)
        logits = logits.masked_fill(same_image, -torch.inf)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def matching_loss(logits: Tensor, matched: Tensor) -> Tensor:
    """Cross-entropy of matched and unmatched pairs: logits `(P,)`, labels `(P,)` in {0, 1}.

    Both kinds weigh the same, however many of each there are.
    """
    matched = matched.to(logits.dtype)
    loss = F.binary_cross_entropy_with_logits(logits, matched, reduction="none")
    positives, negatives = matched.sum().clamp(min=1), (1 - matched).sum().clamp(min=1)
    return ((loss * matched).sum() / positives + (loss * (1 - matched)).sum() / negatives) / 2


@torch.no_grad()
def sample_negatives(image_nodes: Tensor, text_nodes: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Unmatched pairs for `matching_loss` from a batch of aligned pairs, with none of the same image.

    For each pair a random other caption, and a hard one drawn in proportion to its similarity to the image
    (ALBEF, Li et al. 2021, section 3.2); likewise for each caption. Returns rows of images and of texts, `(≤ 4B,)`.
    """
    other = owner[:, None] != owner
    rows = other.any(dim=1).nonzero().squeeze(1)
    if not len(rows):
        return rows, rows
    similarity = F.normalize(image_nodes, dim=-1) @ F.normalize(text_nodes, dim=-1).T / 0.07
    similarity = similarity.nan_to_num()  # the losses report what is not finite; sampling must not fail before them
    random = other[rows].float()
    hard_texts = similarity.masked_fill(~other, -torch.inf)[rows].softmax(dim=1)
    hard_images = similarity.T.masked_fill(~other, -torch.inf)[rows].softmax(dim=1)
    texts = [weights.multinomial(1).squeeze(1) for weights in (random, hard_texts)]
    images = [weights.multinomial(1).squeeze(1) for weights in (random, hard_images)]
    return torch.cat([rows, rows, *images]), torch.cat([*texts, rows, rows])
