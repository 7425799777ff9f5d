"""Edges against brute force and PyG, conversions against PyG's, measures of smoothing against loops and Laplacians."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmkit
from mmkit import (
    MmkitError,
    attention_edges,
    cosine_knn_edges,
    dirichlet_energy,
    mean_pairwise_distance,
    to_dense,
    to_edges,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    from torch_geometric.nn import DenseGCNConv, GCNConv
    from torch_geometric.utils import dense_to_sparse, get_laplacian, to_dense_adj


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


def clusters(nodes: int, seed: int) -> Tensor:
    """Nodes around 40 centres: unlike plain noise, each has neighbours that are clearly nearer than the rest."""
    centres = random(40, 16, seed=7)
    return centres[torch.arange(nodes) % 40] + 0.6 * random(nodes, 16, seed=seed)


@pytest.mark.parametrize("target", [None, clusters(300, 2)], ids=["within", "across"])
def test_an_index_finds_nearly_all_of_the_nearest(target):
    source = clusters(3000, 1)
    (edges, weight), (found, found_weight) = (
        cosine_knn_edges(source, target, k=5, index=index) for index in ("exact", "hnsw")
    )
    exact, approximate = as_dict(edges, weight), as_dict(found, found_weight)
    shared = exact.keys() & approximate.keys()
    assert len(approximate) == len(exact) == 5 * (3000 if target is None else 300)
    assert len(shared) > 0.98 * len(exact)
    assert [approximate[edge] for edge in shared] == pytest.approx([exact[edge] for edge in shared], abs=1e-5)
    assert (found[1].diff() >= 0).all() and (target is not None or (found[0] != found[1]).all())


def test_an_index_copes_with_tiny_pools_equal_nodes_and_says_what_it_cannot():
    for nodes, target in ((1, None), (0, None), (0, random(2, 4)), (2, random(0, 4))):
        assert cosine_knn_edges(random(nodes, 4), target, k=3, index="hnsw")[0].shape == (2, 0)
    assert as_dict(*cosine_knn_edges(random(3, 4), k=5, index="hnsw")).keys() == {
        (i, j) for i in range(3) for j in range(3) if i != j
    }
    edges, weight = cosine_knn_edges(random(1, 4).expand(8, 4), k=2, index="hnsw")
    assert edges.shape == (2, 16) and weight.tolist() == pytest.approx([1] * 16)
    mutual, _ = cosine_knn_edges(clusters(200, 3), k=3, mutual=True, index="hnsw")
    assert {tuple(pair) for pair in mutual.T.tolist()} == {tuple(pair) for pair in mutual.flip(0).T.tolist()}
    with pytest.raises(MmkitError, match=r"No index 'kd'\. Valid names: exact, hnsw"):
        cosine_knn_edges(random(3, 4), index="kd")
    with pytest.raises(MmkitError, match="cannot hide"):
        cosine_knn_edges(random(3, 4), random(2, 4), hidden=torch.zeros(2, 3, dtype=torch.bool), index="hnsw")


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
    monkeypatch.setattr(mmkit.edges, "_BLOCK_ROWS", rows)
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


@pytest.mark.parametrize("rows", [2, 2048])
def test_hidden_pairs_are_not_joined_and_the_next_nearest_take_their_place(rows, monkeypatch):
    monkeypatch.setattr(mmkit.edges, "_BLOCK_ROWS", rows)
    source, target, hidden = random(9, 5), random(7, 5, seed=1), random(7, 9, seed=2) > 0
    hidden[3] = True
    expected = {}
    for node, row in enumerate(hidden):
        seen = (~row).nonzero().flatten()
        if len(seen):
            found = brute_force_edges(source[seen], target[[node]], 4)
            expected |= {(int(seen[j]), node): weight for (j, _), weight in found.items()}
    assert_same_edges(as_dict(*cosine_knn_edges(source, target, 4, hidden=hidden)), expected)
    assert {node for _, node in expected} == {0, 1, 2, 4, 5, 6}


# --- attention -----------------------------------------------------------------------------------


def test_attention_over_all_is_a_softmax_of_scaled_products():
    queries, keys = random(6, 5), random(9, 5, seed=1)
    found = to_dense(*attention_edges(queries, keys), (9, 6))
    torch.testing.assert_close(found.T, (queries @ keys.T / math.sqrt(5)).softmax(dim=1))


def test_messages_along_attention_edges_equal_torchs_attention():
    queries, keys, values = random(6, 5), random(9, 5, seed=1), random(9, 5, seed=2)
    matrix = to_dense(*attention_edges(queries, keys), (9, 6))
    expected = F.scaled_dot_product_attention(queries[None], keys[None], values[None])[0]
    torch.testing.assert_close(matrix.T @ values, expected)


@pytest.mark.parametrize("k", [1, 3])
def test_the_top_k_of_attention_are_kept_and_renormalised(k):
    queries, keys = random(6, 5), random(9, 5, seed=1)
    whole = (queries @ keys.T / math.sqrt(5)).softmax(dim=1)
    kept = whole * (whole >= whole.sort(dim=1, descending=True).values[:, [k - 1]])
    edges, weight = attention_edges(queries, keys, k)
    assert edges[1].bincount().tolist() == [k] * 6
    torch.testing.assert_close(to_dense(edges, weight, (9, 6)).T, kept / kept.sum(dim=1, keepdim=True))


def test_hidden_keys_get_no_attention_and_a_query_without_keys_no_edge():
    queries, keys, hidden = random(4, 5), random(9, 5, seed=1), random(4, 9, seed=2) > 0
    hidden[2] = True
    expected = (queries @ keys.T / math.sqrt(5)).masked_fill(hidden, -torch.inf).softmax(dim=1).nan_to_num()
    found = to_dense(*attention_edges(queries, keys, hidden=hidden), (9, 4)).T
    torch.testing.assert_close(found, expected)
    assert found[2].sum() == 0


def test_gradients_flow_through_attention_weights_into_both_sides():
    queries, keys = (random(4, 3, seed=seed).double().requires_grad_() for seed in (0, 1))
    for k in (None, 2):
        assert torch.autograd.gradcheck(lambda q, x, k=k: attention_edges(q, x, k)[1], (queries, keys))
    (attention_edges(queries, keys, 2)[1] ** 2).sum().backward()
    assert queries.grad.abs().sum() > 0 and keys.grad.abs().sum() > 0


def test_large_products_do_not_overflow_and_few_keys_are_all_taken():
    edges, weight = attention_edges(random(4, 3) * 1e3, random(2, 3, seed=1) * 1e3, k=5)
    assert torch.isfinite(weight).all() and edges.shape == (2, 8)
    torch.testing.assert_close(torch.zeros(4).index_add(0, edges[1], weight), torch.ones(4))


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0)], ids=["no query", "no key"])
def test_attention_without_a_pair_has_no_edges(sizes):
    edges, weight = attention_edges(random(sizes[0], 4), random(sizes[1], 4))
    assert edges.shape == (2, 0) and edges.dtype == torch.long and weight.shape == (0,)


def test_attention_of_what_is_not_finite_or_of_no_key_is_refused():
    broken = random(3, 4)
    broken[1, 1] = torch.nan
    for pair in ((broken, random(3, 4)), (random(3, 4), broken)):
        with pytest.raises(MmkitError, match="NaN or infinity"):
            attention_edges(*pair)
    with pytest.raises(MmkitError, match="k is 0"):
        attention_edges(random(3, 4), random(3, 4), k=0)


# --- a matrix and back ---------------------------------------------------------------------------


def test_to_dense_equals_pygs_with_isolated_nodes_and_duplicate_edges():
    edges = torch.tensor([[0, 1, 1, 3, 0], [1, 0, 3, 1, 1]])
    weight = torch.tensor([0.5, 0.25, 1.0, 0.75, 0.125])
    found = to_dense(edges, weight, (6, 6))
    assert torch.equal(found, to_dense_adj(edges, edge_attr=weight, max_num_nodes=6)[0])
    assert found[0, 1] == 0.625 and found[1, 0] == 0.25 and not found[[2, 4, 5]].any()


def test_to_edges_equals_pygs_and_undoes_to_dense():
    matrix = random(6, 6).clamp(min=0)
    edges, weight = to_edges(matrix)
    for found, expected in zip((edges, weight), dense_to_sparse(matrix), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(to_dense(edges, weight, (6, 6)), matrix)
    bipartite = random(4, 7, seed=1).clamp(min=0)
    assert torch.equal(to_dense(*to_edges(bipartite), (4, 7)), bipartite)


def test_a_graph_without_edges_is_a_matrix_of_zeros_and_back():
    edges, weight = to_edges(torch.zeros(3, 2))
    assert edges.shape == (2, 0) and edges.dtype == torch.long and weight.shape == (0,)
    assert torch.equal(to_dense(edges, weight, (3, 2)), torch.zeros(3, 2))


def test_gradients_pass_a_matrix():
    weight = torch.tensor([0.5, 0.25, 2.0], requires_grad=True)
    to_dense(torch.tensor([[0, 1, 1], [1, 0, 0]]), weight, (2, 2)).square().sum().backward()
    assert weight.grad.tolist() == [1.0, 4.5, 4.5]


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_weights_that_have_no_root_of_a_degree_are_refused(value):
    edges, weight = torch.tensor([[0, 1], [1, 0]]), torch.tensor([0.5, value])
    calls = (
        lambda: to_dense(edges, weight, (2, 2)),
        lambda: to_edges(torch.tensor([[0.0, value], [1.0, 0.0]])),
        lambda: dirichlet_energy(random(2, 3), edges, weight),
    )
    for call in calls:
        with pytest.raises(MmkitError, match="NaN, infinity or numbers below 0"):
            call()


@pytest.mark.parametrize("edges", [[[0, 2], [1, 0]], [[0, 1], [3, 0]], [[-1, 1], [1, 0]]])
def test_edges_out_of_the_matrix_are_refused(edges):
    with pytest.raises(MmkitError, match="outside of 2 sources and 3 targets"):
        to_dense(torch.tensor(edges), torch.ones(2), (2, 3))


def test_what_has_the_wrong_shape_is_refused():
    with pytest.raises(MmkitError, match="3 weights"):
        to_dense(torch.zeros(2, 2, dtype=torch.long), torch.ones(3), (2, 2))
    with pytest.raises(MmkitError, match="two axes"):
        to_edges(torch.zeros(1, 2, 2))


# --- a matrix and edges in a GCN -----------------------------------------------------------------


def gaps(adjacency: Tensor) -> float:
    """The largest difference of DenseGCNConv on the matrix and GCNConv on its edges, with the same weights."""
    torch.manual_seed(0)
    sparse, dense, nodes = GCNConv(5, 4), DenseGCNConv(5, 4), random(len(adjacency), 5)
    dense.lin.weight.data.copy_(sparse.lin.weight.data)
    edges = adjacency.nonzero().T  # to_edges refuses what the last case needs
    return (dense(nodes, adjacency)[0] - sparse(nodes, edges, adjacency[edges[0], edges[1]])).abs().max().item()


def symmetric() -> Tensor:
    matrix = random(8, 8, seed=1).clamp(min=0)
    matrix = ((matrix + matrix.T) / 2).fill_diagonal_(0)
    matrix[7], matrix[:, 7] = 0, 0  # an isolated node
    return matrix


def test_dense_and_sparse_gcn_agree_on_a_symmetric_non_negative_matrix_without_a_diagonal():
    assert gaps(symmetric()) < 1e-5


def test_mutual_edges_give_such_a_matrix_and_nearest_neighbours_do_not():
    nodes = random(12, 4)
    mutual, nearest = (to_dense(*cosine_knn_edges(nodes, k=3, mutual=both), (12, 12)) for both in (True, False))
    torch.testing.assert_close(mutual, mutual.T)
    assert gaps(mutual) < 1e-5
    assert (nearest - nearest.T).abs().max() > 0.1 and gaps(nearest) > 1e-2


def test_dense_and_sparse_gcn_differ_where_one_of_the_conditions_fails():
    one_way, loops, negative = symmetric(), symmetric(), symmetric()
    one_way[one_way.triu() > 0] = 0
    loops.fill_diagonal_(0.5)
    negative[0, 1] = negative[1, 0] = -3.0
    assert gaps(one_way) > 1e-2
    assert gaps(loops) > 1e-2
    assert math.isnan(gaps(negative))  # the root of a negative degree


def test_duplicate_edges_count_twice_in_both_forms():
    edges = torch.tensor([[0, 1, 0, 1, 1, 2], [1, 0, 1, 0, 2, 1]])
    weight = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.25, 0.25])
    torch.manual_seed(0)
    layer, nodes = GCNConv(5, 4), random(3, 5)
    once = to_edges(to_dense(edges, weight, (3, 3)))
    assert once[0].shape == (2, 4)
    torch.testing.assert_close(layer(nodes, edges, weight), layer(nodes, *once))


# --- over-smoothing ------------------------------------------------------------------------------


def test_dirichlet_energy_equals_a_loop_and_the_laplacians_quadratic_form():
    nodes, matrix = random(8, 3), symmetric()
    edges, weight = to_edges(matrix)
    loop = sum(
        w * sum((a - b) ** 2 for a, b in zip(nodes[j].tolist(), nodes[i].tolist(), strict=True))
        for (j, i), w in zip(edges.T.tolist(), weight.tolist(), strict=True)
    )
    assert dirichlet_energy(nodes, edges, weight) == pytest.approx(loop / 8, rel=1e-5)
    laplacian_edges, laplacian_weight = get_laplacian(edges, weight)
    laplacian = to_dense_adj(laplacian_edges, edge_attr=laplacian_weight, max_num_nodes=8)[0]
    expected = 2 * (nodes.T @ laplacian @ nodes).trace().item() / 8
    assert dirichlet_energy(nodes, edges, weight) == pytest.approx(expected, rel=1e-4)
    assert dirichlet_energy(nodes, edges) == pytest.approx(dirichlet_energy(nodes, edges, torch.ones_like(weight)))


def test_repeated_averages_smooth_by_both_measures():
    nodes, (edges, weight) = random(30, 4), attention_edges(random(30, 4, seed=1), random(30, 4, seed=2))
    energies, distances = [], []
    for _ in range(4):
        energies.append(dirichlet_energy(nodes, edges, weight))
        distances.append(mean_pairwise_distance(nodes))
        nodes = to_dense(edges, weight, (30, 30)).T @ nodes
    assert energies == sorted(energies, reverse=True) and energies[-1] < 1e-3 * energies[0]
    assert distances == sorted(distances, reverse=True) and distances[-1] < 0.1 < 0.9 < distances[0]


def test_equal_nodes_have_no_energy_and_no_distance():
    nodes = random(1, 4).repeat(5, 1)
    edges, weight = cosine_knn_edges(nodes, k=2)
    assert dirichlet_energy(nodes, edges, weight) == 0
    assert mean_pairwise_distance(nodes) == pytest.approx(0, abs=1e-7)
    assert dirichlet_energy(random(5, 4), torch.empty(2, 0, dtype=torch.long)) == 0


def test_mean_pairwise_distance_equals_a_loop_over_all_pairs():
    nodes = random(7, 3) * torch.arange(1, 8)[:, None]
    expected = [1 - cosine(nodes[i], nodes[j]) for i in range(7) for j in range(7) if i != j]
    assert mean_pairwise_distance(nodes) == pytest.approx(sum(expected) / 42, rel=1e-5)
    assert mean_pairwise_distance(torch.tensor([[1.0, 0.0], [-2.0, 0.0]])) == pytest.approx(2)


def test_too_few_nodes_to_measure_are_refused():
    with pytest.raises(MmkitError, match="two nodes, and there are 1"):
        mean_pairwise_distance(random(1, 3))
    with pytest.raises(MmkitError, match="no nodes"):
        dirichlet_energy(random(0, 3), torch.empty(2, 0, dtype=torch.long))
