"""`STNCallback` as text: the arguments that were given to it, and what a run has made of them."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from lightning_stn.callback.settings import Settings, setting_names
from lightning_stn.phases import Warmup
from lightning_stn.schedule.tables import describe
from lightning_stn.written import call, written


class Text(str):
    """Text that is written as it is, without quotation marks."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def arguments_text(
    name: str,
    constructor: Callable[..., None],
    settings: Settings,
    optimizer: Any,
    dataloader: Iterable[Any] | None,
    on_resume_use: Iterable[str],
) -> str:
    """The call of a callback's constructor, with the arguments that differ from their defaults.

    Args:
        name: of the class.
        constructor: `STNCallback.__init__`, which has the defaults.
        settings: its arguments that are plain values.
        optimizer: its argument of this name, as are the others.
        dataloader: shown by its class.
        on_resume_use: shown in alphabetical order.
    """
    defaults = {name: one.default for name, one in inspect.signature(constructor).parameters.items()}
    usual = Settings(**{key: defaults[key] for key in setting_names()})
    given = {key: _value_text(getattr(settings, key)) for key in setting_names() if _differs(key, settings, usual)}
    if optimizer is not defaults["optimizer"]:
        given["optimizer"] = Text(_function_text(optimizer))
    if dataloader is not None:
        given["dataloader"] = Text(f"{type(dataloader).__name__}(...)")
    if names := sorted(on_resume_use):
        given["on_resume_use"] = names
    return call(name, (), {key: given[key] for key in defaults if key in given})


def run_text(arguments: Settings, settings: Settings) -> str:
    """What a run has derived from its length or taken from its checkpoint; empty before it is known.

    Args:
        arguments: as they were given.
        settings: those of the run.
    """
    facts = []
    if _differs("warmup", settings, arguments):
        unit = {"steps": "training batches", "epochs": "epochs"}.get(settings.warmup.unit)
        facts.append(f"warm-up of {settings.warmup.length} {unit}" if unit else f"warmup={settings.warmup.length}")
    if settings.lr is not None and _differs("lr", settings, arguments):
        facts.append(f"lr={describe(settings.lr)}" + (", derived from its length" if arguments.lr is None else ""))
    others = [name for name in setting_names() if name not in ("warmup", "lr") and _differs(name, settings, arguments)]
    if arguments.seed is None and "seed" in others:  # torch's, which tells nothing
        others.remove("seed")
    facts += [f"{name}={written(_value_text(getattr(settings, name)))}" for name in others]
    return f"this run: {', '.join(facts)}" if facts else ""


def _differs(name: str, settings: Settings, others: Settings) -> bool:
    return bool(getattr(settings, name) != getattr(others, name))


def _value_text(value: Any) -> Any:
    """A setting as one passes it: a warm-up as a number where it can be one."""
    return value.length if isinstance(value, Warmup) and value.unit != "steps" else value


def _function_text(function: Any) -> str:
    """The name of what builds an optimiser, or the call of `functools.partial`."""
    if isinstance(function, functools.partial):
        return call("partial", (Text(_function_text(function.func)), *function.args), function.keywords)
    return getattr(function, "__qualname__", None) or f"{type(function).__name__}(...)"
