"""Every command as a user types it, from drawing scenes to one JSON object."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

import mmkit
from mmkit.__main__ import _parser, main

COMMANDS = ("scenes", "download", "check", "encoders", "extract", "train", "evaluate", "results", "run")


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory):
    """A cache of its own, and none of the user's settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name in ("MMKIT_PROFILE", "MMKIT_COCO_ROOT"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    assert main(["scenes", str(folder), "--count", "80"]) == 0
    return folder


@pytest.fixture(scope="module")
def checkpoints(coco, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    found = {name: folder / name for name in mmkit.FUSERS}
    for name, out in found.items():
        options = ["--coco-root", str(coco), "--fuser", name, "--epochs", "2", "--out", str(out)]
        assert main(["train", *options]) == 0
    return found


@pytest.fixture
def three_scenes(tmp_path) -> Path:
    return mmkit.draw_scenes(tmp_path / "three", 3)


@pytest.fixture
def copied(checkpoints, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoints["mlp"], tmp_path / "copied"))


def in_a_process(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mmkit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def change(checkpoint: Path, **values: object) -> None:
    file = checkpoint / "training.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refused(capsys, *arguments: object) -> str:
    """The message on standard error of a command that exits with 2 and prints nothing else."""
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("mmkit: ") and "Traceback" not in said.err
    return said.err


def evaluated(capsys, *arguments: object) -> dict:
    assert main(["evaluate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# --- scenes and check ----------------------------------------------------------------------------


def test_drawn_scenes_pass_the_check(coco, capsys):
    assert main(["check", str(coco)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"images +88\n", said) and re.search(r"captions +440\n", said)
    assert "stops: 0   skipped: 0   repaired: 0   kept: 0" in said
    assert re.search(r"splits +to be cut: 80 +new: 8\n", said)
    assert "safe to train on" in said and "NOT" not in said


def test_a_missing_picture_fails_the_check(three_scenes, capsys):
    picture = sorted((three_scenes / "scenes").iterdir())[1]
    picture.unlink()
    assert main(["check", str(three_scenes)]) == 1
    said = capsys.readouterr().out
    assert picture.name in said and "missing" in said and "NOT safe" in said


def test_a_truncated_picture_fails_the_check_with_exit_status_1(three_scenes):
    picture = sorted((three_scenes / "scenes").iterdir())[1]
    picture.write_bytes(picture.read_bytes()[:2000])
    done = in_a_process("check", three_scenes)
    assert done.returncode == 1
    assert picture.name in done.stdout and "cannot be decoded" in done.stdout and "NOT safe" in done.stdout


def test_check_shows_as_many_faults_as_asked(three_scenes, capsys):
    for picture in sorted((three_scenes / "scenes").iterdir())[1:]:
        picture.unlink()
    assert main(["check", str(three_scenes), "--show", "1"]) == 1
    said = capsys.readouterr().out
    assert said.count("picture file is missing") == 1 and "1 more (--show 2)" in said


# --- train and evaluate --------------------------------------------------------------------------


def assert_is_a_report(report: dict) -> None:
    assert report["sizes"] == {"images": 88, "captions": 440}
    fractions = []
    for kind in ("random", "hard"):
        fractions += [report["matching"][kind][name] for name in ("accuracy", "f1", "roc_auc")]
    for direction in ("image_to_text", "text_to_image"):
        recalls = [report["retrieval"][direction][name] for name in ("r1", "r5", "r10")]
        assert recalls == sorted(recalls)
        fractions += recalls
    assert all(isinstance(value, float) and 0 <= value <= 1 for value in fractions)


@pytest.mark.parametrize("name", mmkit.FUSERS)
def test_evaluate_prints_one_json_object_and_the_same_one_again(name, checkpoints, coco, capsys):
    options = (checkpoints[name], "--coco-root", coco, "--split", "all")
    report = evaluated(capsys, *options)
    assert_is_a_report(report)
    assert report["matching"]["random"]["roc_auc"] > 0.6
    assert evaluated(capsys, *options) == report


def test_evaluate_in_a_process_of_its_own_prints_nothing_beside_the_object(checkpoints, coco, capsys):
    options = (checkpoints["mlp"], "--coco-root", coco, "--split", "all")
    done = in_a_process("evaluate", *options, "--json")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    report, expected = json.loads(done.stdout), evaluated(capsys, *options)
    assert_is_a_report(report)
    for kind, row in expected["matching"].items():
        assert report["matching"][kind] == pytest.approx(row, abs=1e-3)


def test_evaluate_without_json_prints_the_same_figures(checkpoints, coco, capsys):
    options = [str(checkpoints["mlp"]), "--coco-root", str(coco), "--split", "all"]
    report = evaluated(capsys, *options)
    assert main(["evaluate", *options]) == 0
    said = capsys.readouterr().out
    assert "88 images, 440 captions" in said
    assert f"accuracy {report['matching']['hard']['accuracy']:.3f}" in said
    assert f"R@5 {report['retrieval']['text_to_image']['r5']:.3f}" in said


def test_settings_of_the_profile_are_changed_and_kept_for_the_evaluation(coco, tmp_path, capsys):
    out, changes = str(tmp_path / "run"), ["image_size=96", "squash=True", "fusion_dim=16", "learning_rate=3e-3"]
    assert main(["train", "--coco-root", str(coco), "--out", out, "--epochs", "1", "--set", *changes]) == 0
    kept = json.loads((tmp_path / "run" / "training.json").read_text())["profile"]
    assert (kept["image_size"], kept["squash"], kept["fusion_dim"], kept["learning_rate"]) == (96, True, 16, 0.003)
    capsys.readouterr()
    assert evaluated(capsys, out, "--coco-root", coco)["sizes"]["images"] == 12


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        ("colour=red", "no such setting. Valid settings: .*image_encoder"),
        ("cache=/tmp", "no such setting"),
        ("epochs=many", "epochs is a whole number"),
        ("epochs", "epochs is a whole number"),
        ("dropout=x", "dropout is a number"),
        ("squash=maybe", "squash is true or false"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_before_anything_is_done(pair, reason, coco, tmp_path, capsys):
    assert main(["train", "--coco-root", str(coco), "--out", str(tmp_path / "run"), "--set", pair]) == 2
    assert re.search(f"mmkit: --set {pair}: {reason}", capsys.readouterr().err) and not any(tmp_path.iterdir())


def test_evaluate_gives_the_mean_over_folds_and_says_why_eccv_is_not_to_be_had(checkpoints, coco, capsys):
    options = [str(checkpoints["mlp"]), "--coco-root", str(coco), "--split", "all"]
    folded, whole = evaluated(capsys, *options, "--folds", "4"), evaluated(capsys, *options)
    assert {key: value for key, value in folded.items() if key != "folds"} == whole
    assert folded["folds"]["count"] == 4 and folded["folds"]["rsum"] > whole["rsum"]  # a smaller pool is easier
    assert folded["folds"]["text_to_image"].keys() == whole["retrieval"]["text_to_image"].keys()
    assert main(["evaluate", *options, "--folds", "4"]) == 0
    assert f"mean of 4 folds, rsum {folded['folds']['rsum']:.1f}" in capsys.readouterr().out
    assert main(["evaluate", *options, "--eccv"]) == 2
    assert re.search("pip install eccv-caption|test images of Karpathy", capsys.readouterr().err)


def test_a_fuser_learns_from_false_captions_and_is_judged_fact_by_fact_through_a_shortlist(coco, tmp_path, capsys):
    out, data = str(tmp_path / "regions"), ["--coco-root", str(coco)]
    options = ["--fuser", "region-word", "--false", "roles", "relation", "--epochs", "15"]
    assert main(["train", *data, *options, "--out", out]) == 0
    capsys.readouterr()
    assert "false in one of these facts: roles, relation." in (tmp_path / "regions" / "README.md").read_text()
    report = evaluated(capsys, out, *data, "--split", "train")
    assert report["diagnostic"]["roles"]["accuracy"] > 0.7 and {*report["diagnostic"]} == {*mmkit.FACTS}
    every, few = (evaluated(capsys, out, *data, "--split", "all", "--shortlist", str(count)) for count in (1000, 1))
    assert few["matching"] == every["matching"] and few["retrieval"] != every["retrieval"]
    assert main(["evaluate", out, *data]) == 0
    assert re.search(r"one changed fact, roles +\d\.\d{3} \(", capsys.readouterr().out)


def test_an_unknown_fact_is_refused_before_anything_is_done(coco, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--coco-root", str(coco), "--false", "colour", "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "'colour'" in said and all(fact in said for fact in mmkit.FACTS)


def test_the_splits_share_no_image_and_make_up_the_whole(checkpoints, coco, capsys):
    options = (checkpoints["mlp"], "--coco-root", coco)
    sizes = {
        split: evaluated(capsys, *options, "--split", split)["sizes"]["images"] for split in ("train", "val", "test")
    }
    assert sizes == {"train": 60, "val": 8, "test": 12}
    assert evaluated(capsys, *options)["sizes"]["images"] == 12


def test_evaluate_uses_the_thresholds_of_the_checkpoint(copied, coco, capsys):
    change(copied, thresholds={"random": 1e9, "hard": -1e9})
    report = evaluated(capsys, copied, "--coco-root", coco, "--split", "all")
    assert report["matching"]["random"]["accuracy"] == report["matching"]["hard"]["accuracy"] == 0.5
    assert report["matching"]["random"]["f1"] == 0
    assert report["matching"]["hard"]["f1"] == pytest.approx(2 / 3)


def test_train_keeps_what_was_asked_in_the_checkpoint(checkpoints):
    for name, folder in checkpoints.items():
        _, training = mmkit.load_checkpoint(folder)
        assert training["fuser"] == name and len(training["history"]["rows"]) == (1 if name == "cca" else 2)
        assert training["profile"]["name"] == "photos" and training["profile"]["epochs"] == 2
        assert training["weights"].keys() == {"efficientnet-lite0", "minilm-l6"}


def test_a_finished_training_is_not_repeated_but_another_one_is(copied, coco, capsys):
    options = ["--coco-root", str(coco), "--out", str(copied), "--epochs", "2"]
    before = (copied / "training.json").read_bytes()
    change(copied, thresholds={"random": 7.0})  # what training again would replace
    state = copied.with_name("copied.state")
    state.write_text("killed before this was removed")
    assert main(["train", *options]) == 0
    assert capsys.readouterr().out == (
        f"{copied} is this training, finished; to repeat it, delete it or name another --out\n"
    )
    assert mmkit.load_checkpoint(copied)[1]["thresholds"] == {"random": 7.0} and not state.exists()
    assert main(["train", *options, "--seed", "1"]) == 0
    assert "2 epochs" in capsys.readouterr().out and mmkit.load_checkpoint(copied)[1]["profile"]["seed"] == 1
    assert main(["train", *options]) == 0
    assert (copied / "training.json").read_bytes() == before


def test_the_environment_names_the_folder_for_a_checkpoint_of_any_profile(copied, coco, capsys, monkeypatch):
    options = ["--profile", "mini", "--coco-root", str(coco), "--epochs", "1", "--out", str(copied)]
    assert main(["train", *options]) == 0
    capsys.readouterr()
    monkeypatch.setenv("MMKIT_COCO_ROOT", str(coco))
    assert evaluated(capsys, copied, "--split", "all")["sizes"]["images"] == 88


def test_extract_prints_the_shapes_of_the_features(coco, capsys):
    assert main(["extract", "--coco-root", str(coco)]) == 0
    said = capsys.readouterr().out
    assert re.fullmatch(r"images +\(88, 1280\) .*float16.*\ncaptions +\(440, 384\) .*float16.* MB\n", said)


def test_extract_stores_grids_and_tokens_on_request(three_scenes, capsys):
    assert main(["extract", "--coco-root", str(three_scenes), "--grids", "--tokens"]) == 0
    said = capsys.readouterr().out
    assert "(3, 49, 1280)" in said and re.search(r"tokens +\(\d+, 384\)", said)


def test_encoders_lists_names_and_sources(capsys):
    assert main(["encoders"]) == 0
    said = capsys.readouterr().out
    assert "efficientnet-lite0" in said and "bert-base-uncased" in said and "Apache-2.0" in said


def test_the_fusers_that_the_help_names_are_those_that_there_are(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = re.sub(r"\s+", "", capsys.readouterr().out)  # a long line is broken after a hyphen
    assert all(name in said for name in mmkit.FUSERS)


@pytest.mark.parametrize("name", ["mlp", "region-word"])
def test_the_code_of_a_model_card_loads_and_scores(name, checkpoints, coco, tmp_path):
    card = ModelCard.load(checkpoints[name] / "README.md")
    assert "60 images and 300 captions" in card.text and not re.search(r"\{\{|/home|/tmp|\[More", card.text)
    code = re.search(r"```python\n(.+?)```", card.text, re.DOTALL)[1]
    found: dict = {}
    exec(code.replace("CHECKPOINT", str(checkpoints[name])).replace("PHOTOS", str(coco)), found)
    assert found["scores"].shape == (88, 440)
    fuser, features = found["fuser"], found["features"]
    own = found["scores"][features.owner, torch.arange(440)]
    assert own.mean() > found["scores"].mean() and type(fuser) is mmkit.FUSERS[name]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_train_accumulates_as_many_batches_as_asked(coco, tmp_path, accumulate, monkeypatch):
    seen = []
    monkeypatch.setattr(mmkit.training, "fit", lambda *_, **given: seen.append(given["accumulate"]) or mmkit.History())
    options = ["--coco-root", str(coco), "--out", str(tmp_path / "run")]
    with pytest.raises(IndexError):  # nothing was trained
        main(["train", *options, *([] if accumulate == 1 else ["--accumulate", "3"])])
    assert seen == [accumulate]


# --- what is refused -----------------------------------------------------------------------------


def test_an_unknown_profile_lists_the_valid_ones(tmp_path, capsys):
    for command in (["extract"], ["train", "--out", tmp_path / "run"]):
        said = refused(capsys, *command, "--profile", "minni")
        assert "'minni'" in said and "mini, photos, coco" in said


def test_an_unknown_fuser_lists_the_valid_ones_before_anything_is_done(coco, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mmkit, "load_encoders", lambda *_: pytest.fail("encoders were loaded"))
    said = refused(capsys, "train", "--fuser", "mlpp", "--coco-root", coco, "--out", tmp_path / "run")
    assert "'mlpp'" in said and "mlp, gnn" in said


def test_a_coco_folder_that_is_missing_is_named_with_the_variable_that_sets_it(tmp_path, capsys):
    said = refused(capsys, "extract", "--coco-root", tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in said and "MMKIT_COCO_ROOT" in said
    said = refused(capsys, "train", "--coco-root", tmp_path, "--out", tmp_path / "run")
    assert str(tmp_path) in said and "captions_*.json" in said and "MMKIT_COCO_ROOT" in said
    assert str(tmp_path / "nowhere") in refused(capsys, "check", tmp_path / "nowhere")


def test_the_photos_profile_without_a_folder_says_what_to_set(capsys):
    said = refused(capsys, "extract", "--profile", "photos")
    assert "'photos'" in said and "MMKIT_COCO_ROOT" in said and "--coco-root" in said


def test_a_folder_that_is_no_checkpoint_is_named_with_what_it_lacks(tmp_path, capsys):
    said = refused(capsys, "evaluate", tmp_path)
    assert str(tmp_path) in said and "training.json" in said and "mmkit train" in said


def test_a_checkpoint_of_other_encoder_weights_is_refused(copied, coco, capsys):
    change(copied, weights={"efficientnet-lite0": "0", "minilm-l6": "0"})
    assert "other encoder weights" in refused(capsys, "evaluate", copied, "--coco-root", coco)


def test_a_folder_too_small_to_split_is_refused_with_the_split_and_its_size(three_scenes, tmp_path, capsys):
    said = refused(capsys, "train", "--coco-root", three_scenes, "--out", tmp_path / "run")
    assert "split val has 0 images" in said and not (tmp_path / "run").exists()


def test_train_leaves_a_folder_with_other_files_alone(coco, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    said = refused(capsys, "train", "--coco-root", coco, "--epochs", "1", "--out", tmp_path)
    assert "holds other files" in said
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_scenes_are_not_drawn_over_other_files(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "holds other files" in refused(capsys, "scenes", tmp_path, "--count", "2")
    assert "count is 0" in refused(capsys, "scenes", tmp_path / "new", "--count", "0")


def test_a_process_that_alone_has_failed_says_which_it_is(tmp_path, capsys, monkeypatch):
    waited = []
    monkeypatch.setattr("mmkit.__main__.time.sleep", waited.append)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    said = refused(capsys, "check", tmp_path / "nowhere")
    assert said.startswith("mmkit: process 1 of 2: ") and "Remedy" in said and waited[0] > 1
    monkeypatch.setenv("RANK", "0")
    assert refused(capsys, "check", tmp_path / "nowhere").startswith("mmkit: There is no folder") and len(waited) == 1


def test_an_interrupt_ends_with_130_and_no_traceback(tmp_path, capsys, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mmkit, "draw_scenes", interrupt)
    assert main(["scenes", str(tmp_path / "new")]) == 130
    said = capsys.readouterr()
    assert said.out == "" and "interrupted" in said.err


# --- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_that_the_parser_takes(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    example = re.search(r"example: python -m mmkit ([^\n]+(?:\n.+)*)", capsys.readouterr().out).group(1).split()
    assert example[0] == command
    assert _parser().parse_args(example).command.__name__ == command


def test_help_names_every_command_and_none_is_an_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and all(re.search(rf"^ +{command} ", said, re.MULTILINE) for command in COMMANDS)
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2 and capsys.readouterr().out == ""
