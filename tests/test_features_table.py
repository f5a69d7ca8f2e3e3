"""FEATURES.md lists every feature once, with tests that exist."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROWS = [
    tuple(cell.strip() for cell in line.strip("|\n ").split(" | "))
    for line in (TESTS / "FEATURES.md").read_text().splitlines()
    if re.match(r"\| (?!feature |\*\*)", line)
]
NAMED = sorted({name for _, tests in ROWS for name in re.findall(r"`([^`]+)`", tests)})


def functions(path: str) -> set[str]:
    """Names of the test functions of a file."""
    tree = ast.parse((TESTS / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_features_table_has_one_row_per_feature_and_a_test_in_each() -> None:
    features = [feature for feature, _ in ROWS]
    assert len(features) > 60
    assert len(set(features)) == len(features)
    assert all(re.fullmatch(r"`[\w/]+\.py::test_\w+`(<br>`[\w/]+\.py::test_\w+`)*", tests) for _, tests in ROWS)


@pytest.mark.parametrize("name", NAMED)
def test_features_table_names_an_existing_test(name: str) -> None:
    path, _, function = name.partition("::")
    assert function in functions(path)
