"""Executes the notebooks in order and reports a line for each: seconds, peak memory, key figure."""

import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import MissingFile, MmkitError
from .profiles import Profile

CELL_TIMEOUT = 900  # seconds; a cell of the default profile takes far less, one on photos as long as it takes
_COLOUR = re.compile(r"\x1b\[[\d;]*m")  # of a traceback
_KEY_FIGURE = re.compile(r"^Key figure: (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Executed:
    """One executed notebook: wall time in seconds, peak resident memory in bytes, and its key figure."""

    name: str
    seconds: float
    peak_memory: int
    key_figure: str

    def __str__(self) -> str:
        return f"{self.name:<24} {self.seconds:7.1f} s {self.peak_memory / 2**30:6.2f} GiB   {self.key_figure}"


class _PeakMemory(threading.Thread):
    """Watches the resident memory of a kernel, and what its children hold beyond the pages that they share."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.pid: int | None = None
        self.peak = 0
        self._stop_asked = threading.Event()

    def run(self) -> None:
        import psutil

        while not self._stop_asked.wait(0.1):
            try:
                if self.pid is not None:
                    kernel = psutil.Process(self.pid)
                    own = sum(child.memory_full_info().uss for child in kernel.children(recursive=True))
                    self.peak = max(self.peak, kernel.memory_info().rss + own)
            except psutil.Error:
                continue  # a process that ended between two looks

    def stop(self) -> int:
        self._stop_asked.set()
        self.join()
        return self.peak


def _key_figure(notebook) -> str:
    texts = [output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    found = _KEY_FIGURE.findall("\n".join(texts))
    return found[-1] if found else ""


def _drop_widgets(notebook) -> None:
    """A saved page has no kernel behind its widgets: leave the figures that stand in for them."""
    notebook.metadata.pop("widgets", None)
    for output in (output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs):
        output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)


def execute(source: Path, target: Path, timeout: int | None = CELL_TIMEOUT) -> Executed:
    """Execute the notebook `source` in its own folder with a clean kernel and write it to `target`.

    A cell that takes more than `timeout` seconds fails; with None it may take as long as it wants.
    What ran is written even if a cell fails; then an `MmkitError` names the notebook, the cell and the error.
    """
    try:
        import nbformat
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    except ImportError as error:
        raise MissingFile(f"{error.name} is not installed. Remedy: pip install 'mmkit[lab]'") from None
    notebook = nbformat.read(source, as_version=4)
    code_cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    memory, at = _PeakMemory(), 0

    def on_cell(cell, cell_index: int) -> None:
        nonlocal at
        memory.pid = client.km.provisioner.pid
        if cell.cell_type == "code":
            at += 1
            if sys.stderr.isatty():
                print(f"\r{source.stem}: cell {at} of {code_cells} ", end="", file=sys.stderr, flush=True)

    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        extra_arguments=["--Application.log_level=40"],  # errors only
        record_timing=False,
        resources={"metadata": {"path": str(source.parent)}},
        on_cell_execute=on_cell,
    )
    start, failure = time.perf_counter(), None
    memory.start()
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        last = _COLOUR.sub("", str(error)).strip().splitlines()[-1]
        last = f"it took more than {timeout} s" if isinstance(error, CellTimeoutError) else last
        failure = f"{source.name} stopped at its code cell {at}: {last}"
    finally:
        peak = memory.stop()
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
    _drop_widgets(notebook)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_suffix(".new")
    nbformat.write(notebook, beside)
    beside.replace(target)
    if failure:
        raise MmkitError(
            f"{failure}\nRemedy: see the cell in {target}, mend it in {source}, and run again; finished work is kept."
        )
    return Executed(source.stem, time.perf_counter() - start, peak, _key_figure(notebook))


def run_course(
    folder: Path, out: Path, profile: Profile, only: Sequence[str] = (), in_place: bool = False
) -> list[Executed]:
    """Execute the notebooks of `folder` in order, those whose name begins with one of `only` if given.

    Copies land in `out`, or over the notebooks with `in_place`. Prints a line each, and a table at the end.
    """
    chosen = [path for path in sorted(folder.glob("*.ipynb")) if not only or path.name.startswith(tuple(only))]
    if not chosen:
        raise MissingFile(f"No notebook {' '.join(only)} in {folder}. Remedy: run from the top of the checkout.")
    os.environ["MMKIT_PROFILE"] = profile.name
    os.environ["MMKIT_CACHE"] = str(profile.cache)
    if profile.coco_root is not None:  # the kernels work in another folder
        os.environ["MMKIT_COCO_ROOT"] = str(profile.coco_root)
    done, timeout = [], CELL_TIMEOUT if profile.name == "mini" else None
    for source in chosen:
        done.append(execute(source, source if in_place else out / source.name, timeout))
        print(done[-1], flush=True)
    total, peak = sum(row.seconds for row in done), max(row.peak_memory for row in done)
    rule = "─" * 78
    print(rule, *done, rule, Executed("all", total, peak, ""), sep="\n")
    return done
