"""Reproducible randomness: seeds derived from names, and the states of all global generators."""

import hashlib
import random
from typing import Any

import numpy
import torch


def derive_seed(*parts: int | str) -> int:
    """A seed that depends on every part, and is the same on every machine and Python version."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class GlobalGenerators:
    """The states of torch's, NumPy's and Python's global generators at one moment; taking them costs microseconds."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy: Any = numpy.random.get_state()
        self._torch = torch.get_rng_state()
        # Asking whether there is a device opens a library each time; a device that was not used has no state.
        used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._cuda = torch.cuda.get_rng_state() if used else None

    def state_dict(self) -> dict[str, Any]:
        """The states as tensors, numbers and lists."""
        version, internal, gauss = self._python
        name, keys, position, has_gauss, cached = self._numpy
        keys = torch.tensor(numpy.asarray(keys, dtype="int64"))
        state: dict[str, Any] = {
            "torch": self._torch,
            "python": [version, list(internal), gauss],
            "numpy": [name, keys, int(position), int(has_gauss), float(cached)],
        }
        return state if self._cuda is None else {**state, "cuda": self._cuda}


def random_state() -> dict[str, Any]:
    """The states of the global generators now; see `GlobalGenerators`."""
    return GlobalGenerators().state_dict()


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the states that `random_state` returned on this rank."""
    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, keys.cpu().numpy().astype("uint32"), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
