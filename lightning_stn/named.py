"""Checks of hyperparameters by name: of a dictionary of them, and of a name that none has."""

import difflib
from collections.abc import Container, Mapping, Sequence
from typing import Any

from lightning_stn.specifications import Hyperparameter


def check_specifications(specifications: Any, taken: Container[str]) -> None:
    """Check names and specifications of new hyperparameters.

    Args:
        specifications: name to specification.
        taken: names that exist already.

    Raises:
        TypeError: `specifications` is not a mapping, or a value is not a `Hyperparameter`.
        ValueError: a name is taken, or is not a Python identifier.
    """
    if not isinstance(specifications, Mapping):
        raise TypeError(
            "Expected hyperparameters as a dictionary from names to specifications, got "
            f"{specifications!r}; write {{'dropout': Float(0.0, 0.9, init=0.05)}}."
        )
    for name, specification in specifications.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(
                f"Expected a hyperparameter's name to be a Python identifier, got {name!r}; "
                "it becomes a TensorBoard tag and a CSV column."
            )
        if name in taken:
            raise ValueError(f"Hyperparameter {name!r} exists already; choose another name.")
        if not isinstance(specification, Hyperparameter):
            raise TypeError(
                f"Expected hyperparameter {name!r} to be a Hyperparameter, such as a Float, an Integer or a "
                f"Categorical, got {specification!r}; write for instance Float(0.0, 1.0, init=0.5)."
            )


def describe_unknown(name: Any, known: Sequence[str]) -> str:
    """What is wrong with a name that no hyperparameter has, for an error message.

    Of two similar names either may be the misspelt one: that of the reader, or that of the hyperparameter.
    """
    similar = difflib.get_close_matches(str(name), known, n=1)
    advice = (
        f"{name!r} or {similar[0]!r} is misspelt; correct it here, or in hyperparameters={{...}}."
        if similar
        else "use one of them, or add it to hyperparameters={...}."
    )
    return f"which is not one of {list(known)}: {advice}"
