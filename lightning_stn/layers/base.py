"""What every response layer does; the families beside this file say how they compute."""

from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_stn import functional
from lightning_stn.binding import BoundModule
from lightning_stn.hyperparameters import HyperparameterSet


class ResponseLayer(BoundModule):
    """A torch layer whose weight and bias are affine in the hyperparameters.

    `W(h) = W + diag(V h) R` and `b(h) = b + (C h) * r`, the structured best response of MacKay et al. (2019),
    arXiv:1903.03088, section 3.2. The gates `V, C` start at zero, so a new response layer computes what the plain one
    does; `R, r` start as the plain layer's own parameters would.

    A sample of one row is merged into one effective weight; a sample with a row per example runs the plain and the
    response weights side by side and gates the outputs, without ever building an example's own weights.

    A family subclasses this class and its torch layer, in that order, and gives `plain`, `channel_dim` and `affine`.

    Args:
        *args: the torch layer's own arguments, and likewise `**kwargs`.
        hyperparameters: the set that the layer responds to.

    Attributes:
        response_weight: `R`, the shape of `weight`.
        response_bias: `r`, the shape of `bias`; None without a bias.
        weight_gate: `V`, `[o, h]`.
        bias_gate: `C`, `[o, h]`; None without a bias.
    """

    plain: ClassVar[type[nn.Module]]
    weight: Tensor
    bias: Tensor | None
    response_weight: nn.Parameter
    response_bias: nn.Parameter | None
    weight_gate: nn.Parameter
    bias_gate: nn.Parameter | None

    def __init__(self, *args: Any, hyperparameters: HyperparameterSet, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._add_response(hyperparameters)

    @classmethod
    def adopt(cls, layer: nn.Module, hyperparameters: HyperparameterSet) -> None:
        """Turn a plain layer into this response layer in place, so that its identity, hooks and mode stay."""
        layer.__class__ = cls
        assert isinstance(layer, ResponseLayer)
        layer._add_response(hyperparameters)

    def _add_response(self, hyperparameters: HyperparameterSet) -> None:
        self.attach(hyperparameters)
        hyperparameters.freeze()
        for name, base in (("weight", self.weight), ("bias", self.bias)):
            response, gates = None, None
            if base is not None:
                response = nn.Parameter(torch.empty_like(base))
                gates = nn.Parameter(base.new_zeros(base.shape[0], len(hyperparameters)))
            self.register_parameter(f"response_{name}", response)
            self.register_parameter(f"{name}_gate", gates)
        # torch's initialiser reads nothing but the two attributes, so it can fill the response as it fills the base.
        self.plain.reset_parameters(SimpleNamespace(weight=self.response_weight, bias=self.response_bias))  # type: ignore[attr-defined]

    def response_parameters(self) -> list[nn.Parameter]:
        """`R, r, V, C`, those that the layer has."""
        parameters = (self.response_weight, self.response_bias, self.weight_gate, self.bias_gate)
        return [parameter for parameter in parameters if parameter is not None]

    @property
    def channel_dim(self) -> int:
        """The output dimension that the gates act on, counted from the end."""
        raise NotImplementedError

    def affine(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The plain layer's computation with the given parameters."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Compute at the bound sample.

        Raises:
            ValueError: the bound sample has neither one row nor a row per example.
        """
        sample = self._hyperparameters.bound_sample() if self._hyperparameters is not None else None
        if sample is None:
            return self.affine(input, self.weight, self.bias)
        if sample.shape[0] == 1:
            return self._merged(input, sample)
        return self._per_example(input, sample)

    def _merged(self, input: Tensor, sample: Tensor) -> Tensor:
        weight = functional.merge(self.weight, self.response_weight, functional.gate(sample, self.weight_gate)[0])
        bias = self.bias
        if bias is not None:
            assert self.response_bias is not None
            assert self.bias_gate is not None
            bias = functional.merge(bias, self.response_bias, functional.gate(sample, self.bias_gate)[0])
        return self.affine(input, weight, bias)

    def _per_example(self, input: Tensor, sample: Tensor) -> Tensor:
        output = self.affine(input, self.weight, self.bias)
        if output.dim() < 1 - self.channel_dim or output.shape[0] != sample.shape[0]:
            raise ValueError(
                f"{type(self).__name__}: expected an input with one example for each of the sample's "
                f"{sample.shape[0]} rows as its first dimension, got shape {list(input.shape)}; keep the batch first, "
                "or share one row over the batch with STNCallback(perturb='batch')."
            )
        response = self.affine(input, self.response_weight, None)
        gates = functional.align(functional.gate(sample, self.weight_gate), output, self.channel_dim)
        output = torch.addcmul(output, gates, response)
        if self.response_bias is None or self.bias_gate is None:
            return output
        shift = functional.gate(sample, self.bias_gate) * self.response_bias
        return output + functional.align(shift, output, self.channel_dim)
