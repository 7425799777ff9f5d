"""A widget that leafs through a dataset in a live notebook, and a figure where no widget can run."""

import html
import io
import re
from typing import TYPE_CHECKING

from .data import CaptionDataset
from .galleries import pictures_figure
from .plots import show

if TYPE_CHECKING:
    from ipywidgets import Widget

_HEIGHT = 300  # pixels of the shown picture
_LIVE = "application/vnd.jupyter.widget-view+json"


def matching_images(dataset: CaptionDataset, words: str) -> list[int]:
    """Positions of the images that have a caption with all of these words, whole and in any order; all for none."""
    wanted = [re.compile(rf"\b{re.escape(word)}\b", re.IGNORECASE) for word in words.split()]
    found = {
        int(image)
        for image, caption in zip(dataset.caption_image, dataset.captions, strict=True)
        if all(word.search(caption) for word in wanted)
    }
    return sorted(found) if wanted else list(range(len(dataset)))


def _page(dataset: CaptionDataset, image: int) -> str:
    captions = "".join(f"<li>{html.escape(caption)}</li>" for caption in dataset.captions_of(image))
    facts = ""
    if dataset.scenes:
        scene = dataset.scenes[image]
        groups = [f"{group.count} × {group.category} ({group.size})" for group in scene.groups]
        facts = f"<p><b>Facts</b>: {f' {scene.relation} '.join(groups)}; {scene.ground}, {scene.time or 'indoors'}</p>"
    return f"<b>Image {dataset.image_ids[image]}</b><ol>{captions}</ol>{facts}"


def _widget(dataset: CaptionDataset) -> "Widget":
    import ipywidgets

    words = ipywidgets.Text(description="Words", placeholder="dog snow", continuous_update=False)
    place = ipywidgets.IntSlider(description="Picture", min=0, max=len(dataset) - 1, continuous_update=False)
    place.layout.width = "60%"
    found = ipywidgets.Label()
    picture = ipywidgets.Image(format="png", height=_HEIGHT)
    text = ipywidgets.HTML()
    shown = list(range(len(dataset)))

    def show(_: object = None) -> None:
        buffer = io.BytesIO()
        image = dataset.image(shown[place.value])
        image.thumbnail((4 * _HEIGHT, _HEIGHT))
        image.save(buffer, format="png")
        picture.value, text.value = buffer.getvalue(), _page(dataset, shown[place.value])

    def search(_: object) -> None:
        nonlocal shown
        matches = matching_images(dataset, words.value)
        found.value = f"{len(matches):,} pictures" if matches else "no caption has these words"
        if matches:
            shown = matches
            place.max, place.value = len(shown) - 1, 0
            show()

    words.observe(search, "value")
    place.observe(show, "value")
    show()
    return ipywidgets.VBox([ipywidgets.HBox([words, found]), place, ipywidgets.HBox([picture, text])])


def browse(dataset: CaptionDataset) -> None:
    """Leaf through a dataset: a slider over the pictures, and a search for words in their captions.

    A page that cannot run the widget (a saved notebook, or no ipywidgets) shows the first four pictures.
    """
    try:
        live = {_LIVE: _widget(dataset)._repr_mimebundle_()[_LIVE]}
    except ImportError:
        live = None
    first = range(min(4, len(dataset)))
    texts = [dataset.captions_of(index)[0] for index in first]
    still = pictures_figure([dataset.image(index) for index in first], texts, title="The first pictures")
    show(still, "Pictures with one caption each: " + " ".join(texts), live)
