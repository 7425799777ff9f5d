"""Brings files over HTTP: resumed, tried again, judged, and several at once."""

import hashlib
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import requests
from urllib3.exceptions import HTTPError, MaxRetryError
from urllib3.util import Retry

from .errors import MmkitError
from .pictures import examine
from .progress import progress_bar

Item = TypeVar("Item")

# A fault that may pass (connection, time-out, 429, 5xx) is tried again up to 8 times in a row, after 1, 2, 4, … 60 s
# and up to a second of jitter; bytes that arrive start the count anew. `increment`, as urllib3 waits from a second
# fault on only.
RETRY = Retry(total=9, backoff_factor=0.5, backoff_max=60, backoff_jitter=1).increment("GET")
RETRY_AFTER_MAX = 120.0  # seconds, however long the server wants us to wait
TIMEOUT = 30.0  # seconds, to connect and between two arrivals
ATTEMPTS = 3  # transfers of a file that comes whole and is wrong
HOPELESS = 10  # files in a row that did not come after all tries: the connection is down
IMAGE_LIMIT = 64_000_000  # bytes; COCO's largest picture has under 1 MB
CHUNK = 1 << 18  # bytes read at once, at most
AGAIN = "Remedy: run the same command again; what came is kept."


@dataclass(frozen=True)
class Published:
    """A file on a server: its URL, its size in bytes, and its SHA-256 in hex where that is known."""

    url: str
    size: int
    sha256: str | None = None


def part_of(target: Path) -> Path:
    """Where a file lies until it is whole."""
    return target.with_name(f"{target.name}.part")


def size_of(path: Path) -> int:
    """Bytes of a file, 0 if there is none."""
    return path.stat().st_size if path.is_file() else 0


def _differs(path: Path, published: Published) -> str | None:
    """How a file differs from the published one, None if it is that one."""
    if (size := size_of(path)) != published.size:
        return f"{size:,} bytes came, {published.size:,} are published"
    if published.sha256 is not None:
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != published.sha256:
            return f"its SHA-256 is {found}, published is {published.sha256}"
    return None


def picture_problem(path: Path) -> str | None:
    """Why a file is no picture of a photo collection, None if it is one."""
    return f"more than {IMAGE_LIMIT:,} bytes" if size_of(path) > IMAGE_LIMIT else examine(path).problem


class _Again(Exception):
    """A fault that may pass: ask once more, not before `wait` seconds."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


class _GaveUp(MmkitError):
    """No try came through."""


def _reason(error: Exception) -> str:
    if isinstance(error, requests.Timeout) or "timed out" in str(error):
        return f"no answer within {TIMEOUT:.0f} s"
    root: BaseException = error
    while root.__context__ is not None:  # requests wraps urllib3's wrapping of the socket's error
        root = root.__context__
    return str(root)


class Workers:
    """Threads that bring files, each with its own connection."""

    def __init__(self, connections: int) -> None:
        self._connections = connections
        self._own = threading.local()
        self._stop = threading.Event()

    def run(self, task: Callable[[Item], None], items: Iterable[Item]) -> list[str]:
        """Do `task` for all items, several at once. The messages of those that failed, unless all hope is lost."""
        problems: list[str] = []
        in_a_row = 0
        self._stop = threading.Event()
        with ThreadPoolExecutor(self._connections) as pool:
            try:
                for future in as_completed([pool.submit(task, item) for item in items]):
                    error = future.exception()
                    in_a_row = in_a_row + 1 if isinstance(error, _GaveUp) else 0
                    if in_a_row == HOPELESS:
                        raise MmkitError(f"{HOPELESS} files in a row did not come; the last: {error}\n{AGAIN}")
                    if isinstance(error, MmkitError):
                        problems.append(str(error))
                    elif error is not None:
                        raise error
            finally:
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
        return problems

    def fetch(
        self,
        url: str,
        target: Path,
        problem_of: Callable[[Path], str | None],
        size: int | None = None,
        advance: Callable[[int], object] = lambda n: None,
    ) -> None:
        """Bring `url` to `target`, going on where its part file ends; `problem_of` judges the finished part.

        `size` in bytes is the published one. `advance` is told the bytes that came, and as a negative number those
        that were thrown away.
        """
        target.parent.mkdir(exist_ok=True)
        part = part_of(target)
        for _ in range(ATTEMPTS):
            self._complete(url, part, size, advance)
            if (problem := problem_of(part)) is None:
                part.replace(target)
                return
            advance(-size_of(part))
            part.unlink()
        raise MmkitError(f"{url}: {problem} ({ATTEMPTS} times).")

    def _complete(self, url: str, part: Path, size: int | None, advance: Callable[[int], object]) -> None:
        """Ask until the last byte is there."""
        retry, reached = RETRY, size_of(part)
        while size is None or size_of(part) < size:
            try:
                return self._stream(url, part, size, advance)
            except (_Again, HTTPError, requests.ConnectionError, requests.Timeout) as error:
                if size_of(part) > reached:  # further than ever: a server that always breaks at one place is given up
                    retry, reached = RETRY, size_of(part)
                try:
                    retry = retry.increment("GET", url, error=error)
                except MaxRetryError:
                    raise _GaveUp(f"{url}: {_reason(error)} (tried {len(retry.history)} times in a row).") from None
                wait = error.wait if isinstance(error, _Again) else 0.0
                if self._stop.wait(max(wait, retry.get_backoff_time())):
                    raise CancelledError from None
            except requests.RequestException as error:
                raise MmkitError(f"{url}: {error}") from None

    def _stream(self, url: str, part: Path, size: int | None, advance: Callable[[int], object]) -> None:
        """One request, its answer appended to the part."""
        if not hasattr(self._own, "session"):
            self._own.session = requests.Session()
        have, limit = size_of(part), size or IMAGE_LIMIT
        asked = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        with self._own.session.get(url, headers=asked, stream=True, timeout=TIMEOUT) as answer:
            code, body = answer.status_code, answer.raw
            wrong_range = code == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            if code == 416 or wrong_range:
                advance(-have)
                part.unlink(missing_ok=True)
                raise _Again("the server sends another range than the one asked for")
            if code == 429 or code >= 500:
                wait = min(RETRY_AFTER_MAX, RETRY.get_retry_after(body) or 0.0)
                raise _Again(f"the server answers {code} {answer.reason}", wait)
            if code not in (200, 206):
                raise MmkitError(f"{url}: the server answers {code} {answer.reason}.")
            lost = have if code == 200 else 0
            announced = body.length_remaining
            if None not in (size, announced) and announced != size - have + lost:  # another file: leave the part alone
                raise _Again(f"the server announces {announced:,} bytes where {size - have + lost:,} are missing")
            advance(-lost)
            have -= lost
            with part.open("ab" if have else "wb") as stream:
                while have <= limit and (chunk := body.read1(CHUNK, decode_content=False)):
                    stream.write(chunk)
                    have += len(chunk)
                    advance(len(chunk))
                    if self._stop.is_set():
                        raise CancelledError
        if size is not None and have < size:
            raise _Again(f"the body ends after {have:,} of {size:,} bytes")


def bring(workers: Workers, wanted: dict[Path, Published], what: str) -> list[str]:
    """Fetch the files that are not there as published; the messages of those that did not come."""
    for target, published in wanted.items():
        if target.is_file() and _differs(target, published):
            target.unlink()
    absent = {target: published for target, published in wanted.items() if not target.is_file()}
    if not absent:
        return []
    total, there = sum(one.size for one in absent.values()), sum(size_of(part_of(target)) for target in absent)
    with progress_bar(what, total, unit="B", scale=True, initial=there) as bar:

        def fetch(target: Path) -> None:
            published = absent[target]
            workers.fetch(published.url, target, partial(_differs, published=published), published.size, bar.update)

        return workers.run(fetch, absent)
