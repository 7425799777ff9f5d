"""A dataset of pictures with their captions, split by image: drawn scenes, or a folder of photos."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image

from .folders import Fault, open_image, read_folder
from .profiles import Profile
from .scenes import FACTS, SCENES_VERSION, Scene, draw_scenes, false_caption
from .support import MissingFile, MmkitError

SPLITS = ("train", "val", "test", "new")


@dataclass(frozen=True, eq=False)
class DiagnosticNegatives:
    """`N` false captions, each with exactly one `fact` changed: `texts[n]` is false of image `image_index[n]`, and
    differs in that fact alone from the true caption `captions[n]` (positions in the dataset, both `(N,)`)."""

    fact: str
    image_index: np.ndarray
    captions: np.ndarray
    texts: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class CaptionDataset:
    """`N` images with their `M` captions: a map-style dataset, without torch, of pairs of a Pillow image and its texts.
    `image_index` `(M,)` holds the position (not the id) of every caption's image, `scenes` the facts of drawn scenes
    (empty for photos), `faults` what was noticed while reading."""

    root: Path
    image_ids: tuple[int, ...]
    files: tuple[str, ...]
    captions: tuple[str, ...]
    image_index: np.ndarray
    given_splits: tuple[str, ...] = ()
    scenes: tuple[Scene, ...] = ()
    faults: tuple[Fault, ...] = ()

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Image.Image, list[str]]:
        return self.image(index), self.captions_of(index)

    def __repr__(self) -> str:
        return f"CaptionDataset({len(self):,} images, {len(self.captions):,} captions)"

    def image(self, index: int) -> Image.Image:
        """The picture at position `index`, decoded to RGB."""
        return open_image(self.root / self.files[index])

    @cached_property
    def _captions_of(self) -> list[np.ndarray]:
        by_image = np.argsort(self.image_index, kind="stable")
        return np.split(by_image, np.searchsorted(self.image_index[by_image], np.arange(1, len(self))))

    def captions_of(self, index: int) -> list[str]:
        """All captions of the image at position `index`."""
        return [self.captions[caption] for caption in self._captions_of[index]]

    def select(self, images: Sequence[int] | np.ndarray) -> "CaptionDataset":
        """The dataset of the images at these positions, with all their captions."""
        captions = [self._captions_of[image] for image in images]
        of_images = {name: getattr(self, name) for name in ("image_ids", "files", "given_splits", "scenes")}
        return replace(
            self,
            **{name: tuple(values[image] for image in images) for name, values in of_images.items() if values},
            captions=tuple(self.captions[caption] for of_image in captions for caption in of_image),
            image_index=np.repeat(np.arange(len(images)), [len(of_image) for of_image in captions]),
        )

    def of_features(self, image_ids: Sequence[int], image_index: np.ndarray) -> "CaptionDataset":
        """The part that features are of, in their order. An error if their images or captions are not in here."""
        position = {image_id: place for place, image_id in enumerate(self.image_ids)}
        if missing := [image_id for image_id in image_ids if image_id not in position]:
            what = f"{len(missing):,} images of the features are not in the dataset, the first with id {missing[0]}."
            raise MmkitError(f"{what} Remedy: give the dataset that the features were extracted from.")
        chosen = self.select([position[image_id] for image_id in image_ids])
        if not np.array_equal(chosen.image_index, image_index):
            raise MmkitError("The dataset's captions are not those of the features. Remedy: features.select(images)")
        return chosen

    def splits(self, val_fraction: float, test_fraction: float, seed: int = 0) -> dict[str, np.ndarray]:
        """Positions of the images of "train", "val" and "test"; no image is in two of them. Splits that the annotations
        give ("restval" is train) stay, as do the new combinations of drawn scenes, a fourth part, "new". The others are
        shuffled by `seed`, whatever their order in the file, and cut by the fractions."""
        given = np.array(["train" if name == "restval" else name for name in self.given_splits or [""] * len(self)])
        if unknown := set(given.tolist()) - {*SPLITS, ""}:
            raise MmkitError(f"{self.root} has unknown splits {sorted(unknown)}. Remedy: restval, {', '.join(SPLITS)}")
        by_id = np.argsort(self.image_ids, kind="stable")
        free = by_id[given[by_id] == ""]
        val, test = round(len(free) * val_fraction), round(len(free) * test_fraction)
        if len(free) and (min(val_fraction, test_fraction) < 0 or val + test >= len(free)):
            fractions = f"val_fraction {val_fraction} and test_fraction {test_fraction}"
            raise MmkitError(f"{fractions} leave none of {len(free)} to train on. Remedy: smaller ones, from 0.")
        free = free[np.random.default_rng(seed).permutation(len(free))]
        cut = {"train": free[val + test :], "val": free[:val], "test": free[val : val + test]}
        parts = {name: np.union1d(cut.get(name, free[:0]), np.flatnonzero(given == name)) for name in SPLITS}
        return {name: part for name, part in parts.items() if name != "new" or len(part)}

    def diagnostic_negatives(self, fact: str, seed: int = 0) -> DiagnosticNegatives:
        """For every image that has such a `fact`, one of `FACTS`, a caption with just that changed: false by
        construction, as it contradicts what was drawn. It depends on `seed`, the fact and the image's id alone."""
        if not self.scenes:
            raise MmkitError("Photos carry no facts that could be changed. Remedy: a dataset of drawn scenes.")
        if fact not in FACTS:
            raise MmkitError(f"No fact {fact!r}. Valid names: {', '.join(FACTS)}")
        image_index, captions, texts = [], [], []
        for image, scene in enumerate(self.scenes):
            rng = np.random.default_rng([seed, FACTS.index(fact), self.image_ids[image]])
            if negative := false_caption(scene, self.captions_of(image), fact, rng):
                image_index.append(image)
                captions.append(self._captions_of[image][negative[0]])
                texts.append(negative[1])
        return DiagnosticNegatives(fact, np.array(image_index, dtype=int), np.array(captions, dtype=int), tuple(texts))

    def fingerprint(self) -> str:
        """A short digest of ids, captions, and names and sizes of the picture files."""
        sizes = [(self.root / name).stat().st_size for name in self.files]
        pictures = list(zip(self.image_ids, self.files, sizes, strict=True))
        content = json.dumps([pictures, self.captions, self.image_index.tolist()])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def load_captions(root: str | Path, skip_missing: bool = False) -> CaptionDataset:
    """Read a folder in COCO-captions layout: COCO's, drawn scenes, or Karpathy's JSON. See `folders.read_folder`."""
    records = read_folder(root, skip_missing)
    try:
        scenes = msgspec.convert(records.scenes, tuple[Scene, ...])
    except msgspec.ValidationError as error:  # "Expected `str`, got `int` - at `$[3].ground`"
        raise MmkitError(f"{root} holds facts of no scene: {error}. Remedy: draw the scenes again.") from None
    return CaptionDataset(*vars(replace(records, scenes=scenes)).values())  # the fields have the same order


def load_dataset(profile: Profile) -> CaptionDataset:
    """The dataset of a profile: scenes, drawn now if the cache has none, or a COCO folder without faults that stop."""
    if profile.data == "scenes":
        folder = profile.cache / f"scenes{SCENES_VERSION}-{profile.scene_count}-{profile.scene_seed}"
        return load_captions(draw_scenes(folder, profile.scene_count, profile.scene_seed))
    if profile.coco_root is None:
        raise MissingFile(f"Profile {profile.name!r} reads a COCO folder. Remedy: set MMKIT_COCO_ROOT or --coco-root")
    dataset = load_captions(profile.coco_root, profile.skip_missing)
    if stops := [fault for fault in dataset.faults if fault.kind == "stops"]:
        first, root = stops[0], profile.coco_root
        raise MmkitError(
            f"{first.where}: {first.what}. Remedy: {first.remedy}. {len(stops):,} faults of {root} stop training; all "
            f"of them: python -m mmkit check {root}"
        )
    return dataset
