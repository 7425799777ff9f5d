"""What bench.py measures: for each contest two ways to the same result, checked to agree before they are timed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import timm
import torch
from accelerate import PartialState
from PIL import Image
from teams import Team
from torch import Tensor
from torch.utils.data import DataLoader

import mmkit
from mmkit.extraction import _CAPTION_BATCH, _IMAGE_BATCH, _autocast, _encode_captions, _encode_images, _Texts, _Work
from mmkit.shortlist import pair_logits, shortlist_ranks
from mmkit.training import Batch, _PairLosses

SCENES, CAPTIONS, PADDED = 150, 256, 16
DECODED, DECODED_BATCH = 600, 25
COMPILED_BATCH = 16
FITTED, FITTED_BATCH, FITTED_EPOCHS = 4096, 512, 4
RECORDS = 20_000  # images of a synthetic Karpathy file
IMAGES, TEXTS, PAIRS, PAIR_BATCH = 1000, 5000, 50_000, 4096
SHORTLIST, SHORTLISTED = 50, 20_000
STORED, STORED_BATCH, STORED_READS = 50_000, 512, 40
TRAINED, TRAINED_BATCH, EXTRACTED = 8192, 512, 300  # by two processes


@dataclass(frozen=True)
class Contest:
    """Two ways to the same result, each a function that does `amount` of the work (in items, or in whole tasks)."""

    name: str
    unit: str
    what: str
    ours: Callable[[], object]
    baseline: Callable[[], object]
    ours_amount: float = 1
    baseline_amount: float = 1


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class InMemory(_Work):
    """Stands in for the half-written folder of an extraction, so that no disk is measured."""

    def __init__(self, kind: str, rows: int, dim: int, batches: int) -> None:
        self.arrays = {kind: np.zeros((rows, dim), np.float16), f"{kind}_done": np.zeros(batches, dtype=bool)}
        self._state = PartialState(cpu=True)

    def finish(self, kind: str, batch: int, last: bool) -> None:
        self.arrays[f"{kind}_done"][batch] = True


def image_features(dataset: mmkit.CaptionDataset, encoders: mmkit.Encoders, precision: str) -> np.ndarray:
    size = _IMAGE_BATCH["cpu"]
    work = InMemory("images", len(dataset), encoders.image.dim, -(-len(dataset) // size))
    with _autocast(encoders, precision)[0]:
        _encode_images(dataset, encoders, work, size)
    return work.arrays["images"]


def caption_features(captions: list[str], encoders: mmkit.Encoders) -> np.ndarray:
    texts = _Texts(captions, encoders.preprocessor, _CAPTION_BATCH["cpu"])
    work = InMemory("captions", len(captions), encoders.text.dim, len(texts))
    with _autocast(encoders, "auto")[0]:
        _encode_captions(texts, encoders, work)
    return work.arrays["captions"]


def assert_same_direction(found: np.ndarray, expected: Tensor) -> None:
    cosine = torch.cosine_similarity(torch.from_numpy(found).float(), expected.float())
    assert cosine.min() > 0.95, f"the two ways disagree: cosine {cosine.min():.4f}"  # bfloat16 reaches 0.98


# --- the contests --------------------------------------------------------------------------------


def text_vs_pad512(dataset: mmkit.CaptionDataset, encoders: mmkit.Encoders) -> Contest:
    captions = list(dict.fromkeys(dataset.captions))[:CAPTIONS]
    sample = captions[:: len(captions) // PADDED][:PADDED]
    tokenizer = encoders.text.tokenizer

    def baseline() -> Tensor:
        tokens = tokenizer(sample, padding="max_length", max_length=512, truncation=True, return_tensors="pt")
        with _autocast(encoders, "auto")[0]:
            return encoders.text(tokens["input_ids"], tokens["attention_mask"]).pooled

    found = caption_features(captions, encoders)
    assert_same_direction(found[[captions.index(text) for text in sample]], baseline())
    return Contest(
        "text_vs_pad512",
        "captions/s",
        f"MiniLM-L6 in {_autocast(encoders, 'auto')[1]}: {len(captions)} distinct captions of drawn scenes as "
        f"extract_features encodes them (by length, batches of {_CAPTION_BATCH['cpu']} padded to their longest), "
        f"against {PADDED} of them in one batch padded to 512 tokens; same weights and precision",
        lambda: caption_features(captions, encoders),
        baseline,
        len(captions),
        len(sample),
    )


def text_vs_sentence_transformers(dataset: mmkit.CaptionDataset, encoders: mmkit.Encoders) -> Contest:
    from sentence_transformers import SentenceTransformer  # comes with MiniLM's package

    captions = list(dict.fromkeys(dataset.captions))[: 2 * CAPTIONS]
    model = SentenceTransformer(encoders.text.tokenizer.name_or_path, device="cpu")

    def baseline() -> np.ndarray:
        with _autocast(encoders, "auto")[0]:
            return model.encode(captions, show_progress_bar=False)

    assert_same_direction(caption_features(captions, encoders), torch.from_numpy(baseline()))
    return Contest(
        "text_vs_sentence_transformers",
        "captions/s",
        f"MiniLM-L6 in {_autocast(encoders, 'auto')[1]}: {len(captions)} distinct captions of drawn scenes as "
        "extract_features encodes them, against SentenceTransformer.encode as it is; same weights and precision",
        lambda: caption_features(captions, encoders),
        baseline,
        len(captions),
        len(captions),
    )


def image_contest(name: str, precision: str, dataset: mmkit.CaptionDataset, encoders: mmkit.Encoders) -> Contest:
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)
    model.load_state_dict(encoders.image.backbone.owner.state_dict())
    model.eval()

    @torch.no_grad()
    def baseline() -> Tensor:
        pictures = (encoders.preprocessor.preprocess_image(dataset.root / file) for file in dataset.files)
        return torch.cat([model.forward_features(picture[None]).mean(dim=(2, 3)) for picture in pictures])

    assert_same_direction(image_features(dataset, encoders, precision), baseline())
    return Contest(
        name,
        "images/s",
        f"decoding and EfficientNet-Lite0 of {len(dataset)} drawn scenes as extract_features does it (two decoding "
        f"threads, batches of {_IMAGE_BATCH['cpu']}, channels-last, {_autocast(encoders, precision)[1]}), against a "
        "plain loop over timm's tf_efficientnet_lite0 (one picture at a time, default layout, float32); same weights",
        lambda: image_features(dataset, encoders, precision),
        baseline,
        len(dataset),
        len(dataset),
    )


def image_vs_forward_limit(dataset: mmkit.CaptionDataset, encoders: mmkit.Encoders) -> Contest:
    size = _IMAGE_BATCH["cpu"]
    pixels = torch.stack([encoders.preprocessor.preprocess_image(dataset.image(i)) for i in range(len(dataset))])
    batches = [batch.contiguous(memory_format=torch.channels_last) for batch in pixels.split(size)]

    def baseline() -> Tensor:
        with _autocast(encoders, "auto")[0]:
            return torch.cat([encoders.image(batch).pooled for batch in batches])

    assert_same_direction(image_features(dataset, encoders, "auto"), baseline())
    return Contest(
        "image_vs_forward_limit",
        "images/s",
        f"decoding and EfficientNet-Lite0 of {len(dataset)} drawn scenes as extract_features does it, against the "
        f"forward pass alone over decoded batches of {size}, channels-last, {_autocast(encoders, 'auto')[1]}: 1 would "
        "be decoding for nothing",
        lambda: image_features(dataset, encoders, "auto"),
        baseline,
        len(dataset),
        len(dataset),
    )


def image_compiled_vs_eager(dataset: mmkit.CaptionDataset, encoders: mmkit.Encoders) -> Contest:
    """What torch.compile would gain; it is not used, since with decoding beside it, it gained nothing."""
    data = dataset.select(range(len(dataset) // COMPILED_BATCH * COMPILED_BATCH))
    image = encoders.image
    compiled = replace(
        encoders, image=mmkit.ImageEncoder(image.name, torch.compile(image.backbone), image.dim, image.transform)
    )

    def ours() -> np.ndarray:
        work = InMemory("images", len(data), image.dim, len(data) // COMPILED_BATCH)
        with _autocast(encoders, "auto")[0]:
            _encode_images(data, compiled, work, COMPILED_BATCH)
        return work.arrays["images"]

    assert_same_direction(ours(), torch.from_numpy(image_features(data, encoders, "auto")))
    return Contest(
        "image_compiled_vs_eager",
        "images/s",
        f"decoding and EfficientNet-Lite0 of {len(data)} drawn scenes through torch.compile in batches of "
        f"{COMPILED_BATCH}, against extract_features as it is; compiling (most of a minute) not counted",
        ours,
        lambda: image_features(data, encoders, "auto"),
        len(data),
        len(data),
    )


def store_vs_memory(folder: Path) -> Contest:
    """Random batches as training reads them: an image and a caption for each pair."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    arrays = {
        "images": rng.standard_normal((STORED, 1280)).astype(np.float16),
        "captions": rng.standard_normal((STORED, 384)).astype(np.float16),
        "caption_image": np.arange(STORED),
        "image_ids": np.arange(STORED),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "manifest.json").write_text(json.dumps({"sha256": dict.fromkeys(arrays, "")}))
    part = mmkit.FeatureStore(folder).select()
    rows = [rng.choice(STORED, STORED_BATCH, replace=False) for _ in range(STORED_READS)]

    def ours() -> list[tuple[Tensor, Tensor]]:
        return [(part.images(chosen), part.captions(chosen)) for chosen in rows]

    def baseline() -> list[tuple[Tensor, Tensor]]:
        return [
            tuple(torch.from_numpy(arrays[name][chosen].astype(np.float32)) for name in ("images", "captions"))
            for chosen in rows
        ]

    for found, expected in zip(ours(), baseline(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return Contest(
        "store_vs_memory",
        "batches/s",
        f"random batches of {STORED_BATCH} pairs, 1280 and 384 features in float16, read as float32 from a store "
        f"of {STORED:,} pairs on disk, against the same from numpy arrays in memory",
        ours,
        baseline,
        STORED_READS,
        STORED_READS,
    )


_MEASURED_RUN = """
import resource, sys
import torch
import mmkit
torch.set_num_threads(1)
folder, cache, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
data = mmkit.load_captions(folder)
data = data.select([i % len(data) for i in range(count)])
mmkit.extract_features(data, mmkit.load_encoders(device="cpu"), cache)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def memory_10x(scenes: Path, folder: Path) -> Contest:
    """No contest of time: the peak memory of extracting so many pictures, over that of ten times as many."""

    def peak(count: int) -> float:
        run = [sys.executable, "-c", _MEASURED_RUN, str(scenes), str(folder), str(count)]
        return float(subprocess.run(run, env=os.environ, capture_output=True, text=True, check=True).stdout.split()[-1])

    few, many = SCENES, 10 * SCENES
    small, large = peak(few), peak(many)
    return Contest(
        "memory_10x",
        "KiB",
        f"peak resident memory of a process that extracts {many:,} pictures and their captions, against {few}; below 1 "
        "where it grows with the data",
        lambda: large,
        lambda: small,
    )


def as_large_as_photos(dataset: mmkit.CaptionDataset, folder: Path) -> mmkit.CaptionDataset:
    """The scenes as JPEG files of 640 × 480 pixels, as most of COCO's are."""
    (folder / "scenes").mkdir(parents=True)
    for index, file in enumerate(dataset.files):
        dataset.image(index).resize((640, 480), Image.Resampling.BICUBIC).save(folder / file, quality=90)
    return replace(dataset, root=folder)


def decode_vs_plain_loop(dataset: mmkit.CaptionDataset) -> Contest:
    preprocessor = mmkit.MultimodalPreprocessor()
    plain = mmkit.image_transform()

    def ours() -> list[Tensor]:
        return [preprocessor.preprocess_image(dataset.image(index)) for index in range(len(dataset))]

    def baseline() -> list[Tensor]:
        return [plain(Image.open(dataset.root / file).convert("RGB")) for file in dataset.files]

    assert all(torch.equal(a, b) for a, b in zip(ours(), baseline(), strict=True))
    return Contest(
        "decode_vs_plain_loop",
        "images/s",
        f"decoding and transform of {len(dataset)} scenes of 640 × 480 by CaptionDataset and MultimodalPreprocessor "
        "(EXIF, modes and faults looked after), against a loop of Image.open, convert and the same transform",
        ours,
        baseline,
        len(dataset),
        len(dataset),
    )


def decode_two_workers(dataset: mmkit.CaptionDataset) -> Contest:
    many = dataset.select([index % len(dataset) for index in range(DECODED)])
    options = {"batch_size": DECODED_BATCH, "collate_fn": mmkit.MultimodalPreprocessor().collate}
    pair = DataLoader(many, num_workers=2, persistent_workers=True, **options)
    alone = DataLoader(many, **options)

    def pixels(loader: DataLoader) -> float:
        return sum(batch["pixels"].sum().item() for batch in loader)

    assert pixels(pair) == pixels(alone)
    return Contest(
        "decode_two_workers",
        "images/s",
        f"batches of {DECODED_BATCH} from a DataLoader over {DECODED} scenes of 640 × 480 and their captions: two "
        "worker processes that run already, against none",
        lambda: pixels(pair),
        lambda: pixels(alone),
        DECODED,
        DECODED,
    )


def annotations_vs_json(folder: Path) -> Contest:
    """Karpathy's file in small, with the token lists that make up most of it."""
    (folder / "val2014").mkdir(parents=True)
    rows = []
    for image in range(RECORDS):
        name = f"COCO_val2014_{image:012}.jpg"
        (folder / "val2014" / name).touch()
        tokens = [[f"word{(7 * image + 3 * k + n) % 700}" for n in range(10)] for k in range(5)]
        told = [
            {"tokens": row, "raw": " ".join(row), "imgid": image, "sentid": 5 * image + k}
            for k, row in enumerate(tokens)
        ]
        rows.append(
            {
                "filepath": "val2014",
                "filename": name,
                "imgid": image,
                "split": "train",
                "sentences": told,
                "cocoid": image,
            }
        )
    file = folder / "dataset_coco.json"
    file.write_text(json.dumps({"images": rows, "dataset": "coco"}), encoding="utf-8")

    def ours() -> mmkit.CaptionDataset:
        return mmkit.load_captions(folder)

    def baseline() -> list[tuple[str, list[str]]]:
        content = json.loads(file.read_text(encoding="utf-8"))
        return [
            (row["filename"], [sentence["raw"] for sentence in row["sentences"]])
            for row in content["images"]
            if (folder / row["filepath"] / row["filename"]).is_file()
        ]

    assert ours().captions == tuple(text for _, texts in baseline() for text in texts)
    return Contest(
        "annotations_vs_json",
        "s",
        f"reading and checking Karpathy's annotations of {RECORDS:,} images by load_captions, against json.loads, a "
        "loop over the records and a look for each picture file",
        ours,
        baseline,
    )


def random_pool(dims: tuple[int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(IMAGES, dims[0], generator=generator), torch.randn(TEXTS, dims[1], generator=generator)


def fit_vs_bare_loop() -> Contest:
    """The same batches, losses and steps; `fit` adds Accelerate, the schedule, the history and the best epoch."""
    profile = mmkit.profile("mini")
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(FITTED, dim, generator=generator) for dim in (1280, 384))
    train = mmkit.PairedFeatures.from_arrays(images, texts, range(FITTED))
    validation = mmkit.PairedFeatures.from_arrays(images[:FITTED_BATCH], texts[:FITTED_BATCH], range(FITTED_BATCH))

    def ours() -> object:
        fuser = mmkit.build_fuser("mlp", profile, 1280, 384)
        return mmkit.fit(fuser, train, validation, epochs=FITTED_EPOCHS, batch_size=FITTED_BATCH)

    def baseline() -> object:
        fuser = mmkit.build_fuser("mlp", profile, 1280, 384)
        fuser.standardize_images.fit(images)
        fuser.standardize_texts.fit(texts)
        losses = _PairLosses(fuser)
        optimizer = torch.optim.AdamW(fuser.parameters(), lr=1e-4)
        for _ in range(FITTED_EPOCHS):
            fuser.train()
            for rows in torch.randperm(FITTED).split(FITTED_BATCH):
                contrastive, matching, _ = losses(Batch(images[rows], texts[rows], torch.arange(len(rows)), rows[:0]))
                optimizer.zero_grad()
                (contrastive + matching).backward()
                torch.nn.utils.clip_grad_norm_(fuser.parameters(), 1.0)
                optimizer.step()
            fuser.eval()
            with torch.no_grad():
                losses(Batch(images[:FITTED_BATCH], texts[:FITTED_BATCH], torch.arange(FITTED_BATCH), torch.arange(0)))
        return fuser

    ours(), baseline()
    return Contest(
        "fit_vs_bare_loop",
        "s",
        f"{FITTED_EPOCHS} epochs of MultimodalFeatureFuser(1280, 384, {profile.fusion_dim}) on {FITTED:,} pairs in "
        f"batches of {FITTED_BATCH}, with a look at a validation batch after each: fit, against a bare PyTorch loop",
        ours,
        baseline,
    )


def score_vs_pairwise() -> Contest:
    profile = mmkit.profile("mini")
    fuser = mmkit.build_fuser("mlp", profile, 1280, 384).eval()
    torch.nn.init.normal_(fuser.match_head.weight, std=0.1)
    images, texts = random_pool((1280, 384))
    pairs = torch.randperm(IMAGES * TEXTS, generator=torch.Generator().manual_seed(1))[:PAIRS]

    @torch.inference_mode()
    def ours() -> Tensor:
        return fuser.score(images, texts)

    @torch.inference_mode()
    def baseline() -> Tensor:
        image_nodes, text_nodes = fuser.nodes(images, texts)
        logits = [
            fuser.match(image_nodes[chosen // TEXTS], text_nodes[chosen % TEXTS]) for chosen in pairs.split(PAIR_BATCH)
        ]
        return torch.cat(logits)

    gap = (ours().flatten()[pairs] - baseline()).abs().max()
    assert gap < 1e-3, f"the two ways disagree by {gap:.1e}"
    return Contest(
        "score_vs_pairwise",
        "s",
        f"match logits of {IMAGES:,} × {TEXTS:,} pairs with MultimodalFeatureFuser(1280, 384, {profile.fusion_dim}): "
        f"score, against match pair by pair in batches of {PAIR_BATCH:,}; the baseline is extrapolated from "
        f"{PAIRS:,} random pairs",
        ours,
        baseline,
        1,
        PAIRS / (IMAGES * TEXTS),
    )


def shortlist_vs_all_pairs() -> Contest:
    """Scored pair by pair, as a fuser of parts has to without a shortlist; of its own blocks of all pairs the text
    tells the ratio too."""
    torch.manual_seed(0)
    fuser = mmkit.RegionWordGNN(1280, 384, 128).eval()
    image_nodes = torch.nn.functional.normalize(torch.randn(IMAGES, 50, 128), dim=-1)
    text_nodes = torch.randn(TEXTS, 15, 133)
    text_nodes[..., :128] = torch.nn.functional.normalize(text_nodes[..., :128], dim=-1)
    text_nodes[torch.arange(15) > torch.randint(8, 15, (TEXTS, 1))] = 0
    owner = torch.arange(TEXTS) // (TEXTS // IMAGES)
    pairs = torch.randperm(IMAGES * TEXTS)[:SHORTLISTED]

    @torch.inference_mode()
    def ours() -> tuple[Tensor, Tensor]:
        return shortlist_ranks(fuser, image_nodes, text_nodes, owner, SHORTLIST)

    @torch.inference_mode()
    def baseline() -> Tensor:
        return pair_logits(fuser, image_nodes, text_nodes, pairs // TEXTS, pairs % TEXTS)

    @torch.inference_mode()
    def blocks() -> Tensor:
        return fuser.score_nodes(image_nodes[:20], text_nodes)

    few = slice(0, 40)
    with torch.inference_mode():
        scores = fuser.score_nodes(image_nodes[few], text_nodes[:200])
        found = shortlist_ranks(fuser, image_nodes[few], text_nodes[:200], owner[:200], 200)
    assert all(torch.equal(a, b) for a, b in zip(found, mmkit.ranks(scores, owner[:200]), strict=True))
    ours(), blocks()
    in_blocks = seconds(blocks) * IMAGES / 20 / seconds(ours)
    return Contest(
        "shortlist_vs_all_pairs",
        "s",
        f"ranks of {IMAGES:,} × {TEXTS:,} pairs with RegionWordGNN(1280, 384, 128), nodes at hand: {SHORTLIST} "
        f"candidates of each query, against match on every pair, extrapolated from {SHORTLISTED:,}; against its "
        f"score_nodes, which shares work between pairs, once {in_blocks:.1f} times faster",
        ours,
        baseline,
        1,
        SHORTLISTED / (IMAGES * TEXTS),
    )


def ranks_vs_sort() -> Contest:
    scores = torch.randn(IMAGES, TEXTS, generator=torch.Generator().manual_seed(0))
    owner = torch.arange(TEXTS) // (TEXTS // IMAGES)

    def ours() -> tuple[Tensor, Tensor]:
        return mmkit.ranks(scores, owner)

    def baseline() -> tuple[Tensor, Tensor]:
        own_captions = owner[scores.argsort(dim=1, descending=True)] == torch.arange(IMAGES)[:, None]
        own_images = scores.argsort(dim=0, descending=True) == owner
        return own_captions.int().argmax(dim=1) + 1, own_images.int().argmax(dim=0) + 1

    assert all(torch.equal(a, b) for a, b in zip(ours(), baseline(), strict=True))
    return Contest(
        "ranks_vs_sort",
        "s",
        f"ranks of the true matches of {IMAGES:,} × {TEXTS:,} scores both ways: counted by mmkit.ranks, against "
        "argsort",
        ours,
        baseline,
    )


def train_two_processes(folder: Path, open_teams: ExitStack) -> Contest:
    both, alone = (
        open_teams.enter_context(Team(count, folder / f"training-{count}", "training", TRAINED, TRAINED_BATCH))
        for count in (2, 1)
    )
    assert abs(both.do() / alone.do() - 1) < 0.02  # each process draws its own dropout
    return Contest(
        "train_two_processes",
        "pairs/s",
        f"an epoch of MultimodalFeatureFuser(2048, 768, 1024) on {TRAINED:,} pairs in global batches of "
        f"{TRAINED_BATCH}: two processes of one thread, which gather nodes and gradients by gloo, against one",
        both.do,
        alone.do,
        TRAINED,
        TRAINED,
    )


def extract_two_processes(scenes: Path, folder: Path, open_teams: ExitStack) -> Contest:
    def team(count: int) -> Team:
        cache = folder / f"cache-{count}"
        return open_teams.enter_context(
            Team(count, folder / f"extraction-{count}", "extraction", scenes, EXTRACTED, cache)
        )

    both, alone = team(2), team(1)
    assert both.do() == alone.do()
    return Contest(
        "extract_two_processes",
        "images/s",
        f"features of {EXTRACTED} scenes and their captions, written to disk: two processes of one thread, against one",
        both.do,
        alone.do,
        EXTRACTED,
        EXTRACTED,
    )


def contests(folder: Path, part: str) -> Iterator[Contest]:
    """Each made, and so warmed up, when its turn comes."""
    dataset = mmkit.load_captions(mmkit.draw_scenes(folder / "scenes", SCENES)).select(range(SCENES))
    encoders, open_teams = mmkit.load_encoders(device="cpu"), ExitStack()
    makers: dict[str, Callable[[], Contest]] = {
        "decode_vs_plain_loop": lambda: decode_vs_plain_loop(as_large_as_photos(dataset, folder / "photos")),
        "decode_two_workers": lambda: decode_two_workers(as_large_as_photos(dataset, folder / "large")),
        "annotations_vs_json": lambda: annotations_vs_json(folder / "karpathy"),
        "text_vs_pad512": lambda: text_vs_pad512(dataset, encoders),
        "text_vs_sentence_transformers": lambda: text_vs_sentence_transformers(dataset, encoders),
        "image_vs_plain_loop": lambda: image_contest("image_vs_plain_loop", "auto", dataset, encoders),
        "image_vs_plain_loop_float32": lambda: image_contest(
            "image_vs_plain_loop_float32", "float32", dataset, encoders
        ),
        "image_vs_forward_limit": lambda: image_vs_forward_limit(dataset, encoders),
        "image_compiled_vs_eager": lambda: image_compiled_vs_eager(dataset, encoders),
        "store_vs_memory": lambda: store_vs_memory(folder / "store"),
        "memory_10x": lambda: memory_10x(folder / "scenes", folder / "cache"),
        "fit_vs_bare_loop": fit_vs_bare_loop,
        "score_vs_pairwise": score_vs_pairwise,
        "shortlist_vs_all_pairs": shortlist_vs_all_pairs,
        "ranks_vs_sort": ranks_vs_sort,
        "train_two_processes": lambda: train_two_processes(folder / "training", open_teams),
        "extract_two_processes": lambda: extract_two_processes(
            mmkit.draw_scenes(folder / "many", EXTRACTED), folder / "extraction", open_teams
        ),
    }
    chosen = [make for name, make in makers.items() if part in name]
    if not chosen:
        raise SystemExit(f"No measurement {part!r}. Valid names: {', '.join(makers)}")
    for make in chosen:
        with open_teams:
            yield make()
