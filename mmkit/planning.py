"""What a full run takes: measured costs at its size, and for GPUs what published figures make of them."""

from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from .costs import Cost, Measured, Work, measure
from .errors import MissingFile, MmkitError
from .profiles import _CHECKOUT, profile
from .results import write_whole
from .training import FUSERS

FILE = Path("notebooks", "planning.json")
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


def seconds_of(work: Work, peak: float, gpu: Gpu = A100, share: float = 1) -> float:
    """On a GPU that does this `share` of the arithmetic, by the roofline (Williams et al. 2009, section 3)."""
    bounds = work.flops / (_UTILISATION * peak), work.bytes / gpu.bandwidth
    return max(max(bounds) * share, work.operations * _OPERATION)


class Workload(NamedTuple):
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


def entries(measured: Measured, run: Workload | None = None, gpu: Gpu = A100) -> list[Entry]:
    """All figures of a run: extraction, the training of each fuser, and its evaluation on the test images."""
    run, size, found = run or Workload(), measured.bytes, []
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
        found += [Entry(f"evaluate {name}", at, seconds_of(work, gpu.single, gpu), "computed") for at in gpus]
    return found


def _grown(evaluations: list[tuple[int, float, Work]], images: int, power: int) -> tuple[float, Work]:
    """Seconds and work on a pool of `images`: a part that is fixed, and one that grows as that `power` of the pool,
    which is 2 where all pairs are scored and 1 for a shortlist."""
    (few, *small), (many, *large) = evaluations
    grown = (images**power - many**power) / (many**power - few**power)
    first, last = (np.array([seconds, *work]) for seconds, work in (small, large))
    seconds, *work = np.maximum(0, last + grown * np.maximum(0, last - first)).tolist()
    return seconds, Work(*work)


def _training(name: str, cost: Cost, run: Workload, gpu: Gpu, gpus: dict[str, float], pair: float) -> list[Entry]:
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
        found.append(
            Entry(step, where, steps * (share * read + seconds_of(cost.step, gpu.half, gpu, share)), "computed")
        )
    return found


def _shown(entry: Entry) -> str:
    if not entry.figure:
        return "–"
    units = _BYTES if entry.where in ("memory", "disk") else _TIMES
    size, unit = max((size, unit) for unit, size in units.items() if size <= max(entry.figure, min(units.values())))
    return f"{entry.figure / size:.3g} {unit}{'*' if entry.how == 'computed' else ''}"


def plan_table(measured: Measured, run: Workload | None = None, gpu: Gpu = A100) -> str:
    """The figures of a run as a text table; a star marks those that are computed."""
    run, facts = run or Workload(), measured.conditions
    wheres = "here", "1 GPU", f"{run.gpus} GPUs", "memory", "disk"
    rows = {"": {where: where for where in wheres}}
    for entry in entries(measured, run, gpu):
        rows.setdefault(entry.step, {})[entry.where] = _shown(entry)
    lines = [f"{step:<30}" + "".join(f"{row.get(where, ''):>11}" for where in wheres) for step, row in rows.items()]
    asked = facts["profile"]
    head = f"profile {asked['name']}: {asked['image_encoder']}, {asked['text_encoder']}; {run.images:,} images, "
    head += f"{run.captions:,} captions\nhere: {facts['machine']}, {facts['threads']} threads"
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
    given = {name: value for name, value in vars(arguments).items() if name in Workload._fields and value is not None}
    print(plan_table(read_measured(arguments.out if arguments.measure else None), Workload(**given)))
    return 0
