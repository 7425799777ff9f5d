"""Batches of pairs, in an order that can be taken up again, and how the processes of one job share them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather, pad_across_processes, reduce
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from .errors import MmkitError
from .features import FalseCaptions, PairedFeatures, cat_parts


@dataclass(frozen=True)
class Share:
    """What process `index` of `count` does of a batch that all of them work on: a run of its items.

    Of fewer items than processes each does all. Losses are averaged over the processes, as gradients are (Li et al.
    2020, PyTorch Distributed, section 3); a mean over the own items, times `weight`, then becomes the mean over all.
    """

    index: int = 0
    count: int = 1

    def of(self, total: int) -> slice:
        """The own items among `total`."""
        if total < self.count:
            return slice(0, total)
        return slice(self.index * total // self.count, (self.index + 1) * total // self.count)

    def weight(self, total: int) -> float:
        """The number of the own items among `total`, over the mean number of a process."""
        own = self.of(total)
        return 1.0 if total < self.count else self.count * (own.stop - own.start) / total

    def gather(self, own: Tensor, total: int) -> Tensor:
        """The own rows of all processes, one after the other: `(total, …)`. Gradients flow back to their process.

        Stacks `(n, parts, D)` get rows of zeros up to the longest of any process.
        """
        if self.count == 1 or total < self.count:
            return own
        if own.ndim == 3:
            own = pad_across_processes(own, dim=1)
        most = -(-total // self.count)
        blocks = _Gather.apply(F.pad(own, [0, 0] * (own.ndim - 1) + [0, most - len(own)])).split(most)
        shares = [Share(index, self.count).of(total) for index in range(self.count)]
        return torch.cat([block[: own.stop - own.start] for block, own in zip(blocks, shares, strict=True)])

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes, the same on all of them; without gradients."""
        return values if self.count == 1 else reduce(values, "mean")

    @contextmanager
    def own_randomness(self) -> Iterator[None]:
        """Inside, each process draws other numbers (dropout); what all draw alike goes on as if there had been none."""
        if self.count == 1:
            yield
            return
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            torch.manual_seed(int(torch.randint(2**62, ())) + self.index)
            yield


ALONE = Share()


class _Gather(torch.autograd.Function):
    """Blocks of the same shape from all processes; the gradient of a block is the sum of what all found for it."""

    @staticmethod
    def forward(ctx, own: Tensor) -> Tensor:
        ctx.rows = len(own)
        return gather(own)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return reduce(gradient, "sum").split(ctx.rows)[PartialState().process_index]


class Batch(NamedTuple):
    """`images` `(U, image_dim)`, each image once; `texts` `(B + 2·F, text_dim)`: B captions, F false ones, and the F
    true ones that those were made from; `owner` `(B,)`, the row in `images` of each caption's image, and `denied`
    `(F,)`, that of each false caption's. Images and texts are stacks where the fuser takes parts;
    texts are token ids `(…, T)` where it encodes them.

    Where processes share the batch, `images` and `texts` are the own ones; `owner` and `denied` are those of all.
    """

    images: Tensor
    texts: Tensor
    owner: Tensor
    denied: Tensor


class PairBatches(Dataset):
    """One item per caption, read a whole batch at a time; each image of a batch brings one of its `false` captions,
    drawn evenly, if it has any. Of a batch only this process's `share` is read."""

    def __init__(self, features: PairedFeatures, false: FalseCaptions | None = None, share: Share = ALONE) -> None:
        self.features, self.false, self.share = features, false, share
        if false is not None:
            if not np.array_equal(false.features.image_rows, features.image_rows):
                raise MmkitError("The false captions are of other images. Remedy: false_captions(dataset, train, …)")
            owner = false.features.owner
            self.by_image = owner.argsort(stable=True)
            self.count = owner.bincount(minlength=len(features.image_rows))
            self.first = self.count.cumsum(0) - self.count

    def __len__(self) -> int:
        return len(self.features.owner)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        captions = torch.as_tensor(indices)
        images, owner = self.features.owner[captions].unique(return_inverse=True)
        texts, denied = [(self.features, captions)], owner[:0]
        if self.false is not None:
            denied = self.count[images].nonzero().flatten()
            chosen = self.first[images] + (torch.rand(len(images)) * self.count[images]).long()
            chosen = self.by_image[chosen[denied]]
            texts += [(self.false.features, chosen), (self.features, self.false.captions[chosen])]
        return Batch(self.features.images(images[self.share.of(len(images))]), self._own(texts), owner, denied)

    def _own(self, texts: list[tuple[PairedFeatures, Tensor]]) -> Tensor:
        """The share of captions that come from several sources, one after the other."""
        own, start, blocks = self.share.of(sum(len(rows) for _, rows in texts)), 0, []
        for source, rows in texts:
            blocks.append(source.captions(rows[max(0, own.start - start) : max(0, own.stop - start)]))
            start += len(rows)
        return cat_parts(blocks)


class Order(Sampler[int]):
    """The captions of an epoch in an order that depends on the seed and the epoch alone, so that it can be resumed."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.epoch = count, seed, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        return iter(torch.randperm(self.count, generator=generator).tolist())


def epoch_seed(seed: int, epoch: int) -> int:
    """What an epoch's random numbers start from, so that it can be taken up without those before it."""
    return seed * 100_003 + epoch
