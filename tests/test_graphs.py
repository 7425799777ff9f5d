"""Edges against brute force and torch, layers against hand computation, graph fusers against dense recomputation."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import GCNConv

import mmkit.graphs
from helpers import settings
from mmkit import HeteroGNN, MmkitError, MultimodalGNN, PairedFeatures, PairFuser, attention_edges, cosine_knn_edges
from mmkit.graphs import RELATIONS


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.tolist(), b.tolist()
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b) or 1.0)


def brute_force_edges(source: Tensor, target: Tensor | None, k: int) -> dict[tuple[int, int], float]:
    """`{(neighbour, node): weight}` by loops over all pairs."""
    edges = {}
    for node, vector in enumerate(source if target is None else target):
        candidates = [j for j in range(len(source)) if target is not None or j != node]
        nearest = sorted(candidates, key=lambda j: -cosine(source[j], vector))[:k]
        edges |= {(j, node): min(1.0, max(0.0, cosine(source[j], vector))) for j in nearest}
    return edges


def as_dict(edges: Tensor, weight: Tensor) -> dict[tuple[int, int], float]:
    pairs = [tuple(pair) for pair in edges.T.tolist()]
    assert len(set(pairs)) == len(pairs) == len(weight)
    return dict(zip(pairs, weight.tolist(), strict=True))


def received(edges: Tensor, weight: Tensor, senders: int, receivers: int) -> Tensor:
    """The matrix `(receivers, senders)` of weights; those of the same edge add up."""
    return weight.new_zeros(receivers, senders).index_put((edges[1], edges[0]), weight, accumulate=True)


@pytest.mark.slow
def test_importing_the_graphs_keeps_torch_geometrics_deprecation_out_of_the_readers_sight():
    code = "import mmkit.graphs; from torch_geometric.nn import GCNConv"
    subprocess.run([sys.executable, "-W", "error::FutureWarning", "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("rows", [4, 2048])
@pytest.mark.parametrize("k", [1, 3, 99])
@pytest.mark.parametrize("target", [None, random(9, 5, seed=1)], ids=["within", "across"])
def test_edges_equal_a_brute_force_loop_in_blocks_of_any_size(k, target, rows, monkeypatch):
    monkeypatch.setattr(mmkit.graphs, "_BLOCK_ROWS", rows)
    source = random(20, 5)
    edges, weight = cosine_knn_edges(source, target, k=k)
    found, expected = as_dict(edges, weight), brute_force_edges(source, target, k)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, abs=1e-5)
    nodes, each = (20, min(k, 19)) if target is None else (9, min(k, 20))
    assert edges[1].tolist() == [node for node in range(nodes) for _ in range(each)]
    assert (weight.reshape(-1, each).diff(dim=1) <= 0).all(), "from near to far"


def test_no_node_is_its_own_neighbour_even_beside_a_duplicate_and_negative_cosines_count_as_none():
    edges, weight = cosine_knn_edges(random(6, 4).repeat(2, 1), k=11)
    assert (edges[0] != edges[1]).all()
    assert weight[(edges[0] - edges[1]).abs() == 6].tolist() == pytest.approx([1.0] * 12)
    found = as_dict(*cosine_knn_edges(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.6, 0.8]]), k=2))
    assert found == pytest.approx({(1, 0): 0.0, (2, 0): 0.6, (0, 1): 0.0, (2, 1): 0.0, (0, 2): 0.6, (1, 2): 0.0})
    _, weight = cosine_knn_edges(random(50, 2).repeat(2, 1) * 1e3, k=60)
    assert weight.min() == 0 and weight.max() <= 1


@pytest.mark.parametrize("sizes", [(1, None), (0, None), (4, 0), (0, 4), (0, 0)], ids=str)
def test_sets_without_a_pair_have_no_edges(sizes):
    source, target = random(sizes[0], 3), None if sizes[1] is None else random(sizes[1], 3)
    found = [cosine_knn_edges(source, target, k=2)]
    if target is not None:
        found.append(attention_edges(target, source))
    for edges, weight in found:
        assert edges.shape == (2, 0) and edges.dtype == torch.long and weight.shape == (0,)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_has_no_nearest_is_refused(value):
    broken, whole = random(4, 3), random(4, 3)
    broken[2, 1] = value
    for edges in (cosine_knn_edges, attention_edges):
        for pair in ((broken, whole), (whole, broken)):
            with pytest.raises(MmkitError, match=r"NaN or infinity.*Remedy"):
                edges(*pair)
        with pytest.raises(MmkitError, match=r"k is 0.*Remedy"):
            edges(whole, whole, k=0)


def top_attention(queries: Tensor, keys: Tensor, k: int) -> Tensor:
    logits = queries @ keys.T / math.sqrt(queries.shape[1])
    lowest = logits.sort(dim=1, descending=True).values[:, [k - 1]]
    return logits.masked_fill(logits < lowest, -torch.inf).softmax(dim=1)


def test_messages_along_attention_edges_equal_torchs_attention_of_the_top_k_with_gradients_into_both_sides():
    queries, keys, values = random(6, 5), random(9, 5, seed=1), random(9, 5, seed=2)
    expected = F.scaled_dot_product_attention(queries[None], keys[None], values[None])[0]
    torch.testing.assert_close(received(*attention_edges(queries, keys), 9, 6) @ values, expected)
    for k in (1, 3, 9):
        edges, weight = attention_edges(queries, keys, k)
        assert edges[1].bincount().tolist() == [k] * 6
        torch.testing.assert_close(received(edges, weight, 9, 6), top_attention(queries, keys, k))
    edges, weight = attention_edges(1e3 * queries, 1e3 * keys[:2], k=5)
    torch.testing.assert_close(received(edges, weight, 2, 6).sum(dim=1), torch.ones(6))
    queries, keys = (random(4, 3, seed=seed).double().requires_grad_() for seed in (0, 1))
    for k in (None, 2):
        assert torch.autograd.gradcheck(lambda q, x, k=k: attention_edges(q, x, k)[1], (queries, keys))


def gcn_by_hand(adjacency: Tensor, nodes: Tensor, layer: GCNConv) -> Tensor:
    """D^-1/2 (A + I) D^-1/2 X W + b, where `adjacency[i, j]` weighs the edge j → i."""
    with_loops = adjacency + torch.eye(len(adjacency))
    scale = with_loops.sum(dim=1).rsqrt().diag()
    return scale @ with_loops @ scale @ nodes @ layer.lin.weight.T + layer.bias


# --- the contract of every graph fuser -----------------------------------------------------------


def off_its_start(fuser: PairFuser) -> PairFuser:
    with torch.no_grad():
        for parameter in fuser.parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter, std=0.2)
    return fuser.eval()


def small_hetero(**changes: object) -> HeteroGNN:
    torch.manual_seed(0)
    return off_its_start(HeteroGNN(12, 8, 16, neighbours=3, **changes))


def small_gnn(heads: int = 4, **changes: object) -> MultimodalGNN:
    torch.manual_seed(0)
    return off_its_start(MultimodalGNN(12, 8, 16, heads, neighbours=3, **changes))


MAKERS = {kind: lambda kind=kind, **changes: small_gnn(edges=kind, **changes) for kind in mmkit.graphs.EDGES}
MAKERS |= {"hetero": small_hetero, "linear": lambda **changes: small_gnn(projection="linear", **changes)}
EVERY = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@EVERY
def test_a_score_depends_on_the_pool_but_not_on_its_order_and_equal_captions_score_equally(make):
    fuser, images, texts = make(layers=2), random(12, 12), random(12, 8, seed=1)
    scores, alone = fuser.score(images, texts), fuser.score(images[:5], texts[:5])
    assert mmkit.permutation_gap(fuser, images, texts) < 1e-3  # as many of both, or no index could be shared
    assert fuser.transductive and scores.std() > 0.05
    assert (alone - scores[:5, :5]).abs().max() > 0.01 * scores.std()
    scores = fuser.score(images, torch.cat([texts, texts[[2, 4]]]))
    torch.testing.assert_close(scores[:, 12:], scores[:, [2, 4]], rtol=1e-4, atol=1e-4)


@EVERY
def test_trained_on_noise_every_graph_is_at_chance(make):
    def train(noise: PairedFeatures, validation: PairedFeatures) -> PairFuser:
        fuser = make(dropout=0.0)
        mmkit.fit(fuser, noise, validation, settings(epochs=3))
        return fuser

    assert mmkit.noise_recall(train, (12, 8)) <= 0.025, "chance is 0.005; 5 hits in 200 have a probability of 0.004"


@EVERY
@pytest.mark.parametrize(("images", "texts"), [(1, 1), (1, 6), (6, 1), (2, 2)])
def test_the_smallest_pools_have_finite_scores_and_gradients(make, images, texts):
    fuser = make().train()
    scores = fuser.score(random(images, 12), random(texts, 8, seed=1))
    assert scores.shape == (images, texts) and torch.isfinite(scores).all()
    scores.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in fuser.parameters() if p.grad is not None)


@EVERY
def test_a_loaded_graph_scores_the_same(make, tmp_path):
    fuser, images, texts = make(layers=2), random(5, 12), random(6, 8, seed=1)
    fuser.save_pretrained(tmp_path)
    torch.manual_seed(99)
    loaded = type(fuser).from_pretrained(str(tmp_path)).eval()
    assert torch.equal(loaded.score(images, texts), fuser.score(images, texts))


def test_default_sizes_are_those_of_the_article():
    fuser = MultimodalGNN().eval()
    assert (fuser.image_dim, fuser.text_dim, fuser.width, fuser.images_see_texts.num_heads) == (2048, 768, 512, 8)
    assert fuser(torch.randn(3, 2048), torch.randn(3, 768)).shape == (3, 1024) == (3, fuser.fused_dim)


def test_what_does_not_exist_is_refused():
    with pytest.raises(MmkitError, match=r"No projection 'cnn'\. Valid names: mlp, linear"):
        small_gnn(projection="cnn")
    with pytest.raises(MmkitError, match=r"No edges 'knn'\. Valid names: cosine, attention, none"):
        small_gnn(edges="knn")
    with pytest.raises(MmkitError, match=r"hidden_dim 16 is not a multiple of heads 5"):
        small_gnn(heads=5)


def test_a_linear_projection_and_a_layer_are_the_articles_one_convolution():
    """`GCNConv` maps first and then passes messages: its weights times the projection's are those of one layer."""
    fuser, features = small_gnn(projection="linear"), random(7, 12)
    edges, weight = cosine_knn_edges(features, k=3)
    graph, one = fuser.image_graph.convolutions[0], GCNConv(12, 16)
    with torch.no_grad():
        nn.init.zeros_(fuser.project_images.bias)
        one.lin.weight.copy_(graph.lin.weight @ fuser.project_images.weight)
        one.bias.copy_(graph.bias)
        found = graph(fuser.project_images(features), edges, weight)
        torch.testing.assert_close(found, one(features, edges, weight), rtol=1e-4, atol=1e-5)


def graph_by_hand(graph: nn.Module, nodes: Tensor, features: Tensor, k: int) -> list[Tensor]:
    adjacency, depths = torch.zeros(len(nodes), len(nodes)), [nodes]
    for (neighbour, node), weight in (brute_force_edges(features, None, k) if k else {}).items():
        adjacency[node, neighbour] = weight
    for layer in graph.convolutions:
        depths.append(depths[-1] + gcn_by_hand(adjacency, depths[-1], layer).clamp(min=0))
    return depths


def attended(fuser: MultimodalGNN, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Every node with what it sees of the others, at length √16."""
    by_images, by_texts = fuser.images_see_texts(a, b, b)[0], fuser.texts_see_images(b, a, a)[0]
    return 4 * F.normalize(a + by_images, dim=1), 4 * F.normalize(b + by_texts, dim=1)


@pytest.mark.parametrize(("edges", "k"), [("cosine", 3), ("none", 0)])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_nodes_equal_a_dense_recomputation(layers, edges, k):
    fuser = small_gnn(layers=layers, edges=edges)
    images, texts = random(9, 12), random(7, 8, seed=1)
    a = graph_by_hand(fuser.image_graph, fuser.project_images(images), images, k)
    b = graph_by_hand(fuser.text_graph, fuser.project_texts(texts), texts, k)
    for found, expected in zip(fuser.nodes(images, texts), attended(fuser, a[-1], b[-1]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fuser.image_graph(fuser.project_images(images), images), a, rtol=1e-4, atol=1e-4)


def test_a_node_without_any_similar_other_is_finite_and_keeps_its_own_message():
    fuser, nodes = small_gnn(), random(5, 16)
    features = torch.cat([torch.zeros(1, 12), -torch.ones(1, 12), torch.ones(3, 12)])
    found, layer = fuser.image_graph(nodes, features)[-1], fuser.image_graph.convolutions[0]
    alone = nodes + (nodes @ layer.lin.weight.T + layer.bias).clamp(min=0)
    torch.testing.assert_close(found[:2], alone[:2])
    assert (found[2:] - alone[2:]).abs().max() > 0.01
    assert torch.isfinite(fuser.score(features, random(4, 8))).all()


def test_nodes_of_attention_edges_equal_a_dense_recomputation_and_the_adjacency_is_learned():
    fuser = small_gnn(edges="attention", layers=2)
    images, texts, graph = random(9, 12), random(7, 8, seed=1), fuser.graph

    def convolved(layer: nn.Module, nodes: Tensor, messages: Tensor) -> Tensor:
        return nodes + torch.relu(layer.lin_rel(messages) + layer.lin_root(nodes))

    a, b = fuser.project_images(images), fuser.project_texts(texts)
    from_texts = top_attention(graph.image_queries(a), graph.text_keys(b), 3)
    from_images = top_attention(graph.text_queries(b), graph.image_keys(a), 3)
    for to_images, to_texts in zip(graph.to_images, graph.to_texts, strict=True):
        a, b = convolved(to_images, a, from_texts @ b), convolved(to_texts, b, from_images @ a)
    for found, expected in zip(fuser.nodes(images, texts), attended(fuser, a, b), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    fuser.score(images, texts).square().sum().backward()
    for layer in ("image_queries", "image_keys", "text_queries", "text_keys"):
        assert getattr(graph, layer).weight.grad.abs().sum() > 0, layer


def test_the_heterogeneous_graph_has_four_relations_searched_by_themselves():
    fuser, images, texts = small_hetero(), random(9, 12), random(7, 8, seed=1)
    data = fuser.graph(images, texts)
    assert data.validate() and set(data.edge_types) == set(RELATIONS)
    a, b = data["image"].x, data["text"].x
    torch.testing.assert_close(a, fuser.project_images(images))
    ends = {("image", "image"): (images, None), ("text", "text"): (texts, None)}
    ends |= {("image", "text"): (a, b), ("text", "image"): (b, a)}
    for source, name, target in RELATIONS:
        found = {tuple(edge) for edge in data[source, name, target].edge_index.T.tolist()}
        assert found == brute_force_edges(*ends[source, target], 3).keys(), (source, target)


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_nodes_of_the_heterogeneous_graph_equal_a_loop(layers):
    fuser, images, texts = small_hetero(layers=layers), random(9, 12), random(7, 8, seed=1)
    data = fuser.graph(images, texts)
    nodes = {"image": data["image"].x, "text": data["text"].x}
    for convolution in fuser.convolutions:
        updates = {kind: torch.zeros_like(x) for kind, x in nodes.items()}
        for source, name, target in RELATIONS:
            layer, edges = convolution.convs[source, name, target], data[source, name, target].edge_index
            for node, vector in enumerate(nodes[target]):
                mean = nodes[source][edges[0, edges[1] == node]].mean(dim=0)
                updates[target][node] += (layer.lin_l(mean) + layer.lin_r(vector)) / 2  # two relations lead to each
        nodes = {kind: x + updates[kind].clamp(min=0) for kind, x in nodes.items()}
    for found, kind in zip(fuser.nodes(images, texts), ("image", "text"), strict=True):
        torch.testing.assert_close(found, 4 * F.normalize(nodes[kind], dim=1), rtol=1e-4, atol=1e-4)
