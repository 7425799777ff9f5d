"""The losses that fusers are trained with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import denormals  # noqa: F401  # for its effect
from .errors import MmkitError
from .fusers import cosines

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
    return info_nce(cosines(image_nodes, text_nodes), log_temperature, owner)


def info_nce(similarity: Tensor, log_temperature: Tensor, owner: Tensor | None = None) -> Tensor:
    """`contrastive_loss` of similarities `(B, B)` in [-1, 1] that are known already, images in rows."""
    temperature = log_temperature.exp().clamp(MIN_TEMPERATURE, MAX_TEMPERATURE)
    logits = similarity / temperature
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


def contradiction_loss(true: Tensor, false: Tensor) -> Tensor:
    """Logistic ranking loss of match logits `(F,)` of captions and of the same with a fact changed, of the same images.

    `log(1 + exp(false - true))`, RankNet's (Burges et al. 2005, section 3): what both have in common cancels, and what
    is left to learn is the fact.
    """
    return F.softplus(false - true).mean()


@torch.no_grad()
def sample_negatives(similarity: Tensor, owner: Tensor, hardness: float = 1.0) -> tuple[Tensor, Tensor]:
    """Unmatched pairs for `matching_loss` from a batch of aligned pairs, with none of the same image.

    For each pair a random other caption, and one drawn in proportion to exp(hardness · similarity / 0.07) from the
    image's row of `similarity` `(B, B)`; likewise for each caption. With `hardness` 0 that one is random as well,
    with 1 it is ALBEF's hard negative (Li et al. 2021, section 3.2). Returns rows of images and of texts, `(≤ 4B,)`.
    """
    other = owner[:, None] != owner
    rows = other.any(dim=1).nonzero().squeeze(1)
    if not len(rows):
        return rows, rows
    similarity = hardness * similarity / 0.07
    similarity = similarity.nan_to_num()  # the losses report what is not finite; sampling must not fail before them
    random = other[rows].float()
    hard_texts = similarity.masked_fill(~other, -torch.inf)[rows].softmax(dim=1)
    hard_images = similarity.T.masked_fill(~other, -torch.inf)[rows].softmax(dim=1)
    texts = [weights.multinomial(1).squeeze(1) for weights in (random, hard_texts)]
    images = [weights.multinomial(1).squeeze(1) for weights in (random, hard_images)]
    return torch.cat([rows, rows, *images]), torch.cat([*texts, rows, rows])
