"""Every command as a user types it, from drawing scenes to one JSON object."""

import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from unittest.mock import Mock

import pytest

import mmkit
from mmkit.__main__ import main
from mmkit.fusers import MultimodalFeatureFuser

COMMANDS = ("scenes", "download", "check", "extract", "train", "evaluate", "results", "run")


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory):
    """A cache of its own, none of the user's settings, and encoders that are loaded once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("MMKIT_PROFILE", raising=False)
        patch.setattr(mmkit, "encoders_of", cache(mmkit.encoders_of))
        yield


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    assert main(["scenes", str(folder), "--count", "80"]) == 0
    return folder


@pytest.fixture(scope="module")
def checkpoints(coco, tmp_path_factory) -> dict[str, Path]:
    outs = {name: tmp_path_factory.mktemp("runs") / name for name in ("mlp", "cca", "region-word")}
    for name, out in outs.items():
        options = ["--coco-root", str(coco), "--fuser", name, "--epochs", "2", "--out", str(out)]
        assert main(["train", *options]) == 0
    return outs


@pytest.fixture
def three_scenes(tmp_path) -> Path:
    return mmkit.draw_scenes(tmp_path / "three", 3)


@pytest.fixture
def copied(checkpoints, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoints["mlp"], tmp_path / "copied"))


def in_a_process(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300)


def change(checkpoint: Path, **values: object) -> None:
    file = checkpoint / "training.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def said(capsys, *arguments: object) -> str:
    """What a command prints that ends with 0."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def evaluated(capsys, *arguments: object) -> dict:
    return json.loads(said(capsys, "evaluate", *arguments, "--json"))


def test_drawn_scenes_pass_the_check(coco, capsys):
    text = said(capsys, "check", coco)
    assert re.search(r"images +88\n", text) and re.search(r"captions +440\n", text)
    assert "stops: 0   skipped: 0   repaired: 0   kept: 0" in text
    assert re.search(r"splits +to be cut: 80 +new: 8\n", text)
    assert "safe to train on" in text and "NOT" not in text


def test_a_folder_with_faults_fails_the_check_with_exit_status_1_and_no_torch(three_scenes):
    picture = sorted((three_scenes / "scenes").iterdir())[1]
    picture.write_bytes(picture.read_bytes()[:2000])
    code = f"import sys; from mmkit.__main__ import main; print(main(['check', {str(three_scenes)!r}]), *sys.modules)"
    done = in_a_process("-c", code)
    *table, modules = done.stdout.splitlines()
    assert modules.startswith("1 ") and not {"torch", "accelerate", "transformers", "matplotlib"} & {*modules.split()}
    assert picture.name in done.stdout and "cannot be decoded" in done.stdout and "NOT safe" in "".join(table)


def test_check_shows_as_many_faults_as_asked_and_missing_pictures_can_be_left_out(three_scenes, capsys):
    for picture in sorted((three_scenes / "scenes").iterdir())[1:]:
        picture.unlink()
    assert main(["check", str(three_scenes), "--show", "1"]) == 1
    text = capsys.readouterr().out
    assert text.count("picture file is missing") == 1 and "1 more (--show 2)" in text
    assert "safe to train on" in said(capsys, "check", three_scenes, "--skip-missing")
    assert main(["extract", "--coco-root", str(three_scenes)]) == 2
    assert "picture file is missing" in capsys.readouterr().err
    assert main(["extract", "--coco-root", str(three_scenes), "--skip-missing"]) == 0
    given = capsys.readouterr()
    assert "1 × 1280 images" in given.out and "records with faults: 2 skipped" in given.err


def test_download_hands_its_options_on_and_tells_the_splits(coco, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mmkit, "download_coco", download := Mock(return_value=coco))
    text = said(capsys, "download", "coco", tmp_path / "coco", "--images", "30", "--connections", "2")
    assert download.call_args.args == (tmp_path / "coco", 30, 2)
    assert text == f"88 images, 440 captions in {coco} (train 80, val 0, test 0, new 8)\n"


def test_extract_tells_the_shapes_of_what_was_asked_for(coco, three_scenes, capsys):
    text = said(capsys, "extract", "--coco-root", coco, "--set", "image_size=64")
    assert text == "PairedFeatures(88 × 1280 images, 440 × 384 captions)\n"
    text = said(capsys, "extract", "--coco-root", three_scenes, "--grids", "--tokens")
    assert text.endswith("captions, grids, tokens)\n")


@pytest.mark.parametrize("name", ["mlp", "cca", "region-word"])
def test_evaluate_prints_one_json_object_and_the_same_one_again(name, checkpoints, coco, capsys):
    options = (checkpoints[name], "--coco-root", coco, "--split", "all")
    report = evaluated(capsys, *options)
    assert report["sizes"] == {"images": 88, "captions": 440} and evaluated(capsys, *options) == report
    names = {"sizes", "matching", "retrieval", "rsum", "constants", "intervals", "diagnostic"}
    assert report.keys() == names and report["intervals"].keys() == {"random", "hard", "retrieval", "diagnostic"}
    assert report["matching"]["random"]["roc_auc"] > 0.6 and 0 < report["matching"]["hard"]["f1"] < 1
    assert {*report["diagnostic"]} == {*mmkit.FACTS} == {*report["intervals"]["diagnostic"]}
    assert report["diagnostic"]["ground"]["pairs"] == 88
    _, training = mmkit.load_checkpoint(checkpoints[name])
    assert training["fuser"] == name and len(training["history"]["rows"]) == (1 if name == "cca" else 2)
    assert training["profile"]["name"] == "photos" and training["weights"].keys() == {"efficientnet-lite0", "minilm-l6"}


def test_evaluate_in_a_process_of_its_own_prints_nothing_beside_the_object(checkpoints, coco):
    done = in_a_process("-m", "mmkit", "evaluate", checkpoints["mlp"], "--coco-root", coco, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["sizes"]["images"] == 12, done.stderr


def test_evaluate_encodes_the_pool_once_and_prints_the_same_figures_to_read(checkpoints, coco, capsys, monkeypatch):
    nodes, calls = MultimodalFeatureFuser.nodes, []
    options = (checkpoints["mlp"], "--coco-root", coco, "--split", "all")
    monkeypatch.setattr(MultimodalFeatureFuser, "nodes", lambda *given: calls.append(given) or nodes(*given))
    report = evaluated(capsys, *options)
    assert sum(len(images) == 88 for _, images, _ in calls) == sum(len(texts) == 440 for *_, texts in calls) == 1
    text = said(capsys, "evaluate", *options)
    assert f"rsum {report['rsum']:.1f}" in text and "88 images, 440 captions" in text
    assert f"accuracy {report['matching']['hard']['accuracy']:.3f} (" in text
    assert f"R@5 {report['retrieval']['text_to_image']['r5']:.3f} (" in text
    assert re.search(r"rsum \d+\.\d \(\d+ to \d+\)\n", text) and re.search(r"changed fact, roles +\d\.\d{3} \(", text)


def test_a_fuser_learns_from_false_captions_and_is_judged_through_a_shortlist(coco, tmp_path, capsys):
    out, data = tmp_path / "regions", ("--coco-root", coco)
    said(capsys, "train", *data, "--fuser", "region-word", "--false", "roles", "relation", "--epochs", 15, "--out", out)
    assert "false in one of these facts: roles, relation." in (out / "README.md").read_text()
    assert evaluated(capsys, out, *data, "--split", "train")["diagnostic"]["roles"]["accuracy"] > 0.7
    every, few = (evaluated(capsys, out, *data, "--split", "all", "--shortlist", count) for count in (1000, 1))
    assert few["matching"] == every["matching"] and few["retrieval"] != every["retrieval"]


def test_settings_of_the_profile_are_changed_and_kept_for_the_evaluation(coco, tmp_path, capsys, monkeypatch):
    out, changes = tmp_path / "run", ["image_size=96", "squash=True", "fusion_dim=16", "learning_rate=3e-3"]
    monkeypatch.setattr(mmkit, "fit", fit := Mock(wraps=mmkit.fit))
    said(capsys, "train", "--coco-root", coco, "--out", out, "--epochs", "1", "--accumulate", 3, "--set", *changes)
    kept = json.loads((out / "training.json").read_text())
    assert fit.call_args.kwargs["accumulate"] == kept["accumulate"] == 3
    assert [kept["profile"][name.partition("=")[0]] for name in changes] == [96, True, 16, 0.003]
    assert evaluated(capsys, out, "--coco-root", coco)["sizes"]["images"] == 12


def test_the_splits_share_no_image_and_thresholds_are_the_checkpoints(copied, coco, capsys, monkeypatch):
    monkeypatch.setenv("MMKIT_COCO_ROOT", str(coco))
    change(copied, thresholds={"random": 1e9, "hard": -1e9})
    reports = {split: evaluated(capsys, copied, "--split", split) for split in ("train", "val", "test", "new")}
    assert [report["sizes"]["images"] for report in reports.values()] == [60, 8, 12, 8]
    matching = reports["test"]["matching"]
    assert matching["random"]["accuracy"] == matching["hard"]["accuracy"] == 0.5
    assert matching["random"]["f1"] == 0 and matching["hard"]["f1"] == pytest.approx(2 / 3)
    assert evaluated(capsys, copied, "--profile", "photos")["sizes"] == reports["test"]["sizes"]


def test_a_finished_training_is_not_repeated_but_another_one_is(copied, coco, capsys):
    options = ["train", "--coco-root", coco, "--out", copied, "--epochs", "2"]
    (_, before), state = mmkit.load_checkpoint(copied), copied.with_name("copied.state")
    change(copied, thresholds={"random": 7.0})  # what training again would replace
    (state / "epoch-0002").mkdir(parents=True)  # of a run that was killed before it removed this
    finished = f"{copied} is this training, finished; to repeat it, delete it or name another --out\n"
    assert said(capsys, *options) == finished and not state.exists()
    assert mmkit.load_checkpoint(copied)[1]["thresholds"] == {"random": 7.0}
    assert "2 epochs" in said(capsys, *options, "--seed", "1") and "validation loss" in said(capsys, *options)
    again = mmkit.load_checkpoint(copied)[1]
    assert again["profile"] == before["profile"] and again["train"] == {"images": 60, "captions": 300}
    assert again["thresholds"] == pytest.approx(before["thresholds"], abs=0.01) and not state.exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("extract --profile minni", "'minni'.*mini, photos, coco"),
        ("extract --profile photos", "'photos'.*MMKIT_COCO_ROOT.*--coco-root"),
        ("extract --coco-root $TMP/nowhere", "$TMP/nowhere.*MMKIT_COCO_ROOT"),
        ("scenes $TMP --count 2", "holds other files"),
        ("scenes $TMP/new --count 0", "count is 0"),
        ("train --coco-root $COCO --out $TMP", "holds other files"),
        ("train --coco-root $COCO --out $TMP/run --fuser mlpp", "'mlpp'.*mlp, gnn"),
        ("train --coco-root $TMP --out $TMP/run", r"$TMP.*captions_\*\.json.*MMKIT_COCO_ROOT"),
        ("train --coco-root $TMP/three --out $TMP/run", "split val has 0 images"),
        ("train --coco-root $COCO --out $TMP/run --set colour=red", "--set colour=red: no such setting.*image_encoder"),
        ("train --coco-root $COCO --out $TMP/run --set epochs=many", "epochs is a whole number"),
        ("train --coco-root $COCO --out $TMP/run --set dropout=x", "dropout is a number"),
        ("train --coco-root $COCO --out $TMP/run --set squash=maybe", "squash is true or false"),
        ("evaluate $TMP", "$TMP is no checkpoint.*training.json.*mmkit train"),
        ("evaluate $COPIED --coco-root $COCO", "other encoder weights"),
    ],
)
def test_bad_input_is_one_message_and_exit_status_2(command, words, coco, copied, three_scenes, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    change(copied, weights={"efficientnet-lite0": "0", "minilm-l6": "0"})
    before, places = sorted(tmp_path.iterdir()), {"$TMP": str(tmp_path), "$COCO": str(coco), "$COPIED": str(copied)}
    for name, place in places.items():
        command, words = command.replace(name, place), words.replace(name, re.escape(place))
    capsys.readouterr()
    assert main(command.split()) == 2
    given = capsys.readouterr()
    assert given.out == "" and given.err.startswith("mmkit: ") and re.search(words, given.err)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", ["train --out a --false colour", "train --out a --bad 1", "check a b"])
def test_options_that_the_parser_does_not_know_are_refused(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    assert stop.value.code == 2 and re.search(r"'colour'.*roles|unrecognized arguments", capsys.readouterr().err)


def test_a_process_that_alone_has_failed_says_which_it_is_and_an_interrupt_ends_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mmkit.__main__.time.sleep", sleep := Mock())
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(mmkit, "draw_scenes", Mock(side_effect=KeyboardInterrupt))
    assert main(["scenes", str(tmp_path / "new")]) == 130 and "interrupted" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "nowhere")]) == 2 and sleep.call_args.args[0] > 1
    assert capsys.readouterr().err.startswith("mmkit: process 1 of 2: There is no folder")


@pytest.mark.parametrize(("command", "place"), [("run", "notebooks"), ("results", "notebooks/results")])
def test_run_and_results_hand_their_options_to_a_script(command, place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mmkit.__main__.CHECKOUT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["mmkit"])
    assert main([command]) == 2 and f"{place}/run.py is part of a checkout" in capsys.readouterr().err
    (tmp_path / place).mkdir(parents=True)
    code = "import sys, mmkit\nprint(__name__, *sys.argv)\nmmkit.profile(sys.argv[-1])\n"
    (tmp_path / place / "run.py").write_text(code)
    options = ["--only", "01", "02", "-h", "--unknown=3", "--profile", "mini"]
    assert said(capsys, command, *options) == f"__main__ {tmp_path / place / 'run.py'} {' '.join(options)}\n"
    assert main([command, "--profile", "minni"]) == 2 and "'minni'" in capsys.readouterr().err


def test_run_names_what_it_cannot_find():
    done = in_a_process("-m", "mmkit", "run", "--only", "99")
    assert done.returncode == 2 and done.stderr.startswith("mmkit: No notebook 99") and not done.stdout


@pytest.mark.parametrize("command", COMMANDS[:-2])
def test_help_shows_an_example_that_the_parser_takes(command, capsys, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = capsys.readouterr().out
    example = re.search(r"example: python -m mmkit ([^\n]+(?:\n.+)*)", text)[1].split()
    monkeypatch.setitem(main.__globals__, command, taken := Mock(return_value=None))
    assert stop.value.code == 0 and example[0] == command and main(example) == 0 and taken.call_count == 1
    joined = re.sub(r"\s+", "", text)  # a long line is broken after a hyphen
    assert command != "train" or all(name in joined for name in mmkit.FUSERS)


def test_help_names_every_command_and_none_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(re.search(rf"^ +{command} ", text, re.MULTILINE) for command in COMMANDS)
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2 and capsys.readouterr().out == ""
