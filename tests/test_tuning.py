import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import mmkit
from mmkit import (
    CrossAttentionFuser,
    LoRATextFuser,
    MissingFile,
    MmkitError,
    MultimodalFeatureFuser,
    MultimodalGNN,
    PairedFeatures,
    RegularizedCCA,
    TextEncoder,
    TwoTower,
    diagnostic_pairs,
    diagnostic_report,
    extract_features,
    false_captions,
    fit,
    matching_report,
    retrieval_report,
    token_ids,
    tokenized,
)
from mmkit.evaluation import pool_nodes
from mmkit.features import PADDING, cat_parts
from mmkit.protocols import subset

TEXTS = ("a dog", "two red cats near an old boat on the grass", "a large pizza at night", "no")


@pytest.fixture(scope="module")
def exact(dataset, encoders, tmp_path_factory):
    """The store of 8 scenes in float32, so that vectors can be compared with what the encoder gives."""
    part = dataset.select(range(8))
    store = extract_features(part, encoders, tmp_path_factory.mktemp("exact"), precision="float32", dtype="float32")
    return part, store


@pytest.fixture(scope="module")
def features(exact, encoders):
    dataset, store = exact
    return tokenized(store.select(), dataset, encoders.preprocessor)


def towers(dims, width=16, seed=0, **settings):
    torch.manual_seed(seed)
    return TwoTower(*dims, width=width, **settings)


def tuned(features, encoders, seed=0, **settings):
    return LoRATextFuser(towers(features.dims, seed=seed), encoders.text, **settings).eval()


def shake(fuser):
    """Adapters as after training: B is no longer zero."""
    torch.manual_seed(1)
    for name, parameter in fuser.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return fuser


# --- token ids ---------------------------------------------------------------------------------


def test_captions_as_token_ids_are_those_of_the_dataset_in_any_order(exact, features, encoders):
    dataset, store = exact
    rows, chosen = torch.tensor([7, 2, 0]), [5, 0, 7]
    for part in (subset(features, chosen), tokenized(store.select(chosen), dataset, encoders.preprocessor)):
        ids = part.with_token_ids().captions(rows)
        batch = encoders.preprocessor.preprocess_text([dataset.captions[row] for row in part.caption_rows[rows]])
        assert ids.dtype == torch.long
        assert torch.equal(ids != PADDING, batch["attention_mask"].bool())  # no column of padding alone
        assert torch.equal(ids.clamp(min=0), batch["input_ids"])  # MiniLM pads with 0
        assert torch.equal(part.with_token_ids().images(), features.images(chosen))
        assert torch.equal(part.captions(rows), features.captions(part.caption_rows[rows]))


def test_texts_are_cut_at_the_preprocessors_longest_and_padded_behind(encoders, monkeypatch):
    short = mmkit.MultimodalPreprocessor(tokenizer=encoders.text.tokenizer, max_tokens=6)
    ids = token_ids(TEXTS, short)
    assert ids.shape == (4, 6)
    assert (ids[1] != PADDING).all() and ids[1, -1] == encoders.text.tokenizer.sep_token_id
    assert (ids[3, 3:] == PADDING).all() and (ids[3, :3] != PADDING).all()
    monkeypatch.setattr("mmkit.tuning._TOKENIZED", 1)
    assert np.array_equal(token_ids(TEXTS, short), ids)


def test_blocks_of_ids_of_different_lengths_become_one():
    left, right = torch.ones(2, 3, dtype=torch.long), torch.ones(1, 5, dtype=torch.long)
    assert cat_parts([left, right]).tolist() == [[1, 1, 1, PADDING, PADDING]] * 2 + [[1] * 5]
    assert cat_parts([left[:0, :0], right]).tolist() == [[1] * 5]


def test_a_dataset_that_does_not_fit_and_missing_ids_are_errors(exact, features, encoders):
    dataset, store = exact
    whole, preprocessor = store.select(), encoders.preprocessor
    with pytest.raises(MmkitError, match=r"not the \d+ of the features' store\. Remedy: give the whole"):
        tokenized(whole, dataset.select(range(6)), preprocessor)
    with pytest.raises(MmkitError, match="Remedy: give the whole"):
        tokenized(whole, replace(dataset, image_ids=dataset.image_ids[::-1]), preprocessor)
    with pytest.raises(MmkitError, match="Remedy: give the whole"):
        tokenized(whole, dataset.captions[:-1], preprocessor)
    with pytest.raises(MmkitError, match=r"holds no token_ids\. Remedy: tokenized"):
        tuned(features, encoders).view(whole)
    with pytest.raises(MmkitError, match="holds no token_ids"):  # those of other captions
        replace(features, sources=features.sources | {"captions": np.zeros((3, 384))}).with_token_ids()


# --- before training ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TwoTower, MultimodalFeatureFuser, MultimodalGNN])
def test_before_training_all_scores_are_the_fusers_on_the_stored_vectors(kind, features, encoders):
    torch.manual_seed(0)
    inner = kind(*features.dims, **{"hidden_dim": 16, "heads": 2} if kind is MultimodalGNN else {})
    inner.observe(features.vectors())
    fuser = LoRATextFuser(inner, encoders.text).eval()
    assert (fuser.transductive, fuser.whole_batch, fuser.width, fuser.fused_dim) == (
        inner.transductive,
        inner.whole_batch,
        inner.width,
        inner.fused_dim,
    )
    view, plain = fuser.view(features), features.vectors()
    images, owner = features.images(), features.owner
    with torch.inference_mode():
        torch.testing.assert_close(fuser.encode(view.captions()), plain.captions(), rtol=1e-4, atol=1e-5)
        pairs = (images, view.captions()), (images, plain.captions())
        torch.testing.assert_close(fuser.score(*pairs[0]), inner.score(*pairs[1]), rtol=1e-3, atol=1e-3)
        nodes, expected = fuser.nodes(*pairs[0]), inner.nodes(*pairs[1])
        for method in ("similarities", "shortlist_scores"):
            found = getattr(fuser, method)(*nodes), getattr(inner, method)(*expected)
            torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(
            fuser(images[owner], view.captions()), inner(images[owner], plain.captions()), rtol=1e-3, atol=1e-3
        )


def test_cls_pooling_is_the_encoders(features, encoders):
    cls = TextEncoder("minilm-l6", copy.deepcopy(encoders.text.backbone), 384, encoders.text.tokenizer, "cls")
    fuser = LoRATextFuser(towers(features.dims), cls).eval()
    with torch.inference_mode():
        vectors = fuser.encode(torch.from_numpy(token_ids(TEXTS, encoders.preprocessor)).long())
    expected = cls(**encoders.preprocessor.preprocess_text(TEXTS)).pooled
    torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-5)


def test_the_adapter_computes_what_the_paper_says(features, encoders):
    fuser = shake(tuned(features, encoders, rank=4, alpha=12))
    name = "encoder.layer.3.attention.self.query"
    layer = fuser.backbone.base_model.model.get_submodule(name)
    base = encoders.text.backbone.get_submodule(name)
    x, (a, b) = torch.randn(5, 384), (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    assert (a.shape, b.shape) == ((4, 384), (384, 4))
    torch.testing.assert_close(layer(x), base(x) + 3 * x @ a.T @ b.T, rtol=1e-4, atol=1e-4)


# --- the contract ------------------------------------------------------------------------------


def test_permuting_texts_permutes_columns_and_padding_changes_nothing(features, encoders, monkeypatch):
    fuser = shake(tuned(features, encoders))
    features = subset(features, range(4))
    images, ids = features.images(), fuser.view(features).captions()
    with torch.inference_mode():
        scores, order = fuser.score(images, ids), torch.randperm(len(ids))
        torch.testing.assert_close(fuser.score(images, ids[order]), scores[:, order], rtol=1e-4, atol=1e-4)
        padded = torch.nn.functional.pad(ids, (0, 9), value=PADDING)
        assert torch.equal(fuser.score(images, padded), scores)
        one_by_one = torch.cat([fuser.score(images, row[None]) for row in ids], dim=1)
        torch.testing.assert_close(one_by_one, scores, rtol=1e-4, atol=1e-4)
        monkeypatch.setattr("mmkit.tuning._CHUNK", 7)
        torch.testing.assert_close(fuser.score(images, ids), scores, rtol=1e-4, atol=1e-4)
        image_nodes, text_nodes = pool_nodes(fuser, features)
        torch.testing.assert_close(fuser.score_nodes(image_nodes, text_nodes), scores, rtol=1e-4, atol=1e-4)


def test_on_noise_the_fuser_is_at_chance(encoders):
    rng = np.random.default_rng(0)

    def noise(n):
        words = rng.integers(2000, 20000, (n, 4))
        texts = [" ".join(encoders.text.tokenizer.convert_ids_to_tokens(row.tolist())) for row in words]
        made = PairedFeatures.from_arrays(rng.standard_normal((n, 8)).astype(np.float32), np.zeros((n, 384)), range(n))
        return tokenized(made, texts, encoders.preprocessor)

    train, validation, test = noise(48), noise(8), noise(100)
    fuser = LoRATextFuser(towers(train.dims), encoders.text)
    history = fit(fuser, train, validation, epochs=3, batch_size=24, learning_rate=5e-3)
    assert history.rows[-1]["loss"] < history.rows[0]["loss"]  # it learns, by heart
    assert retrieval_report(fuser, test).text_to_image.r1 < 0.08


# --- training ----------------------------------------------------------------------------------


def test_only_the_adapters_and_the_fuser_are_trained(features, encoders, tmp_path):
    fuser = tuned(features, encoders, rank=4)
    before = encoders.text.digest()
    weights = {name: value.clone() for name, value in fuser.state_dict().items()}
    parts = subset(features, range(6)), subset(features, range(6, 8))
    settings = {"epochs": 2, "batch_size": 10, "learning_rate": 2e-3, "state": tmp_path / "run.state"}
    history = fit(fuser, *parts, **settings)
    torch.testing.assert_close(fuser.fuser.standardize_texts.mean, parts[0].captions().mean(dim=0))
    assert history.rows[1]["loss"] < history.rows[0]["loss"]
    assert encoders.text.digest() == before
    assert not any(parameter.requires_grad for parameter in encoders.text.parameters())
    for name, value in fuser.state_dict().items():
        trained = "lora_" in name or "project_" in name or "log_" in name or "threshold" in name
        assert trained or "standardize" in name or torch.equal(value, weights[name]), name
        assert not trained or not torch.equal(value, weights[name]), name
    adapters = 6 * 2 * 2 * 4 * 384  # layers, query and value, A and B, rank, width
    inner = sum(parameter.numel() for parameter in fuser.fuser.parameters())
    backbone = sum(parameter.numel() for parameter in encoders.text.parameters())
    assert fuser.parameter_counts == (adapters + inner, adapters + inner + backbone)
    state = settings["state"].stat().st_size  # now and at its best, with two moments of AdamW: no frozen weight
    assert 0 < state - 4 * 4 * (adapters + inner) < 200_000
    again = tuned(features, encoders, rank=4)
    assert fit(again, *parts, **settings) == history  # taken up from the state, which is that of the end
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in fuser.state_dict().items())


def test_every_trained_parameter_has_a_gradient(features, encoders):
    fuser = shake(tuned(features, encoders)).train()
    fuser.score(features.images([0, 1]), fuser.view(features).captions([0, 1, 9])).square().mean().backward()
    fuser.fuser.log_temperature.grad = torch.ones(())  # of the contrastive loss
    for name, parameter in fuser.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name


def test_reports_before_training_are_the_fusers_and_false_captions_are_judged_by_their_texts(exact, features, encoders):
    dataset, store = exact
    made = diagnostic_pairs(dataset, store.select(), encoders, ("object", "count"), precision="float32")
    negatives = {
        fact: (pairs, tokenized(false, pairs.texts, encoders.preprocessor)) for fact, (pairs, false) in made.items()
    }
    fuser = tuned(features, encoders)
    fuser.observe(features)
    expected, found = (diagnostic_report(each, features, negatives) for each in (fuser.fuser, fuser))
    assert found.keys() == {"object", "count"}
    for fact in found:
        assert found[fact].pairs == expected[fact].pairs
        assert found[fact].accuracy == pytest.approx(expected[fact].accuracy, abs=0.05)
        pairs, false = negatives[fact]
        assert torch.equal(
            fuser.view(false).captions().clamp(min=0), encoders.preprocessor.preprocess_text(pairs.texts)["input_ids"]
        )
    with pytest.raises(MmkitError, match="holds no token_ids"):
        diagnostic_report(fuser, features, made)
    thresholds = {"random": 0.0, "hard": 0.0}
    expected, found = (matching_report(each, features, thresholds) for each in (fuser.fuser, fuser))
    for kind in thresholds:
        assert found[kind].roc_auc == pytest.approx(expected[kind].roc_auc, abs=1e-3)
    expected, found = (retrieval_report(each, features) for each in (fuser.fuser, fuser))
    assert found.rsum == pytest.approx(expected.rsum, abs=10)  # ties by rounding


def test_false_captions_of_tokenized_features_come_with_their_own_ids(exact, features, encoders):
    dataset, _ = exact
    false = false_captions(dataset, features, encoders, ("roles", "relation"), precision="float32")
    fuser = tuned(features, encoders)
    ids, frozen = fuser.view(false.features).captions(), false.features.captions()
    with torch.inference_mode():
        torch.testing.assert_close(fuser.encode(ids), frozen, rtol=0, atol=1e-3)
    history = fit(fuser, features, features, epochs=1, batch_size=20, learning_rate=1e-3, false=false)
    assert history.rows[0]["contradiction"] > 0


# --- saving, errors ----------------------------------------------------------------------------


def test_a_saved_fuser_comes_back_with_its_scores(features, encoders, tmp_path, capsys):
    fuser = shake(tuned(features, encoders, rank=2, alpha=3, layers=("key", "query")))
    fuser.observe(features)
    fuser.save_pretrained(tmp_path / "kept")
    loaded = LoRATextFuser.from_pretrained(tmp_path / "kept", TwoTower, encoders.text)
    images, ids = features.images(), fuser.view(features).captions()
    with torch.inference_mode():
        assert torch.equal(loaded.score(images, ids), fuser.score(images, ids))
    assert loaded.parameter_counts == fuser.parameter_counts and not loaded.training
    assert sum(path.stat().st_size for path in (tmp_path / "kept").rglob("*") if path.is_file()) < 1e6
    assert capsys.readouterr().out == ""
    other = copy.deepcopy(encoders.text)
    next(other.backbone.parameters()).data[0] += 1
    with pytest.raises(
        MmkitError, match=r"other weights or another pooling .* Remedy: load_encoders\(text='minilm-l6'"
    ):
        LoRATextFuser.from_pretrained(tmp_path / "kept", TwoTower, other)
    with pytest.raises(MissingFile, match="holds no LoRATextFuser"):
        LoRATextFuser.from_pretrained(tmp_path, TwoTower, encoders.text)


def test_what_cannot_be_tuned_is_an_error_that_says_so(features, encoders):
    image_dim, text_dim = features.dims
    for fuser in (RegularizedCCA(image_dim, text_dim), CrossAttentionFuser(image_dim, text_dim, width=8)):
        with pytest.raises(MmkitError, match=rf"{type(fuser).__name__} is no fuser of vectors that takes gradient"):
            LoRATextFuser(fuser, encoders.text)
    with pytest.raises(MmkitError, match="keeps a bank of training vectors"):
        LoRATextFuser(MultimodalGNN(image_dim, text_dim, hidden_dim=8, heads=2, bank=4), encoders.text)
    with pytest.raises(MmkitError, match="LoRATextFuser is no fuser of vectors"):
        LoRATextFuser(tuned(features, encoders), encoders.text)
    with pytest.raises(MmkitError, match="takes texts of size 12; minilm-l6 gives 384"):
        LoRATextFuser(TwoTower(image_dim, 12), encoders.text)
    with pytest.raises(MmkitError, match=r"in the layers q_lin .* Remedy: name linear layers"):
        LoRATextFuser(towers(features.dims), encoders.text, layers=("q_lin",))
    with pytest.raises(MmkitError, match="rank 0"):
        LoRATextFuser(towers(features.dims), encoders.text, rank=0)
    with pytest.raises(MmkitError, match=r"token ids, .* torch.float32\. Remedy"):
        tuned(features, encoders).score(features.images(), features.captions())
