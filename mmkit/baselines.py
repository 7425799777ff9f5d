"""What a fuser has to beat: two towers, canonical correlations in closed form, cosines corrected by their pool."""

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from .features import PairedFeatures
from .fusers import TEMPERATURE, MultimodalFeatureFuser, PairFuser, Standardize, unit_scale
from .support import MmkitError

_CHUNK = 8192  # captions whose features are held at a time
_CALIBRATION = 5000  # captions that scale and threshold are fitted on
_BLOCK_ROWS = 2048  # nodes whose products with all others are held at a time
_NOT_FINITE = "The features hold NaN or infinity. Remedy: extract them again."


class CosineFuser(PairFuser):
    """A fuser whose logit knows the nodes' cosine alone: `scale · (cosine - threshold)`, both learned.
    The scale is positive, so the ranking is that by cosine; all pairs take one matrix product."""

    def build_head(self, dropout: float) -> None:
        self.fused_dim = self.width
        self.log_scale = nn.Parameter(-torch.tensor(TEMPERATURE).log())
        self.threshold = nn.Parameter(torch.tensor(0.3))  # near where trained cosines part; steps are small

    def fuse(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        return image_nodes * text_nodes

    def match(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        cosines = self.fuse(image_nodes, text_nodes).sum(dim=-1) / self.width  # nodes have length √width
        return self.log_scale.exp() * (cosines - self.threshold)

    def score_nodes(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        return self.log_scale.exp() * (image_nodes @ text_nodes.T / self.width - self.threshold)


class TwoTower(CosineFuser):
    """One linear map per modality, and the cosine of what comes out.
    CLIP (Radford et al. 2021, figure 3) on frozen features; its negatives are the batch, which should be large."""

    nodes, normalize = MultimodalFeatureFuser.nodes, True

    def __init__(self, image_dim: int = 2048, text_dim: int = 768, width: int = 1024,
                 feature_dropout: float = 0.0) -> None:  # fmt: skip
        super().__init__(image_dim, text_dim, width, 0.0, feature_dropout)
        self.project_images, self.project_texts = nn.Linear(image_dim, width), nn.Linear(text_dim, width)


class RegularizedCCA(CosineFuser):
    """Canonical correlations (Hotelling 1936) with a ridge (Vinod 1976): no gradient step, `solve` finds the optimum.
    The singular vectors of the cross-covariance of whitened features are pairs of axes, and the singular values,
    `correlations` `(width,)` from high to low, are how far a pair agrees. Axes count by their correlation in the cosine
    (after Gong et al. 2014, section 3). The fewer training pairs, the larger `regularization` should be."""

    def __init__(self, image_dim: int = 2048, text_dim: int = 768, width: int = 256, regularization: float = 1) -> None:
        if regularization < 0:
            raise MmkitError(f"regularization is {regularization}; it must not be negative.")
        super().__init__(image_dim, text_dim, width, 0.0, 0.0)
        self.regularization = regularization
        self.register_buffer("image_axes", torch.zeros(image_dim, width))
        self.register_buffer("text_axes", torch.zeros(text_dim, width))
        self.register_buffer("correlations", torch.zeros(width))

    def nodes(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """The canonical coordinates of both modalities at length √width. An error before `solve`."""
        images, texts = self.prepare(images, texts)
        if not self.correlations.any():
            raise MmkitError("This CCA has no axes yet. Remedy: fuser.solve(train), or fit(fuser, …)")
        return unit_scale(images @ self.image_axes), unit_scale(texts @ self.text_axes)

    @torch.no_grad()
    def solve(self, train: PairedFeatures, held_out: PairedFeatures | None = None, seed: int = 0) -> None:
        """Find the axes from all pairs of `train`, then scale and threshold by a logistic regression on those of
        `held_out` and as many random unmatched ones, drawn by `seed`. `train`, which agrees too well, stands in."""
        train, calibration = self.view(train), self.view(train if held_out is None else held_out)
        if any(len(part.image_index.unique()) < 2 for part in (train, calibration)):
            raise MmkitError("Canonical correlations need captions of at least two images, to train and to calibrate.")
        self.check_sizes(train.images([0]), train.captions([0]))
        means, (images, texts, crossed) = _moments(train)
        if not all(torch.isfinite(covariance).all() for covariance in (images, texts, crossed)):
            raise MmkitError(_NOT_FINITE)
        image_scale, whiten_images = self._whitening(self.standardize_images, means[0], images)
        text_scale, whiten_texts = self._whitening(self.standardize_texts, means[1], texts)
        crossed = whiten_images @ (image_scale[:, None] * crossed * text_scale) @ whiten_texts
        left, correlations, right = torch.linalg.svd(crossed, full_matrices=False)
        correlations = correlations[: self.width]
        if not correlations.any():
            raise MmkitError("The training features of a modality are all alike, so there is nothing to correlate.")
        kept = len(correlations)
        axes = whiten_images @ left[:, :kept] * correlations, whiten_texts @ right[:kept].T * correlations
        for name, values in zip(("image_axes", "text_axes", "correlations"), (*axes, correlations), strict=True):
            self.get_buffer(name).zero_()[..., :kept] = values.to(self.image_axes)
        self._calibrate(calibration, seed)

    def _whitening(self, standardize: Standardize, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """The scale `(D,)` that standardises a side, and `(C + regularization · mean eigenvalue · I)^(-1/2)` `(D, D)`
        of the standardised; directions without any variance are left out."""
        standardize.assign(mean, covariance.diagonal().clamp(min=0).sqrt())
        scale = 1 / standardize.deviation.double().cpu()
        values, vectors = torch.linalg.eigh(scale[:, None] * covariance * scale)
        values = values.clamp(min=0) + self.regularization * values.mean()
        smallest = 1e-10 * values.max()  # less is the rounding of float32 features
        inverse_roots = torch.where(values > smallest, values.clamp(min=smallest).rsqrt(), 0)
        return scale, vectors * inverse_roots @ vectors.T

    def _calibrate(self, features: PairedFeatures, seed: int) -> None:
        generator, device = torch.Generator().manual_seed(seed), self.image_axes.device
        captions = torch.randperm(len(features.image_index), generator=generator)[:_CALIBRATION]
        images = features.image_index[captions]
        others = (images + torch.randint(1, len(features), images.shape, generator=generator)) % len(features)
        both = torch.cat([images, others])
        image_nodes, text_nodes = self.nodes(features.images(both).to(device), features.captions(captions).to(device))
        cosines = (image_nodes * text_nodes.repeat(2, 1)).mean(dim=-1)  # nodes have length √width
        if not torch.isfinite(cosines).all():
            raise MmkitError(_NOT_FINITE)
        labels = torch.arange(len(both)) < len(images)
        regression = LogisticRegression(C=100).fit(cosines[:, None].cpu().double().numpy(), labels.numpy())
        scale = max(1e-3, float(regression.coef_[0, 0]))  # positive, even if it is noise that is calibrated
        self.threshold.fill_(-float(regression.intercept_[0]) / scale)
        self.log_scale.fill_(min(scale, 100.0)).log_()  # CLIP's bound
        self.log_temperature.copy_(-self.log_scale)  # what a contrastive loss is reported at


def _moments(features: PairedFeatures) -> tuple[list[Tensor], list[Tensor]]:
    """Over all pairs, in float64: means of images and of texts, covariances within images, within texts and between."""
    order, dims = features.image_index.argsort(stable=True), features.dims  # by image, so that each is read once
    # one pair is subtracted first, which keeps large means out of the squares
    shifts = features.images(features.image_index[order[:1]]).double(), features.captions(order[:1]).double()
    sums = [torch.zeros(dim, dtype=torch.double) for dim in dims]
    products = {(i, j): torch.zeros(dims[i], dims[j], dtype=torch.double) for i, j in ((0, 0), (1, 1), (0, 1))}
    for captions in order.split(_CHUNK):
        rows, image_index, counts = features.image_index[captions].unique(return_inverse=True, return_counts=True)
        images, texts = features.images(rows).double() - shifts[0], features.captions(captions).double() - shifts[1]
        texts_of_image = texts.new_zeros(len(rows), dims[1]).index_add_(0, image_index, texts)
        weighted = images * counts[:, None]
        sums[0] += weighted.sum(dim=0)
        sums[1] += texts.sum(dim=0)
        factors = (images, weighted), (texts, texts), (images, texts_of_image)
        for product, (left, right) in zip(products.values(), factors, strict=True):
            product.addmm_(left.T, right)
    means = [total / len(order) for total in sums]
    covariances = [product / len(order) - torch.outer(means[i], means[j]) for (i, j), product in products.items()]
    return [mean + shift[0] for mean, shift in zip(means, shifts, strict=True)], covariances


class HubnessCorrected(PairFuser):
    """A trained fuser of cosines whose scores are corrected for hubs: items that are near to everything in the pool.
    CSLS is `2·cos(i, t) - r(i) - r(t)`, r the mean cosine of a node to its 10 nearest of the other modality (Conneau et
    al. 2018, section 2.3). Nothing is trained: the logit is the fuser's scale times this; its threshold depends on the
    size of the pool."""

    transductive = True

    def __init__(self, fuser: CosineFuser) -> None:
        if not isinstance(fuser, CosineFuser):
            raise MmkitError(f"{type(fuser).__name__} does not score by cosine. Remedy: correct a trained TwoTower(…)")
        super().__init__(fuser.image_dim, fuser.text_dim, fuser.width + 1, 0.0, 0.0)
        self.fuser, self.log_temperature = fuser, fuser.log_temperature
        self.standardize_images, self.standardize_texts = fuser.standardize_images, fuser.standardize_texts
        self._gain = 2 / fuser.width  # nodes have length √width

    def build_head(self, dropout: float) -> None:
        self.fused_dim = self.width

    def nodes(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """The fuser's nodes, and in a last column r: `(N, width)`, `(M, width)`."""
        image_nodes, text_nodes = self.fuser.nodes(images, texts)
        return self._with_offsets(image_nodes, text_nodes), self._with_offsets(text_nodes, image_nodes)

    def fuse(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """Aligned nodes `(B, width)` twice → what the corrected cosine is the sum of, `(B, width)`."""
        products = image_nodes[:, :-1] * text_nodes[:, :-1] * self._gain
        return torch.cat([products, -(image_nodes[:, -1:] + text_nodes[:, -1:])], dim=1)

    def match(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        return self.fuser.log_scale.exp() * self.fuse(image_nodes, text_nodes).sum(dim=1)

    def similarities(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """Nodes `(N, width)`, `(M, width)` → corrected cosines of all pairs `(N, M)`."""
        return image_nodes[:, :-1] @ text_nodes[:, :-1].T * self._gain - image_nodes[:, -1:] - text_nodes[:, -1]

    def score_nodes(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        return self.fuser.log_scale.exp() * self.similarities(image_nodes, text_nodes)

    def _with_offsets(self, nodes: Tensor, others: Tensor) -> Tensor:
        products, nearest = (block @ others.T for block in nodes.split(_BLOCK_ROWS)), min(10, len(others))
        means = torch.cat([block.topk(nearest, dim=1).values.mean(dim=1) for block in products])
        return torch.cat([nodes, means[:, None] / self.fuser.width], dim=1)
