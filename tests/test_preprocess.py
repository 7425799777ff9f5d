import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader
from torchvision import transforms as classic
from transformers import AutoTokenizer

from mmkit import MissingFile, MmkitError, MultimodalPreprocessor, image_transform, preprocess

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def preprocessor():
    return MultimodalPreprocessor()


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def disc():
    picture = Image.new("RGB", (400, 200))
    ImageDraw.Draw(picture).ellipse((150, 50, 250, 150), fill="white")
    return picture


def extent(pixels):
    """(width, height) of what is bright."""
    bright = pixels.mean(dim=0) > 0
    return int(bright.any(dim=0).sum()), int(bright.any(dim=1).sum())


@pytest.mark.parametrize("size", [(288, 256), (200, 300), (224, 224), (640, 100)])
def test_the_default_transform_is_that_of_torchvision(preprocessor, size):
    oracle = classic.Compose(
        [
            classic.Resize(256, classic.InterpolationMode.BICUBIC),
            classic.CenterCrop(224),
            classic.ToTensor(),
            classic.Normalize(MEAN, STD),
        ]
    )
    found = preprocessor.preprocess_image(noise(*size))
    assert found.shape == (3, 224, 224) and found.dtype == torch.float32
    torch.testing.assert_close(found, oracle(noise(*size)), atol=1e-6, rtol=0)


def test_the_crop_is_the_centre_computed_by_pillow_and_numpy(preprocessor):
    resized = noise(512, 384).resize((341, 256), Image.Resampling.BICUBIC)
    cropped = np.asarray(resized)[16:240, 58:282] / 255  # (341 - 224) / 2 = 58.5 rounds to even
    expected = ((cropped - MEAN) / STD).transpose(2, 0, 1)
    found = preprocessor.preprocess_image(noise(512, 384)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_cropping_keeps_a_disc_round_and_squashing_does_not():
    width, height = extent(image_transform()(disc()))
    assert abs(width - height) <= 1 and height > 100
    width, height = extent(image_transform(squash=True)(disc()))
    assert height / width == pytest.approx(2, abs=0.1)


def test_squashing_keeps_the_edges_that_cropping_loses():
    picture = Image.new("RGB", (448, 224))
    ImageDraw.Draw(picture).rectangle((0, 0, 40, 223), fill="white")
    assert image_transform(squash=True)(picture)[:, :, 5].mean() > 1
    assert image_transform()(picture).mean(dim=0).max() < 0


def test_pixels_are_normalised_by_the_statistics_of_imagenet(preprocessor):
    found = preprocessor.preprocess_image(Image.new("RGB", (300, 300), (51, 102, 255)))
    expected = [(0.2 - 0.485) / 0.229, (0.4 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    for channel, value in zip(found, expected, strict=True):
        assert channel.min().item() == pytest.approx(value, abs=1e-5)
        assert channel.max().item() == pytest.approx(value, abs=1e-5)


def test_other_sizes_and_statistics_are_used():
    half = image_transform(size=32, resize=40, mean=(0.5,) * 3, std=(0.5,) * 3)
    found = half(Image.new("RGB", (100, 60), (255, 0, 255)))
    assert found.shape == (3, 32, 32)
    assert found.mean(dim=(1, 2)).tolist() == pytest.approx([1, -1, 1], abs=1e-6)


def test_a_picture_file_and_any_mode_are_taken(preprocessor, tmp_path):
    picture = noise(300, 260)
    picture.save(tmp_path / "a.png")
    expected = preprocessor.preprocess_image(picture)
    assert torch.equal(preprocessor.preprocess_image(tmp_path / "a.png"), expected)
    assert torch.equal(preprocessor.preprocess_image(str(tmp_path / "a.png")), expected)
    assert torch.equal(preprocessor.preprocess_image(picture.convert("RGBA")), expected)
    assert preprocessor.preprocess_image(picture.convert("L")).shape == (3, 224, 224)
    with pytest.raises(MissingFile, match=r"none\.png"):
        preprocessor.preprocess_image(tmp_path / "none.png")


def test_tokens_are_those_of_berts_published_vocabulary(preprocessor):
    found = preprocessor.preprocess_text("A photo of a CAT")
    assert found["input_ids"].tolist() == [[101, 1037, 6302, 1997, 1037, 4937, 102]]
    assert found["attention_mask"].tolist() == [[1] * 7]
    assert found["input_ids"].dtype == found["attention_mask"].dtype == torch.int64
    assert set(found) == {"input_ids", "attention_mask"}


def test_tokens_are_those_of_transformers(preprocessor, dataset):
    folder = preprocess.minilm_file("model/config.json", preprocess._TOKENIZER_FILES["model/config.json"]).parent
    own = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert len(own) == 30522
    captions = [*dataset.captions[:40], "Ein Bär, naïve — 2 dogs!", "antidisestablishmentarianism"]
    expected = own(captions, padding=True, return_tensors="pt")
    found = preprocessor.preprocess_text(captions)
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(found["attention_mask"], expected["attention_mask"])


def test_captions_are_padded_to_the_longest_of_their_batch(preprocessor):
    found = preprocessor.preprocess_text(["a dog", "a dog on the green grass", "dog"])
    assert found["input_ids"].shape == (3, 8)
    assert found["attention_mask"].sum(dim=1).tolist() == [4, 8, 3]
    for ids, mask in zip(found["input_ids"], found["attention_mask"], strict=True):
        length = int(mask.sum())
        assert mask.tolist() == [1] * length + [0] * (8 - length)
        assert ids[0] == 101 and ids[length - 1] == 102 and (ids[length:] == 0).all()


@pytest.mark.parametrize("max_tokens", [3, 16, 512])
def test_long_captions_are_cut_and_still_end_in_sep(max_tokens):
    found = MultimodalPreprocessor(max_tokens=max_tokens).preprocess_text(["a dog", "dog " * 600])
    assert found["input_ids"].shape == (2, max_tokens)
    assert found["input_ids"][1].tolist() == [101] + [3899] * (max_tokens - 2) + [102]
    assert found["input_ids"][0, :3].tolist() in ([101, 1037, 3899], [101, 1037, 102])


@pytest.mark.parametrize("max_tokens", [-1, 0, 2, 513])
def test_max_tokens_out_of_range_is_refused(max_tokens):
    with pytest.raises(MmkitError, match=f"max_tokens is {max_tokens}.*3 and 512"):
        MultimodalPreprocessor(max_tokens=max_tokens)


def test_collate_stacks_pictures_and_names_the_owner_of_each_caption(preprocessor):
    items = [(noise(300, 260), ["a dog"]), (noise(260, 300), ["a cat", "two cats on a mat"])]
    batch = preprocessor.collate(items)
    assert batch["pixels"].shape == (2, 3, 224, 224)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 7)
    assert batch["caption_image"].tolist() == [0, 1, 1] and batch["caption_image"].dtype == torch.int64
    assert torch.equal(batch["pixels"][1], preprocessor.preprocess_image(items[1][0]))
    assert batch["input_ids"][1, :4].tolist() == [101, 1037, 4937, 102]


def test_collate_serves_a_data_loader_with_workers(preprocessor, dataset):
    part = dataset.select(range(6))
    loader = DataLoader(part, batch_size=4, num_workers=2, collate_fn=preprocessor.collate)
    batches = list(loader)
    assert [tuple(batch["pixels"].shape) for batch in batches] == [(4, 3, 224, 224), (2, 3, 224, 224)]
    assert [len(batch["input_ids"]) for batch in batches] == [20, 10]
    assert batches[1]["caption_image"].tolist() == [0] * 5 + [1] * 5
    assert torch.equal(batches[1]["pixels"][1], preprocessor.preprocess_image(part.image(5)))
    told = preprocessor.tokenizer.batch_decode(batches[1]["input_ids"], skip_special_tokens=True)
    assert [text.split()[0] for text in told] == [caption.split()[0].lower() for caption in part.captions[20:]]
