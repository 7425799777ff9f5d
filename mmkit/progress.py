"""One progress line for every long step, in a terminal, in a notebook, and silent in a log."""

import sys
import time
from collections.abc import Iterable, Iterator
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


def progress(items: Iterable[Item], what: str, total: int | None = None, unit: str = "it") -> Iterator[Item]:
    """Yield `items` and show one line with the rate and the time that remains.

    In a notebook the line ends as a short summary, so that a saved output holds no bar;
    where standard error is no terminal nothing is printed.
    """
    total = total if total is not None else len(items)  # type: ignore[arg-type]
    notebook = _in_notebook()
    file = _NotebookLine() if notebook else sys.stderr
    quiet = not notebook and not sys.stderr.isatty()
    start = time.perf_counter()
    with tqdm(
        items,
        desc=what,
        total=total,
        unit=unit,
        file=file,
        disable=quiet,
        ascii=notebook,
        leave=False,
        mininterval=0.5,
        ncols=79,
    ) as bar:
        yield from bar
    if notebook:
        file._show(f"{what}: {total:,} {unit} in {time.perf_counter() - start:.1f} s")
