"""Retrieval in two steps: a cheap score chooses a few candidates of each query, the fuser's own ranks those."""

import torch
from torch import Tensor

from .errors import MmkitError
from .fusers import PairFuser

_PAIRS = 1024  # whose nodes are gathered at a time
_BLOCK = 2**22  # cheap scores that are held at a time


def pair_logits(
    fuser: PairFuser, image_nodes: Tensor, text_nodes: Tensor, image_rows: Tensor, text_rows: Tensor
) -> Tensor:
    """Match logits `(P,)` of the pairs of nodes at these rows `(P,)`."""
    blocks = zip(image_rows.split(_PAIRS), text_rows.split(_PAIRS), strict=True)
    return torch.cat([fuser.match(image_nodes[images], text_nodes[texts]) for images, texts in blocks])


def shortlist_ranks(
    fuser: PairFuser, image_nodes: Tensor, text_nodes: Tensor, owner: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Ranks from 1 of the true matches, as `metrics.ranks` gives them: per image `(N,)` and per caption `(M,)`.

    Of each query the `size` candidates of the largest `fuser.shortlist_scores` are ranked by their match logits; all
    others come after them, by the cheap score. So a true match that the shortlist lacks keeps its cheap rank, and the
    result is exact for `size` of the whole pool. Ties are resolved against the model.
    """
    if size < 1:
        raise MmkitError(f"A shortlist of {size} candidates; it takes at least one.")
    everything = torch.arange(len(owner), device=owner.device)
    image_ranks, caption_ranks = [], []
    for captions in everything.split(max(1, _BLOCK // max(1, len(image_nodes)))):
        cheap = fuser.shortlist_scores(image_nodes, text_nodes[captions]).T
        true = owner[captions, None] == torch.arange(len(image_nodes), device=owner.device)
        candidates = cheap.topk(min(size, len(image_nodes)), dim=1).indices
        texts = captions.repeat_interleave(candidates.shape[1])
        logits = pair_logits(fuser, image_nodes, text_nodes, candidates.flatten(), texts)
        caption_ranks.append(_ranks(cheap, true, candidates, logits.view(candidates.shape)))
    for images in torch.arange(len(image_nodes), device=owner.device).split(max(1, _BLOCK // max(1, len(owner)))):
        cheap = fuser.shortlist_scores(image_nodes[images], text_nodes)
        candidates = cheap.topk(min(size, len(owner)), dim=1).indices
        rows = images.repeat_interleave(candidates.shape[1])
        logits = pair_logits(fuser, image_nodes, text_nodes, rows, candidates.flatten())
        image_ranks.append(_ranks(cheap, owner == images[:, None], candidates, logits.view(candidates.shape)))
    return torch.cat(image_ranks), torch.cat(caption_ranks)


def _ranks(cheap: Tensor, true: Tensor, candidates: Tensor, logits: Tensor) -> Tensor:
    """Ranks `(Q,)` of each query's best true match: cheap scores and truth `(Q, all)`, candidates and logits
    `(Q, size)`."""
    if torch.isnan(cheap).any() or torch.isnan(logits).any():
        raise MmkitError("The scores hold NaN; they cannot be ranked.")
    found = true.gather(1, candidates)
    best = logits.masked_fill(~found, -torch.inf).amax(dim=1, keepdim=True)
    refined = 1 + ((logits >= best) & ~found).sum(dim=1)
    best = cheap.masked_fill(~true, -torch.inf).amax(dim=1, keepdim=True)
    return torch.where(found.any(dim=1), refined, 1 + ((cheap >= best) & ~true).sum(dim=1))
