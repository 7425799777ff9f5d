"""The download of COCO 2014, from a small copy of it on a server that fails as it is told."""

import hashlib
import io
import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import Mock

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from mmkit.folders import download, download_coco
from mmkit.folders.download import COCO, TRIES, Published
from mmkit.support import MmkitError

CAPTIONS, TRAIN, VAL = "/caption_datasets.zip", "/zips/train2014.zip", "/zips/val2014.zip"


def jpeg(seed):
    stream = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def record(position, split):
    folder, cocoid = "train2014" if split == "train" else "val2014", 9 + 101 * position
    row = {"filepath": folder, "filename": f"COCO_{folder}_{cocoid:012}.jpg", "split": split, "cocoid": cocoid}
    return row | {"sentences": [{"raw": f"Picture {k} – “{split}”."} for k in range(5)]}


def zipped(members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


SPLITS = ["test", "val", "restval", "train"] * 4 + ["test"] * 2 + ["restval"] * 4 + ["train"] * 18  # 6, 4, 8, 22
RECORDS = [record(position, split) for position, split in enumerate(SPLITS)]
JSON = json.dumps({"images": RECORDS, "dataset": "coco"}, ensure_ascii=False).encode()
PICTURES = {f"{one['filepath']}/{one['filename']}": jpeg(one["cocoid"]) for one in RECORDS}
TRAINING, VALIDATION = ({path: PICTURES[path] for path in PICTURES if path[0] == first} for first in "tv")
SOME = sorted(TRAINING)[3]
FILES = {f"/{path}": content for path, content in PICTURES.items()} | {
    CAPTIONS: zipped({"dataset_coco.json": JSON, "dataset_flickr8k.json": b"{}"}),
    TRAIN: zipped({"train2014/": b""} | TRAINING),
    VAL: zipped({"val2014/": b""} | VALIDATION),
}
WHOLE = {"caption_datasets.zip": FILES[CAPTIONS], "dataset_coco.json": JSON, **PICTURES}


class Handler(BaseHTTPRequestHandler):
    log_message = Mock()

    def do_GET(self):
        site, start = self.server, int(self.headers["Range"][6:-1])
        with site.lock:
            site.log.append((self.path, start))
            site.active += 1
            site.busiest = max(site.busiest, site.active)
            kind, value = site.faults[self.path].pop(0) if site.faults.get(self.path) else ("", None)
        time.sleep(value if kind == "silent" else site.latency)
        content = value if kind == "body" else site.files[self.path]
        code, body = (206, content[start:]) if start and kind != "body" else (200, content)
        if kind == "status":
            code, body = value, b""
        with suppress(OSError):  # the client went away
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            size, pause = site.pace
            for first in range(0, value if kind == "cut" else len(body), size):
                self.wfile.write(body[first : first + min(size, value - first if kind == "cut" else size)])
                time.sleep(pause)
        with site.lock:
            site.active -= 1


class Site(ThreadingHTTPServer):
    """Serves COCO's layout, and the faults that it is told."""

    daemon_threads, request_queue_size, handle_error = True, 64, Mock()

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.files, self.faults, self.log = threading.Lock(), dict(FILES), {}, []
        self.active = self.busiest = self.latency = 0
        self.pace, self.top = (1 << 20, 0), f"http://127.0.0.1:{self.server_port}"
        sizes = {path: (len(FILES[path]), hashlib.sha256(FILES[path]).hexdigest()) for path in (CAPTIONS, TRAIN, VAL)}
        self.source = {path.rpartition("/")[2]: Published(self.top + path, *row) for path, row in sizes.items()}

    def fail(self, path, kind, value=None, times=1):
        self.faults.setdefault(path, []).extend([(kind, value)] * times)

    def asked(self):
        paths, self.log = sorted(path for path, _ in self.log), []  # since the last call
        return paths


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Site() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        yield server
        server.shutdown()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.001)
    monkeypatch.setattr(download, "CHUNK", 1000)
    return tmp_path / "coco"


def tree(folder):
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != ".download.lock"}


def chosen(folder):
    return json.loads((folder / "dataset_coco.json").read_bytes())["images"]


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def without(*names):
    return {name: content for name, content in WHOLE.items() if name not in names}


def refused(folder, source, **options):
    with pytest.raises(MmkitError) as error:
        download_coco(folder, source=source, **options)
    return str(error.value)


def test_the_whole_comes_by_archives_byte_for_byte_and_is_asked_for_once(site, folder, capsys):
    assert download_coco(folder, source=site.source) == folder and capsys.readouterr() == ("", "")
    assert tree(folder) == WHOLE and site.asked() == [CAPTIONS, TRAIN, VAL]
    download_coco(folder, source=site.source)
    assert tree(folder) == WHOLE and site.asked() == []


CHOSEN = [1, 2, 4, 6, 7, 8, 9, 11, 15, 16, 20, 24, 27, 28, 29, 30, 31, 35, 36, 39]  # of 20 images, always


def test_a_part_has_images_of_all_splits_and_a_larger_part_fetches_only_the_rest(site, folder):
    before, site.latency = set(), 0.05
    for images, counts in ((10, (2, 1, 7)), (11, (2, 1, 8)), (20, (3, 2, 15)), (40, (6, 4, 30))):
        download_coco(folder, images, source=site.source)
        kept, files = chosen(folder), tree(folder)
        splits = Counter("train" if one["split"] == "restval" else one["split"] for one in kept)
        assert (splits["test"], splits["val"], splits["train"]) == counts
        assert kept == [one for one in RECORDS if one in kept]  # in the order of the file, and byte for byte
        content = files.pop("dataset_coco.json")
        assert all(json.dumps(one, ensure_ascii=False).encode() in content for one in kept)
        assert images != 20 or kept == [RECORDS[position] for position in CHOSEN]
        names = {f"{one['filepath']}/{one['filename']}" for one in kept}
        assert files == {name: WHOLE[name] for name in {"caption_datasets.zip", *names}} and before < names
        assert site.asked() == sorted([*([] if before else [CAPTIONS]), *(f"/{name}" for name in names - before)])
        before = names
    download_coco(folder, source=site.source)
    assert tree(folder) == WHOLE and site.asked() == [] and site.busiest == 8  # connections at once


def test_bad_arguments_are_refused_and_what_is_published_has_a_hash(site, folder):
    for images in (9, 0, -1, 41):
        assert str(images) in refused(folder, site.source, images=images)
    assert "connection" in refused(folder, site.source, connections=0)
    assert all(re.fullmatch("[0-9a-f]{64}", one.sha256) and one.url.endswith(f"/{name}") for name, one in COCO.items())


def test_a_folder_of_coco_2017_needs_the_captions_only(site, folder):
    write(folder, {f"{('train', 'val')[i % 5 == 0]}2017/{p[-16:]}": PICTURES[p] for i, p in enumerate(PICTURES)})
    before = tree(folder)
    download_coco(folder, source=site.source)
    assert site.asked() == [CAPTIONS] and tree(folder) == before | without(*PICTURES)


SOME_PART, SHORT, GONE = SOME.replace(".jpg", ".part"), {SOME: PICTURES[SOME][:-9]}, sorted(TRAINING)[:5]
LEFT = {
    "less than a fifth is missing": (without(*GONE[:4]), [f"/{path}" for path in GONE[:4]]),
    "more than a fifth is missing": (without(*GONE), [TRAIN]),
    "archives": ({"train2014.zip": FILES[TRAIN], "val2014.zip": FILES[VAL][:-1] + b"x"}, [CAPTIONS, VAL]),
    "an archive half unpacked": (without("dataset_coco.json") | SHORT | {"train2014.zip": FILES[TRAIN]}, []),
    "damaged captions": (WHOLE | {"caption_datasets.zip": b"", "dataset_coco.json": b"{}"}, [CAPTIONS]),
    "a whole part": ({"train2014.part": FILES[TRAIN]}, [CAPTIONS, VAL]),
    "too long a part": ({"train2014.part": FILES[TRAIN] + b"x"}, [CAPTIONS, TRAIN, VAL]),
    "part of another file": ({"train2014.part": bytes(700)}, [CAPTIONS, TRAIN, TRAIN, VAL]),
    "part of a picture": (without(SOME) | {SOME_PART: PICTURES[SOME] + b"x"}, [f"/{SOME}"]),
}


@pytest.mark.parametrize("files, asked", LEFT.values(), ids=LEFT)
def test_what_lies_there_is_used_or_replaced(site, folder, files, asked):
    write(folder, files)
    download_coco(folder, source=site.source)
    assert site.asked() == asked and tree(folder) == WHOLE


PASSING = {
    "cut at once": ("cut", 0),
    "cut later": ("cut", 600),
    "503": ("status", 503),
    "page": ("body", b"<html><body>Sign in to the network</body></html>"),
    "truncated": ("body", PICTURES[SOME][:-800]),
    "silent": ("silent", 0.4),
}


@pytest.mark.parametrize("fault", PASSING)
@pytest.mark.parametrize("path", [f"/{SOME}", TRAIN, CAPTIONS], ids=["image", "archive", "captions"])
def test_a_fault_that_passes_is_survived(site, folder, path, fault, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    write(folder, without(SOME, "caption_datasets.zip") if path == f"/{SOME}" else {})
    site.fail(path, *PASSING[fault], times=2)
    download_coco(folder, source=site.source)
    assert tree(folder) == WHOLE and site.asked().count(path) == 3


def test_a_broken_transfer_goes_on_where_it_stopped_and_its_tries_start_anew(site, folder):
    site.fail(TRAIN, "cut", 10_000, times=TRIES + 2)
    download_coco(folder, source=site.source)
    assert [start for path, start in site.log if path == TRAIN] == [10_000 * k for k in range(TRIES + 3)]
    assert tree(folder) == WHOLE


def test_a_page_in_the_place_of_an_archive_does_not_cost_the_part(site, folder):
    write(folder, {"train2014.part": FILES[TRAIN][:7000]})
    site.fail(TRAIN, "body", b"<html>" * 5000, times=TRIES)
    assert f"{site.top}{TRAIN}: not the bytes from 7,000 came" in refused(folder, site.source)
    assert (folder / "train2014.part").read_bytes() == FILES[TRAIN][:7000]


def test_missing_files_do_not_stop_the_others_and_a_second_run_brings_them_alone(site, folder):
    gone = sorted(PICTURES)[:7]
    for path in gone:
        site.fail(f"/{path}", "status", 404, times=TRIES)
    message = refused(folder, site.source, images=40)
    assert "7 files could not be brought" in message and "404" in message and "run the same command again" in message
    assert all(f"{site.top}/{path}: " in message for path in gone)
    assert tree(folder) == without(*gone, "dataset_coco.json")
    site.asked()
    download_coco(folder, 40, source=site.source)
    assert site.asked() == [f"/{path}" for path in gone] and chosen(folder) == RECORDS


def test_a_server_that_is_down_is_not_asked_for_every_image_and_none_is_named(site, folder):
    for path in PICTURES:
        site.fail(f"/{path}", "status", 503, times=99)
    assert "10 files" in refused(folder, site.source, images=40, connections=2)
    assert len(set(site.asked()) - {CAPTIONS}) < 20
    with socket.create_server(("127.0.0.1", 0)) as free:
        one = Published(f"http://127.0.0.1:{free.getsockname()[1]}/caption_datasets.zip", 9, "0")
    message = refused(folder, site.source | {"caption_datasets.zip": one})
    assert f"{one.url}: " in message and "refused" in message and "Remedy" in message


OTHERS = b"x" + FILES[TRAIN], FILES[TRAIN][:-1], FILES[TRAIN][:-1] + b"x"
WRONG = [(TRAIN, content, "its SHA-256 is") for content in OTHERS]
WRONG += [(f"/{SOME}", b"<html>404", "not an image"), (f"/{SOME}", PICTURES[SOME][:-800], "cannot be decoded")]


@pytest.mark.parametrize("path, content, reason", WRONG)
def test_what_is_not_as_published_is_named_and_the_others_come(site, folder, path, content, reason):
    site.files[path] = content
    write(folder, {"train2014.zip": content} if path == TRAIN else {})  # and is not unpacked either
    message = refused(folder, site.source, images=None if path == TRAIN else 40)
    assert f"{site.top}{path}: {reason}" in message and site.asked().count(path) == TRIES
    assert tree(folder) == without("dataset_coco.json", *(TRAINING if path == TRAIN else [SOME]))


def test_a_disk_without_room_is_named(site, folder, monkeypatch):
    write(folder, {"train2014.part": FILES[TRAIN][:5000]})  # what is there needs no room
    need = 2 * (len(FILES[TRAIN]) + len(FILES[VAL])) - 5000  # packed and unpacked
    disk = Mock(free=need - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    assert f"{folder} needs 0.00 GB and its disk has" in refused(folder, site.source) and site.asked() == [CAPTIONS]
    disk.free = need
    assert tree(download_coco(folder, source=site.source)) == WHOLE


def test_a_folder_that_cannot_be_written_or_that_another_process_fills_is_named(site, tmp_path):
    write(tmp_path, {"file": b"mine", "coco/train2014": b"a file where the folder should be", "other/x": b""})
    with FileLock(tmp_path / "other" / ".download.lock"):
        for folder in (tmp_path / "file", tmp_path / "file" / "coco", tmp_path / "coco", tmp_path / "other"):
            message = refused(folder, site.source)
            assert str(folder) in message and "cannot be written to" in message and "no other process" in message


@pytest.mark.slow
def test_ctrl_c_stops_all_threads_soon_and_keeps_the_parts(site, folder):
    site.pace, start = (1000, 0.05), time.monotonic()  # an archive takes many seconds
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have switched it off
    threading.Timer(0.7, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        download_coco(folder, source=site.source)
    signal.signal(signal.SIGINT, handler)
    assert time.monotonic() - start < 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPool")]
    size, site.pace = len(tree(folder)["train2014.part"]), (1 << 20, 0)
    assert 0 < size < len(FILES[TRAIN])
    download_coco(folder, source=site.source)
    assert (TRAIN, size) in site.log and tree(folder) == WHOLE


CODE = """import json, sys
from mmkit.folders.download import Published, download_coco
source = {name: Published(*one) for name, one in json.loads(sys.argv[2]).items()}
print(flush=True)
for images in (40, None):
    download_coco(f"{sys.argv[1]}/{images}", images, 4, source)"""


@pytest.mark.slow
def test_kills_leave_nothing_behind(site, tmp_path):
    site.pace, left, chance = (4000, 0.01), set(), random.Random(7)
    for _ in range(16):
        order = [sys.executable, "-c", CODE, tmp_path, json.dumps(site.source)]
        with subprocess.Popen(order, stdout=subprocess.PIPE) as child:
            child.stdout.readline()  # it begins
            time.sleep(chance.uniform(0.02, 0.3))
            child.kill()
        left |= {path.parent.name for path in tmp_path.rglob("*.part")}
    assert left > {"None"}  # kills came while archives and while pictures were brought
    for images in (40, None):
        folder = download_coco(tmp_path / str(images), images, source=site.source)
        assert chosen(folder) == RECORDS and tree(folder) | {"dataset_coco.json": JSON} == WHOLE
