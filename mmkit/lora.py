"""The text encoder trained along with a fuser: low-rank adapters in a copy of it, and the token ids that it reads."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from .baselines import RegularizedCCA
from .data import CaptionDataset
from .encoders import TextEncoder, pool
from .features import PADDING, PairedFeatures, pad_cat
from .fusers import PairFuser
from .preprocess import MultimodalPreprocessor
from .support import MmkitError

_TOKENIZED = 10_000  # captions whose ids are lists of Python at a time
_CHUNK = 64  # captions of nearly the same length that are encoded at a time


def token_ids(texts: Sequence[str], preprocessor: MultimodalPreprocessor) -> np.ndarray:
    """The ids of each text's tokens, cut at `max_tokens`, int32 `(len(texts), longest)`; behind the last, `PADDING`."""
    batches = (preprocessor.preprocess_text(texts[at : at + _TOKENIZED]) for at in range(0, len(texts), _TOKENIZED))
    ids = [batch["input_ids"].masked_fill(batch["attention_mask"] == 0, PADDING).int() for batch in batches]
    return pad_cat(ids).numpy()


def tokenized(features: PairedFeatures, captions: CaptionDataset | Sequence[str],
              preprocessor: MultimodalPreprocessor) -> PairedFeatures:  # fmt: skip
    """The same features with the token ids of their captions, as `with_token_ids` needs them: of the dataset that they,
    or a larger selection, were extracted from, or of texts in their order. An error if they do not fit."""
    if isinstance(captions, CaptionDataset):
        captions = captions.of_features(features.image_ids.tolist(), features.image_index.numpy()).captions
    if len(captions) != (n := len(features.image_index)):
        raise MmkitError(f"These captions are not the {n:,} of the features. Remedy: give the dataset that they are of")
    return replace(features, token_ids=token_ids(captions, preprocessor))


class LoRATextFuser(PairFuser):
    """A fuser trained together with low-rank adapters of the text encoder (Hu et al. 2022, section 4); texts are token
    ids `(M, T)`. In a copy of the backbone the linear layers named in `layers` compute `Wx + 16 / rank · B·A·x`; A and
    B, which starts at zero, are trained, and `fuser` in place, which does all that comes after a text's vector."""

    def __init__(self, fuser: PairFuser, encoder: TextEncoder, rank: int = 8,
                 layers: Sequence[str] = ("query", "value")) -> None:  # fmt: skip
        from peft import LoraConfig, get_peft_model  # takes most of a second, and few need it

        if fuser.takes_parts or isinstance(fuser, RegularizedCCA | LoRATextFuser):
            raise MmkitError(f"{type(fuser).__name__} is no fuser of vectors that takes steps. Remedy: a TwoTower(…)")
        if fuser.text_dim != encoder.dim:
            raise MmkitError(f"The fuser takes texts of size {fuser.text_dim}; {encoder.name} gives {encoder.dim}.")
        super().__init__(fuser.image_dim, fuser.text_dim, fuser.width, 0.0, 0.0)
        self.fuser, self.log_temperature = fuser, fuser.log_temperature
        self.standardize_images, self.standardize_texts = fuser.standardize_images, fuser.standardize_texts
        self.pooling, self.pad_id = encoder.pooling, encoder.tokenizer.pad_token_id
        for name in ("transductive", "fused_dim", "fuse", "match", "score_nodes", "similarities", "shortlist_scores"):
            setattr(self, name, getattr(fuser, name))
        config = LoraConfig(r=rank, lora_alpha=16, target_modules=list(layers))
        try:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # peft uses an old name
                self.backbone = get_peft_model(copy.deepcopy(encoder.backbone), config)
        except ValueError as error:
            raise MmkitError(
                f"{encoder.name} takes no adapters of rank {rank} in the layers {', '.join(layers)} ({error}). Remedy: "
                "name linear layers as encoder.backbone.named_modules() does."
            ) from None

    def build_head(self, dropout: float) -> None:
        """The head is the fuser's, as is all that comes after the nodes."""

    def view(self, features: PairedFeatures) -> PairedFeatures:
        return features.with_token_ids()

    def observe(self, train: PairedFeatures) -> None:
        self.fuser.observe(train.vectors())

    def encode(self, texts: Tensor) -> Tensor:
        """Token ids int64 `(M, T)` → the encoder's vectors `(M, text_dim)`; those of about the same length together."""
        order, vectors = (texts != PADDING).sum(dim=1).argsort(stable=True), []
        for rows in order.split(_CHUNK):
            ids = texts[rows][:, (texts[rows] != PADDING).any(dim=0)]
            mask = (ids != PADDING).long()
            states = self.backbone(input_ids=ids.masked_fill(mask == 0, self.pad_id), attention_mask=mask)
            vectors.append(pool(states.last_hidden_state.float(), mask, self.pooling))
        return torch.cat(vectors).index_select(0, order.argsort())

    def nodes(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Images `(N, image_dim)` and token ids `(M, T)` → the fuser's nodes of the images and the texts' vectors."""
        if texts.ndim != 2 or texts.is_floating_point():
            raise MmkitError(f"Texts are token ids, (M, T), not {texts.ndim}-D {texts.dtype}. Remedy: tokenized(…)")
        return self.fuser.nodes(images, self.encode(texts))
