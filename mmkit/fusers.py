"""The contract of every fuser, and the MLP fusers: system A's, and one with a gate."""

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from .features import PairedFeatures
from .support import MmkitError

TEMPERATURE = 0.07  # CLIP's start
PATHS = ("both", "product", "concatenation")
_SAMPLE = 20_000  # items that means and deviations are taken from
_BLOCK = 2**22  # activations of pairs held at a time: 16 MB stay near the processor's cache


def unit_scale(nodes: Tensor) -> Tensor:
    """Nodes `(N, width)` at length √width: unit scale per component, and products that sum to width · cosine."""
    return F.normalize(nodes, dim=-1) * nodes.shape[-1] ** 0.5


def cosines(left: Tensor, right: Tensor) -> Tensor:
    """Cosines `(N, M)` of all pairs of rows `(N, D)` and `(M, D)`."""
    return F.normalize(left, dim=-1) @ F.normalize(right, dim=-1).T


class Standardize(nn.Module):
    """`(x - mean) / deviation` per feature, the identity until `fit`: linear heads learn faster on even features."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.ones(dim))

    def fit(self, features: Tensor) -> None:
        """Take mean and deviation of `features` `(N, dim)`; constant features are only centred."""
        self.assign(features.mean(dim=0), features.std(dim=0, correction=0))

    def assign(self, mean: Tensor, deviation: Tensor) -> None:
        """Take a mean `(dim,)` and a deviation `(dim,)` that are known already."""
        self.mean.copy_(mean)
        self.deviation.copy_(torch.where(deviation > 1e-6, deviation, torch.ones_like(deviation)))

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.deviation


class PairFuser(nn.Module, PyTorchModelHubMixin, library_name="mmkit", license="mit"):
    """A fuser of image and text features. What its subclasses differ in is `nodes`.
    Two nodes are fused by system A's two paths, their product and their concatenation through Linear(2·width → width),
    ReLU and Dropout, or by the one that `paths` names. A linear match head makes a logit of the fused vector, at first
    cosine over temperature. `feature_dropout` drops input features in training (FuseMix, Vouitsis et al. 2024)."""

    transductive = False  # whether a pair's logit depends on the other members of the pool
    takes_parts = False  # whether an item is a stack of its parts, as `PairedFeatures.with_parts` gives it

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        if {"fuse", "match"} & vars(cls).keys() and "score_nodes" not in vars(cls) and not cls.takes_parts:
            cls.score_nodes = PairFuser.match_all  # a short cut of another class would score by another rule

    def __init__(self, image_dim: int, text_dim: int, width: int, dropout: float, feature_dropout: float,
                 paths: str = "both") -> None:  # fmt: skip
        super().__init__()
        if paths not in PATHS:
            raise MmkitError(f"No paths {paths!r}. Valid names: {', '.join(PATHS)}")
        self.image_dim, self.text_dim, self.width, self.paths = image_dim, text_dim, width, paths
        self.fused_dim = 2 * width if paths == "both" else width
        self.standardize_images, self.standardize_texts = Standardize(image_dim), Standardize(text_dim)
        self.feature_dropout = nn.Dropout(feature_dropout)
        self.build_head(dropout)
        self.log_temperature = nn.Parameter(torch.tensor(TEMPERATURE).log())  # of the contrastive loss

    def build_head(self, dropout: float) -> None:
        """Make the layers of `fuse`, `match` and `score_nodes`; of others `match_all` makes the score."""
        self.match_head = nn.Linear(self.fused_dim, 1)
        if self.paths != "product":
            self.concatenation = nn.Sequential(nn.Linear(2 * self.width, self.width), nn.ReLU(), nn.Dropout(dropout))
        if self.paths != "concatenation":
            self.match_head.weight.data.zero_()[0, : self.width] = 1 / (TEMPERATURE * self.width)  # of length √width

    def nodes(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """`(N, image_dim)`, `(M, text_dim)` → `(N, width)`, `(M, width)`."""
        raise NotImplementedError

    def fuse(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """Aligned nodes `(B, width)` twice → fused vectors `(B, fused_dim)`: product, then concatenation path."""
        fused = [image_nodes * text_nodes] if self.paths != "concatenation" else []
        if self.paths != "product":
            fused.append(self.concatenation(torch.cat([image_nodes, text_nodes], dim=-1)))
        return torch.cat(fused, dim=-1)

    def match(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """Aligned nodes → match logits `(B,)`."""
        return self.match_head(self.fuse(image_nodes, text_nodes)).squeeze(-1)

    def forward(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Aligned pairs `(B, image_dim)`, `(B, text_dim)` → fused vectors `(B, fused_dim)`."""
        if len(image_features) != len(text_features):
            raise MmkitError(f"{len(image_features)} images and {len(text_features)} texts are not aligned pairs.")
        return self.fuse(*self.nodes(image_features, text_features))

    def score(self, images: Tensor, texts: Tensor) -> Tensor:
        """Match logits of all pairs: `(N, image_dim)`, `(M, text_dim)` → `(N, M)`."""
        return self.score_nodes(*self.nodes(images, texts))

    def score_nodes(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """Nodes → the logits of `match` of all pairs `(N, M)`, none of them fused: `W[a; b] = W₁a + W₂b` splits."""
        if self.has_other_layers():
            return self.match_all(image_nodes, text_nodes)
        logits, head = self.match_head.bias, self.match_head.weight[0]
        if self.paths != "concatenation":
            logits = logits + (image_nodes * head[: self.width]) @ text_nodes.T
        if self.paths != "product":
            linear, joined = self.concatenation[0], head[-self.width :]
            image_part, text_part = linear.weight.split(self.width, dim=1)
            from_images = F.linear(image_nodes, image_part, linear.bias)
            logits = logits + sum_of_relu(from_images, F.linear(text_nodes, text_part), joined)
        return logits

    def has_other_layers(self) -> bool:
        """Whether layers have been replaced since `build_head`: `score_nodes` takes only the sums of its own apart."""
        layers = [type(layer) for layer in (self.match_head, *getattr(self, "concatenation", ()))]
        return layers not in ([nn.Linear], [nn.Linear, nn.Linear, nn.ReLU, nn.Dropout])

    def match_all(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """Nodes → the logits of all pairs `(N, M)` by `match` itself, a block of pairs at a time."""
        blocks = image_nodes.split(max(1, _BLOCK // max(1, text_nodes.numel())))
        pairs = ((block.repeat_interleave(len(text_nodes), 0), text_nodes.repeat(len(block), 1)) for block in blocks)
        return torch.cat([self.match(*pair) for pair in pairs]).view(len(image_nodes), len(text_nodes))

    def similarities(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """What the contrastive loss trains: the cosines of all nodes `(N, width)`, `(M, width)` → `(N, M)`."""
        return cosines(image_nodes, text_nodes)

    def shortlist_scores(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """What chooses the candidates that are worth a match: scores of all pairs `(N, M)` by one matrix product."""
        return self.similarities(image_nodes, text_nodes)

    def view(self, features: PairedFeatures) -> PairedFeatures:
        """The same pairs in the form that this fuser takes: vectors, or stacks of parts."""
        return features.with_parts() if self.takes_parts else features.vectors()

    def observe(self, train: PairedFeatures) -> None:
        """Take what the fuser needs to know of the training set before the first step: means and deviations."""
        self.check_sizes(train.images([0]), train.captions([0]))
        self.standardize_images.fit(train.vectors().images(torch.randperm(len(train))[:_SAMPLE]))
        self.standardize_texts.fit(train.vectors().captions(torch.randperm(len(train.image_index))[:_SAMPLE]))

    def check_sizes(self, images: Tensor, texts: Tensor) -> None:
        """Raise an error that names both sizes if the features are not of this fuser's."""
        axes, expected = 2 + self.takes_parts, (self.image_dim, self.text_dim)
        if not images.ndim == texts.ndim == axes or (images.shape[-1], texts.shape[-1]) != expected:
            form = "stacks of parts, (items, parts, size)," if self.takes_parts else "vectors, (items, size),"
            raise MmkitError(
                f"The fuser takes features of sizes {expected} as {form} and these have shapes {tuple(images.shape)} "
                f"and {tuple(texts.shape)}. Remedy: fuser.view(features) of its encoders, or build it for features.dims"
            )

    def prepare(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Features of both modalities, checked, standardised and, in training, thinned by dropout."""
        self.check_sizes(images, texts)
        images, texts = self.standardize_images(images), self.standardize_texts(texts)
        return self.feature_dropout(images), self.feature_dropout(texts)


def sum_of_relu(left: Tensor, right: Tensor, weight: Tensor) -> Tensor:
    """`Σₖ weightₖ · relu(leftᵢₖ + rightⱼₖ)` of all pairs: `(N, K)`, `(M, K)`, `(K,)` → `(N, M)`; no N·M·K numbers are
    held, for relu(z) = (z + |z|) / 2, and |z| sums to 1-norm distances, one for each sign of the weights."""
    left, right = left * weight, right * weight
    total = left.sum(dim=1)[:, None] + right.sum(dim=1)
    for kept, sign in ((weight > 0, 1), (weight < 0, -1)):
        total = total + sign * torch.cdist(left[:, kept], -right[:, kept], p=1.0)
    return total / 2


class MultimodalFeatureFuser(PairFuser):
    """System A: one linear projection per modality, fused by product and by concatenation.
    `normalize=True` brings nodes to one length, so that the product sums to the cosine; `False` is the article's."""

    def __init__(self, image_dim: int = 2048, text_dim: int = 768, fusion_dim: int = 1024, dropout: float = 0.3,
                 feature_dropout: float = 0.0, normalize: bool = True, paths: str = "both") -> None:  # fmt: skip
        super().__init__(image_dim, text_dim, fusion_dim, dropout, feature_dropout, paths)
        self.normalize = normalize
        self.project_images, self.project_texts = nn.Linear(image_dim, fusion_dim), nn.Linear(text_dim, fusion_dim)

    def nodes(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        images, texts = self.prepare(images, texts)
        image_nodes, text_nodes = self.project_images(images), self.project_texts(texts)
        return (unit_scale(image_nodes), unit_scale(text_nodes)) if self.normalize else (image_nodes, text_nodes)


class GatedFuser(MultimodalFeatureFuser):
    """System A with a gate that chooses, for each pair and each component, between the two paths.
    The gate, `g = sigmoid(W[a; b] + c)`, is the gated multimodal unit's (Arevalo et al. 2017, section 3), but mixes
    paths, `[g·product, (1 - g)·joined]`, where that mixes modalities."""

    def build_head(self, dropout: float) -> None:
        if self.paths != "both":
            raise MmkitError(f"A gate chooses between two paths; there is one, {self.paths!r}.")
        super().build_head(dropout)
        self.gate = nn.Linear(2 * self.width, self.width)
        nn.init.zeros_(self.gate.weight)  # half open for every pair: the logit starts as cosine over temperature
        nn.init.zeros_(self.gate.bias)
        self.match_head.weight.data.mul_(2)

    def gates(self, images: Tensor, texts: Tensor) -> Tensor:
        """Aligned pairs `(B, image_dim)`, `(B, text_dim)` → gates `(B, width)` in (0, 1); 1 opens the product path."""
        return self.gate(torch.cat(self.nodes(images, texts), dim=-1)).sigmoid()

    def fuse(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        gate = self.gate(torch.cat([image_nodes, text_nodes], dim=-1)).sigmoid()
        return super().fuse(image_nodes, text_nodes) * torch.cat([gate, 1 - gate], dim=-1)

    def score_nodes(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """As in `PairFuser`, but gated paths are neither bilinear nor split: the gates of a block of pairs are held."""
        if self.has_other_layers():
            return self.match_all(image_nodes, text_nodes)
        layers = (self.gate, self.concatenation[0])
        image_part, text_part = torch.cat([layer.weight for layer in layers]).split(self.width, dim=1)
        from_images = F.linear(image_nodes, image_part, torch.cat([layer.bias for layer in layers]))
        from_texts = F.linear(text_nodes, text_part)
        product, joined = self.match_head.weight[0].split(self.width)
        blocks, at_once = [], max(1, _BLOCK // max(1, from_texts.numel()))  # images that meet all texts in one block
        for nodes, block in zip((image_nodes * product).split(at_once), from_images.split(at_once), strict=True):
            gate, hidden = (block[:, None] + from_texts).split(self.width, dim=-1)
            gate = gate.sigmoid()
            blocks.append(((gate * text_nodes) @ nodes[:, :, None]).squeeze(-1) + ((1 - gate) * hidden.relu()) @ joined)
        return torch.cat(blocks) + self.match_head.bias
