"""Executes the notebooks in order, each with a clean kernel: python -m mmkit run --help"""

import argparse
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

import mmkit

CELL_TIMEOUT = 900  # seconds, under the default profile; a cell takes far less
WIDGET = "application/vnd.jupyter.widget-view+json"
HERE = Path(__file__).parent


def execute(source: Path, target: Path, timeout: int | None = CELL_TIMEOUT) -> str:
    """Execute the notebook `source` in its folder and write it to `target`; its key figure.

    A cell that takes more than `timeout` seconds fails; with None it may take as long as it
    wants. What ran is written even if a cell fails; then an error names notebook and cell.
    """
    notebook, failure = nbformat.read(source, as_version=4), ""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in cells:
        cell.execution_count, cell.outputs = None, []
    client = NotebookClient(
        notebook,
        timeout=timeout,
        extra_arguments=["--Application.log_level=40"],  # errors only
        record_timing=False,
        store_widget_state=False,
        resources={"metadata": {"path": str(source.parent)}},
    )
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        failure = re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip().splitlines()[-1]
        if isinstance(error, CellTimeoutError):
            failure = f"it took more than {timeout} s"
    for output in [output for cell in cells for output in cell.outputs if "data" in output]:
        output.data.pop(WIDGET, None)  # a saved page has no kernel behind it
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target.with_suffix(".new"))
    target.with_suffix(".new").replace(target)
    if failure:
        number = sum(cell.execution_count is not None for cell in cells) or 1
        raise mmkit.MmkitError(
            f"{source.name} stopped at its code cell {number}: {failure}\n"
            f"Remedy: see the cell in {target}, mend it in {source}, and run again; what is"
            " finished is kept."
        )
    printed = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    return printed.partition("Key figure: ")[2].partition("\n")[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mmkit run", description="Execute the notebooks in order."
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=("",),
        metavar="NAME",
        help="notebooks whose name begins so",
    )
    parser.add_argument(
        "--profile", help="mini, photos or coco (default: MMKIT_PROFILE, else mini)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build"), metavar="DIR", help="where copies land"
    )
    parser.add_argument(
        "--in-place",
        action="store_true",
        help="write the executed notebooks over the sources",
    )
    arguments = parser.parse_args()
    sources = [
        path
        for path in sorted(HERE.glob("*.ipynb"))
        if path.name.startswith(tuple(arguments.only))
    ]
    if not sources:
        raise mmkit.MissingFile(
            f"No notebook {' '.join(arguments.only)}. Remedy: one of {HERE}"
        )
    profile = mmkit.profile(arguments.profile)
    os.environ |= {
        "MMKIT_PROFILE": profile.name,
        "MMKIT_CACHE": str(profile.cache.resolve()),
    }
    if profile.coco_root is not None:  # the kernels work in another folder
        os.environ["MMKIT_COCO_ROOT"] = str(profile.coco_root)
    dataset = mmkit.load_dataset(profile)
    images, captions = len(dataset), len(dataset.captions)
    print(f"profile {profile.name}: {images:,} images, {captions:,} captions", flush=True)
    for source in sources:
        start = time.perf_counter()
        print(f"{source.stem:<24}", end="", flush=True)
        target = source if arguments.in_place else arguments.out / source.name
        key_figure = execute(
            source, target, CELL_TIMEOUT if profile.name == "mini" else None
        )
        print(f"{time.perf_counter() - start:7.1f} s   {key_figure}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except mmkit.MmkitError as error:
        print(f"mmkit: {error}", file=sys.stderr)
        sys.exit(2)
