"""The contract of every fuser, and the MLP fusers: system A's, and one with a gate."""

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from . import denormals  # noqa: F401  # for its effect
from .errors import MmkitError
from .features import PairedFeatures

# a block of pair activations that stays near the processor's cache: 2²² floats are 16 MB
_BLOCK = 2**22
TEMPERATURE = 0.07  # CLIP's start
PATHS = ("both", "product", "concatenation")
_SAMPLE = 20_000  # items that means and deviations are taken from


def unit_scale(nodes: Tensor) -> Tensor:
    """Nodes `(N, width)` at length √width: unit scale per component, and products that sum to width · cosine."""
    return F.normalize(nodes, dim=-1) * nodes.shape[-1] ** 0.5


def cosines(left: Tensor, right: Tensor) -> Tensor:
    """Cosines `(N, M)` of all pairs of rows `(N, D)` and `(M, D)`."""
    return F.normalize(left, dim=-1) @ F.normalize(right, dim=-1).T


def sum_of_relu(left: Tensor, right: Tensor, weight: Tensor) -> Tensor:
    """`Σₖ weightₖ · relu(leftᵢₖ + rightⱼₖ)` of all pairs: `(N, K)`, `(M, K)`, `(K,)` → `(N, M)`.

    Without N·M·K numbers in memory: relu(z) = (z + |z|) / 2, the first half is linear, and `Σ |leftᵢₖ + rightⱼₖ|` is
    the 1-norm distance of left and -right, which `torch.cdist` sums as it goes. Terms of negative weight take a
    distance of their own.
    """
    left, right = left * weight, right * weight
    total = left.sum(dim=1)[:, None] + right.sum(dim=1)
    for kept, sign in ((weight > 0, 1), (weight < 0, -1)):
        total = total + sign * torch.cdist(left[:, kept], -right[:, kept], p=1.0)
    return total / 2


def _rows_at_once(from_texts: Tensor) -> int:
    """How many images meet all texts in one block."""
    return max(1, _BLOCK // max(1, from_texts.numel()))


class Standardize(nn.Module):
    """`(x - mean) / deviation` per feature. The identity until `fit` has seen training features.

    Frozen encoders give features of very different scale; linear heads learn faster on even ones.
    """

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

    `nodes(images, texts)` maps `(N, image_dim)` and `(M, text_dim)` to `(N, width)` and `(M, width)`. Two nodes are
    fused by system A's two paths: their product, and their concatenation through Linear(2·width → width), ReLU
    and Dropout; both together are the fused vector, `fused_dim = 2·width`. A linear match head turns it into a
    logit; it starts as cosine over temperature, what the contrastive loss knows at first, and learns the rest.
    `paths` leaves one of the two out, to see what each is good for: "product" or "concatenation".
    `feature_dropout` drops input features in training, which small datasets need most (FuseMix, Vouitsis et al.
    2024, drops 0.6).

    `push_to_hub` sends weights and sizes alone; a checkpoint goes whole, with its card and thresholds, by
    `hf upload OWNER/NAME FOLDER`.

    `transductive` tells whether a pair's logit depends on the other members of the pool; `takes_parts` whether the
    fuser takes stacks of an item's parts, as `PairedFeatures.with_parts` gives them, for vectors.
    """

    transductive = False
    takes_parts = False

    def __init__(
        self, image_dim: int, text_dim: int, width: int, dropout: float, feature_dropout: float, paths: str = "both"
    ) -> None:
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
        """Make the layers that `fuse` and `match` need; a subclass that fuses otherwise replaces all three."""
        width = self.width
        self.match_head = nn.Linear(self.fused_dim, 1)
        if self.paths != "product":
            self.concatenation = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Dropout(dropout))
        if self.paths != "concatenation":
            with torch.no_grad():
                self.match_head.weight[0, :width].fill_(1 / (TEMPERATURE * width))  # nodes have length √width
                self.match_head.weight[0, width:].zero_()

    def view(self, features: PairedFeatures) -> PairedFeatures:
        """The same pairs in the form that this fuser takes: vectors, or stacks of parts."""
        return features.with_parts() if self.takes_parts else features.vectors()

    @property
    def whole_batch(self) -> bool:
        """Whether an item's nodes in training depend on the rest of its batch, so that processes cannot divide it."""
        return self.transductive

    def observe(self, train: PairedFeatures) -> None:
        """Take what the fuser needs to know of the training set before the first step: means and deviations."""
        self.check_sizes(train.images([0]), train.captions([0]))
        vectors = train.vectors()
        self.standardize_images.fit(vectors.images(torch.randperm(len(train.image_rows))[:_SAMPLE]))
        self.standardize_texts.fit(vectors.captions(torch.randperm(len(train.owner))[:_SAMPLE]))

    def nodes(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """`(N, image_dim)`, `(M, text_dim)` → `(N, width)`, `(M, width)`."""
        raise NotImplementedError

    def similarities(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """What the contrastive loss trains: the cosines of all nodes `(N, width)`, `(M, width)` → `(N, M)`."""
        return cosines(image_nodes, text_nodes)

    def shortlist_scores(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """What chooses the candidates that are worth a match: scores of all pairs `(N, M)` by one matrix product."""
        return self.similarities(image_nodes, text_nodes)

    def check_sizes(self, images: Tensor, texts: Tensor) -> None:
        """Raise an error that names both sizes if the features are not of this fuser's."""
        found, expected = (images.shape[-1], texts.shape[-1]), (self.image_dim, self.text_dim)
        axes = 2 + self.takes_parts
        if images.ndim != axes or texts.ndim != axes or found != expected:
            form = "stacks of parts, (items, parts, size)," if self.takes_parts else "vectors, (items, size),"
            raise MmkitError(
                f"The fuser takes image and text features of sizes {expected} as {form} and these have shapes "
                f"{tuple(images.shape)} and {tuple(texts.shape)}. Remedy: extract them with the fuser's encoders, "
                "take fuser.view(features), or build the fuser with image_dim and text_dim of the features."
            )

    def prepare(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Features of both modalities, checked, standardised and, in training, thinned by dropout."""
        self.check_sizes(images, texts)
        images, texts = self.standardize_images(images), self.standardize_texts(texts)
        return self.feature_dropout(images), self.feature_dropout(texts)

    def fuse(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """Aligned nodes `(B, width)` twice → fused vectors `(B, fused_dim)`: product, then concatenation path."""
        fused = []
        if self.paths != "concatenation":
            fused.append(image_nodes * text_nodes)
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
        """Match logits of all pairs: `(N, image_dim)`, `(M, text_dim)` → `(N, M)`.

        Equal to `match` on every pair, without fusing N·M pairs one by one: the product path is bilinear, and
        the first layer over a concatenation splits, `W[a; b] = W₁a + W₂b`, so each node is mapped once.
        """
        return self.score_nodes(*self.nodes(images, texts))

    def score_nodes(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """`score` for nodes that are computed already."""
        logits, head = self.match_head.bias, self.match_head.weight[0]
        if self.paths != "concatenation":
            logits = logits + (image_nodes * head[: self.width]) @ text_nodes.T
        if self.paths != "product":
            linear, joined = self.concatenation[0], head[-self.width :]
            image_part, text_part = linear.weight.split(self.width, dim=1)
            from_images = F.linear(image_nodes, image_part, linear.bias)
            logits = logits + sum_of_relu(from_images, F.linear(text_nodes, text_part), joined)
        return logits


class MultimodalFeatureFuser(PairFuser):
    """System A: one linear projection per modality, fused by product and by concatenation.

    `normalize=True` gives the projections unit length before they are fused, so that the sum of the product path is the
    cosine that the contrastive loss trains; `False` is the article's text to the letter.
    """

    def __init__(
        self,
        image_dim: int = 2048,
        text_dim: int = 768,
        fusion_dim: int = 1024,
        dropout: float = 0.3,
        feature_dropout: float = 0.0,
        normalize: bool = True,
        paths: str = "both",
    ) -> None:
        super().__init__(image_dim, text_dim, fusion_dim, dropout, feature_dropout, paths)
        self.normalize = normalize
        self.project_images = nn.Linear(image_dim, fusion_dim)
        self.project_texts = nn.Linear(text_dim, fusion_dim)

    def nodes(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """The projections of both modalities; one modality's do not depend on the other's."""
        images, texts = self.prepare(images, texts)
        image_nodes, text_nodes = self.project_images(images), self.project_texts(texts)
        if self.normalize:
            image_nodes, text_nodes = unit_scale(image_nodes), unit_scale(text_nodes)
        return image_nodes, text_nodes


class GatedFuser(MultimodalFeatureFuser):
    """System A with a gate that chooses, for each pair and each component, between the two paths.

    The gate is that of the gated multimodal unit (Arevalo et al. 2017, section 3), `g = sigmoid(W[a; b] + c)`. There
    it mixes the two modalities, `g·a + (1 - g)·b`; but a mean of an image and a text does not tell whether they agree,
    so here it mixes what does: the fused vector is `[g · product, (1 - g) · joined]`. A component that says nothing
    about this pair can be silenced, which the MLP fuser's one set of head weights for all pairs cannot do.
    """

    def build_head(self, dropout: float) -> None:
        """Add the gate, half open for every pair at first: the logit starts as cosine over temperature."""
        if self.paths != "both":
            raise MmkitError(f"A gate chooses between two paths; there is one, {self.paths!r}.")
        super().build_head(dropout)
        self.gate = nn.Linear(2 * self.width, self.width)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        with torch.no_grad():
            self.match_head.weight.mul_(2)

    def gates(self, images: Tensor, texts: Tensor) -> Tensor:
        """Aligned pairs `(B, image_dim)`, `(B, text_dim)` → gates `(B, width)` in (0, 1); 1 opens the product path."""
        return self._gate(*self.nodes(images, texts))

    def _gate(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        return self.gate(torch.cat([image_nodes, text_nodes], dim=-1)).sigmoid()

    def fuse(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """Aligned nodes `(B, width)` twice → `(B, 2·width)`: the product times the gate, the other path by the rest."""
        gate = self._gate(image_nodes, text_nodes)
        return super().fuse(image_nodes, text_nodes) * torch.cat([gate, 1 - gate], dim=-1)

    def score_nodes(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """As in `PairFuser`; the gate's layer splits as well, but a gated product is no longer bilinear and a gated
        path no sum of absolute values, so blocks of gates and hidden units are held."""
        layers = (self.gate, self.concatenation[0])
        image_part, text_part = torch.cat([layer.weight for layer in layers]).split(self.width, dim=1)
        from_images = F.linear(image_nodes, image_part, torch.cat([layer.bias for layer in layers]))
        from_texts = F.linear(text_nodes, text_part)
        product, joined = self.match_head.weight[0].split(self.width)
        rows, blocks = _rows_at_once(from_texts), []
        for nodes, block in zip((image_nodes * product).split(rows), from_images.split(rows), strict=True):
            gate, hidden = (block[:, None] + from_texts).split(self.width, dim=-1)
            gate, hidden = gate.sigmoid(), hidden.relu()
            agreement = ((gate * text_nodes) @ nodes[:, :, None]).squeeze(-1)
            blocks.append(agreement + ((1 - gate) * hidden) @ joined)
        return torch.cat(blocks) + self.match_head.bias
