"""What several test files share."""

import torch
from torch import Tensor

from mmkit.features import PairedFeatures
from mmkit.fusers import PairFuser
from mmkit.profiles import Profile, profile

DIMS = 24, 16


def learnable(
    images: int, seed: int, noise: float = 0.2, dims: tuple[int, int] = DIMS, captions: int = 2
) -> PairedFeatures:
    """Images and captions, and parts of both, that are linear views of the same six hidden numbers, with some noise."""
    views = torch.Generator().manual_seed(123)
    to_image, to_text = (torch.randn(6, dim, generator=views) for dim in dims)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(images, 6, generator=generator)
    image_index = torch.arange(images).repeat_interleave(captions)
    pictures = hidden @ to_image + noise * torch.randn(images, dims[0], generator=generator)
    texts = hidden[image_index] @ to_text + noise * torch.randn(len(image_index), dims[1], generator=generator)
    cells, tokens = (
        part[:, None] + noise * torch.randn(len(part), count, part.shape[1], generator=generator)
        for part, count in ((pictures, 4), (texts, 3))
    )
    return PairedFeatures.from_arrays(5 * pictures + 40, texts, image_index, 5 * cells + 40, tokens)


def noise_features(images: int, seed: int, dims: tuple[int, int] = DIMS, captions: int = 2) -> PairedFeatures:
    """Nothing to learn: independent vectors and parts."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (images, dims[0]), (images * captions, dims[1]), (images, 4, dims[0]), (images * captions, 3, dims[1])
    vectors, texts, cells, tokens = (torch.randn(shape, generator=generator) for shape in shapes)
    return PairedFeatures.from_arrays(vectors, texts, torch.arange(images).repeat_interleave(captions), cells, tokens)


def settings(**changes: object) -> Profile:
    """A short, quick training: `changes` of the profile "mini"; those of fusers of parts follow the others."""
    quick: dict[str, object] = {"epochs": 10, "batch_size": 64, "learning_rate": 5e-3, "weight_decay": 0.01}
    quick |= {"matching_weight": 1.0} | changes
    parts = {f"part_{name}": quick[name] for name in ("epochs", "batch_size", "learning_rate")}
    return profile("mini", **(parts | quick))


def weights(fuser: PairFuser) -> dict[str, Tensor]:
    """A copy of the state."""
    return {name: value.clone() for name, value in fuser.state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether both hold the same bits."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
