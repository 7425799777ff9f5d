import pytest
import torch

from mmkit import draw_scenes, extract_features, load_captions, load_encoders


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
    return draw_scenes(tmp_path_factory.mktemp("drawn") / "scenes", 60)


@pytest.fixture(scope="session")
def dataset(scenes_folder):
    """60 scenes, without the six new combinations."""
    return load_captions(scenes_folder).select(range(60))


@pytest.fixture(scope="session")
def encoders():
    return load_encoders(device="cpu")


@pytest.fixture(scope="session")
def store(dataset, encoders, tmp_path_factory):
    return extract_features(dataset, encoders, tmp_path_factory.mktemp("cache"), precision="float32")
