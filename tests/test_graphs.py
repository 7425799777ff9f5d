"""Edges against brute force, graph layers against hand computation, and the graph fuser against both."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmkit
from mmkit import MmkitError, MultimodalGNN, cosine_knn_edges

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    from torch_geometric.nn import DenseGCNConv, GCNConv
    from torch_geometric.utils import dense_to_sparse


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(a: Tensor, b: Tensor) -> float:
    lengths = math.sqrt(sum(x * x for x in a.tolist())) * math.sqrt(sum(x * x for x in b.tolist()))
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True)) / lengths if lengths else 0.0


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


def assert_same_edges(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert all(abs(found[pair] - expected[pair]) < 1e-5 for pair in expected)


# --- edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 7])
def test_edges_within_one_set_equal_a_brute_force_loop(k):
    nodes = random(20, 5)
    assert_same_edges(as_dict(*cosine_knn_edges(nodes, k=k)), brute_force_edges(nodes, None, k))


@pytest.mark.parametrize("k", [1, 4])
def test_bipartite_edges_equal_a_brute_force_loop(k):
    source, target = random(15, 5), random(9, 5, seed=1)
    edges, weight = cosine_knn_edges(source, target, k=k)
    assert_same_edges(as_dict(edges, weight), brute_force_edges(source, target, k))
    assert edges[1].bincount(minlength=9).tolist() == [k] * 9


@pytest.mark.parametrize("rows", [1, 4, 20])
def test_edges_do_not_depend_on_the_block_size(rows, monkeypatch):
    source, target = random(18, 5), random(11, 5, seed=1)
    inside, across = cosine_knn_edges(source, k=3), cosine_knn_edges(source, target, k=3)
    monkeypatch.setattr(mmkit.graphs, "_BLOCK_ROWS", rows)
    assert_same_edges(as_dict(*cosine_knn_edges(source, k=3)), as_dict(*inside))
    assert_same_edges(as_dict(*cosine_knn_edges(source, target, k=3)), as_dict(*across))


def test_no_node_is_its_own_neighbour_even_beside_a_duplicate():
    nodes = random(6, 4).repeat(2, 1)
    edges, weight = cosine_knn_edges(nodes, k=11)
    assert (edges[0] != edges[1]).all()
    assert weight[(edges[0] - edges[1]).abs() == 6].tolist() == pytest.approx([1.0] * 12)


def test_weights_are_between_0_and_1_and_negative_cosines_count_as_none():
    nodes = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.6, 0.8]])
    found = as_dict(*cosine_knn_edges(nodes, k=2))
    expected = {(1, 0): 0.0, (2, 0): 0.6, (0, 1): 0.0, (2, 1): 0.0, (0, 2): 0.6, (1, 2): 0.0}
    assert found == pytest.approx(expected)
    _, weight = cosine_knn_edges(random(50, 2).repeat(2, 1) * 1e3, k=60)
    assert weight.min() == 0 and weight.max() <= 1


def test_mutual_edges_are_those_whose_reverse_is_there_too():
    nodes = random(25, 4)
    every = brute_force_edges(nodes, None, 4)
    expected = {(i, j): weight for (i, j), weight in every.items() if (j, i) in every}
    assert 0 < len(expected) < len(every)
    found = as_dict(*cosine_knn_edges(nodes, k=4, mutual=True))
    assert_same_edges(found, expected)
    assert all(abs(found[j, i] - weight) < 1e-6 for (i, j), weight in found.items())


def test_a_k_beyond_the_set_takes_all_others():
    nodes, target = random(4, 3), random(2, 3, seed=1)
    assert as_dict(*cosine_knn_edges(nodes, k=99)).keys() == {(i, j) for i in range(4) for j in range(4) if i != j}
    assert as_dict(*cosine_knn_edges(nodes, target, k=99)).keys() == {(i, j) for i in range(4) for j in range(2)}


@pytest.mark.parametrize(
    ("source", "target"), [((1, 3), None), ((0, 3), None), ((4, 3), (0, 3)), ((0, 3), (4, 3))], ids=str
)
def test_sets_without_a_pair_have_no_edges(source, target):
    edges, weight = cosine_knn_edges(random(*source), None if target is None else random(*target), k=2)
    assert edges.shape == (2, 0) and edges.dtype == torch.long and weight.shape == (0,)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(value):
    broken = random(4, 3)
    broken[2, 1] = value
    with pytest.raises(MmkitError, match="NaN or infinity"):
        cosine_knn_edges(broken)
    with pytest.raises(MmkitError, match="NaN or infinity"):
        cosine_knn_edges(random(4, 3), broken)


def test_edges_that_mean_nothing_are_refused():
    with pytest.raises(MmkitError, match="k is 0"):
        cosine_knn_edges(random(4, 3), k=0)
    with pytest.raises(MmkitError, match="mutual"):
        cosine_knn_edges(random(4, 3), random(4, 3), mutual=True)


# --- graph layers --------------------------------------------------------------------------------


def gcn_by_hand(adjacency: Tensor, nodes: Tensor, layer: GCNConv) -> Tensor:
    """D^-1/2 (A + I) D^-1/2 X W + b, where `adjacency[i, j]` weighs the edge j → i."""
    with_loops = adjacency + torch.eye(len(adjacency))
    scale = with_loops.sum(dim=1).rsqrt().diag()
    return scale @ with_loops @ scale @ nodes @ layer.lin.weight.T + layer.bias


def test_gcn_on_four_nodes_equals_the_formula():
    torch.manual_seed(0)
    layer, nodes = GCNConv(3, 2), random(4, 3)
    torch.nn.init.normal_(layer.bias)
    edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    weight = torch.tensor([0.5, 0.5, 0.25, 0.25])
    adjacency = torch.tensor([[0, 0.5, 0, 0], [0.5, 0, 0.25, 0], [0, 0.25, 0, 0], [0, 0, 0, 0]])
    found = layer(nodes, edges, weight)
    torch.testing.assert_close(found, gcn_by_hand(adjacency, nodes, layer))
    second = nodes[0] * 0.5 / math.sqrt(1.5 * 1.75) + nodes[1] / 1.75 + nodes[2] * 0.25 / math.sqrt(1.25 * 1.75)
    torch.testing.assert_close(found[1], layer.lin.weight @ second + layer.bias)
    torch.testing.assert_close(found[3], layer.lin.weight @ nodes[3] + layer.bias)


def test_dense_and_sparse_gcn_agree_on_a_symmetric_non_negative_matrix_without_a_diagonal():
    torch.manual_seed(0)
    sparse, dense, nodes = GCNConv(5, 4), DenseGCNConv(5, 4), random(8, 5)
    dense.lin.weight.data.copy_(sparse.lin.weight.data)
    adjacency = random(8, 8, seed=1).clamp(min=0)
    symmetric = ((adjacency + adjacency.T) / 2).fill_diagonal_(0)

    def gap(matrix: Tensor) -> float:
        return (dense(nodes, matrix)[0] - sparse(nodes, *dense_to_sparse(matrix))).abs().max().item()

    assert gap(symmetric) < 1e-5
    assert gap(adjacency.clone().fill_diagonal_(0)) > 1e-2
    assert gap(symmetric + torch.eye(8) / 2) > 1e-2


# --- the graph fuser -----------------------------------------------------------------------------


def small_gnn(**changes: object) -> MultimodalGNN:
    torch.manual_seed(0)
    fuser = MultimodalGNN(12, 8, 16, **({"heads": 4, "neighbours": 3} | changes))
    with torch.no_grad():
        for parameter in fuser.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return fuser.eval()


def test_default_sizes_are_those_of_the_article():
    fuser = MultimodalGNN().eval()
    assert (fuser.image_dim, fuser.text_dim, fuser.width, fuser.images_see_texts.num_heads) == (2048, 768, 512, 8)
    assert fuser(torch.randn(3, 2048), torch.randn(3, 768)).shape == (3, 1024) == (3, fuser.fused_dim)


def test_heads_have_to_divide_the_width():
    with pytest.raises(MmkitError, match="hidden_dim 16 is not a multiple of heads 5"):
        MultimodalGNN(12, 8, 16, heads=5)


def graph_by_hand(graph: torch.nn.Module, nodes: Tensor, features: Tensor, k: int) -> Tensor:
    adjacency = torch.zeros(len(nodes), len(nodes))
    for (neighbour, node), weight in brute_force_edges(features, None, k).items():
        adjacency[node, neighbour] = weight
    for layer in graph.convolutions:
        nodes = nodes + gcn_by_hand(adjacency, nodes, layer).clamp(min=0)
    return nodes


def attention_by_hand(attention: torch.nn.MultiheadAttention, queries: Tensor, pool: Tensor) -> Tensor:
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    q, k, v = (x @ w.T + b for x, w, b in zip((queries, pool, pool), weights, biases, strict=True))
    heads = []
    for qh, kh, vh in zip(*(x.chunk(attention.num_heads, dim=1) for x in (q, k, v)), strict=True):
        heads.append((qh @ kh.T / math.sqrt(qh.shape[1])).softmax(dim=1) @ vh)
    return torch.cat(heads, dim=1) @ attention.out_proj.weight.T + attention.out_proj.bias


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_nodes_equal_a_dense_recomputation(layers):
    fuser = small_gnn(layers=layers)
    images, texts = random(9, 12), random(7, 8, seed=1)
    a = graph_by_hand(fuser.image_graph, fuser.project_images(images), images, 3)
    b = graph_by_hand(fuser.text_graph, fuser.project_texts(texts), texts, 3)
    expected = (
        a + attention_by_hand(fuser.images_see_texts, a, b),
        b + attention_by_hand(fuser.texts_see_images, b, a),
    )
    for found, by_hand in zip(fuser.nodes(images, texts), expected, strict=True):
        torch.testing.assert_close(found, 4 * F.normalize(by_hand, dim=1), rtol=1e-4, atol=1e-4)


def test_a_score_of_the_gnn_depends_on_the_pool_and_it_says_so():
    fuser = small_gnn()
    images, texts = random(10, 12), random(10, 8, seed=1)
    alone, together = fuser.score(images[:5], texts[:5]), fuser.score(images, texts)[:5, :5]
    assert fuser.transductive
    assert (alone - together).abs().max() > 0.01 * together.std()


@pytest.mark.parametrize(("images", "texts"), [(1, 1), (1, 6), (6, 1), (2, 2)])
def test_the_smallest_pools_have_finite_scores_and_gradients(images, texts):
    fuser = small_gnn().train()
    scores = fuser.score(random(images, 12), random(texts, 8, seed=1))
    assert scores.shape == (images, texts) and torch.isfinite(scores).all()
    scores.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in fuser.parameters() if p.grad is not None)


def test_a_node_without_any_similar_other_is_finite_and_keeps_its_own_message():
    fuser = small_gnn()
    features = torch.cat([torch.zeros(1, 12), -torch.ones(1, 12), torch.ones(3, 12)])
    nodes = random(5, 16)
    found = fuser.image_graph(nodes, features)
    layer = fuser.image_graph.convolutions[0]
    alone = nodes + (nodes @ layer.lin.weight.T + layer.bias).clamp(min=0)
    torch.testing.assert_close(found[:2], alone[:2])
    assert (found[2:] - alone[2:]).abs().max() > 0.01
    assert torch.isfinite(fuser.score(features, random(4, 8))).all()
