import pytest
import torch


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("MMKIT_PROFILE", "MMKIT_COCO_ROOT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small batches gain little from a second thread, and wait long for it where the cores are busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def scenes_folder(tmp_path_factory):
    from mmkit.scenes import draw_scenes

    return draw_scenes(tmp_path_factory.mktemp("drawn") / "scenes", 60)


@pytest.fixture(scope="session")
def dataset(scenes_folder):
    """60 scenes, without the six new combinations."""
    from mmkit.data import load_captions

    return load_captions(scenes_folder).select(range(60))


@pytest.fixture(scope="session")
def encoders():
    from mmkit.encoders import load_encoders

    return load_encoders(device="cpu")


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """One cache of features for all tests that only read from it."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def features(dataset, encoders, cache):
    """Of the 60 scenes, with grids and tokens."""
    from mmkit.features import extract_features

    return extract_features(dataset, encoders, cache, "float32", grids=True, tokens=True)
