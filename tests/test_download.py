import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from urllib3.util import Retry

import mmkit
from mmkit import MmkitError, progress, transfer
from mmkit.__main__ import main
from mmkit.download import COCO, CocoSource, download_coco
from mmkit.transfer import Published

ALWAYS = 1000
CAPTIONS, TRAIN, VAL = "/caption_datasets.zip", "/zips/train2014.zip", "/zips/val2014.zip"


# --- COCO 2014 in small ----------------------------------------------------------------------


def jpeg(seed):
    noise = np.random.default_rng(seed).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def record(position, split):
    folder = "train2014" if split == "train" else "val2014"
    cocoid = 9 + 101 * position
    sentences = [
        {
            "tokens": ["picture", str(k)],
            "raw": f"Picture {k} – “{split}”.",
            "imgid": position,
            "sentid": 5 * position + k,
        }
        for k in range(5)
    ]
    return {
        "filepath": folder,
        "sentids": [sentence["sentid"] for sentence in sentences],
        "filename": f"COCO_{folder}_{cocoid:012}.jpg",
        "imgid": position,
        "split": split,
        "sentences": sentences,
        "cocoid": cocoid,
    }


SPLITS = ["test", "val", "restval", "train"] * 4 + ["test"] * 2 + ["restval"] * 4 + ["train"] * 18  # 6, 4, 8, 22
RECORDS = [record(position, split) for position, split in enumerate(SPLITS)]
PICTURES = {f"{one['filepath']}/{one['filename']}": jpeg(one["imgid"]) for one in RECORDS}
SOME = sorted(PICTURES)[3]  # of train2014


def captions_json(records=RECORDS):
    return json.dumps({"images": records, "dataset": "coco"}, ensure_ascii=False).encode()


def zipped(members):
    """A ZIP archive of (name or ZipInfo, bytes)."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return stream.getvalue()


def pictures_zip(folder):
    pictures = [(path, content) for path, content in PICTURES.items() if path.startswith(folder)]
    return zipped([(f"{folder}/", b""), *pictures])


FILES = {
    CAPTIONS: zipped([("dataset_coco.json", captions_json()), ("dataset_flickr8k.json", b"{}")]),
    TRAIN: pictures_zip("train2014"),
    VAL: pictures_zip("val2014"),
    **{f"/{path}": content for path, content in PICTURES.items()},
}
WHOLE = {"caption_datasets.zip": FILES[CAPTIONS], "dataset_coco.json": captions_json(), **PICTURES}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        site, asked = self.server, self.headers.get("Range")
        with site.lock:
            site.log.append(SimpleNamespace(path=self.path, range=asked, time=time.monotonic()))
            site.active += 1
            site.busiest = max(site.busiest, site.active)
            faults = site.faults.get(self.path, [])
            kind, value = faults.pop(0) if faults else ("", None)
        try:
            time.sleep(site.latency)
            self.answer(site, kind, value, int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0)
        except OSError:  # the client went away
            self.close_connection = True
        finally:
            with site.lock:
                site.active -= 1

    def answer(self, site, kind, value, start):
        content = site.files.get(self.path)
        if kind == "status" or content is None:
            code, headers = value if content is not None else (404, {})
            return self.send(code, b"no", headers)
        if kind == "body":
            content = value
        if kind == "silent":
            time.sleep(value)
        if kind == "endless":
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            while True:
                self.wfile.write(bytes(4096))
                site.sent += 4096
        if kind in ("ignore range", "ignore range and cut"):
            start = 0
        if kind == "416" or start >= len(content):
            return self.send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        body, headers = content[start:], {}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if kind == "wrong range":
            body, headers["Content-Range"] = content, f"bytes 0-{len(content) - 1}/{len(content)}"
        cut = value if "cut" in kind else None
        self.send(206 if start else 200, body, headers, announce=value if kind == "announce" else 0, cut=cut)

    def send(self, code, body, headers, announce=0, cut=None):
        self.send_response(code)
        for name, text in {"Content-Length": str(len(body) + announce), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        size, pause = self.server.pace
        for first in range(0, len(body[:cut]), size):
            self.wfile.write(body[:cut][first : first + size])
            time.sleep(pause)
        if announce or cut is not None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)


class Site(ThreadingHTTPServer):
    """Serves COCO's layout, and the faults that it is told."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.files, self.faults, self.log = dict(FILES), {}, []
        self.active = self.busiest = self.sent = 0
        self.pace, self.latency = (1 << 20, 0), 0
        self.top = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        pass

    def fail(self, path, kind, value=None, times=1):
        self.faults.setdefault(path, []).extend([(kind, value)] * times)

    def published(self, path):
        return Published(self.top + path, len(self.files[path]), hashlib.sha256(self.files[path]).hexdigest())

    @property
    def source(self):
        archives = {"train2014": self.published(TRAIN), "val2014": self.published(VAL)}
        return CocoSource(self.published(CAPTIONS), archives, f"{self.top}/")

    def asked(self):
        """The paths asked for since the last call."""
        paths = [one.path for one in self.log]
        self.log.clear()
        return paths


@pytest.fixture
def site():
    server = Site()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    retry = Retry(total=5, backoff_factor=0.01, backoff_max=0.05, backoff_jitter=0.01).increment("GET")
    monkeypatch.setattr(transfer, "RETRY", retry)  # 5 tries
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "coco"


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def chosen(folder):
    return json.loads((folder / "dataset_coco.json").read_bytes())["images"]


def paths(records):
    return {f"/{one['filepath']}/{one['filename']}" for one in records}


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def refused(folder, site, **options):
    with pytest.raises(MmkitError) as error:
        download_coco(folder, source=site.source, **options)
    return str(error.value)


# --- the whole, and a part of it -------------------------------------------------------------


def test_the_whole_comes_by_archives_byte_for_byte_and_nothing_else_is_left(site, folder):
    assert download_coco(folder, source=site.source) == folder
    assert tree(folder) == WHOLE
    assert sorted(site.asked()) == sorted([CAPTIONS, TRAIN, VAL])


def test_a_finished_folder_asked_again_makes_no_request(site, folder):
    for images in (None, 20):
        target = folder / str(images)
        download_coco(target, images, source=site.source)
        before = tree(target)
        site.asked()
        download_coco(target, images, source=site.source)
        assert site.asked() == [] and tree(target) == before


@pytest.mark.parametrize("images, counts", [(10, (2, 1, 7)), (20, (3, 2, 15)), (40, (6, 4, 30))])
def test_a_part_has_test_and_val_images_of_their_own_splits(site, folder, images, counts):
    download_coco(folder, images, source=site.source)
    kept, splits = chosen(folder), Counter("train" if s == "restval" else s for s in SPLITS)
    found = Counter("train" if one["split"] == "restval" else one["split"] for one in kept)
    assert (found["test"], found["val"], found["train"]) == counts and splits["test"] == 6
    assert kept == [one for one in RECORDS if one in kept]  # unchanged, in the order of the file
    assert all(json.dumps(one, ensure_ascii=False).encode() in tree(folder)["dataset_coco.json"] for one in kept)
    assert set(site.asked()) == {CAPTIONS} | paths(kept)
    expected = {path[1:] for path in paths(kept)} | {"caption_datasets.zip", "dataset_coco.json"}
    assert set(tree(folder)) == expected and all(
        tree(folder)[name] == PICTURES[name] for name in PICTURES if name in expected
    )


def test_a_larger_part_holds_the_smaller_one_and_fetches_only_the_rest(site, folder):
    before = set()
    for images in (10, 11, 20, 27, 40):
        download_coco(folder, images, source=site.source)
        now = paths(chosen(folder))
        assert before < now and len(now) == images
        assert set(site.asked()) - {CAPTIONS} == now - before
        before = now
    download_coco(folder, source=site.source)
    assert tree(folder) == WHOLE and site.asked() == []


def test_the_choice_is_the_same_everywhere_and_no_mere_beginning_of_the_file(site, tmp_path):
    choices = [chosen(download_coco(tmp_path / name, 20, source=site.source)) for name in "ab"]
    assert choices[0] == choices[1] != RECORDS[:20]
    assert {one["split"] for one in choices[0]} == {"train", "restval", "val", "test"}


@pytest.mark.parametrize("images", [9, 0, -1, 41])
def test_too_few_or_too_many_images_are_refused(site, folder, images):
    assert str(images) in refused(folder, site, images=images)
    assert not (folder / "dataset_coco.json").exists()


def test_published_constants():
    sizes = [one.size for one in (COCO.captions, *COCO.archives.values())]
    assert sizes == [36_745_453, 13_510_573_713, 6_645_013_297] and list(COCO.archives) == ["train2014", "val2014"]
    for one, name in zip((COCO.captions, *COCO.archives.values()), ("caption_datasets", *COCO.archives), strict=True):
        assert re.fullmatch("[0-9a-f]{64}", one.sha256) and one.url.endswith(f"/{name}.zip")
    assert COCO.captions.url.startswith("https://cs.stanford.edu/people/karpathy/deepimagesent/")
    assert COCO.image_url == "http://images.cocodataset.org/"


# --- what is there already -------------------------------------------------------------------


def test_a_folder_of_coco_2017_needs_the_captions_only(site, folder):
    names = [f"{('train', 'val')[i % 5 == 0]}2017/{path[-16:]}" for i, path in enumerate(PICTURES)]
    write(folder, dict(zip(names, PICTURES.values(), strict=True)))
    before = tree(folder)
    download_coco(folder, source=site.source)
    assert site.asked() == [CAPTIONS]
    assert tree(folder) == before | {name: WHOLE[name] for name in ("caption_datasets.zip", "dataset_coco.json")}


@pytest.mark.parametrize("lost, by_archive", [(1, False), (4, False), (5, True)])  # of 22: 20 % are 4.4
def test_few_missing_images_come_one_by_one_and_many_by_archive(site, folder, lost, by_archive):
    gone = [path for path in PICTURES if path.startswith("train2014")][:lost]
    write(folder, {name: content for name, content in WHOLE.items() if name not in gone})
    download_coco(folder, source=site.source)
    assert set(site.asked()) == ({TRAIN} if by_archive else {f"/{path}" for path in gone})
    assert tree(folder) == WHOLE


def test_an_empty_picture_is_fetched_again(site, folder):
    write(folder, WHOLE | {SOME: b""})
    download_coco(folder, source=site.source)
    assert site.asked() == [f"/{SOME}"] and tree(folder) == WHOLE


def test_a_picture_of_another_size_than_the_archives_member_is_unpacked_again(site, folder):
    write(folder, {SOME: PICTURES[SOME][:-9]})
    download_coco(folder, source=site.source)
    assert tree(folder) == WHOLE


def test_a_sound_archive_that_lies_there_is_used_and_a_damaged_one_replaced(site, folder):
    write(folder, {"train2014.zip": FILES[TRAIN], "val2014.zip": FILES[VAL][:-1] + b"x"})
    download_coco(folder, source=site.source)
    assert sorted(site.asked()) == sorted([CAPTIONS, VAL]) and tree(folder) == WHOLE


def test_an_archive_that_was_all_but_unpacked_is_used_for_the_rest(site, folder):
    write(folder, {name: content for name, content in WHOLE.items() if name != SOME} | {"train2014.zip": FILES[TRAIN]})
    download_coco(folder, source=site.source)
    assert site.asked() == [] and tree(folder) == WHOLE


def test_damaged_captions_in_the_folder_are_fetched_again(site, folder):
    write(folder, WHOLE | {"caption_datasets.zip": FILES[CAPTIONS][:-1] + b"x", "dataset_coco.json": b"{}"})
    download_coco(folder, source=site.source)
    assert site.asked() == [CAPTIONS] and tree(folder) == WHOLE


# --- faults of the transfer ------------------------------------------------------------------

PASSING = {
    "cut at once": ("cut", 0),
    "cut later": ("cut", 600),
    "announces more": ("announce", 700),
    "announces less": ("announce", -700),
    "429": ("status", (429, {"Retry-After": "0"})),
    "500": ("status", (500, {})),
    "503": ("status", (503, {"Retry-After": "soon"})),
    "corrupt": ("body", b"\xff\xd8" + bytes(3000)),
    "page": ("body", b"<html><body>Sign in to the network</body></html>"),
    "nothing": ("body", b" "),
    "truncated": ("body", PICTURES[SOME][:-800]),
}


@pytest.mark.parametrize("fault", PASSING)
@pytest.mark.parametrize("path", [f"/{SOME}", TRAIN, CAPTIONS], ids=["image", "archive", "captions"])
def test_a_fault_that_passes_is_survived(site, folder, path, fault):
    if path == f"/{SOME}":
        write(folder, {name: content for name, content in PICTURES.items() if name != SOME})
    site.fail(path, *PASSING[fault], times=2)
    download_coco(folder, source=site.source)
    assert tree(folder) == WHOLE
    assert site.asked().count(path) >= 3 and not site.faults[path]


def test_a_silent_server_is_asked_again_after_the_time_out(site, folder, monkeypatch):
    monkeypatch.setattr(transfer, "TIMEOUT", 0.2)
    site.fail(TRAIN, "silent", 1.0)
    download_coco(folder, source=site.source)
    assert tree(folder) == WHOLE and site.asked().count(TRAIN) == 2
    site.fail(f"/{SOME}", "silent", 0.5, times=ALWAYS)
    (folder / SOME).unlink()
    assert f"{SOME}: no answer within 0 s" in refused(folder, site)


@pytest.mark.parametrize("header, longest, least", [("1", 120.0, 1.0), ("3600", 0.3, 0.3)])
def test_retry_after_is_respected_up_to_a_limit(site, folder, monkeypatch, header, longest, least):
    monkeypatch.setattr(transfer, "RETRY_AFTER_MAX", longest)
    site.fail(CAPTIONS, "status", (429, {"Retry-After": header}))
    download_coco(folder, source=site.source)
    first, second = (one.time for one in site.log if one.path == CAPTIONS)
    assert least <= second - first < least + 3


def test_waits_grow_and_end():
    waits, retry = [], Retry(total=9, backoff_factor=0.5, backoff_max=60, backoff_jitter=1).increment("GET")
    for _ in range(8):
        retry = retry.increment("GET", error=OSError())
        waits.append(retry.get_backoff_time())
    assert all(
        base <= wait <= min(60, base + 1) for wait, base in zip(waits, [1, 2, 4, 8, 16, 32, 60, 60], strict=True)
    )


def test_a_broken_transfer_goes_on_where_it_stopped(site, folder):
    site.fail(TRAIN, "cut", 5000)
    download_coco(folder, source=site.source)
    assert [one.range for one in site.log if one.path == TRAIN] == [None, "bytes=5000-"]
    assert tree(folder) == WHOLE


@pytest.mark.parametrize("name", ["train2014.zip", "caption_datasets.zip"])
def test_a_part_left_by_a_killed_run_is_continued(site, folder, name):
    path = TRAIN if name.startswith("train") else CAPTIONS
    write(folder, {f"{name}.part": FILES[path][:700]})
    download_coco(folder, source=site.source)
    assert [one.range for one in site.log if one.path == path] == ["bytes=700-"] and tree(folder) == WHOLE


def test_a_part_that_has_all_bytes_is_not_asked_for(site, folder):
    write(folder, {"train2014.zip.part": FILES[TRAIN]})
    download_coco(folder, source=site.source)
    assert TRAIN not in site.asked() and tree(folder) == WHOLE


@pytest.mark.parametrize("rest", [FILES[TRAIN] + b"more", bytes(700)], ids=["too long", "of another file"])
def test_a_wrong_part_is_thrown_away(site, folder, rest):
    write(folder, {"train2014.zip.part": rest})
    download_coco(folder, source=site.source)
    assert tree(folder) == WHOLE


@pytest.mark.parametrize("kind", ["ignore range", "wrong range", "416"])
@pytest.mark.parametrize("path", [f"/{SOME}", TRAIN], ids=["image", "archive"])
def test_an_answer_that_does_not_go_on_starts_from_zero(site, folder, path, kind):
    if path == TRAIN:
        write(folder, {"train2014.zip.part": FILES[TRAIN][:700]})
    else:
        write(folder, {name: content for name, content in PICTURES.items() if name != SOME})
        write(folder, {f"{SOME}.part": PICTURES[SOME][:700]})
    site.fail(path, kind)
    download_coco(folder, source=site.source)
    assert next(one.range for one in site.log if one.path == path) == "bytes=700-"
    assert tree(folder) == WHOLE and not site.faults[path]


def test_the_count_of_tries_starts_anew_when_bytes_came(site, folder):
    site.fail(TRAIN, "cut", len(FILES[TRAIN]) // 13, times=12)  # the run has 5 tries
    download_coco(folder, source=site.source)
    assert tree(folder) == WHOLE and site.asked().count(TRAIN) == 13


def test_a_server_that_always_breaks_at_the_same_byte_is_given_up(site, folder):
    site.fail(TRAIN, "ignore range and cut", 5000, times=ALWAYS)
    message = refused(folder, site)
    assert site.top + TRAIN in message and "tried" in message and site.asked().count(TRAIN) < 12


@pytest.mark.parametrize("code", [403, 404, 410, 418])
def test_a_refusal_is_final(site, folder, code):
    site.fail(f"/{SOME}", "status", (code, {}), times=ALWAYS)
    message = refused(folder, site, images=40)
    assert f"{site.top}/{SOME}" in message and str(code) in message
    assert site.asked().count(f"/{SOME}") == 1


def test_a_missing_image_does_not_stop_the_others_and_a_second_run_brings_it_alone(site, folder):
    site.fail(f"/{SOME}", "status", (404, {}), times=ALWAYS)
    message = refused(folder, site, images=40)
    assert SOME in message and "1 file could" in message and "run the same command again" in message
    whole = {name: content for name, content in WHOLE.items() if name not in (SOME, "dataset_coco.json")}
    assert tree(folder) == whole
    site.faults.clear()
    site.asked()
    download_coco(folder, 40, source=site.source)
    assert site.asked() == [f"/{SOME}"]
    assert {name: content for name, content in tree(folder).items() if name != "dataset_coco.json"} == whole | {
        SOME: PICTURES[SOME]
    }


def test_of_many_missing_images_five_are_named(site, folder):
    gone = list(PICTURES)[:7]
    for path in gone:
        site.fail(f"/{path}", "status", (404, {}), times=ALWAYS)
    message = refused(folder, site, images=40)
    assert "7 files" in message and sum(path in message for path in gone) == 5


def test_a_missing_archive_does_not_stop_the_other(site, folder):
    site.fail(TRAIN, "status", (404, {}), times=ALWAYS)
    assert site.top + TRAIN in refused(folder, site)
    pictures = {path: content for path, content in PICTURES.items() if path.startswith("val2014")}
    assert tree(folder) == pictures | {"caption_datasets.zip": FILES[CAPTIONS]}
    site.faults.clear()
    site.asked()
    download_coco(folder, source=site.source)
    assert site.asked() == [TRAIN] and tree(folder) == WHOLE


def test_a_server_that_is_down_is_not_asked_for_every_image(site, folder):
    for path in PICTURES:
        site.fail(f"/{path}", "status", (503, {}), times=ALWAYS)
    message = refused(folder, site, images=40, connections=2)
    assert "10 files in a row" in message and "503" in message
    assert len(set(site.asked()) - {CAPTIONS}) < 20


def test_no_server_is_an_error_that_names_the_address(site, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/caption_datasets.zip"
        with pytest.raises(MmkitError, match="refused") as error:
            download_coco(folder, source=replace(site.source, captions=replace(site.source.captions, url=url)))
    assert url in str(error.value) and "\n" not in str(error.value)


# --- what came is judged ---------------------------------------------------------------------


def test_a_wrong_hash_is_tried_three_times_and_named(site, folder):
    source, wrong = site.source, FILES[TRAIN][:-1] + b"x"
    site.files[TRAIN] = wrong
    with pytest.raises(MmkitError) as error:
        download_coco(folder, source=source)
    assert all(
        text in str(error.value)
        for text in (site.top + TRAIN, hashlib.sha256(wrong).hexdigest(), source.archives["train2014"].sha256)
    )
    assert site.asked().count(TRAIN) == 3
    assert not list(folder.glob("train2014*")) and not (folder / "dataset_coco.json").exists()


@pytest.mark.parametrize("content", [FILES[TRAIN] + b"x", FILES[TRAIN][:-1]], ids=["longer", "shorter"])
def test_a_wrong_size_is_named(site, folder, content):
    source = site.source
    site.files[TRAIN] = content
    with pytest.raises(MmkitError) as error:
        download_coco(folder, source=source)
    assert all(text in str(error.value) for text in (site.top + TRAIN, f"{len(content):,}", f"{len(FILES[TRAIN]):,}"))
    assert not (folder / "train2014.zip").exists()


def test_an_answer_of_another_size_does_not_cost_the_part(site, folder):
    write(folder, {"train2014.zip.part": FILES[TRAIN][:7000]})
    site.fail(TRAIN, "ignore range")
    site.faults[TRAIN][0] = ("body", b"<html>" * 5000)
    site.fail(TRAIN, "status", (404, {}))
    refused(folder, site)
    assert (folder / "train2014.zip.part").read_bytes() == FILES[TRAIN][:7000]


@pytest.mark.parametrize(
    "body, reason", [(b"<html>404</html>", "not an image"), (PICTURES[SOME][:-800], "truncated")], ids=["page", "half"]
)
def test_a_picture_that_is_none_is_tried_three_times_and_named(site, folder, body, reason):
    site.fail(f"/{SOME}", "body", body, times=ALWAYS)
    message = refused(folder, site, images=40)
    assert f"{site.top}/{SOME}" in message and reason in message
    assert site.asked().count(f"/{SOME}") == 3
    assert not (folder / SOME).exists() and not (folder / f"{SOME}.part").exists()


@pytest.mark.parametrize("path", [f"/{SOME}", TRAIN], ids=["image", "archive"])
def test_an_endless_body_is_stopped(site, folder, monkeypatch, path):
    monkeypatch.setattr(transfer, "IMAGE_LIMIT", 300_000)
    if path != TRAIN:
        write(folder, {name: content for name, content in PICTURES.items() if name != SOME})
    site.fail(path, "endless", times=ALWAYS)
    message = refused(folder, site)
    assert site.top + path in message and "bytes" in message
    assert site.sent < 30_000_000 and site.asked().count(path) == 3
    assert not list(folder.rglob("*.part"))


def test_an_endless_body_that_ends_at_the_next_request_is_survived(site, folder):
    site.fail(TRAIN, "endless")
    download_coco(folder, source=site.source)
    assert tree(folder) == WHOLE


# --- archives and records that are not as they should ----------------------------------------


def symlink(name):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    "member",
    ["../evil", "train2014/../../evil", "/abs", "C:\\x", "train2014\\evil", "elsewhere/x.jpg", "train2014/a/x.jpg",
     symlink("train2014/link")],
    ids=str,
)  # fmt: skip
def test_an_archive_with_an_unsafe_member_is_not_unpacked(site, tmp_path, member):
    site.files[TRAIN] = zipped([(SOME, PICTURES[SOME]), (member, b"../../evil")])
    folder = tmp_path / "above" / "coco"
    message = refused(folder, site)
    name = member if isinstance(member, str) else member.filename
    assert "train2014.zip" in message and repr(name) in message
    assert [path.name for path in tmp_path.rglob("*") if not path.is_relative_to(folder)] == ["above"]
    assert not [path for path in tree(folder) if not path.startswith("val2014/") and path != "caption_datasets.zip"]


def without_hash(site):
    archives = {name: replace(one, sha256=None) for name, one in site.source.archives.items()}
    return replace(site.source, archives=archives)


@pytest.mark.parametrize("damage", ["member", "not a picture", "missing", "end"])
def test_a_damaged_archive_of_a_mirror_without_hashes_is_named_and_fetched_again(site, folder, damage):
    if damage == "member":
        middle = FILES[TRAIN].index(SOME.encode()) + 600
        site.files[TRAIN] = FILES[TRAIN][:middle] + b"damaged!" + FILES[TRAIN][middle + 8 :]
    elif damage == "end":
        site.files[TRAIN] = FILES[TRAIN][:-400]
    else:
        pictures = {path: PICTURES[path] for path in PICTURES if path.startswith("train") and path != SOME}
        site.files[TRAIN] = zipped([*pictures.items(), *([(SOME, b"text")] if damage == "not a picture" else [])])
    with pytest.raises(MmkitError) as error:
        download_coco(folder, source=without_hash(site))
    assert "train2014.zip" in str(error.value) and (damage == "end" or SOME in str(error.value))
    assert not (folder / SOME).exists() and not (folder / "train2014.zip").exists()
    assert not list(folder.rglob("*.part"))
    site.files[TRAIN] = FILES[TRAIN]
    download_coco(folder, source=without_hash(site))
    assert tree(folder) == WHOLE


@pytest.mark.parametrize(
    "change",
    [
        {"filename": "../../evil.jpg"},
        {"filename": "../evil.jpg"},
        {"filename": "/evil.jpg"},
        {"filename": "..\\evil.jpg"},
        {"filename": ""},
        {"filepath": ".."},
        {"filepath": "train2014/.."},
        {"filepath": "/tmp"},
    ],
    ids=str,
)
def test_a_record_that_leaves_the_folder_is_refused(site, folder, change):
    records = [RECORDS[0] | change, *RECORDS[1:]]
    site.files[CAPTIONS] = zipped([("dataset_coco.json", captions_json(records))])
    one = records[0]
    message = refused(folder, site)
    assert "caption_datasets.zip" in message and repr(f"{one['filepath']}/{one['filename']}") in message
    assert site.asked() == [CAPTIONS] and list(tree(folder)) == ["caption_datasets.zip"]


@pytest.mark.parametrize(
    "archive",
    [
        zipped([("other.json", b"{}")]),
        zipped([("dataset_coco.json", b'{"images": [')]),
        zipped([("dataset_coco.json", captions_json([RECORDS[0] | {"split": "validation"}]))]),
        b"no archive",
    ],
    ids=["member is missing", "half a JSON", "unknown split", "no ZIP"],
)
def test_captions_that_cannot_be_read_are_named_and_fetched_again(site, folder, archive):
    site.files[CAPTIONS] = archive
    message = refused(folder, site)
    assert "caption_datasets.zip" in message and "dataset_coco.json" in message
    site.files[CAPTIONS] = FILES[CAPTIONS]
    download_coco(folder, source=site.source)
    assert tree(folder) == WHOLE


# --- the machine -----------------------------------------------------------------------------


def with_free(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**13, used=0, free=int(free)))


def test_a_full_disk_is_named_before_the_first_request(site, folder, monkeypatch):
    with_free(monkeypatch, 12_340_000_000)
    with pytest.raises(MmkitError) as error:
        download_coco(folder, source=replace(site.source, archives=COCO.archives))
    assert "40.31 GB" in str(error.value) and "12.34 GB" in str(error.value) and str(folder) in str(error.value)
    with pytest.raises(MmkitError, match=r"17\.00 GB"):
        download_coco(folder, 100_000, source=site.source)
    assert site.asked() == [] and tree(folder) == {}


def test_what_is_there_needs_no_room(site, folder, monkeypatch):
    captions, train, val = (len(FILES[path]) for path in (CAPTIONS, TRAIN, VAL))
    need = 5 * captions + 2 * (train + val)
    with_free(monkeypatch, need - 1)
    assert "GB" in refused(folder, site)
    write(folder, {"train2014.zip.part": FILES[TRAIN][:5000]})
    with_free(monkeypatch, need - 5001)
    assert "GB" in refused(folder, site)
    with_free(monkeypatch, need - 5000)
    download_coco(folder, source=site.source)
    with_free(monkeypatch, 0)
    download_coco(folder, source=site.source)
    (folder / SOME).unlink()
    with_free(monkeypatch, 169_999)
    assert "GB" in refused(folder, site)
    with_free(monkeypatch, 170_000)
    download_coco(folder, source=site.source)
    assert tree(folder) == WHOLE


def test_a_folder_that_cannot_be_written_is_an_error_before_any_request(site, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "coco"):
        assert str(folder) in refused(folder, site)
    if os.geteuid():
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o555)
        assert str(closed) in refused(closed, site)
    assert site.asked() == [] and (tmp_path / "file").read_text() == "mine"


def test_a_fault_of_the_disk_stops_with_the_files_name(site, folder):
    write(folder, {"train2014": b"a file where the folder should be"})
    message = refused(folder, site, images=40)
    assert str(folder / "train2014") in message and "cannot be written" in message


def test_several_connections_work_at_once(site, tmp_path):
    site.latency = 0.03
    for connections, busiest in ((1, 1), (4, 4)):
        site.busiest = 0
        download_coco(tmp_path / str(connections), 20, connections, site.source)
        assert site.busiest == busiest
    site.busiest = 0
    download_coco(tmp_path / "archives", source=site.source)
    assert site.busiest == 2
    assert "connection" in refused(tmp_path / "none", site, connections=0)


def test_a_second_process_waits_and_says_so(site, folder, capsys):
    folder.mkdir()
    held = FileLock(folder / ".download.lock")
    held.acquire()
    waiting = threading.Thread(target=download_coco, args=(folder,), kwargs={"source": site.source})
    waiting.start()
    time.sleep(0.5)
    assert site.asked() == [] and waiting.is_alive()
    held.release()
    waiting.join(10)
    printed = capsys.readouterr().err
    assert str(folder) in printed and "Another process" in printed and printed.count("\n") == 1
    assert tree(folder) == WHOLE


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also where the tests run in the background and a shell has switched it off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_stops_all_threads_soon_and_keeps_the_parts(site, folder):
    site.pace = (1000, 0.05)  # an archive takes many seconds
    main = threading.main_thread().ident

    def interrupt():
        while not (folder / "train2014.zip.part").exists():
            time.sleep(0.02)
        time.sleep(0.5)
        interrupt.at = time.monotonic()
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        download_coco(folder, source=site.source)
    assert time.monotonic() - interrupt.at < 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPool")]
    left = tree(folder)
    assert set(left) == {"caption_datasets.zip", "train2014.zip.part", "val2014.zip.part"}
    size = len(left["train2014.zip.part"])
    assert 0 < size < len(FILES[TRAIN])
    site.pace = (1 << 20, 0)
    site.asked()
    download_coco(folder, source=site.source)
    assert f"bytes={size}-" in [one.range for one in site.log] and tree(folder) == WHOLE


# --- progress --------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_bytes_pictures_and_unpacking(site, folder, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    write(folder, {"train2014.zip.part": FILES[TRAIN][:100_000]})
    download_coco(folder, source=site.source)
    (folder / SOME).unlink()
    download_coco(folder, source=site.source)
    shown = terminal.getvalue()
    assert re.search(r"captions: +\d+%.*B/s\]", shown)
    share = 100_000 / (len(FILES[TRAIN]) + len(FILES[VAL]))
    assert int(re.search(r"archives: +(\d+)%.*B/s\]", shown)[1]) == round(100 * share)
    assert re.search(r"unpacking: +\d+%.*/40 .*images/s\]", shown)
    assert re.search(r"images: +\d+%.*/1 .*images/s\]", shown)


def test_no_terminal_gets_no_line(site, folder, capsys):
    download_coco(folder, source=site.source)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_notebook_keeps_a_summary(monkeypatch):
    lines = []

    class Line(progress._NotebookLine):
        def __init__(self):
            pass

        def _show(self, line):
            lines.append(line)

    monkeypatch.setattr(progress, "_in_notebook", lambda: True)
    monkeypatch.setattr(progress, "_NotebookLine", Line)
    assert list(progress.progress("abc", "reading", unit="letters")) == list("abc")
    assert re.fullmatch(r"reading: 3 letters in \d+\.\d s", lines[-1])
    with progress.progress_bar("archives", 20_200_000_000, unit="B", scale=True) as bar:
        bar.update(20_200_000_000)
    assert re.fullmatch(r"archives: 20\.2GB in \d+\.\d s", lines[-1])


def test_threads_do_not_lose_counts():
    class Line:
        n = 0

        def update(self, n):
            before = self.n
            time.sleep(0.0002)
            self.n = before + n

    line = Line()
    bar = progress.Bar(line)
    threads = [threading.Thread(target=lambda: [bar.update() for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert line.n == 200


def test_the_bar_counts_each_byte_once(site, folder, monkeypatch):
    counts = Counter()

    class Counting(progress.Bar):
        def update(self, n=1):
            counts[self._line.desc.rstrip(": ")] += n

    monkeypatch.setattr(progress, "Bar", Counting)
    monkeypatch.setattr(sys, "stderr", Terminal())
    write(folder, {"train2014.zip.part": FILES[TRAIN][:7000], "val2014.zip.part": bytes(500)})
    for kind, value in (("ignore range", None), ("cut", 9000), ("416", None), ("cut", 3000), ("announce", 9)):
        site.fail(TRAIN, kind, value)
    download_coco(folder, source=site.source)
    assert counts == {
        "captions": len(FILES[CAPTIONS]),
        "archives": len(FILES[TRAIN]) + len(FILES[VAL]) - 7500,
        "unpacking": 40,
    }


# --- SIGKILL ---------------------------------------------------------------------------------

KILLER = """
import json, os, pathlib, random, shutil, signal, sys, time
from mmkit.download import CocoSource, Published, download_coco
order = json.loads(sys.argv[1])
archives = {name: Published(*one) for name, one in order["archives"].items()}
source = CocoSource(Published(*order["captions"]), archives, order["image_url"])
rng, killed, moments = random.Random(order["seed"]), 0, set()
while killed < 20 or (order["moment"] not in moments and killed < 100):
    child = os.fork()
    if not child:
        try:
            download_coco(order["folder"], order["images"], 4, source)
        finally:
            os._exit(0)
    time.sleep(rng.uniform(0.02, order["longest"]))
    os.kill(child, signal.SIGKILL)
    if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
        killed += 1
        left = sorted(path.name for path in pathlib.Path(order["folder"]).rglob("*"))
        moments |= {name.partition(".")[2] for name in left if name.endswith(".part")}
        if any(name.endswith("2014.zip") for name in left) and any(".jpg" in name for name in left):
            moments.add("unpacking")
    else:  # it was done before
        shutil.rmtree(order["folder"])
print(*sorted(moments))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize(
    "images, pace, longest, moment",
    [
        (None, (2048, 0.01), 0.2, "zip.part"),
        (None, (1 << 20, 0), 0.1, "unpacking"),  # the archives come at once, and kills land in the unpacking
        (40, (1024, 0.01), 0.2, "jpg.part"),
    ],
    ids=["archives", "unpacking", "single images"],
)
def test_twenty_kills_leave_nothing_behind(site, tmp_path, images, pace, longest, moment):
    undisturbed = tree(download_coco(tmp_path / "undisturbed", images, source=site.source))
    site.pace = pace
    folder, source = tmp_path / "coco", site.source
    order = {
        "folder": str(folder),
        "images": images,
        "longest": longest,
        "moment": moment,
        "seed": 7,
        "captions": [source.captions.url, source.captions.size, source.captions.sha256],
        "archives": {name: [one.url, one.size, one.sha256] for name, one in source.archives.items()},
        "image_url": source.image_url,
    }
    run = subprocess.run(
        [sys.executable, "-c", KILLER, json.dumps(order)], capture_output=True, text=True, timeout=120, check=True
    )
    assert moment in run.stdout.split()  # some kills came then
    site.pace = (1 << 20, 0)
    download_coco(folder, images, source=source)
    assert tree(folder) == undisturbed


# --- a terminal --------------------------------------------------------------------------------


def test_the_commands_download_and_check_work_together(site, folder, monkeypatch, capsys):
    monkeypatch.setattr(mmkit, "download_coco", partial(download_coco, source=site.source))
    assert main(["download", "coco", str(folder), "--images", "20", "--connections", "3"]) == 0
    assert f"20 images, 100 captions in {folder} (train 15, val 2, test 3)" in capsys.readouterr().out
    assert main(["check", str(folder)]) == 0
    assert "train: " in capsys.readouterr().out


def test_a_download_that_fails_exits_with_2_and_names_the_url(site, folder, monkeypatch, capsys):
    monkeypatch.setattr(mmkit, "download_coco", partial(download_coco, source=site.source))
    site.fail(CAPTIONS, "status", (404, {}), times=ALWAYS)
    assert main(["download", "coco", str(folder)]) == 2
    said = capsys.readouterr()
    assert "404" in said.err and CAPTIONS in said.err and "Remedy" in said.err and said.out == ""
