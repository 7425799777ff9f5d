"""The files that a newcomer's installation rests on say the same thing."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import mmkit

TOP = Path(__file__).parent.parent
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]


def locked():
    lines = (TOP / "requirements.lock").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", name).lower(): Version(version) for name, version in pairs}


def requirements():
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(line) for line in [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]]


def test_the_lock_holds_every_requirement_in_its_range():
    versions = locked()
    for requirement in requirements():
        assert versions[requirement.name.lower()] in requirement.specifier, requirement


def test_conda_installs_this_package_with_all_extras_at_the_locked_versions():
    environment = yaml.safe_load((TOP / "environment.yml").read_text())
    *conda, by_pip = environment["dependencies"]
    assert conda == [f"python{PROJECT['requires-python']}", "pip"]
    constraints, package = by_pip["pip"]
    assert (TOP / constraints.removeprefix("-c ")).is_file()
    folder, extras = re.fullmatch(r"-e (.+)\[(.+)\]", package).groups()
    assert (TOP / folder / "pyproject.toml").is_file()
    assert set(extras.split(",")) == set(PROJECT["optional-dependencies"])


def test_make_and_conda_install_the_same():
    command = re.search(r"pip install .* (-c \S+) -e '(.+)'", (TOP / "Makefile").read_text())
    by_pip = yaml.safe_load((TOP / "environment.yml").read_text())["dependencies"][-1]["pip"]
    assert by_pip == [command[1], f"-e {command[2]}"]


def test_the_readme_names_every_notebook_command_and_profile():
    readme = (TOP / "README.md").read_text()
    for notebook in (TOP / "notebooks").glob("*.ipynb"):
        assert f"notebooks/{notebook.name}" in readme
    targets = re.search(r"^\.PHONY: (.+)$", (TOP / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert all(f"make {target}" in readme for target in ("run", "test", "lab", "bench"))
    assert {"run", "test", "lab", "bench"} <= set(targets)
    assert all(mmkit.profile(name).name in readme for name in ("mini", "photos", "coco"))


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)|src=\"(?!https?:)([^\"]+)\"", (TOP / "README.md").read_text())
    assert links
    for link in (a or b for a, b in links):
        assert (TOP / link).exists(), link


def test_modules_stay_small_and_import_one_way():
    order = [
        "errors", "assets", "progress", "profiles", "denormals", "vocabulary", "facts", "captions", "scenes",
        "pictures", "transfer", "download", "annotations", "data", "check", "preprocess", "encoders", "weights",
        "backbones", "zoo", "features", "extraction", "fusers", "baselines", "tuning", "edges", "hubness", "graphs",
        "parts", "losses", "states", "batches", "training", "cards", "checkpoints", "metrics", "shortlist",
        "evaluation", "protocols", "results", "questions", "experiments", "costs", "planning", "plots", "galleries",
        "browser", "course",
    ]  # fmt: skip
    for path in (TOP / "mmkit").glob("[!_]*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 360, path.name
        for name in re.findall(r"^\s*from \.(\w+) import", text, re.MULTILINE):
            assert order.index(name) < order.index(path.stem), f"{path.stem} imports {name}"


def test_every_public_name_is_there_and_in_one_module_only():
    names = [name for names in mmkit._NAMES.values() for name in names]
    assert sorted(names) == mmkit.__all__ == sorted(set(names))
    assert all(getattr(mmkit, name) is not None for name in names)
    with pytest.raises(AttributeError, match="no attribute 'load_caption'"):
        mmkit.load_caption  # noqa: B018


def test_checking_a_folder_needs_neither_torch_nor_matplotlib(scenes_folder):
    code = (
        "import sys; from mmkit.__main__ import main; status = main(['check', sys.argv[1]]);"
        "print(sorted({'torch', 'transformers', 'matplotlib', 'sklearn'} & set(sys.modules)), status)"
    )
    done = subprocess.run([sys.executable, "-c", code, scenes_folder], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] 0"
