"""What an extraction may store beyond pooled features, and that processes and kills leave no trace in the bytes."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from test_features import array_bytes, forbid_encoding, stores, tiny_encoders

from mmkit import MmkitError, extract_features, extraction

SCRIPT = """
import sys, time
import torch
torch.set_num_threads(1)
from test_features import tiny_encoders
from mmkit import ImageEncoder, extract_features, extraction, load_captions
extraction._SAVE_EVERY = 1
forward, pause = ImageEncoder.forward, float(sys.argv[3])
def slow(self, pixels):
    time.sleep(pause)
    return forward(self, pixels)
ImageEncoder.forward = slow
dataset = load_captions(sys.argv[1]).select(range(60))
print("begins", flush=True)
extract_features(dataset, tiny_encoders(), sys.argv[2], "float32", grids=True, tokens=True)
"""


def everything(dataset, cache, **options):
    return extract_features(dataset, tiny_encoders(), cache, "float32", grids=True, tokens=True, **options)


def files(cache):
    (folder,) = stores(cache)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    cache = tmp_path_factory.mktemp("whole")
    return everything(dataset, cache), files(cache)


@pytest.fixture
def script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


def environment():
    return os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}


# --- grids and tokens ------------------------------------------------------------------------


def test_grids_are_the_cells_of_the_feature_map_row_by_row(whole, dataset):
    store, _ = whole
    encoders = tiny_encoders()
    grid = encoders.image(encoders.preprocessor.preprocess_image(dataset.image(7))[None]).grid[0]
    found = store.select([3, 7]).grids([1])[0]
    assert found.shape == (16, 6) and found.dtype == torch.float32
    torch.testing.assert_close(found[6], grid[:, 1, 2], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(found, grid.flatten(1).T, atol=2e-3, rtol=2e-3)


def test_the_mean_of_the_grid_is_the_pooled_feature(whole):
    part = whole[0].select()
    torch.testing.assert_close(part.grids().mean(dim=1), part.images(), atol=4e-3, rtol=4e-3)


def test_tokens_are_those_of_each_caption_padded_with_zeros(whole, dataset):
    store, _ = whole
    encoders, rows = tiny_encoders(), [0, 299, 41, 17]
    tokens, mask = store.select().tokens(rows)
    for row, found, real in zip(rows, tokens, mask, strict=True):
        expected = encoders.text(**encoders.preprocessor.preprocess_text(dataset.captions[row])).tokens[0]
        assert int(real.sum()) == len(expected) and real.tolist() == sorted(real.tolist(), reverse=True)
        torch.testing.assert_close(found[: len(expected)], expected, atol=4e-3, rtol=4e-3)
        assert not found[len(expected) :].any()
    assert tokens.shape[1] == int(mask.sum(dim=1).max())


def test_the_masked_mean_of_the_tokens_is_the_pooled_feature(whole):
    part = whole[0].select(range(10, 30))
    tokens, mask = part.tokens()
    mean = (tokens * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    torch.testing.assert_close(mean, part.captions(), atol=4e-3, rtol=4e-3)


def test_equal_captions_share_their_tokens(dataset, tmp_path):
    captions = list(dataset.captions[:20])
    captions[7] = captions[19] = captions[0]
    part = dataclasses.replace(dataset.select(range(4)), captions=tuple(captions))
    store = everything(part, tmp_path)
    spans = store.arrays["token_spans"]
    assert spans[7].tolist() == spans[19].tolist() == spans[0].tolist()
    assert len(store.arrays["tokens"]) == spans[np.unique(captions, return_index=True)[1], 1].sum()


def test_no_tokens_of_no_captions(whole):
    tokens, mask = whole[0].select([]).tokens()
    assert tokens.shape == (0, 0, 16) and mask.shape == (0, 0)


@pytest.mark.parametrize("name", ["grids", "tokens"])
def test_what_is_not_stored_is_an_error_with_the_remedy(store, name):
    with pytest.raises(MmkitError, match=rf"no {name}.*extract_features\(…, {name}=True\)"):
        getattr(store.select([0]), name)()


def test_the_store_tells_its_arrays_and_its_size(whole):
    store, content = whole
    tokens = len(store.arrays["tokens"])
    assert repr(store) == f"FeatureStore((60, 6) images, (300, 16) captions, (60, 16, 6) grids, ({tokens}, 16) tokens)"
    headers = sum(128 for name in content if name.endswith(".npy"))
    assert store.size == sum(len(bytes_) for name, bytes_ in content.items() if name.endswith(".npy")) - headers


def test_optional_arrays_make_another_store_and_leave_the_pooled_bytes(dataset, tmp_path, whole):
    extract_features(dataset, tiny_encoders(), tmp_path, "float32")
    images, captions = array_bytes(tmp_path)
    assert images == whole[1]["images.npy"] and captions == whole[1]["captions.npy"]
    everything(dataset.select([0]), tmp_path)
    assert len(stores(tmp_path)) == 2


# --- numbers ---------------------------------------------------------------------------------


def test_half_precision_costs_less_than_a_thousandth(dataset, tmp_path):
    half, single = (everything(dataset, tmp_path / kind, dtype=kind).select() for kind in ("float16", "float32"))
    assert single.sources["images"].dtype == np.float32
    for found, exact in ((half.images(), single.images()), (half.grids(), single.grids())):
        assert 0 < ((found - exact).norm() / exact.norm()).item() < 1e-3


def test_features_too_large_for_half_precision_are_refused(dataset, tmp_path):
    encoders = tiny_encoders()
    encoders.image.backbone.weight *= 1e6
    part = dataset.select([0, 1])
    with pytest.raises(MmkitError, match=r'do not fit into float16.*dtype="float32"'):
        extract_features(part, encoders, tmp_path, "float32")
    assert np.isfinite(extract_features(part, encoders, tmp_path, "float32", dtype="float32").image_features).all()


def test_an_unknown_dtype_lists_the_valid_ones(dataset, tmp_path):
    with pytest.raises(MmkitError, match=r"'int8'.*float16, float32"):
        extract_features(dataset, tiny_encoders(), tmp_path, dtype="int8")
    assert list(tmp_path.iterdir()) == []


# --- keys ------------------------------------------------------------------------------------


def test_another_transform_object_with_the_same_effect_finds_the_store(dataset, tmp_path, monkeypatch):
    transform = tiny_encoders().image.transform

    def crop(image):
        return transform(image)

    part = dataset.select([0, 1])
    extract_features(part, tiny_encoders(), tmp_path, "float32")
    encoders = tiny_encoders()
    encoders.preprocessor.transform = crop
    forbid_encoding(monkeypatch)
    extract_features(part, encoders, tmp_path, "float32")


def test_another_tokenizer_makes_another_store(dataset, tmp_path):
    part = dataset.select([0, 1])
    extract_features(part, tiny_encoders(), tmp_path, "float32")
    encoders = tiny_encoders()
    tokenizer = encoders.preprocessor.tokenizer.__class__.from_pretrained(encoders.preprocessor.tokenizer.name_or_path)
    tokenizer.add_tokens(["zebra crossing"])
    encoders.preprocessor.tokenizer = tokenizer
    extract_features(part, encoders, tmp_path, "float32")
    assert len(stores(tmp_path)) == 2


# --- disks, processes, kills -----------------------------------------------------------------


def test_a_full_disk_is_told_before_the_work(dataset, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(extraction.shutil, "disk_usage", lambda path: usage(0, 0, 10_000))
    forbid_encoding(monkeypatch)
    with pytest.raises(MmkitError, match=r"need 0\.00 GB.*0\.00 GB free.*MMKIT_CACHE"):
        extract_features(dataset, tiny_encoders(), tmp_path, "float32")
    assert [path.name for path in (tmp_path / "features").iterdir() if path.is_dir()] == []


def test_two_processes_of_one_job_share_the_work_and_give_the_same_bytes(scenes_folder, tmp_path, script, whole):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    job = [*command, str(script), str(scenes_folder), str(tmp_path / "cache"), "0"]
    done = subprocess.run(job, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "cache") == whole[1]


def test_random_kills_leave_no_trace(scenes_folder, tmp_path, script, whole):
    chance, interrupted = random.Random(3), 0
    job = [sys.executable, str(script), str(scenes_folder), str(tmp_path / "cache")]
    for _ in range(4):
        child = subprocess.Popen([*job, "0.15"], env=environment(), stdout=subprocess.PIPE, text=True)
        assert child.stdout.readline() == "begins\n"
        time.sleep(chance.uniform(0.3, 1.2))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        interrupted += bool(list((tmp_path / "cache" / "features").glob("*.part")))
    assert interrupted >= 3
    subprocess.run([*job, "0"], env=environment(), check=True, capture_output=True, timeout=300)
    assert files(tmp_path / "cache") == whole[1]
    assert not list((tmp_path / "cache" / "features").glob("*.part"))


def test_a_store_that_holds_more_will_do_and_a_damaged_one_is_passed_over(dataset, encoders, tmp_path):
    few = dataset.select(range(6))
    rich = extract_features(few, encoders, tmp_path, "float32", grids=True, tokens=True)
    for asked in ({}, {"grids": True}, {"tokens": True}):
        found = extract_features(few, encoders, tmp_path, "float32", **asked)
        assert found.manifest == rich.manifest
    folders = [path for path in (tmp_path / "features").iterdir() if path.is_dir()]
    assert len(folders) == 1
    (folders[0] / "images.npy").write_bytes(b"damaged")
    plain = extract_features(few, encoders, tmp_path, "float32")
    assert "grids" not in plain.arrays and plain.image_features.shape == rich.image_features.shape
