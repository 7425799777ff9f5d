"""The model card of a checkpoint: what a stranger has to know before a score of it means anything."""

import inspect
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import EvalResult, ModelCard

from .fusers import PairFuser

_TAGS = ("image-text-matching", "image-text-retrieval")
_DATA = {"scenes": "drawn-scenes", "folder": "imagefolder"}  # for a folder of one's own, the hub's word
_NEGATIVES = {"random": "random: another image, drawn", "hard": "hard: the nearest caption of another image"}

_TEMPLATE = """---
{{ card_data }}
---

# A fuser of mmkit: {{ fuser }}

{{ what }} It scores how well captions fit images, from features of two frozen encoders, which are not part of it.
{%- if transductive %} A pair's score depends on the other images and captions of the pool that is scored with it.
{%- endif %}

## What it takes

| | encoder | size | SHA-256 of its weights |
|---|---|---:|---|
| images | {{ encoders[0] }} | {{ sizes[0] }} | {{ digests[0] }} |
| captions | {{ encoders[1] }}, {{ p.pooling }} of ≤ {{ p.max_tokens }} tokens | {{ sizes[1] }} | {{ digests[1] }} |

{{ "Pooled features, and those of the image's cells and the caption's tokens." if parts else "Pooled features." }}
Features of other encoders, or of other weights of these, mean nothing to it.

## What it learnt from

{% if p.data == "scenes" -%}
- Data: {{ "{:,}".format(p.scene_count) }} scenes drawn by mmkit, seed {{ p.scene_seed }}, and a tenth with
  new combinations of their facts.
{%- else -%}
- Data: a folder in COCO-captions layout, under the profile "{{ p.name }}".
{%- endif %}
{%- if train %}
- Trained on {{ "{:,}".format(train.images) }} images and {{ "{:,}".format(train.captions) }} captions.
{%- endif %}
{%- if changed %}
- And on captions that are false in one of these facts: {{ changed | join(", ") }}.
{%- endif %}
- Splits: those that the annotations name; other images are shuffled by seed {{ p.split_seed }} and cut, the fractions
  {{ p.val_fraction }} for validation and {{ p.test_fraction }} for test.
{%- if best and "gradient_steps" in best %}
- Solved in closed form, without a gradient step; validation loss {{ "%.4f" % best.validation_loss }}.
{%- elif best %}
- {{ epochs }} epochs, seed {{ p.seed }}; the weights are those of epoch {{ kept }}, of the lowest validation loss,
  {{ "%.4f" % best.validation_loss }} = {{ p.contrastive_weight }} · contrastive + {{ p.matching_weight }} · matching.
{%- endif %}
{%- if thresholds %}

## Thresholds

A score is a logit; a pair is called matched above a threshold, chosen for the highest accuracy on the validation split.

| negatives | threshold |
|---|---:|
{%- for kind, value in thresholds.items() %}
| {{ negatives.get(kind, kind) }} | {{ "%.4f" % value }} |
{%- endfor %}
{%- endif %}
{%- if figures %}

## Figures

On {{ "{:,}".format(report.sizes.images) }} images with {{ "{:,}".format(report.sizes.captions) }} captions.

| figure | value | 95 % interval over images |
|---|---:|---|
{%- for figure in figures %}
| {{ figure.name }} | {{ "%.3f" % figure.value }} | {% if figure.interval -%}
{{ "%.3f to %.3f" % (figure.interval.low, figure.interval.high) }}{% endif %} |
{%- endfor %}
{%- endif %}

## Limits

{% if p.data == "scenes" -%}
- It has seen emoji on plain grounds and the short English sentences of a small grammar, and no photo.
{%- else -%}
- It was made for short English captions that describe everyday photos, as COCO's do; other languages and kinds of
  pictures are untried.
{%- endif %}
- False negatives: a caption of another image counts as wrong even where it fits, in training and in every figure.
- A high score says that words and picture go together in the encoders' features, not that a sentence is true.
- Not for decisions about people. What encoders and captions assume about persons and groups was not examined.

## Load it and score

```python
import mmkit, torch

fuser, training = mmkit.load_checkpoint("CHECKPOINT")  # this folder; huggingface_hub.snapshot_download brings it
encoders = mmkit.load_encoders(
    "{{ encoders[0] }}", "{{ encoders[1] }}", "{{ p.pooling }}", {{ p.max_tokens }}
{%- if p.squash %}, squash=True{% endif %}{% if p.image_size %}, image_size={{ p.image_size }}{% endif %}
)
photos = mmkit.load_captions("PHOTOS")  # annotations/captions_*.json beside the pictures
store = mmkit.extract_features(photos, encoders, mmkit.profile().cache{{ ", grids=True, tokens=True" if parts }})
features = fuser.view(store.select())
with torch.inference_mode():
    scores = fuser.score(features.images(), features.captions())  # (images, captions)
```

## Licence

MIT, as the code. The encoders' weights and the training data have licences of their own.
"""


def _public(encoder: str) -> str:
    """An encoder's name without the place of its folder on this machine."""
    kind, _, place = encoder.partition(":")
    return f"{kind}:{Path(place).name}" if Path(place).is_absolute() else encoder


class _Figure(NamedTuple):
    metric: str
    name: str
    value: float
    interval: dict[str, float] | None


def _figures(report: dict) -> list[_Figure]:
    """What `report_json` gave, fractions all."""
    intervals = report["intervals"]
    matching = [
        _Figure(metric, f"{name}, {kind} negatives 1:1", row[metric], intervals[kind].get(metric))
        for kind, row in report["matching"].items()
        for metric, name in (("accuracy", "accuracy"), ("f1", "F1"), ("roc_auc", "ROC-AUC"))
    ]
    retrieval = [
        _Figure(f"recall_at_{k}", f"{name} R@{k}", row[f"r{k}"], intervals["retrieval"].get(f"{direction}.r{k}"))
        for direction, row in report["retrieval"].items()
        for name in [direction.replace("_to_", "→")]
        for k in (1, 5, 10)
    ]
    return matching + retrieval


def model_card(fuser: PairFuser, training: dict, report: dict | None = None) -> ModelCard:
    """The card of a fuser that was trained as `training` tells, the content of a checkpoint's `training.json`.

    With the `report` of an evaluation, as `report_json` gives it, the card names its figures, for readers and, as the
    hub's model index, for programs. The card holds no path of the machine.
    """
    profile, rows = training["profile"], training["history"]["rows"]
    encoders = [profile["image_encoder"], profile["text_encoder"]]
    figures, data = _figures(report) if report else [], fuser.generate_model_card().data
    data.language, data.datasets, data.tags = "en", [_DATA[profile["data"]]], [*data.tags, *_TAGS]
    if report:
        place = {"task_type": "image-text-matching", "dataset_type": data.datasets[0], "dataset_name": data.datasets[0]}
        data.model_name = training["fuser"]
        data.eval_results = [
            EvalResult(**place, metric_type=one.metric, metric_name=one.name, metric_value=one.value) for one in figures
        ]
    return ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        fuser=training["fuser"],
        what=inspect.getdoc(type(fuser)).splitlines()[0],
        transductive=fuser.transductive,
        parts=fuser.takes_parts,
        sizes=(fuser.image_dim, fuser.text_dim),
        encoders=[_public(name) for name in encoders],
        digests=[training["weights"].get(name, "not recorded") for name in encoders],
        p=profile,
        train=training.get("train"),
        changed=training.get("false"),
        epochs=len(rows),
        kept=training["history"]["best_epoch"] + 1,
        best=rows[training["history"]["best_epoch"]] if rows else None,
        thresholds=training["thresholds"],
        negatives=_NEGATIVES,
        report=report,
        figures=figures,
    )
