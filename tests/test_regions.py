"""Fusers of parts against loops, torch's attention, PyG's GCN, and a task that only positions solve."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import GCNConv
from torch_geometric.utils import dense_to_sparse

import mmkit
from helpers import settings
from mmkit import CrossAttentionFuser, FalseCaptions, MmkitError, MultimodalFeatureFuser, PairedFeatures, RegionWordGNN
from mmkit.fusers import unit_scale
from mmkit.regions import PartFuser, cell_positions, is_part, normalized_adjacency

IMAGE, TEXT, CELLS, TOKENS, OBJECTS = 6, 5, 9, 4, 8
MAKERS = {
    "cross-attention": lambda: CrossAttentionFuser(IMAGE, TEXT, width=8, heads=2),
    "region-word": lambda: RegionWordGNN(IMAGE, TEXT, width=8, neighbours=2),
    "no layers": lambda: RegionWordGNN(IMAGE, TEXT, width=8, layers=0),
}
EVERY = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stacks(images: int = 5, texts: int = 7) -> tuple[Tensor, Tensor]:
    """Images with all cells, and texts of which some end in padding."""
    captions = random(texts, 1 + TOKENS, TEXT, seed=1)
    captions[torch.arange(1 + TOKENS) >= 2 + torch.arange(texts)[:, None] % TOKENS] = 0
    return random(images, 1 + CELLS, IMAGE), captions


def made(make) -> PartFuser:
    """A fuser in eval mode whose every parameter differs from its start."""
    torch.manual_seed(0)
    fuser = make().eval().requires_grad_(False)
    for parameter in fuser.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return fuser


@EVERY
@pytest.mark.parametrize("block", [(8, 512), (2, 3)], ids=["one block", "small blocks"])
def test_score_equals_match_pair_by_pair_and_does_not_depend_on_the_pool(make, block, monkeypatch):
    fuser, (images, texts) = made(make), stacks()
    monkeypatch.setattr(type(fuser), "block", block)
    scores, sims = fuser.score(images, texts), fuser.similarities(*fuser.nodes(images, texts))
    assert scores.shape == sims.shape == (5, 7) and scores.std() > 0.1
    for i, j in itertools.product(range(5), range(7)):
        nodes = fuser.nodes(images[i : i + 1], texts[j : j + 1, : 2 + j % TOKENS])
        for way, expected in ((fuser.match, scores), (fuser.score_nodes, scores), (fuser.similarities, sims)):
            assert way(*nodes).item() == pytest.approx(expected[i, j].item(), abs=1e-4)
    assert sims.abs().max() <= 1 and fuser(images, texts[:5]).shape == (5, fuser.fused_dim)
    assert fuser.score(images[:0], texts).shape == (0, 7) and fuser.score(images, texts[:0]).shape == (5, 0)


@EVERY
def test_padding_changes_nothing_and_pooled_vectors_alone_make_the_shortlist(make):
    fuser, (images, texts) = made(make), stacks()
    padded = F.pad(texts, (0, 0, 0, 3))
    torch.testing.assert_close(fuser.score(images, padded), fuser.score(images, texts), atol=1e-5, rtol=0)
    assert is_part(fuser.nodes(images, padded)[1]).sum(dim=1).tolist() == [2 + row % TOKENS for row in range(7)]
    a, b = fuser.project_images(images[:, 0]), fuser.project_texts(texts[:, 0])
    images[:, 1:], texts[:, 1:] = random(5, CELLS, IMAGE, seed=5), random(7, TOKENS, TEXT, seed=6)
    found = fuser.shortlist_scores(*fuser.nodes(images, texts))
    torch.testing.assert_close(found, F.cosine_similarity(a[:, None], b[None], dim=-1))


@EVERY
def test_the_contract_permutation_and_noise(make):
    def train(noise: PairedFeatures, validation: PairedFeatures) -> PartFuser:
        torch.manual_seed(0)
        fuser = make()
        mmkit.fit(fuser, noise, validation, settings(epochs=5, batch_size=50, learning_rate=1e-2))
        return fuser

    assert mmkit.permutation_gap(made(make), *stacks()) < 1e-4
    assert mmkit.noise_recall(train, (IMAGE, TEXT), held_out=100, parts=(CELLS, TOKENS)) < 0.06


def test_what_does_not_fit_is_refused():
    vectors, fuser = (random(2, IMAGE), random(2, TEXT)), MAKERS["region-word"]()
    for call, message in (
        (lambda: fuser(*vectors), r"fuser\.view"),
        (lambda: MultimodalFeatureFuser(IMAGE, TEXT, 4)(*stacks(2, 2)), r"fuser\.view"),
        (lambda: fuser.view(PairedFeatures.from_arrays(*vectors, [0, 1])), "grids=True"),
        (lambda: CrossAttentionFuser(IMAGE, TEXT, width=9, heads=2), "width 9 is not a multiple of heads 2"),
        (lambda: cell_positions(48), "48 cells"),
    ):
        with pytest.raises(MmkitError, match=message):
            call()


def test_cross_attention_equals_torchs_with_a_mask_and_both_directions_count():
    fuser, (images, texts) = made(MAKERS["cross-attention"]), stacks(7, 7)
    width, present = fuser.width, is_part(texts[:, 1:])
    oracle = nn.MultiheadAttention(width, fuser.heads, batch_first=True).eval().requires_grad_(False)
    oracle.in_proj_weight.copy_(torch.cat([fuser.from_tokens.weight[:width], fuser.from_cells.weight[width:]]))
    oracle.in_proj_bias.copy_(torch.cat([fuser.from_tokens.bias[:width], fuser.from_cells.bias[width:]]))
    oracle.out_proj.load_state_dict(fuser.seen_by_tokens.state_dict())
    image_nodes, text_nodes = fuser.nodes(images, texts)
    cells, tokens = unit_scale(fuser.project_cells(images[:, 1:])), unit_scale(fuser.project_tokens(texts[:, 1:]))
    seen, weights = oracle(tokens, cells, cells)
    torch.testing.assert_close(weights[present], fuser.attention(images, texts)[present], atol=1e-5, rtol=0)
    both = fuser.fuse(image_nodes, text_nodes)
    for parameter in fuser.seen_by_cells.parameters():  # with one direction silent, the text is its pooled vector
        parameter.zero_()
    mean = torch.stack([row[kept].mean(dim=0) for row, kept in zip(seen, present, strict=True)])
    a, b = unit_scale(image_nodes[:, 0, :width] + mean), text_nodes[:, 0, :width]
    expected = torch.cat([a * b, fuser.concatenation(torch.cat([a, b], dim=-1))], dim=-1)
    torch.testing.assert_close(fuser.fuse(image_nodes, text_nodes), expected, atol=1e-4, rtol=0)
    assert not torch.allclose(both, expected, atol=1e-3)


def test_the_cosine_graph_is_pygs_gcn():
    nodes, convolution = F.normalize(random(3, 8, 4), dim=-1), GCNConv(4, 6, bias=False)
    for graph, adjacency in zip(nodes, normalized_adjacency(nodes, 2), strict=True):
        cosine = (graph @ graph.T).clamp(min=0).fill_diagonal_(0)
        chosen = torch.zeros(8, 8, dtype=torch.bool).scatter(1, cosine.topk(2).indices, True)
        expected = convolution(graph, *dense_to_sparse(torch.where(chosen | chosen.T, cosine, 0.0)))
        torch.testing.assert_close(adjacency @ convolution.lin(graph), expected, atol=1e-5, rtol=0)


def test_a_word_receives_where_and_how_large_its_object_is():
    assert cell_positions(4).tolist() == [[-1, -1], [1, -1], [-1, 1], [1, 1]]
    assert cell_positions(9)[5].tolist() == [1, 0] and cell_positions(1).tolist() == [[0, 0]]
    fuser, cosine = MAKERS["region-word"]().requires_grad_(False), torch.zeros(1, 3, 9)
    fuser.log_sharpness.fill_(5.0)
    cosine[0, 0, 2] = 1  # top right
    cosine[0, 1, [0, 6]] = 1  # the left corners
    expected = [[1, -1, 0, 0, 1 / 9], [-1, 0, 0, 1, 2 / 9], [0, 0, 2 / 3, 2 / 3, 0]]
    torch.testing.assert_close(fuser.messages(cosine)[0], torch.tensor(expected), atol=1e-4, rtol=0)


def test_a_role_depends_on_the_words_within_reach_alone_and_on_their_order():
    fuser = RegionWordGNN(IMAGE, TEXT, width=8, reach=2).eval()
    images, texts = random(1, 1 + CELLS, IMAGE), random(1, 1 + 7, TEXT, seed=1)
    changed, swapped = texts.clone(), texts.clone()
    changed[0, 1 + 6] += 1  # the last word
    swapped[0, [1 + 1, 1 + 3]] = texts[0, [1 + 3, 1 + 1]]  # the neighbours of word 2
    before, after, turned = (fuser.nodes(images, stack)[1][0, 1:, 8:] for stack in (texts, changed, swapped))
    assert (after != before).any(dim=1).tolist() == [False] * 4 + [True] * 3
    assert not torch.allclose(turned[2], before[2])


def arranged(count: int, seed: int) -> tuple[PairedFeatures, PairedFeatures]:
    """Two objects in nine cells, and "a left of b" or "b right of a"; false: with the objects swapped. A token is the
    one-hot of its word and does not know its place in the sentence."""
    generator, rows = torch.Generator().manual_seed(seed), torch.arange(count)
    left, right = torch.rand(count, OBJECTS, generator=generator).topk(2).indices.T
    column, first = torch.randint(2, (2, count), generator=generator)
    heights = torch.randint(3, (2, count), generator=generator)
    grids = 0.02 * torch.randn(count, 9, OBJECTS + 2, generator=generator)
    grids[rows, 3 * heights[0] + column, left] += 1
    grids[rows, 3 * heights[1] + 2, right] += 1
    starts, ends = torch.where(first.bool(), left, right), torch.where(first.bool(), right, left)
    features = []
    for words in ((starts, OBJECTS + first, ends), (ends, OBJECTS + first, starts)):
        tokens = F.one_hot(torch.stack(words, dim=1), OBJECTS + 2).float()
        features.append(PairedFeatures.from_arrays(grids.mean(dim=1), tokens.mean(dim=1), rows, grids, tokens))
    return features[0], features[1]


@pytest.mark.parametrize(("kind", "low", "high"), [(RegionWordGNN, 0.95, 1.0), (MultimodalFeatureFuser, 0.35, 0.65)])
def test_positions_tell_who_is_left_and_pooled_features_do_not(kind, low, high):
    (train, false), (validation, _), (test, wrong) = (arranged(*sizes) for sizes in ((300, 0), (60, 1), (200, 2)))
    torch.manual_seed(0)
    fuser = kind(OBJECTS + 2, OBJECTS + 2, 16, feature_dropout=0.0)
    profile = settings(epochs=30, batch_size=50, learning_rate=1e-2)
    mmkit.fit(fuser, train, validation, profile, false=FalseCaptions(false, torch.arange(300)))
    pairs = mmkit.DiagnosticNegatives("roles", *(test.image_index.numpy(),) * 2, ("swapped",) * 200)
    assert low <= mmkit.diagnostic_report(fuser, test, {"roles": (pairs, wrong)})["roles"].accuracy <= high
    assert mmkit.retrieval_report(fuser, test).text_to_image.r1 > 0.05


def test_the_parts_of_extracted_features_are_standardised(features):
    features, fuser = features.with_parts(), RegionWordGNN(1280, 384, width=8).eval()
    fuser.observe(features)
    images, captions = fuser.prepare(features.images(), features.captions())
    present = is_part(captions)[:, 1:]
    assert torch.equal(present.long(), features.tokens()[1]) and not present.all()
    for parts in (images[:, 1:].flatten(0, 1), captions[:, 1:][present]):
        assert parts.mean(dim=0).abs().max() < 1e-3 and abs(parts.std(dim=0).median() - 1) < 1e-2


def test_without_positions_a_word_knows_only_how_much_fits():
    fuser, blind = (RegionWordGNN(8, 6, 16, positions=positions) for positions in (True, False))
    cosine = torch.rand(2, 3, 9)
    assert (blind.messages(cosine)[..., :4] == 0).all() and (fuser.messages(cosine)[..., :4] != 0).any()
    torch.testing.assert_close(blind.messages(cosine)[..., 4], fuser.messages(cosine)[..., 4])
