"""Fusers that look at the parts of one image and one caption: the cells of a feature map, the tokens of a text."""

from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import MmkitError
from .features import PairedFeatures
from .fusers import TEMPERATURE, PairFuser, Standardize, cosines, unit_scale

_THRESHOLD = 0.3  # cosines of trained pairs part near it; the match logit starts there
_SAMPLE = 500  # images whose cells, and four times as many captions whose tokens, are standardised by
_IMAGES, _CAPTIONS = 8, 512  # whose pairs are scored at a time: their attention stays near the processor's cache


def cell_positions(cells: int) -> Tensor:
    """The centres `(cells, 2)` of a square grid's cells, row by row: x to the right and y down, both in [-1, 1]."""
    side = isqrt(cells)
    if side**2 != cells:
        raise MmkitError(f"{cells} cells are no square grid. Remedy: take the encoder's own grid.")
    steps = torch.linspace(-1, 1, side) if side > 1 else torch.zeros(1)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)


class PartFuser(PairFuser):
    """A fuser of stacks: images `(N, 1 + cells, image_dim)` and texts `(M, 1 + T, text_dim)`, the pooled vector first.

    So are its nodes, `(N, 1 + cells, …)` and `(M, 1 + T, …)`. In both, rows of zeros are padding. The pooled
    vectors make a two-tower of their own, whose cosines (`shortlist_scores`) are cheap for all pairs; the parts
    meet in `match`.
    """

    takes_parts = True

    def __init__(self, image_dim: int, text_dim: int, width: int, dropout: float, feature_dropout: float) -> None:
        super().__init__(image_dim, text_dim, width, dropout, feature_dropout)
        self.standardize_cells, self.standardize_tokens = Standardize(image_dim), Standardize(text_dim)
        self.project_images, self.project_texts = nn.Linear(image_dim, width), nn.Linear(text_dim, width)
        self.project_cells, self.project_tokens = nn.Linear(image_dim, width), nn.Linear(text_dim, width)

    def observe(self, train: PairedFeatures) -> None:
        """Means and deviations of the pooled vectors, and those of the parts."""
        super().observe(train)
        cells = train.grids(torch.randperm(len(train.image_rows))[:_SAMPLE])
        tokens, mask = train.tokens(torch.randperm(len(train.owner))[: 4 * _SAMPLE])
        self.standardize_cells.fit(cells.flatten(0, 1))
        self.standardize_tokens.fit(tokens[mask.bool()])

    def prepare(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Stacks, checked, standardised and, in training, thinned by dropout, which drops a feature from all parts of
        an item (Tompson et al. 2015, section 3.2: neighbours would tell what one has lost); padding stays zero."""
        self.check_sizes(images, texts)
        prepared = []
        for stack, whole, parts in (
            (images, self.standardize_images, self.standardize_cells),
            (texts, self.standardize_texts, self.standardize_tokens),
        ):
            standardized = torch.cat([whole(stack[:, :1]), parts(stack[:, 1:])], dim=1)
            kept = self.feature_dropout(torch.ones_like(stack[:, :1]))
            prepared.append(standardized * kept * is_part(stack)[..., None])
        return prepared[0], prepared[1]

    def shortlist_scores(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """Cosines `(N, M)` of the pooled vectors, in a single matrix product."""
        return cosines(image_nodes[:, 0, : self.width], text_nodes[:, 0, : self.width])


def is_part(stack: Tensor) -> Tensor:
    """Which rows of stacks `(n, parts, D)` are not padding, bool `(n, parts)`."""
    return torch.linalg.vector_norm(stack.detach(), dim=-1) > 0  # a tenth of the time of (stack != 0).any(dim=-1)


class CrossAttentionFuser(PartFuser):
    """Cross-modal attention in both directions, then system A's two paths.

    Every token attends to the cells of the image, and every cell to the tokens of the caption, by scaled dot products
    with `heads` heads (Vaswani et al. 2017, section 3.2.2; co-attention as in ViLBERT, Lu et al. 2019, section 2.1).
    What the tokens have seen is averaged and added to the pooled image vector: the image as this caption looks at it;
    likewise the caption as this image looks at it. Padding is neither attended to nor averaged.

    A pair costs attention over cells · T, so large pools are scored through a shortlist.
    """

    def __init__(
        self,
        image_dim: int = 2048,
        text_dim: int = 768,
        width: int = 256,
        heads: int = 8,
        dropout: float = 0.3,
        feature_dropout: float = 0.0,
    ) -> None:
        if width % heads:
            raise MmkitError(f"width {width} is not a multiple of heads {heads}.")
        super().__init__(image_dim, text_dim, width, dropout, feature_dropout)
        self.heads = heads
        # queries, keys and values of each modality, in one layer
        self.from_cells, self.from_tokens = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.seen_by_tokens, self.seen_by_cells = nn.Linear(width, width), nn.Linear(width, width)

    def nodes(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """`(N, 1 + cells, 3·width)`, `(M, 1 + T, 3·width)`: of the pooled vector its projection and zeros, of a part
        its query, key and value."""
        stacks = self.prepare(images, texts)
        nodes = []
        for stack, whole, parts, layer in (
            (stacks[0], self.project_images, self.project_cells, self.from_cells),
            (stacks[1], self.project_texts, self.project_tokens, self.from_tokens),
        ):
            pooled = F.pad(unit_scale(whole(stack[:, :1])), (0, 2 * self.width))
            attending = layer(unit_scale(parts(stack[:, 1:]))) * is_part(stack[:, 1:])[..., None]
            nodes.append(torch.cat([pooled, attending], dim=1))
        return nodes[0], nodes[1]

    def similarities(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """The contrastive loss trains the pooled vectors: `(N, M)`."""
        return self.shortlist_scores(image_nodes, text_nodes)

    def _split(self, nodes: Tensor) -> tuple[Tensor, ...]:
        """Of nodes `(B, 1 + parts, 3·width)` the pooled vectors `(B, width)`, then query, key and value
        `(B, heads, parts, width / heads)` of the parts."""
        # in one step: the backward of a slice fills as much memory with zeros as the whole has
        pooled, parts = nodes.split([1, nodes.shape[1] - 1], dim=1)
        heads = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts.split(self.width, dim=-1))
        return pooled.squeeze(1)[:, : self.width], *heads

    def _weights(self, query: Tensor, key: Tensor, present: Tensor) -> Tensor:
        """Attention `(B, heads, queries, keys)`; none on padding, whose queries count nowhere."""
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        return scores.masked_fill(~present[:, None, None], -torch.inf).softmax(dim=-1)

    def fuse(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """Aligned nodes → fused vectors `(B, 2·width)` of the two vectors that have seen each other."""
        (images, image_query, image_key, image_value), (texts, text_query, text_key, text_value) = (
            self._split(nodes) for nodes in (image_nodes, text_nodes)
        )
        cells, tokens = is_part(image_nodes)[:, 1:], is_part(text_nodes)[:, 1:]
        seen_by_tokens = self._mean(self._weights(text_query, image_key, cells) @ image_value, tokens)
        seen_by_cells = self._mean(self._weights(image_query, text_key, tokens) @ text_value, cells)
        images = images + self.seen_by_tokens(seen_by_tokens)
        texts = texts + self.seen_by_cells(seen_by_cells)
        return super().fuse(unit_scale(images), unit_scale(texts))

    @staticmethod
    def _mean(seen: Tensor, present: Tensor) -> Tensor:
        """`(B, heads, queries, width / heads)` → the mean `(B, width)` over the queries that are parts."""
        share = present / present.sum(dim=1, keepdim=True).clamp(min=1)
        return (seen * share[:, None, :, None]).sum(dim=2).flatten(1)

    def attention(self, images: Tensor, texts: Tensor) -> Tensor:
        """Aligned stacks → how each token attends to the cells `(B, T, cells)`, the mean over the heads."""
        image_nodes, text_nodes = self.nodes(images, texts)
        query, key = self._split(text_nodes)[1], self._split(image_nodes)[2]
        return self._weights(query, key, is_part(image_nodes)[:, 1:]).mean(dim=1)

    def score_nodes(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """Match logits `(N, M)`, pair by pair in blocks: attention is not separable."""
        rows = []
        for image in image_nodes:
            blocks = text_nodes.split(_CAPTIONS)
            rows.append(torch.cat([self.match(image.expand(len(block), -1, -1), block) for block in blocks]))
        return torch.stack(rows) if rows else image_nodes.new_empty(0, len(text_nodes))


class RegionWordGNN(PartFuser):
    """The graph inside one pair: cells of the image and tokens of the caption are its nodes.

    1. One linear layer per modality maps cells and tokens to `width`, at unit length.
    2. Within the image, `layers` GCN layers (Kipf & Welling 2017, eq. 2) along the cosine edges of each cell to its
       `neighbours` nearest others, with a residual.
    3. Across, every token receives a message from the cells along edges of weight softmax(2·sharpness·cosine): not
       their features but what tells where and how large it is that the token names. The message is the expected
       position (x, y) of the cells, their variance along both axes, and the share of cells that the token fits.
    4. Within the caption, every token reads from the tokens at most `reach` before and after it the role that it plays:
       how each entry of its message counts, and with which sign ("left" of what?). It is a relational graph
       convolution (Schlichtkrull et al. 2018, eq. 2) whose relations are the signed distances along the sentence,
       that is a one-dimensional convolution. Role times message, summed over the tokens, tells whether the arrangement
       is as the caption says.
    5. A linear head adds to that the alignment, the mean over tokens of the largest cosine with a cell (Yao et al.
       2022, FILIP, section 3.1), and the cosine of the pooled vectors.

    Each node carries its place, the cell by its centre and the token by its distance to the others; otherwise left and
    right could not be told apart. The score of a pair does not depend on the pool.
    """

    MESSAGE = ("x", "y", "variance of x", "variance of y", "share")

    def __init__(
        self,
        image_dim: int = 2048,
        text_dim: int = 768,
        width: int = 128,
        layers: int = 1,
        neighbours: int = 5,
        reach: int = 4,
        feature_dropout: float = 0.3,
    ) -> None:
        super().__init__(image_dim, text_dim, width, 0.0, feature_dropout)
        self.neighbours = neighbours
        self.convolutions = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.role_input = nn.Linear(text_dim, width // 2)
        self.role = nn.Conv1d(width // 2, len(self.MESSAGE), 2 * reach + 1, padding=reach)
        self.log_sharpness = nn.Parameter(torch.tensor(10.0).log())
        self.fits_from = nn.Parameter(torch.tensor(_THRESHOLD))  # the cosine from which a cell counts as fitting

    def build_head(self, dropout: float) -> None:
        """A linear head over role times message, alignment and cosine; it starts as their sum over temperature."""
        self.fused_dim = len(self.MESSAGE) + 2
        self.match_head = nn.Linear(self.fused_dim, 1)
        with torch.no_grad():
            self.match_head.weight[0, :-2] = 1.0
            self.match_head.weight[0, -2:] = 0.5 / TEMPERATURE
            self.match_head.bias.fill_(-_THRESHOLD / TEMPERATURE)

    def nodes(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """`(N, 1 + cells, width)`; `(M, 1 + T, width + 5)`: of tokens also the role."""
        images, texts = self.prepare(images, texts)
        cells = self._convolve(F.normalize(self.project_cells(images[:, 1:]), dim=-1))
        cells = cells * is_part(images[:, 1:])[..., None]
        present = is_part(texts[:, 1:])[..., None]
        sentences = (self.role_input(texts[:, 1:]) * present).transpose(1, 2)  # beyond its ends a sentence is silent
        words = [F.normalize(self.project_tokens(texts[:, 1:]), dim=-1), self.role(sentences).transpose(1, 2)]
        words = torch.cat(words, dim=-1) * present
        whole = F.normalize(self.project_images(images[:, :1]), dim=-1)
        sentence = F.pad(F.normalize(self.project_texts(texts[:, :1]), dim=-1), (0, len(self.MESSAGE)))
        return torch.cat([whole, cells], dim=1), torch.cat([sentence, words], dim=1)

    def _convolve(self, cells: Tensor) -> Tensor:
        """GCN layers over the cosine graph of each image's cells `(N, cells, width)`; unit length again."""
        if not len(self.convolutions):
            return cells
        adjacency = normalized_adjacency(cells.detach(), self.neighbours)
        for convolution in self.convolutions:
            cells = cells + torch.relu(convolution(adjacency @ cells))
        return F.normalize(cells, dim=-1)

    def _split(self, text_nodes: Tensor) -> tuple[Tensor, Tensor]:
        return text_nodes[:, 1:].split([self.width, len(self.MESSAGE)], dim=-1)

    def _messages(self, cosine: Tensor, positions: Tensor) -> Tensor:
        """Cosines `(…, words, cells)` → what each word receives `(…, words, 5)`."""
        weight = (2 * self.log_sharpness.exp() * cosine).softmax(dim=-1)
        expected = weight @ torch.cat([positions, positions**2], dim=1)
        mean, square = expected.split(2, dim=-1)
        share = torch.sigmoid(self.log_sharpness.exp() * (cosine - self.fits_from)).mean(dim=-1, keepdim=True)
        return torch.cat([mean, square - mean**2, share], dim=-1)

    def fuse(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """Aligned nodes → fused vectors `(B, 7)`: role times message (5), alignment, cosine of the pooled vectors."""
        words, roles = self._split(text_nodes)
        cosine = words @ image_nodes[:, 1:].transpose(1, 2)
        arrangement = (roles * self._messages(cosine, cell_positions(cosine.shape[-1]).to(cosine))).sum(dim=1)
        count = is_part(words).sum(dim=1, keepdim=True).clamp(min=1)
        alignment = cosine.amax(dim=-1).sum(dim=1, keepdim=True) / count  # padding has cosine 0
        pooled = (image_nodes[:, 0] * text_nodes[:, 0, : self.width]).sum(dim=1, keepdim=True)
        return torch.cat([arrangement, alignment, pooled], dim=1)

    def similarities(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """What the contrastive loss trains: the mean of alignment and pooled cosine `(N, M)`, in [-1, 1]."""
        words, _ = self._split(text_nodes)
        present = is_part(words)
        cosine = image_nodes[:, 1:] @ words[present].T  # (N, cells, words of all captions)
        return (self._per_caption(cosine.amax(dim=1), present) + self.shortlist_scores(image_nodes, text_nodes)) / 2

    @staticmethod
    def _per_caption(values: Tensor, present: Tensor, mean: bool = True) -> Tensor:
        """Values `(N, S)` of the words of all captions, `present` `(M, T)` → their means or sums `(N, M)`."""
        count = present.sum(dim=1)
        caption = torch.arange(len(present), device=values.device).repeat_interleave(count)
        total = values.new_zeros(len(values), len(present)).index_add(1, caption, values)
        return total / count.clamp(min=1) if mean else total

    def score_nodes(self, image_nodes: Tensor, text_nodes: Tensor) -> Tensor:
        """Match logits `(N, M)`: as `match`, block by block over the words of all captions, without their padding."""
        head, positions = self.match_head.weight[0], cell_positions(image_nodes.shape[1] - 1).to(image_nodes)
        columns = [image_nodes.new_empty(len(image_nodes), 0)]
        for texts in text_nodes.split(_CAPTIONS):
            words, roles = self._split(texts)
            present = is_part(words)
            words, roles = words[present], roles[present] * head[:-2]
            rows = [image_nodes.new_empty(0, len(texts))]
            for images in image_nodes.split(_IMAGES):
                cosine = words @ images[:, 1:].transpose(1, 2)
                arrangement = (roles * self._messages(cosine, positions)).sum(dim=-1)
                logits = self._per_caption(arrangement, present, mean=False)
                logits = logits + head[-2] * self._per_caption(cosine.amax(dim=-1), present)
                rows.append(logits + head[-1] * self.shortlist_scores(images, texts))
            columns.append(torch.cat(rows))
        return torch.cat(columns, dim=1) + self.match_head.bias

    def attention(self, images: Tensor, texts: Tensor) -> Tensor:
        """Aligned stacks → the weights `(B, T, cells)` of the edges from the cells to each token."""
        image_nodes, text_nodes = self.nodes(images, texts)
        cosine = self._split(text_nodes)[0] @ image_nodes[:, 1:].transpose(1, 2)
        return (2 * self.log_sharpness.exp() * cosine).softmax(dim=-1)


def normalized_adjacency(nodes: Tensor, neighbours: int) -> Tensor:
    """`D^(-1/2) (A + I) D^(-1/2)` `(N, n, n)` of N small graphs of unit nodes `(N, n, D)`.

    A holds the cosines, not below zero, of each node with its `neighbours` nearest others, kept if either chose the
    other. Dense, because the graphs are small and equally large; equal to PyG's `GCNConv` on the same edges.
    """
    cosine = (nodes @ nodes.transpose(1, 2)).clamp(min=0)
    cosine = cosine.masked_fill(torch.eye(cosine.shape[-1], dtype=torch.bool, device=cosine.device), 0)
    smallest = cosine.topk(min(neighbours, cosine.shape[-1]), dim=-1).values[..., -1:]
    adjacency = torch.where((cosine >= smallest) | (cosine >= smallest.transpose(1, 2)), cosine, 0)
    adjacency = adjacency + torch.eye(cosine.shape[-1]).to(cosine)
    root = adjacency.sum(dim=-1).rsqrt()
    return root[:, :, None] * adjacency * root[:, None]
