"""What a full run takes: measured on the machine at hand, and computed from published figures for GPUs."""

import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from timeit import timeit
from typing import Any, NamedTuple

import msgspec
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
from .errors import MissingFile, MmkitError
from .evaluation import choose_thresholds, matching_report, retrieval_report
from .experiments import _PACKAGES, _machine
from .extraction import DTYPES, extract_features
from .features import PairedFeatures
from .profiles import _CHECKOUT, Profile, profile
from .progress import progress
from .results import write_whole
from .scenes import draw_scenes
from .training import FUSERS, build_fuser, fit_profile
from .zoo import load_encoders

FILE = Path("notebooks", "planning.json")
SHORTLIST = 50  # candidates that a fuser of parts ranks
_TIMES, _BYTES = {"ms": 1e-3, "s": 1, "min": 60, "h": 3600, "days": 86400}, {"B": 1, "MB": 1e6, "GB": 1e9}


class Gpu(NamedTuple):
    """Published figures: images/s of ResNet-50 and tokens/s of BERT-base (inference in half precision, without decoding
    pictures), floating-point operations/s in bfloat16 and in float32, bytes/s of its memory."""

    name: str = "A100 40 GB"
    images: float = 3474.94
    tokens: float = 1216.43 * 128
    half: float = 312e12
    single: float = 19.5e12
    bandwidth: float = 1.555e12


A100 = Gpu()
SOURCES = """\
ResNet-50, 3,474.94 images/s: NVIDIA/DeepLearningExamples, TensorFlow/Classification/ConvNets/resnet50v1.5/README.md
  (1x A100 40GB, mixed precision, batch 128)
BERT-base, 1,216.43 sentences/s of 128 tokens: the same repository, TensorFlow/LanguageModeling/BERT/README.md
  (1x A100 40GB, fp16, batch 8; taken as 155,703 tokens/s, since attention is 3 % of the operations at 128 tokens)
A100, 312 TFLOPS in bfloat16, 19.5 in float32, 1.555 TB/s: glennklockwood.com/garden/processors/A100"""

_UTILISATION, _OPERATION, _DECODERS, _DISK, _EFFICIENCY = 0.1, 10e-6, 8, 1e9, 0.84
ASSUMPTIONS = f"""\
A GPU reaches {_UTILISATION:.0%} of its peak (BERT-base above: 9 %) and starts an operation in {1e6 * _OPERATION:.0f} µs
  (5 to 25: jiahuanglin.xyz, "From PyTorch op to kernel launch"). A training step reads its batch, as fast as here or,
  parts, from a disk of {_DISK / 1e9:.0f} GB/s; then it takes the longest of its arithmetic, its memory traffic (three
  times what is written) and its operations' starts. {_DECODERS} cores for each GPU decode pictures as fast as one here.
Several GPUs: {_EFFICIENCY:.0%} efficient (training ResNet-50, 8 are 6.72 times 1: same repository, PyTorch), but starts
  do not divide, nor do the steps of a fuser that looks at its whole batch, and one process evaluates."""


class Work(NamedTuple):
    """Floating-point operations of matrix products and distances, bytes moved in memory, and operations started."""

    flops: float = 0
    bytes: float = 0
    operations: float = 0

    def seconds(self, peak: float, gpu: Gpu = A100, share: float = 1) -> float:
        """On a GPU that does this `share` of the arithmetic, by the roofline (Williams et al. 2009, section 3)."""
        bounds = self.flops / (_UTILISATION * peak), self.bytes / gpu.bandwidth
        return max(max(bounds) * share, self.operations * _OPERATION)


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
            Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
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


class Run(NamedTuple):
    """What is planned: images and captions, of which those of `held_out` images each validate and test; epochs of
    fusers of vectors and of parts; processes with a GPU each, beside a single one."""

    images: int = 123_287
    captions: int = 616_767
    held_out: int = 5_000
    epochs: int = profile("coco").epochs
    part_epochs: int = profile("coco").part_epochs
    gpus: int = 8


class Entry(NamedTuple):
    """A figure of the plan, in seconds or, where it is "memory" or "disk", in bytes. `how`: "measured", that is a
    figure of the measured machine, scaled to the run's size, or "computed" by `SOURCES` and `ASSUMPTIONS`."""

    step: str
    where: str  # "here", "1 GPU", …, "memory" or "disk"
    figure: float
    how: str


def entries(measured: Measured, run: Run | None = None, gpu: Gpu = A100) -> list[Entry]:
    """All figures of a run: extraction, the training of each fuser, and its evaluation on the test images."""
    run, size, found = run or Run(), measured.bytes, []
    if run.images <= 2 * run.held_out or min(run) < 1 or run.gpus == 1:
        raise MmkitError(f"{run} has no plan. Remedy: images above twice held_out, at least 2 gpus, the rest above 0")
    gpus = {"1 GPU": 1.0, f"{run.gpus} GPUs": 1 / (run.gpus * _EFFICIENCY)}
    decoded, tokens = _DECODERS * measured.rates["decoded"], size["tokens"] / size["captions"]
    rates = {"images": min(gpu.images, decoded), "captions": gpu.tokens / tokens}
    for name, parts, count in (("images", "grids", run.images), ("captions", "tokens", run.captions)):
        step, disk = f"extract {name}", (size[name], size[name] + size[parts])
        found.append(Entry(step, "here", count / measured.rates[name], "measured"))
        found += [Entry(step, where, share * count / rates[name], "computed") for where, share in gpus.items()]
        for label, each in zip((step, f"{step} with {parts}"), disk, strict=True):
            found.append(Entry(label, "disk", count * each, "measured"))
    pair = sum(size.values())
    found += [entry for name, cost in measured.fusers.items() for entry in _training(name, cost, run, gpu, gpus, pair)]
    for name, cost in measured.fusers.items():
        seconds, work = _grown(cost.evaluations, run.held_out, 1 if FUSERS[name].takes_parts else 2)
        found.append(Entry(f"evaluate {name}", "here", seconds, "measured"))
        found += [Entry(f"evaluate {name}", at, work.seconds(gpu.single, gpu), "computed") for at in gpus]
    return found


def _grown(evaluations: list[tuple[int, float, Work]], images: int, power: int) -> tuple[float, Work]:
    """Seconds and work on a pool of `images`: a part that is fixed, and one that grows as that `power` of the pool,
    which is 2 where all pairs are scored and 1 for a shortlist."""
    (few, *small), (many, *large) = evaluations
    grown = (images**power - many**power) / (many**power - few**power)
    first, last = (np.array([seconds, *work]) for seconds, work in (small, large))
    seconds, *work = np.maximum(0, last + grown * np.maximum(0, last - first)).tolist()
    return seconds, Work(*work)


def _training(name: str, cost: Cost, run: Run, gpu: Gpu, gpus: dict[str, float], pair: float) -> list[Entry]:
    kind, step = FUSERS[name], f"train {name}"
    epochs = 1 if cost.step is None else run.part_epochs if kind.takes_parts else run.epochs
    # a validation batch has no backward pass, which is two thirds of a step
    steps = epochs * (run.images - (2 - 1 / 3) * run.held_out) * run.captions / run.images / cost.captions
    here = cost.fixed_seconds + steps * cost.step_seconds
    found = [Entry(step, "here", here, "measured"), Entry(step, "memory", cost.memory, "measured")]
    if cost.step is None:
        return found + [Entry(step, where, here, "computed") for where in gpus]
    read = max(cost.read_seconds, cost.captions * pair / _DISK if kind.takes_parts else 0)
    for where, share in gpus.items():
        share = 1 if kind.transductive else share
        found.append(Entry(step, where, steps * (share * read + cost.step.seconds(gpu.half, gpu, share)), "computed"))
    return found


def _shown(entry: Entry) -> str:
    if not entry.figure:
        return "–"
    units = _BYTES if entry.where in ("memory", "disk") else _TIMES
    size, unit = max((size, unit) for unit, size in units.items() if size <= max(entry.figure, min(units.values())))
    return f"{entry.figure / size:.3g} {unit}{'*' if entry.how == 'computed' else ''}"


def plan_table(measured: Measured, run: Run | None = None, gpu: Gpu = A100) -> str:
    """The figures of a run as a text table; a star marks those that are computed."""
    run, facts = run or Run(), measured.conditions
    wheres = "here", "1 GPU", f"{run.gpus} GPUs", "memory", "disk"
    rows = {"": {where: where for where in wheres}}
    for entry in entries(measured, run, gpu):
        rows.setdefault(entry.step, {})[entry.where] = _shown(entry)
    lines = [f"{step:<30}" + "".join(f"{row.get(where, ''):>11}" for where in wheres) for step, row in rows.items()]
    head = f"{run.images:,} images, {run.captions:,} captions; here: {facts['machine']}, {facts['threads']} threads"
    stars = f"No star: measured here, scaled to this size. *: computed, for {gpu.name}:"
    return "\n".join([head, "", *(line.rstrip() for line in lines), "", stars, SOURCES, ASSUMPTIONS])


def read_measured(path: Path | None = None) -> Measured:
    """What a JSON file of `measure` holds; by default the committed one, from a notebook's folder or the checkout."""
    places = [path] if path else [Path(FILE.name), FILE, _CHECKOUT / FILE]
    if not (found := [place for place in places if place.is_file()]):
        raise MissingFile(f"There are no measurements at {path or FILE}. Remedy: python -m mmkit plan --measure")
    try:
        return msgspec.json.decode(found[0].read_bytes(), type=Measured)
    except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
        raise MmkitError(f"{found[0]} cannot be read ({error}). Remedy: python -m mmkit plan --measure") from None


def plan(arguments: Namespace) -> int:
    """The command: print the table of a run; with `measure`, take the measurements first and keep them in `out`."""
    if arguments.measure:
        write_whole(arguments.out, msgspec.json.format(msgspec.json.encode(measure()), indent=1).decode() + "\n")
    given = {name: value for name, value in vars(arguments).items() if name in Run._fields and value is not None}
    print(plan_table(read_measured(arguments.out if arguments.measure else None), Run(**given)))
    return 0
