"""Measures the package against plain baselines, side by side: python tests/bench.py [--out build/bench.json]

A ratio above 1 means that the package is faster.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

import mmkit
from mmkit.features import _CAPTION_BATCH, _IMAGE_BATCH, _autocast, _encode_captions, _encode_images

SCENES, CAPTIONS, PADDED = 150, 256, 16
DECODED, DECODED_BATCH = 600, 25
RECORDS = 20_000  # images of a synthetic Karpathy file
IMAGES, TEXTS, PAIRS, PAIR_BATCH = 1000, 5000, 50_000, 4096


@dataclass(frozen=True)
class Entry:
    """Medians over the rounds; `ratio` is the median of the rounds' ratios, above 1 where ours is better."""

    name: str
    ratio: float
    ours: float
    baseline: float
    unit: str
    what: str


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


def measure(contest: Contest, rounds: int) -> Entry:
    """Alternate, so that what else the machine does falls on both. The check that both agree has warmed them up."""
    pairs = []
    for number in range(1, rounds + 1):
        print(f"{contest.name}: round {number} of {rounds}", file=sys.stderr, flush=True)
        first = seconds(contest.ours) / contest.ours_amount
        pairs.append((first, seconds(contest.baseline) / contest.baseline_amount))
    ours, baseline = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(slow / fast for fast, slow in pairs)
    if contest.unit != "s":
        ours, baseline = 1 / ours, 1 / baseline
    ours, baseline = (float(f"{value:.4g}") for value in (ours, baseline))
    what = f"{contest.what}; torch threads: {torch.get_num_threads()}"
    return Entry(contest.name, round(ratio, 2), ours, baseline, contest.unit, what)


class InMemory:
    """Stands in for the half-written folder of an extraction, so that no disk is measured."""

    def __init__(self, name: str, rows: int, dim: int) -> None:
        self.arrays, self.done = {name: np.zeros((rows, dim), np.float16)}, {name: 0}

    def advance(self, name: str, last: bool) -> None:
        self.done[name] += 1


def assert_same_direction(found: np.ndarray, expected: Tensor) -> None:
    cosine = torch.cosine_similarity(torch.from_numpy(found).float(), expected.float())
    assert cosine.min() > 0.95, f"the two ways disagree: cosine {cosine.min():.4f}"  # bfloat16 reaches 0.98


# --- the contests --------------------------------------------------------------------------------


def text_vs_pad512(dataset: mmkit.CaptionDataset, encoders: mmkit.Encoders) -> Contest:
    captions = list(dict.fromkeys(dataset.captions))[:CAPTIONS]
    rows = np.zeros(len(captions), dtype=int)
    few = mmkit.CaptionDataset(dataset.root, dataset.image_ids[:1], dataset.files[:1], tuple(captions), rows)
    sample = captions[:: len(captions) // PADDED][:PADDED]
    tokenizer, batch = encoders.text.tokenizer, _CAPTION_BATCH["cpu"]

    def ours() -> np.ndarray:
        work = InMemory("captions.npy", len(captions), encoders.text.dim)
        with _autocast(encoders, "auto")[0]:
            _encode_captions(few, encoders, work)
        return work.arrays["captions.npy"]

    def baseline() -> Tensor:
        tokens = tokenizer(sample, padding="max_length", max_length=512, truncation=True, return_tensors="pt")
        with _autocast(encoders, "auto")[0]:
            return encoders.text(tokens["input_ids"], tokens["attention_mask"]).pooled

    assert_same_direction(ours()[[captions.index(text) for text in sample]], baseline())
    return Contest(
        "text_vs_pad512",
        "captions/s",
        f"MiniLM-L6 in {_autocast(encoders, 'auto')[1]}: {len(captions)} distinct captions of drawn scenes as "
        f"extract_features encodes them (sorted by length, batches of {batch} padded to their longest), against "
        f"{PADDED} of them in one batch padded to 512 tokens; same weights and precision",
        ours,
        baseline,
        len(captions),
        len(sample),
    )


def image_contest(name: str, precision: str, dataset: mmkit.CaptionDataset, encoders: mmkit.Encoders) -> Contest:
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    model.load_state_dict(encoders.image.backbone.owner.state_dict())
    model.eval()

    def ours() -> np.ndarray:
        work = InMemory("images.npy", len(dataset), encoders.image.dim)
        with _autocast(encoders, precision)[0]:
            _encode_images(dataset, encoders, work)
        return work.arrays["images.npy"]

    @torch.no_grad()
    def baseline() -> Tensor:
        pictures = (encoders.preprocessor.preprocess_image(dataset.root / file) for file in dataset.files)
        return torch.cat([model.forward_features(picture[None]).mean(dim=(2, 3)) for picture in pictures])

    assert_same_direction(ours(), baseline())
    return Contest(
        name,
        "images/s",
        f"decoding and EfficientNet-Lite0 of {len(dataset)} drawn scenes as extract_features does it (two decoding "
        f"threads, batches of {_IMAGE_BATCH['cpu']}, channels-last, {_autocast(encoders, precision)[1]}), against a "
        "plain loop over timm's tf_efficientnet_lite0 (one picture at a time, default layout, float32); same weights",
        ours,
        baseline,
        len(dataset),
        len(dataset),
    )


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
        f"decoding and transform of {len(dataset)} drawn scenes by CaptionDataset and MultimodalPreprocessor (EXIF, "
        "modes and faults looked after), against a loop of Image.open, convert and the same torchvision transform",
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
        f"batches of {DECODED_BATCH} from a DataLoader over {DECODED} drawn scenes and their captions: two worker "
        "processes that run already, against none",
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


def contests(folder: Path, part: str) -> Iterator[Contest]:
    """Each made, and so warmed up, when its turn comes."""
    dataset = mmkit.load_captions(mmkit.draw_scenes(folder / "scenes", SCENES)).select(range(SCENES))
    encoders = mmkit.load_encoders(device="cpu")
    makers: dict[str, Callable[[], Contest]] = {
        "decode_vs_plain_loop": lambda: decode_vs_plain_loop(dataset),
        "decode_two_workers": lambda: decode_two_workers(dataset),
        "annotations_vs_json": lambda: annotations_vs_json(folder / "karpathy"),
        "text_vs_pad512": lambda: text_vs_pad512(dataset, encoders),
        "image_vs_plain_loop": lambda: image_contest("image_vs_plain_loop", "auto", dataset, encoders),
        "image_vs_plain_loop_float32": lambda: image_contest(
            "image_vs_plain_loop_float32", "float32", dataset, encoders
        ),
        "score_vs_pairwise": score_vs_pairwise,
        "ranks_vs_sort": ranks_vs_sort,
    }
    chosen = [make for name, make in makers.items() if part in name]
    if not chosen:
        raise SystemExit(f"No measurement {part!r}. Valid names: {', '.join(makers)}")
    for make in chosen:
        yield make()


def write(path: Path, entries: list[Entry]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps([asdict(entry) for entry in entries], indent=1, ensure_ascii=False), encoding="utf-8")
    beside.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"))
    # threads that wait for each other make a busy machine's figures a lottery
    parser.add_argument("--threads", type=int, default=1, help="of torch, on both sides (default: 1)")
    parser.add_argument("--only", default="", metavar="PART", help="names that contain PART")
    parser.add_argument("--rounds", type=int, default=3, help="of which medians are taken (default: 3)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start, entries = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        for contest in contests(Path(folder), arguments.only):
            entries.append(measure(contest, arguments.rounds))
    write(arguments.out, entries)
    print(f"\n{'':<28} {'ratio':>7} {'ours':>9} {'baseline':>9}")
    for entry in entries:
        print(f"{entry.name:<28} {entry.ratio:>6.2f}× {entry.ours:>9.4g} {entry.baseline:>9.4g} {entry.unit}")
    for entry in entries:
        print(f"\n{entry.name}: {entry.what}.")
    print(f"\n{time.perf_counter() - start:.0f} s; written to {arguments.out}")


if __name__ == "__main__":
    main()
