"""Conversion of a plain network into one that responds to its hyperparameters."""

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.layers import ResponseLayer, generic_response, response_type
from lightning_stn.layers.dropout import InnerDropout
from lightning_stn.layers.parameters import owners
from lightning_stn.regularizers import Dropout, DropPath, Regularizer, Tunable, tunable_type
from lightning_stn.regularizers.registry import is_tunable

PER_LAYER = "per-layer"

Network = TypeVar("Network", bound=nn.Module)
"""Class of a network, which conversion leaves as it is, for type checkers."""

_TYPICAL: dict[str, type[Tunable]] = {"dropout": Dropout, "drop_path": DropPath}
"""A class of each keyword; a hyperparameter must suit it even if the network has no module to tune."""

_DROPOUTS = nn.modules.dropout._DropoutNd
"""Base class of torch's dropouts: `convert(dropout=...)` refuses those that are not registered."""


class ConversionError(ValueError):
    """A network cannot be converted; the message lists all unsupported modules."""


@dataclass(frozen=True)
class _Tuning:
    """The modules that one keyword of `convert` tunes.

    Args:
        keyword: "dropout" or "drop_path".
        name: name of the hyperparameter that they share, or `PER_LAYER`.
        kinds: for each module, by qualified name, the class that takes its place.
        inner: for each response layer that drops inside, by qualified name, its constant rate.
    """

    keyword: str
    name: str
    kinds: Mapping[str, type[Tunable]]
    inner: Mapping[str, float]

    @property
    def per_layer(self) -> bool:
        return self.keyword == "dropout" and self.name == PER_LAYER

    def hyperparameter(self, module_name: str) -> str:
        """Name of the hyperparameter that one module reads."""
        if not self.per_layer:
            return self.name
        return "_".join([self.keyword, *filter(None, module_name.split("."))])

    def collisions(self) -> list[str]:
        """Problems of modules with equal generated names, such as `a.b` and `a_b`."""
        modules: dict[str, str] = {}
        return [
            f"{name}: its hyperparameter would be called {self.hyperparameter(name)!r}, as that of {first}; rename one."
            for name in (*self.kinds, *self.inner)
            if self.per_layer and (first := modules.setdefault(self.hyperparameter(name), name)) != name
        ]

    def add_hyperparameters(self, modules: Mapping[str, nn.Module], hyperparameters: HyperparameterSet) -> None:
        """Add the generated hyperparameters."""
        if self.per_layer and (self.kinds or self.inner):
            generated = {self.hyperparameter(n): kind.specification(modules[n]) for n, kind in self.kinds.items()}
            generated |= {self.hyperparameter(n): Dropout.specification(nn.Dropout(p)) for n, p in self.inner.items()}
            hyperparameters.add(generated)

    def adopt(self, modules: Mapping[str, nn.Module], hyperparameters: HyperparameterSet) -> None:
        """Turn the modules into tuned ones; proportional rates become shares of the highest one."""
        rates = {n: kind.plain_rate(modules[n]) for n, kind in self.kinds.items() if kind.proportional}
        highest = max(rates.values(), default=0.0)
        for name, kind in self.kinds.items():
            share = rates[name] / highest if name in rates and highest and not self.per_layer else 1.0
            kind.adopt(modules[name], self.hyperparameter(name), hyperparameters, share)
        for name in self.inner:
            layer = modules[name]
            assert isinstance(layer, InnerDropout)
            layer.tune_rate(self.hyperparameter(name), hyperparameters)


def convert(
    net: Network,
    hyperparameters: HyperparameterSet,
    *,
    dropout: str | None = None,
    drop_path: str | None = None,
    zero_rates: bool = False,
    exclude: Collection[str | type[nn.Module]] = (),
) -> Network:
    """Make the layers of a network respond to the hyperparameters, in place.

    Layers with a registered response (see `lightning_stn.layers`) change their class and gain response weights; their
    parameters, names, hooks, mode, dtype and device stay, and the network computes what it did. Other modules that own
    parameters get a generic response, which needs a sample that the batch shares (`STNCallback(perturb="batch")`).
    Parameters that do not require a gradient do not respond, so a frozen backbone stays plain. Modules without
    parameters stay as they are, except those registered with `lightning_stn.regularizers.register_tunable`. A parameter
    that two modules share has one response, and stays shared in the export. After an error nothing has changed.

    Args:
        net: the network; it is changed and returned.
        hyperparameters: the set that it responds to.
        dropout: hyperparameter of `nn.Dropout`, `Dropout1d`, `Dropout2d`, `Dropout3d`, `AlphaDropout`, other modules
            registered under this keyword, and of the dropout inside recurrent layers and attention. A name: all share
            this hyperparameter. "per-layer": each gets a generated one, `Float(0, 0.9, init=p)`, named after the
            module (`dropout_features_2`). None: the rates stay constant.
        drop_path: name of the hyperparameter that torchvision's `StochasticDepth` and other modules registered under
            this keyword share; each rate stays in proportion, and the highest becomes the hyperparameter. None: the
            rates stay constant.
        zero_rates: whether `dropout` also tunes modules that are switched off, with a rate of 0.
        exclude: modules to leave plain, with all modules in them: qualified names, shell patterns of names, or types.

    Returns:
        `net`.

    Raises:
        TypeError: `net` is not a module, or `hyperparameters` not a `HyperparameterSet`.
        ConversionError: modules cannot respond, are converted already, or are dropouts that cannot be tuned; all that
            could be tuned are switched off; or `exclude` names a module that the network does not have.
        KeyError: `dropout` or `drop_path` names an unknown hyperparameter.
        ValueError: `dropout` or `drop_path` names a hyperparameter that is not a rate in [0, 1]; or there is no
            hyperparameter, and "per-layer" generates none.
        RuntimeError: "per-layer" would add hyperparameters after layers have been converted.
    """
    _check_arguments(net, hyperparameters)
    names = {key: name for key, name in (("dropout", dropout), ("drop_path", drop_path)) if name is not None}
    for keyword, name in names.items():
        _check_name(keyword, name, hyperparameters, _TYPICAL[keyword])
    modules = _selected(net, exclude)
    tunings = [_tuning(keyword, name, modules, zero_rates) for keyword, name in names.items()]
    for tuning in tunings:
        for kind in dict.fromkeys(tuning.kinds.values()):
            _check_name(tuning.keyword, tuning.name, hyperparameters, kind)
    problems = [problem for name, module in modules.items() if (problem := _problem(name, module, tunings))]
    problems += [collision for tuning in tunings for collision in tuning.collisions()]
    if problems:
        raise ConversionError(
            "This network cannot be converted:\n  "
            + "\n  ".join(problems)
            + "\nLeave a module plain with exclude=[name or type], or register a response for its type with "
            "lightning_stn.layers.register_response."
        )
    with _all_or_nothing([*modules.values(), hyperparameters]):
        for tuning in tunings:
            tuning.add_hyperparameters(modules, hyperparameters)
        owned = owners(hyperparameters.networks, hyperparameters)
        for module in modules.values():
            if (response := _response(module)) is not None:
                response.adopt(module, hyperparameters, owned)
        for tuning in tunings:
            tuning.adopt(modules, hyperparameters)
    hyperparameters.networks.append(net)
    if dropout is not None:
        _warn_of_constant_dropouts(modules)
    return net


@contextmanager
def _all_or_nothing(modules: Collection[nn.Module]) -> Iterator[None]:
    """Give modules their classes, attributes and parameters back if an exception ends the context."""
    before = [(module, type(module), _attributes(module)) for module in modules]
    try:
        yield
    except BaseException:
        for module, kind, attributes in before:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
        raise


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Attributes of a module; dictionaries, such as that of its parameters, are copied."""
    return {name: dict(value) if type(value) is dict else value for name, value in vars(module).items()}


def _check_arguments(net: nn.Module, hyperparameters: HyperparameterSet) -> None:
    if not isinstance(net, nn.Module):
        raise TypeError(
            f"convert: expected net to be a network, an instance of nn.Module, got {net!r}; build it first."
        )
    if not isinstance(hyperparameters, HyperparameterSet):
        raise TypeError(
            f"convert: expected hyperparameters to be a HyperparameterSet, got {type(hyperparameters).__name__}; build "
            "HyperparameterSet({...}), or call self.convert(net) in an STNModule."
        )


def _check_name(keyword: str, name: str, hyperparameters: HyperparameterSet, kind: type[Tunable]) -> None:
    """Check that the hyperparameter named under a keyword can be the rate of a kind."""
    if keyword == "dropout" and name == PER_LAYER:
        return
    reader = f"convert({keyword}=...)"
    hyperparameters.require_number(name, f"{reader}, a name or {PER_LAYER!r}," if keyword == "dropout" else reader)
    kind.check_hyperparameter(kind.rate_name(), name, hyperparameters, f"{kind.__name__} {reader!r}")


def _tuning(keyword: str, name: str, modules: Mapping[str, nn.Module], zero_rates: bool) -> _Tuning:
    found = {n: kind for n, module in modules.items() if (kind := tunable_type(type(module), keyword)) is not None}
    kinds = {n: kind for n, kind in found.items() if kind.proportional or zero_rates or kind.plain_rate(modules[n]) > 0}
    inner = {n: rate for n, module in modules.items() if keyword == "dropout" and (rate := _inner_rate(module)) > 0}
    if found and not kinds and not inner:
        raise ConversionError(
            f"convert({keyword}={name!r}): all modules that it could tune are switched off, with a rate of 0: "
            f"{list(found)}; build them with a rate above 0, or pass zero_rates=True."
        )
    return _Tuning(keyword, name, kinds, inner)


def _inner_rate(module: nn.Module) -> float:
    """The rate of a module that becomes a response layer which drops inside; 0 for other modules."""
    response = None if isinstance(module, ResponseLayer) else _response(module)
    if response is None or not issubclass(response, InnerDropout) or not _has_places_to_drop(module):
        return 0.0
    rate: float = getattr(module, response.rate_name())
    return rate


def _has_places_to_drop(module: nn.Module) -> bool:
    """Whether a rate inside a module means anything: recurrent layers drop between their layers."""
    return not isinstance(module, nn.RNNBase) or module.num_layers > 1


def _warn_of_constant_dropouts(modules: Mapping[str, nn.Module]) -> None:
    """Name the rates of dropouts that stay constant, once for a network."""
    constant = [
        f"{'.'.join(filter(None, [name, attribute]))}={value}"
        for name, module in modules.items()
        if not isinstance(module, Regularizer) and not is_tunable(type(module)) and _has_places_to_drop(module)
        for attribute, value in vars(module).items()
        if "drop" in attribute.lower() and isinstance(value, float) and 0 < value < 1
    ]
    if constant:
        warnings.warn(
            f"These numbers look like rates of dropout, and stay constant: {constant}. Where the network drops at one "
            "of them, put an nn.Dropout in its place, or register the module with "
            "lightning_stn.regularizers.register_tunable.",
            stacklevel=3,
        )


def _selected(net: nn.Module, exclude: Collection[str | type[nn.Module]]) -> dict[str, nn.Module]:
    """Modules by their first qualified names, without excluded modules and the modules in them."""
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


def _problem(name: str, module: nn.Module, tunings: Collection[_Tuning]) -> str | None:
    """Why this module cannot be converted, or None."""
    label = f"{name or 'the network itself'} ({type(module).__name__})"
    if isinstance(module, ResponseLayer):
        return f"{label}: converted already."
    trainable = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    if trainable and isinstance(module, torch.jit.ScriptModule):
        return f"{label}: it is compiled by TorchScript, past any response; convert the network before it is scripted."
    if trainable and isinstance(module, nn.ParameterList | nn.ParameterDict):
        return (
            f"{label}: its parameters are read from outside, past any response; hold them in the module that uses them."
        )
    response = _response(module)
    if response is not None and (reason := response.refusal(module)):
        return f"{label}: {reason}."
    for tuning in tunings:
        kind = tuning.kinds.get(name)
        if kind is not None and response is not None:
            return f"{label}: it owns trainable parameters, so it responds and cannot be tuned as well."
        if kind is not None and (reason := kind.refusal(module, generated=tuning.per_layer)):
            return f"{label}: {reason}."
        if tuning.keyword == "dropout" and _is_untunable_dropout(module):
            return f"{label}: this kind of dropout cannot be tuned."
    return None


def _is_untunable_dropout(module: nn.Module) -> bool:
    return isinstance(module, _DROPOUTS) and not isinstance(module, Regularizer) and not is_tunable(type(module))


def _response(module: nn.Module) -> type[ResponseLayer] | None:
    """The response layer that this module becomes, or None if it has no parameter to respond."""
    if isinstance(module, torch.jit.ScriptModule | nn.ParameterList | nn.ParameterDict):
        return None
    kind = response_type(type(module))
    if kind is not None and kind.container:
        return kind if any(parameter.requires_grad for parameter in module.parameters()) else None
    if not any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
        return None
    return kind or generic_response(type(module))
