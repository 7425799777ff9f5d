"""Scores corrected by their pool without any graph: what a transductive fuser has to beat."""

from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from .baselines import CosineFuser
from .edges import nearest
from .errors import MmkitError
from .fusers import PairFuser

METHODS = ("csls", "inverted-softmax")
_BLOCK_ROWS = 2048


class HubnessCorrected(PairFuser):
    """A trained fuser of cosines whose scores are corrected for hubs: items that are near to everything in the pool.

    - "csls": `2·cos(i, t) - r(i) - r(t)`, where r is the mean cosine of a node to its `k` nearest of the other
      modality in the pool (Conneau et al. 2018, section 2.3, with k = 10).
    - "inverted-softmax": `cos(i, t) - m(i) - m(t)` with `m(x) = T · log mean exp(cos / T)` over the pool's other
      modality, T the fuser's `log_temperature`. Captions ranked for an image stand as by Smith et al. (2017, eq. 10),
      whose softmax runs over the queries of each target, and so do images ranked for a caption: the term of the query
      changes no rank. QB-Norm (Bogolin et al. 2022, section 3) is the same with training queries for the pool.

    There is nothing to train. The logit is the corrected cosine times the fuser's scale; its threshold is another than
    the fuser's, and depends on the size of the pool. What this gains over the fuser is what seeing the pool is worth.
    Nodes are the fuser's, and a column that holds r or m.
    """

    transductive = True

    def __init__(self, fuser: CosineFuser, method: str = "csls", k: int = 10) -> None:
        if not isinstance(fuser, CosineFuser):
            raise MmkitError(
                f"{type(fuser).__name__} does not score by cosine. Remedy: HubnessCorrected(TwoTower(…)), trained"
            )
        if method not in METHODS:
            raise MmkitError(f"No method {method!r}. Valid names: {', '.join(METHODS)}")
        if k < 1:
            raise MmkitError(f"k is {k}; a neighbourhood needs at least one node.")
        super().__init__(fuser.image_dim, fuser.text_dim, fuser.width + 1, 0.0, 0.0)
        self.fuser, self.method, self.k, self.log_temperature = fuser, method, k, fuser.log_temperature
        self.standardize_images, self.standardize_texts = fuser.standardize_images, fuser.standardize_texts

    def build_head(self, dropout: float) -> None:
        """The scale is the fuser's; there is no path that `dropout` could thin."""
        self.fused_dim = self.width

    def nodes(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """The fuser's nodes, and in the last column what the pool takes off: `(N, width)`, `(M, width)`."""
        image_nodes, text_nodes = self.fuser.nodes(images, texts)
        return self._with_offsets(image_nodes, text_nodes), self._with_offsets(text_nodes, image_nodes)

    def fuse(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """Aligned nodes `(B, width)` twice → what the corrected cosine is the sum of, `(B, width)`."""
        products = image_nodes[:, :-1] * text_nodes[:, :-1] * self._gain
        return torch.cat([products, -(image_nodes[:, -1:] + text_nodes[:, -1:])], dim=1)

    def match(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """Aligned nodes → match logits `(B,)`."""
        return self.fuser.log_scale.exp() * self.fuse(image_nodes, text_nodes).sum(dim=1)

    def similarities(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """Nodes `(N, width)`, `(M, width)` → corrected cosines of all pairs `(N, M)`."""
        products = image_nodes[:, :-1] @ text_nodes[:, :-1].T * self._gain
        return products - image_nodes[:, -1:] - text_nodes[:, -1]

    def score_nodes(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """Nodes `(N, width)`, `(M, width)` → match logits of all pairs `(N, M)`."""
        return self.fuser.log_scale.exp() * self.similarities(image_nodes, text_nodes)

    def save_pretrained(self, save_directory: str | Path, **settings: object) -> NoReturn:
        """An error: all that there is to save is the fuser's."""
        raise MmkitError("A correction has no weights. Remedy: save .fuser, and HubnessCorrected(loaded) again")

    @property
    def _gain(self) -> float:
        """What turns the product of two nodes, which have length √width, into the method's multiple of the cosine."""
        return (2 if self.method == "csls" else 1) / self.fuser.width

    def _with_offsets(self, nodes: Tensor, others: Tensor) -> Tensor:
        width = self.fuser.width
        if self.method == "csls":
            k = min(self.k, len(others))
            offsets = nearest(others, nodes, k)[0].reshape(len(nodes), k).mean(dim=1) / width
        else:
            temperature = self.log_temperature.exp()
            logits = (block @ others.T / (width * temperature) for block in nodes.split(_BLOCK_ROWS))
            offsets = torch.cat([part.logsumexp(dim=1) for part in logits])
            offsets = (offsets - torch.tensor(float(len(others))).log()) * temperature
        return torch.cat([nodes, offsets[:, None]], dim=1)
