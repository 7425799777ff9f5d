"""What an encoder is: a frozen backbone, and how its features are pooled."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .errors import MmkitError
from .preprocess import MultimodalPreprocessor

Pooling = Literal["mean", "cls"]


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
    """Tokens `(B, T, D)`, whose padding has `mask` `(B, T)` 0 → one vector per text `(B, D)`.

    "mean" averages the hidden states of real tokens (the mask keeps padding out); "cls" takes the first token's.
    """
    if pooling == "cls":
        return tokens[:, 0]
    weight = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weight).sum(dim=1) / weight.sum(dim=1)


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
    """Pixels `(B, 3, S, S)`, as `transform` makes them, → `ImageOutput`.

    The backbone returns a feature map `(B, dim, H, W)`; S is 224 and the map 7 × 7 for most encoders.
    """

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
    """Token ids and mask, both `(B, T)` → `TextOutput`, whose tokens are pooled by "mean" or "cls" (see `pool`)."""

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
        return TextOutput(pool(tokens, mask, self.pooling), tokens, mask)


@dataclass(frozen=True)
class Encoders:
    """A frozen image encoder, a frozen text encoder, and the preprocessor that fits both."""

    image: ImageEncoder
    text: TextEncoder
    preprocessor: MultimodalPreprocessor
