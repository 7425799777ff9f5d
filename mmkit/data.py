"""Reads and checks a folder in COCO-captions layout, and splits it by image."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image

from .annotations import Fault, read_annotations
from .captions import false_caption
from .errors import MissingFile, MmkitError
from .facts import FACTS, Scene
from .pictures import open_image
from .profiles import Profile
from .scenes import SCENES_VERSION, draw_scenes

SPLITS = ("train", "val", "test", "new")


@dataclass(frozen=True, eq=False)
class DiagnosticNegatives:
    """`N` false captions, each with exactly one `fact` changed: `texts[n]` is false of image `images[n]`, and differs
    in that fact alone from the true caption `captions[n]` (positions in the dataset, both `(N,)`)."""

    fact: str
    images: np.ndarray
    captions: np.ndarray
    texts: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class CaptionDataset:
    """Images with their captions: a map-style dataset for torch's `DataLoader`, without torch.

    Item `i` is `(image, captions)`: a Pillow RGB image and a list of strings.

    `caption_image[j]` is the position (not the id) of caption `j`'s image. `scenes[i]` holds the facts of a
    drawn scene; `scenes` is empty for photos. `faults` names what was left out, repaired or unusual while reading.
    """

    root: Path
    image_ids: tuple[int, ...]
    files: tuple[str, ...]
    captions: tuple[str, ...]
    caption_image: np.ndarray
    given_splits: tuple[str, ...] = ()
    scenes: tuple[Scene, ...] = ()
    faults: tuple[Fault, ...] = ()
    _captions_of: list[list[int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        captions_of: list[list[int]] = [[] for _ in self.image_ids]
        for caption, image in enumerate(self.caption_image):
            captions_of[image].append(caption)
        object.__setattr__(self, "_captions_of", captions_of)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Image.Image, list[str]]:
        return self.image(index), self.captions_of(index)

    def __repr__(self) -> str:
        return f"CaptionDataset({len(self):,} images, {len(self.captions):,} captions)"

    def image(self, index: int) -> Image.Image:
        """The picture at position `index`, decoded to RGB."""
        return open_image(self.root / self.files[index])

    def captions_of(self, index: int) -> list[str]:
        """All captions of the image at position `index`."""
        return [self.captions[j] for j in self._captions_of[index]]

    def select(self, images: Sequence[int] | np.ndarray) -> "CaptionDataset":
        """The dataset of the images at these positions, with all their captions."""
        images = [int(i) for i in images]
        chosen = [j for i in images for j in self._captions_of[i]]
        return replace(
            self,
            image_ids=tuple(self.image_ids[i] for i in images),
            files=tuple(self.files[i] for i in images),
            captions=tuple(self.captions[j] for j in chosen),
            caption_image=np.repeat(np.arange(len(images)), [len(self._captions_of[i]) for i in images]),
            given_splits=tuple(self.given_splits[i] for i in images) if self.given_splits else (),
            scenes=tuple(self.scenes[i] for i in images) if self.scenes else (),
        )

    def splits(self, val_fraction: float, test_fraction: float, seed: int = 0) -> dict[str, np.ndarray]:
        """Positions of the images of "train", "val" and "test": no image, so no caption, is in two of them.

        Images whose split the annotations give (Karpathy's) stay in it, "restval" counted as train, as do the new
        combinations of drawn scenes, a fourth part called "new"; the others are shuffled by `seed`, whatever
        their order in the file, and cut by the fractions.
        """
        given = np.array(["train" if name == "restval" else name for name in self.given_splits or [""] * len(self)])
        if unknown := set(given.tolist()) - {*SPLITS, ""}:
            raise MmkitError(
                f"The annotations name unknown splits {sorted(unknown)}. Valid: restval, {', '.join(SPLITS)}"
            )
        by_id = np.argsort(self.image_ids, kind="stable")
        free = by_id[given[by_id] == ""]
        val, test = round(len(free) * val_fraction), round(len(free) * test_fraction)
        if len(free) and (min(val_fraction, test_fraction) < 0 or val + test >= len(free)):
            raise MmkitError(
                f"val_fraction {val_fraction} and test_fraction {test_fraction} leave none of {len(free)} to train on."
            )
        free = free[np.random.default_rng(seed).permutation(len(free))]
        cut = {"train": free[val + test :], "val": free[:val], "test": free[val : val + test]}
        parts = {name: np.union1d(cut.get(name, free[:0]), np.flatnonzero(given == name)) for name in SPLITS}
        return {name: part for name, part in parts.items() if name != "new" or len(part)}

    def diagnostic_negatives(self, fact: str, seed: int = 0) -> DiagnosticNegatives:
        """For every image that has such a fact one caption with just that fact changed; drawn scenes only.

        `fact` is one of "object", "count", "ground", "time", "size", "relation" and "roles" (subject and object
        swapped). The texts are false by construction: they contradict the facts that the picture was drawn from.
        A choice depends on `seed`, the fact and the image's id alone.
        """
        if not self.scenes:
            raise MmkitError("Diagnostic negatives change the facts of drawn scenes; photos carry none.")
        if fact not in FACTS:
            raise MmkitError(f"No fact {fact!r}. Valid names: {', '.join(FACTS)}")
        images, captions, texts = [], [], []
        for image, scene in enumerate(self.scenes):
            rng = np.random.default_rng([seed, FACTS.index(fact), self.image_ids[image]])
            if found := false_caption(scene, self.captions_of(image), fact, rng):
                images.append(image)
                captions.append(self._captions_of[image][found[0]])
                texts.append(found[1])
        return DiagnosticNegatives(fact, np.array(images, dtype=int), np.array(captions, dtype=int), tuple(texts))

    def fingerprint(self) -> str:
        """A short digest of ids, captions, and names and sizes of the picture files."""
        digest = hashlib.sha256()
        sizes = [(self.root / name).stat().st_size for name in self.files]
        rows = zip(self.image_ids, self.files, sizes, strict=True)
        digest.update(json.dumps([list(rows), self.captions, self.caption_image.tolist()]).encode())
        return digest.hexdigest()[:16]


def load_captions(root: str | Path, skip_missing: bool = False) -> CaptionDataset:
    """Read a folder in COCO-captions layout: COCO 2014 or 2017, a subset, drawn scenes, or Karpathy's JSON.

    What makes a file unreadable stops with an `MmkitError` (see `annotations`). Records that cannot be used are
    left out; they, and those that are used after a repair, are named in `faults`. Images whose picture file is
    missing are left out too, as a fault that stops training, or with `skip_missing` as one that is skipped: for a
    folder that was meant to hold fewer pictures than its JSON lists.
    """
    root = Path(root)
    read = read_annotations(root)
    faults = list(read.faults)
    for image_id in sorted(read.missing):
        kind = "skipped" if skip_missing else "stops"
        remedy = "bring the file, or leave its record out on purpose (skip_missing, --skip-missing)"
        faults.append(Fault(kind, "picture file is missing", read.images[image_id][0], remedy))
    with_caption = {image_id for image_id, _ in read.captions}
    kept = [image_id for image_id in read.images if image_id in with_caption and image_id not in read.missing]
    if not kept:
        first = "".join(f" The first of {len(faults):,} faults: {f.where}: {f.what}." for f in faults[:1])
        raise MissingFile(f"{root} holds no image that has both its file and a caption.{first}")
    position = {image_id: index for index, image_id in enumerate(kept)}
    usable = sorted(
        ((position[image_id], caption) for image_id, caption in read.captions if image_id in position),
        key=itemgetter(0),  # stable: an image's captions stay in the file's order
    )
    files, splits, facts = zip(*(read.images[image_id] for image_id in kept), strict=True)
    return CaptionDataset(
        root=root,
        image_ids=tuple(kept),
        files=files,
        captions=tuple(caption for _, caption in usable),
        caption_image=np.array([index for index, _ in usable]),
        given_splits=splits if any(splits) else (),
        scenes=facts if all(facts) else (),
        faults=tuple(faults),
    )


def load_dataset(profile: Profile) -> CaptionDataset:
    """The dataset of a profile: the drawn scenes (drawn now if they are not in the cache) or its COCO folder.

    A folder with faults that stop training is refused, with the first of them and their number.
    """
    if profile.data == "scenes":
        folder = profile.cache / f"scenes{SCENES_VERSION}-{profile.scene_count}-{profile.scene_seed}"
        try:
            if not folder.is_dir():
                profile.cache.mkdir(parents=True, exist_ok=True)
                with FileLock(folder.with_suffix(".lock")):  # two notebooks opened at once draw once
                    draw_scenes(folder, profile.scene_count, profile.scene_seed)
        except OSError as error:
            raise MmkitError(
                f"Scenes cannot be written to {profile.cache} ({error.strerror}). Remedy: set MMKIT_CACHE."
            ) from None
        return load_captions(folder)
    if profile.coco_root is None:
        raise MissingFile(
            f"The profile {profile.name!r} reads a COCO folder, and none is named. Remedy: set MMKIT_COCO_ROOT "
            "(or --coco-root) to a folder that holds annotations/captions_*.json and its pictures."
        )
    dataset = load_captions(profile.coco_root, profile.skip_missing)
    if stops := [fault for fault in dataset.faults if fault.kind == "stops"]:
        first = stops[0]
        raise MmkitError(
            f"{first.where}: {first.what}. Remedy: {first.remedy}. {len(stops):,} faults of {profile.coco_root} stop "
            f"training; all of them: python -m mmkit check {profile.coco_root}"
        )
    return dataset
