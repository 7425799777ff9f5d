"""Edges from features, and the graph fuser (system B)."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import MmkitError
from .fusers import PairFuser, unit_scale

with warnings.catch_warnings():  # torch-geometric 2.8 scripts a function at import, which torch 2.14 deprecates
    warnings.simplefilter("ignore", FutureWarning)
    from torch_geometric.nn import GCNConv

_BLOCK_ROWS = 2048  # similarities of so many nodes to all others are held at a time


def cosine_knn_edges(
    source: Tensor, target: Tensor | None = None, k: int = 5, mutual: bool = False
) -> tuple[Tensor, Tensor]:
    """The `k` nearest neighbours by cosine, as directed edges neighbour → node.

    Without `target` the graph lies within `source` `(N, D)`: each node receives edges from its `k` nearest others,
    never from itself. With `target` `(M, D)` it is bipartite: each target receives edges from its `k` nearest
    sources. `mutual=True` (one set only) keeps an edge if its reverse is there too.

    Returns `edge_index` `(2, E)`, row 0 the sources, and `edge_weight` `(E,)` in [0, 1]: a cosine below zero
    counts as no similarity, since a negative weight makes GCN's square root of a degree NaN. Edges come from
    features alone; an edge that knew which pairs are true would hand the labels to the network.
    """
    if k < 1:
        raise MmkitError(f"k is {k}; a node needs at least one neighbour.")
    if mutual and target is not None:
        raise MmkitError("mutual edges are defined within one set of nodes; leave out target.")
    if not torch.isfinite(source).all() or (target is not None and not torch.isfinite(target).all()):
        raise MmkitError("The features hold NaN or infinity, so nearest neighbours are undefined.")
    inside = target is None
    sources, targets = F.normalize(source, dim=-1), F.normalize(source if inside else target, dim=-1)
    k = min(k, len(sources) - inside)
    if k < 1 or not len(targets):
        return torch.empty(2, 0, dtype=torch.long, device=source.device), source.new_empty(0)
    neighbours, weights = [], []
    for first in range(0, len(targets), _BLOCK_ROWS):
        similarity = targets[first : first + _BLOCK_ROWS] @ sources.T
        if inside:
            rows = torch.arange(len(similarity), device=source.device)
            similarity[rows, rows + first] = -torch.inf
        top = similarity.topk(k, dim=1)
        neighbours.append(top.indices)
        weights.append(top.values)
    receivers = torch.arange(len(targets), device=source.device).repeat_interleave(k)
    edges = torch.stack([torch.cat(neighbours).flatten(), receivers])
    weight = torch.cat(weights).flatten().clamp(0, 1)
    if mutual:
        key, reverse = edges[0] * len(targets) + edges[1], edges[1] * len(targets) + edges[0]
        kept = torch.isin(key, reverse)
        edges, weight = edges[:, kept], weight[kept]
    return edges, weight


class _ModalityGraph(nn.Module):
    """GCN layers over the k-nearest-neighbour graph within one modality, each with dropout and a residual."""

    def __init__(self, dim: int, layers: int, neighbours: int, dropout: float) -> None:
        super().__init__()
        self.neighbours, self.dropout = neighbours, dropout
        self.convolutions = nn.ModuleList(GCNConv(dim, dim) for _ in range(layers))

    def forward(self, nodes: Tensor, features: Tensor) -> Tensor:
        edges, weight = cosine_knn_edges(features, k=self.neighbours)
        for convolution in self.convolutions:
            update = torch.relu(convolution(nodes, edges, weight))
            nodes = nodes + F.dropout(update, self.dropout, self.training)
        return nodes


class MultimodalGNN(PairFuser):
    """System B: images and texts as nodes, a GCN per modality, multi-head attention across the modalities.

    1. An MLP maps each modality to `hidden_dim`, as the article's readers ask.
    2. `layers` GCN layers (Kipf & Welling 2017, eq. 2) pass messages over each modality's own cosine
       k-nearest-neighbour graph of the encoders' features. No index is shared between the modalities, so the
       pairing cannot leak.
    3. Cross-modal attention with `heads` heads: every image attends to the pool's texts and every text to its
       images, over content only.
    4. Nodes are fused and matched as in system A.

    A node sees the others of its pool: the fuser is transductive, and its reports have to say how large the
    pool was.
    """

    transductive = True

    def __init__(
        self,
        image_dim: int = 2048,
        text_dim: int = 768,
        hidden_dim: int = 512,
        heads: int = 8,
        layers: int = 1,
        neighbours: int = 5,
        dropout: float = 0.3,
        feature_dropout: float = 0.0,
    ) -> None:
        if hidden_dim % heads:
            raise MmkitError(f"hidden_dim {hidden_dim} is not a multiple of heads {heads}.")
        super().__init__(image_dim, text_dim, hidden_dim, dropout, feature_dropout)
        self.project_images, self.project_texts = (
            nn.Sequential(nn.Linear(dim, hidden_dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden_dim, hidden_dim))
            for dim in (image_dim, text_dim)
        )
        self.image_graph, self.text_graph = (_ModalityGraph(hidden_dim, layers, neighbours, dropout) for _ in range(2))
        self.images_see_texts, self.texts_see_images = (
            nn.MultiheadAttention(hidden_dim, heads, dropout=dropout, batch_first=True) for _ in range(2)
        )

    def nodes(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Projected, convolved and attended nodes; each depends on the whole pool."""
        images, texts = self.prepare(images, texts)
        image_nodes = self.image_graph(self.project_images(images), images)
        text_nodes = self.text_graph(self.project_texts(texts), texts)
        seen_by_images = self._attend(self.images_see_texts, image_nodes, text_nodes)
        seen_by_texts = self._attend(self.texts_see_images, text_nodes, image_nodes)
        return unit_scale(image_nodes + seen_by_images), unit_scale(text_nodes + seen_by_texts)

    @staticmethod
    def _attend(attention: nn.MultiheadAttention, queries: Tensor, pool: Tensor) -> Tensor:
        """One batch whose sequence is the pool: `(1, N, width)` attends over `(1, M, width)`."""
        return attention(queries[None], pool[None], pool[None], need_weights=False)[0][0]
