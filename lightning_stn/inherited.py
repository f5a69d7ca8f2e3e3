"""Steps of the module that an `STNModule` stands in front of."""

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import lightning as L


def accepted(step: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
    """As many of these arguments as a step takes by position.

    Raises:
        NotImplementedError: the step takes the loader's iterator instead of a batch.
    """
    function = getattr(step, "__func__", None)
    if isinstance(function, FunctionType):
        return arguments[: _positional(function)]
    return arguments[: _count(step, inspect.signature(step))]


@functools.lru_cache(maxsize=256)
def _positional(function: FunctionType) -> int | None:
    """How many arguments a method takes by position, without `self`; None for any number."""
    signature = inspect.signature(function)
    first, *others = signature.parameters.values()
    if first.kind is not inspect.Parameter.VAR_POSITIONAL:
        signature = signature.replace(parameters=others)
    return _count(function, signature)


def _count(step: Callable[..., Any], signature: inspect.Signature) -> int | None:
    """How many arguments a step takes by position; None for any number."""
    if "dataloader_iter" in signature.parameters:
        raise NotImplementedError(
            f"{step.__qualname__} takes dataloader_iter, the loader's iterator, but an STNModule gives its steps a "
            "batch, which has one perturbation; take batch and batch_idx."
        )
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(kind in positional for kind in kinds)


def _is_placeholder(kind: type, after: type, name: str) -> bool:
    """Whether the method that follows a base among the bases of a class is LightningModule's placeholder."""
    # By classes: compiled, two bound methods are never the same.
    bases = kind.__mro__
    owner = next(base for base in bases[bases.index(after) + 1 :] if name in base.__dict__)
    return issubclass(L.LightningModule, owner)


def inherited(module: Any, mixin: type, name: str) -> Callable[..., Any] | None:
    """The method of the base behind a mixin, or None if that is only LightningModule's placeholder."""
    return None if _is_placeholder(type(module), mixin, name) else getattr(super(mixin, module), name)


def own_arguments(kind: type, base: type, ignored: Any) -> list[str]:
    """The arguments to leave out of `hparams`: `ignored`, and those of a base that a subclass gives by itself.

    A subclass that has an argument of the same name has it from its caller.
    """
    names = [ignored] if isinstance(ignored, str) else list(ignored or ())
    asked = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    given = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
    return names + [one.name for one in given if one.kind is one.KEYWORD_ONLY and one.name not in asked]
