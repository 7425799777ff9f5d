"""The laws of the house, and that the files which a newcomer's installation rests on say the same thing."""

import ast
import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import mmkit

TOP = Path(__file__).parent.parent
PACKAGE = TOP / "mmkit"
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
# Imports go one way: a file imports from those before it, and nobody imports what stands last.
LEAVES, BELOW = ("support", "profiles"), ("scenes", "folders")
CORE = (
    "data", "preprocess", "encoders", "store", "features", "fusers", "baselines", "losses", "training", "evaluation",
    "diagnostics", "graphs", "regions", "checkpoints", "results", "lora",
)  # fmt: skip
FACES = ("plots", "__main__")


def sources(*patterns):
    return sorted(chain.from_iterable(TOP.glob(pattern) for pattern in patterns))


def lines_of(paths):
    return sum(len(path.read_text().splitlines()) for path in paths)


def imports_of(path):
    """Pairs of a module of the package and a name taken from it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("mmkit")):
            module = (node.module or "").removeprefix("mmkit").strip(".")
            folder = path.parent.name if node.level == 1 and path.parent != PACKAGE else ""
            yield from ((folder or module.split(".")[0], alias.name) for alias in node.names)


# --- the house -------------------------------------------------------------------------------------


def test_the_package_fits_into_one_head():
    core = [path for path in sources("mmkit/*.py") if path.stem not in FACES]
    assert lines_of(core) <= 3300
    assert lines_of(sources("mmkit/**/*.py")) <= 5000
    assert len(sources("mmkit/*.py")) <= 22
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()} == set(BELOW)


def test_the_tests_stay_smaller_than_what_one_reads_in_a_week():
    assert lines_of(sources("tests/**/*.py")) <= 6500


@pytest.mark.parametrize("path", sources("mmkit/**/*.py", "notebooks/**/*.py"), ids=lambda path: path.stem)
def test_a_file_is_one_idea_and_a_function_a_screen(path):
    assert lines_of([path]) <= 350
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("path", sources("mmkit/**/*.py"), ids=lambda path: path.stem)
def test_imports_go_one_way(path):
    folder = path.parent.name if path.parent != PACKAGE else ""
    order = [*LEAVES, *BELOW, *CORE]
    if path.stem in LEAVES:
        allowed = {*LEAVES[: LEAVES.index(path.stem)]}
    elif folder:  # leaves alone, and what lies in the folder itself
        allowed = {*LEAVES, folder}
    elif path.stem in ("__init__", *FACES):
        allowed = {"", *order}
    else:
        allowed = set(order[: order.index(path.stem)])
    assert {module for module, _ in imports_of(path)} <= allowed


@pytest.mark.parametrize(
    "path", sources("mmkit/**/*.py", "tests/**/*.py", "notebooks/**/*.py"), ids=lambda path: path.stem
)
def test_no_private_name_crosses_a_file(path):
    assert not [name for _, name in imports_of(path) if name.startswith("_")]
    imported = {name for _, name in imports_of(path)} | {"mmkit"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
            assert node.attr in ("_fields", "_replace") or not re.match("_[a-z]", node.attr), node.attr


def test_no_test_file_imports_another():
    for path in sources("tests/*.py"):
        assert not re.findall(r"^(?:from|import) test_", path.read_text(), re.MULTILINE), path.name


def test_one_word_for_the_row_of_a_captions_image():
    text = "\n".join(path.read_text() for path in sources("mmkit/**/*.py", "notebooks/*.ipynb"))
    assert not re.findall(r"\b(?:caption_image|owners?)\b", text)


def test_every_public_name_is_there():
    assert len(set(mmkit.__all__)) == len(mmkit.__all__) > 60
    assert all(getattr(mmkit, name) is not None for name in mmkit.__all__)
    with pytest.raises(AttributeError, match="load_caption"):
        mmkit.load_caption  # noqa: B018


def test_checking_a_folder_needs_neither_torch_nor_matplotlib(scenes_folder):
    code = (
        "import sys; from mmkit.__main__ import main; status = main(['check', sys.argv[1]]);"
        "print(sorted({'torch', 'transformers', 'matplotlib', 'sklearn', 'pandas'} & set(sys.modules)), status)"
    )
    done = subprocess.run([sys.executable, "-c", code, scenes_folder], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] 0"


# --- the installation ------------------------------------------------------------------------------


def locked():
    lines = (TOP / "requirements.lock").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", name).lower(): Version(version) for name, version in pairs}


def test_the_lock_holds_every_requirement_in_its_range():
    extras, versions = PROJECT["optional-dependencies"].values(), locked()
    for line in [*PROJECT["dependencies"], *chain.from_iterable(extras)]:
        requirement = Requirement(line)
        assert versions[requirement.name.lower()] in requirement.specifier, requirement


def test_make_and_conda_install_this_package_with_all_extras_at_the_locked_versions():
    *conda, by_pip = yaml.safe_load((TOP / "environment.yml").read_text())["dependencies"]
    assert conda == [f"python{PROJECT['requires-python']}", "pip"]
    constraints, package = by_pip["pip"]
    assert (TOP / constraints.removeprefix("-c ")).is_file()
    assert set(re.fullmatch(r"-e \.\[(.+)\]", package)[1].split(",")) == set(PROJECT["optional-dependencies"])
    command = re.search(r"pip install .* (-c \S+) -e '(.+)'", (TOP / "Makefile").read_text())
    assert [constraints, package] == [command[1], f"-e {command[2]}"]


def test_what_is_installed_is_whole():
    tool = tomllib.loads((TOP / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(tool["packages"]) == {"mmkit", *(f"mmkit.{name}" for name in BELOW)}
    others = {path.name for path in PACKAGE.iterdir() if path.is_file() and path.suffix != ".py"}
    assert set(tool["package-data"]["mmkit"]) == others


def test_the_readme_names_every_notebook_command_and_profile():
    readme = (TOP / "README.md").read_text()
    assert all(f"notebooks/{path.name}" in readme for path in sources("notebooks/*.ipynb"))
    targets = re.search(r"^\.PHONY: (.+)$", (TOP / "Makefile").read_text(), re.MULTILINE)[1].split()
    for target in ("run", "test", "test-all", "lab", "bench", "results"):
        assert target in targets and f"make {target}" in readme
    assert all(mmkit.profile(name).name in readme for name in ("mini", "photos", "coco"))


@pytest.mark.parametrize("path", sources("README.md", "notebooks/results/README.md"), ids=lambda path: path.parent.name)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)|src=\"(?!https?:)([^\"]+)\"", path.read_text())
    for link in (a or b for a, b in links):
        assert (path.parent / link.partition("#")[0]).exists(), link
