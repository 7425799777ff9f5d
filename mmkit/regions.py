"""Fusers that look at the parts of one image and one caption: the cells of a feature map, the tokens of a text."""

from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .features import PairedFeatures
from .fusers import TEMPERATURE, PairFuser, Standardize, cosines, unit_scale
from .support import MmkitError

_THRESHOLD = 0.3  # cosines of trained pairs part near it; the match logit starts there
_MESSAGE = 5  # what a token receives from the cells: mean x, mean y, their variances, share of the cells that fit
_SAMPLE = 500  # images, and four times as many captions, whose parts give the means and deviations


def cell_positions(cells: int) -> Tensor:
    """The centres `(cells, 2)` of a square grid's cells, row by row: x to the right and y down, both in [-1, 1]."""
    side = isqrt(cells)
    if side**2 != cells:
        raise MmkitError(f"{cells} cells are no square grid. Remedy: take the encoder's own grid.")
    steps = torch.linspace(-1, 1, side) if side > 1 else torch.zeros(1)
    return torch.cartesian_prod(steps, steps).flip(1)


def is_part(stack: Tensor) -> Tensor:
    """Which rows of stacks `(…, parts, D)` are not padding, bool `(…, parts)`."""
    return torch.linalg.vector_norm(stack.detach(), dim=-1) > 0  # a tenth of the time of (stack != 0).any(dim=-1)


class PartFuser(PairFuser):
    """A fuser of stacks: images `(N, 1 + cells, image_dim)` and texts `(M, 1 + T, text_dim)`, the pooled vector first.
    So are its nodes; in both, rows of zeros at the end are padding. The parts meet in `fuse`, whose leading axes
    broadcast: nodes `(B, …)` and `(B, …)` are aligned pairs, `(N, 1, …)` and `(M, …)` all pairs."""

    takes_parts = True
    block = 8, 512  # images and captions whose pairs are scored at a time, so that they stay near the processor's cache

    def __init__(self, image_dim: int, text_dim: int, width: int, dropout: float, feature_dropout: float) -> None:
        super().__init__(image_dim, text_dim, width, dropout, feature_dropout)
        self.standardize_cells, self.standardize_tokens = Standardize(image_dim), Standardize(text_dim)
        self.project_images, self.project_texts = nn.Linear(image_dim, width), nn.Linear(text_dim, width)
        self.project_cells, self.project_tokens = nn.Linear(image_dim, width), nn.Linear(text_dim, width)

    def observe(self, train: PairedFeatures) -> None:
        super().observe(train)
        self.standardize_cells.fit(train.grids(torch.randperm(len(train))[:_SAMPLE]).flatten(0, 1))
        tokens, mask = train.tokens(torch.randperm(len(train.image_index))[: 4 * _SAMPLE])
        self.standardize_tokens.fit(tokens[mask.bool()])

    def prepare(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Stacks, checked, standardised and thinned by dropout, of all parts of an item alike (Tompson et al. 2015)."""
        self.check_sizes(images, texts)
        images = self._prepare(images, self.standardize_images, self.standardize_cells)
        return images, self._prepare(texts, self.standardize_texts, self.standardize_tokens)

    def _prepare(self, stack: Tensor, whole: Standardize, parts: Standardize) -> Tensor:
        standardized = torch.cat([whole(stack[:, :1]), parts(stack[:, 1:])], dim=1)
        return standardized * self.feature_dropout(torch.ones_like(stack[:, :1])) * is_part(stack)[..., None]

    def shortlist_scores(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        return cosines(image_nodes[:, 0, : self.width], text_nodes[:, 0, : self.width])

    def score_nodes(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """Match logits `(N, M)` in blocks; of many captions, each block takes some of like length, without padding."""
        images_at_once, texts_at_once = self.block
        if len(text_nodes) > texts_at_once:
            length = is_part(text_nodes).sum(dim=1)
            order = length.argsort()
            blocks = [text_nodes[rows, : int(length[rows].max())] for rows in order.split(texts_at_once)]
            return torch.cat([self.score_nodes(image_nodes, texts) for texts in blocks], dim=1)[:, order.argsort()]
        return torch.cat([self.match(images[:, None], text_nodes) for images in image_nodes.split(images_at_once)])


class CrossAttentionFuser(PartFuser):
    """Cross-modal attention in both directions, then system A's two paths.
    Tokens attend to cells and cells to tokens, with `heads` heads (Vaswani et al. 2017, section 3.2.2; ViLBERT, Lu et
    al. 2019, section 2.1). To a pooled vector is added the mean of what the other's parts have seen."""

    block = 8, 64
    similarities = PartFuser.shortlist_scores  # the contrastive loss trains the pooled vectors

    def __init__(self, image_dim: int = 2048, text_dim: int = 768, width: int = 256, heads: int = 8,
                 dropout: float = 0.3, feature_dropout: float = 0.0) -> None:  # fmt: skip
        if width % heads:
            raise MmkitError(f"width {width} is not a multiple of heads {heads}. Remedy: change one of them")
        super().__init__(image_dim, text_dim, width, dropout, feature_dropout)
        self.heads = heads  # each modality's queries, keys and values come from one layer
        self.from_cells, self.from_tokens = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.seen_by_tokens, self.seen_by_cells = nn.Linear(width, width), nn.Linear(width, width)

    def nodes(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """`(N, 1 + cells, 3·width)`, `(M, 1 + T, 3·width)`: first the pooled vectors, of parts query, key and value."""
        images, texts = self.prepare(images, texts)
        image_nodes = self._nodes(images, self.project_images, self.project_cells, self.from_cells)
        return image_nodes, self._nodes(texts, self.project_texts, self.project_tokens, self.from_tokens)

    def _nodes(self, stack: Tensor, whole: nn.Linear, parts: nn.Linear, attend: nn.Linear) -> Tensor:
        pooled = F.pad(unit_scale(whole(stack[:, :1])), (0, 2 * self.width))
        attending = attend(unit_scale(parts(stack[:, 1:]))) * is_part(stack[:, 1:])[..., None]
        return torch.cat([pooled, attending], dim=1)

    def _split(self, nodes: Tensor) -> tuple[Tensor, ...]:
        """The pooled vectors `(…, width)`, query, key and value `(…, heads, parts, width / heads)`, and `is_part`."""
        # no slices: the backward of each fills as much memory with zeros as the whole has
        pooled, parts = nodes.split([1, nodes.shape[-2] - 1], dim=-2)
        heads = (part.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for part in parts.split(self.width, dim=-1))
        return pooled.squeeze(-2)[..., : self.width], *heads, is_part(parts)

    def fuse(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """Nodes of pairs → fused vectors `(…, 2·width)` of the two vectors that have seen each other."""
        image, text = self._split(image_nodes), self._split(text_nodes)
        images = image[0] + self.seen_by_tokens(self._seen(text, image))
        texts = text[0] + self.seen_by_cells(self._seen(image, text))
        return super().fuse(unit_scale(images), unit_scale(texts))

    def _seen(self, seers: tuple[Tensor, ...], seen: tuple[Tensor, ...]) -> Tensor:
        """What the seers that are no padding have seen on the mean `(…, width)`: values by the mean of weights."""
        (_, query, _, _, queries), (_, _, key, value, keys) = seers, seen
        share = queries / queries.sum(dim=-1, keepdim=True).clamp(min=1)
        weights = torch.einsum("...q,...hqk->...hk", share, self._weights(query, key, keys))
        return torch.einsum("...hk,...hkd->...hd", weights, value).flatten(-2)

    def _weights(self, query: Tensor, key: Tensor, keys: Tensor) -> Tensor:
        """Attention `(…, heads, queries, keys)`, none of it on padding."""
        scores = torch.einsum("...qd,...kd->...qk", query, key) / query.shape[-1] ** 0.5
        return scores.masked_fill(~keys[..., None, None, :], -torch.inf).softmax(dim=-1)

    def attention(self, images: Tensor, texts: Tensor) -> Tensor:
        """Aligned stacks → how each token attends to the cells `(B, T, cells)`, the mean over the heads."""
        image_nodes, text_nodes = self.nodes(images, texts)
        query, (_, _, key, _, cells) = self._split(text_nodes)[1], self._split(image_nodes)
        return self._weights(query, key, cells).mean(dim=1)


class RegionWordGNN(PartFuser):
    """The graph inside one pair: cells of the image and tokens of the caption are its nodes, at unit length.
    1. `layers` GCN layers (Kipf & Welling 2017, eq. 2) join each cell to its `neighbours` nearest by cosine.
    2. A token receives from the cells, by softmax(2·sharpness·cosine), where and how large it is that it names.
    3. It reads its role, the weight of each entry of that message, from the tokens within `reach`, by a relational
       graph convolution (Schlichtkrull et al. 2018, eq. 2) over signed distances along the sentence.
    Who stands where is learnt from 2 and 3, with `layers=0` as well; without `positions` it is not."""

    def __init__(self, image_dim: int = 2048, text_dim: int = 768, width: int = 128, layers: int = 1,
                 neighbours: int = 5, reach: int = 4, feature_dropout: float = 0.3,
                 positions: bool = True) -> None:  # fmt: skip
        super().__init__(image_dim, text_dim, width, 0.0, feature_dropout)
        self.neighbours, self.positions = neighbours, positions
        self.convolutions = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.role_input = nn.Linear(text_dim, width // 2)
        self.role = nn.Conv1d(width // 2, _MESSAGE, 2 * reach + 1, padding=reach)
        self.log_sharpness = nn.Parameter(torch.tensor(10.0).log())
        self.fits_from = nn.Parameter(torch.tensor(_THRESHOLD))  # the cosine from which a cell counts as fitting

    def build_head(self, dropout: float) -> None:
        """Over role times message, alignment (FILIP, Yao et al. 2022, section 3.1) and cosine, at first their sum."""
        self.fused_dim = _MESSAGE + 2
        self.match_head = nn.Linear(self.fused_dim, 1)
        self.match_head.weight.data.copy_(torch.tensor([1.0] * _MESSAGE + [0.5 / TEMPERATURE] * 2))
        self.match_head.bias.data.fill_(-_THRESHOLD / TEMPERATURE)

    def nodes(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """`(N, 1 + cells, width)`; `(M, 1 + T, width + 5)`: of tokens also the role."""
        images, texts = self.prepare(images, texts)
        tokens, is_cell, is_token = texts[:, 1:], is_part(images[:, 1:])[..., None], is_part(texts[:, 1:])[..., None]
        cells = F.normalize(self.project_cells(images[:, 1:]), dim=-1)
        adjacency = normalized_adjacency(cells.detach(), self.neighbours)
        for convolution in self.convolutions:
            cells = cells + torch.relu(convolution(adjacency @ cells))
        roles = self.role((self.role_input(tokens) * is_token).mT).mT  # beyond its ends a sentence is silent
        words = torch.cat([F.normalize(self.project_tokens(tokens), dim=-1), roles], dim=-1)
        image = F.normalize(self.project_images(images[:, :1]), dim=-1)
        sentence = F.pad(F.normalize(self.project_texts(texts[:, :1]), dim=-1), (0, _MESSAGE))
        cells = F.normalize(cells, dim=-1) * is_cell
        return torch.cat([image, cells], dim=1), torch.cat([sentence, words * is_token], dim=1)

    def messages(self, cosine: Tensor) -> Tensor:
        """Cosines `(…, T, cells)` → what each token receives `(…, T, 5)`: mean x and y, their variances, share."""
        positions, sharpness = cell_positions(cosine.shape[-1]).to(cosine), self.log_sharpness.exp()
        expected = (2 * sharpness * cosine).softmax(dim=-1) @ torch.cat([positions, positions**2], dim=1)
        mean, square = expected.split(2, dim=-1)
        share = torch.sigmoid(sharpness * (cosine - self.fits_from)).mean(dim=-1, keepdim=True)
        places = torch.cat([mean, square - mean**2], dim=-1) * self.positions
        return torch.cat([places, share], dim=-1)

    def fuse(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """Nodes of pairs → fused vectors `(…, 7)`: role times message (5), alignment, cosine of the pooled vectors."""
        cosine = torch.einsum("...td,...cd->...tc", text_nodes[..., 1:, : self.width], image_nodes[..., 1:, :])
        arrangement = (text_nodes[..., 1:, self.width :] * self.messages(cosine)).sum(dim=-2)
        alignment = cosine.amax(dim=-1).sum(dim=-1) / is_part(text_nodes[..., 1:, :]).sum(dim=-1).clamp(min=1)
        pooled = torch.einsum("...d,...d->...", image_nodes[..., 0, :], text_nodes[..., 0, : self.width])
        return torch.cat([arrangement, torch.stack([alignment, pooled], dim=-1)], dim=-1)

    def similarities(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """What the contrastive loss trains: the mean of alignment and pooled cosine `(N, M)`, in [-1, 1]."""
        present = is_part(text_nodes[:, 1:])
        words = text_nodes[:, 1:, : self.width][present]  # of all captions, without the padding between them
        largest = (image_nodes[:, 1:] @ words.T).amax(dim=1)
        largest = largest.new_zeros(len(image_nodes), *present.shape).masked_scatter(present, largest)
        alignment = largest.sum(dim=-1) / present.sum(dim=1).clamp(min=1)
        return (alignment + self.shortlist_scores(image_nodes, text_nodes)) / 2


def normalized_adjacency(nodes: Tensor, neighbours: int) -> Tensor:
    """`D^(-1/2) (A + I) D^(-1/2)` `(N, n, n)`, as in PyG's `GCNConv`, of graphs of unit nodes `(N, n, D)`. A holds
    the cosines, not below 0, of each node with its `neighbours` nearest others, if either chose the other."""
    cosine = (nodes @ nodes.mT).clamp(min=0)
    cosine.diagonal(dim1=1, dim2=2).zero_()
    smallest = cosine.topk(min(neighbours, cosine.shape[-1]), dim=-1).values[..., -1:]
    adjacency = torch.where((cosine >= smallest) | (cosine >= smallest.mT), cosine, 0)
    adjacency.diagonal(dim1=1, dim2=2).add_(1)
    root = adjacency.sum(dim=-1).rsqrt()
    return root[:, :, None] * adjacency * root[:, None]
