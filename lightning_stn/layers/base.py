"""What every response layer does; the families beside this file say how they compute."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_stn import dual, functional
from lightning_stn.binding import BoundModule
from lightning_stn.hyperparameters import HyperparameterSet

_KEEPS_NOTHING_COMPILED = torch.__version__ < "2.6"
"""In torch 2.4 the compiler loses tensors that a dictionary outside its graph holds."""


def _added_names(name: str) -> tuple[str, str]:
    """What the response weights and the gate of a parameter are called."""
    return f"response_{name}", f"{name}_gate"


class ResponseLayer(BoundModule):
    """A torch layer whose parameters are affine in the hyperparameters.

    Every parameter `W` of the layer gets response weights `R` of its shape and a gate `V` on its output units:
    `W(h) = W + diag(V h) R`, the structured best response of MacKay et al. (2019), arXiv:1903.03088, section 3.2. The
    gates start at zero, so that a new response layer computes what the plain one does; `R` starts as the layer's own
    parameters would.

    A sample of one row is *merged*: the effective parameters are built once, and the plain layer runs on them. A sample
    with a row for each example runs base and response side by side and gates the outputs, without ever building an
    example's own weights; a family that has no such way refuses it.

    A family subclasses this class and its torch layer, in that order, and gives `plain`; one that honours a row for
    each example says so in `per_example` and gives `forward_per_example`. What is added to a parameter called `weight`
    is called `response_weight` and `weight_gate`.

    Args:
        *args: the torch layer's own arguments, and likewise `**kwargs`.
        hyperparameters: the set that the layer responds to.
    """

    plain: ClassVar[type[nn.Module]]
    per_example: ClassVar[bool] = False
    """Whether the layer can honour a row for each example."""
    container: ClassVar[bool] = False
    """Whether the layer matters for the children that it runs, parameters of its own or not."""

    responding: tuple[str, ...] = ()
    """Names of the layer's own parameters that respond: those that were trainable when the response was added."""

    def __init__(self, *args: Any, hyperparameters: HyperparameterSet, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._add_response(hyperparameters)

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        """Why this layer, of the type that the class stands in for, cannot respond; None where it can."""
        if any(nn.parameter.is_lazy(parameter) for parameter in layer.parameters(recurse=False)):
            return "its parameters have no shape yet; run one batch through the network first"
        taken = {added for name in layer._parameters for added in _added_names(name)} & set(layer._parameters)
        if taken:
            return f"its own parameters {sorted(taken)} have names that a response needs; rename them"
        return None

    @classmethod
    def adopt(cls, layer: nn.Module, hyperparameters: HyperparameterSet) -> None:
        """Turn a plain layer into this response layer in place, so that its identity, hooks and mode stay."""
        layer.__class__ = cls
        assert isinstance(layer, ResponseLayer)
        layer._add_response(hyperparameters)

    def _add_response(self, hyperparameters: HyperparameterSet) -> None:
        self.attach(hyperparameters)
        hyperparameters.freeze()
        own = dict(self._parameters)
        self.responding = tuple(name for name, base in own.items() if base is not None and base.requires_grad)
        for name, base in own.items():
            added: list[nn.Parameter | None] = [None, None]
            if base is not None and base.requires_grad:
                gates = base.new_zeros(self.gate_size(name), len(hyperparameters))
                added = [nn.Parameter(torch.empty_like(base)), nn.Parameter(gates)]
            for new_name, parameter in zip(_added_names(name), added, strict=True):
                self.register_parameter(new_name, parameter)
        self.reset_response()

    def make_plain(self) -> None:
        """Become the plain layer at the current hyperparameters, in place."""
        if self._hyperparameters is not None:
            current = self._hyperparameters.from_centre(self._hyperparameters.current())
            for name, tensor in self.effective(current).items():
                setattr(self, name, nn.Parameter(tensor.detach(), requires_grad=getattr(self, name).requires_grad))
        for added in [added for name in self._parameters for added in _added_names(name)]:
            self._parameters.pop(added, None)
        self.__dict__.pop("responding", None)
        self.detach()
        self.__class__ = self.plain  # type: ignore[assignment]

    @staticmethod
    def response_name(name: str) -> str:
        """What `R` of one parameter is called."""
        return _added_names(name)[0]

    def response(self, name: str) -> Tensor:
        """`R` of one parameter."""
        tensor: Tensor = getattr(self, _added_names(name)[0])
        return tensor

    def gates(self, name: str) -> Tensor:
        """`V` of one parameter, `[o, h]`."""
        tensor: Tensor = getattr(self, _added_names(name)[1])
        return tensor

    def response_parameters(self) -> list[nn.Parameter]:
        """All `R` and `V` that the layer has."""
        names = [added for name in self.responding for added in _added_names(name)]
        return [parameter for name in names if (parameter := self._parameters[name]) is not None]

    def reset_response(self) -> None:
        """Draw every `R` with the spread of its base parameter; a constant one is repeated, zero becomes one.

        Not zero: with gate and response both at zero neither would ever get a gradient.
        """
        with torch.no_grad():
            for name in self.responding:
                base, response = getattr(self, name), self.response(name)
                spread = base.square().mean().sqrt()
                if base.numel() > 1 and base.amin() < base.amax():
                    response.normal_().mul_(spread)
                else:
                    response.copy_(torch.where(spread > 0, spread, torch.ones_like(spread)))

    def gate_size(self, name: str) -> int:
        """`o`, the number of output units of one parameter that have a gate; by default its first dimension."""
        size: int = getattr(self, name).shape[0]
        return size

    def spread(self, name: str, gated: Tensor) -> Tensor:
        """`V h` of one row, `[o]`, in a shape that broadcasts over the parameter."""
        return gated.reshape(-1, *[1] * (getattr(self, name).dim() - 1))

    def gated(self, name: str, sample: Tensor) -> Tensor:
        """`V h_n` of one parameter, `[n, o]`."""
        return functional.gate(sample, self.gates(name))

    def effective(self, sample: Tensor) -> dict[str, Tensor]:
        """The parameters at a sample of one row, by name."""
        effective = {}
        for name in self.responding:
            base, response, gated = getattr(self, name), self.response(name), self.gated(name, sample)[0]
            if self._frozen:
                base, response = base.detach(), response.detach()
            if self._linear:
                effective[name] = dual.respond(base, None, response * self.spread(name, gated), fresh=False)
            else:
                effective[name] = functional.merge(base, response, self.spread(name, gated))
        return effective

    def add_response(self, output: Tensor, gates: Tensor, response: Tensor, *, fresh: bool = True) -> Tensor:
        """`output + gates * response`, with the sum's second part as a tangent in a linearised pass.

        There `output` must have no tangent by itself; see `dual.respond`, also on `fresh`.
        """
        if self._linear:
            return dual.respond(output, None, gates * response, fresh=fresh)
        return torch.addcmul(output, gates, response)

    def squared_norm(self, name: str) -> Tensor:
        """`|W + diag(V h_n) R|^2` of one parameter at the bound sample, `[n]` or `[1]`, without building it."""
        base: Tensor = getattr(self, name)
        if self._hyperparameters is None or name not in self.responding:
            return base.square().sum().reshape(1)
        with torch.autocast(base.device.type, enabled=False):
            response, gated = self.response(name), self.gated(name, self._hyperparameters.bound_sample())
            products = [self.unit_sums(name, *pair) for pair in ((base, base), (base, response), (response, response))]
            return products[0].sum() + 2 * gated @ products[1] + gated.square() @ products[2]

    def unit_sums(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """`a * b`, of the parameter's shape, summed over the entries of each gate, `[o]`."""
        shape = self.spread(name, a.new_empty(self.gate_size(name))).shape
        return functional.sum_product(a, b, shape).reshape(-1)

    @property
    def _frozen(self) -> bool:
        """Whether the weights are held fixed now, so that only the sample needs a gradient."""
        return self._hyperparameters is not None and self._hyperparameters.current_pass.frozen

    @property
    def _linear(self) -> bool:
        """Whether the response enters as a tangent now."""
        return self._hyperparameters is not None and self._hyperparameters.current_pass.tangent

    def _effective_or_kept(self, sample: Tensor) -> dict[str, Tensor]:
        """`effective(sample)`, computed once in an evaluation loop."""
        assert self._hyperparameters is not None
        cache = self._hyperparameters.current_pass.cache
        if self._hyperparameters.at_centre:
            return {}
        if cache is None or torch.is_grad_enabled():
            return self.effective(sample)
        if _KEEPS_NOTHING_COMPILED and torch.compiler.is_compiling():
            return self.effective(sample)
        if id(self) not in cache:
            cache[id(self)] = self.effective(sample)
        return cache[id(self)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute at the bound sample.

        Raises:
            ValueError: the bound sample has neither one row nor a row per example, or the layer cannot honour a row per
                example.
            RuntimeError: layers may not compute now.
        """
        if self._hyperparameters is None:
            return super().forward(*args, **kwargs)
        if self._hyperparameters.current_pass.refusal:
            raise RuntimeError(self._hyperparameters.current_pass.refusal)
        sample = self._hyperparameters.bound_sample()
        if sample.shape[0] == 1:
            return self.forward_merged(self._effective_or_kept(sample), *args, **kwargs)
        return self.forward_per_example(sample, *args, **kwargs)

    def forward_merged(self, effective: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The plain layer on effective parameters."""
        with self.shadowed(effective):
            return self.plain.forward(self, *args, **kwargs)

    def forward_per_example(self, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer at a row for each example; by default it is refused."""
        raise ValueError(
            f"{type(self).__name__}: a perturbation for each example cannot be honoured here, got {len(sample)} rows; "
            "share one row over the batch with STNCallback(perturb='batch'), or leave the module plain with "
            "convert(exclude=...)."
        )

    @contextmanager
    def shadowed(self, parameters: dict[str, Any]) -> Iterator[None]:
        """Let `self.<name>` read these tensors instead of the parameters."""
        self.__dict__.update(parameters)
        try:
            yield
        finally:
            for name in parameters:
                del self.__dict__[name]

    def rows_error(self, sample: Tensor, input: Tensor) -> ValueError:
        """The error for a sample whose rows do not match the examples."""
        return ValueError(
            f"{type(self).__name__}: expected an input with one example for each of the sample's {len(sample)} rows as "
            f"its first dimension, got shape {list(input.shape)}; keep the batch first, or share one row over the "
            "batch with STNCallback(perturb='batch')."
        )
