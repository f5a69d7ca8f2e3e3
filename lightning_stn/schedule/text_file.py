"""Text files, read whole, with an error that names file and line."""

from pathlib import Path

ENCODING = "utf-8"
"""Of the files of a schedule, on every system."""

LARGEST_FILE = 2**30
"""Bytes; a file beyond them is no schedule, and would fill the memory before that could be said."""


def read_text(path: Path) -> str:
    """The text of a file, without the mark that spreadsheets write before it.

    Raises:
        ValueError: the file is not UTF-8, or larger than `LARGEST_FILE`.
    """
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise ValueError(f"{path}: expected a file of at most {LARGEST_FILE} bytes, got {size}; give a schedule.")
    content = path.read_bytes()
    try:
        return content.decode(ENCODING).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {number}: expected text in UTF-8, got the byte 0x{content[error.start]:02x}; save the "
            "file in UTF-8."
        ) from error
