"""The text encoder trained along with a fuser: low-rank adapters in a copy of it, and the token ids that it reads."""

import contextlib
import copy
import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .baselines import RegularizedCCA
from .data import CaptionDataset
from .encoders import TextEncoder, pool
from .errors import MissingFile, MmkitError
from .features import PADDING, PairedFeatures, cat_parts
from .fusers import PairFuser
from .preprocess import MultimodalPreprocessor

LAYERS = ("query", "value")
_TOKENIZED = 10_000  # captions whose ids are lists of Python at a time
_CHUNK = 64  # captions of nearly the same length that are encoded at a time


def token_ids(texts: Sequence[str], preprocessor: MultimodalPreprocessor) -> np.ndarray:
    """The ids of each text's tokens, cut at `max_tokens`, int32 `(len(texts), longest)`; behind the last, `PADDING`."""
    blocks = []
    for start in range(0, len(texts), _TOKENIZED):
        batch = preprocessor.preprocess_text(texts[start : start + _TOKENIZED])
        blocks.append(batch["input_ids"].masked_fill(batch["attention_mask"] == 0, PADDING).int())
    return cat_parts(blocks).numpy()


def tokenized(
    features: PairedFeatures, captions: CaptionDataset | Sequence[str], preprocessor: MultimodalPreprocessor
) -> PairedFeatures:
    """The same features with the token ids of their captions, as `with_token_ids` needs them.

    `captions` is the dataset that the store was extracted from, or the texts of all of the store's captions in its
    order, such as `negatives.texts` of `diagnostic_pairs`. An error if they do not fit.
    """
    texts = captions.captions if isinstance(captions, CaptionDataset) else captions
    rows, stored = features.caption_rows, len(features.sources["captions"])
    fits = len(texts) == stored
    if fits and isinstance(captions, CaptionDataset):
        images = np.asarray(captions.image_ids)[captions.caption_image[rows]]
        fits = np.array_equal(images, features.image_ids[features.owner])
    if not fits:
        raise MmkitError(
            f"These {len(texts):,} captions are not the {stored:,} of the features' store. Remedy: give the whole "
            "dataset that the features were extracted from."
        )
    ids = token_ids([texts[row] for row in rows], preprocessor)
    table = np.full((stored, ids.shape[1]), PADDING, dtype=ids.dtype)
    table[rows] = ids
    return replace(features, sources=features.sources | {"token_ids": table})


class LoRATextFuser(PairFuser):
    """A fuser of vectors that is trained together with low-rank adapters of the text encoder (Hu et al. 2022,
    section 4): texts are token ids `(M, T)`, as `PairedFeatures.with_token_ids` gives them.

    In a copy of the encoder's backbone each linear layer named in `layers` computes `Wx + alpha / rank · B·A·x`; W
    stays, A `(rank, in)` and B `(out, rank)` are trained, on inputs thinned by `dropout`. B starts at zero, so before
    training all scores are those of `fuser` on the encoder's vectors. All that comes after the text's vector is the
    `fuser`'s, which is trained in place; its standardisation is that of the vectors before training. In training the
    backbone's own dropout is at work too. `encoder` stays as it is.
    """

    def __init__(
        self,
        fuser: PairFuser,
        encoder: TextEncoder,
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        layers: Sequence[str] = LAYERS,
    ) -> None:
        from peft import LoraConfig, get_peft_model  # takes most of a second, and few need it

        banked = getattr(fuser, "bank", None) is not None
        if fuser.takes_parts or banked or isinstance(fuser, RegularizedCCA | LoRATextFuser):
            why = "keeps a bank of training vectors" if banked else "is no fuser of vectors that takes gradient steps"
            raise MmkitError(f"{type(fuser).__name__} {why}. Remedy: LoRATextFuser(TwoTower(…), encoders.text)")
        if fuser.text_dim != encoder.dim:
            raise MmkitError(f"The fuser takes texts of size {fuser.text_dim}; {encoder.name} gives {encoder.dim}.")
        super().__init__(fuser.image_dim, fuser.text_dim, fuser.width, 0.0, 0.0)
        self.fuser, self.transductive, self.fused_dim = fuser, fuser.transductive, fuser.fused_dim
        self.standardize_images, self.standardize_texts = fuser.standardize_images, fuser.standardize_texts
        self.log_temperature = fuser.log_temperature
        self.pooling, self.pad_id = encoder.pooling, encoder.tokenizer.pad_token_id
        self.encoder_facts = {"name": encoder.name, "pooling": encoder.pooling, "digest": encoder.digest()}
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(layers))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # peft calls a property of transformers by its old name
                self.backbone = get_peft_model(copy.deepcopy(encoder.backbone), config)
        except ValueError as error:
            raise MmkitError(
                f"{encoder.name} takes no adapters of rank {rank} in the layers {', '.join(layers)} ({error}). Remedy: "
                "name linear layers as encoder.backbone.named_modules() does."
            ) from None

    def build_head(self, dropout: float) -> None:
        """The head is the fuser's."""

    @property
    def whole_batch(self) -> bool:
        """As in the fuser: a text's vector does not depend on other texts."""
        return self.fuser.whole_batch

    @property
    def parameter_counts(self) -> tuple[int, int]:
        """How many parameters are trained, adapters and fuser together, and how many there are."""
        sizes = [(parameter.requires_grad, parameter.numel()) for parameter in self.parameters()]
        return sum(size for trained, size in sizes if trained), sum(size for _, size in sizes)

    def view(self, features: PairedFeatures) -> PairedFeatures:
        """The same pairs with token ids for captions. An error if they are not `tokenized`."""
        return features.with_token_ids()

    def observe(self, train: PairedFeatures) -> None:
        """What the fuser observes of the vectors before training."""
        self.fuser.observe(train.vectors())

    def check_sizes(self, images: Tensor, texts: Tensor) -> None:
        """Raise an error if the texts are no token ids; the fuser checks the images."""
        if texts.ndim != 2 or texts.is_floating_point():
            raise MmkitError(
                f"The fuser takes texts as token ids, (items, tokens), and these have shape {tuple(texts.shape)} and "
                f"are {texts.dtype}. Remedy: take fuser.view(tokenized(features, dataset, preprocessor))."
            )

    def encode(self, texts: Tensor) -> Tensor:
        """Token ids int64 `(M, T)` → vectors float32 `(M, text_dim)`, pooled as the encoder's.

        Captions are encoded in chunks of nearly the same length, so that little padding is computed.
        """
        order = (texts != PADDING).sum(dim=1).argsort(stable=True)
        vectors = []
        for rows in order.split(_CHUNK):
            ids = texts[rows]
            ids = ids[:, (ids != PADDING).any(dim=0)]
            mask = (ids != PADDING).long()
            ids = ids.masked_fill(ids == PADDING, self.pad_id)
            tokens = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            vectors.append(pool(tokens, mask, self.pooling))
        return torch.cat(vectors).index_select(0, order.argsort())

    def nodes(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Images `(N, image_dim)` and token ids `(M, T)` → the fuser's nodes of the images and the texts' vectors."""
        self.check_sizes(images, texts)
        return self.fuser.nodes(images, self.encode(texts))

    def similarities(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """The fuser's, `(N, M)`."""
        return self.fuser.similarities(image_nodes, text_nodes)

    def shortlist_scores(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """The fuser's, `(N, M)`."""
        return self.fuser.shortlist_scores(image_nodes, text_nodes)

    def fuse(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """The fuser's, `(B, fused_dim)`."""
        return self.fuser.fuse(image_nodes, text_nodes)

    def match(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """The fuser's, `(B,)`."""
        return self.fuser.match(image_nodes, text_nodes)

    def score_nodes(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """The fuser's, `(N, M)`."""
        return self.fuser.score_nodes(image_nodes, text_nodes)

    def save_pretrained(self, save_directory: str | Path, **settings: object) -> None:
        """Write the fuser and the adapters into folders of their own, and which encoder they are for; not its
        weights."""
        folder = Path(save_directory)
        self.fuser.save_pretrained(folder / "fuser", **settings)
        self.backbone.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
        (folder / "encoder.json").write_text(json.dumps(self.encoder_facts))

    @classmethod
    def from_pretrained(cls, folder: str | Path, kind: type[PairFuser], encoder: TextEncoder) -> "LoRATextFuser":
        """What `save_pretrained` wrote, in eval mode, with a fuser of this `kind` on the encoder that it was trained
        with. An error if the encoder's weights or pooling are others."""
        from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict

        folder = Path(folder)
        if not (folder / "encoder.json").is_file():
            raise MissingFile(f"{folder} holds no LoRATextFuser. Remedy: fuser.save_pretrained({str(folder)!r})")
        expected = json.loads((folder / "encoder.json").read_text())
        if (expected["pooling"], expected["digest"]) != (encoder.pooling, encoder.digest()):
            raise MmkitError(
                f"The adapters in {folder} are for other weights or another pooling than this {encoder.name}'s. "
                f"Remedy: load_encoders(text={expected['name']!r}, pooling={expected['pooling']!r}).text"
            )
        config = LoraConfig.from_pretrained(str(folder / "adapter"))
        with contextlib.redirect_stdout(io.StringIO()):  # the hub's mixin prints to standard output
            fuser = kind.from_pretrained(str(folder / "fuser"))
        loaded = cls(fuser, encoder, config.r, config.lora_alpha, config.lora_dropout, sorted(config.target_modules))
        set_peft_model_state_dict(loaded.backbone, load_peft_weights(str(folder / "adapter"), device="cpu"))
        return loaded.eval()
