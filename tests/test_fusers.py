"""The contract of every fuser of vectors, and system A against plain torch and pair-by-pair loops."""

import pytest
import torch
import torch.nn.functional as F

import mmkit
from helpers import learnable
from mmkit.checkpoints import FUSERS
from mmkit.features import PairedFeatures
from mmkit.fusers import GatedFuser, MultimodalFeatureFuser, PairFuser, Standardize, sum_of_relu, unit_scale
from mmkit.support import MmkitError

IMAGE_DIM, TEXT_DIM = 12, 8
SIZES = {"gnn": {"heads": 4, "neighbours": 3}, "hetero-gnn": {"neighbours": 3}}
KINDS = {name: kind for name, kind in FUSERS.items() if not kind.takes_parts}
EVERY = pytest.mark.parametrize("name", KINDS)


def features(images: int, texts: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, IMAGE_DIM, generator=generator), torch.randn(texts, TEXT_DIM, generator=generator)


def make(name: str, **changes: object) -> PairFuser:
    """A small fuser in eval mode, its head off its start, where concatenation path and gate have no weight."""
    torch.manual_seed(0)
    fuser = KINDS[name](IMAGE_DIM, TEXT_DIM, 6 if name == "cca" else 16, **SIZES.get(name, {}), **changes)
    if name == "cca":
        images, texts = features(50, 50, seed=9)
        fuser.solve(PairedFeatures.from_arrays(images, texts + images[:, :TEXT_DIM], range(50)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in fuser.named_parameters():
            if parameter_name.startswith(("match_head", "gate", "threshold")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return fuser.eval()


# --- the contract --------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("block", [None, 1, 500], ids=["one block", "a row a block", "some rows a block"])
def test_score_equals_match_on_every_pair(name, block, monkeypatch):
    if block is not None:
        monkeypatch.setattr(mmkit.fusers, "_BLOCK", block)
    fuser = make(name)
    (images, texts), head = features(9, 7), getattr(fuser, "match_head", None)
    image_nodes, text_nodes = fuser.nodes(images, texts)
    pairs = [[fuser.match(image[None], text[None]).item() for text in text_nodes] for image in image_nodes]
    expected = torch.tensor(pairs)
    assert expected.std() > 0.1
    torch.testing.assert_close(fuser.score(images, texts), expected, rtol=0, atol=1e-4)
    if head is not None:
        by_head = fuser.fuse(image_nodes[:7], text_nodes) @ head.weight[0] + head.bias
        torch.testing.assert_close(by_head, expected[:7].diagonal(), rtol=1e-4, atol=1e-4)


@EVERY
def test_permuting_texts_permutes_columns_and_images_rows_and_nothing_else(name):
    fuser, (images, texts) = make(name), features(12, 10)
    rows, columns = (torch.randperm(n, generator=torch.Generator().manual_seed(3)) for n in (12, 10))
    scores = fuser.score(images, texts)
    torch.testing.assert_close(fuser.score(images, texts[columns]), scores[:, columns], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fuser.score(images[rows], texts), scores[rows], rtol=1e-4, atol=1e-4)
    assert mmkit.permutation_gap(fuser, images, texts) < 1e-4


@EVERY
def test_a_score_depends_on_the_pool_only_where_the_fuser_says_so(name):
    fuser, (images, texts), others = make(name), features(20, 20), features(20, 20, seed=1)
    scores = fuser.score(images, texts)[3:5, 7:8]
    pool = fuser.score(torch.cat([images[3:5], others[0]]), torch.cat([texts[7:8], others[1]]))[:2, :1]
    for found in (fuser.score(images[3:5], texts[7:8]), pool):
        assert torch.allclose(found, scores, rtol=1e-4, atol=1e-5) != fuser.transductive


@EVERY
def test_features_are_standardised_before_they_are_projected(name):
    fuser, plain, (images, texts) = make(name), make(name), features(6, 6)
    for one, (left, right) in ((fuser, (3 * images + 1, texts / 7 - 2)), (plain, (images, texts))):
        one.standardize_images.fit(left)
        one.standardize_texts.fit(right)
    expected = plain.score(images, texts)
    torch.testing.assert_close(fuser.score(3 * images + 1, texts / 7 - 2), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["mlp", "gnn", "hetero-gnn", "gated", "two-tower"])
def test_features_are_dropped_in_training_only(name):
    fuser = make(name, feature_dropout=0.5, **({} if name == "two-tower" else {"dropout": 0.0}))
    images, texts = features(40, 40)
    assert all(map(torch.equal, fuser.prepare(images, texts), (images, texts)))
    assert torch.equal(fuser.score(images, texts), fuser.score(images, texts))
    fuser.train()
    for prepared, whole in zip(fuser.prepare(images, texts), (images, texts), strict=True):
        kept = prepared != 0
        assert 0.35 < kept.float().mean() < 0.65
        torch.testing.assert_close(prepared[kept], 2 * whole[kept])
    assert not torch.equal(fuser.score(images, texts), fuser.score(images, texts))


@EVERY
def test_a_saved_fuser_scores_the_same_when_it_is_loaded(name, tmp_path):
    changes = {"dropout": 0.1, "feature_dropout": 0.2} if name not in ("two-tower", "cca") else {}
    if name == "mlp":
        changes["normalize"] = False
    fuser, (images, texts) = make(name, **changes), features(6, 9)
    fuser.standardize_images.fit(2 * images + 1)
    fuser.standardize_texts.fit(texts - 3)
    fuser.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"model.safetensors", "config.json"}
    torch.manual_seed(99)
    loaded = type(fuser).from_pretrained(str(tmp_path)).eval()
    assert torch.equal(loaded.score(images, texts), fuser.score(images, texts))
    assert (loaded.width, loaded.fused_dim) == (fuser.width, fuser.fused_dim)
    if changes:
        assert (loaded.feature_dropout.p, loaded.concatenation[2].p) == (0.2, 0.1)


@EVERY
def test_features_of_other_sizes_are_refused_with_both_named(name):
    images, texts = features(4, 4)
    for call in (make(name).score, make(name)):
        with pytest.raises(MmkitError, match=r"\(12, 8\) as vectors.*\(4, 11\) and \(4, 8\)\. Remedy"):
            call(images[:, :-1], texts)
    with pytest.raises(MmkitError, match=r"\(12, 8\).*\(4, 12\).*\(8,\)"):
        make(name).score(images, texts[0])


# --- system A ------------------------------------------------------------------------------------


def test_default_sizes_are_those_of_the_article():
    fuser = MultimodalFeatureFuser().eval()
    assert (fuser.project_images.in_features, fuser.project_images.out_features) == (2048, 1024)
    assert (fuser.project_texts.in_features, fuser.project_texts.out_features) == (768, 1024)
    linear, relu, dropout = fuser.concatenation
    assert (linear.in_features, linear.out_features) == (2048, 1024)
    assert isinstance(relu, torch.nn.ReLU) and dropout.p == 0.3
    assert fuser(torch.randn(3, 2048), torch.randn(3, 768)).shape == (3, 2048) == (3, fuser.fused_dim)


def test_forward_is_the_product_then_the_concatenation_of_the_projections():
    fuser, (images, texts) = make("mlp", normalize=False), features(5, 5)
    a = images @ fuser.project_images.weight.T + fuser.project_images.bias
    b = texts @ fuser.project_texts.weight.T + fuser.project_texts.bias
    joined = (torch.cat([a, b], dim=1) @ fuser.concatenation[0].weight.T + fuser.concatenation[0].bias).clamp(min=0)
    torch.testing.assert_close(fuser(images, texts), torch.cat([a * b, joined], dim=1))


def test_normalised_nodes_have_length_root_width_so_that_products_sum_to_width_times_cosine():
    plain, unit = (make("mlp", normalize=normalize).nodes(*features(5, 5)) for normalize in (False, True))
    for before, after in zip(plain, unit, strict=True):
        torch.testing.assert_close(after.norm(dim=1), torch.full((5,), 4.0))
        torch.testing.assert_close(after, unit_scale(before))
    torch.testing.assert_close((unit[0] * unit[1]).sum(dim=1), 16 * F.cosine_similarity(*plain))


@pytest.mark.parametrize("kind", [MultimodalFeatureFuser, GatedFuser])
def test_an_untrained_score_is_cosine_over_temperature(kind):
    fuser, (images, texts) = kind(IMAGE_DIM, TEXT_DIM, 16).eval(), features(4, 6)
    a, b = fuser.nodes(images, texts)
    expected = F.cosine_similarity(a[:, None], b[None], dim=2) / 0.07 + fuser.match_head.bias
    torch.testing.assert_close(fuser.score(images, texts), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("paths", "half"), [("product", slice(None, 16)), ("concatenation", slice(16, None))])
def test_one_path_alone_is_half_of_both(paths, half):
    both, alone, (images, texts) = make("mlp"), make("mlp", paths=paths), features(4, 4)
    alone.load_state_dict({key: value for key, value in both.state_dict().items() if key != "match_head.weight"}, False)
    with torch.no_grad():
        alone.match_head.weight.copy_(both.match_head.weight[:, half])
        torch.testing.assert_close(alone(images, texts), both(images, texts)[:, half])
        a, b = alone.nodes(images, texts)
        pairs = torch.stack([alone.match(a, text.expand(4, -1)) for text in b], dim=1)
        torch.testing.assert_close(alone.score(images, texts), pairs, atol=1e-4, rtol=0)
    assert alone.fused_dim == 16 and hasattr(alone, "concatenation") == (paths == "concatenation")


@pytest.mark.parametrize("sign", [1, -1, 0])
def test_the_sum_of_relu_holds_for_weights_of_one_sign_and_of_none(sign):
    generator = torch.Generator().manual_seed(3)
    left, right, weight = (torch.randn(shape, generator=generator) for shape in ((5, 12), (7, 12), (12,)))
    expected = torch.relu(left[:, None] + right) @ (sign * weight.abs())
    torch.testing.assert_close(sum_of_relu(left, right, sign * weight.abs()), expected, atol=1e-5, rtol=0)


def test_gates_are_the_sigmoid_of_a_layer_over_both_nodes_and_weigh_the_two_paths():
    images, texts = features(6, 6)
    assert (GatedFuser(IMAGE_DIM, TEXT_DIM, 16).eval().gates(images, texts) == 0.5).all(), "half open at first"
    fuser = make("gated")
    a, b = fuser.nodes(images, texts)
    gates, joined = fuser.gates(images, texts), fuser.concatenation(torch.cat([a, b], dim=1))
    logits = torch.cat([a, b], dim=1) @ fuser.gate.weight.T + fuser.gate.bias
    torch.testing.assert_close(gates, 1 / (1 + (-logits).exp()))
    torch.testing.assert_close(fuser(images, texts), torch.cat([gates * a * b, (1 - gates) * joined], dim=1))
    with torch.no_grad():
        fuser.gate.weight.mul_(0.2)  # of the size that training leaves, not one that saturates the sigmoid
    gates = fuser.gates(images, texts)
    for changed in (fuser.gates(images.roll(1, 0), texts), fuser.gates(images, texts.roll(1, 0))):
        assert ((changed - gates).abs().amax(dim=1) > 0.05).all(), "it depends on both members of its pair"


def test_standardize_gives_zero_mean_and_unit_deviation_and_only_centres_constants():
    values = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.01, 1, 300, 0])
    values += torch.tensor([5.0, -2, 1000, 2.5])
    standardize = Standardize(4)
    torch.testing.assert_close(standardize(values), values)
    standardize.fit(values)
    torch.testing.assert_close(standardize(values).mean(dim=0), torch.zeros(4), rtol=0, atol=1e-3)
    deviation = standardize(values).std(dim=0, correction=0)
    torch.testing.assert_close(deviation, torch.tensor([1.0, 1, 1, 0]), rtol=1e-3, atol=0)
    standardize.fit(values[:1])
    torch.testing.assert_close(standardize(values[:1]), torch.zeros(1, 4))


def test_what_cannot_be_fused_is_refused():
    with pytest.raises(MmkitError, match="3 images and 4 texts"):
        make("mlp")(*features(3, 4))
    with pytest.raises(MmkitError, match="both, product, concatenation"):
        make("mlp", paths="sum")
    with pytest.raises(MmkitError, match="two paths"):
        GatedFuser(IMAGE_DIM, TEXT_DIM, 16, paths="product")


class AbsoluteDifference(MultimodalFeatureFuser):
    """A reader's edit: |a − b| in place of the product."""

    def fuse(self, image_nodes, text_nodes):
        joined = super().fuse(image_nodes, text_nodes)[:, self.width :]
        return torch.cat([(image_nodes - text_nodes).abs(), joined], dim=-1)


@pytest.mark.parametrize("edit", ["fuse", "fuse, inherited", "mlp", "gated"])
def test_a_fuser_that_fuses_otherwise_is_scored_by_its_own_match(edit, monkeypatch):
    kinds = {"fuse": AbsoluteDifference, "fuse, inherited": type("Child", (AbsoluteDifference,), {})}
    fuser = kinds[edit](IMAGE_DIM, TEXT_DIM, 16).eval() if edit in kinds else make(edit)
    if edit not in kinds:
        fuser.concatenation[1] = torch.nn.GELU()  # whose sums over pairs do not come apart as ReLU's
    data = learnable(12, 0, dims=(IMAGE_DIM, TEXT_DIM))
    a, b = fuser.nodes(data.images(), data.captions())
    by_pair = torch.stack([fuser.match(a, text.expand(len(a), -1)) for text in b], dim=1)
    torch.testing.assert_close(fuser.score(data.images(), data.captions()), by_pair)
    report = mmkit.retrieval_report(fuser, data)
    monkeypatch.setattr(mmkit.fusers, "_BLOCK", 1)  # a picture at a time
    assert mmkit.retrieval_report(fuser, data) == report
    _, caption_ranks = mmkit.ranks(by_pair, data.image_index)
    assert report.text_to_image.r1 == (caption_ranks == 1).double().mean().item()
