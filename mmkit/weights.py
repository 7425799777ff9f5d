"""Weights that are fetched once and kept: torchvision's folder of checkpoints and the cache of the Hugging Face hub."""

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import requests
import torch
from huggingface_hub import constants, hf_hub_url, snapshot_download
from huggingface_hub.utils import HFValidationError
from safetensors import SafetensorError

from .errors import MissingFile, MmkitError

_TIMEOUT = 10  # seconds
_UNREADABLE = (
    *(OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, AttributeError),
    *(SafetensorError, pickle.UnpicklingError),
)
Alternatives = tuple[str, ...]  # names or patterns of files, of which one is enough


def _reason(error: BaseException) -> str:
    """The message on one line, short."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:199]}…"


@contextmanager
def readable(name: str, path: Path) -> Iterator[None]:
    """What fails inside, reading or filling a model from `path`, becomes an `MmkitError` that names the file."""
    try:
        yield
    except MmkitError:
        raise
    except _UNREADABLE as error:
        kept = next((parent for parent in path.parents if parent.name.startswith("models--")), path)
        raise MmkitError(
            f"{path} does not hold what {name} needs ({_reason(error)}). Remedy: replace {kept} with a whole copy "
            "(once removed from a cache, it is fetched anew), or choose another encoder."
        ) from None


def _try_connection(url: str) -> None:
    """One short request, since the libraries that fetch retry for a minute, in silence or with many warnings."""
    try:
        requests.head(url, timeout=_TIMEOUT)
    except requests.RequestException:
        raise OSError(f"no connection to {urlsplit(url).hostname}") from None


def checkpoint(name: str, url: str) -> Path:
    """The file of this URL in torch's folder of checkpoints, fetched if it is not there.

    The digits that end its name are checked against its SHA-256 on arrival. `MissingFile` if it cannot be fetched.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", PurePosixPath(urlsplit(url).path).name)
    if not path.is_file():
        try:
            _try_connection(url)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[1])
        except (OSError, RuntimeError) as error:
            raise MissingFile(
                f"The weights of {name} are not in {path.parent} and could not be fetched ({_reason(error)}). "
                f"Remedy: connect to the network once, or put {url} into that folder (TORCH_HOME moves it)."
            ) from None
    return path


def lacking(folder: Path, needed: Sequence[Alternatives]) -> list[str]:
    """The needed files that a folder does not have."""
    return [" or ".join(names) for names in needed if not any(any(folder.glob(name)) for name in names)]


def hub_folder(name: str, repository: str, needed: Sequence[Alternatives], optional: Alternatives = ()) -> Path:
    """The folder of a model's files in the cache of the Hugging Face hub, fetched if one that is needed is not there.

    What the cache holds is taken without asking the hub. `MissingFile` if they cannot be fetched; `MmkitError` if the
    hub does not have them or `repository` cannot be a name there.
    """
    patterns = [*(pattern for names in needed for pattern in names), *optional]
    try:
        folder = Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=True))
        if not lacking(folder, needed):
            return folder
    except HFValidationError:
        raise MmkitError(
            f"{repository!r} is no folder here and cannot be a name on the Hugging Face hub, such as owner/model."
        ) from None
    except OSError:
        pass  # not in the cache
    try:
        _try_connection(hf_hub_url(repository, "config.json"))
        folder = Path(snapshot_download(repository, allow_patterns=patterns))
    except OSError as error:
        cached = Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}")
        raise MissingFile(
            f"The files of {name} are not in {cached} and could not be fetched ({_reason(error)}). Remedy: connect to "
            f"the network once, or run `hf download {repository}` where there is one and copy that folder "
            "(HF_HOME moves the cache)."
        ) from None
    if absent := lacking(folder, needed):
        raise MmkitError(f"{repository} on the Hugging Face hub has no {', no '.join(absent)}. Choose another encoder.")
    return folder
