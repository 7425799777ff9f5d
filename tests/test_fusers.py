"""The contract of every fuser, against plain torch and pair-by-pair loops."""

import pytest
import torch
import torch.nn.functional as F

import mmkit
from mmkit import FUSERS, HeteroGNN, MmkitError, MultimodalFeatureFuser, MultimodalGNN, PairedFeatures, permutation_gap
from mmkit.baselines import RegularizedCCA, TwoTower
from mmkit.fusers import GatedFuser, PairFuser, Standardize, sum_of_relu, unit_scale

IMAGE_DIM, TEXT_DIM = 12, 8


def features(images: int, texts: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, IMAGE_DIM, generator=generator), torch.randn(texts, TEXT_DIM, generator=generator)


def randomised(fuser: PairFuser, seed: int = 1) -> PairFuser:
    """The fuser in eval mode, with its head off its start, where concatenation path and gate have no weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in fuser.named_parameters():
            if name.startswith(("match_head", "gate", "log_scale", "threshold")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return fuser.eval()


def small_mlp(**changes: object) -> MultimodalFeatureFuser:
    torch.manual_seed(0)
    return randomised(MultimodalFeatureFuser(IMAGE_DIM, TEXT_DIM, 16, **changes))


def small_gnn(**changes: object) -> MultimodalGNN:
    torch.manual_seed(0)
    return randomised(MultimodalGNN(IMAGE_DIM, TEXT_DIM, 16, heads=4, neighbours=3, **changes))


def small_gated(**changes: object) -> GatedFuser:
    torch.manual_seed(0)
    return randomised(GatedFuser(IMAGE_DIM, TEXT_DIM, 16, **changes))


def small_two_tower(**changes: object) -> TwoTower:
    torch.manual_seed(0)
    return randomised(TwoTower(IMAGE_DIM, TEXT_DIM, 16, **changes))


def small_hetero_gnn(**changes: object) -> HeteroGNN:
    torch.manual_seed(0)
    return randomised(HeteroGNN(IMAGE_DIM, TEXT_DIM, 16, neighbours=3, **changes))


def small_cca() -> RegularizedCCA:
    fuser = RegularizedCCA(IMAGE_DIM, TEXT_DIM, 6)
    images, texts = features(50, 50, seed=9)
    fuser.solve(PairedFeatures.from_arrays(images, texts + images[:, :TEXT_DIM], range(50)))
    return fuser.eval()


MAKERS = {
    "mlp": small_mlp,
    "gnn": small_gnn,
    "hetero-gnn": small_hetero_gnn,
    "gated": small_gated,
    "two-tower": small_two_tower,
    "cca": small_cca,
}
TWO_PATHS = ["mlp", "gnn", "hetero-gnn", "gated"]


def over(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("make", [MAKERS[name] for name in names], ids=names)


EVERY = over(*MAKERS)


def test_every_fuser_of_vectors_that_has_a_name_is_tested_here():
    found = {name: type(make()) for name, make in MAKERS.items()}
    assert found == {name: kind for name, kind in FUSERS.items() if not kind.takes_parts}


# --- sizes ---------------------------------------------------------------------------------------


def test_default_sizes_are_those_of_the_article():
    fuser = MultimodalFeatureFuser().eval()
    assert (fuser.project_images.in_features, fuser.project_images.out_features) == (2048, 1024)
    assert (fuser.project_texts.in_features, fuser.project_texts.out_features) == (768, 1024)
    linear, relu, dropout = fuser.concatenation
    assert (linear.in_features, linear.out_features) == (2048, 1024)
    assert isinstance(relu, torch.nn.ReLU) and dropout.p == 0.3
    assert fuser(torch.randn(3, 2048), torch.randn(3, 768)).shape == (3, 2048) == (3, fuser.fused_dim)
    assert fuser.score(torch.randn(2, 2048), torch.randn(5, 768)).shape == (2, 5)


@EVERY
def test_sizes_that_differ_are_refused_with_both_named(make):
    images, texts = features(4, 4)
    for call in (make().score, make()):
        with pytest.raises(MmkitError) as error:
            call(images[:, :-1], texts)
        assert "(12, 8)" in str(error.value) and "(4, 11)" in str(error.value) and "(4, 8)" in str(error.value)
    with pytest.raises(MmkitError, match=r"\(12, 8\).*\(4, 12\).*\(8,\)"):
        make().score(images, texts[0])


def test_pairs_that_are_not_aligned_are_refused_with_both_counts():
    with pytest.raises(MmkitError, match="3 images and 4 texts"):
        small_mlp()(*features(3, 4))


# --- the two paths -------------------------------------------------------------------------------


def test_forward_is_the_product_then_the_concatenation_of_the_projections():
    fuser = small_mlp(normalize=False)
    images, texts = features(5, 5)
    a = images @ fuser.project_images.weight.T + fuser.project_images.bias
    b = texts @ fuser.project_texts.weight.T + fuser.project_texts.bias
    linear = fuser.concatenation[0]
    joined = (torch.cat([a, b], dim=1) @ linear.weight.T + linear.bias).clamp(min=0)
    fused = fuser(images, texts)
    torch.testing.assert_close(fused[:, :16], a * b)
    torch.testing.assert_close(fused[:, 16:], joined)


def test_normalised_nodes_have_length_root_width_and_change_no_direction():
    images, texts = features(5, 5)
    plain, unit = small_mlp(normalize=False).nodes(images, texts), small_mlp(normalize=True).nodes(images, texts)
    for before, after in zip(plain, unit, strict=True):
        torch.testing.assert_close(after.norm(dim=1), torch.full((5,), 4.0))
        torch.testing.assert_close(F.cosine_similarity(before, after), torch.ones(5))


def test_an_untrained_score_is_cosine_over_temperature():
    fuser = MultimodalFeatureFuser(IMAGE_DIM, TEXT_DIM, 16).eval()
    images, texts = features(4, 6)
    image_nodes, text_nodes = fuser.nodes(images, texts)
    cosine = F.cosine_similarity(image_nodes[:, None], text_nodes[None], dim=2)
    torch.testing.assert_close(fuser.score(images, texts), cosine / 0.07 + fuser.match_head.bias, rtol=1e-4, atol=1e-4)


def test_unit_scale_makes_the_sum_of_a_product_width_times_cosine():
    a, b = torch.randn(2, 7, 10, generator=torch.Generator().manual_seed(0))
    product = (unit_scale(a) * unit_scale(b)).sum(dim=1)
    torch.testing.assert_close(product, 10 * F.cosine_similarity(a, b))


# --- score ---------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("block", [None, 1, 500], ids=["one block", "a row a block", "some rows a block"])
def test_score_equals_match_pair_by_pair(make, block, monkeypatch):
    if block is not None:
        monkeypatch.setattr(mmkit.fusers, "_BLOCK", block)
    fuser = make()
    images, texts = features(9, 7)
    image_nodes, text_nodes = fuser.nodes(images, texts)
    expected = [[fuser.match(image[None], text[None]).item() for text in text_nodes] for image in image_nodes]
    expected = torch.tensor(expected)
    assert expected.std() > 0.1
    assert (fuser.score(images, texts) - expected).abs().max() < 1e-4


@over(*TWO_PATHS)
def test_match_is_the_match_head_of_forward(make):
    fuser = make()
    images, texts = features(6, 6)
    expected = fuser(images, texts) @ fuser.match_head.weight[0] + fuser.match_head.bias
    torch.testing.assert_close(fuser.score(images, texts).diagonal(), expected, rtol=1e-4, atol=1e-4)


@EVERY
def test_permuting_texts_permutes_columns_and_images_rows_and_nothing_else(make):
    fuser = make()
    images, texts = features(12, 10)
    rows, columns = (torch.randperm(n, generator=torch.Generator().manual_seed(3)) for n in (12, 10))
    scores = fuser.score(images, texts)
    torch.testing.assert_close(fuser.score(images, texts[columns]), scores[:, columns], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fuser.score(images[rows], texts), scores[rows], rtol=1e-4, atol=1e-4)
    assert permutation_gap(fuser, images, texts) < 1e-4


@over("mlp", "gated", "two-tower", "cca")
def test_a_score_does_not_depend_on_the_pool(make):
    fuser = make()
    images, texts = features(20, 20)
    others = features(20, 20, seed=1)
    scores = fuser.score(images, texts)
    torch.testing.assert_close(fuser.score(images[3:5], texts[7:8]), scores[3:5, 7:8])
    pool = fuser.score(torch.cat([images[3:5], others[0]]), torch.cat([texts[7:8], others[1]]))
    torch.testing.assert_close(pool[:2, :1], scores[3:5, 7:8])
    assert not fuser.transductive


# --- the gate ------------------------------------------------------------------------------------


def test_an_untrained_gate_is_half_open_and_leaves_cosine_over_temperature():
    torch.manual_seed(0)
    fuser, images, texts = GatedFuser(IMAGE_DIM, TEXT_DIM, 16).eval(), *features(6, 6)
    assert (fuser.gates(images, texts) == 0.5).all()
    expected = F.cosine_similarity(*fuser.nodes(images, texts)) / 0.07 + fuser.match_head.bias
    torch.testing.assert_close(fuser.score(images, texts).diagonal(), expected, rtol=1e-4, atol=1e-4)


def test_gates_are_the_sigmoid_of_a_layer_over_both_nodes_and_weigh_the_two_paths():
    fuser, images, texts = small_gated(), *features(6, 6)
    a, b = fuser.nodes(images, texts)
    logits = torch.cat([a, b], dim=1) @ fuser.gate.weight.T + fuser.gate.bias
    gates = fuser.gates(images, texts)
    torch.testing.assert_close(gates, 1 / (1 + (-logits).exp()))
    joined = fuser.concatenation(torch.cat([a, b], dim=1))
    torch.testing.assert_close(fuser(images, texts), torch.cat([gates * a * b, (1 - gates) * joined], dim=1))


def test_a_gate_depends_on_both_members_of_its_pair():
    fuser, images, texts = small_gated(), *features(6, 6)
    with torch.no_grad():
        fuser.gate.weight.mul_(0.2)  # of the size that training leaves, not one that saturates the sigmoid
    gates = fuser.gates(images, texts)
    assert gates.shape == (6, 16) and gates.min() > 0 and gates.max() < 1
    for changed in (fuser.gates(images.roll(1, 0), texts), fuser.gates(images, texts.roll(1, 0))):
        assert ((changed - gates).abs().amax(dim=1) > 0.05).all()


# --- standardisation and dropout -----------------------------------------------------------------


def test_standardize_gives_zero_mean_and_unit_deviation():
    values = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.01, 1, 300])
    values += torch.tensor([5.0, -2, 1000])
    standardize = Standardize(3)
    torch.testing.assert_close(standardize(values), values)
    standardize.fit(values)
    torch.testing.assert_close(standardize(values).mean(dim=0), torch.zeros(3), rtol=0, atol=1e-3)
    torch.testing.assert_close(standardize(values).std(dim=0, correction=0), torch.ones(3), rtol=1e-3, atol=0)


def test_standardize_survives_constant_features():
    values = torch.tensor([[0.0, 2.5, 1.0], [0.0, 2.5, 3.0]])
    standardize = Standardize(3)
    standardize.fit(values)
    torch.testing.assert_close(standardize(values), torch.tensor([[0.0, 0.0, -1.0], [0.0, 0.0, 1.0]]))
    standardize.fit(values[:1])
    torch.testing.assert_close(standardize(values[:1]), torch.zeros(1, 3))


@EVERY
def test_features_are_standardised_before_they_are_projected(make):
    fuser, plain = make(), make()
    images, texts = features(6, 6)
    fuser.standardize_images.fit(3 * images + 1)
    fuser.standardize_texts.fit(texts / 7 - 2)
    plain.standardize_images.fit(images)
    plain.standardize_texts.fit(texts)
    expected = plain.score(images, texts)
    torch.testing.assert_close(fuser.score(3 * images + 1, texts / 7 - 2), expected, rtol=1e-3, atol=1e-3)


@over(*TWO_PATHS, "two-tower")
def test_features_are_dropped_in_training_only(make):
    fuser = make(feature_dropout=0.5, **({} if make is small_two_tower else {"dropout": 0.0}))
    images, texts = features(40, 40)
    kept_images, kept_texts = fuser.prepare(images, texts)
    assert torch.equal(kept_images, images) and torch.equal(kept_texts, texts)
    assert torch.equal(fuser.score(images, texts), fuser.score(images, texts))
    fuser.train()
    for prepared, whole in zip(fuser.prepare(images, texts), (images, texts), strict=True):
        kept = prepared != 0
        assert 0.35 < kept.float().mean() < 0.65
        torch.testing.assert_close(prepared[kept], 2 * whole[kept])
    assert not torch.equal(fuser.score(images, texts), fuser.score(images, texts))


# --- saving --------------------------------------------------------------------------------------


@EVERY
def test_a_saved_fuser_scores_the_same_when_it_is_loaded(make, tmp_path):
    fuser = make()
    images, texts = features(6, 9)
    fuser.standardize_images.fit(2 * images + 1)
    fuser.standardize_texts.fit(texts - 3)
    fuser.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"model.safetensors", "config.json"}
    torch.manual_seed(99)
    loaded = type(fuser).from_pretrained(str(tmp_path)).eval()
    assert torch.equal(loaded.score(images, texts), fuser.score(images, texts))
    assert (loaded.width, loaded.fused_dim) == (fuser.width, fuser.fused_dim)


@over(*TWO_PATHS)
def test_a_loaded_fuser_keeps_its_dropout(make, tmp_path):
    make(dropout=0.1, feature_dropout=0.2).save_pretrained(tmp_path)
    loaded = type(make()).from_pretrained(str(tmp_path))
    assert (loaded.feature_dropout.p, loaded.concatenation[2].p) == (0.2, 0.1)


def test_a_loaded_fuser_keeps_the_choice_not_to_normalise(tmp_path):
    small_mlp(normalize=False).save_pretrained(tmp_path)
    assert MultimodalFeatureFuser.from_pretrained(str(tmp_path)).normalize is False


# --- one path alone ------------------------------------------------------------------------------


@pytest.mark.parametrize("paths", ["product", "concatenation"])
def test_one_path_alone_is_half_of_both(paths):
    both, alone = small_mlp(), small_mlp(paths=paths)
    alone.load_state_dict({key: value for key, value in both.state_dict().items() if key != "match_head.weight"}, False)
    half = slice(None, 16) if paths == "product" else slice(16, None)
    images, texts = features(4, 4)
    with torch.no_grad():
        alone.match_head.weight.copy_(both.match_head.weight[:, half])
        torch.testing.assert_close(alone(images, texts), both(images, texts)[:, half])
        nodes = alone.nodes(images, texts)
        pairs = torch.stack([alone.match(nodes[0], text.expand(4, -1)) for text in nodes[1]], dim=1)
        torch.testing.assert_close(alone.score(images, texts), pairs, atol=1e-4, rtol=0)
    assert alone.fused_dim == 16 and hasattr(alone, "concatenation") == (paths == "concatenation")


def test_unknown_paths_and_a_gate_with_nothing_to_choose_are_refused():
    with pytest.raises(MmkitError, match="both, product, concatenation"):
        small_mlp(paths="sum")
    with pytest.raises(MmkitError, match="two paths"):
        small_gated(paths="product")


@pytest.mark.parametrize("sign", [1, -1, 0])
def test_the_sum_of_relu_holds_for_weights_of_one_sign_and_of_none(sign):
    left, right = features(5, 7)[0], torch.randn(7, IMAGE_DIM, generator=torch.Generator().manual_seed(3))
    weight = sign * torch.rand(IMAGE_DIM, generator=torch.Generator().manual_seed(4))
    expected = torch.relu(left[:, None] + right) @ weight
    torch.testing.assert_close(sum_of_relu(left, right, weight), expected, atol=1e-5, rtol=0)
