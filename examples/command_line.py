"""Command lines of the examples: arguments, and messages about missing packages and failed downloads.

Every example imports this module first, so that a missing package is named before anything is trained.
"""

import argparse
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

import torch

PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "jsonargparse": '"jsonargparse[signatures]"'}
"""What pip calls the packages of these modules, where an example needs more than `lightning_stn`."""


def require(*modules: str) -> None:
    """Check that the packages of these modules are installed.

    Raises:
        ModuleNotFoundError: some are missing; the message gives the command that installs them.
    """
    missing = [PACKAGES.get(module, module) for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(f"This example needs {', '.join(missing)}; run: pip install {' '.join(missing)}")


def positive(text: str) -> int:
    """A whole number of at least 1, as the type of an argument."""
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}; give 1 or more")
    return int(text)


def summary(doc: str | None) -> str:
    """The first line of a docstring."""
    return (doc or "").partition("\n")[0]


def example_parser(doc: str | None, epochs: int, out: Path) -> argparse.ArgumentParser:
    """A parser with the arguments of every example.

    Args:
        doc: docstring of the example, whose first line describes it.
        epochs: default length of each run.
        out: default folder of logs and pictures.
    """
    parser = argparse.ArgumentParser(description=summary(doc))
    parser.add_argument("--seed", "--seeds", type=int, nargs="+", default=[0], help="one comparison for each of them")
    parser.add_argument("--epochs", type=positive, default=epochs, help="of each network")
    parser.add_argument("--out", type=Path, default=out, help="folder of the logs and pictures")
    return parser


def set_up(threads: int = 1) -> None:
    """Leave Lightning's tips out of the output, and use few threads, since these networks are small."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.")  # tips on data workers, deprecations inside Lightning
    torch.set_num_threads(threads)


@contextmanager
def downloading(what: str, remedy: str) -> Iterator[None]:
    """Explain a download that fails within the block.

    Args:
        what: is downloaded.
        remedy: what to do where there is no network.

    Raises:
        ConnectionError: the download failed.
    """
    try:
        yield
    except (URLError, ConnectionError, TimeoutError) as error:
        reason = getattr(error, "reason", None) or error
        raise ConnectionError(f"Expected to download {what}, but it failed: {reason}; {remedy}.") from None


require("sklearn", "matplotlib")
