"""Base class of response layers."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_stn import dual, functional
from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.layers.parameters import Owners, RespondingParameters, Tie, added_names


class ResponseLayer(RespondingParameters):
    """A torch layer whose parameters are affine in the hyperparameters.

    Every trainable parameter `W` of the layer gets response weights `R` of the same shape and a gate `V` on its output
    units: `W(h) = W + diag(V h) R`, the structured best response of MacKay et al. (2019), arXiv:1903.03088, section
    3.2. Gates start at zero, so that a new response layer computes the same as the plain layer; `R` is initialised
    like the layer's parameters.

    With `response="gates"` of the set there are gates alone: `W` itself takes the place of `R`, `W(h) = (1 + diag(V h))
    W`, and a parameter with a gate for each entry, such as a bias, is shifted by its gate, `b(h) = b + C h`.

    With a sample of one row, whoever reads a responding parameter as an attribute gets the effective one: the plain
    `forward`, another method, or a parent module. It is built at the first reading of a pass. For a sample with a row
    for each example, the base and response products are computed side by side and the gates act on the outputs, so
    that no example's weights are built; families without such a computation refuse the sample.

    A family subclasses this class and its torch layer, in that order, and defines `plain_type`. A family that supports
    a row for each example also sets `per_example` and defines `forward_per_example`, in which attributes are the base
    parameters. The response weights and the gate of a parameter called `weight` are called `response_weight` and
    `weight_gate`.

    Args:
        *args: positional arguments of the torch layer.
        hyperparameters: the set that the layer responds to.
        **kwargs: keyword arguments of the torch layer.
    """

    per_example: ClassVar[bool] = False
    """Whether the layer supports a sample with a row for each example."""
    container: ClassVar[bool] = False
    """Whether to convert the layer even if only its children have trainable parameters."""
    gates_both: ClassVar[bool] = False
    """Whether `forward_per_example` serves a tied weight `[o, i]` with gates on either dimension."""

    def __init__(self, *args: Any, hyperparameters: HyperparameterSet, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._add_response(hyperparameters)

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        """Why `layer`, an instance of `plain_type`, cannot respond; None where it can."""
        if any(nn.parameter.is_lazy(parameter) for parameter in layer.parameters(recurse=False)):
            return "its parameters have no shape yet; run one batch through the network first"
        if any(parameter.is_complex() for parameter in layer.parameters(recurse=False)):
            return "it has complex parameters, and a response is real"
        taken = {added for name in layer._parameters for added in added_names(name)} & set(layer._parameters)
        if taken:
            return f"its own parameters {sorted(taken)} have names that a response needs; rename them"
        return None

    @classmethod
    def adopt(cls, layer: nn.Module, hyperparameters: HyperparameterSet, owners: Owners | None = None) -> None:
        """Turn a plain layer into this response layer in place, so that its identity, hooks and mode stay.

        Args:
            layer: an instance of `plain_type`.
            hyperparameters: the set that it responds to.
            owners: layers that respond already. A parameter that one of them holds too has one response; the new
                owners are added.
        """
        layer.__class__ = cls
        assert isinstance(layer, ResponseLayer)
        layer._add_response(hyperparameters, owners)

    def _add_response(self, hyperparameters: HyperparameterSet, owners: Owners | None = None) -> None:
        self.attach(hyperparameters)
        hyperparameters.freeze()
        owners = {} if owners is None else owners
        parameters = dict(self._parameters)
        tied: dict[str, Tie] = {}
        for name, base in parameters.items():
            added: list[nn.Parameter | None] = [None, None]
            if base is not None and base.requires_grad:
                owner, own = owners.setdefault(id(base), (self, name))
                if (owner, own) == (self, name):
                    gates = base.new_zeros(self.gate_size(name), len(hyperparameters))
                    stored = nn.Parameter(torch.empty_like(base)) if hyperparameters.response == "full" else None
                    added = [stored, nn.Parameter(gates)]
                else:
                    tied[name] = Tie(owner, own, self._differs(name, owner, own))
                    added = [owner._parameters[shared] for shared in added_names(own)]
            for new_name, parameter in zip(added_names(name), added, strict=True):
                self.register_parameter(new_name, parameter)
        self.__dict__["_base_readers"] = []
        self.responding = tuple(name for name, base in parameters.items() if base is not None and base.requires_grad)
        self.__dict__["_tied"] = tied  # not an attribute, which would make the owner a child
        self.reset_response()

    def make_plain(self) -> None:
        """Turn this layer into the plain layer at the current hyperparameters, in place."""
        if self._hyperparameters is not None:
            current = self._hyperparameters.gate_input(self._hyperparameters.current())
            with torch.no_grad():
                for name in filter(self.owns_response, self.responding):
                    self.base_parameter(name).copy_(self._effective(name, current))
        self.remove_response()

    def remove_response(self) -> None:
        """Turn this layer into the plain layer with its base parameters, in place."""
        for added in [added for name in self._parameters for added in added_names(name)]:
            self._parameters.pop(added, None)
        for attribute in ("responding", "_tied", "_base_readers"):
            self.__dict__.pop(attribute, None)
        self.detach()
        self.__class__ = self.plain_type  # type: ignore[assignment]

    def supports_rows(self) -> bool:
        """Whether the layer supports a sample with a row for each example."""
        return self.per_example and (self.gates_both or not any(map(self.gates_elsewhere, self.responding)))

    def reset_response(self) -> None:
        """Draw every `R` that this layer owns; gates keep their values."""
        stored = [name for name in self.responding if self.stores_response(name)]
        others = {name: self.response_weights(name).detach().clone() for name in stored if not self.owns_response(name)}
        if len(others) < len(stored):
            with self.reading_base(), torch.no_grad():
                self.draw_response()
                for name, kept in others.items():
                    self.response_weights(name).copy_(kept)

    def draw_response(self) -> None:
        """Draw every `R` from a normal distribution with the root mean square of its base parameter.

        Where the base parameter is constant, `R` is constant too: the same absolute value, or one where that is zero.
        It must not be zero: with gate and response both at zero neither would ever get a gradient.
        """
        with torch.no_grad():
            for name in self.responding:
                base, response = self.base_parameter(name), self.response_weights(name)
                if not base.numel():
                    continue
                rms = base.square().mean().sqrt()
                if base.numel() > 1 and base.amin() < base.amax():
                    response.normal_().mul_(rms)
                else:
                    response.copy_(torch.where(rms > 0, rms, torch.ones_like(rms)))

    def add_response(self, output: Tensor, gates: Tensor, response: Tensor, *, may_modify: bool = True) -> Tensor:
        """`output + gates * response`; in a linearised pass the second term is the tangent of `output`.

        Args:
            output: the output of the base weights; without a tangent in a linearised pass.
            gates: `V h_n`; broadcasts with `output`.
            response: the output of the response weights; broadcasts with `output`.
            may_modify: see `dual.respond`.
        """
        if self._linear:
            return dual.respond(output, None, gates * response, may_modify=may_modify)
        return torch.addcmul(output, gates, response)

    def squared_norm(self, name: str) -> Tensor:
        """`|W + diag(V h_n) R|^2` of one parameter at the bound sample, `[n]` or `[1]`.

        With a row for each example the effective parameters are not built.
        """
        base = self.base_parameter(name)
        if self._hyperparameters is None or name not in self.responding:
            return base.square().sum().reshape(1)
        if not self.owns_response(name):
            owner, own = self.response_owner(name)
            norm: Tensor = owner.squared_norm(own)
            return norm
        sample = self._hyperparameters.bound_sample()
        with torch.autocast(base.device.type, enabled=False):
            if len(sample) == 1 and not self._linear:
                with self._effective_pass(self._hyperparameters):
                    effective: Tensor = getattr(self, name)
                return effective.square().sum().reshape(1)
            response, gated = self.response_weights(name), self.gated(name, sample)
            with self.reading_base():
                pairs = ((base, base), (base, response), (response, response))
                products = [self.unit_sums(name, *pair) for pair in pairs]
            return products[0].sum() + 2 * gated @ products[1] + gated.square() @ products[2]

    def unit_sums(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """`a * b`, both of the parameter's shape, summed over the entries that each gate acts on, `[o]`."""
        shape = self.broadcast_gates(name, a.new_empty(self.gate_size(name))).shape
        return functional.sum_product(a, b, shape).reshape(-1)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute at the bound sample.

        Raises:
            ValueError: the bound sample has neither one row nor a row for each example, or the layer does not support
                a row for each example.
            RuntimeError: layers may not compute now.
        """
        if self._hyperparameters is None:
            return super().forward(*args, **kwargs)
        run = self._hyperparameters.current_pass
        if run.refusal:
            raise RuntimeError(run.refusal)
        sample = run.sample
        if sample is None:
            with self._effective_pass(self._hyperparameters):
                return self.forward_shared(*args, **kwargs)
        if len(sample) == 1:
            return self.forward_shared(*args, **kwargs)
        with self.reading_base():
            return self.forward_per_example(sample, *args, **kwargs)

    def _effective_pass(self, hyperparameters: HyperparameterSet) -> AbstractContextManager[None]:
        """The current pass, in which parameters are effective ones; between steps and loops, one for this call."""
        if hyperparameters.at_centre or hyperparameters.current_pass.effective is not None:
            return nullcontext()
        return hyperparameters.running(replace(hyperparameters.current_pass, keep=True))

    def forward_shared(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer with one row; by default the plain layer, which reads the effective parameters."""
        return self.plain_type.forward(self, *args, **kwargs)

    def forward_per_example(self, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer with a row for each example; by default such a sample is refused."""
        raise self._row_error(sample)

    def _row_error(self, sample: Tensor) -> ValueError:
        return ValueError(
            f"{type(self).__name__}: expected a sample of one row, since this module cannot perturb each example "
            f"differently, got {len(sample)} rows; share one row over the batch with STNCallback(perturb='batch'), or "
            "leave the module plain with convert(exclude=...)."
        )

    @contextmanager
    def shadowed(self, parameters: dict[str, Any]) -> Iterator[None]:
        """Inside this context `self.<name>` is the given value instead of the parameter."""
        before = {name: self.__dict__[name] for name in parameters if name in self.__dict__}
        self.__dict__.update(parameters)
        try:
            yield
        finally:
            for name in parameters:
                del self.__dict__[name]
            self.__dict__.update(before)

    def rows_error(self, sample: Tensor, input: Tensor) -> functional.RowsError:
        """The error for a sample whose rows do not match the examples of the input."""
        return functional.RowsError(
            f"{type(self).__name__}: expected an input with one example for each of the sample's {len(sample)} rows "
            f"along its first dimension, got shape {list(input.shape)}; keep the batch first, or share one row over "
            "the batch with STNCallback(perturb='batch')."
        )
