"""Tests that the recipe of conda and the container agree with `pyproject.toml`."""

import re
import tomllib

import pytest

from tests.house.source import ROOT

REPOSITORY = ROOT.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def test_the_recipe_of_conda_has_the_dependencies_of_the_wheel():
    yaml = pytest.importorskip("yaml")
    recipe = yaml.safe_load((REPOSITORY / "packaging/recipe.yaml").read_text())
    python, *dependencies = recipe["requirements"]["run"]
    assert python == f"python {PROJECT['requires-python']}"
    without_spaces = [dependency.replace(" ", "") for dependency in dependencies]
    assert without_spaces == PROJECT["dependencies"]
    assert recipe["context"]["version"] == PROJECT["version"]
    (entry_point,) = recipe["build"]["python"]["entry_points"]
    assert entry_point == f"hypergrad = {PROJECT['scripts']['hypergrad']}"
    assert recipe["about"]["summary"] == PROJECT["description"]


def test_the_container_copies_and_installs_what_exists():
    """The container itself is not built by any test."""
    text = (REPOSITORY / "packaging/Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        for name in line.split():
            assert (REPOSITORY / name).exists(), name
    (extra,) = re.findall(r"'\.\[(\w+)\]'", text)
    assert extra in PROJECT["optional-dependencies"]
