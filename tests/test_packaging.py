"""What several files say about a release agrees: versions of the package, of Python and of the dependencies."""

import re
from pathlib import Path
from typing import Any

import yaml

import lightning_stn

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/check.yml").read_text(encoding="utf-8"))


def matrix() -> dict[str, Any]:
    found: dict[str, Any] = WORKFLOW["jobs"]["check"]["strategy"]["matrix"]
    return found


def test_changelog_and_citation_have_the_version_of_the_package() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d[^\]]*)\](?: - (\S+))?$", changelog, re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert released[0] == (lightning_stn.__version__, str(citation["date-released"]))
    assert citation["version"] == lightning_stn.__version__


def test_oldest_versions_are_the_lower_bounds_of_the_dependencies() -> None:
    (listed,) = re.findall(r"^dependencies = \[\n(.*?)^\]", PROJECT, re.DOTALL | re.MULTILINE)
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', listed))
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / ".ci/oldest.txt").read_text(), re.MULTILINE))
    assert len(bounds) == listed.count(">=")
    assert pinned.keys() == bounds.keys()
    assert all(re.fullmatch(rf"{re.escape(bounds[name])}(\.0)*", pinned[name]) for name in bounds)


def test_every_python_of_the_classifiers_is_checked_by_the_workflow() -> None:
    pythons = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    assert matrix()["python"] == pythons
    assert f'requires-python = ">={pythons[0]}"' in PROJECT
    assert matrix()["include"][0] == {"python": pythons[0], "versions": "oldest"}
