"""Edges from features, their conversion to a matrix and back, and how far messages have smoothed the nodes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import MmkitError

INDEXES = ("exact", "hnsw")
_LINKS, _WALKED = 32, 80  # of an index: neighbours of a node, and nodes that a walk keeps in view
_BLOCK_ROWS = 2048  # similarities of so many nodes to all others are held at a time


def nearest(
    sources: Tensor, targets: Tensor | None, k: int, hidden: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The `k` sources `(N, D)` of the largest inner product with each target `(M, D)`, by exact search in blocks.

    Without `targets` they are the sources themselves, none of which is its own neighbour. `hidden` `(M, N)` bool marks
    pairs that must not be joined. Returns products `(E,)`, rows of sources `(E,)` and rows of targets `(E,)`, target
    after target, each target's neighbours from near to far.
    """
    inside = targets is None
    targets = sources if targets is None else targets
    k = min(k, len(sources) - inside)
    if k < 1 or not len(targets):
        nothing = torch.empty(0, dtype=torch.long, device=sources.device)
        return sources.new_empty(0), nothing, nothing
    products, neighbours = [], []
    for first in range(0, len(targets), _BLOCK_ROWS):
        similarity = targets[first : first + _BLOCK_ROWS] @ sources.T
        if inside:
            rows = torch.arange(len(similarity), device=sources.device)
            similarity[rows, rows + first] = -torch.inf
        if hidden is not None:
            similarity = similarity.masked_fill(hidden[first : first + _BLOCK_ROWS], -torch.inf)
        top = similarity.topk(k, dim=1)
        products.append(top.values)
        neighbours.append(top.indices)
    found = torch.cat(products).flatten()
    receivers = torch.arange(len(targets), device=sources.device).repeat_interleave(k)
    if hidden is None:
        return found, torch.cat(neighbours).flatten(), receivers
    kept = found > -torch.inf
    return found[kept], torch.cat(neighbours).flatten()[kept], receivers[kept]


def _nearest_by_index(sources: Tensor, targets: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `nearest`, but by walks over a graph of neighbours (Malkov & Yashunin 2018, HNSW), which may miss some."""
    import faiss  # for large pools alone

    inside, device = targets is None, sources.device
    sources = sources.detach().float().cpu()
    targets = sources if targets is None else targets.detach().float().cpu()
    index = faiss.IndexHNSWFlat(sources.shape[1], _LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = index.hnsw.efSearch = max(_WALKED, 4 * k)
    index.add(sources.numpy())
    found = index.search(targets.numpy(), min(k + inside, len(sources)))
    products, senders = (torch.from_numpy(part) for part in found)
    receivers = torch.arange(len(targets))[:, None].expand_as(senders)
    kept = senders >= 0  # less than asked for may be found
    if inside:
        kept &= senders != receivers
    kept &= kept.cumsum(dim=1) <= k
    return products[kept].to(device), senders[kept].to(device), receivers[kept].to(device)


def cosine_knn_edges(
    source: Tensor,
    target: Tensor | None = None,
    k: int = 5,
    mutual: bool = False,
    hidden: Tensor | None = None,
    index: str = "exact",
) -> tuple[Tensor, Tensor]:
    """The `k` nearest neighbours by cosine, as directed edges neighbour → node.

    Without `target` the graph lies within `source` `(N, D)`: each node receives edges from its `k` nearest others,
    never from itself. With `target` `(M, D)` it is bipartite: each target receives edges from its `k` nearest
    sources, but for pairs that `hidden` `(M, N)` bool rules out. `mutual=True` (one set only) keeps an edge if its
    reverse is there too.

    Returns `edge_index` `(2, E)`, row 0 the sources, and `edge_weight` `(E,)` in [0, 1]: a cosine below zero
    counts as no similarity, since a negative weight makes GCN's square root of a degree NaN. Edges come from
    features alone; an edge that knew which pairs are true would hand the labels to the network.

    The search is exact: N·M·D multiplications, and memory for 2,048 rows of M × N similarities. That does for pools
    of tens of thousands of nodes; each tenfold pool takes a hundredfold time. Beyond, `index="hnsw"` asks an index of
    Faiss, whose time grows nearly as the pool does and which finds almost all of the nearest; without `hidden`.
    """
    if index not in INDEXES:
        raise MmkitError(f"No index {index!r}. Valid names: {', '.join(INDEXES)}")
    if index == "hnsw" and hidden is not None:
        raise MmkitError('An index cannot hide pairs. Remedy: index="exact"')
    if k < 1:
        raise MmkitError(f"k is {k}; a node needs at least one neighbour.")
    if mutual and target is not None:
        raise MmkitError("mutual edges are defined within one set of nodes; leave out target.")
    _check_finite(source, target)
    normalized = None if target is None else F.normalize(target, dim=-1)
    if index == "hnsw" and len(source) and (target is None or len(target)):
        weight, senders, receivers = _nearest_by_index(F.normalize(source, dim=-1), normalized, k)
    else:
        weight, senders, receivers = nearest(F.normalize(source, dim=-1), normalized, k, hidden)
    edges, weight = torch.stack([senders, receivers]), weight.clamp(0, 1)
    if mutual:
        key, reverse = edges[0] * len(source) + edges[1], edges[1] * len(source) + edges[0]
        kept = torch.isin(key, reverse)
        edges, weight = edges[:, kept], weight[kept]
    return edges, weight


def attention_edges(
    queries: Tensor, keys: Tensor, k: int | None = None, hidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1) as directed edges key → query.

    Each query of `(M, D)` receives edges from the keys `(N, D)`, from its `k` of the largest weight or, by default,
    from all, but for pairs that `hidden` `(M, N)` bool rules out. The weights are the softmax of q·k / √D over the
    edges of a query, so they sum to 1 wherever it has any, and gradients flow through them into both projections.

    Returns `edge_index` `(2, E)`, row 0 the keys, and `edge_weight` `(E,)`.
    """
    if k is not None and k < 1:
        raise MmkitError(f"k is {k}; a query needs at least one key.")
    _check_finite(queries, keys)
    products, senders, receivers = nearest(keys, queries, len(keys) if k is None else k, hidden)
    logits = products / queries.shape[1] ** 0.5
    highest = logits.new_full((len(queries),), -torch.inf).scatter_reduce(0, receivers, logits.detach(), "amax")
    weight = (logits - highest.index_select(0, receivers)).exp()
    total = weight.new_zeros(len(queries)).index_add(0, receivers, weight)
    return torch.stack([senders, receivers]), weight / total.index_select(0, receivers)


def to_dense(edges: Tensor, weight: Tensor, sizes: tuple[int, int]) -> Tensor:
    """`edge_index` `(2, E)` and `edge_weight` `(E,)` → the matrix `(N, M)` = `sizes` of weights source → target.

    Weights of the same edge add up, as their messages do. Gradients flow. PyG's layers on a matrix, such as
    DenseGCNConv, read row i as what node i *receives*, and count the diagonal as self-loops: they agree with
    the layers on edges only where the matrix is symmetric, with a zero diagonal and no negative weight.
    """
    _check_weights(weight)
    if edges.shape != (2, len(weight)):
        raise MmkitError(f"Edges of shape {tuple(edges.shape)} do not go with {len(weight)} weights.")
    limits = torch.tensor(sizes, device=edges.device)[:, None]
    if ((edges < 0) | (edges >= limits)).any():
        raise MmkitError(f"Edges lead outside of {sizes[0]} sources and {sizes[1]} targets.")
    return weight.new_zeros(sizes).index_put((edges[0], edges[1]), weight, accumulate=True)


def to_edges(dense: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix `(N, M)` of weights source → target → `edge_index` `(2, E)` and `edge_weight` `(E,)` of what is not 0.

    The reverse of `to_dense`, with the same conditions. A matrix must never stand in for an `edge_index`: a 2 × E one
    of integers would be taken for it without an error.
    """
    if dense.ndim != 2:
        raise MmkitError(f"A matrix of weights has two axes; this has shape {tuple(dense.shape)}.")
    _check_weights(dense)
    edges = dense.nonzero().T.contiguous()
    return edges, dense[edges[0], edges[1]]


def dirichlet_energy(nodes: Tensor, edges: Tensor, weight: Tensor | None = None) -> float:
    """Over-smoothing along edges: `1/N · Σ over edges j → i of w · ‖xᵢ - xⱼ‖²` of nodes `(N, D)`.

    It is 0 if and only if all joined nodes are equal (Rusch et al. 2023, who take all weights as 1). The energy of
    Cai & Wang (2020, definition 1) divides each node by the root of its degree, and so is 0 for nodes that differ.
    It grows with the square of the nodes' length: to compare depths, give the nodes unit length.
    """
    if not len(nodes):
        raise MmkitError("There are no nodes to measure.")
    weight = nodes.new_ones(edges.shape[1]) if weight is None else weight
    _check_weights(weight)
    squares = (nodes[edges[0]] - nodes[edges[1]]).square().sum(dim=1)
    return ((weight * squares).sum() / len(nodes)).item()


def mean_pairwise_distance(nodes: Tensor) -> float:
    """Over-smoothing without a graph: the mean cosine distance `1 - cos(xᵢ, xⱼ)` of all pairs i ≠ j of `(N, D)`.

    0 if all nodes point the same way, about 1 if they are spread evenly. One pass: `Σ cos = ‖Σ x̂‖² - Σ ‖x̂‖²`.
    """
    if len(nodes) < 2:
        raise MmkitError(f"A distance takes two nodes, and there are {len(nodes)}.")
    units = F.normalize(nodes.double(), dim=-1)
    cosines = units.sum(dim=0).square().sum() - units.square().sum()
    return (1 - cosines / (len(nodes) * (len(nodes) - 1))).item()


def _check_finite(*parts: Tensor | None) -> None:
    if not all(part is None or torch.isfinite(part).all() for part in parts):
        raise MmkitError("The features hold NaN or infinity, so nearest neighbours are undefined.")


def _check_weights(weight: Tensor) -> None:
    if not torch.isfinite(weight).all() or (weight < 0).any():
        raise MmkitError(
            "The weights hold NaN, infinity or numbers below 0, which have no square root of a degree. "
            "Remedy: weight.clamp(min=0), and look for NaN in the features."
        )
