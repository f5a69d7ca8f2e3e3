"""Base class of linear layers and convolutions, whose outputs are affine in weight and bias."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_stn import dual, functional
from lightning_stn.layers.base import ResponseLayer


class AffineResponse(ResponseLayer):
    """A layer `W x + b`, for some bilinear product `W x`, with a gate on each output channel.

    Example `n` sees `W x + b + (V h_n) * (R x) + (C h_n) * r`, MacKay et al. (2019), section 3.2.

    A family defines `channel_dim` and `affine`, and may define `growth`.
    """

    weight: Tensor
    bias: Tensor | None
    response_weight: Tensor | None
    response_bias: Tensor | None
    per_example = True

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        """A weight that a hook computes from other parameters cannot respond."""
        if "weight" not in layer._parameters:
            return "its weight is computed from other parameters; use torch.nn.utils.parametrizations instead"
        return super().refusal(layer)

    @property
    def channel_dim(self) -> int:
        """The output dimension that the gates act on, counted from the end."""
        raise NotImplementedError(
            f"{type(self).__name__} does not define channel_dim, the output dimension of its units, counted from the "
            "end; write 'channel_dim = -1' in its body if that is the last one."
        )

    def affine(self, input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """`W x + b` with the given parameters; then the further arguments of the plain layer's `forward`."""
        raise NotImplementedError(
            f"{type(self).__name__} does not define affine; define affine(self, input, weight, bias, *args), which "
            f"returns the output of {self.plain_type.__name__} with these parameters, without a bias where it is None."
        )

    @property
    def growth(self) -> float:
        """Entries of the output for each entry of the input, roughly.

        It only decides which of two equivalent computations is cheaper; by default the output is as large as the input.
        """
        return 1.0

    def draw_response(self) -> None:
        """Draw `R` and `r` with the initialiser of the torch layer."""
        if not hasattr(self.plain_type, "reset_parameters"):
            super().draw_response()
            return
        # The initialiser reads these two attributes only, and reads the weight even where only the bias responds.
        weight = self.weight.new_empty(self.weight.shape) if self.response_weight is None else self.response_weight
        self.plain_type.reset_parameters(SimpleNamespace(weight=weight, bias=self.response_bias))

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute at the bound sample; see `ResponseLayer.forward`."""
        if self._hyperparameters is None or not self._linear:
            output: Tensor = super().forward(input, *args, **kwargs)
            return output
        with self.reading_base():
            return self._forward_linearized(self._hyperparameters.bound_sample(), input, *args, **kwargs)

    def _forward_linearized(self, sample: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """By hand, since torch's forward-mode rule would also multiply by the tangent of the weight, which has none."""
        primal, tangent = dual.parts(input)
        with torch.no_grad():
            tangent = None if tangent is None else self.affine(tangent, self.weight, None, *args, **kwargs)
        if self._folds_response(sample, primal):
            return self._forward_folded(sample, primal, tangent, *args, **kwargs)
        output = self.affine(primal, self.weight, self.bias, *args, **kwargs)
        # Here the gates act on the output, even those of a shared row.
        rows = sample.expand(len(output), -1) if len(sample) == 1 and output.dim() >= 1 - self.channel_dim else sample
        self._check_rows(rows, primal, output)
        response = self._respond(output.new_zeros(()), output, rows, primal.detach(), *args, **kwargs)
        return dual.respond(output, tangent, response, may_modify=True)

    def _folds_response(self, sample: Tensor, input: Tensor) -> bool:
        """Whether a linearised pass applies the gates to the response weights rather than to the output.

        It does for a shared row if the weight is no larger than the output, or the input has no batch dimension.
        """
        if len(sample) > 1 or "weight" not in self.responding:
            return False
        if self.gates_elsewhere("weight"):
            return True  # `_respond` would need a row for each example
        return input.dim() < 1 - self.channel_dim or self.weight.numel() <= input.numel() * self.growth

    def _forward_folded(
        self, sample: Tensor, input: Tensor, tangent: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """A linearised pass at a shared row, whose gates are folded into the response weights.

        Args:
            sample: `[1, h]`.
            input: the primal of the input.
            tangent: the tangent of the output that comes from the input, overwritten; None for zero.
            *args: see `affine`.
            **kwargs: see `affine`.
        """
        responses = {
            name: self.response_weights(name) * self._broadcast_gates(name, sample) for name in self.responding
        }
        shared = {
            name: dual.share_gradient(getattr(self, name), response, may_modify=False)
            for name, response in responses.items()
        }
        output = self.affine(input, shared["weight"], shared.get("bias", self.bias), *args, **kwargs)
        with torch.no_grad():
            response = self.affine(input, responses["weight"], responses.get("bias"), *args, **kwargs)
        return dual.with_tangent(output, response if tangent is None else tangent.add_(response))

    def _check_rows(self, sample: Tensor, input: Tensor, output: Tensor) -> None:
        if output.dim() < 1 - self.channel_dim or output.shape[0] != sample.shape[0]:
            raise self.rows_error(sample, input)

    def _respond(
        self, start: Tensor, output: Tensor, sample: Tensor, input: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """`start + (V h_n) * (R x) + (C h_n) * r`, in a shape that broadcasts over `output`."""
        if "weight" in self.responding:
            gates = functional.align(self.gated("weight", sample), output, self.channel_dim)
            start = torch.addcmul(
                start, gates, self.affine(input, self.response_weights("weight"), None, *args, **kwargs)
            )
        return self._shift(start, output, sample)

    def _shift(self, start: Tensor, output: Tensor, sample: Tensor) -> Tensor:
        """`start + (C h_n) * r`, in a shape that broadcasts over `output`."""
        if "bias" in self.responding:
            shift = self.gated("bias", sample) * self.response_weights("bias")
            start = start + functional.align(shift, output, self.channel_dim)
        return start

    def forward_shared(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`W x + b` with effective weight and bias."""
        # Neither the compiler nor the transforms of torch.func support `with_gate_gradient`.
        if (
            not self._frozen
            or ("weight" in self.responding and self.gates_elsewhere("weight"))
            or torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
        ):
            output: Tensor = super().forward_shared(input, *args, **kwargs)
            return output
        assert self._hyperparameters is not None
        weight, bias = self.weight, self.bias
        return functional.with_gate_gradient(
            self.affine(input, weight.detach(), None if bias is None else bias.detach(), *args, **kwargs),
            self.gated_row("weight", self._hyperparameters.bound_sample()) if "weight" in self.responding else None,
            bias if "bias" in self.responding else None,
            input,
            self.response_weights("weight") if "weight" in self.responding else weight,
            lambda input, response: self.affine(input, response, None, *args, **kwargs),
            self.channel_dim,
        )

    def forward_per_example(self, sample: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute base and response products side by side, and gate the second by example and channel.

        With gates alone both products are one.
        """
        if self.responds_as_itself("weight") and not self.gates_elsewhere("weight"):
            return self._forward_gated(sample, input, *args, **kwargs)
        output = self.affine(input, self.weight, self.bias, *args, **kwargs)
        self._check_rows(sample, input, output)
        return self._respond(output, output, sample, input, *args, **kwargs)

    def _forward_gated(self, sample: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`(1 + V h_n) * (W x) + b + (C h_n) * r`."""
        product = self.affine(input, self.weight, None, *args, **kwargs)
        self._check_rows(sample, input, product)
        output = product
        if self.bias is not None:
            output = output + functional.align(self.bias.expand(len(sample), -1), output, self.channel_dim)
        gates = functional.align(self.gated("weight", sample), output, self.channel_dim)
        return self._shift(torch.addcmul(output, gates, product), product, sample)
