import dataclasses
import json
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import BertConfig, BertModel

from mmkit import (
    Encoders,
    FeatureStore,
    ImageEncoder,
    MmkitError,
    MultimodalPreprocessor,
    PairedFeatures,
    TextEncoder,
    extract_features,
    extraction,
    image_transform,
    load_captions,
)
from mmkit.preprocess import packaged_tokenizer


def tiny_encoders(seed=0, pooling="mean", max_tokens=32, squash=False):
    """Real encoder classes around backbones that cost next to nothing."""
    torch.manual_seed(seed)
    transform = image_transform(size=64, resize=72, squash=squash)
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    image = ImageEncoder("tiny", nn.Conv2d(3, 6, 16, stride=16), 6, transform)
    text = TextEncoder("tiny", BertModel(config), 16, packaged_tokenizer(), pooling)
    return Encoders(image, text, MultimodalPreprocessor(transform, text.tokenizer, max_tokens))


def extract(dataset, cache, encoders=None):
    return extract_features(dataset, encoders or tiny_encoders(), cache, precision="float32")


def stores(cache):
    """The finished folders of a cache."""
    return sorted(path.parent for path in (cache / "features").glob("*/manifest.json"))


def array_bytes(cache):
    (folder,) = stores(cache)
    return [(folder / name).read_bytes() for name in ("images.npy", "captions.npy")]


def counted(monkeypatch, kind, stop_after=None):
    """Count the batches of an encoder, and interrupt the one after `stop_after`."""
    forward, batches = kind.forward, []

    def counting(self, *args, **kwargs):
        if len(batches) == stop_after:
            raise KeyboardInterrupt
        batches.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", counting)
    return batches


def forbid_encoding(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("encoded again")

    monkeypatch.setattr(ImageEncoder, "forward", forbidden)
    monkeypatch.setattr(TextEncoder, "forward", forbidden)


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory):
    """The cache of an extraction that nothing disturbed, its arrays, and its numbers of batches."""
    cache = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as monkeypatch:
        images, captions = counted(monkeypatch, ImageEncoder), counted(monkeypatch, TextEncoder)
        extract(dataset, cache)
    return cache, array_bytes(cache), (len(images), len(captions))


# --- what is stored --------------------------------------------------------------------------


def test_image_features_are_those_of_the_encoder_in_the_order_of_the_dataset(store, dataset, encoders):
    rows = range(0, 60, 7)
    pixels = torch.stack([encoders.preprocessor.preprocess_image(dataset.image(i)) for i in rows])
    expected = encoders.image(pixels).pooled.numpy()
    assert store.image_features.shape == (60, 1280)
    np.testing.assert_allclose(store.image_features[list(rows)], expected, atol=2e-3, rtol=2e-3)


def test_caption_features_are_those_of_the_encoder_in_the_order_of_the_dataset(store, dataset, encoders):
    expected = encoders.text(**encoders.preprocessor.preprocess_text(dataset.captions[::4])).pooled.numpy()
    assert store.caption_features.shape == (300, 384)
    np.testing.assert_allclose(store.caption_features[::4], expected, atol=2e-3, rtol=2e-3)
    assert store.caption_image.tolist() == dataset.caption_image.tolist()
    assert store.image_ids.tolist() == list(dataset.image_ids)


def test_equal_captions_of_two_images_both_get_their_features(dataset, tmp_path):
    captions = list(dataset.captions)
    captions[7] = captions[203] = captions[0]
    store = extract(dataclasses.replace(dataset, captions=tuple(captions)), tmp_path)
    found = np.asarray(store.caption_features)
    assert (found[7] == found[0]).all() and (found[203] == found[0]).all()
    assert np.abs(found).sum(axis=1).min() > 0


def test_features_are_stored_in_half_precision_as_read_only_memory_maps(store):
    for array in (store.image_features, store.caption_features):
        assert isinstance(array, np.memmap) and array.dtype == np.float16
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 0


def test_a_finished_store_is_one_folder_without_leftovers(undisturbed):
    cache, *_ = undisturbed
    (folder,) = stores(cache)
    names = ["caption_image.npy", "captions.npy", "image_ids.npy", "images.npy", "manifest.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert [path.name for path in (cache / "features").iterdir() if path.is_dir()] == [folder.name]
    assert FeatureStore(folder).image_features.shape == (60, 6)


# --- when it is made anew --------------------------------------------------------------------


def test_a_second_call_encodes_nothing(dataset, undisturbed, monkeypatch):
    cache, expected, _ = undisturbed
    forbid_encoding(monkeypatch)
    store = extract(dataset, cache)
    assert store.image_features.shape == (60, 6) and store.caption_features.shape == (300, 16)
    assert array_bytes(cache) == expected


def test_any_change_makes_another_store(dataset, tmp_path):
    part = dataset.select(range(4))
    captions = ("Another caption.", *part.captions[1:])
    variants = [
        (part, tiny_encoders()),
        (part, tiny_encoders(pooling="cls")),
        (part, tiny_encoders(max_tokens=8)),
        (part, tiny_encoders(squash=True)),
        (part, tiny_encoders(seed=1)),
        (dataclasses.replace(part, captions=captions), tiny_encoders()),
        (part.select(range(3)), tiny_encoders()),
    ]
    for count, (data, encoders) in enumerate(variants, start=1):
        extract(data, tmp_path, encoders)
        assert len(stores(tmp_path)) == count
    for data, encoders in variants:
        extract(data, tmp_path, encoders)
    assert len(stores(tmp_path)) == len(variants)


def test_one_changed_weight_makes_another_store(dataset, tmp_path):
    part, encoders = dataset.select([0, 1]), tiny_encoders()
    extract(part, tmp_path, encoders)
    encoders.image.backbone.bias[0] += 1
    extract(part, tmp_path, encoders)
    assert len(stores(tmp_path)) == 2


def test_precision_is_part_of_the_key_and_auto_is_one_of_the_two(dataset, tmp_path):
    part, encoders = dataset.select([0, 1]), tiny_encoders()
    for precision in ("float32", "bfloat16"):
        manifest = extract_features(part, encoders, tmp_path, precision).manifest
        assert manifest["precision"] == precision
    assert extract_features(part, encoders, tmp_path).manifest["precision"] in ("float32", "bfloat16")
    assert len(stores(tmp_path)) == 2


def test_an_unknown_precision_lists_the_valid_ones(dataset, tmp_path):
    with pytest.raises(MmkitError, match=r"'float64'.*auto, float32, bfloat16"):
        extract_features(dataset, tiny_encoders(), tmp_path, "float64")
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_features_are_close_to_those_of_float32(store, dataset, encoders, tmp_path):
    part = dataset.select(range(16))
    fast = extract_features(part, encoders, tmp_path, precision="bfloat16").select()
    exact = store.select(range(16))
    images = nn.functional.cosine_similarity(fast.images(), exact.images())
    captions = nn.functional.cosine_similarity(fast.captions(), exact.captions())
    assert images.mean() > 0.99 and images.min() > 0.95  # rounding adds up over the layers
    assert captions.min() > 0.99
    assert not torch.equal(fast.images(), exact.images()) and not torch.equal(fast.captions(), exact.captions())


def break_images(folder):
    content = bytearray((folder / "images.npy").read_bytes())
    content[-1] ^= 1
    (folder / "images.npy").write_bytes(content)


def cut_captions(folder):
    content = (folder / "captions.npy").read_bytes()
    (folder / "captions.npy").write_bytes(content[:-10])


def remove_images(folder):
    (folder / "images.npy").unlink()


def remove_manifest(folder):
    (folder / "manifest.json").unlink()


def cut_manifest(folder):
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:-9])


def empty_manifest(folder):
    (folder / "manifest.json").write_text("{}")


def replace_manifest(folder):
    (folder / "manifest.json").write_text("[]")


@pytest.mark.parametrize(
    "damage",
    [break_images, cut_captions, remove_images, remove_manifest, cut_manifest, empty_manifest, replace_manifest],
)
def test_a_damaged_store_is_made_again(dataset, tmp_path, undisturbed, damage):
    cache, expected, _ = undisturbed
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    damage(stores(tmp_path)[0])
    store = extract(dataset, tmp_path)
    assert array_bytes(tmp_path) == expected
    assert store.image_ids.tolist() == list(dataset.image_ids)


# --- interruptions ---------------------------------------------------------------------------


@pytest.mark.parametrize("save_every", [1, 2])
@pytest.mark.parametrize("kind, done", [(ImageEncoder, 0), (ImageEncoder, 5), (TextEncoder, 0), (TextEncoder, 3)])
def test_an_interrupted_extraction_goes_on_and_ends_in_the_same_bytes(
    dataset, tmp_path, undisturbed, monkeypatch, kind, done, save_every
):
    _, expected, (image_batches, caption_batches) = undisturbed
    monkeypatch.setattr(extraction, "_SAVE_EVERY", save_every)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        counted(patch, kind, stop_after=done)
        extract(dataset, tmp_path)
    assert stores(tmp_path) == []
    images, captions = counted(monkeypatch, ImageEncoder), counted(monkeypatch, TextEncoder)
    extract(dataset, tmp_path)
    assert array_bytes(tmp_path) == expected
    kept = done - done % save_every
    in_images = kind is ImageEncoder
    assert len(images) == (image_batches - kept if in_images else 0)
    assert len(captions) == (caption_batches if in_images else caption_batches - kept)


def test_interrupted_twice_is_no_worse(dataset, tmp_path, undisturbed, monkeypatch):
    monkeypatch.setattr(extraction, "_SAVE_EVERY", 1)
    for kind, done in ((ImageEncoder, 2), (ImageEncoder, 3), (TextEncoder, 1)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            counted(patch, kind, stop_after=done)
            extract(dataset, tmp_path)
    extract(dataset, tmp_path)
    assert array_bytes(tmp_path) == undisturbed[1]


@pytest.mark.parametrize("damage", ["mark empty", "array missing", "array cut"])
def test_a_damaged_unfinished_folder_is_started_again(dataset, tmp_path, undisturbed, monkeypatch, damage):
    monkeypatch.setattr(extraction, "_SAVE_EVERY", 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        counted(patch, ImageEncoder, stop_after=3)
        extract(dataset, tmp_path)
    (unfinished,) = (tmp_path / "features").glob("*.part")
    if damage == "mark empty":
        (unfinished / "images_done.npy").write_text("")
    elif damage == "array missing":
        (unfinished / "images.npy").unlink()
    else:
        (unfinished / "captions.npy").write_bytes((unfinished / "captions.npy").read_bytes()[:50])
    extract(dataset, tmp_path)
    assert array_bytes(tmp_path) == undisturbed[1]


def test_a_broken_picture_stops_the_extraction_and_is_named(dataset, tmp_path):
    root = tmp_path / "data"
    (root / "annotations").mkdir(parents=True)
    (root / "val").mkdir()
    rows = [{"id": i, "file_name": f"{i}.png"} for i in range(3)]
    told = [{"image_id": i, "caption": "A dog."} for i in range(3)]
    (root / "annotations" / "captions_val.json").write_text(json.dumps({"images": rows, "annotations": told}))
    for row in rows:
        Image.new("RGB", (80, 80)).save(root / "val" / row["file_name"])
    (root / "val" / "1.png").write_bytes(b"nothing")
    with pytest.raises(MmkitError, match=r"1\.png cannot be decoded"):
        extract(load_captions(root), tmp_path)
    assert stores(tmp_path) == []
    Image.new("RGB", (80, 80)).save(root / "val" / "1.png")
    assert len(extract(load_captions(root), tmp_path).image_ids) == 3


def test_two_that_ask_at_once_make_one_store(dataset, tmp_path, undisturbed, monkeypatch):
    meet, forward, stores_made, batches = threading.Barrier(2), ImageEncoder.forward, [], []
    encoders = [tiny_encoders(), tiny_encoders()]

    def slow(self, pixels):
        batches.append(1)
        time.sleep(0.02)
        return forward(self, pixels)

    def ask(own):
        meet.wait()
        stores_made.append(extract(dataset, tmp_path, own))

    monkeypatch.setattr(ImageEncoder, "forward", slow)
    threads = [threading.Thread(target=ask, args=(own,)) for own in encoders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(batches) == undisturbed[2][0]
    assert len(stores_made) == 2
    assert (stores_made[0].image_features == stores_made[1].image_features).all()
    assert array_bytes(tmp_path) == undisturbed[1]


@pytest.mark.parametrize("taken", [".", "cache", "cache/features"])
def test_a_cache_that_cannot_be_written_is_named(dataset, tmp_path, taken):
    (tmp_path / "cache").mkdir()
    cache = tmp_path / "cache"
    if taken == ".":
        cache = tmp_path / "file" / "cache"
        (tmp_path / "file").touch()
    elif taken == "cache":
        cache.rmdir()
        cache.touch()
    else:
        (cache / "features").touch()
    with pytest.raises(MmkitError, match=r"cannot be written.*MMKIT_CACHE") as error:
        extract(dataset, cache)
    assert str(cache / "features") in str(error.value)


# --- reading ---------------------------------------------------------------------------------


def test_select_gives_the_images_with_all_their_captions(store, dataset):
    rows = [3, 17, 40]
    part, data = store.select(rows), dataset.select(rows)
    assert part.image_ids.tolist() == list(data.image_ids)
    assert part.owner.tolist() == data.caption_image.tolist() and part.owner.dtype == torch.int64
    torch.testing.assert_close(part.images(), torch.tensor(store.image_features[rows].astype(np.float32)))
    captions = [dataset.captions.index(caption) for caption in data.captions]
    torch.testing.assert_close(part.captions(), torch.tensor(store.caption_features[captions].astype(np.float32)))
    assert part.dims == (1280, 384)
    assert repr(part) == "PairedFeatures(3 × 1280 images, 15 × 384 captions)"


@pytest.mark.parametrize("rows", [[40, 3, 17], [59, 0]])
def test_owners_are_right_in_any_order(store, dataset, rows):
    part = store.select(rows)
    assert part.image_ids.tolist() == [dataset.image_ids[i] for i in rows]
    whole = store.caption_features.astype(np.float32)
    for owner, vector in zip(part.owner.tolist(), part.captions().numpy(), strict=True):
        found = np.flatnonzero((whole == vector).all(axis=1))
        assert rows[owner] in dataset.caption_image[found]


@pytest.mark.parametrize("rows", [[40, 3, 17], [5, 5]])
def test_captions_stand_in_the_order_of_the_selected_dataset(store, dataset, rows):
    part, data = store.select(rows), dataset.select(rows)
    assert part.owner.tolist() == data.caption_image.tolist()
    captions = [dataset.captions.index(caption) for caption in data.captions]
    np.testing.assert_array_equal(part.captions().numpy(), store.caption_features[captions].astype(np.float32))


def test_images_may_have_different_numbers_of_captions(dataset, tmp_path):
    data = dataclasses.replace(
        dataset.select([0, 1, 2]), captions=dataset.captions[:6], caption_image=np.array([0, 1, 1, 2, 2, 2])
    )
    store = extract(data, tmp_path)
    assert store.select([0, 2]).owner.tolist() == [0, 1, 1, 1]
    assert torch.equal(store.select([0, 2]).captions(), store.select().captions([0, 3, 4, 5]))


def test_everything_is_selected_by_default(store, dataset):
    part = store.select()
    assert part.images().shape == (60, 1280) and part.captions().shape == (300, 384)
    assert part.owner.tolist() == dataset.caption_image.tolist()


@pytest.mark.parametrize(
    "rows", [[2, 0], np.array([2, 0]), torch.tensor([2, 0]), slice(1, None)], ids=["list", "array", "tensor", "slice"]
)
def test_rows_are_asked_for_in_any_form(store, rows):
    part = store.select([5, 9, 11])
    chosen = [1, 2] if isinstance(rows, slice) else [2, 0]
    assert torch.equal(part.images(rows), part.images()[chosen])
    expected = part.captions()[rows] if isinstance(rows, slice) else part.captions()[chosen]
    assert torch.equal(part.captions(rows), expected)
    assert part.images(rows).dtype == part.captions(rows).dtype == torch.float32


def test_an_empty_split_can_be_selected(store, dataset):
    part = store.select(dataset.splits(0, 0.2)["val"])
    assert part.images().shape == (0, 1280) and part.captions().shape == (0, 384) and len(part.owner) == 0


def test_features_in_memory_behave_like_stored_ones():
    images, captions = np.arange(6.0).reshape(2, 3), np.arange(12.0).reshape(3, 4)
    pairs = PairedFeatures.from_arrays(images, captions, [1, 0, 1])
    assert pairs.dims == (3, 4) and pairs.owner.tolist() == [1, 0, 1]
    assert torch.equal(pairs.images([1]), torch.tensor([[3.0, 4.0, 5.0]]))
    assert torch.equal(pairs.captions(), torch.tensor(captions, dtype=torch.float32))
    tensors = PairedFeatures.from_arrays(torch.tensor(images), torch.tensor(captions), torch.tensor([1, 0, 1]))
    assert torch.equal(tensors.captions([2, 0]), pairs.captions([2, 0]))


@pytest.mark.parametrize("owner", [[0, 1], [0, 1, 2], [0, -1, 1]])
def test_owners_that_name_no_image_are_refused(owner):
    with pytest.raises(MmkitError, match="one of 2 images for each of 3 captions"):
        PairedFeatures.from_arrays(np.zeros((2, 3)), np.zeros((3, 4)), owner)


def test_a_mask_and_negative_positions_select_as_numpy_does(store):
    mask = np.zeros(len(store.image_ids), dtype=bool)
    mask[[0, 2]] = True
    assert torch.equal(store.select(mask).captions(), store.select([0, 2]).captions())
    assert torch.equal(store.select([-1]).captions(), store.select([len(mask) - 1]).captions())
    assert len(store.select([]).owner) == 0
