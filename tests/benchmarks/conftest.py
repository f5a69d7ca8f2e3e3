"""Keeps pytest out of this folder, whose programs are run by hand (it would import each of them for its doctests)."""

collect_ignore_glob = ["*.py"]
