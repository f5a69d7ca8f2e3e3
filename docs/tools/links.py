"""Hook of MkDocs: links that lead out of `docs/`, to other files of the repository.

Pages link to such files by relative paths, which work in the repository as well. A picture is copied into the site. A
link to another file leads to the repository, if `repo_url` is set in `mkdocs.yml`; otherwise its text stands alone.
"""

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = logging.getLogger("mkdocs.hooks.links")

LINK = re.compile(r"(?P<mark>!?)\[(?P<text>[^\]]*)\]\((?P<target>(?:\.\./)[^)#\s]*)(?P<anchor>#[^)\s]*)?\)")
"""A link to a file above the page's folder."""

FOLDER = "pictures"
"""Where pictures from outside go in the site."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pictures from outside `docs/` to which pages link."""
    for page in files.documentation_pages():
        for link in LINK.finditer(page.content_string):
            path = _outside(page.src_uri, link["target"])
            if link["mark"] and path is not None and files.get_file_from_path(_place(path)) is None:
                files.append(File.generated(config, _place(path), abs_src_path=str(_root(config) / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Replace the links that lead out of `docs/`."""

    def replaced(link: re.Match[str]) -> str:
        path = _outside(page.file.src_uri, link["target"])
        if path is None:
            return link[0]
        if not (_root(config) / path).exists():
            log.warning("%s links to %s, which does not exist", page.file.src_uri, path)
        if link["mark"]:
            target = posixpath.relpath(_place(path), posixpath.dirname(page.file.src_uri) or ".")
            return f"![{link['text']}]({target})"
        if not config.repo_url:
            return link["text"]
        return f"[{link['text']}]({config.repo_url.rstrip('/')}/blob/main/{path}{link['anchor'] or ''})"

    return LINK.sub(replaced, markdown)


def _root(config: Any) -> Path:
    return Path(config.config_file_path).parent


def _outside(page: str, target: str) -> str | None:
    """Path in the repository of a target outside `docs/`; None for one inside it."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    return path.removeprefix("../") if path.startswith("../") else None


def _place(path: str) -> str:
    """Where a picture from outside goes in the site."""
    return posixpath.join(FOLDER, posixpath.basename(path))
