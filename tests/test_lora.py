"""Adapters in the text encoder: token ids against the tokenizer, scores against the plain fuser's, what is trained."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import mmkit
from helpers import equal, settings, weights
from mmkit import CrossAttentionFuser, LoRATextFuser, MmkitError, PairedFeatures, RegularizedCCA, TwoTower, tokenized
from mmkit.features import PADDING


@pytest.fixture(scope="module")
def features(dataset, encoders, cache):
    vectors = mmkit.extract_features(dataset.select(range(8)), encoders, cache, "float32", dtype="float32")
    return tokenized(vectors, dataset, encoders.preprocessor)


def tuned(features, encoders, **changes):
    """Two towers with adapters, whose B is no longer zero, as after training."""
    torch.manual_seed(0)
    fuser = LoRATextFuser(TwoTower(*features.dims, 16), encoders.text, **changes).eval()
    for parameter in (parameter for name, parameter in fuser.named_parameters() if "lora_B" in name):
        torch.nn.init.normal_(parameter, std=0.05)
    return fuser


def test_captions_as_token_ids_are_those_of_the_dataset_in_any_order(dataset, features, encoders):
    rows, chosen = torch.tensor([7, 2, 0]), [5, 0, 7]
    texts, vectors = dataset.select(chosen).captions, replace(features, token_ids=None).select(chosen)
    batch = encoders.preprocessor.preprocess_text([texts[row] for row in rows])
    for captions in (None, dataset, texts):  # ids are selected, or made for a selection
        part = tokenized(vectors, captions, encoders.preprocessor) if captions else features.select(chosen)
        ids = part.with_token_ids().captions(rows)
        assert torch.equal(ids != PADDING, batch["attention_mask"].bool())  # no column of padding alone
        assert torch.equal(ids.clamp(min=0), batch["input_ids"])  # MiniLM pads with 0


def test_texts_are_cut_at_the_preprocessors_longest_and_pooled_as_the_encoders(dataset, encoders, monkeypatch):
    texts, encoder = dataset.captions[:4], encoders.text
    short = mmkit.MultimodalPreprocessor(tokenizer=encoder.tokenizer, max_tokens=6)
    ids = mmkit.lora.token_ids(texts, short)
    assert (ids.shape, ids.dtype, ids[1, -1]) == ((4, 6), np.int32, encoder.tokenizer.sep_token_id)
    monkeypatch.setattr(mmkit.lora, "_TOKENIZED", 1)
    assert np.array_equal(mmkit.lora.token_ids(texts, short), ids)
    cls = mmkit.TextEncoder("minilm-l6", encoder.backbone, 384, encoder.tokenizer, "cls")
    with torch.inference_mode():
        vectors = LoRATextFuser(TwoTower(8, 384, 16), cls).eval().encode(torch.from_numpy(ids).long())
    torch.testing.assert_close(vectors, cls(**short.preprocess_text(texts)).pooled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [TwoTower, mmkit.MultimodalFeatureFuser, mmkit.MultimodalGNN])
def test_before_training_all_scores_are_the_fusers_on_the_stored_vectors(kind, dataset, features, encoders, cache):
    inner = kind(*features.dims, 16).eval()
    inner.observe(features)
    fuser = LoRATextFuser(inner, encoders.text).eval()
    images, ids, vectors = features.images(), fuser.view(features).captions(), features.captions()
    with torch.inference_mode():
        torch.testing.assert_close(fuser.encode(ids), vectors, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fuser.score(images, ids), inner.score(images, vectors), rtol=1e-3, atol=1e-3)
    for name in ("transductive", "fused_dim", "fuse", "match", "similarities", "shortlist_scores"):
        assert getattr(fuser, name) == getattr(inner, name)
    made = mmkit.diagnostic_pairs(dataset, features, encoders, cache, ["object"], precision="float32")
    changed = {fact: (one, tokenized(false, one.texts, encoders.preprocessor)) for fact, (one, false) in made.items()}
    expected, judged = (mmkit.diagnostic_report(one, features, changed)["object"] for one in (inner, fuser))
    assert judged.accuracy == pytest.approx(expected.accuracy, abs=0.05)


def test_an_adapter_computes_what_the_paper_says_and_a_text_reads_itself_alone(features, encoders, monkeypatch):
    fuser, name = tuned(features, encoders, rank=4), "encoder.layer.3.attention.self.query"
    layer, base = (part.get_submodule(name) for part in (fuser.backbone.base_model.model, encoders.text.backbone))
    x, a, b = torch.randn(5, 384), layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(layer(x), base(x) + 16 / 4 * x @ a.T @ b.T, rtol=1e-4, atol=1e-4)
    images, ids = features.images(), fuser.view(features).captions()
    with torch.inference_mode():
        scores, order = fuser.score(images, ids), torch.randperm(len(ids))
        torch.testing.assert_close(fuser.score(images, ids[order]), scores[:, order], rtol=1e-4, atol=1e-4)
        assert torch.equal(fuser.score(images, torch.nn.functional.pad(ids, (0, 9), value=PADDING)), scores)
        monkeypatch.setattr(mmkit.lora, "_CHUNK", 1)
        torch.testing.assert_close(fuser.score(images, ids), scores, rtol=1e-4, atol=1e-4)


def test_on_noise_the_fuser_is_at_chance(encoders):
    def noise(n):
        made = PairedFeatures.from_arrays(torch.randn(n, 8), torch.zeros(n, 384), range(n))
        return replace(made, token_ids=torch.randint(2000, 20000, (n, 4)).numpy())

    fuser = tuned(noise(2), encoders)
    history = mmkit.fit(fuser, noise(48), noise(8), settings(epochs=3, batch_size=24))
    assert history.rows[-1]["loss"] < history.rows[0]["loss"]  # it learns, by heart
    assert mmkit.retrieval_report(fuser, noise(100)).text_to_image.r1 < 0.08


def test_only_the_adapters_and_the_fuser_are_trained_and_saved(features, encoders, tmp_path):
    fuser, digest = tuned(features, encoders, rank=4), encoders.text.digest()
    before, (train, validation) = weights(fuser), (features.select(range(6)), features.select(range(6, 8)))
    mmkit.fit(fuser, train, validation, settings(epochs=2, batch_size=10, learning_rate=2e-3))
    torch.testing.assert_close(fuser.fuser.standardize_texts.mean, train.captions().mean(dim=0))
    assert encoders.text.digest() == digest and not any(one.requires_grad for one in encoders.text.parameters())
    for name, value in fuser.state_dict().items():
        trained = any(part in name for part in ("lora_", "project_", "log_", "threshold"))
        assert "standardize" in name or torch.equal(value, before[name]) != trained, name
    adapters = 6 * 2 * 2 * 4 * 384  # layers, query and value, A and B, rank, width
    inner, backbone = (sum(part.numel() for part in one.parameters()) for one in (fuser.fuser, encoders.text.backbone))
    assert [sum(p.numel() for p in fuser.parameters() if p.requires_grad or frozen) for frozen in (False, True)] == [
        adapters + inner,
        adapters + inner + backbone,
    ]
    fuser.fuser.save_pretrained(tmp_path / "fuser")
    fuser.backbone.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors")) < 300_000
    loaded = LoRATextFuser(TwoTower.from_pretrained(str(tmp_path / "fuser")), encoders.text, rank=4).eval()
    loaded.backbone.load_adapter(str(tmp_path / "adapter"), "default")
    assert equal(weights(loaded), weights(fuser))


def test_what_cannot_be_tuned_is_an_error_that_says_so(dataset, features, encoders):
    fuser, preprocessor = tuned(features, encoders), encoders.preprocessor
    refused = {
        "takes texts of size 12; minilm-l6 gives 384": lambda: LoRATextFuser(TwoTower(8, 12), encoders.text),
        r"in the layers q_lin .* Remedy: name": lambda: tuned(features, encoders, layers=("q_lin",)),
        "of rank 0": lambda: tuned(features, encoders, rank=0),
        r"token ids, .* torch.float32\. Remedy": lambda: fuser.score(features.images(), features.captions()),
        r"hold no token_ids\. Remedy": lambda: fuser.view(replace(features, token_ids=None)),
        "2 images .* not in the dataset": lambda: tokenized(features, dataset.select(range(6)), preprocessor),
        r"not the 40 of the features": lambda: tokenized(features, dataset.captions[:39], preprocessor),
    }
    for kind in (RegularizedCCA(8, 384), CrossAttentionFuser(8, 384, 8), fuser):
        refused[f"{type(kind).__name__} is no fuser of vec"] = lambda kind=kind: LoRATextFuser(kind, encoders.text)
    for match, call in refused.items():
        with pytest.raises(MmkitError, match=match):
            call()
