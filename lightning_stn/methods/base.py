"""Base class of the methods: how a response is counted and fitted, and how fast hyperparameters may move."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.layers import ResponseLayer


class Rates(NamedTuple):
    """Learning rates of the hyperparameters by the length of a run, unconstrained units per step.

    How far a hyperparameter can travel decides, so that a short run needs larger steps than a long one.

    Args:
        travel: distance that a hyperparameter may cover in a run: rate times number of steps.
        smallest: rate of a long run.
        largest: rate of a short run.
        unknown: rate of a run of unknown length.

    Example:
        >>> rates = Rates(travel=30.0, smallest=3e-3, largest=1e-1, unknown=1e-2)
        >>> rates.derive(600), rates.derive(100_000), rates.derive(10), rates.derive(None)
        (0.05, 0.003, 0.1, 0.01)
    """

    travel: float
    smallest: float
    largest: float
    unknown: float

    def derive(self, steps: int | None) -> float:
        """The rate for a run of so many hyperparameter steps; None where the number is unknown."""
        if steps is None:
            return self.unknown
        return min(max(self.travel / max(steps, 1), self.smallest), self.largest)


_METHODS: dict[str, type["Method"]] = {}


@dataclass(frozen=True)
class Method(ABC):
    """How a response is counted and fitted. A subclass is a frozen dataclass whose fields are its settings.

    The name of a subclass must be new; it makes the subclass known to `STNCallback(method=...)`.

    Attributes:
        name: what the method is called in `STNCallback(method=...)` and in checkpoints.
        rates: learning rates of the hyperparameters where the user gives none.
    """

    name: ClassVar[str]
    rates: ClassVar[Rates]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            other = _METHODS.setdefault(cls.name, cls)
            if other.__qualname__ != cls.__qualname__:
                raise ValueError(f"The method name {cls.name!r} belongs to {other.__qualname__}; choose another name.")
            _METHODS[cls.name] = cls  # the same class, defined again

    @property
    @abstractmethod
    def centred(self) -> bool:
        """Whether the response is counted from the current hyperparameters, or from zero."""

    @property
    def moves_base(self) -> bool:
        """Whether the base weights move along a centred response when the hyperparameters step."""
        return False

    @property
    def resolved_gate_scale(self) -> float:
        """What gates multiply a hyperparameter by; see `HyperparameterSet.gate_scale`."""
        return 1.0

    @abstractmethod
    def objective(
        self, root: nn.Module, hyperparameters: HyperparameterSet, loss: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Evaluate the training loss in a weight phase, with a sample bound.

        Args:
            root: the module that owns all networks which respond to the set.
            hyperparameters: the set.
            loss: computes the training loss, a scalar, on the batch of the step.

        Returns:
            The training loss to report, and the objective whose gradient trains all weights; often the same tensor.
        """

    def prepare(self, root: nn.Module, hyperparameters: HyperparameterSet) -> None:
        """Count responses as this method does, without a change in what networks compute."""
        recentre(root, hyperparameters, self.centred)
        rescale_gates(root, hyperparameters, self.resolved_gate_scale)

    def follow(self, root: nn.Module, hyperparameters: HyperparameterSet, step: Tensor) -> None:
        """Adapt the networks to a step that the hyperparameters have taken.

        Args:
            root: the module that owns all networks which respond to the set.
            hyperparameters: the set, after the step.
            step: change of `lambda`, `[h]`, unconstrained units.
        """
        if self.moves_base:
            shift_base(root, hyperparameters, step)

    def state_dict(self) -> dict[str, Any]:
        """Name and settings, as plain values."""
        return {"name": self.name, **asdict(self)}


def resolve_method(method: Any) -> Method:
    """The method that an argument stands for: a `Method`, its name, or its `state_dict`.

    Raises:
        ValueError: there is no method of that name, a setting is out of its range, or the class is not a frozen
            dataclass with `name` and `rates`.

    Example:
        >>> from lightning_stn import DeltaSTN
        >>> resolve_method("delta-stn") == DeltaSTN()
        True
    """
    if isinstance(method, Method):
        kind = type(method)
        missing = [name for name in ("name", "rates") if not hasattr(kind, name)]
        if missing:
            raise ValueError(f"{kind.__name__}: expected the class attributes name and rates, got no {missing[0]}.")
        if not getattr(kind.__dict__.get("__dataclass_params__"), "frozen", False):
            raise ValueError(
                f"{kind.__name__}: expected a frozen dataclass, whose fields are saved in checkpoints; decorate the "
                "class with @dataclass(frozen=True)."
            )
        return method
    state = dict(method) if isinstance(method, Mapping) else {"name": method}
    named = _METHODS.get(str(state.pop("name", None)))
    if named is None:
        names = " or ".join(f"method={name!r}" for name in _METHODS)
        raise ValueError(f"STNCallback: expected a method such as DeltaSTN(passes=1), or {names}, got {method!r}.")
    known = [field.name for field in fields(named)]
    unknown = sorted(state.keys() - set(known))
    if unknown:
        raise ValueError(f"{named.__name__}: expected settings among {known}, got {unknown}; leave them out.")
    return named(**state)


def recentre(root: nn.Module, hyperparameters: HyperparameterSet, centred: bool) -> None:
    """Count responses from the current hyperparameters, or from zero, without a change in what networks compute.

    Args:
        root: the module that owns all networks which respond to the set.
        hyperparameters: the set.
        centred: whether to count from the current hyperparameters.
    """
    if hyperparameters.centred == centred:
        return
    shift_base(root, hyperparameters, hyperparameters.unconstrained if centred else -hyperparameters.unconstrained)
    hyperparameters.centred = centred


def rescale_gates(root: nn.Module, hyperparameters: HyperparameterSet, scale: float) -> None:
    """Give the gates another scale, and change their weights so that networks compute the same as before.

    Args:
        root: the module that owns all networks which respond to the set.
        hyperparameters: the set.
        scale: the new `HyperparameterSet.gate_scale`.
    """
    ratio = hyperparameters.gate_scale / scale
    if not math.isclose(ratio, 1.0, rel_tol=1e-6):  # Scales pass through float32 in checkpoints.
        with torch.no_grad():
            for gates in {
                g for layer in _layers(root, hyperparameters) for g in map(layer.gate_weights, layer.responding)
            }:
                gates.mul_(ratio)
    hyperparameters.gate_scale = scale


def shift_base(root: nn.Module, hyperparameters: HyperparameterSet, shift: Tensor) -> None:
    """Move the base weights along the response, `W += diag(V s d) R`.

    Args:
        root: the module that owns all networks which respond to the set.
        hyperparameters: the set.
        shift: `d`, `[h]`, unconstrained units.
    """
    read = hyperparameters.gate_scale * shift.unsqueeze(0)
    with torch.no_grad():
        for layer in _layers(root, hyperparameters):
            layer.move_base(like(read, layer))


def _layers(root: nn.Module, hyperparameters: HyperparameterSet) -> Iterator[ResponseLayer]:
    """The layers that respond to the set."""
    for layer in root.modules():
        if isinstance(layer, ResponseLayer) and layer.hyperparameters is hyperparameters:
            yield layer


def like(sample: Tensor, layer: ResponseLayer) -> Tensor:
    """The sample, replicated over the ranks among which the parameters of a layer are sharded (FSDP2)."""
    mesh = next((p.device_mesh for p in layer.response_parameters() if hasattr(p, "device_mesh")), None)
    if mesh is None:
        return sample
    from torch.distributed.tensor import Replicate, distribute_tensor

    return distribute_tensor(sample, mesh, [Replicate()] * mesh.ndim)


def check_loss(loss: Any, name: str) -> Tensor:
    """The loss, if it is a scalar tensor.

    Raises:
        ValueError: the function called `name` returned anything else.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        skips = " A batch cannot be skipped; leave it out of the loader." if loss is None else ""
        raise ValueError(f"Expected {name} to return a scalar tensor, got {got}; return the mean loss.{skips}")
    return loss


def end_forward(hyperparameters: HyperparameterSet, *, recomputes: bool = True) -> None:
    """Say that the loss of the current pass has been computed: parameters are themselves again, outside its backward.

    Args:
        hyperparameters: the set.
        recomputes: whether layers may compute again in the backward pass, as in activation checkpoints. Not after a
            method whose forward passes differ from one another, where they would not be in the pass they belong to.
    """
    refusal = (
        "A part of the network is computed again in the backward pass, as activation checkpointing does, after the "
        "forward passes of the method have ended; use method='stn', or leave activation checkpointing out."
    )
    run = hyperparameters.current_pass
    hyperparameters.current_pass = replace(run, ended=True, refusal=run.refusal if recomputes else refusal)
