"""The simple ways that a fuser has to beat: two linear towers, and canonical correlations in closed form."""

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from .errors import MmkitError
from .features import PairedFeatures
from .fusers import TEMPERATURE, PairFuser, Standardize, unit_scale

_CHUNK = 8192  # captions whose features are held at a time
_THRESHOLD = 0.3  # near where trained cosines part; from 0, a hundred small steps would not get there
_CALIBRATION = 5000  # captions that the two numbers scale and threshold are fitted on


class CosineFuser(PairFuser):
    """A fuser whose fused vector is the product of the nodes `(B, width)` and whose logit knows their cosine alone.

    The logit is `scale · (cosine - threshold)`, that is scale · cosine + bias with bias = -scale · threshold, both
    learned, so that the matching loss calibrates it; the scale is positive, so the ranking is that by cosine. It starts
    as cosine over temperature, less a constant. The score of a pair does not depend on the pool, and all pairs take one
    matrix product.
    """

    def build_head(self, dropout: float) -> None:
        """Scale and threshold; there is no path that `dropout` could thin."""
        self.fused_dim = self.width
        self.log_scale = nn.Parameter(-torch.tensor(TEMPERATURE).log())
        self.threshold = nn.Parameter(torch.tensor(_THRESHOLD))

    def fuse(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """Aligned nodes `(B, width)` twice → their product `(B, width)`."""
        return image_nodes * text_nodes

    def match(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """Aligned nodes → match logits `(B,)`."""
        return self._logit(self.fuse(image_nodes, text_nodes).sum(dim=-1))

    def score_nodes(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """Nodes `(N, width)`, `(M, width)` → match logits of all pairs `(N, M)`."""
        return self._logit(image_nodes @ text_nodes.T)

    def _logit(self, products: Tensor) -> Tensor:
        return self.log_scale.exp() * (products / self.width - self.threshold)  # nodes have length √width


class TwoTower(CosineFuser):
    """One linear map per modality, and the cosine of what comes out.

    Trained by the same loss as every fuser (CLIP, Radford et al. 2021, figure 3, on frozen features). Its training
    needs a large batch, whose other captions are the negatives.
    """

    def __init__(
        self, image_dim: int = 2048, text_dim: int = 768, width: int = 1024, feature_dropout: float = 0.0
    ) -> None:
        super().__init__(image_dim, text_dim, width, 0.0, feature_dropout)
        self.project_images, self.project_texts = nn.Linear(image_dim, width), nn.Linear(text_dim, width)

    def nodes(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """The projections of both modalities at length √width; one modality's do not depend on the other's."""
        images, texts = self.prepare(images, texts)
        return unit_scale(self.project_images(images)), unit_scale(self.project_texts(texts))


class RegularizedCCA(CosineFuser):
    """Canonical correlations (Hotelling 1936) with a ridge (Vinod 1976): no gradient step, `solve` finds the optimum.

    Each side's standardised features are whitened by `(C + regularization · mean eigenvalue · I)^(-1/2)`; the singular
    vectors of the whitened cross-covariance are pairs of axes, one of images and one of texts, and the singular values
    are how far a pair of axes agrees. The first `width` axes are kept, each weighted by its correlation to the `power`
    (Gong et al. 2014, section 3, weight by powers of the eigenvalues): axes that hardly agree should hardly count in
    the cosine. A `width` above the smaller dimension leaves the other axes zero.

    The correlations `(width,)`, from high to low, are kept in `correlations`. A larger `regularization` trusts the
    training pairs less: the fewer pairs for their dimensions, the larger it should be. On the validation split of the
    drawn scenes the sum of recalls is 582, 588, 590, 588, 572 at 0.1, 0.3, 1, 3, 10 with power 1; at regularization 1
    it is 581, 590, 590, 589 at the powers 0, 1, 2, 4, and the weights make the choice of `width` matter little.
    """

    def __init__(
        self,
        image_dim: int = 2048,
        text_dim: int = 768,
        width: int = 256,
        regularization: float = 1.0,
        power: float = 1.0,
    ) -> None:
        if regularization < 0 or power < 0:
            raise MmkitError(f"regularization {regularization} and power {power} must not be negative.")
        super().__init__(image_dim, text_dim, width, 0.0, 0.0)
        self.regularization, self.power = regularization, power
        self.register_buffer("image_axes", torch.zeros(image_dim, width))
        self.register_buffer("text_axes", torch.zeros(text_dim, width))
        self.register_buffer("correlations", torch.zeros(width))

    def nodes(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """The canonical coordinates of both modalities at length √width. An error before `solve`."""
        images, texts = self.prepare(images, texts)
        if not self.correlations.any():
            raise MmkitError("This CCA has no axes yet. Remedy: fuser.solve(train), or fit_profile(fuser, …)")
        return unit_scale(images @ self.image_axes), unit_scale(texts @ self.text_axes)

    @torch.no_grad()
    def solve(self, train: PairedFeatures, held_out: PairedFeatures | None = None, seed: int = 0) -> None:
        """Find the axes from all pairs of `train`, then scale and threshold of the logit.

        One pass in float64 over chunks of captions; memory is that of a chunk and of the covariances. Scale and
        threshold are a logistic regression on the cosines of pairs and as many random unmatched ones, drawn by `seed`,
        of `held_out`: the training pairs agree better than any others will, and stand in only where it is left out.
        """
        train, calibration = self.view(train), self.view(train if held_out is None else held_out)
        if any(len(part.owner.unique()) < 2 for part in (train, calibration)):
            raise MmkitError("Canonical correlations need captions of at least two images, to train and to calibrate.")
        self.check_sizes(train.images([0]), train.captions([0]))
        means, covariances = _moments(train)
        if not all(torch.isfinite(covariance).all() for covariance in covariances):
            raise MmkitError("The features hold NaN or infinity. Remedy: extract them again.")
        for standardize, mean, covariance in zip(self._standardizers, means, covariances, strict=False):
            standardize.assign(mean, covariance.diagonal().clamp(min=0).sqrt())
        image_scale, text_scale = (1 / standardize.deviation.double().cpu() for standardize in self._standardizers)
        images, texts, crossed = covariances
        whiten_images = _whitening(image_scale[:, None] * images * image_scale, self.regularization)
        whiten_texts = _whitening(text_scale[:, None] * texts * text_scale, self.regularization)
        crossed = whiten_images @ (image_scale[:, None] * crossed * text_scale) @ whiten_texts
        left, correlations, right = torch.linalg.svd(crossed, full_matrices=False)
        kept = min(self.width, len(correlations))
        correlations = correlations[:kept]
        if not correlations.any():
            raise MmkitError("The training features of a modality are all alike, so there is nothing to correlate.")
        for buffer, found in (
            (self.image_axes, whiten_images @ left[:, :kept] * correlations**self.power),
            (self.text_axes, whiten_texts @ right[:kept].T * correlations**self.power),
            (self.correlations, correlations),
        ):
            buffer.zero_()[..., :kept] = found.to(buffer)
        self._calibrate(calibration, seed)

    @property
    def _standardizers(self) -> tuple[Standardize, Standardize]:
        return self.standardize_images, self.standardize_texts

    def _calibrate(self, features: PairedFeatures, seed: int) -> None:
        """Fit scale and threshold on pairs and as many random unmatched ones of `features`."""
        generator, images = torch.Generator().manual_seed(seed), len(features.image_rows)
        captions = torch.randperm(len(features.owner), generator=generator)[:_CALIBRATION]
        owner = features.owner[captions]
        others = (owner + torch.randint(1, images, owner.shape, generator=generator)) % images
        both, device = torch.cat([owner, others]), self.image_axes.device
        image_nodes, text_nodes = self.nodes(features.images(both).to(device), features.captions(captions).to(device))
        cosines = (image_nodes * text_nodes.repeat(2, 1)).mean(dim=-1)  # nodes have length √width
        if not torch.isfinite(cosines).all():
            raise MmkitError("The features hold NaN or infinity. Remedy: extract them again.")
        labels = torch.arange(len(both)) < len(owner)
        regression = LogisticRegression(C=100).fit(cosines[:, None].cpu().double().numpy(), labels.numpy())
        scale = max(1e-3, float(regression.coef_[0, 0]))  # positive, even if it is noise that is calibrated
        self.threshold.fill_(-float(regression.intercept_[0]) / scale)
        self.log_scale.fill_(min(scale, 100.0)).log_()  # CLIP's bound
        self.log_temperature.copy_(-self.log_scale)  # what a contrastive loss is reported at


def _moments(features: PairedFeatures) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Means and covariances over all pairs, each image as often as it has captions, in float64.

    Returns the means of images and texts, and the covariances within images, within texts, and between the two.
    """
    order = features.owner.argsort(stable=True)  # the captions of an image come together, so it is read once
    shift_images = features.images(features.owner[order[:1]]).double()  # keeps large means out of the sums of squares
    shift_texts = features.captions(order[:1]).double()
    image_dim, text_dim = features.dims
    image_sum, text_sum = torch.zeros(image_dim).double(), torch.zeros(text_dim).double()
    within_images, within_texts, between = (
        torch.zeros(shape).double() for shape in ((image_dim, image_dim), (text_dim, text_dim), (image_dim, text_dim))
    )
    for captions in order.split(_CHUNK):
        rows, owner, counts = features.owner[captions].unique(return_inverse=True, return_counts=True)
        images = features.images(rows).double() - shift_images
        texts = features.captions(captions).double() - shift_texts
        texts_of_image = texts.new_zeros(len(rows), text_dim).index_add_(0, owner, texts)
        weighted = images * counts[:, None]
        image_sum += weighted.sum(dim=0)
        text_sum += texts.sum(dim=0)
        within_images.addmm_(images.T, weighted)
        within_texts.addmm_(texts.T, texts)
        between.addmm_(images.T, texts_of_image)
    n = len(order)
    image_mean, text_mean = image_sum / n, text_sum / n
    covariances = (
        within_images / n - image_mean[:, None] * image_mean,
        within_texts / n - text_mean[:, None] * text_mean,
        between / n - image_mean[:, None] * text_mean,
    )
    return (image_mean + shift_images[0], text_mean + shift_texts[0]), covariances


def _whitening(covariance: Tensor, regularization: float) -> Tensor:
    """`(C + regularization · mean eigenvalue · I)^(-1/2)` `(D, D)`; directions without any variance are left out."""
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=0) + regularization * values.mean()
    smallest = 1e-10 * values.max()  # less is the rounding of float32 features
    inverse_roots = torch.where(values > smallest, values.clamp(min=smallest).rsqrt(), 0)
    return vectors * inverse_roots @ vectors.T
