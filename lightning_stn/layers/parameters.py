"""Parameters that respond: base, response weights and gates, and what an attribute reads during a pass."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lightning_stn import dual, functional
from lightning_stn.binding import BoundModule
from lightning_stn.effective import in_backward, is_unsharded, uncomputable
from lightning_stn.hyperparameters import HyperparameterSet


def added_names(name: str) -> tuple[str, str]:
    """Names of the response weights and of the gate of a parameter."""
    return f"response_{name}", f"{name}_gate"


class ReadingBase:
    """A context in which a layer's parameters read as they are.

    A class and a list, since a generator costs as much as the gates, and older compilers break their graphs at it.

    Args:
        readers: of the layer; it has an entry for each context that is open.
    """

    def __init__(self, readers: list[None]) -> None:
        self._readers = readers

    def __enter__(self) -> None:
        self._readers.append(None)

    def __exit__(self, *exception: object) -> None:
        self._readers.pop()


class RespondingParameters(BoundModule):
    """A module whose parameters respond: `W(h) = W + diag(V h) R`; see `ResponseLayer`.

    During a pass with a sample of one row an attribute that holds a responding parameter reads as the effective one.
    """

    plain_type: ClassVar[type[nn.Module]]
    """The type of the plain module."""
    responding: tuple[str, ...] = ()
    """Names of the parameters that respond: those that were trainable when the response was added."""

    def response_owner(self, name: str) -> tuple["RespondingParameters", str]:
        """The layer that defines the response of a parameter, and its name there.

        It is another layer where that one holds the same parameter, as with tied weights.
        """
        tie = self._tie(name)
        return (self, name) if tie is None else (tie.owner, tie.name)

    def owns_response(self, name: str) -> bool:
        """Whether this layer defines the response of a parameter."""
        return self._tie(name) is None

    def gates_elsewhere(self, name: str) -> bool:
        """Whether the gates of a tied parameter act on other dimensions than this layer's own gates would."""
        tie = self._tie(name)
        return tie is not None and tie.elsewhere

    def _tie(self, name: str) -> "Tie | None":
        tied: dict[str, Tie] = self.__dict__.get("_tied", {})
        return tied.get(name)

    def _differs(self, name: str, owner: "RespondingParameters", own: str) -> bool:
        """Whether the gates of another layer broadcast over a parameter otherwise than those of this one."""
        base = self.base_parameter(name)
        with owner.reading_base():
            theirs = owner.broadcast_gates(own, base.new_empty(owner.gate_size(own)))
        ours = self.broadcast_gates(name, base.new_empty(self.gate_size(name)))
        strides = [gates.expand(base.shape).stride() for gates in (theirs, ours)]
        return strides[0] != strides[1]

    def base_parameter(self, name: str) -> Tensor:
        """`W` of one parameter, whatever the current pass."""
        base = self._parameters[name]
        assert base is not None
        return base

    @staticmethod
    def response_name(name: str) -> str:
        """Name of `R` of one parameter."""
        return added_names(name)[0]

    def stores_response(self, name: str) -> bool:
        """Whether the layer stores `R` for one parameter."""
        return self._parameters[added_names(name)[0]] is not None

    def response_weights(self, name: str) -> Tensor:
        """`R` of one parameter; with gates alone the parameter itself, or one where each entry has a gate."""
        stored: Tensor | None = self._parameters[added_names(name)[0]]
        if stored is not None:
            return stored
        base = self.base_parameter(name)
        owner, own = self.response_owner(name)
        with owner.reading_base():
            if base.numel() == owner.gate_size(own):
                return torch.ones_like(base)
        return base.detach() if self._linear else base  # The base weights learn outside the tangent alone.

    def responds_as_itself(self, name: str) -> bool:
        """Whether `R` of one parameter is the parameter itself, so that `W x` serves as `R x`."""
        return name in self.responding and self.response_weights(name) is self.base_parameter(name)

    def gate_weights(self, name: str) -> Tensor:
        """`V` of one parameter, `[o, h]`."""
        gates = self._parameters[added_names(name)[1]]
        assert gates is not None
        return gates

    def response_parameters(self) -> list[nn.Parameter]:
        """All `R` and `V` of the layer."""
        names = [added for name in self.responding for added in added_names(name)]
        return [parameter for name in names if (parameter := self._parameters[name]) is not None]

    def gate_size(self, name: str) -> int:
        """`o`, the number of gates of one parameter; by default the size of its first dimension."""
        size: int = getattr(self, name).shape[0]
        return size

    def broadcast_gates(self, name: str, gated: Tensor) -> Tensor:
        """Reshape `V h` of one row, `[o]`, so that it broadcasts over the parameter."""
        return gated.reshape(-1, *[1] * (getattr(self, name).dim() - 1))

    def gated(self, name: str, sample: Tensor) -> Tensor:
        """`V h_n` of one parameter, `[n, o]`."""
        return functional.gate(sample, self.gate_weights(name))

    def gated_row(self, name: str, sample: Tensor) -> Tensor:
        """`V h` of one parameter at a sample of one row, `[o]`."""
        return functional.gate_row(sample, self.gate_weights(name))

    def effective_parameters(self, sample: Tensor) -> dict[str, Tensor]:
        """Effective parameters at a sample of one row, by name."""
        return {name: self._effective(name, sample) for name in self.responding}

    def move_base(self, sample: Tensor) -> None:
        """Set the base parameters whose response is this layer's to the effective ones at a sample of one row."""
        for name in self.responding:
            if self.owns_response(name):
                response, gated = self.response_weights(name), self._broadcast_gates(name, sample)
                self.base_parameter(name).addcmul_(response, gated)

    def _effective(self, name: str, sample: Tensor) -> Tensor:
        base, response = self.base_parameter(name), self.response_weights(name)
        gated = self._broadcast_gates(name, sample)
        if self._frozen:
            base, response = base.detach(), response.detach()
        if self._linear:
            return dual.respond(base, None, response * gated, may_modify=False)
        return functional.effective_parameter(base, response, gated)

    def _broadcast_gates(self, name: str, sample: Tensor) -> Tensor:
        """`V h` of one row, in a shape that broadcasts over the parameter."""
        owner, own = self.response_owner(name)
        with owner.reading_base():
            return owner.broadcast_gates(own, owner.gated_row(own, sample))

    def __getattr__(self, name: str) -> Any:
        """A parameter as the current pass has it, and every other attribute as it is."""
        value: Any = super().__getattr__(name)
        if name not in self.__dict__.get("responding", ()) or self.__dict__["_base_readers"]:
            return value
        return self._read(name, value)

    def _read(self, name: str, base: Tensor) -> Tensor:
        """A responding parameter at the bound sample.

        Raises:
            RuntimeError: layers may not compute now.
        """
        hyperparameters = self._hyperparameters
        if hyperparameters is None:
            return base
        run = hyperparameters.current_pass
        # Between passes, and after the forward pass of one, a parameter is itself, and has its gradient.
        if hyperparameters.at_centre or run.effective is None or (run.ended and not in_backward()):
            return base
        if not is_unsharded(type(base)):  # a shard, which FSDP2 reads to gather the whole
            return base
        if run.refusal:
            raise RuntimeError(run.refusal)
        sample = hyperparameters.bound_sample()
        if len(sample) > 1:
            return uncomputable(
                base,
                f"{self.plain_type.__name__}: {name!r} is read outside the layer's own forward, which cannot perturb "
                f"each example differently, under a sample of {len(sample)} rows; share one row over the batch with "
                "STNCallback(perturb='batch'), leave the layer plain with convert(exclude=...), or read "
                f"layer.base_parameter({name!r}), which does not respond.",
            )
        response, gates = map(self._parameters.__getitem__, added_names(name))
        assert gates is not None
        sources = [gates, base, hyperparameters.unconstrained if run.sample is None else run.sample]
        if response is not None:
            sources.append(response)
        return run.effective.get(
            sources, lambda: self._effective(name, sample), lambda: f"{name!r} of {self.plain_type.__name__}"
        )

    def extra_repr(self) -> str:
        """As the plain module has it, which asks whether there is a bias."""
        with self.reading_base():
            return super().extra_repr()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As every module; FSDP2 replaces parameters within a pass."""
        with self.reading_base():
            super().register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or cast the parameters; layers that keep lists of them read the base parameters."""
        with self.reading_base():
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def reading_base(self) -> "ReadingBase":
        """Inside this context `self.<name>` is the base parameter, whatever the current pass."""
        return ReadingBase(self.__dict__.get("_base_readers", []))  # a plain module has none

    @property
    def _frozen(self) -> bool:
        """Whether the weights are held fixed now, so that only the sample needs a gradient."""
        return self._hyperparameters is not None and self._hyperparameters.current_pass.frozen

    @property
    def _linear(self) -> bool:
        """Whether the response enters as a tangent now."""
        return self._hyperparameters is not None and self._hyperparameters.current_pass.tangent


class Tie(NamedTuple):
    """Where the response of a tied parameter is defined.

    Args:
        owner: the layer.
        name: of the parameter there.
        elsewhere: whether its gates act on other dimensions.
    """

    owner: RespondingParameters
    name: str
    elsewhere: bool


Owners = dict[int, tuple[RespondingParameters, str]]
"""By identity of a parameter, the layer that defines its response, and the name of the parameter there."""


def owners(networks: Iterable[nn.Module], hyperparameters: HyperparameterSet) -> Owners:
    """Owners of all parameters in some networks that respond to a set."""
    return {
        id(layer.base_parameter(name)): layer.response_owner(name)
        for network in networks
        for layer in network.modules()
        if isinstance(layer, RespondingParameters) and layer.hyperparameters is hyperparameters
        for name in layer.responding
    }
