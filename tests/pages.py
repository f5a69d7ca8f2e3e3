"""Markdown pages: their blocks of code, their sections and tables, and a check of shell commands."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
DOCS_PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


class Block(NamedTuple):
    """A fenced block of code."""

    language: str
    code: str


def blocks(path: Path, language: str | None = None) -> list[Block]:
    """The fenced blocks of a page, in their order; of one language, or all."""
    found = [Block(*pair) for pair in re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)]
    return [block for block in found if language in (None, block.language)]


def check_shell(code: str) -> None:
    """Check that commands are well-formed, and that the files and extras that they name exist."""
    subprocess.run(["sh", "-n"], input=code, text=True, check=True)
    missing = [path for path in re.findall(r"\b(?:examples|tests)/[\w./]+", code) if not (ROOT / path).exists()]
    assert not missing
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert set(re.findall(r'"\.\[(\w+)\]"', code)) <= set(extras)


def section(page: Path, title: str) -> str:
    """A section of a page, with the sections below it."""
    level = title.index(" ")
    text = page.read_text() + "\n# end"
    found = re.search(rf"^{re.escape(title)}\n(.*?)^#{{1,{level}}} ", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def first_cells(text: str) -> Iterator[str]:
    """The first cell of each row of the tables in a text."""
    return (line.split("|")[1] for line in text.splitlines() if line.startswith("| "))
