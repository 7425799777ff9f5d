"""Graph layers against hand computation, the graph fusers against dense recomputation, and the hubness correction."""

import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_edges import brute_force_edges, random
from torch import Tensor

import mmkit
from mmkit import HeteroGNN, HubnessCorrected, MmkitError, MultimodalGNN, PairedFeatures, TwoTower, cosine_knn_edges
from mmkit.fusers import PairFuser
from mmkit.graphs import EDGES, RELATIONS

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    from torch_geometric.nn import GCNConv


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


@pytest.mark.parametrize("nodes", [1, 5, 40])
def test_gcn_equals_the_formula_on_random_graphs_with_isolated_nodes_and_duplicate_edges(nodes):
    torch.manual_seed(0)
    layer, features = GCNConv(6, 3), random(nodes, 6)
    torch.nn.init.normal_(layer.bias)
    edges = torch.randint(0, max(1, nodes - 2), (2, 2 * nodes))
    edges = edges[:, edges[0] != edges[1]]  # PyG keeps the weight of a loop that is there in place of adding 1
    weight = torch.rand(edges.shape[1])
    assert nodes < 40 or edges.unique(dim=1).shape[1] < edges.shape[1]
    adjacency = mmkit.to_dense(edges, weight, (nodes, nodes)).T
    torch.testing.assert_close(layer(features, edges, weight), gcn_by_hand(adjacency, features, layer))


# --- the graph fusers ----------------------------------------------------------------------------

BANK = 9


def pairs(images: int, captions: int = 2, seed: int = 5) -> PairedFeatures:
    owner = torch.arange(images).repeat_interleave(captions)
    return PairedFeatures.from_arrays(random(images, 12, seed=seed), random(len(owner), 8, seed=seed + 1), owner)


def off_its_start(fuser: PairFuser) -> PairFuser:
    with torch.no_grad():
        for parameter in fuser.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return fuser.eval()


def small_gnn(**changes: object) -> MultimodalGNN:
    torch.manual_seed(0)
    return off_its_start(MultimodalGNN(12, 8, 16, **({"heads": 4, "neighbours": 3} | changes)))


def with_bank(**changes: object) -> MultimodalGNN:
    fuser = small_gnn(**({"bank": BANK} | changes))
    fuser.observe(pairs(20))
    return fuser.eval()


def small_hetero(**changes: object) -> HeteroGNN:
    torch.manual_seed(0)
    return off_its_start(HeteroGNN(12, 8, 16, **({"neighbours": 3} | changes)))


POOLED = {edges: lambda edges=edges, **changes: small_gnn(edges=edges, **changes) for edges in EDGES}
POOLED |= {"hetero": small_hetero, "linear": lambda **changes: small_gnn(projection="linear", **changes)}
BANKED = {
    f"{kind} bank": lambda kind=kind, **changes: with_bank(edges=kind, **changes) for kind in EDGES if kind != "mutual"
}
EVERY = POOLED | BANKED


def over(makers: dict, *without: str) -> pytest.MarkDecorator:
    names = [name for name in makers if name not in without]
    return pytest.mark.parametrize("make", [makers[name] for name in names], ids=names)


@over(EVERY)
def test_permuting_the_pool_permutes_scores_and_nothing_else(make):
    images, texts = random(12, 12), random(12, 8, seed=1)  # as many of both, or no index could be shared
    fuser, rows, columns = make(layers=2), torch.randperm(12), torch.randperm(12)
    scores = fuser.score(images, texts)
    assert scores.std() > 0.05
    torch.testing.assert_close(
        fuser.score(images[rows], texts[columns]), scores[rows][:, columns], rtol=1e-4, atol=1e-4
    )


@over(EVERY)
def test_trained_on_noise_every_graph_is_at_chance(make):
    def train(noise: PairedFeatures, validation: PairedFeatures) -> PairFuser:
        fuser = make(dropout=0.0)
        mmkit.fit(fuser, noise, validation, epochs=3, batch_size=64, learning_rate=5e-3)
        return fuser

    assert mmkit.noise_recall(train, (12, 8)) <= 0.025, "chance is 0.005; 5 hits in 200 have a probability of 0.004"


@over(POOLED)
def test_a_score_over_the_pool_depends_on_it_and_the_fuser_says_so(make):
    fuser = make()
    images, texts = random(10, 12), random(10, 8, seed=1)
    alone, together = fuser.score(images[:5], texts[:5]), fuser.score(images, texts)[:5, :5]
    assert fuser.transductive
    assert (alone - together).abs().max() > 0.01 * together.std()


@over(BANKED)
@pytest.mark.parametrize("layers", [0, 2])
def test_with_a_bank_a_score_is_the_same_in_any_pool(make, layers):
    fuser = make(layers=layers)
    images, texts = random(30, 12), random(25, 8, seed=1)
    scores = fuser.score(images, texts)
    assert not fuser.transductive
    for rows, columns in ((slice(3, 4), slice(7, 8)), (slice(0, 9), slice(20, 25)), (slice(0, 30), slice(0, 1))):
        torch.testing.assert_close(fuser.score(images[rows], texts[columns]), scores[rows, columns], rtol=0, atol=1e-5)


@over(EVERY)
@pytest.mark.parametrize(("images", "texts"), [(1, 1), (1, 6), (6, 1), (2, 2)])
def test_the_smallest_pools_have_finite_scores_and_gradients(make, images, texts):
    fuser = make().train()
    scores = fuser.score(random(images, 12), random(texts, 8, seed=1))
    assert scores.shape == (images, texts) and torch.isfinite(scores).all()
    scores.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in fuser.parameters() if p.grad is not None)


@over(EVERY, "mutual")  # which of two equal neighbours is among the k decides whether an edge is mutual
def test_equal_captions_of_a_pool_score_equally(make):
    images, texts = random(8, 12), random(6, 8, seed=1)
    scores = make().score(images, torch.cat([texts, texts[[2, 4]]]))
    assert torch.isfinite(scores).all()
    torch.testing.assert_close(scores[:, 6:], scores[:, [2, 4]], rtol=1e-4, atol=1e-4)


@over(EVERY)
def test_features_that_are_not_finite_are_refused(make):
    broken, fuser = random(4, 12), make(neighbours=2)
    broken[1, 1] = torch.nan
    if getattr(fuser, "edges", None) == "none":
        assert fuser.score(broken, random(3, 8)).isnan().any(), "nothing hides it"
    else:
        with pytest.raises(MmkitError, match="NaN or infinity"):
            fuser.score(broken, random(3, 8))


@over(EVERY)
def test_a_loaded_graph_scores_the_same(make, tmp_path):
    fuser, images, texts = make(layers=2), random(5, 12), random(6, 8, seed=1)
    fuser.save_pretrained(tmp_path)
    torch.manual_seed(99)
    loaded = type(fuser).from_pretrained(str(tmp_path)).eval()
    assert loaded.transductive == fuser.transductive
    assert torch.equal(loaded.score(images, texts), fuser.score(images, texts))


# --- system B ------------------------------------------------------------------------------------


def test_default_sizes_are_those_of_the_article():
    fuser = MultimodalGNN().eval()
    assert (fuser.image_dim, fuser.text_dim, fuser.width, fuser.images_see_texts.num_heads) == (2048, 768, 512, 8)
    assert fuser(torch.randn(3, 2048), torch.randn(3, 768)).shape == (3, 1024) == (3, fuser.fused_dim)


def test_the_weights_of_the_default_keep_their_names_and_none_has_the_same():
    graph = {f"{kind}_graph.convolutions.0.{name}" for kind in ("image", "text") for name in ("bias", "lin.weight")}
    names = set(small_gnn().state_dict())
    assert {name for name in names if "graph" in name} == graph and not any("bank" in name for name in names)
    assert names == set(small_gnn(edges="none").state_dict()) == set(small_gnn(edges="mutual").state_dict())


def test_a_linear_projection_and_a_layer_are_the_articles_one_convolution():
    """`GCNConv` maps first and then passes messages: its weights times the projection's are those of one layer."""
    fuser, features = small_gnn(projection="linear"), random(7, 12)
    edges, weight = cosine_knn_edges(features, k=3)
    graph, one = fuser.image_graph.convolutions[0], GCNConv(12, 16)
    with torch.no_grad():
        torch.nn.init.zeros_(fuser.project_images.bias)
        one.lin.weight.copy_(graph.lin.weight @ fuser.project_images.weight)
        one.bias.copy_(graph.bias)
        found = graph(fuser.project_images(features), edges, weight)
        torch.testing.assert_close(found, one(features, edges, weight), rtol=1e-4, atol=1e-5)


def test_edges_that_do_not_exist_are_refused():
    with pytest.raises(MmkitError, match=r"No projection 'cnn'\. Valid names: mlp, linear"):
        MultimodalGNN(12, 8, 16, heads=4, projection="cnn")
    with pytest.raises(MmkitError, match=r"No edges 'knn'\. Valid names: cosine, mutual, attention, none"):
        MultimodalGNN(12, 8, 16, heads=4, edges="knn")


def test_heads_have_to_divide_the_width():
    with pytest.raises(MmkitError, match="hidden_dim 16 is not a multiple of heads 5"):
        MultimodalGNN(12, 8, 16, heads=5)


def graph_by_hand(graph: torch.nn.Module, nodes: Tensor, features: Tensor, k: int) -> Tensor:
    adjacency = torch.zeros(len(nodes), len(nodes))
    for (neighbour, node), weight in brute_force_edges(features, None, k).items():
        adjacency[node, neighbour] = weight
    return layers_by_hand(graph, adjacency, nodes)


def layers_by_hand(graph: torch.nn.Module, adjacency: Tensor, nodes: Tensor) -> Tensor:
    for layer in graph.convolutions:
        nodes = nodes + gcn_by_hand(adjacency, nodes, layer).clamp(min=0)
    return nodes


def attention_by_hand(
    attention: torch.nn.MultiheadAttention, queries: Tensor, pool: Tensor, hidden: Tensor | bool = False
) -> Tensor:
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    q, k, v = (x @ w.T + b for x, w, b in zip((queries, pool, pool), weights, biases, strict=True))
    heads = []
    for qh, kh, vh in zip(*(x.chunk(attention.num_heads, dim=1) for x in (q, k, v)), strict=True):
        logits = (qh @ kh.T / math.sqrt(qh.shape[1])).masked_fill(torch.as_tensor(hidden), -torch.inf)
        heads.append(logits.softmax(dim=1) @ vh)
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


def test_a_node_without_any_similar_other_is_finite_and_keeps_its_own_message():
    fuser = small_gnn()
    features = torch.cat([torch.zeros(1, 12), -torch.ones(1, 12), torch.ones(3, 12)])
    nodes = random(5, 16)
    found = fuser.image_graph(nodes, features)[-1]
    layer = fuser.image_graph.convolutions[0]
    alone = nodes + (nodes @ layer.lin.weight.T + layer.bias).clamp(min=0)
    torch.testing.assert_close(found[:2], alone[:2])
    assert (found[2:] - alone[2:]).abs().max() > 0.01
    assert torch.isfinite(fuser.score(features, random(4, 8))).all()


def test_mutual_edges_leave_out_neighbours_of_one_side():
    fuser, images = small_gnn(edges="mutual"), random(15, 12)
    edges, weight = cosine_knn_edges(images, k=3, mutual=True)
    nodes = random(15, 16)
    expected = layers_by_hand(fuser.image_graph, mmkit.to_dense(edges, weight, (15, 15)).T, nodes)
    torch.testing.assert_close(fuser.image_graph(nodes, images)[-1], expected, rtol=1e-4, atol=1e-4)
    assert (fuser.image_graph(nodes, images)[-1] - small_gnn().image_graph(nodes, images)[-1]).abs().max() > 0.01


def test_without_edges_the_layers_see_one_node_at_a_time():
    fuser, images, texts = small_gnn(edges="none", layers=2), random(9, 12), random(7, 8, seed=1)
    whole = fuser.depths(images, texts)[-1]
    torch.testing.assert_close(fuser.depths(images[3:4], texts)[-1], whole[3:4])
    nodes = fuser.project_images(images)
    for layer in fuser.image_graph.convolutions:
        nodes = nodes + (nodes @ layer.lin.weight.T + layer.bias).clamp(min=0)
    torch.testing.assert_close(whole, nodes)


@over(EVERY, "hetero")
@pytest.mark.parametrize("layers", [0, 3])
def test_depths_are_the_image_nodes_of_the_pool_from_projection_to_last_layer(make, layers):
    fuser, images, texts = make(layers=layers), random(6, 12), random(5, 8, seed=1)
    depths = fuser.depths(images, texts)
    assert [tuple(nodes.shape) for nodes in depths] == [(6, 16)] * (layers + 1)
    torch.testing.assert_close(depths[0], fuser.project_images(fuser.prepare(images, texts)[0]))
    for before, after in itertools.pairwise(depths):
        assert (after - before).min() >= 0 and (after - before).max() > 0.01  # a residual of what a ReLU lets through


def convolution_by_hand(layer: torch.nn.Module, nodes: Tensor, messages: Tensor) -> Tensor:
    return nodes + (messages @ layer.lin_rel.weight.T + layer.lin_rel.bias + nodes @ layer.lin_root.weight.T).clamp(
        min=0
    )


def top_attention(queries: Tensor, keys: Tensor, k: int) -> Tensor:
    logits = queries @ keys.T / math.sqrt(queries.shape[1])
    lowest = logits.sort(dim=1, descending=True).values[:, [k - 1]]
    return logits.masked_fill(logits < lowest, -torch.inf).softmax(dim=1)


def test_nodes_of_attention_edges_equal_a_dense_recomputation():
    fuser = small_gnn(edges="attention", layers=2)
    images, texts, graph = random(9, 12), random(7, 8, seed=1), fuser.graph
    a, b = fuser.project_images(images), fuser.project_texts(texts)
    from_texts = top_attention(graph.image_queries(a), graph.text_keys(b), 3)
    from_images = top_attention(graph.text_queries(b), graph.image_keys(a), 3)
    for to_images, to_texts in zip(graph.to_images, graph.to_texts, strict=True):
        a, b = convolution_by_hand(to_images, a, from_texts @ b), convolution_by_hand(to_texts, b, from_images @ a)
    expected = (
        a + attention_by_hand(fuser.images_see_texts, a, b),
        b + attention_by_hand(fuser.texts_see_images, b, a),
    )
    for found, by_hand in zip(fuser.nodes(images, texts), expected, strict=True):
        torch.testing.assert_close(found, 4 * F.normalize(by_hand, dim=1), rtol=1e-4, atol=1e-4)


def test_the_adjacency_of_attention_edges_is_learned():
    fuser = small_gnn(edges="attention")
    fuser.score(random(9, 12), random(7, 8, seed=1)).square().sum().backward()
    for layer in ("image_queries", "image_keys", "text_queries", "text_keys"):
        assert getattr(fuser.graph, layer).weight.grad.abs().sum() > 0, layer


# --- the bank ------------------------------------------------------------------------------------


def test_a_bank_holds_images_of_the_training_set_each_with_a_caption_of_its_own():
    train, fuser = pairs(20, captions=3), small_gnn(bank=15)
    fuser.observe(train)
    rows = [(train.images() == image).all(dim=1).nonzero().item() for image in fuser.bank.images]
    captions = [(train.captions() == text).all(dim=1).nonzero().item() for text in fuser.bank.texts]
    assert len(set(rows)) == 15 and train.owner[captions].tolist() == rows
    assert len({caption % 3 for caption in captions}) == 3, "not the first caption of each"
    assert fuser.standardize_images.mean.abs().sum() > 0


def test_the_seed_chooses_the_bank():
    banks = []
    for seed in (1, 1, 2):
        fuser = small_gnn(bank=5)
        torch.manual_seed(seed)
        fuser.observe(pairs(20))
        banks.append(fuser.bank.images)
    assert torch.equal(banks[0], banks[1]) and not torch.equal(banks[0], banks[2])


def test_a_bank_takes_only_images_that_have_captions():
    features = PairedFeatures.from_arrays(random(6, 12), random(4, 8, seed=1), [1, 1, 3, 4])
    fuser = small_gnn(bank=3)
    fuser.observe(features)
    assert {tuple(image.tolist()) for image in fuser.bank.images} == {
        tuple(image.tolist()) for image in features.images([1, 3, 4])
    }
    with pytest.raises(MmkitError, match=r"takes 4 images with captions, and the training set has 3.*bank=3"):
        small_gnn(bank=4).observe(features)


def test_a_bank_that_cannot_work_is_refused():
    with pytest.raises(MmkitError, match=r"bank is empty.*fuser\.observe"):
        small_gnn(bank=4).score(random(3, 12), random(3, 8))
    with pytest.raises(MmkitError, match="No bank of 4 with edges 'mutual'"):
        small_gnn(bank=4, edges="mutual")
    with pytest.raises(MmkitError, match="No bank of -1"):
        small_gnn(bank=-1)


def own_by_hand(fuser: MultimodalGNN, train: PairedFeatures, rows: list[int], captions: list[int]) -> tuple:
    """From the rows of the training set that the bank and the batch come from."""
    banked = [(train.images() == image).all(dim=1).nonzero().item() for image in fuser.bank.images]
    return tuple(
        torch.tensor([[row == place for place in banked] for row in of])
        for of in (rows, train.owner[captions].tolist())
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_nodes_with_a_bank_equal_a_dense_recomputation(training, layers):
    train, fuser = pairs(20), with_bank(layers=layers, dropout=0.0).train(training)
    rows = list(range(12))
    captions = [0, 1, 5, 6, 9, 14, 20]
    hidden = own_by_hand(fuser, train, rows, captions)
    assert hidden[0].any() and hidden[1].any()
    if not training:
        hidden = tuple(torch.zeros_like(own) for own in hidden)
    batch = fuser.prepare(train.images(rows), train.captions(captions))
    bank = fuser.prepare(fuser.bank.images, fuser.bank.texts)
    graphs, projections = (fuser.image_graph, fuser.text_graph), (fuser.project_images, fuser.project_texts)
    found = []
    for graph, project, kept, features, own in zip(graphs, projections, bank, batch, hidden, strict=True):
        adjacency = torch.zeros(BANK + len(features), BANK + len(features))
        for (neighbour, node), weight in brute_force_edges(kept, None, 3).items():
            adjacency[node, neighbour] = weight
        for node, vector in enumerate(features):
            seen = (~own[node]).nonzero().flatten()
            for (neighbour, _), weight in brute_force_edges(kept[seen], vector[None], 3).items():
                adjacency[BANK + node, seen[neighbour]] = weight
        found.append(layers_by_hand(graph, adjacency, project(torch.cat([kept, features]))))
    (bank_a, a), (bank_b, b) = ((nodes[:BANK], nodes[BANK:]) for nodes in found)
    expected = (
        a + attention_by_hand(fuser.images_see_texts, a, bank_b, hidden[0]),
        b + attention_by_hand(fuser.texts_see_images, b, bank_a, hidden[1]),
    )
    for nodes, by_hand in zip(fuser.nodes(train.images(rows), train.captions(captions)), expected, strict=True):
        torch.testing.assert_close(nodes, 4 * F.normalize(by_hand, dim=1), rtol=1e-4, atol=1e-4)


def test_in_training_a_caption_of_two_images_is_hidden_from_the_image_of_its_batch_alone():
    texts = random(8, 8, seed=1)
    texts[6] = texts[0]  # said of image 0 and of image 3
    train = PairedFeatures.from_arrays(random(4, 12), texts, [0, 0, 1, 1, 2, 2, 3, 3])
    fuser = small_gnn(bank=4).train()
    fuser.observe(train)
    place = [(fuser.bank.images == image).all(dim=1).nonzero().item() for image in train.images()]

    def hidden(rows: list[int], captions: list[int]) -> list[set[int]]:
        own = fuser.bank.own(train.images(rows), train.captions(captions))[1]
        return [{image for image in range(4) if row[place[image]]} for row in own]

    assert hidden([0, 1], [0, 1, 2]) == [{0}, {0}, {1}]
    assert hidden([3, 1], [6, 7, 3]) == [{3}, {3}, {1}]
    assert hidden([0, 3], [0, 6]) == [{0, 3}, {0, 3}]
    assert not any(own.any() for own in fuser.eval().bank.own(train.images(), train.captions()))


def test_a_bank_that_would_be_hidden_whole_is_seen_whole():
    train = pairs(1)
    fuser = small_gnn(bank=1).train()
    fuser.observe(train)
    assert not any(own.any() for own in fuser.bank.own(train.images(), train.captions()))
    assert torch.isfinite(fuser.score(train.images(), train.captions())).all()


# --- the heterogeneous graph ---------------------------------------------------------------------


def test_the_heterogeneous_graph_has_four_relations_searched_by_themselves():
    fuser, images, texts = small_hetero(), random(9, 12), random(7, 8, seed=1)
    data = fuser.graph(images, texts)
    assert data.validate() and set(data.edge_types) == set(RELATIONS)
    a, b = data["image"].x, data["text"].x
    torch.testing.assert_close(a, fuser.project_images(images))
    expected = {
        ("image", "near", "image"): brute_force_edges(images, None, 3),
        ("text", "near", "text"): brute_force_edges(texts, None, 3),
        ("image", "like", "text"): brute_force_edges(a, b, 3),
        ("text", "like", "image"): brute_force_edges(b, a, 3),
    }
    for relation, edges in expected.items():
        assert {tuple(edge) for edge in data[relation].edge_index.T.tolist()} == edges.keys(), relation


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
                update = layer.lin_l(mean) + layer.lin_r(vector)
                updates[target][node] += update / 2  # two relations lead to each kind of node
        nodes = {kind: x + updates[kind].clamp(min=0) for kind, x in nodes.items()}
    for found, kind in zip(fuser.nodes(images, texts), ("image", "text"), strict=True):
        torch.testing.assert_close(found, 4 * F.normalize(nodes[kind], dim=1), rtol=1e-4, atol=1e-4)


# --- hubness -------------------------------------------------------------------------------------


def small_towers() -> TwoTower:
    torch.manual_seed(0)
    return TwoTower(12, 8, 16).eval()


def cosines(fuser: TwoTower, images: Tensor, texts: Tensor) -> Tensor:
    a, b = fuser.nodes(images, texts)
    return F.cosine_similarity(a[:, None], b[None], dim=2)


@pytest.mark.parametrize(("images", "texts"), [(14, 12), (1, 1), (3, 20)])
def test_csls_equals_the_papers_formula(images, texts):
    towers, a, b = small_towers(), random(images, 12), random(texts, 8, seed=1)
    cosine = cosines(towers, a, b)
    near_images = torch.stack([row.sort(descending=True).values[:4].mean() for row in cosine])
    near_texts = torch.stack([column.sort(descending=True).values[:4].mean() for column in cosine.T])
    expected = towers.log_scale.exp() * (2 * cosine - near_images[:, None] - near_texts)
    torch.testing.assert_close(HubnessCorrected(towers, k=4).score(a, b), expected, rtol=1e-4, atol=1e-4)


def test_inverted_softmax_ranks_as_the_papers_probabilities_in_both_directions():
    towers, a, b = small_towers(), random(14, 12), random(12, 8, seed=1)
    logits = cosines(towers, a, b) / towers.log_temperature.exp()
    scores = HubnessCorrected(towers, "inverted-softmax").score(a, b)
    assert torch.equal(scores.argsort(dim=1), logits.softmax(dim=0).argsort(dim=1))
    assert torch.equal(scores.argsort(dim=0), logits.softmax(dim=1).argsort(dim=0))
    assert not torch.equal(scores.argsort(dim=1), logits.argsort(dim=1))


@pytest.mark.parametrize("method", ["csls", "inverted-softmax"])
def test_a_corrected_fuser_keeps_the_contract(method, monkeypatch):
    fuser, images, texts = HubnessCorrected(small_towers(), method).eval(), random(9, 12), random(9, 8, seed=1)
    a, b = fuser.nodes(images, texts)
    scores = fuser.score(images, texts)
    assert a.shape == b.shape == fuser(images, texts).shape == (9, fuser.width) == (9, fuser.fused_dim)
    by_pair = torch.stack([torch.cat([fuser.match(i[None], t[None]) for t in b]) for i in a])
    torch.testing.assert_close(scores, by_pair, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores, fuser.similarities(a, b) * fuser.fuser.log_scale.exp())
    assert mmkit.permutation_gap(fuser, images, texts) < 1e-4
    assert fuser.transductive and (fuser.score(images[:4], texts[:4]) - scores[:4, :4]).abs().max() > 0.01
    monkeypatch.setattr(mmkit.hubness, "_BLOCK_ROWS", 2)
    torch.testing.assert_close(fuser.score(images, texts), scores)


@pytest.mark.parametrize("method", ["csls", "inverted-softmax"])
def test_a_correction_frees_the_captions_of_a_hub(method):
    towers = TwoTower(6, 6, 6)
    with torch.no_grad():
        for layer in (towers.project_images, towers.project_texts):
            layer.weight.copy_(torch.eye(6))
            layer.bias.zero_()
    texts = torch.eye(6)[:5] + 0.9
    images = torch.cat([torch.eye(6)[:5] * 0.35 + torch.eye(6)[5] * 0.3, torch.ones(1, 6)])  # the last is near to all
    features = PairedFeatures.from_arrays(images, texts, range(5))
    plain, corrected = (
        mmkit.retrieval_report(fuser, features).text_to_image.r1 for fuser in (towers, HubnessCorrected(towers, method))
    )
    assert plain == 0 and corrected == 1


def test_reports_take_a_corrected_fuser():
    fuser, features = HubnessCorrected(small_towers()), pairs(12)
    report = mmkit.matching_report(fuser, features, mmkit.choose_thresholds(fuser, features))
    assert report["random"].pool == (12, 24) and 0 <= report["hard"].accuracy <= 1


def test_what_cannot_be_corrected_is_refused(tmp_path):
    with pytest.raises(MmkitError, match="MultimodalGNN does not score by cosine"):
        HubnessCorrected(small_gnn())
    with pytest.raises(MmkitError, match=r"No method 'mean'\. Valid names: csls, inverted-softmax"):
        HubnessCorrected(small_towers(), "mean")
    with pytest.raises(MmkitError, match="k is 0"):
        HubnessCorrected(small_towers(), k=0)
    with pytest.raises(MmkitError, match=r"save \.fuser"):
        HubnessCorrected(small_towers()).save_pretrained(tmp_path)
