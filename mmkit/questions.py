"""The questions that `make results` answers: what is compared with what, on which data, over how many seeds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .training import FUSERS

_ENCODING = ("image_encoder", "image_size", "squash", "text_encoder", "pooling", "max_tokens")
_MATCHING = ("accuracy.random", "accuracy.hard")
_RECALLS = ("image_to_text.r1", "text_to_image.r1", "rsum")


@dataclass(frozen=True)
class Variant:
    """One of the things compared: a name of `FUSERS`, changes of the profile, and further arguments of its class.

    `false` are facts: on scenes it learns from captions that are false in one of them too. `corrected` is a method of
    `HubnessCorrected`, which corrects the trained fuser's scores by the pool. `lora`, where not 0, is the rank of
    adapters in the text encoder (`LoRATextFuser`), which the trained fuser is then trained on with, under the profile
    as `tuning` changes it.
    """

    fuser: str = "mlp"
    settings: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    false: tuple[str, ...] = ()
    corrected: str = ""
    lora: int = 0
    tuning: Mapping[str, Any] = field(default_factory=dict)

    @property
    def encoding(self) -> dict[str, Any]:
        """Those of `settings` that features depend on."""
        return {name: value for name, value in self.settings.items() if name in _ENCODING}


@dataclass(frozen=True)
class Experiment:
    """A question, and the runs that answer it: every one of the `variants` with every seed from 0 to `seeds` - 1.

    `data` is "scenes" or "photos" and names the profile, which `settings` change for all variants. With `unseen` so
    many images are the test split, and a tenth of the rest validates. `reference`, `columns` and `compared` are those
    of `Results`.
    """

    name: str
    question: str
    data: str
    variants: Mapping[str, Variant]
    reference: str
    columns: tuple[str, ...] = (*_MATCHING, *_RECALLS)
    compared: str = "rsum"
    settings: Mapping[str, Any] = field(default_factory=dict)
    unseen: int = 0
    seeds: int = 5

    def runs(self, seeds: int | None = None) -> list[tuple[str, int]]:
        """The variants and seeds to run, `seeds` of each: a seed of all variants before the next seed."""
        return [(name, seed) for seed in range(self.seeds if seeds is None else seeds) for name in self.variants]


_WHOLE: dict[str, Any] = {"squash": True}
_SHORT: dict[str, Any] = {"batch_size": 64, "epochs": 6, "fusion_dim": 128}  # what fusers of parts are given
_SHARP: dict[str, Any] = {"image_encoder": "efficientnet-lite2", "image_size": 320, "squash": True}
_SUGGESTIONS = {
    "mlp": Variant(),
    "matching loss only": Variant(settings={"contrastive_weight": 0.0}),
    "Lite1": Variant(settings={"image_encoder": "efficientnet-lite1"}),
    "Lite2": Variant(settings={"image_encoder": "efficientnet-lite2"}),
    "two-tower": Variant("two-tower"),
    "two-tower, LoRA": Variant("two-tower", lora=8, tuning={"epochs": 1, "learning_rate": 1e-3}),
    "gnn": Variant("gnn"),
    "gnn, no MLP": Variant("gnn", arguments={"projection": "linear"}),
    "gnn, attention for cosine": Variant("gnn", arguments={"edges": "attention"}),
    "gnn, 2 layers": Variant("gnn", {"layers": 2}),
    "gnn, 4 layers": Variant("gnn", {"layers": 4}),
}
_EVERY = {name: Variant(name) for name in FUSERS}
_BINDING = ("diagnostic.relation", "diagnostic.roles", "new.text_to_image.r1")
_GRAPHS = {
    "mlp, as many parameters": Variant(settings={"fusion_dim": 484}),
    "gnn": Variant("gnn"),
    **{f"{count} layers": Variant("gnn", {"layers": count}) for count in (0, 2, 4)},
    "heads: 1": Variant("gnn", {"heads": 1}),
    **{f"neighbours: {count}": Variant("gnn", {"neighbours": count}) for count in (2, 20)},
    **{f"edges: {kind}": Variant("gnn", arguments={"edges": kind}) for kind in ("mutual", "attention", "none")},
    "bank of 512": Variant("gnn", arguments={"bank": 512}),
    "hetero-gnn": Variant("hetero-gnn"),
    "no MLP": Variant("gnn", arguments={"projection": "linear"}),
    "no MLP, 0 layers": Variant("gnn", {"layers": 0}, {"projection": "linear"}),
    "two-tower": Variant("two-tower"),
    **{f"two-tower, {name}": Variant("two-tower", corrected=name) for name in ("csls", "inverted-softmax")},
}

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            "fusers-scenes",
            "Which fuser is best on drawn scenes, which of them know who stands where, and what does each cost?",
            "scenes",
            _EVERY,
            "mlp",
            (*_MATCHING, "rsum", *_BINDING, "training_time"),
        ),
        Experiment(
            "fusers-photos",
            "Does that hold on photos?",
            "photos",
            _EVERY | {"two-tower, as short and narrow as region-word": Variant("two-tower", _SHORT)},
            "mlp",
            (*_MATCHING, *_RECALLS, "training_time"),
        ),
        *(
            Experiment(
                f"suggestions-{data}",
                f"What do the suggestions of the articles' readers bring on {data}?",
                data,
                _SUGGESTIONS,
                "mlp",
                ("accuracy.random", *_RECALLS, "training_time"),
                seeds=3,
            )
            for data in ("scenes", "photos")
        ),
        Experiment(
            "unseen-700",
            "What brings small heads further on 700 unseen photos: the encoder, the whole picture, its size, the pool?",
            "photos",
            {
                "mlp": Variant(),
                "two-tower": Variant("two-tower"),
                "two-tower, Lite2": Variant("two-tower", {"image_encoder": "efficientnet-lite2"}),
                "two-tower, whole picture": Variant("two-tower", _WHOLE),
                "two-tower, Lite2, whole, 320 pixels": Variant("two-tower", _SHARP),
                "mlp, Lite2, whole, 320 pixels": Variant("mlp", _SHARP),
                "the same two-tower, csls": Variant("two-tower", _SHARP, corrected="csls"),
            },
            "two-tower",
            (*_MATCHING, *_RECALLS),
            unseen=700,
        ),
        Experiment(
            "binding",
            "Who is left of whom? All learn from captions with swapped roles or the converse relation.",
            "scenes",
            {
                "mlp": Variant("mlp", false=("relation", "roles")),
                "cross-attention": Variant("cross-attention", false=("relation", "roles")),
                "region-word": Variant("region-word", false=("relation", "roles")),
            },
            "mlp",
            ("diagnostic.relation", "diagnostic.roles", "diagnostic.count", *_RECALLS, "training_time"),
            compared="diagnostic.roles",
        ),
        Experiment(
            "counts",
            "How many? All learn from captions with a changed number.",
            "scenes",
            {name: Variant(name, false=("count",)) for name in ("mlp", "region-word")},
            "mlp",
            ("diagnostic.count", "diagnostic.size", "diagnostic.object", *_RECALLS),
            compared="diagnostic.count",
            seeds=3,
        ),
        Experiment(
            "graph",
            "What do the parts of the graph over a pool earn, and what does seeing the pool earn without a graph?",
            "scenes",
            _GRAPHS,
            "mlp, as many parameters",
            ("accuracy.random", *_RECALLS, "training_time"),
            seeds=3,
        ),
        Experiment(
            "paths",
            "What is each of the MLP fuser's two paths good for?",
            "scenes",
            {
                "product only": Variant(arguments={"paths": "product"}),
                "concatenation only": Variant(arguments={"paths": "concatenation"}),
                "both": Variant(),
            },
            "both",
            (*_MATCHING, *_RECALLS, "training_time"),
        ),
        Experiment(
            "losses",
            "What does each of the two losses teach the MLP fuser?",
            "scenes",
            {
                "contrastive only": Variant(settings={"matching_weight": 0.0}),
                "matching only": Variant(settings={"contrastive_weight": 0.0}),
                "both": Variant(),
            },
            "both",
        ),
        Experiment(
            "unseen-1000",
            "How well do small heads match 1,000 photos that they have not seen?",
            "photos",
            {name: Variant(name) for name in ("mlp", "gated", "two-tower", "cca")},
            "mlp",
            compared="accuracy.random",
            unseen=1000,
            seeds=3,
        ),
    )
}
