"""Graphs over a pool: edges from features, and two graph fusers."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fusers import PairFuser, unit_scale
from .support import MmkitError

with warnings.catch_warnings(action="ignore", category=FutureWarning):  # PyG 2.8 scripts, which torch 2.14 deprecates
    from torch_geometric.data import HeteroData
    from torch_geometric.nn import GCNConv, GraphConv, HeteroConv, SAGEConv
    from torch_geometric.utils import softmax

EDGES = ("cosine", "attention", "none")
PROJECTIONS = ("mlp", "linear")
RELATIONS = (("image", "near", "image"), ("text", "near", "text"), ("image", "like", "text"), ("text", "like", "image"))
_BLOCK_ROWS = 2048  # similarities of so many nodes to all others are held at a time


def cosine_knn_edges(source: Tensor, target: Tensor | None = None, k: int = 5) -> tuple[Tensor, Tensor]:
    """The `k` nearest neighbours by cosine, as directed edges from sources `(N, D)` to each target `(M, D)` or, without
    `target`, to each source from the others. The search is exact: N·M·D multiplications, in blocks of rows.

    Returns `edge_index` `(2, E)`, row 0 the sources, and `edge_weight` `(E,)` in [0, 1]: a cosine below zero counts as
    none, since it makes GCN's root of a degree NaN."""
    edges, weight = _nearest(F.normalize(source, dim=-1), None if target is None else F.normalize(target, dim=-1), k)
    return edges, weight.clamp(0, 1)


def attention_edges(queries: Tensor, keys: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1) as directed edges from keys `(N, D)` to each query
    `(M, D)`, from its `k` of the largest weight or all. Returns `edge_index` `(2, E)`, row 0 the keys, and
    `edge_weight` `(E,)`: the softmax of q·k / √D over the edges of a query, with gradients into both sides."""
    edges, products = _nearest(keys, queries, max(1, len(keys)) if k is None else k)
    return edges, softmax(products / queries.shape[1] ** 0.5, edges[1], num_nodes=len(queries))


def _nearest(sources: Tensor, targets: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Edges `(2, E)` from the `k` sources `(N, D)` of the largest inner product with each target `(M, D)`, and those
    products `(E,)`: target after target, from near to far. Without `targets` each source has the other sources."""
    if k < 1:
        raise MmkitError(f"k is {k}; a node needs at least one neighbour. Remedy: k=1 or more")
    if not all(part is None or torch.isfinite(part).all() for part in (sources, targets)):
        raise MmkitError("The features hold NaN or infinity, so none is nearest. Remedy: look for them in the input")
    inside, targets = targets is None, sources if targets is None else targets
    k, blocks = max(0, min(k, len(sources) - inside)), []
    for block, nodes in enumerate(targets.split(_BLOCK_ROWS)):
        sims = nodes @ sources.T
        if inside:
            sims.diagonal(block * _BLOCK_ROWS).fill_(-torch.inf)
        blocks.append(sims.topk(k, dim=1))
    products, neighbours = (torch.cat(part).flatten() for part in zip(*blocks, strict=True))
    receivers = torch.arange(len(targets), device=sources.device).repeat_interleave(k)
    return torch.stack([neighbours, receivers]), products


class MultimodalGNN(PairFuser):
    """System B: images and texts as nodes, a GCN per modality, multi-head attention across the modalities.
    1. An MLP maps each modality to `hidden_dim`; with `projection="linear"` a single layer, as the article's GCNConv.
    2. `layers` GCN layers (Kipf & Welling 2017, eq. 2) pass messages over the cosine graph of each modality's features.
       With `edges="none"` each node hears itself alone; with "attention", as the article has it, it hears its
       `neighbours` in the other modality, by learned attention and GraphConv layers (Morris et al. 2019, eq. 3).
    3. With `heads` heads every image attends to all texts and every text to all images. No index can leak a pairing."""

    transductive = True

    def __init__(self, image_dim: int = 2048, text_dim: int = 768, hidden_dim: int = 512, heads: int = 8,
                 layers: int = 1, neighbours: int = 5, dropout: float = 0.3, feature_dropout: float = 0.0,
                 edges: str = "cosine", projection: str = "mlp") -> None:  # fmt: skip
        if hidden_dim % heads:
            raise MmkitError(f"hidden_dim {hidden_dim} is not a multiple of heads {heads}. Remedy: change one of them")
        for argument, name, names in (("edges", edges, EDGES), ("projection", projection, PROJECTIONS)):
            if name not in names:
                raise MmkitError(f"No {argument} {name!r}. Valid names: {', '.join(names)}")
        super().__init__(image_dim, text_dim, hidden_dim, dropout, feature_dropout)
        self.edges = edges
        self.project_images = _projection(image_dim, hidden_dim, dropout, projection)
        self.project_texts = _projection(text_dim, hidden_dim, dropout, projection)
        if edges == "attention":
            self.graph = _AttentionGraph(hidden_dim, layers, neighbours, dropout)
        else:
            k = 0 if edges == "none" else neighbours
            self.image_graph, self.text_graph = (_ModalityGraph(hidden_dim, layers, k, dropout) for _ in range(2))
        self.images_see_texts, self.texts_see_images = (
            nn.MultiheadAttention(hidden_dim, heads, dropout=dropout, batch_first=True) for _ in range(2)
        )

    def nodes(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Projected, convolved and attended nodes; each depends on the whole pool."""
        images, texts = self.prepare(images, texts)
        if self.edges == "attention":
            a, b = self.graph(self.project_images(images), self.project_texts(texts))
        else:
            a = self.image_graph(self.project_images(images), images)[-1]
            b = self.text_graph(self.project_texts(texts), texts)[-1]
        # One batch whose sequence is the pool: (1, N, width) attends over (1, M, width). What is attended to is a view
        # of its own, since the order in which gradients add up decides their last bits.
        image_pool, text_pool = a[:], b[:]
        seen_by_images = self.images_see_texts(a[None], text_pool[None], text_pool[None], need_weights=False)[0][0]
        seen_by_texts = self.texts_see_images(b[None], image_pool[None], image_pool[None], need_weights=False)[0][0]
        return unit_scale(a + seen_by_images), unit_scale(b + seen_by_texts)


class _ModalityGraph(nn.Module):
    """GCN layers over the k-nearest-neighbour graph within one modality, each with dropout and a residual."""

    def __init__(self, dim: int, layers: int, neighbours: int, dropout: float) -> None:
        super().__init__()
        self.neighbours = neighbours  # 0: no edges
        self.convolutions = nn.ModuleList(GCNConv(dim, dim) for _ in range(layers))
        self.drop = nn.Dropout(dropout)

    def forward(self, nodes: Tensor, features: Tensor) -> list[Tensor]:
        """The nodes `(N, dim)` before the first layer and after each, along edges of the features `(N, D)`."""
        edges, weight = torch.empty(2, 0, dtype=torch.long, device=nodes.device), nodes.new_empty(0)
        if self.neighbours:
            edges, weight = cosine_knn_edges(features, k=self.neighbours)
        depths = [nodes]
        for convolution in self.convolutions:
            depths.append(depths[-1] + self.drop(torch.relu(convolution(depths[-1], edges, weight))))
        return depths


class _AttentionGraph(nn.Module):
    """Layers of messages between the modalities along attention edges, which learned projections decide once."""

    def __init__(self, dim: int, layers: int, neighbours: int, dropout: float) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.image_queries, self.image_keys, self.text_queries, self.text_keys = (nn.Linear(dim, dim) for _ in range(4))
        self.to_images, self.to_texts = (nn.ModuleList(GraphConv(dim, dim) for _ in range(layers)) for _ in range(2))
        self.drop = nn.Dropout(dropout)

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        text_keys, image_keys = self.text_keys(texts), self.image_keys(images)
        into_images = attention_edges(self.image_queries(images), text_keys, self.neighbours)
        into_texts = attention_edges(self.text_queries(texts), image_keys, self.neighbours)
        for to_images, to_texts in zip(self.to_images, self.to_texts, strict=True):
            to_image, to_text = to_images((texts, images), *into_images), to_texts((images, texts), *into_texts)
            images, texts = images + self.drop(torch.relu(to_image)), texts + self.drop(torch.relu(to_text))
        return images, texts


class HeteroGNN(PairFuser):
    """A heterogeneous graph as PyTorch Geometric has it: two kinds of nodes, four kinds of edges.
    An MLP maps each modality to `hidden_dim`. A node receives from the `neighbours` nearest of its own modality
    ("near", by the encoders' features) and of the other ("like", by the projected nodes, without a gradient). Each
    layer has weights per relation (SAGEConv with the mean, Hamilton et al. 2017, algorithm 1), takes the mean over a
    node's relations (Schlichtkrull et al. 2018, eq. 2, sum them), and is added to the nodes."""

    transductive = True

    def __init__(self, image_dim: int = 2048, text_dim: int = 768, hidden_dim: int = 512, layers: int = 1,
                 neighbours: int = 5, dropout: float = 0.3, feature_dropout: float = 0.0) -> None:  # fmt: skip
        super().__init__(image_dim, text_dim, hidden_dim, dropout, feature_dropout)
        self.neighbours = neighbours
        self.project_images = _projection(image_dim, hidden_dim, dropout)
        self.project_texts = _projection(text_dim, hidden_dim, dropout)
        self.convolutions = nn.ModuleList(
            HeteroConv({relation: SAGEConv(hidden_dim, hidden_dim) for relation in RELATIONS}, aggr="mean")
            for _ in range(layers)
        )
        self.drop = nn.Dropout(dropout)

    def graph(self, images: Tensor, texts: Tensor) -> HeteroData:
        """The pool as PyG's data: `x` of "image" and "text" nodes, and an `edge_index` for each of `RELATIONS`."""
        images, texts = self.prepare(images, texts)
        data, features = HeteroData(), {"image": images, "text": texts}
        data["image"].x, data["text"].x = self.project_images(images), self.project_texts(texts)
        for source, name, target in RELATIONS:
            ends = (features[source],) if name == "near" else (data[source].x.detach(), data[target].x.detach())
            data[source, name, target].edge_index = cosine_knn_edges(*ends, k=self.neighbours)[0]
        return data

    def nodes(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Projected and convolved nodes; each depends on the whole pool."""
        data = self.graph(images, texts)
        nodes = data.x_dict
        for convolution in self.convolutions:
            updates = convolution(nodes, data.edge_index_dict)
            nodes = {kind: nodes[kind] + self.drop(torch.relu(updates[kind])) for kind in nodes}
        return unit_scale(nodes["image"]), unit_scale(nodes["text"])


def _projection(dim: int, hidden_dim: int, dropout: float, kind: str = "mlp") -> nn.Module:
    """An MLP or a single layer to the common width."""
    first = nn.Linear(dim, hidden_dim)
    if kind == "linear":
        return first
    return nn.Sequential(first, nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden_dim, hidden_dim))
