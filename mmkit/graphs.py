"""The graph fusers: system B with several kinds of edges, over a pool or a bank, and a heterogeneous graph."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .edges import attention_edges, cosine_knn_edges
from .errors import MmkitError
from .features import PairedFeatures
from .fusers import PairFuser, unit_scale

with warnings.catch_warnings():  # torch-geometric 2.8 scripts a function at import, which torch 2.14 deprecates
    warnings.simplefilter("ignore", FutureWarning)
    from torch_geometric.data import HeteroData
    from torch_geometric.nn import GCNConv, GraphConv, HeteroConv, SAGEConv

EDGES = ("cosine", "mutual", "attention", "none")
PROJECTIONS = ("mlp", "linear")
RELATIONS = (("image", "near", "image"), ("text", "near", "text"), ("image", "like", "text"), ("text", "like", "image"))


def _projections(
    image_dim: int, text_dim: int, hidden_dim: int, dropout: float, projection: str = "mlp"
) -> tuple[nn.Module, nn.Module]:
    """An MLP or a single layer per modality to the common width."""
    if projection not in PROJECTIONS:
        raise MmkitError(f"No projection {projection!r}. Valid names: {', '.join(PROJECTIONS)}")
    if projection == "linear":
        return nn.Linear(image_dim, hidden_dim), nn.Linear(text_dim, hidden_dim)
    return tuple(
        nn.Sequential(nn.Linear(dim, hidden_dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden_dim, hidden_dim))
        for dim in (image_dim, text_dim)
    )


class _Residual(nn.Module):
    """How every graph here adds a layer's messages to the nodes."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def add(self, nodes: Tensor, update: Tensor) -> Tensor:
        return nodes + F.dropout(torch.relu(update), self.dropout, self.training)


class _ModalityGraph(_Residual):
    """GCN layers over the k-nearest-neighbour graph within one modality, each with dropout and a residual."""

    def __init__(self, dim: int, layers: int, neighbours: int, dropout: float, edges: str) -> None:
        super().__init__(dropout)
        self.neighbours, self.edges = neighbours, edges
        self.convolutions = nn.ModuleList(GCNConv(dim, dim) for _ in range(layers))

    def forward(self, nodes: Tensor, features: Tensor, hidden: Tensor | None = None) -> list[Tensor]:
        """The nodes `(N, dim)` before the first layer and after each. With `hidden` `(N, bank)` the first rows are
        the bank, from which alone all receive; it marks what a node must not see of it."""
        if self.edges == "none":
            edges, weight = torch.empty(2, 0, dtype=torch.long, device=nodes.device), nodes.new_empty(0)
        elif hidden is None:
            edges, weight = cosine_knn_edges(features, k=self.neighbours, mutual=self.edges == "mutual")
        else:
            bank = features[: hidden.shape[1]]
            edges, weight = cosine_knn_edges(bank, features, self.neighbours, hidden=hidden)
        depths = [nodes]
        for convolution in self.convolutions:
            depths.append(self.add(depths[-1], convolution(depths[-1], edges, weight)))
        return depths


class _AttentionGraph(_Residual):
    """Layers of messages between the modalities along attention edges, which learned projections decide once."""

    def __init__(self, dim: int, layers: int, neighbours: int, dropout: float) -> None:
        super().__init__(dropout)
        self.neighbours = neighbours
        self.image_queries, self.image_keys, self.text_queries, self.text_keys = (nn.Linear(dim, dim) for _ in range(4))
        self.to_images, self.to_texts = (nn.ModuleList(GraphConv(dim, dim) for _ in range(layers)) for _ in range(2))

    def forward(
        self, images: Tensor, texts: Tensor, hidden: tuple[Tensor | None, Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As `_ModalityGraph`, for both modalities."""
        senders = slice(None if hidden[0] is None else hidden[0].shape[1])
        text_keys, image_keys = self.text_keys(texts[senders]), self.image_keys(images[senders])
        into_images = attention_edges(self.image_queries(images), text_keys, self.neighbours, hidden[0])
        into_texts = attention_edges(self.text_queries(texts), image_keys, self.neighbours, hidden[1])
        depths = [images], [texts]
        for to_images, to_texts in zip(self.to_images, self.to_texts, strict=True):
            images, texts = (
                self.add(images, to_images((texts, images), *into_images)),
                self.add(texts, to_texts((images, texts), *into_texts)),
            )
            depths[0].append(images)
            depths[1].append(texts)
        return depths


def _marks(features: Tensor) -> Tensor:
    """An integer per row `(N,)`: the same for the same numbers and, but for a vanishing chance, for no others."""
    factors = torch.randint(2**62, features.shape[1:], generator=torch.Generator().manual_seed(0))
    return (features.float().contiguous().view(torch.int32).long() * factors.to(features.device)).sum(dim=1)


class Bank(nn.Module):
    """A fixed choice of training pairs, `size` images with one caption each, that a node sees in place of its pool."""

    def __init__(self, size: int, image_dim: int, text_dim: int) -> None:
        super().__init__()
        self.register_buffer("images", torch.zeros(size, image_dim))
        self.register_buffer("texts", torch.zeros(size, text_dim))
        # all captions of the bank's images, which are known in training only
        self.register_buffer("caption_marks", torch.zeros(0, dtype=torch.long), persistent=False)
        self.register_buffer("caption_rows", torch.zeros(0, dtype=torch.long), persistent=False)

    def fill(self, train: PairedFeatures) -> None:
        """Choose among the training images that have captions, by torch's seed."""
        size, images = len(self.images), train.owner.unique()
        if len(images) < size:
            raise MmkitError(
                f"The bank takes {size} images with captions, and the training set has {len(images)}. "
                f"Remedy: build the fuser with bank={len(images)} or less."
            )
        chosen = images[torch.randperm(len(images))[:size]]
        place = torch.full((len(train.image_rows),), -1)
        place[chosen] = torch.arange(size)
        captions = torch.randperm(len(train.owner))
        captions = captions[place[train.owner[captions]] >= 0]
        rows, by_row = place[train.owner[captions]].sort(stable=True)
        captions, count = captions[by_row], rows.bincount()
        self.images.copy_(train.images(chosen))
        self.texts.copy_(train.captions(captions[count.cumsum(0) - count]))
        self.caption_rows = rows.to(self.images.device)
        self.caption_marks = _marks(train.captions(captions)).to(self.images.device)

    def own(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Which pairs of the bank are a node's own, `(N, size)` and `(M, size)` bool; outside of training none is.

        A training item would find itself and its partner in the bank, as no new item will. An image's own pair is
        the one with the same features; a caption's that of its image, which is in the batch as well: the same words
        said of another image are a neighbour like any other. A node to which all would be its own sees them all.
        """
        if not self.training:
            return tuple(part.new_zeros(len(part), len(self.images), dtype=torch.bool) for part in (images, texts))
        of_images = _marks(images)[:, None] == _marks(self.images)
        same = _marks(texts)[:, None] == self.caption_marks
        of_texts = torch.zeros(len(texts), len(self.images), device=texts.device)
        of_texts = of_texts.index_add(1, self.caption_rows, same.float()) > 0
        both = of_images, of_texts & of_images.any(dim=0)
        return tuple(own & ~own.all(dim=1, keepdim=True) for own in both)


class MultimodalGNN(PairFuser):
    """System B: images and texts as nodes, a GCN per modality, multi-head attention across the modalities.

    1. An MLP maps each modality to `hidden_dim`, as the article's readers ask; with `projection="linear"` a single
       layer does, as the weights of the article's one `GCNConv` from each modality's own size do.
    2. `layers` GCN layers (Kipf & Welling 2017, eq. 2) pass messages over each modality's own cosine
       k-nearest-neighbour graph of the encoders' features. No index is shared between the modalities, so the
       pairing cannot leak.
    3. Cross-modal attention with `heads` heads: every image attends to the pool's texts and every text to its
       images, over content only.
    4. Nodes are fused and matched as in system A.

    `edges` changes step 2. "mutual" keeps the edges that both ends chose. "attention" passes messages between the
    modalities instead, as the article has it: each node receives from its `neighbours` of the largest learned
    attention (`attention_edges`), by GraphConv layers (Morris et al. 2019, eq. 3). "none" leaves the layers of
    "cosine" without a message: the same weights, and each node sees itself alone.

    A node sees the others of its pool: the fuser is transductive, and its reports have to say how large the
    pool was. With a `bank` it is not: `observe` keeps so many training pairs, saved with the weights, and nodes
    receive messages and attention from those alone, so a logit is the same in any pool. In training an item's own
    pair is hidden from it; afterwards it is not, so judge on items that the bank did not come from.
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
        edges: str = "cosine",
        bank: int = 0,
        projection: str = "mlp",
    ) -> None:
        if hidden_dim % heads:
            raise MmkitError(f"hidden_dim {hidden_dim} is not a multiple of heads {heads}.")
        if edges not in EDGES:
            raise MmkitError(f"No edges {edges!r}. Valid names: {', '.join(EDGES)}")
        if bank < 0 or (bank and edges == "mutual"):
            raise MmkitError(
                f"No bank of {bank} with edges {edges!r}: messages lead from the bank to a node and never back. "
                'Remedy: edges="cosine", and a bank of 0 or more pairs.'
            )
        super().__init__(image_dim, text_dim, hidden_dim, dropout, feature_dropout)
        projections = _projections(image_dim, text_dim, hidden_dim, dropout, projection)
        self.project_images, self.project_texts = projections
        if edges == "attention":
            self.graph = _AttentionGraph(hidden_dim, layers, neighbours, dropout)
        else:
            self.image_graph, self.text_graph = (
                _ModalityGraph(hidden_dim, layers, neighbours, dropout, edges) for _ in range(2)
            )
        self.images_see_texts, self.texts_see_images = (
            nn.MultiheadAttention(hidden_dim, heads, dropout=dropout, batch_first=True) for _ in range(2)
        )
        self.edges, self.transductive = edges, not bank
        self.bank = Bank(bank, image_dim, text_dim) if bank else None

    @property
    def whole_batch(self) -> bool:
        """A bank hides a caption's own pair by looking at all images of the batch."""
        return True

    def observe(self, train: PairedFeatures) -> None:
        """Means and deviations as in `PairFuser`, and the bank. An error if it is larger than the training set."""
        super().observe(train)
        if self.bank is not None:
            self.bank.fill(train)

    def nodes(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Projected, convolved and attended nodes; each depends on the whole pool, or on itself and the bank."""
        image_depths, text_depths, hidden = self._convolve(images, texts)
        image_nodes, text_nodes, size = image_depths[-1], text_depths[-1], self._bank_size
        image_senders, text_senders = (nodes[: size or None] for nodes in (image_nodes, text_nodes))
        image_nodes, text_nodes = image_nodes[size:], text_nodes[size:]
        seen_by_images = self._attend(self.images_see_texts, image_nodes, text_senders, hidden[0])
        seen_by_texts = self._attend(self.texts_see_images, text_nodes, image_senders, hidden[1])
        return unit_scale(image_nodes + seen_by_images), unit_scale(text_nodes + seen_by_texts)

    def depths(self, images: Tensor, texts: Tensor) -> list[Tensor]:
        """The image nodes `(N, hidden_dim)` before the first graph layer and after each, `layers + 1` in all."""
        return [nodes[self._bank_size :] for nodes in self._convolve(images, texts)[0]]

    @property
    def _bank_size(self) -> int:
        return 0 if self.bank is None else len(self.bank.images)

    def _convolve(self, images: Tensor, texts: Tensor) -> tuple[list[Tensor], list[Tensor], tuple]:
        """Steps 1 and 2: images and texts at each depth, after the bank's, and what each must not see of the bank."""
        self.check_sizes(images, texts)
        hidden = None, None
        if self.bank is not None:
            if not self.bank.images.any():
                raise MmkitError("The bank is empty. Remedy: fit(fuser, …), or fuser.observe(train)")
            hidden = self.bank.own(images, texts)
            images, texts = torch.cat([self.bank.images, images]), torch.cat([self.bank.texts, texts])
            itself = torch.eye(self._bank_size, dtype=torch.bool, device=images.device)
            hidden = tuple(torch.cat([itself, own]) for own in hidden)
        images, texts = self.prepare(images, texts)
        if self.edges == "attention":
            depths = self.graph(self.project_images(images), self.project_texts(texts), hidden)
        else:
            of_images = self.image_graph(self.project_images(images), images, hidden[0])
            depths = of_images, self.text_graph(self.project_texts(texts), texts, hidden[1])
        return *depths, hidden

    def _attend(
        self, attention: nn.MultiheadAttention, queries: Tensor, senders: Tensor, hidden: Tensor | None
    ) -> Tensor:
        """One batch whose sequence is the senders: `(1, N, width)` attends over `(1, M, width)`."""
        mask = None if hidden is None else hidden[self._bank_size :]
        return attention(queries[None], senders[None], senders[None], attn_mask=mask, need_weights=False)[0][0]


class HeteroGNN(PairFuser):
    """A heterogeneous graph as PyTorch Geometric has it: two kinds of nodes, four kinds of edges.

    An MLP maps each modality to `hidden_dim`. A node receives from the `neighbours` nearest of its own modality
    ("near", by the encoders' features) and from the nearest of the other ("like", by the projected nodes). Across
    the modalities each direction is searched by itself: in one mixed pool the nearest neighbours would all be of
    one's own modality. Each of `layers` layers has weights per relation (SAGEConv with the mean, Hamilton et al. 2017,
    algorithm 1), takes the mean over a node's relations (Schlichtkrull et al. 2018, eq. 2, sum them), and is added to
    the nodes. The search has no gradient; the projections learn through the messages and the residual.

    A node sees the others of its pool: the fuser is transductive.
    """

    transductive = True

    def __init__(
        self,
        image_dim: int = 2048,
        text_dim: int = 768,
        hidden_dim: int = 512,
        layers: int = 1,
        neighbours: int = 5,
        dropout: float = 0.3,
        feature_dropout: float = 0.0,
    ) -> None:
        super().__init__(image_dim, text_dim, hidden_dim, dropout, feature_dropout)
        self.neighbours = neighbours
        self.project_images, self.project_texts = _projections(image_dim, text_dim, hidden_dim, dropout)
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
