"""What extraction, and the training and evaluation of each fuser, cost on the machine at hand."""

import contextlib
import ctypes
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from timeit import timeit
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .batches import PairBatches
from .data import load_captions
from .encoders import Encoders
from .evaluation import choose_thresholds, matching_report, retrieval_report
from .experiments import _PACKAGES, _machine
from .extraction import DTYPES, extract_features
from .features import PairedFeatures
from .profiles import Profile, profile
from .progress import progress
from .scenes import draw_scenes
from .training import FUSERS, build_fuser, fit_profile
from .zoo import load_encoders

SHORTLIST = 50  # candidates that a fuser of parts ranks


class Work(NamedTuple):
    """Floating-point operations of matrix products and distances, bytes moved in memory, and operations started."""

    flops: float = 0
    bytes: float = 0
    operations: float = 0


@dataclass(frozen=True)
class Cost:
    """What a fuser costs: seconds of a training step of `captions`, thereof of reading them, and its work, if it is no
    closed form; the seconds beside all steps; the peak of resident memory, 0 where unknown; and of two pools the
    images, and seconds and work of matching and retrieval."""

    captions: int
    step_seconds: float
    read_seconds: float
    fixed_seconds: float
    step: Work | None
    memory: int
    evaluations: list[tuple[int, float, Work]]


@dataclass(frozen=True)
class Measured:
    """What `measure` found, on a machine that its conditions describe without naming it: `rates` per second ("images",
    "captions", and "decoded" pictures by one thread), `bytes` on disk of an image ("images", "grids") and of a caption
    ("captions", "tokens"), and the cost of each fuser."""

    command: str
    conditions: dict[str, Any]
    rates: dict[str, float]
    bytes: dict[str, float]
    fusers: dict[str, Cost]


class _Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        distances = {torch.ops.aten._cdist_forward: lambda left, right, *_, **__: 3 * left[0] * right[0] * left[1]}
        self._flops, self._bytes, self._operations = FlopCounterMode(display=False, custom_mapping=distances), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            self._operations += 1
            self._bytes += 3 * sum(part.nbytes for part in tree_leaves(found) if isinstance(part, Tensor))
        return found

    def of(self, task: Callable[[], object]) -> Work:
        with self, self._flops:
            task()
        return Work(self._flops.get_total_flops(), self._bytes, self._operations)


def _extraction(encoders: Encoders, photos: int) -> tuple[dict[str, float], dict[str, float]]:
    """A real extraction of so many pictures: rates from the first batch to the last, and bytes of an item on disk."""
    marks: dict[str, list[tuple[float, int]]] = {"images": [], "captions": []}
    with tempfile.TemporaryDirectory() as folder:
        dataset = load_captions(draw_scenes(Path(folder, "scenes"), photos))
        paths = [dataset.root / file for file in dataset.files]
        for path in paths:  # COCO's usual size; the captions have COCO's usual length
            Image.open(path).resize((640, 480)).save(path, quality=95)
        decoded = len(paths) / timeit(
            lambda: [encoders.preprocessor.preprocess_image(path) for path in paths], number=1
        )
        for name, encoder in (("images", encoders.image), ("captions", encoders.text)):
            found = marks[name]
            encoder.register_forward_hook(lambda *call, at=found: at.append((time.perf_counter(), len(call[2].pooled))))
        arrays = extract_features(dataset, encoders, Path(folder, "cache"), grids=True, tokens=True).arrays
        sizes = {name: arrays[name].nbytes / len(paths) for name in ("images", "grids")}
        sizes |= {name: arrays[name].nbytes / len(dataset.captions) for name in ("captions", "tokens")}
        del arrays  # closes the maps
    marks["images"].pop(0)  # a single picture, whose grid is looked at
    rates = {name: sum(count for _, count in at[1:]) / (at[-1][0] - at[0][0]) for name, at in marks.items()}
    return rates | {"decoded": decoded}, sizes


def _features(images: int, captions: int, dims: tuple[int, int], cells: int) -> PairedFeatures:
    """Noise in the store's dtype, with so many captions of each image, and with parts where there are cells."""
    random = np.random.default_rng(0)

    def noise(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32).astype(DTYPES[0])

    owner, parts = np.repeat(np.arange(images), captions), ()
    if cells:
        lengths = np.minimum(9 + random.geometric(0.2, len(owner)), 60)  # 14 in the mean, few long ones
        tokens = noise(len(owner), lengths.max(), dims[1]) * (np.arange(lengths.max()) < lengths[:, None])[..., None]
        parts = noise(images, cells, dims[0]), tokens
    return PairedFeatures.from_arrays(noise(images, dims[0]), noise(len(owner), dims[1]), owner.tolist(), *parts)


def _peak(reset: bool = False) -> int:
    """The peak of this process's resident memory in bytes; 0 where the system does not tell (it is Linux's)."""
    try:
        if reset:
            with contextlib.suppress(AttributeError):  # glibc's: what was freed long ago is no need of what comes
                ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    except (OSError, IndexError, TypeError):  # no /proc, or, on Windows, no such library
        return 0


def _cost(name: str, settings: Profile, dims: tuple[int, int], cells: int, steps: int, pool: int) -> Cost:
    kind, settings = FUSERS[name], replace(settings, epochs=1, part_epochs=1)
    batch, cells = (settings.part_batch_size, cells) if kind.takes_parts else (settings.batch_size, 0)
    few, fuser = _features(64, 1, dims, cells), build_fuser(name, settings, *dims)

    def training(batches: int) -> Callable[[], object]:
        features = _features(batches * batch, 1, dims, cells)  # in all of COCO a batch has hardly an image twice
        return lambda: fit_profile(fuser, features, few, settings)

    short, long = training(2), training(2 + steps)
    short()  # warms up
    _peak(reset=True)
    marks: list[float] = []
    with register_optimizer_step_post_hook(lambda *_: marks.append(time.perf_counter())):
        seconds = timeit(short, number=1), timeit(long, number=1)
    memory, pauses = _peak(), [after - before for before, after in pairwise(marks[2:])]  # a closed form has no steps
    each = median(pauses or [max(0.0, (seconds[1] - seconds[0]) / steps)])
    fixed = 0.0 if pauses else max(0.0, seconds[0] - 2 * each)
    batches = PairBatches(fuser.view(_features(batch, 1, dims, cells)))
    reading = timeit(lambda: batches.__getitems__(range(batch)), number=5) / 5
    step = Work(*np.subtract(_Counted().of(short), _Counted().of(training(1))).tolist()) if pauses else None
    thresholds, evaluations = choose_thresholds(fuser, few), []
    for images in (pool // 2, pool):
        test = _features(images, 5, dims, cells)

        def evaluate(test: PairedFeatures = test) -> None:
            matching_report(fuser, test, thresholds)
            retrieval_report(fuser, test, SHORTLIST if cells else 0)

        evaluations.append((images, timeit(evaluate, number=1), _Counted().of(evaluate)))
    return Cost(batch, each, reading, fixed, step, memory, evaluations)


def measure(
    settings: Profile | None = None, photos: int = 96, steps: int = 8, pool: int = 1000, part_pool: int = 100
) -> Measured:
    """Rates and costs on this machine at the sizes of `settings` (default: the profile "coco"), in some minutes.

    Encoders have random weights and read 13 `photos` or more; fusers take noise in memory, train for `steps` steps and
    are evaluated on `pool` images, or `part_pool` through a shortlist, with five captions each.
    """
    settings = settings or profile("coco")
    encoders = load_encoders(settings.image_encoder, settings.text_encoder, pretrained=False)
    (rates, sizes), dims, costs = _extraction(encoders, photos), (encoders.image.dim, encoders.text.dim), {}
    del encoders  # not in the memory of training
    for name in progress(FUSERS, "measuring", unit="fusers"):
        size, cells = part_pool if FUSERS[name].takes_parts else pool, round(sizes["grids"] / sizes["images"])
        costs[name] = _cost(name, settings, dims, cells, steps, size)
    conditions = {
        "profile": {key: value for key, value in asdict(settings).items() if not isinstance(value, Path)},
        "sizes": {"photos": photos, "steps": steps, "pool": pool, "part_pool": part_pool},
        "machine": _machine(),
        "threads": torch.get_num_threads(),
        "versions": {package: version(package) for package in _PACKAGES},
    }
    return Measured("python -m mmkit plan --measure", conditions, rates, sizes, costs)
