import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader
from torchvision import transforms as classic
from transformers import BertTokenizerFast

from mmkit.preprocess import IMAGENET_MEAN, IMAGENET_STD, MultimodalPreprocessor, image_transform
from mmkit.support import MissingFile, MmkitError


@pytest.fixture(scope="module")
def preprocessor():
    return MultimodalPreprocessor()


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def extent(pixels):
    """(width, height) of what is bright."""
    bright = pixels.mean(dim=0) > 0
    return int(bright.any(dim=0).sum()), int(bright.any(dim=1).sum())


@pytest.mark.parametrize("size", [(288, 256), (200, 300), (224, 224), (640, 100)])
def test_the_default_transform_is_that_of_torchvision(preprocessor, size):
    resize = classic.Resize(256, classic.InterpolationMode.BICUBIC)
    scale = classic.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    oracle = classic.Compose([resize, classic.CenterCrop(224), classic.ToTensor(), scale])
    pixels = preprocessor.preprocess_image(noise(*size))
    assert pixels.shape == (3, 224, 224) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, oracle(noise(*size)), atol=1e-6, rtol=0)


def test_the_crop_is_the_centre_computed_by_pillow_and_numpy(preprocessor):
    resized = noise(512, 384).resize((341, 256), Image.Resampling.BICUBIC)
    cropped = np.asarray(resized)[16:240, 58:282] / 255  # (341 - 224) / 2 = 58.5 rounds to even
    expected = ((cropped - IMAGENET_MEAN) / IMAGENET_STD).transpose(2, 0, 1)
    np.testing.assert_allclose(preprocessor.preprocess_image(noise(512, 384)).numpy(), expected, atol=1e-5)


def test_cropping_keeps_a_disc_round_and_squashing_keeps_the_edges():
    disc = Image.new("RGB", (400, 200))
    ImageDraw.Draw(disc).ellipse((150, 50, 250, 150), fill="white")
    width, height = extent(image_transform()(disc))
    assert abs(width - height) <= 1 and height > 100
    width, height = extent(image_transform(squash=True)(disc))
    assert height / width == pytest.approx(2, abs=0.1)
    edge = Image.new("RGB", (448, 224))
    ImageDraw.Draw(edge).rectangle((0, 0, 40, 223), fill="white")
    assert image_transform(squash=True)(edge)[:, :, 5].mean() > 1
    assert image_transform()(edge).mean(dim=0).max() < 0


def test_other_sizes_and_statistics_are_used():
    pixels = image_transform(32, 40, (0.5,) * 3, (0.5,) * 3)(Image.new("RGB", (100, 60), (255, 0, 255)))
    assert pixels.shape == (3, 32, 32) and pixels.mean(dim=(1, 2)).tolist() == pytest.approx([1, -1, 1], abs=1e-6)


def test_a_picture_file_and_any_mode_are_taken(preprocessor, tmp_path):
    picture = noise(300, 260)
    picture.save(tmp_path / "a.png")
    expected = preprocessor.preprocess_image(picture)
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), picture.convert("RGBA")):
        assert torch.equal(preprocessor.preprocess_image(given), expected)
    assert preprocessor.preprocess_image(picture.convert("L")).shape == (3, 224, 224)
    with pytest.raises(MissingFile, match=r"none\.png"):
        preprocessor.preprocess_image(tmp_path / "none.png")


def test_what_the_encoder_sees_is_a_picture_in_its_own_colours(preprocessor):
    seen = preprocessor.seen(noise(512, 384))
    expected = np.asarray(noise(512, 384).resize((341, 256), Image.Resampling.BICUBIC))[16:240, 58:282]
    assert seen.size == (224, 224) and np.abs(np.asarray(seen).astype(int) - expected).max() <= 1


def test_tokens_are_those_of_berts_published_vocabulary(preprocessor):
    tokens = preprocessor.preprocess_text("A photo of a CAT")
    assert tokens["input_ids"].tolist() == [[101, 1037, 6302, 1997, 1037, 4937, 102]]
    assert tokens["attention_mask"].tolist() == [[1] * 7] and set(tokens) == {"input_ids", "attention_mask"}
    assert tokens["input_ids"].dtype == tokens["attention_mask"].dtype == torch.int64


def test_a_batch_is_padded_to_its_longest_caption_as_berts_own_tokenizer_does(preprocessor, dataset):
    oracle = BertTokenizerFast(vocab=preprocessor.tokenizer.get_vocab(), do_lower_case=True)
    captions = [*dataset.captions[:40], "Ein Bär, naïve — 2 dogs!", "antidisestablishmentarianism", "dog"]
    expected, tokens = oracle(captions, padding=True, return_tensors="pt"), preprocessor.preprocess_text(captions)
    assert len(oracle) == 30522
    assert all(torch.equal(tokens[key], expected[key]) for key in ("input_ids", "attention_mask"))
    assert tokens["attention_mask"][-1].tolist() == [1] * 3 + [0] * (tokens["input_ids"].shape[1] - 3)
    assert preprocessor.token_counts(captions).tolist() == tokens["attention_mask"].sum(dim=1).tolist()


@pytest.mark.parametrize("max_tokens", [3, 16, 512])
def test_long_captions_are_cut_and_still_end_in_sep(max_tokens):
    preprocessor = MultimodalPreprocessor(max_tokens=max_tokens)
    ids = preprocessor.preprocess_text(["a dog", "dog " * 600])["input_ids"]
    assert ids.shape == (2, max_tokens) and ids[1].tolist() == [101] + [3899] * (max_tokens - 2) + [102]
    assert ids[0, :3].tolist() in ([101, 1037, 3899], [101, 1037, 102])
    assert preprocessor.token_counts(["dog " * 600]).tolist() == [max_tokens]


@pytest.mark.parametrize("max_tokens", [-1, 0, 2, 513])
def test_max_tokens_out_of_range_is_refused(max_tokens):
    with pytest.raises(MmkitError, match=f"max_tokens is {max_tokens}.*3 and 512"):
        MultimodalPreprocessor(max_tokens=max_tokens)


def test_collate_serves_a_data_loader_with_workers(preprocessor, dataset):
    part = dataset.select(range(6))
    first, last = DataLoader(part, batch_size=4, num_workers=2, collate_fn=preprocessor.collate)
    assert first["pixels"].shape == (4, 3, 224, 224) and last["pixels"].shape == (2, 3, 224, 224)
    assert [len(batch["input_ids"]) for batch in (first, last)] == [20, 10]
    assert last["image_index"].tolist() == [0] * 5 + [1] * 5 and last["image_index"].dtype == torch.int64
    assert torch.equal(last["pixels"][1], preprocessor.preprocess_image(part.image(5)))
    expected = preprocessor.preprocess_text(part.captions[20:])
    assert all(torch.equal(last[key], expected[key]) for key in expected)
