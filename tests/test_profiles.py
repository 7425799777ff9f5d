import os
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from mmkit import profiles
from mmkit.profiles import Profile, profile
from mmkit.support import MmkitError

NAMES = ("mini", "photos", "coco")


def test_mini_is_the_default_and_coco_has_the_published_encoders_and_learning_rate():
    mini, coco = profile(), profile("coco")
    assert (mini.name, mini.data, mini.coco_root) == ("mini", "scenes", None)
    assert (coco.image_encoder, coco.text_encoder) == ("resnet50", "bert-base-uncased")
    assert (coco.max_tokens, coco.learning_rate) == (512, 1e-4)


def test_the_environment_names_the_profile_and_an_argument_wins(monkeypatch):
    for value, argument, name in (("coco", None, "coco"), ("coco", "photos", "photos"), ("", None, "mini")):
        monkeypatch.setenv("MMKIT_PROFILE", value)
        assert profile(argument).name == name


def test_an_unknown_profile_or_setting_lists_the_valid_ones(monkeypatch):
    monkeypatch.setenv("MMKIT_PROFILE", "huge")
    for name in (None, "huge"):
        with pytest.raises(MmkitError, match=f"'huge'.*{', '.join(NAMES)}"):
            profile(name)
    with pytest.raises(MmkitError, match="epoch, lr") as error:
        profile("mini", lr=1, epoch=3, epochs=3)
    assert all(f.name in str(error.value) for f in fields(Profile))


@pytest.mark.parametrize("name", NAMES)
def test_changes_apply_to_the_named_setting_only_and_to_a_copy(name):
    plain, changed = profile(name), profile(name, epochs=77, dropout=0.9)
    assert (changed.epochs, changed.dropout) == (77, 0.9)
    other = {f.name for f in fields(Profile)} - {"epochs", "dropout"}
    assert all(getattr(plain, f) == getattr(changed, f) for f in other)
    with pytest.raises(FrozenInstanceError):
        plain.epochs = 3


def test_the_cache_is_the_named_one_or_lies_in_a_checkout_or_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(profiles, "CHECKOUT", tmp_path)
    for value, folder in ((tmp_path / "a" / ".." / "b", "b"), ("~/there", "home/there"), ("", "home/.cache/mmkit")):
        monkeypatch.setenv("MMKIT_CACHE", str(value))
        assert profile().cache == tmp_path.resolve() / folder
    (tmp_path / "pyproject.toml").touch()
    assert profile().cache == tmp_path / "build" / "cache"
    assert profile(cache="~/given").cache == tmp_path / "home" / "given"


def test_a_folder_of_photos_is_the_named_one_or_that_of_the_environment(monkeypatch, tmp_path):
    assert profile("photos").coco_root is None
    for name in NAMES:  # a named folder is read whatever the profile
        named = profile(name, coco_root=str(tmp_path / "other"))
        assert (named.data, named.coco_root) == ("folder", (tmp_path / "other").resolve())
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MMKIT_COCO_ROOT", "~/coco")
    for settings in (profile("photos"), profile("coco"), profile("mini", data="folder")):
        assert settings.coco_root == (tmp_path / "coco").resolve()
    assert (profile("mini").data, profile("mini").coco_root) == ("scenes", None)


def test_a_relative_root_counts_from_the_working_directory_then_from_the_checkout(monkeypatch, tmp_path):
    checkout = tmp_path.resolve() / "checkout"
    nearer = checkout / "notebooks" / "data" / "coco"
    (checkout / "data" / "coco").mkdir(parents=True)
    (checkout / "notebooks").mkdir()
    monkeypatch.setattr(profiles, "CHECKOUT", checkout)
    monkeypatch.chdir(checkout / "notebooks")
    assert profile("photos", coco_root="data/coco").coco_root == checkout / "data" / "coco"
    assert profile("photos", coco_root="nowhere").coco_root == checkout / "notebooks" / "nowhere"
    nearer.mkdir(parents=True)
    assert profile("photos", coco_root="data/coco").coco_root == nearer


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_settings_holds_no_path(monkeypatch, tmp_path, name):
    monkeypatch.setenv("MMKIT_CACHE", str(tmp_path / "cache"))
    shown = repr(profile(name, coco_root=tmp_path / "photos", epochs=77))
    assert str(tmp_path) not in shown and os.sep not in shown and str(Path.home()) not in shown
    assert {("epochs", "77"), ("profile", name)} <= {tuple(line.split()) for line in shown.splitlines()}
    assert "1,234 drawn scenes, seed 5" in repr(profile("mini", scene_count=1234, scene_seed=5))
