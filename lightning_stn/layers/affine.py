"""What linear layers and convolutions share: outputs that are affine in weight and bias."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_stn import functional
from lightning_stn.layers.base import ResponseLayer


class AffineResponse(ResponseLayer):
    """A layer `W x + b`, for some bilinear product, with a gate on each output channel.

    Example `n` sees `W x + b + (V h_n) * (R x) + (C h_n) * r`, MacKay et al. (2019), section 3.2.

    A family gives `channel_dim` and `affine`.
    """

    weight: Tensor
    bias: Tensor | None
    response_weight: Tensor | None
    response_bias: Tensor | None
    per_example = True

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        """A weight that is computed from other parameters, by a hook, cannot be found."""
        if "weight" not in layer._parameters:
            return "its weight is computed from other parameters; use torch.nn.utils.parametrizations instead"
        return super().refusal(layer)

    @property
    def channel_dim(self) -> int:
        """The output dimension that the gates act on, counted from the end."""
        raise NotImplementedError

    def affine(self, input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
        """The plain layer's computation with the given parameters; `args` are what else its `forward` takes."""
        raise NotImplementedError

    def reset_response(self) -> None:
        """Fill `R, r` with torch's own initialiser for this layer."""
        # It reads nothing but these two attributes, and the weight's shape even where the weight does not respond.
        weight = self.weight.new_empty(self.weight.shape) if self.response_weight is None else self.response_weight
        self.plain.reset_parameters(SimpleNamespace(weight=weight, bias=self.response_bias))  # type: ignore[attr-defined]

    def forward(self, input: Tensor, *args: Any) -> Tensor:
        """Compute at the bound sample; see `ResponseLayer.forward`."""
        if self._linear and self._hyperparameters is not None and "weight" in self.responding:
            sample = self._hyperparameters.bound_sample()
            # The gates of a shared row act on the weight or, with one pass over it less, on the output.
            if len(sample) == 1 and input.dim() >= 1 - self.channel_dim and self.weight.numel() > input.numel():
                return self.forward_per_example(sample.expand(len(input), -1), input, *args)
        output: Tensor = super().forward(input, *args)
        return output

    def forward_merged(self, effective: dict[str, Tensor], input: Tensor, *args: Any) -> Tensor:
        """One plain product with the effective weight and bias."""
        weight, bias = effective.get("weight", self.weight), effective.get("bias", self.bias)
        # Inside the transforms of torch.func, and for the compiler, the plain way is the one that works.
        if not self._frozen or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return self.affine(input, weight, bias, *args)
        assert self._hyperparameters is not None
        return functional.carry_gradient(
            self.affine(input, weight.detach(), None if bias is None else bias.detach(), *args),
            self.gated("weight", self._hyperparameters.bound_sample())[0] if "weight" in effective else None,
            bias if "bias" in effective else None,
            input,
            self.response("weight") if "weight" in effective else weight,
            lambda input, response: self.affine(input, response, None, *args),
            self.channel_dim,
        )

    def forward_per_example(self, sample: Tensor, input: Tensor, *args: Any) -> Tensor:
        """Base and response products side by side, gated by example and channel."""
        output = self.affine(input, self.weight, self.bias, *args)
        if output.dim() < 1 - self.channel_dim or output.shape[0] != sample.shape[0]:
            raise self.rows_error(sample, input)
        responding = self.responding
        if "weight" in responding:
            response = self.affine(self.point(input), self.response("weight"), None, *args)
            gates = functional.align(self.gated("weight", sample), output, self.channel_dim)
            output = self.add_response(output, gates, response)
        if "bias" in responding:
            shift = self.gated("bias", sample) * self.response("bias")
            shift = functional.align(shift, output, self.channel_dim)
            output = functional.with_tangent(output, shift) if self._linear else output + shift
        return output
