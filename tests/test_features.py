import copy
import dataclasses
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import BertConfig, BertModel

from mmkit import store
from mmkit.data import CaptionDataset, load_captions
from mmkit.encoders import Encoders, ImageEncoder, TextEncoder
from mmkit.features import PADDING, PairedFeatures, extract_features, extract_texts, pad_cat
from mmkit.preprocess import MultimodalPreprocessor, image_transform, packaged_tokenizer
from mmkit.store import FeatureTable, Shard
from mmkit.support import MissingFile, MmkitError

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def tiny_encoders(seed=0, pooling="mean", max_tokens=32, squash=False):
    """Real encoder classes around backbones that cost next to nothing."""
    torch.manual_seed(seed)
    transform = image_transform(size=64, resize=72, squash=squash)
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    image = ImageEncoder("tiny", nn.Conv2d(3, 6, 16, stride=16), 6, transform)
    text = TextEncoder("tiny", BertModel(config), 16, packaged_tokenizer(), pooling)
    return Encoders(image, text, MultimodalPreprocessor(transform, text.tokenizer, max_tokens))


def extract(dataset, cache, encoders=None, **options):
    return extract_features(dataset, encoders or tiny_encoders(), cache, **{"precision": "float32"} | options)


def everything(dataset, cache, encoders=None):
    return extract(dataset, cache, encoders, grids=True, tokens=True)


def album(root, count):
    """Photos of noise, all of one size in bytes, with two captions each, of which one is the same for all."""
    root.mkdir(parents=True, exist_ok=True)
    files = tuple(f"{n}.bmp" for n in range(count))
    for number, file in enumerate(files):
        noise = np.random.default_rng(number).integers(0, 255, (80, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / file)
    captions = tuple(text for n in range(count) for text in (f"photo {n}", "noise"))
    return CaptionDataset(root, tuple(range(count)), files, captions, np.arange(count).repeat(2))


def shards(cache):
    return sorted(path.parent for path in Path(cache).glob("features/*/*/shard.json"))


def same(first, second):
    """Whether two features hold the same bits."""
    arrays = [[part.images(), part.captions(), part.grids(), *part.tokens()] for part in (first, second)]
    return all(torch.equal(one, other) for one, other in zip(*arrays, strict=True))


@pytest.fixture
def encoded(monkeypatch):
    """How many `pictures` and `texts` each batch had that was encoded; the one with the number `broken` breaks off."""
    encoded = SimpleNamespace(pictures=[], texts=[], broken={})
    for kind, counts in ((ImageEncoder, encoded.pictures), (TextEncoder, encoded.texts)):

        def counting(self, *args, kind=kind, counts=counts, forward=kind.forward, **kwargs):
            if len(counts) == encoded.broken.get(kind):
                raise KeyboardInterrupt
            counts.append(len([*args, *kwargs.values()][0]))
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", counting)
    return encoded


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """The cache of an extraction that nothing disturbed, and its features."""
    cache = tmp_path_factory.mktemp("whole")
    return cache, everything(dataset, cache)


def test_rows_are_what_the_encoders_give_in_the_order_of_the_dataset(features, dataset, encoders):
    rows, close = range(0, 60, 7), {"atol": 4e-3, "rtol": 4e-3}
    image = encoders.image(torch.stack([encoders.preprocessor.preprocess_image(dataset.image(i)) for i in rows]))
    torch.testing.assert_close(features.images(rows), image.pooled, **close)
    torch.testing.assert_close(features.grids(rows), image.grid.flatten(2).transpose(1, 2), **close)  # row by row
    text = encoders.text(**encoders.preprocessor.preprocess_text(dataset.captions[::4]))
    torch.testing.assert_close(features.captions(slice(None, None, 4)), text.pooled, **close)
    tokens, mask = features.tokens(range(0, 300, 4))
    assert torch.equal(mask, text.mask) and not tokens[mask == 0].any()
    torch.testing.assert_close(tokens, text.tokens * mask[..., None], **close)
    assert features.image_index.tolist() == dataset.image_index.tolist() and features.image_index.dtype == torch.int64
    assert features.image_ids.tolist() == list(dataset.image_ids) and features.dims == (1280, 384)
    assert repr(features) == "PairedFeatures(60 × 1280 images, 300 × 384 captions, grids, tokens)"
    assert features.manifest["precision"] == "float32" and features.manifest["dataset"] == dataset.fingerprint()


def test_a_second_call_encodes_nothing_and_another_cache_gets_the_same_bits(dataset, whole, tmp_path, encoded):
    cache, features = whole
    assert same(everything(dataset, cache), features) and not encoded.pictures + encoded.texts
    assert same(everything(dataset, tmp_path), features)
    assert sum(encoded.pictures) == 60 and sum(encoded.texts) == len(set(dataset.captions))  # equal texts once
    array = features.image_table.shards[0].parts
    assert isinstance(array, np.memmap) and array.dtype == np.float16 and not array.flags.writeable


@linux
def test_reading_a_large_table_takes_no_more_memory_than_its_rows(tmp_path):
    np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.float16, (300_000, 512))  # 300 MB, most of them a hole
    shard, rows = Shard(np.load(tmp_path / "a.npy", mmap_mode="r")), np.arange(300_000)
    table = FeatureTable([shard], 0 * rows, rows)

    def mapped():  # MB
        return int(Path("/proc/self/status").read_text().split("RssFile:")[1].split()[0]) / 1024

    before = mapped()
    for some in np.split(rows, 15):
        table.select(some).vectors()
    assert mapped() - before < 60


@linux
def test_few_files_are_open_and_a_disk_that_cannot_be_read_loses_nothing(tmp_path, monkeypatch):
    encoders, opened = tiny_encoders(), len([*Path("/proc/self/fd").iterdir()])
    tables = [extract_texts([f"{n} {m}" for m in range(130)], encoders, tmp_path, "float32") for n in range(8)]
    before = shards(tmp_path)
    assert len([*Path("/proc/self/fd").iterdir()]) - opened <= len(before) == sum(len(one.shards) for one in tables)
    monkeypatch.setattr(store, "sha256_of", Mock(side_effect=OSError(5, "Input/output error")))
    with pytest.raises(MmkitError, match=rf"{before[0]} cannot be read \(Input/output error\)"):
        extract_texts(["0 0"], encoders, tmp_path, "float32")
    assert shards(tmp_path) == before


def test_a_new_photo_costs_one_and_folders_that_share_photos_share_rows(tmp_path, encoded):
    first = extract(album(tmp_path / "a", 5), tmp_path)
    assert sum(encoded.pictures) == 5 and sum(encoded.texts) == 6 and len(first.captions()) == 10  # equal texts once
    grown = extract(album(tmp_path / "a", 6), tmp_path)
    assert torch.equal(grown.images(range(5)), first.images())
    other = extract(album(tmp_path / "b", 6).select([5, 2]), tmp_path)
    assert torch.equal(other.images(), grown.images([5, 2])) and torch.equal(other.captions([1]), grown.captions([3]))
    assert sum(encoded.pictures) == 6 and sum(encoded.texts) == 7


def test_a_photo_that_changed_in_place_is_noticed_whatever_its_size_and_date(tmp_path, encoded):
    photos, path = album(tmp_path / "a", 5), tmp_path / "a" / "3.bmp"
    before, state = extract(photos, tmp_path).images(), path.stat()
    Image.open(path).rotate(180).save(path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    changed = (before != extract(photos, tmp_path).images()).any(dim=1)
    assert changed.tolist() == [False, False, False, True, False] and sum(encoded.pictures) == 6


def test_whatever_changes_features_has_its_own_store(tmp_path):
    photos, encoders, other, same_effect = album(tmp_path / "a", 2), tiny_encoders(), tiny_encoders(), tiny_encoders()
    other.preprocessor.tokenizer = copy.deepcopy(packaged_tokenizer())
    other.preprocessor.tokenizer.add_tokens(["zebra crossing"])
    same_effect.preprocessor.transform = lambda image: encoders.preprocessor.transform(image)
    changed = [tiny_encoders(**one) for one in ({"pooling": "cls"}, {"max_tokens": 31}, {"squash": True}, {"seed": 1})]
    options = {"precision": "float32"}, {"precision": "bfloat16"}, {"dtype": "float32"}, {"precision": "auto"}
    variants = [*((encoders, option) for option in options), *((one, {}) for one in (same_effect, other, *changed))]
    new_stores = [2, 2, 2, 0, 0, 1, 1, 1, 1, 2]  # of pictures and of texts; "auto" is one of the two
    for (given, option), new in zip(variants * 2, new_stores + [0] * len(variants), strict=True):
        before = len([*tmp_path.glob("features/*")])
        extract(photos, tmp_path, given, **option)
        assert len([*tmp_path.glob("features/*")]) - before == new
    exact, fast = (extract(photos, tmp_path, encoders, **option).images() for option in options[:2])
    assert 0 < (fast - exact).abs().max() < 0.02 * exact.abs().max()


def test_parts_are_encoded_when_they_are_asked_for_and_given_to_no_one_else(tmp_path, encoded):
    photos = album(tmp_path / "a", 5)
    for options, pictures in ({}, 5), ({"grids": True}, 5), ({"grids": True}, 0), ({}, 0):
        encoded.pictures.clear()
        features = extract(photos, tmp_path, **options)
        assert sum(encoded.pictures) == pictures and features.image_table.has_parts == ("grids" in options)
        assert features.manifest["grids"] == ("grids" in options)
    for name, ask in ("grids", features.grids), ("tokens", features.tokens), ("token_ids", features.with_token_ids):
        with pytest.raises(MmkitError, match=rf"no {name}.*Remedy: .*{name.split('_')[0]}"):
            ask()


@pytest.mark.parametrize("kind, done", [(ImageEncoder, 0), (ImageEncoder, 5), (TextEncoder, 0), (TextEncoder, 3)])
def test_an_interrupted_extraction_leaves_whole_shards_and_goes_on(dataset, tmp_path, whole, encoded, kind, done):
    encoded.broken[kind] = done
    with pytest.raises(KeyboardInterrupt):
        everything(dataset, tmp_path)
    assert len(shards(tmp_path)) == len([*tmp_path.glob("features/*/*")])
    encoded.broken.clear()
    assert same(everything(dataset, tmp_path), whole[1])
    lost = done % 2 if kind is ImageEncoder else 0  # a shard holds two batches of pictures, or one of texts
    assert len(encoded.pictures) == 15 + lost and len(encoded.texts) == -(-len(set(dataset.captions)) // 64)


def flip(content):
    return content[:-1] + bytes([content[-1] ^ 1])


DAMAGES = [*((f"{name}.npy", flip) for name in Shard._fields), ("parts.npy", lambda content: content[:-10])]
DAMAGES += [("shard.json", lambda _, text=text: text) for text in (b"", b"[]", b"{}", b'{"keys"')]


@pytest.mark.parametrize("file, change", DAMAGES)
def test_a_damaged_shard_is_made_again_and_only_that_one(dataset, tmp_path, whole, encoded, file, change):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    damaged = next(shard for shard in shards(tmp_path) if np.load(shard / "vectors.npy").shape == (8, 6))
    others = [(shard, shard.stat().st_ino) for shard in shards(tmp_path) if shard != damaged]
    (damaged / file).write_bytes(change((damaged / file).read_bytes()))
    assert same(everything(dataset, tmp_path), whole[1]) and sum(encoded.pictures) == 8 and not encoded.texts
    assert all(shard.stat().st_ino == number for shard, number in others)


def test_what_a_kill_left_is_removed_after_an_hour(dataset, tmp_path, whole):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    old, new = (shards(tmp_path)[0].with_name(f"{name}.part") for name in ("old", "new"))
    old.mkdir(), new.mkdir()
    os.utime(old, (time.time() - 3700,) * 2)
    (old.parent / ".DS_Store").touch()
    assert same(everything(dataset, tmp_path), whole[1]) and new.is_dir() and not old.exists()


def test_a_full_disk_is_named_and_what_was_written_stays(tmp_path, encoded, monkeypatch):
    texts, encoders = [f"text {n}" for n in range(50)], tiny_encoders()
    extract_texts(texts[:20], encoders, tmp_path, "float32")
    before = shards(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(MmkitError, match=r"cannot be written .*\(9 requested.*CACHE"):
        patch.setattr(np, "save", Mock(side_effect=OSError("9 requested and 0 written")))  # as numpy says it
        extract_texts(texts, encoders, tmp_path, "float32")
    assert shards(tmp_path) == before and not [*tmp_path.glob("features/*/*.part")]
    assert len(extract_texts(texts, encoders, tmp_path, "float32")) == 50 and encoded.texts == [20, 30, 30]


def test_bad_settings_caches_and_photos_are_named(tmp_path):
    photos, encoders, good = album(tmp_path / "a", 3), tiny_encoders(), tmp_path / "good"
    for setting, names in ({"precision": "float64"}, "auto, float32"), ({"dtype": "int8"}, "float16, float32"):
        for ask, content in (extract_features, photos), (extract_texts, ["a dog"]):
            with pytest.raises(MmkitError, match=rf"{next(iter(setting.values()))}'.*: {names}"):
                ask(content, encoders, good, **setting)
    assert not good.exists()
    (tmp_path / "features").touch()
    for cache in (tmp_path, tmp_path / "features"):
        with pytest.raises(MmkitError, match=rf"{cache}/.* cannot be written|cannot be written to {cache}/features"):
            extract(photos, cache)
    encoders.image.backbone.weight *= 1e6
    with pytest.raises(MmkitError, match=r'float16.*dtype="float32"'):
        extract(photos, good, encoders)
    assert extract(photos, good, encoders, dtype="float32").images().isfinite().all()
    (tmp_path / "a" / "1.bmp").write_bytes(b"nothing")
    with pytest.raises(MmkitError, match=r"1\.bmp cannot be decoded"):
        extract(photos, good)
    (tmp_path / "a" / "1.bmp").unlink()
    with pytest.raises(MissingFile, match=r"no picture .*1\.bmp"):
        extract(photos, good)


def test_two_that_ask_at_once_get_the_same(dataset, tmp_path, whole):
    shutil.copytree(whole[0] / "pictures", tmp_path / "pictures")  # the index has one writer
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(everything, [dataset] * 2, [tmp_path] * 2, [tiny_encoders(), tiny_encoders()])
    assert all(same(result, whole[1]) for result in results)


@pytest.mark.slow
def test_two_processes_of_one_job_share_the_work(dataset, scenes_folder, tmp_path, whole, encoded):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, __file__, scenes_folder, tmp_path, "0"], check=True, capture_output=True, timeout=120)
    assert same(everything(dataset, tmp_path), whole[1]) and not encoded.pictures + encoded.texts
    assert sum(len(np.load(shard / "vectors.npy")) for shard in shards(tmp_path)) == 60 + len(set(dataset.captions))


@pytest.mark.slow
def test_random_kills_leave_no_trace(dataset, scenes_folder, tmp_path, whole, encoded):
    chance, command = random.Random(3), [sys.executable, __file__, scenes_folder, tmp_path, "0.15"]
    for _ in range(3):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout.readline() == "begins\n"
            time.sleep(chance.uniform(0.5, 1.2))
            child.kill()
    assert same(everything(dataset, tmp_path), whole[1])
    assert sum(encoded.pictures) < 60  # those that were killed left shards


ROWS = [([40, 3], [40, 3]), ([5, 5], [5, 5]), ([-1], [59]), ([], []), (slice(2, 9, 3), [2, 5, 8]), (range(2), [0, 1])]
ROWS += [(np.arange(60) < 2, [0, 1]), (torch.tensor([1, 0]), [1, 0])]


@pytest.mark.parametrize("rows, chosen", ROWS)
def test_select_gives_the_images_with_all_their_captions_in_the_order_of_the_dataset(whole, dataset, rows, chosen):
    features = whole[1]
    part, data = features.select(rows), dataset.select(chosen)
    assert part.image_ids.tolist() == list(data.image_ids) and part.image_index.tolist() == data.image_index.tolist()
    assert torch.equal(part.images(), features.images()[chosen]) and part.image_index.dtype == torch.int64
    captions = [dataset.captions.index(caption) for caption in data.captions]
    assert torch.equal(part.captions(), features.captions()[captions])
    assert torch.equal(part.grids(), features.grids(chosen)) and len(part.tokens()[0]) == len(captions)
    assert torch.equal(features.images(rows), part.images())


def test_features_in_memory_behave_like_stored_ones():
    images, captions = torch.arange(6.0).reshape(2, 3), torch.arange(12.0).reshape(3, 4)
    grids, tokens = torch.ones(2, 5, 3), torch.ones(3, 2, 4)
    tokens[1, 1] = 0  # padding
    pairs = PairedFeatures.from_arrays(images.numpy(), captions, [1, 0, 1], grids, tokens)
    assert pairs.dims == (3, 4) and pairs.image_index.tolist() == [1, 0, 1] and len(pairs) == 2
    assert torch.equal(pairs.select([1]).captions(), captions[[0, 2]]) and len(pairs.select([0]).captions()) == 1
    assert torch.equal(pairs.grids(), grids) and pairs.tokens()[1].tolist() == [[1, 1], [1, 0], [1, 1]]
    stacks = pairs.with_parts()
    assert torch.equal(stacks.images([1]), torch.cat([images[[1], None], grids[[1]]], dim=1))
    assert torch.equal(stacks.captions(), torch.cat([captions[:, None], tokens], dim=1))
    assert stacks.captions([1]).shape == (1, 2, 4) and torch.equal(stacks.vectors().captions(), captions)
    ids = np.array([[101, 7, 102], [101, 102, PADDING], [101, 102, PADDING]])
    named = dataclasses.replace(pairs, token_ids=ids).with_token_ids()
    assert named.select([1]).captions().tolist() == [[101, 7, 102], [101, 102, PADDING]]
    assert named.captions([1, 2]).tolist() == [[101, 102]] * 2 and torch.equal(named.images(), images)
    for image_index in ([0, 1], [0, 1, 2], [0, -1, 1]):
        with pytest.raises(MmkitError, match="one of 2 images for each of 3 captions"):
            PairedFeatures.from_arrays(images, captions, image_index)
    assert pad_cat([torch.ones(1, 1, 1), 2 * torch.ones(1, 3, 1)])[..., 0].tolist() == [[1, 0, 0], [2, 2, 2]]
    assert pad_cat([torch.tensor([[5, 6]]), torch.tensor([[7]])]).tolist() == [[5, 6], [7, PADDING]]


if __name__ == "__main__":  # a job: ROOT CACHE, and the seconds that each batch of pictures takes longer
    torch.set_num_threads(1)
    forward = ImageEncoder.forward
    ImageEncoder.forward = lambda self, pixels: time.sleep(float(sys.argv[3])) or forward(self, pixels)
    print("begins", flush=True)
    everything(load_captions(sys.argv[1]).select(range(60)), sys.argv[2])
