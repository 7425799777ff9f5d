"""What bench.py measures: for each contest two ways to the same result, checked to agree before they are timed."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor

import mmkit
from mmkit.features import autocast
from workers import Team

SCENES, PADDED = 150, 16
FITTED, FITTED_BATCH, FITTED_EPOCHS = 4096, 512, 4
RECORDS = 20_000  # images of a synthetic Karpathy file
IMAGES, TEXTS, PAIRS, PAIR_BATCH = 1000, 5000, 50_000, 4096
SHORTLIST, SHORTLISTED = 50, 20_000
READ_BATCH, READS = 512, 40
TRAINED, TRAINED_BATCH, EXTRACTED = 8192, 512, 300  # by processes


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


class Bench:
    """What the contests share: scenes, encoders, a folder, and processes that end with it."""

    def __init__(self, folder: Path, teams: ExitStack) -> None:
        self.folder, self.teams, self.numbers = folder, teams, itertools.count()
        scenes = mmkit.load_captions(mmkit.draw_scenes(folder / "scenes", SCENES))
        self.dataset, self.encoders = scenes.select(range(SCENES)), mmkit.load_encoders(device="cpu")

    def fresh(self) -> Path:
        """A folder of its own for each call."""
        return self.folder / f"fresh-{next(self.numbers)}"

    def photos(self) -> mmkit.CaptionDataset:
        """The scenes as JPEG files of 640 × 480 pixels, as most of COCO's are."""
        root = self.fresh()
        (root / "scenes").mkdir(parents=True)
        for index, file in enumerate(self.dataset.files):
            self.dataset.image(index).resize((640, 480), Image.Resampling.BICUBIC).save(root / file, quality=90)
        return replace(self.dataset, root=root)

    def team(self, count: int, task: str, *arguments: object) -> Team:
        return self.teams.enter_context(Team(count, self.fresh(), task, *arguments))


def same_direction(features: Tensor, expected: Tensor) -> bool:
    return bool(torch.cosine_similarity(features.float(), expected.float()).min() > 0.95)  # bfloat16 reaches 0.98


# --- reading ---------------------------------------------------------------------------------------


def decode_vs_plain_loop(bench: Bench) -> Contest:
    """Decoding and transform of scenes of 640 × 480 by CaptionDataset and MultimodalPreprocessor (EXIF, modes and
    faults looked after), against a loop of Image.open, convert and the same transform"""
    data, preprocessor, plain = bench.photos(), mmkit.MultimodalPreprocessor(), mmkit.image_transform()

    def ours() -> list[Tensor]:
        return [preprocessor.preprocess_image(data.image(index)) for index in range(len(data))]

    def baseline() -> list[Tensor]:
        return [plain(Image.open(data.root / file).convert("RGB")) for file in data.files]

    assert all(torch.equal(a, b) for a, b in zip(ours(), baseline(), strict=True))
    return Contest("", "images/s", "", ours, baseline, len(data), len(data))


def annotations_vs_json(bench: Bench) -> Contest:
    """Reading and checking Karpathy's annotations of 20,000 images by load_captions, against json.loads, a loop over
    the records and a look for each picture file"""
    folder = bench.fresh()
    (folder / "val2014").mkdir(parents=True)
    rows = []
    for image in range(RECORDS):
        name = f"COCO_val2014_{image:012}.jpg"
        (folder / "val2014" / name).touch()
        words = [[f"word{(7 * image + 3 * k + n) % 700}" for n in range(10)] for k in range(5)]
        told = [{"tokens": row, "raw": " ".join(row), "imgid": image, "sentid": 5 * image} for row in words]
        rows.append({"filepath": "val2014", "filename": name, "split": "train", "sentences": told, "cocoid": image})
    file = folder / "dataset_coco.json"
    file.write_text(json.dumps({"images": rows, "dataset": "coco"}), encoding="utf-8")

    def baseline() -> list[str]:
        content = json.loads(file.read_text(encoding="utf-8"))["images"]
        there = [row for row in content if (folder / row["filepath"] / row["filename"]).is_file()]
        return [sentence["raw"] for row in there for sentence in row["sentences"]]

    assert list(mmkit.load_captions(folder).captions) == baseline()
    return Contest("", "s", "", lambda: mmkit.load_captions(folder), baseline)


# --- features --------------------------------------------------------------------------------------


def text_vs_pad512(bench: Bench) -> Contest:
    """MiniLM-L6: the distinct captions of 150 drawn scenes as extract_texts encodes them (by length, batches padded to
    their longest, written to disk), against 16 of them in one batch padded to 512 tokens; same weights and precision"""
    encoders, captions = bench.encoders, list(dict.fromkeys(bench.dataset.captions))
    sample = captions[:: len(captions) // PADDED][:PADDED]

    def ours() -> mmkit.FeatureTable:
        return mmkit.extract_texts(captions, encoders, bench.fresh())

    def baseline() -> Tensor:
        tokens = encoders.text.tokenizer(sample, padding="max_length", max_length=512, return_tensors="pt")
        with mmkit.autocast(encoders, "auto")[0]:
            return encoders.text(tokens["input_ids"], tokens["attention_mask"]).pooled

    assert same_direction(ours().vectors()[[captions.index(text) for text in sample]], baseline())
    return Contest("", "captions/s", "", ours, baseline, len(captions), len(sample))


def _images(bench: Bench) -> Contest:
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0).eval()
    model.load_state_dict(bench.encoders.image.backbone.model.state_dict())
    # one caption for all, so that pictures alone are timed
    data = replace(bench.dataset, captions=("a",) * SCENES, image_index=np.arange(SCENES))

    def ours() -> mmkit.PairedFeatures:
        return mmkit.extract_features(data, bench.encoders, bench.fresh())

    @torch.no_grad()
    def baseline() -> Tensor:
        pictures = (bench.encoders.preprocessor.preprocess_image(data.root / file) for file in data.files)
        return torch.cat([model.forward_features(picture[None]).mean(dim=(2, 3)) for picture in pictures])

    assert same_direction(ours().images(), baseline())
    return Contest("", "images/s", "", ours, baseline, SCENES, SCENES)


def image_vs_plain_loop(bench: Bench) -> Contest:
    """Decoding and EfficientNet-Lite0 of 150 drawn scenes as extract_features does it (decoded ahead, small batches,
    channels-last, bfloat16 where the processor has it, written to disk), against a plain loop over timm's model (one
    picture at a time, default layout, float32); same weights"""
    return _images(bench)


def image_vs_forward_limit(bench: Bench) -> Contest:
    """The same as image_vs_plain_loop, against the forward pass alone over decoded batches of four, channels-last, in
    the same precision: 1 would be decoding for nothing"""
    encoders, fair = bench.encoders, _images(bench)
    pixels = torch.stack([encoders.preprocessor.preprocess_image(bench.dataset.image(at)) for at in range(SCENES)])

    def baseline() -> Tensor:
        with autocast(encoders, "auto")[0]:
            return torch.cat([encoders.image(batch).pooled for batch in pixels.split(4)])

    return replace(fair, baseline=baseline)


def store_vs_memory(bench: Bench) -> Contest:
    """Random batches of 512 pairs as training reads them, float32 from a store of float16 on disk (1,650 scenes),
    against the same from numpy arrays in memory"""
    data = mmkit.load_captions(mmkit.draw_scenes(bench.fresh()))
    features = mmkit.extract_features(data, bench.encoders, bench.fresh())
    arrays = [part.numpy().astype(np.float16) for part in (features.images(), features.captions())]
    rng = np.random.default_rng(0)
    batches = [rng.choice(len(data.captions), READ_BATCH, replace=False) for _ in range(READS)]
    of = features.image_index.numpy()

    def ours() -> list[tuple[Tensor, Tensor]]:
        return [(features.images(of[chosen]), features.captions(chosen)) for chosen in batches]

    def baseline() -> list[tuple[Tensor, Tensor]]:
        read = [(arrays[0][of[chosen]], arrays[1][chosen]) for chosen in batches]
        return [tuple(torch.from_numpy(part.astype(np.float32)) for part in pair) for pair in read]

    assert all(torch.equal(a, b) for x, y in zip(ours(), baseline(), strict=True) for a, b in zip(x, y, strict=True))
    return Contest("", "batches/s", "", ours, baseline, READS, READS)


_MEASURED_RUN = """
import resource, sys
import torch
import mmkit
torch.set_num_threads(1)
folder, cache, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
mmkit.extract_features(mmkit.load_captions(folder).select(range(count)), mmkit.load_encoders(device="cpu"), cache)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def memory_10x(bench: Bench) -> str:
    """Peak resident memory of a process that extracts 1,500 pictures and their captions, over that of 150"""
    folder = mmkit.draw_scenes(bench.fresh())

    def peak(count: int) -> float:
        run = [sys.executable, "-c", _MEASURED_RUN, str(folder), str(bench.fresh()), str(count)]
        return float(subprocess.run(run, env=os.environ, capture_output=True, text=True, check=True).stdout.split()[-1])

    return f"memory_10x: {peak(10 * SCENES) / peak(SCENES):.2f} times the memory for ten times the pictures"


def extract_two_processes(bench: Bench) -> Contest:
    """Features of 300 scenes and their captions, written to disk: two processes of one thread, against one"""
    scenes = mmkit.draw_scenes(bench.fresh(), EXTRACTED)
    both, alone = (bench.team(count, "extraction", scenes, EXTRACTED, bench.fresh()) for count in (2, 1))
    assert both.do() == alone.do()
    return Contest("", "images/s", "", both.do, alone.do, EXTRACTED, EXTRACTED)


# --- training --------------------------------------------------------------------------------------


def fit_vs_bare_loop(bench: Bench) -> Contest:
    """Epochs of the MLP fuser on 4,096 pairs in batches of 512, with a look at a validation batch after each: fit, with
    Accelerate, the schedule, the history and the best epoch, against a bare PyTorch loop"""
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(FITTED, dim, generator=generator) for dim in (1280, 384))
    train, validation = (
        mmkit.PairedFeatures.from_arrays(images[:count], texts[:count], range(count))
        for count in (FITTED, FITTED_BATCH)
    )
    profile = mmkit.profile("mini", epochs=FITTED_EPOCHS, batch_size=FITTED_BATCH)

    def ours() -> object:
        return mmkit.fit(mmkit.build_fuser("mlp", profile, 1280, 384), train, validation, profile)

    def losses_of(loss: mmkit.JointLoss, rows: Tensor) -> Tensor:
        index = torch.arange(len(rows))
        contrastive, matching, _ = loss(mmkit.Batch(images[rows], texts[rows], index, rows[:0], index))
        return contrastive + matching

    def baseline() -> object:
        fuser = mmkit.build_fuser("mlp", profile, 1280, 384)
        fuser.standardize_images.fit(images)
        fuser.standardize_texts.fit(texts)
        loss, optimizer = mmkit.JointLoss(fuser), torch.optim.AdamW(fuser.parameters(), lr=profile.learning_rate)
        for _ in range(FITTED_EPOCHS):
            loss.train()
            for rows in torch.randperm(FITTED).split(FITTED_BATCH):
                optimizer.zero_grad()
                losses_of(loss, rows).backward()
                torch.nn.utils.clip_grad_norm_(fuser.parameters(), 1.0)
                optimizer.step()
            loss.eval()
            with torch.no_grad():
                losses_of(loss, torch.arange(FITTED_BATCH))
        return fuser

    ours(), baseline()
    return Contest("", "s", "", ours, baseline)


def train_two_processes(bench: Bench) -> Contest:
    """An epoch of MultimodalFeatureFuser(2048, 768, 1024) on 8,192 pairs in global batches of 512: two processes of one
    thread, which gather nodes and gradients by gloo, against one"""
    both, alone = (bench.team(count, "training", TRAINED, TRAINED_BATCH) for count in (2, 1))
    assert abs(both.do() / alone.do() - 1) < 0.02  # each process draws its own dropout
    return Contest("", "pairs/s", "", both.do, alone.do, TRAINED, TRAINED)


# --- evaluation ------------------------------------------------------------------------------------


def score_vs_pairwise(bench: Bench) -> Contest:
    """Match logits of 1,000 × 5,000 pairs with MultimodalFeatureFuser(1280, 384, 256): score, against match pair by
    pair in batches of 4,096; the baseline is extrapolated from 50,000 random pairs"""
    fuser = mmkit.build_fuser("mlp", mmkit.profile("mini"), 1280, 384).eval()
    torch.nn.init.normal_(fuser.match_head.weight, std=0.1)
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(IMAGES, 1280, generator=generator), torch.randn(TEXTS, 384, generator=generator)
    pairs = torch.randperm(IMAGES * TEXTS, generator=generator)[:PAIRS]

    @torch.inference_mode()
    def ours() -> Tensor:
        return fuser.score(images, texts)

    @torch.inference_mode()
    def baseline() -> Tensor:
        nodes = fuser.nodes(images, texts)
        return torch.cat([fuser.match(nodes[0][p // TEXTS], nodes[1][p % TEXTS]) for p in pairs.split(PAIR_BATCH)])

    assert (ours().flatten()[pairs] - baseline()).abs().max() < 1e-3
    return Contest("", "s", "", ours, baseline, 1, PAIRS / (IMAGES * TEXTS))


def shortlist_vs_all_pairs(bench: Bench) -> Contest:
    """Ranks of 1,000 × 5,000 pairs with RegionWordGNN(1280, 384, 128), nodes at hand: 50 candidates of each query,
    against match on every pair, as a fuser of parts has to without a shortlist, extrapolated from 20,000"""
    torch.manual_seed(0)
    fuser = mmkit.RegionWordGNN(1280, 384, 128).eval()
    images = torch.nn.functional.normalize(torch.randn(IMAGES, 50, 128), dim=-1)
    texts = torch.randn(TEXTS, 15, 133)
    texts[..., :128] = torch.nn.functional.normalize(texts[..., :128], dim=-1)
    texts[torch.arange(15) > torch.randint(8, 15, (TEXTS, 1))] = 0
    index = torch.arange(TEXTS) // (TEXTS // IMAGES)
    pool, pairs = mmkit.Pool(fuser, images, texts, index), torch.randperm(IMAGES * TEXTS)[:SHORTLISTED]

    @torch.inference_mode()
    def baseline() -> Tensor:
        return pool.logits(pairs // TEXTS, pairs % TEXTS)

    few = mmkit.Pool(fuser, images[:40], texts[:200], index[:200])
    both = zip(mmkit.shortlist_ranks(few, 200), mmkit.pool_ranks(few), strict=True)
    assert all(torch.equal(a, b) for a, b in both)
    ours = lambda: mmkit.shortlist_ranks(pool, SHORTLIST)  # noqa: E731
    ours()
    return Contest("", "s", "", ours, baseline, 1, SHORTLISTED / (IMAGES * TEXTS))


def ranks_vs_sort(bench: Bench) -> Contest:
    """Ranks of the true matches of 1,000 × 5,000 scores both ways: counted by mmkit.ranks, against argsort"""
    scores = torch.randn(IMAGES, TEXTS, generator=torch.Generator().manual_seed(0))
    index = torch.arange(TEXTS) // (TEXTS // IMAGES)

    def baseline() -> tuple[Tensor, Tensor]:
        own_captions = index[scores.argsort(dim=1, descending=True)] == torch.arange(IMAGES)[:, None]
        own_images = scores.argsort(dim=0, descending=True) == index
        return own_captions.int().argmax(dim=1) + 1, own_images.int().argmax(dim=0) + 1

    assert all(torch.equal(a, b) for a, b in zip(mmkit.ranks(scores, index), baseline(), strict=True))
    return Contest("", "s", "", lambda: mmkit.ranks(scores, index), baseline)


def contests(folder: Path, part: str) -> Iterator[Contest]:
    """Each made, and so warmed up, when its turn comes."""
    makers = (
        decode_vs_plain_loop, annotations_vs_json, text_vs_pad512,
        image_vs_plain_loop, image_vs_forward_limit, store_vs_memory, memory_10x,
        fit_vs_bare_loop, score_vs_pairwise, shortlist_vs_all_pairs, ranks_vs_sort, train_two_processes,
        extract_two_processes,
    )  # fmt: skip
    chosen = [make for make in makers if part in make.__name__]
    if not chosen:
        raise SystemExit(f"No measurement {part!r}. Valid names: {', '.join(make.__name__ for make in makers)}")
    with ExitStack() as teams:
        bench = Bench(folder, teams)
        for make in chosen:
            contest = make(bench)
            if isinstance(contest, str):
                print(contest)
                continue
            yield replace(contest, name=make.__name__, what=" ".join(make.__doc__.split()))
            teams.close()
