"""One progress line for every long step, in a terminal, in a notebook, and silent in a log."""

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def _in_notebook() -> bool:
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return type(get_ipython()).__name__ == "ZMQInteractiveShell"


class _NotebookLine:
    """A file for tqdm that rewrites one line of a cell's output and leaves nothing behind."""

    def __init__(self) -> None:
        from IPython.display import display

        self._handle = display({"text/plain": ""}, raw=True, display_id=True)

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            self._show(line)

    def flush(self) -> None:
        pass

    def _show(self, line: str) -> None:
        self._handle.update({"text/plain": line}, raw=True)


class Bar:
    """A progress line that several threads may advance."""

    def __init__(self, line: tqdm) -> None:
        self._line, self._lock = line, threading.Lock()

    def update(self, n: int = 1) -> None:
        """Advance by `n` units; a negative `n` takes back what has to be done again."""
        with self._lock:
            self._line.update(n)


@contextmanager
def progress_bar(what: str, total: int, unit: str = "it", scale: bool = False, initial: int = 0) -> Iterator[Bar]:
    """Show one line with the rate and the time that remains, for work counted by `update` of the yielded bar.

    `scale` writes large numbers as 1.2G; `initial` units were done earlier and do not count in the rate.
    In a notebook the line ends as a short summary, so that a saved output holds no bar;
    where standard error is no terminal nothing is printed.
    """
    notebook = _in_notebook()
    file = _NotebookLine() if notebook else sys.stderr
    quiet = not notebook and not sys.stderr.isatty()
    start = time.perf_counter()
    with tqdm(
        desc=what,
        total=total,
        unit=unit,
        unit_scale=scale,
        initial=initial,
        file=file,
        disable=quiet,
        ascii=notebook,
        leave=False,
        mininterval=0.5,
        ncols=79,
    ) as line:
        yield Bar(line)
    if notebook:
        done = f"{tqdm.format_sizeof(total)}{unit}" if scale else f"{total:,} {unit}"
        file._show(f"{what}: {done} in {time.perf_counter() - start:.1f} s")


def progress(items: Iterable[Item], what: str, total: int | None = None, unit: str = "it") -> Iterator[Item]:
    """Yield `items` behind a `progress_bar` that counts them; `total` is needed if they have no length."""
    total = total if total is not None else len(items)  # type: ignore[arg-type]
    with progress_bar(what, total, unit) as bar:
        for item in items:
            yield item
            bar.update()
