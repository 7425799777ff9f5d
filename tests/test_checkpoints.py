"""The contract that every fuser keeps, by its name; checkpoints on disk, and their cards."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

import mmkit
from helpers import equal, learnable, settings
from mmkit.__main__ import is_trained
from mmkit.checkpoints import FUSERS, build_fuser, load_checkpoint, save_checkpoint, training_recipe
from mmkit.features import PairedFeatures
from mmkit.fusers import PairFuser
from mmkit.support import MissingFile, MmkitError

SMALL = settings(fusion_dim=32, hidden_dim=32, part_dim=32, heads=4, neighbours=3)
EVERY = pytest.mark.parametrize("name", FUSERS)


def made(name: str = "mlp", train: PairedFeatures | None = None) -> PairFuser:
    """A fuser that knows the means and deviations of `train`, or its solution."""
    train = learnable(60, 0) if train is None else train
    fuser = build_fuser(name, SMALL, *train.dims)
    fuser.solve(train) if name == "cca" else fuser.observe(fuser.view(train))
    return fuser.eval()


def recipe(name: str = "mlp", weights: str = "abc", data: str = "d1", **changes: object) -> dict:
    learnt = {key: changes.pop(key) for key in ("false", "accumulate") if key in changes}
    return training_recipe(name, mmkit.profile("mini", **changes), {"minilm-l6": weights}, data, **learnt)


def save(folder: Path, fuser: PairFuser, by: dict | None = None, **changes: object) -> Path:
    history = mmkit.History([{"validation_loss": value} for value in (3.0, 2.03125, 2.5)], 1)
    given = {"thresholds": {"random": 0.25, "hard": -1.5}, "history": history} | changes
    return save_checkpoint(folder, fuser, by or recipe(), **given)


@EVERY
def test_a_fuser_is_built_by_its_name_with_the_profiles_sizes_from_its_seed(name):
    first, again, other = (build_fuser(name, settings(seed=seed), 24, 16) for seed in (1, 1, 2))
    assert type(first) is FUSERS[name] and equal(first.state_dict(), again.state_dict())
    assert equal(first.state_dict(), other.state_dict()) == (name == "cca"), "only a CCA draws no weights"
    small = build_fuser(name, SMALL, 24, 16)
    assert (small.image_dim, small.text_dim, small.width) == (24, 16, 32)
    assert small.feature_dropout.p == (0 if name == "cca" else SMALL.feature_dropout)
    assert build_fuser("mlp", SMALL, 24, 16, paths="product").paths == "product"
    with pytest.raises(MmkitError, match=rf"'{name}s'.*mlp, gnn"):
        build_fuser(f"{name}s", SMALL, 24, 16)


@EVERY
def test_every_fuser_keeps_the_contract(name):
    fuser, features = made(name), learnable(12, 1)
    view, order = fuser.view(features), torch.randperm(24, generator=torch.Generator().manual_seed(3))
    images, texts, pool = view.images(), view.captions(), mmkit.encode_pool(fuser, features)
    scores = fuser.score(images, texts).detach()
    matches = pool.logits(*torch.cartesian_prod(torch.arange(12), torch.arange(24)).T).view(12, 24)
    torch.testing.assert_close(scores, matches, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fuser.score(images, texts[order]).detach(), scores[:, order], rtol=1e-4, atol=1e-4)
    assert mmkit.permutation_gap(fuser, images, texts) < 1e-4 and scores.std() > 0.1
    recall = mmkit.noise_recall(lambda noise, _: made(name, noise), (10, 8), pairs=100, held_out=150)
    assert recall < 1 / 150 + 4 * (1 / 150 / 150) ** 0.5, "on noise it is at chance"


@EVERY
def test_every_fuser_comes_back_with_all_that_was_chosen_and_has_a_card_of_its_own(name, tmp_path, capsys):
    fuser, view = made(name), FUSERS[name].view(made(name), learnable(10, 1))
    folder = save(tmp_path / "runs" / "first", fuser, recipe(name))
    loaded, training = load_checkpoint(folder)
    assert capsys.readouterr().out == "" and [path.name for path in folder.parent.iterdir()] == ["first"]
    assert type(loaded) is FUSERS[name] and not loaded.training and equal(fuser.state_dict(), loaded.state_dict())
    scores = [one.score(view.images(), view.captions()).detach() for one in (fuser, loaded)]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)  # sums depend on where the weights lie in memory
    assert (training["fuser"], training["thresholds"]) == (name, {"random": 0.25, "hard": -1.5})
    assert training["history"]["best_epoch"] == 1 and training["weights"] == {"minilm-l6": "abc"}
    assert not training["profile"].keys() & {"cache", "coco_root"}
    card = ModelCard.load(folder / "README.md").text
    assert type(fuser).__doc__.splitlines()[0] in card and "1,500 scenes drawn" in card and "Figures" not in card
    assert ("depends on the other images" in card) == fuser.transductive
    assert ("grids=True, tokens=True" in card) == ("the image's cells" in card) == fuser.takes_parts


def test_a_checkpoint_replaces_an_older_one_whole_and_on_a_full_disk_the_older_one_stays(tmp_path):
    resource = pytest.importorskip("resource")
    folder, limits = save(tmp_path / "run", made("gnn"), recipe("gnn")), resource.getrlimit(resource.RLIMIT_FSIZE)
    (folder / "notes.txt").write_text("of the older one")
    save(folder, made(), thresholds={"random": 7.0})
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))  # no file can grow beyond
    try:
        with pytest.raises(MmkitError, match=r"run \(.*File too large.*what was there is kept\. Remedy"):
            save(folder, made("gnn"), recipe("gnn"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    fuser, training = load_checkpoint(folder)
    assert type(fuser) is FUSERS["mlp"] and training["thresholds"] == {"random": 7.0}
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and not (folder / "notes.txt").exists()


def test_a_folder_with_other_files_is_left_alone_and_an_empty_one_is_taken(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for folder in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(MmkitError, match="holds other files"):
            save(folder, made())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    assert load_checkpoint(save(tmp_path / "empty", made()))[1]["fuser"] == "mlp"


def test_what_is_damaged_or_no_checkpoint_is_named(tmp_path):
    for file, content in {"training.json": '{"fuser": "x"}', "config.json": "{", "model.safetensors": "x"}.items():
        folder = save(tmp_path / "run", made())
        (folder / file).write_text(content)
        with pytest.raises(MmkitError, match=r"run is damaged .*Remedy"):
            load_checkpoint(folder)
        assert not is_trained(folder, recipe())
    (folder / "config.json").unlink()
    with pytest.raises(MissingFile, match=r"lacks config\.json\. Remedy"):
        load_checkpoint(folder)


def test_a_checkpoint_is_known_by_all_that_decides_a_training(tmp_path):
    folder = save(tmp_path / "run", made())
    assert is_trained(folder, recipe()) and is_trained(folder, recipe(cache=tmp_path))
    decided = {"name": "gnn", "weights": "b", "data": "d", "false": ("roles",), "accumulate": 2, "seed": 1, "layers": 4}
    for name, value in decided.items():
        assert not is_trained(folder, recipe(**{name: value})), name


def test_the_json_report_and_the_card_tell_the_figures_and_no_path_of_the_machine(tmp_path):
    fuser, train, validation = made(), learnable(1200, 0), learnable(20, 1)
    thresholds, retrieval = mmkit.choose_thresholds(fuser, validation), mmkit.retrieval_report(fuser, validation)
    matching = mmkit.matching_report(fuser, validation, thresholds)
    report = mmkit.report_json(validation, matching, retrieval)
    assert json.loads(json.dumps(report)) == report and report["sizes"] == {"images": 20, "captions": 40}
    assert report["matching"]["hard"]["f1"] == matching["hard"].f1 and report["rsum"] == retrieval.rsum
    assert report["constants"]["always"] == pytest.approx({"accuracy": 0.5, "f1": 2 / 3, "average_precision": 0.5})
    assert report["intervals"]["hard"]["accuracy"] == matching["hard"].intervals["accuracy"]._asdict()
    encoding = {"text_encoder": f"hf:{tmp_path}/own-bert", "pooling": "cls", "max_tokens": 33, "squash": True}
    profile = mmkit.profile("photos", **encoding, image_size=96, split_seed=7)
    digests = {"efficientnet-lite0": "ab", profile.text_encoder: "cd"}
    by = training_recipe("mlp", profile, digests, false=["roles", "size"])
    folder = save(tmp_path / "run", fuser, by=by, thresholds=thresholds, train=train, report=report)
    card = ModelCard.load(folder / "README.md")
    assert str(tmp_path) not in card.content and not re.search(r"\{%|\{\{|\[More", card.content)
    rows = dict(line.strip("| ").split(" | ", 1) for line in card.text.splitlines() if line.startswith("| "))
    recall, interval = report["retrieval"]["text_to_image"]["r5"], report["intervals"]["retrieval"]["text_to_image.r5"]
    assert rows["text→image R@5"] == f"{recall:.3f} | {interval['low']:.3f} to {interval['high']:.3f}"
    assert rows["hard: the nearest caption of another image"] == f"{thresholds['hard']:.4f}"
    assert rows["images"] == "efficientnet-lite0 | 24 | ab"
    assert rows["captions"] == "hf:own-bert, cls of ≤ 33 tokens | 16 | cd"
    for words in ["1,200 images and 2,400 captions", "seed 7", "epoch 2,", "2.0312 =", "roles, size.", "a folder in"]:
        assert words in card.text
    assert '"cls", 33, squash=True, image_size=96' in card.text and "On 20 images with 40 captions" in card.text
    assert (card.data.library_name, card.data.license, card.data.datasets) == ("mmkit", "mit", ["imagefolder"])


@pytest.mark.parametrize("name", ["mlp", "region-word"])
def test_the_code_of_a_card_loads_and_scores(name, scenes_folder, features, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("MMKIT_CACHE", str(cache))
    folder = save(tmp_path / "run", made(name, features), recipe(name))
    code = re.search(r"```python\n(.+?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    names: dict = {}
    exec(code.replace("CHECKPOINT", str(folder)).replace("PHOTOS", str(scenes_folder)), names)
    assert type(names["fuser"]) is FUSERS[name] and torch.isfinite(names["scores"]).all()
    assert names["scores"].shape == (66, 330)
