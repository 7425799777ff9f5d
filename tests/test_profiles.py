import os
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from mmkit import MmkitError, Profile, profile, profiles

NAMES = ("mini", "photos", "coco")


def test_mini_is_the_default():
    settings = profile()
    assert (settings.name, settings.data, settings.coco_root) == ("mini", "scenes", None)


def test_the_environment_names_the_profile_and_an_argument_wins(monkeypatch):
    monkeypatch.setenv("MMKIT_PROFILE", "coco")
    assert profile().name == "coco"
    assert profile("photos").name == "photos"
    monkeypatch.setenv("MMKIT_PROFILE", "")
    assert profile().name == "mini"


def test_the_coco_profile_has_the_published_encoders_and_learning_rate():
    settings = profile("coco")
    assert (settings.image_encoder, settings.text_encoder) == ("resnet50", "bert-base-uncased")
    assert (settings.max_tokens, settings.learning_rate) == (512, 1e-4)


@pytest.mark.parametrize("from_environment", [False, True])
def test_an_unknown_profile_lists_the_valid_ones(monkeypatch, from_environment):
    if from_environment:
        monkeypatch.setenv("MMKIT_PROFILE", "huge")
    with pytest.raises(MmkitError, match="'huge'") as error:
        profile(None if from_environment else "huge")
    assert all(name in str(error.value) for name in NAMES)


def test_an_unknown_setting_lists_the_valid_ones():
    with pytest.raises(MmkitError, match="epoch, lr") as error:
        profile("mini", lr=1, epoch=3, epochs=3)
    assert all(f.name in str(error.value) for f in fields(Profile))


@pytest.mark.parametrize("name", NAMES)
def test_changes_apply_to_the_named_setting_only(name):
    plain, changed = profile(name), profile(name, epochs=77, dropout=0.9)
    assert (changed.epochs, changed.dropout) == (77, 0.9)
    other = {f.name for f in fields(Profile)} - {"epochs", "dropout"}
    assert all(getattr(plain, f) == getattr(changed, f) for f in other)


def test_a_profile_cannot_be_changed_in_place():
    with pytest.raises(FrozenInstanceError):
        profile().epochs = 3


def test_the_environment_names_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MMKIT_CACHE", str(tmp_path / "here"))
    assert profile().cache == (tmp_path / "here").resolve()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MMKIT_CACHE", "~/there")
    assert profile().cache == (tmp_path / "there").resolve()


def test_the_cache_lies_in_a_checkout_or_else_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("MMKIT_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(profiles, "_CHECKOUT", tmp_path)
    assert profile().cache == tmp_path / "home" / ".cache" / "mmkit"
    (tmp_path / "pyproject.toml").touch()
    assert profile().cache == tmp_path / "build" / "cache"


def test_profiles_of_photos_read_the_coco_root_of_the_environment(monkeypatch, tmp_path):
    assert profile("photos").coco_root is None
    monkeypatch.setenv("MMKIT_COCO_ROOT", str(tmp_path))
    assert profile("photos").coco_root == profile("coco").coco_root == tmp_path.resolve()
    assert profile("photos", coco_root=tmp_path / "other").coco_root == (tmp_path / "other").resolve()
    assert (profile("mini").data, profile("mini").coco_root) == ("scenes", None)


@pytest.mark.parametrize("name", NAMES)
def test_a_named_folder_is_read_whatever_the_profile(tmp_path, name):
    settings = profile(name, coco_root=str(tmp_path))
    assert (settings.data, settings.coco_root) == ("folder", tmp_path.resolve())


def test_data_set_to_folder_reads_the_coco_root_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MMKIT_COCO_ROOT", str(tmp_path))
    assert profile("mini", data="folder").coco_root == tmp_path.resolve()


def test_a_relative_root_counts_from_the_working_directory_then_from_the_checkout(monkeypatch, tmp_path):
    checkout = tmp_path.resolve() / "checkout"
    (checkout / "notebooks").mkdir(parents=True)
    (checkout / "data" / "coco").mkdir(parents=True)
    monkeypatch.setattr(profiles, "_CHECKOUT", checkout)
    monkeypatch.chdir(checkout / "notebooks")
    assert profile("photos", coco_root="data/coco").coco_root == checkout / "data" / "coco"
    monkeypatch.setenv("MMKIT_COCO_ROOT", "data/coco")
    assert profile("photos").coco_root == checkout / "data" / "coco"
    nearer = checkout / "notebooks" / "data" / "coco"
    nearer.mkdir(parents=True)
    assert profile("photos").coco_root == nearer
    assert profile("photos", coco_root="nowhere").coco_root == checkout / "notebooks" / "nowhere"


def test_a_root_in_the_home_folder_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert profile("photos", coco_root="~/coco").coco_root == (tmp_path / "coco").resolve()


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_settings_holds_no_path(monkeypatch, tmp_path, name):
    monkeypatch.setenv("MMKIT_CACHE", str(tmp_path / "cache"))
    shown = repr(profile(name, coco_root=tmp_path / "photos", epochs=77))
    assert str(tmp_path) not in shown and os.sep not in shown and str(Path.home()) not in shown
    assert any(line.split() == ["epochs", "77"] for line in shown.splitlines())
    assert any(line.split() == ["profile", name] for line in shown.splitlines())


def test_the_table_of_settings_tells_the_drawn_scenes():
    assert "1,234 drawn scenes, seed 5" in repr(profile("mini", scene_count=1234, scene_seed=5))
