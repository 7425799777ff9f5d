"""Retrieval in two steps: a cheap score chooses a few candidates of each query, the fuser's own ranks those."""

from itertools import pairwise

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
    result is exact for `size` of the whole pool. Ties are resolved against the model. A pair that is a candidate both
    ways is scored once.
    """
    if size < 1:
        raise MmkitError(f"A shortlist of {size} candidates; it takes at least one.")
    images, captions = len(image_nodes), len(owner)
    rows, columns = (torch.arange(count, device=owner.device) for count in (images, captions))
    by_image, by_caption = rows.split(max(1, _BLOCK // max(1, captions))), columns.split(max(1, _BLOCK // images))

    def of_images(chosen: Tensor) -> tuple[Tensor, Tensor]:
        return fuser.shortlist_scores(image_nodes[chosen], text_nodes), owner == chosen[:, None]

    def of_captions(chosen: Tensor) -> tuple[Tensor, Tensor]:
        return fuser.shortlist_scores(image_nodes, text_nodes[chosen]).T, owner[chosen, None] == rows

    captions_of = torch.cat([of_images(chosen)[0].topk(min(size, captions), dim=1).indices for chosen in by_image])
    images_of = torch.cat([of_captions(chosen)[0].topk(min(size, images), dim=1).indices for chosen in by_caption])
    keys = torch.cat(
        [(rows[:, None] * captions + captions_of).flatten(), (images_of * captions + columns[:, None]).flatten()]
    )
    keys = keys.unique()
    bounds = [*torch.searchsorted(keys, rows * captions).tolist(), len(keys)]
    candidates = [keys[first:last] % captions for first, last in pairwise(bounds)]
    # an image with all its candidates at once: its node is read once, and a fuser's own way to score all pairs serves
    logits = torch.cat(
        [fuser.score_nodes(image_nodes[row, None], text_nodes[chosen])[0] for row, chosen in enumerate(candidates)]
    )

    def refined(pairs: Tensor) -> Tensor:
        return logits[torch.searchsorted(keys, pairs)]

    image_ranks = [
        _ranks(*of_images(chosen), captions_of[chosen], refined(chosen[:, None] * captions + captions_of[chosen]))
        for chosen in by_image
    ]
    caption_ranks = [
        _ranks(*of_captions(chosen), images_of[chosen], refined(images_of[chosen] * captions + chosen[:, None]))
        for chosen in by_caption
    ]
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
