"""The saved state of `STNCallback`: its version, its form, and the refusal of a state that is damaged or older."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_stn.arguments import is_number, is_whole
from lightning_stn.callback.settings import Settings
from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.phases import COUNTERS

VERSION = 2
"""Version of the form of the state; raised where an older one lacks something or has another meaning."""

Form = Callable[[str, Any], Iterable[str]]
"""Names what is wrong with a value at a place of the state."""


def _form(expected: str, fits: Callable[[Any], bool]) -> Form:
    def check(place: str, value: Any) -> Iterable[str]:
        if not fits(value):
            yield f"{place}: expected {expected}, got {_short(value)}"

    return check


def _fields(forms: Mapping[str, Form]) -> Form:
    """A dictionary with these keys, no fewer and no more."""

    def check(place: str, value: Any) -> Iterable[str]:
        if not isinstance(value, dict):
            yield f"{place}: expected the entries {list(forms)}, got {_short(value)}"
            return
        for name in [name for name in forms if name not in value]:
            yield f"{place}.{name}: expected an entry, got none"
        for name in value.keys() - forms.keys():
            yield f"{place}.{name}: expected no such entry"
        for name, form in forms.items():
            if name in value:
                yield from form(f"{place}.{name}" if place else name, value[name])

    return check


def _each(form: Form) -> Form:
    """A list or a dictionary whose values have this form."""

    def check(place: str, value: Any) -> Iterable[str]:
        if not isinstance(value, list | tuple | dict):
            yield f"{place}: expected a list or a dictionary, got {_short(value)}"
            return
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from form(f"{place}.{key}", one)

    return check


def _short(value: Any) -> str:
    text = repr(value).replace("\n", " ")
    return text if len(text) < 100 else f"{text[:100]}..."


def _is_finite(value: Any) -> bool:
    return isinstance(value, Tensor) and bool(torch.isfinite(value).all())


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


_COUNT = _form("a whole number of at least 0", lambda value: is_whole(value, 0))
_FLAG = _form("True or False", lambda value: isinstance(value, bool))
_TEXT = _form("text", lambda value: isinstance(value, str))
_DICTIONARY = _form("a dictionary", lambda value: isinstance(value, dict))
_LIST = _form("a list", lambda value: isinstance(value, list | tuple))
_TENSOR = _form("a tensor", lambda value: isinstance(value, Tensor))
_TENSOR_OR_NONE = _form("a tensor or None", lambda value: isinstance(value, Tensor | None))
_WARNING = _form("two texts", lambda value: _is_pair(value) and all(isinstance(one, str) for one in value))
_STEP = _form("a text and a number", lambda v: _is_pair(v) and isinstance(v[0], str) and is_whole(v[1], 0))
_LIST_OR_NONE = _form("a list or None", lambda value: isinstance(value, list | tuple | None))
_COUNT_OR_NONE = _form("a whole number of at least 0, or None", lambda value: value is None or is_whole(value, 0))
_MEAN = _fields({"total": _TENSOR_OR_NONE, "count": _COUNT})
_FINITE = _form("a finite number", is_number)
_MOMENT = _form("a tensor of finite numbers, or None", lambda value: value is None or _is_finite(value))


def _settings(place: str, value: Any) -> Iterable[str]:
    try:
        Settings.from_state(value)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        yield f"{place}: expected the settings of a run, got {_short(value)} ({error})"


_STATE: dict[str, Form] = {
    "version": _COUNT,
    "settings": _settings,
    "hyperparameters": _each(_TEXT),
    "clock": _fields(dict.fromkeys(COUNTERS, _COUNT)),
    "optimizer": _fields(
        {
            "class": _TEXT,
            "optimizer": _fields({"state": _DICTIONARY, "param_groups": _each(_DICTIONARY)}),
            "scaler": _form("a dictionary or None", lambda value: isinstance(value, dict | None)),
            "freeze": _FLAG,
        }
    ),
    "stream": _fields({"consumed": _COUNT, "before": _COUNT}),
    "watch": _fields({"skipped": _COUNT, "in_a_row": _COUNT, "warned": _each(_WARNING)}),
    "statistics": _fields({"moments": _each(_MOMENT), "weight": _FINITE, "count": _COUNT, "warned": _FLAG}),
    "record": _fields(
        {
            "steps": _COUNT,
            "completes": _FLAG,
            "rows": _each(_LIST),
            "last": _LIST_OR_NONE,
            "stride": _form("a whole number of at least 1", lambda value: is_whole(value, 1)),
            "records": _COUNT,
            "extra": _FLAG,
            "warmup": _COUNT_OR_NONE,
            "means": _fields(dict.fromkeys(("train_loss", "valid_loss", "hypergradient"), _MEAN)),
            "summarised": _each(_TEXT),
        }
    ),
    "metric_steps": _each(_STEP),
    "surroundings": _fields(
        {
            "generators": _each(_DICTIONARY),
            "metrics": _each(_TENSOR),
            "loaders": _each(_DICTIONARY),
            "gradients": _each(_TENSOR),
            "inexact": _TEXT,
        }
    ),
    "digest": _TEXT,
}


def sign(state: dict[str, Any], hyperparameters: Mapping[str, Any]) -> None:
    """Add the digest of a state, together with the hyperparameters that the checkpoint holds beside it."""
    state["digest"] = _digest(state, hyperparameters)


def migrated(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state in the form of this version; of an older one, that is a copy with what it lacks.

    Raises:
        ValueError: the state is of a newer version.
    """
    if "version" in state or "digest" in state:
        version = state.get("version")
        if is_whole(version, VERSION + 1):
            raise ValueError(
                f"The checkpoint's state of STNCallback has version {version}, but this lightning_stn knows versions "
                f"up to {VERSION}; resume with the lightning_stn that wrote it, or a newer one."
            )
        return _with_whole_record(state)
    surroundings = {"generators": [], "metrics": {}, "loaders": [], "gradients": {}, "inexact": ""}
    older = {**state, "version": 1, "surroundings": {**surroundings, **state.get("surroundings", {})}}
    if isinstance(state.get("clock"), dict):
        older["clock"] = {"due": 0, "epoch": 0, **state["clock"]}
        # After an exception it counted a batch whose step was not taken.
        older["stream"] = {"consumed": state["clock"].get("hyperparameter_steps"), "before": 0}
        if isinstance(state.get("record"), dict):  # It recorded by training batches.
            older["record"] = {"steps": state["clock"].get("batches"), "completes": True, **state["record"]}
    return _with_whole_record(older)


def _with_whole_record(state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a state whose record has what version 2 added: a schedule that can be thinned, and its warm-up."""
    record = state.get("record")
    if state.get("version") != 1 or not isinstance(record, dict):
        return dict(state)
    rows, clock = record.get("rows"), state.get("clock")
    added = {
        "last": rows[-1] if isinstance(rows, list) and rows else None,
        "records": len(rows) if isinstance(rows, list) else 0,
        "stride": 1,
        "extra": False,
        # Its end was not saved; a run whose hyperparameters have moved shows none.
        "warmup": 0 if isinstance(clock, dict) and clock.get("hyperparameter_steps") else None,
    }
    return {**state, "version": VERSION, "record": {**added, **record}}


def check_state(state: Any, hyperparameters: HyperparameterSet, saved: Mapping[str, Any]) -> None:
    """Check that a run can continue from a saved state, before anything is loaded.

    Args:
        state: the saved state, as in the checkpoint.
        hyperparameters: those of the run.
        saved: the hyperparameters that the checkpoint holds beside the state.

    Raises:
        ValueError: the state is damaged, or of another version; the message names each place.
    """
    unsigned = isinstance(state, dict) and not {"version", "digest"} & state.keys()
    current = migrated(state) if isinstance(state, dict) else state
    forms = {name: form for name, form in _STATE.items() if not (unsigned and name == "digest")}
    problems = list(_fields(forms)("", current)) or list(_contradictions(current, hyperparameters))
    if not problems and not unsigned and state["digest"] != _digest(state, saved):
        problems = ["it, or a hyperparameter, is not as it was when it was saved (its digest differs)"]
    if problems:
        raise ValueError(
            f"The checkpoint's state of STNCallback is damaged: {'; '.join(problems)}. Nothing has been loaded; resume "
            "from another checkpoint."
        )


def _contradictions(state: dict[str, Any], hyperparameters: HyperparameterSet) -> Iterable[str]:
    """What is wrong with a state whose parts have the right form."""
    clock, size = state["clock"], len(hyperparameters)
    if clock["weight_steps"] > clock["batches"]:
        yield f"clock.weight_steps: expected at most the {clock['batches']} batches, got {clock['weight_steps']}"
    if state["stream"]["consumed"] != clock["hyperparameter_steps"]:
        yield (
            f"stream.consumed: expected the number of hyperparameter steps, {clock['hyperparameter_steps']}, got "
            f"{state['stream']['consumed']}"
        )
    if state["stream"]["before"] > state["stream"]["consumed"]:
        yield f"stream.before: expected at most stream.consumed, got {state['stream']['before']}"
    if state["record"]["steps"] > clock["batches"]:
        yield f"record.steps: expected at most the {clock['batches']} batches, got {state['record']['steps']}"
    shapes = [None if moment is None else list(moment.shape) for moment in state["statistics"]["moments"]]
    if shapes not in ([None, None], [[size], [size, size]]):
        yield f"statistics.moments: expected shapes {[[size], [size, size]]}, got {shapes}"
    schedule, record = hyperparameters.schedule(), state["record"]
    for index, cells in enumerate(record["rows"]):
        try:
            schedule.append(schedule.row(cells))
        except (ValueError, TypeError, OverflowError) as error:
            yield f"record.rows.{index}: {error}"
            return
    if record["last"] is not None:
        try:
            schedule.row(record["last"])
        except (ValueError, TypeError, OverflowError) as error:
            yield f"record.last: {error}"


def _digest(state: Mapping[str, Any], hyperparameters: Mapping[str, Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    _feed(digest, [{name: value for name, value in state.items() if name != "digest"}, dict(hyperparameters)])
    return digest.hexdigest()


def _feed(digest: "hashlib.blake2b", value: Any) -> None:
    """Add a nested value, the same before and after it was saved."""
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        digest.update(f"dict{len(value)}".encode())
        for key, one in value.items():
            digest.update(repr(key).encode())
            _feed(digest, one)
    elif isinstance(value, list | tuple):
        digest.update(f"list{len(value)}".encode())
        for one in value:
            _feed(digest, one)
    else:
        digest.update(f"{type(value).__name__}{value!r};".encode())
