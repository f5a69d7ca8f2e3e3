"""Turning a plain network into one that responds to its hyperparameters."""

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from torch import nn
from torchvision.ops import StochasticDepth  # type: ignore[import-untyped]

from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.layers import ResponseLayer, generic_response, response_type
from lightning_stn.regularizer import Regularizer
from lightning_stn.regularizers import Dropout, DropPath, tuned_dropout
from lightning_stn.specifications import Float

PER_LAYER = "per-layer"
_HIGHEST_RATE = 0.9
_SMALLEST_START = 0.05
_DROPOUTS = nn.modules.dropout._DropoutNd
"""What `convert(dropout=...)` tunes: torch's own dropouts, or says why it cannot."""


class ConversionError(ValueError):
    """A network cannot be converted; the message lists every module that stands in the way."""


def convert(
    net: nn.Module,
    hyperparameters: HyperparameterSet,
    *,
    dropout: str | None = None,
    drop_path: str | None = None,
    exclude: Collection[str | type[nn.Module]] = (),
) -> nn.Module:
    """Let the layers of a network respond to the hyperparameters, in place.

    Layers with a registered response (see `lightning_stn.layers`) change their class and gain response weights; their
    own parameters, names, hooks, mode, dtype and device stay, and so does what the network computes. Other modules that
    own parameters get a generic response, which needs samples that the batch shares (`STNCallback(perturb="batch")`).
    Parameters that do not require a gradient do not respond, so that a frozen backbone stays plain; modules without
    parameters are left alone, but for the dropouts. A parameter that two modules share gets a response in each.

    Args:
        net: the network; it is changed and returned.
        hyperparameters: what it shall respond to.
        dropout: what `nn.Dropout`, `Dropout1d`, `Dropout2d`, `Dropout3d` and `AlphaDropout` become. A hyperparameter's
            name: they all share it. "per-layer": each gets a hyperparameter of its own, `Float(0, 0.9, init=p)`, named
            after its place (`dropout_features_2`). None: they keep their constant rate.
        drop_path: the hyperparameter that all of torchvision's `StochasticDepth` share, each in proportion to its own
            rate, the highest of which becomes 1 times the hyperparameter. None: they keep their constant rate.
        exclude: modules to leave plain, with all they contain: qualified names, shell patterns of them, or types.

    Returns:
        `net`.

    Raises:
        TypeError: `net` is no module, or `hyperparameters` no `HyperparameterSet`.
        ConversionError: modules cannot respond, are converted already, or are dropouts that cannot be tuned; or
            `exclude` names what is not there.
        KeyError: `dropout` or `drop_path` names an unknown hyperparameter.
        ValueError: `dropout` or `drop_path` names a `Categorical`, or a hyperparameter that is no rate in [0, 1].
        RuntimeError: "per-layer" would add hyperparameters after layers have been converted.

        Nothing has been changed then.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(
            f"convert: expected net to be a network, an instance of nn.Module, got {net!r}; build it first."
        )
    if not isinstance(hyperparameters, HyperparameterSet):
        raise TypeError(
            f"convert: expected hyperparameters to be a HyperparameterSet, got {type(hyperparameters).__name__}; build "
            "HyperparameterSet({...}), or call self.convert(net) in an STNModule."
        )
    if dropout is not None and dropout != PER_LAYER:
        hyperparameters.require_number(dropout, f"convert(dropout=...), a name or {PER_LAYER!r},")
        Dropout(dropout).attach(hyperparameters, "convert(dropout=...)")  # refuses what is no rate, before any change
    if drop_path is not None:
        hyperparameters.require_number(drop_path, "convert(drop_path=...)")
        DropPath(drop_path).attach(hyperparameters, "convert(drop_path=...)")
    modules = _selected(net, exclude)
    dropouts = {name: m for name, m in modules.items() if dropout is not None and tuned_dropout(type(m))}
    branches = [m for m in modules.values() if drop_path is not None and type(m) is StochasticDepth]
    problems = [problem for name, module in modules.items() if (problem := _problem(name, module, dropout))]
    if dropout == PER_LAYER:
        problems += _collisions(dropouts)
    if problems:
        raise ConversionError(
            "This network cannot be converted:\n  "
            + "\n  ".join(problems)
            + "\nLeave a module plain with exclude=[name or type], or register a response for its type with "
            "lightning_stn.layers.register_response."
        )
    if dropout == PER_LAYER and dropouts:
        hyperparameters.add({_knob(name): Float(0.0, _HIGHEST_RATE, init=_start(m)) for name, m in dropouts.items()})
    for name, module in modules.items():
        response = _response(module)
        if response is not None:
            response.adopt(module, hyperparameters)
        elif name in dropouts:
            tuned = tuned_dropout(type(module))
            assert tuned is not None
            tuned.adopt(module, _knob(name) if dropout == PER_LAYER else str(dropout), hyperparameters)
    if drop_path is not None:
        _tune_branches(branches, drop_path, hyperparameters)
    hyperparameters.networks.append(net)
    return net


def _selected(net: nn.Module, exclude: Collection[str | type[nn.Module]]) -> dict[str, nn.Module]:
    """Every module by its first qualified name, without the excluded ones and what they contain."""
    if isinstance(exclude, str | type):
        raise ConversionError(
            f"exclude: expected a list of names, patterns or types, got {exclude!r}; put it in a list."
        )
    for kind in exclude:
        if not isinstance(kind, str | type):
            raise ConversionError(
                f"exclude: expected names, patterns or types, got {kind!r}; give its name or its type."
            )
    patterns = [pattern for pattern in exclude if isinstance(pattern, str)]
    types = tuple(kind for kind in exclude if isinstance(kind, type))
    everything = dict(net.named_modules(remove_duplicate=False))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in everything):
            known = sorted(filter(None, everything))
            raise ConversionError(f"exclude: no module is called {pattern!r}; there are {known}.")
    left_out = {
        id(inner)
        for name, module in everything.items()
        if isinstance(module, types) or any(fnmatchcase(name, pattern) for pattern in patterns)
        for inner in module.modules()
    }
    return {name: module for name, module in net.named_modules() if id(module) not in left_out}


def _problem(name: str, module: nn.Module, dropout: str | None) -> str | None:
    """Why this module cannot be converted, or None."""
    label = f"{name or 'the network itself'} ({type(module).__name__})"
    if isinstance(module, ResponseLayer):
        return f"{label}: converted already."
    if isinstance(module, nn.ParameterList | nn.ParameterDict):
        return (
            f"{label}: its parameters are read from outside, past any response; hold them in the module that uses them."
        )
    response = _response(module)
    if response is not None and (reason := response.refusal(module)):
        return f"{label}: {reason}."
    if dropout is None or isinstance(module, Regularizer) or not isinstance(module, _DROPOUTS):
        return None
    if tuned_dropout(type(module)) is None:
        return f"{label}: this kind of dropout cannot be tuned."
    if dropout == PER_LAYER and module.p >= _HIGHEST_RATE:
        return f"{label}: starts at p={module.p}, but a tuned rate ends at {_HIGHEST_RATE}."
    return None


def _response(module: nn.Module) -> type[ResponseLayer] | None:
    """The response layer that this module becomes; None where nothing of it responds."""
    kind = response_type(type(module))
    if kind is not None and kind.container:
        return kind if any(parameter.requires_grad for parameter in module.parameters()) else None
    if not any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
        return None
    return kind or generic_response(type(module))


def _knob(name: str) -> str:
    """The generated hyperparameter of the dropout at `name`."""
    return "_".join(["dropout", *filter(None, name.split("."))])


def _collisions(dropouts: Iterable[str]) -> list[str]:
    """Dropouts whose places give one name, as `a.b` and `a_b` do."""
    places: dict[str, str] = {}
    return [
        f"{name}: its hyperparameter would be called {_knob(name)!r}, as that of {places[_knob(name)]}; rename one."
        for name in dropouts
        if places.setdefault(_knob(name), name) != name
    ]


def _start(module: nn.Module) -> float:
    """A rate's start: the layer's own, or a small one where dropout was switched off."""
    rate = float(module.p)  # type: ignore[arg-type]
    return rate if rate > 0 else _SMALLEST_START


def _tune_branches(branches: Collection[StochasticDepth], knob: str, hyperparameters: HyperparameterSet) -> None:
    """Let branches share a rate, each in proportion to its own."""
    highest = max((branch.p for branch in branches), default=0.0)
    for branch in branches:
        share = branch.p / highest if highest else 1.0
        DropPath.adopt(branch, knob, hyperparameters)
        branch.share = share
