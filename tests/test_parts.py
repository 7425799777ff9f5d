"""Fusers of parts, against loops, torch's attention, PyG's GCN, and tasks that only positions solve."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import GCNConv
from torch_geometric.utils import dense_to_sparse

from mmkit import (
    CrossAttentionFuser,
    FalseCaptions,
    MmkitError,
    MultimodalFeatureFuser,
    PairedFeatures,
    RegionWordGNN,
    diagnostic_report,
    extract_features,
    fit,
    noise_recall,
    permutation_gap,
    retrieval_report,
)
from mmkit.data import DiagnosticNegatives
from mmkit.fusers import unit_scale
from mmkit.parts import PartFuser, cell_positions, is_part, normalized_adjacency

IMAGE, TEXT, CELLS, TOKENS = 6, 5, 9, 4


def cross_attention() -> CrossAttentionFuser:
    return CrossAttentionFuser(IMAGE, TEXT, width=8, heads=2)


def region_word(layers: int = 1) -> RegionWordGNN:
    return RegionWordGNN(IMAGE, TEXT, width=8, layers=layers, neighbours=2)


MAKERS = {"cross-attention": cross_attention, "region-word": region_word, "no layers": lambda: region_word(0)}
EVERY = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stacks(images: int = 5, texts: int = 7) -> tuple[Tensor, Tensor]:
    """Images with all cells, and texts of which some end in padding."""
    captions = random(texts, 1 + TOKENS, TEXT, seed=1)
    for row in range(texts):
        captions[row, 2 + row % TOKENS :] = 0
    return random(images, 1 + CELLS, IMAGE), captions


def made(make) -> PartFuser:
    """A fuser in eval mode whose every parameter differs from its start."""
    torch.manual_seed(0)
    fuser = make().eval()
    with torch.no_grad():
        for parameter in fuser.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return fuser


@EVERY
def test_score_equals_match_pair_by_pair_and_does_not_depend_on_the_pool(make):
    fuser, (images, texts) = made(make), stacks()
    with torch.no_grad():
        scores = fuser.score(images, texts)
        assert scores.shape == (5, 7)
        for i in range(5):
            for j in range(7):
                alone = fuser.score(images[i : i + 1], texts[j : j + 1, : 2 + j % TOKENS])
                assert alone.item() == pytest.approx(scores[i, j].item(), abs=1e-4)
                image_nodes, text_nodes = fuser.nodes(images[i : i + 1], texts[j : j + 1])
                assert fuser.match(image_nodes, text_nodes).item() == pytest.approx(scores[i, j].item(), abs=1e-4)
                found = fuser.similarities(image_nodes, text_nodes).item()
                assert found == pytest.approx(fuser.similarities(*fuser.nodes(images, texts))[i, j].item(), abs=1e-5)
                assert -1 <= found <= 1
    assert fuser(images, texts[:5]).shape == (5, fuser.fused_dim)


@EVERY
def test_blocks_of_any_size_give_the_same_scores(make, monkeypatch):
    fuser, (images, texts) = made(make), stacks()
    with torch.no_grad():
        whole = fuser.score(images, texts)
        monkeypatch.setattr("mmkit.parts._IMAGES", 2)
        monkeypatch.setattr("mmkit.parts._CAPTIONS", 3)
        torch.testing.assert_close(fuser.score(images, texts), whole, atol=1e-5, rtol=0)
        assert fuser.score(images[:0], texts).shape == (0, 7) and fuser.score(images, texts[:0]).shape == (5, 0)


@EVERY
def test_padding_changes_nothing(make):
    fuser, (images, texts) = made(make), stacks()
    with torch.no_grad():
        padded = F.pad(texts, (0, 0, 0, 3))
        torch.testing.assert_close(fuser.score(images, padded), fuser.score(images, texts), atol=1e-5, rtol=0)
        nodes = fuser.nodes(images, padded)[1]
        assert not is_part(nodes)[:, -3:].any() and is_part(nodes)[:, 0].all()
        weights = fuser.attention(images, padded[:5])
        present = is_part(padded[:5])[:, 1:]
        torch.testing.assert_close(weights.sum(dim=-1)[present], torch.ones(int(present.sum())))


@EVERY
def test_pooled_vectors_alone_make_the_shortlist(make):
    fuser, (images, texts) = made(make), stacks()
    with torch.no_grad():
        found = fuser.shortlist_scores(*fuser.nodes(images, texts))
        images[:, 1:] = random(5, CELLS, IMAGE, seed=5)
        texts[:, 1:] = random(7, TOKENS, TEXT, seed=6)
        torch.testing.assert_close(fuser.shortlist_scores(*fuser.nodes(images, texts)), found)
        a = fuser.project_images(fuser.standardize_images(images[:, 0]))
        b = fuser.project_texts(fuser.standardize_texts(texts[:, 0]))
        torch.testing.assert_close(found, F.cosine_similarity(a[:, None], b[None], dim=-1))


@EVERY
def test_the_scores_follow_a_permutation(make):
    fuser, (images, texts) = made(make), stacks()
    assert permutation_gap(fuser, images, texts) < 1e-4


@EVERY
def test_noise_teaches_nothing(make):
    def train(noise: PairedFeatures, validation: PairedFeatures) -> PartFuser:
        torch.manual_seed(0)
        fuser = make()
        fit(fuser, noise, validation, epochs=5, batch_size=50, learning_rate=1e-2)
        return fuser

    assert noise_recall(train, (IMAGE, TEXT), held_out=100, parts=(CELLS, TOKENS)) < 0.06


def test_vectors_are_refused_by_fusers_of_parts_and_stacks_by_the_others():
    vectors, (images, texts) = (random(2, IMAGE), random(2, TEXT)), stacks(2, 2)
    with pytest.raises(MmkitError, match=r"fuser\.view"):
        region_word()(*vectors)
    with pytest.raises(MmkitError, match=r"fuser\.view"):
        MultimodalFeatureFuser(IMAGE, TEXT, 4)(images, texts)
    with pytest.raises(MmkitError, match="grids=True"):
        region_word().view(PairedFeatures.from_arrays(*vectors, [0, 1]))
    with pytest.raises(MmkitError, match="heads"):
        CrossAttentionFuser(IMAGE, TEXT, width=9, heads=2)


def test_cells_have_their_centres_row_by_row():
    assert cell_positions(4).tolist() == [[-1, -1], [1, -1], [-1, 1], [1, 1]]
    assert cell_positions(9)[5].tolist() == [1, 0] and cell_positions(1).tolist() == [[0, 0]]
    with pytest.raises(MmkitError, match="48 cells"):
        cell_positions(48)


# --- cross-attention -----------------------------------------------------------------------------


def test_what_tokens_have_seen_equals_torch_attention_with_a_mask():
    fuser, (images, texts) = made(cross_attention), stacks(7, 7)
    width = fuser.width
    torch_attention = nn.MultiheadAttention(width, fuser.heads, batch_first=True).eval()
    with torch.no_grad():
        query, _, _ = fuser.from_tokens.weight.split(width)
        _, key, value = fuser.from_cells.weight.split(width)
        torch_attention.in_proj_weight.copy_(torch.cat([query, key, value]))
        biases = (fuser.from_tokens.bias[:width], fuser.from_cells.bias[width:])
        torch_attention.in_proj_bias.copy_(torch.cat(biases))
        torch_attention.out_proj.weight.copy_(fuser.seen_by_tokens.weight)
        torch_attention.out_proj.bias.copy_(fuser.seen_by_tokens.bias)
        image_nodes, text_nodes = fuser.nodes(images, texts)
        images_in, texts_in = fuser.prepare(images, texts)
        cells = unit_scale(fuser.project_cells(images_in[:, 1:])) * is_part(images[:, 1:])[..., None]
        tokens = unit_scale(fuser.project_tokens(texts_in[:, 1:])) * is_part(texts[:, 1:])[..., None]
        seen, weights = torch_attention(tokens, cells, cells)
        present = is_part(texts[:, 1:])
        mean = torch.stack([row[kept].mean(dim=0) for row, kept in zip(seen, present, strict=True)])
        torch.testing.assert_close(weights[present], fuser.attention(images, texts)[present], atol=1e-5, rtol=0)

        # with the other direction silent, the image vector is the pooled one and what the tokens have seen
        fuser.seen_by_cells.weight.zero_()
        fuser.seen_by_cells.bias.zero_()
        a = F.normalize(image_nodes[:, 0, :width] + mean, dim=-1) * width**0.5
        b = text_nodes[:, 0, :width]
        expected = torch.cat([a * b, fuser.concatenation(torch.cat([a, b], dim=-1))], dim=-1)
        torch.testing.assert_close(fuser.fuse(image_nodes, text_nodes), expected, atol=1e-4, rtol=0)


def test_both_directions_count():
    fuser, (images, texts) = made(cross_attention), stacks(4, 4)
    with torch.no_grad():
        before = fuser(images, texts)
        for layer in (fuser.seen_by_tokens, fuser.seen_by_cells):
            kept = layer.weight.clone()
            layer.weight.zero_()
            assert not torch.allclose(fuser(images, texts), before, atol=1e-3)
            layer.weight.copy_(kept)


# --- region-word ---------------------------------------------------------------------------------


def test_the_cosine_graph_is_pygs_gcn():
    nodes = F.normalize(random(3, 8, 4), dim=-1)
    adjacency = normalized_adjacency(nodes, 2)
    convolution = GCNConv(4, 6, bias=False)
    for graph in range(3):
        cosine = (nodes[graph] @ nodes[graph].T).clamp(min=0).fill_diagonal_(0)
        chosen = torch.zeros(8, 8, dtype=torch.bool)
        for row in range(8):
            chosen[row, cosine[row].topk(2).indices] = True
        edges, weight = dense_to_sparse(torch.where(chosen | chosen.T, cosine, 0.0))
        expected = convolution(nodes[graph], edges, weight)
        torch.testing.assert_close(adjacency[graph] @ convolution.lin(nodes[graph]), expected, atol=1e-5, rtol=0)
    alone = normalized_adjacency(F.normalize(random(2, 1, 4), dim=-1), 5)
    torch.testing.assert_close(alone, torch.ones(2, 1, 1))


def test_a_word_receives_where_and_how_large_its_object_is():
    fuser = region_word()
    with torch.no_grad():
        fuser.log_sharpness.fill_(5.0)
    cosine = torch.zeros(1, 3, 9)
    cosine[0, 0, 2] = 1  # top right
    cosine[0, 1, [0, 6]] = 1  # the left corners
    messages = fuser._messages(cosine, cell_positions(9))[0].detach()
    torch.testing.assert_close(messages[0], torch.tensor([1, -1, 0, 0, 1 / 9]), atol=1e-4, rtol=0)
    torch.testing.assert_close(messages[1], torch.tensor([-1, 0, 0, 1, 2 / 9]), atol=1e-4, rtol=0)
    torch.testing.assert_close(messages[2], torch.tensor([0, 0, 2 / 3, 2 / 3, 0]), atol=1e-4, rtol=0)


OBJECTS = 8
LEFT, RIGHT = OBJECTS, OBJECTS + 1


def arranged(count: int, seed: int) -> tuple[PairedFeatures, PairedFeatures]:
    """Two objects in nine cells, and "a left of b" or "b right of a"; false: with the objects swapped.

    A token is the one-hot of its word and does not know its place in the sentence.
    """
    generator = torch.Generator().manual_seed(seed)
    grids, captions, swapped = torch.zeros(count, 9, OBJECTS + 2), [], []
    for row in range(count):
        left, right = torch.randperm(OBJECTS, generator=generator)[:2].tolist()
        column = int(torch.randint(2, (), generator=generator))
        heights = torch.randint(3, (2,), generator=generator).tolist()
        grids[row, 3 * heights[0] + column, left] = 1
        grids[row, 3 * heights[1] + 2, right] = 1
        first, relation, last = (
            (left, LEFT, right) if torch.rand((), generator=generator) < 0.5 else (right, RIGHT, left)
        )
        captions.append((first, relation, last))
        swapped.append((last, relation, first))

    def tokens(sentences: list[tuple[int, int, int]]) -> Tensor:
        return F.one_hot(torch.tensor(sentences), OBJECTS + 2).float()

    grids = grids + 0.02 * torch.randn(grids.shape, generator=generator)
    true, false = (
        PairedFeatures.from_arrays(grids.mean(dim=1), found.mean(dim=1), range(count), grids, found)
        for found in (tokens(captions), tokens(swapped))
    )
    return true, false


@pytest.mark.parametrize(("name", "low", "high"), [("region-word", 0.95, 1.0), ("mlp", 0.35, 0.65)])
def test_positions_tell_who_is_left_and_pooled_features_do_not(name, low, high):
    (train, false), (validation, _), (test, wrong) = (
        arranged(count, seed) for seed, count in enumerate((300, 60, 200))
    )
    torch.manual_seed(0)
    if name == "mlp":
        fuser = MultimodalFeatureFuser(OBJECTS + 2, OBJECTS + 2, 32)
    else:
        fuser = RegionWordGNN(OBJECTS + 2, OBJECTS + 2, width=16, layers=0, feature_dropout=0.0)
    wrong_ones = FalseCaptions(false, torch.arange(300))
    fit(fuser, train, validation, epochs=30, batch_size=50, learning_rate=1e-2, false=wrong_ones)
    pairs = DiagnosticNegatives("roles", *(test.owner.numpy(),) * 2, ("swapped",) * len(test.owner))
    found = diagnostic_report(fuser, test, {"roles": (pairs, wrong)})["roles"]
    assert low <= found.accuracy <= high
    assert retrieval_report(fuser, test).text_to_image.r1 > 0.05


def test_the_parts_of_a_store_reach_the_fuser_and_its_standardisation(dataset, encoders, tmp_path):
    store = extract_features(dataset.select(range(12)), encoders, tmp_path, "float32", grids=True, tokens=True)
    features = store.select([7, 2, 9]).with_parts()
    images, captions = features.images(), features.captions()
    assert images.shape == (3, 50, 1280) and captions.shape[::2] == (15, 384)
    torch.testing.assert_close(images[:, 1:].mean(dim=1), images[:, 0], atol=5e-3, rtol=0)
    present = is_part(captions)[:, 1:]
    assert torch.equal(present.long(), features.tokens()[1]) and not present.all()
    fuser = RegionWordGNN(1280, 384, width=8)
    fuser.observe(features)
    prepared = fuser.prepare(images, captions)
    assert abs(prepared[0][:, 1:].mean().item()) < 0.2 and abs(prepared[1][:, 1:][present].mean().item()) < 0.2
    assert not prepared[1][:, 1:][~present].any()


def test_a_role_depends_on_the_words_within_reach_alone_and_on_their_order():
    torch.manual_seed(0)
    fuser = RegionWordGNN(IMAGE, TEXT, width=8, reach=2).eval()
    images, texts = random(1, 1 + CELLS, IMAGE), random(1, 1 + 7, TEXT, seed=1)

    def roles(texts: Tensor) -> Tensor:
        return fuser.nodes(images, texts)[1][0, 1:, 8:].detach()

    changed, swapped = texts.clone(), texts.clone()
    changed[0, 1 + 6] += 1  # the last word
    differ = (roles(changed) != roles(texts)).any(dim=1)
    assert differ.tolist() == [False] * 4 + [True] * 3
    swapped[0, [1 + 1, 1 + 3]] = texts[0, [1 + 3, 1 + 1]]  # the neighbours of word 2
    assert not torch.allclose(roles(swapped)[2], roles(texts)[2])
