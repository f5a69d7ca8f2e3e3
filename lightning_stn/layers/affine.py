"""What linear layers and convolutions share: outputs that are affine in weight and bias."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_stn import dual, functional
from lightning_stn.layers.base import ResponseLayer


class AffineResponse(ResponseLayer):
    """A layer `W x + b`, for some bilinear product, with a gate on each output channel.

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
        """A weight that is computed from other parameters, by a hook, cannot be found."""
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

    def affine(self, input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
        """The plain layer's computation with the given parameters; `args` are what else its `forward` takes."""
        raise NotImplementedError(
            f"{type(self).__name__} does not define affine; define affine(self, input, weight, bias, *args), which "
            f"returns the output of {self.plain.__name__} with these parameters, and without a bias where it is None."
        )

    @property
    def growth(self) -> float:
        """Entries of the output for each entry of the input, roughly.

        It only decides which of two equivalent computations is cheaper; by default the output is as large as the input.
        """
        return 1.0

    def reset_response(self) -> None:
        """Fill `R, r` with torch's own initialiser for this layer."""
        # It reads nothing but these two attributes, and the weight's shape even where the weight does not respond.
        weight = self.weight.new_empty(self.weight.shape) if self.response_weight is None else self.response_weight
        self.plain.reset_parameters(SimpleNamespace(weight=weight, bias=self.response_bias))  # type: ignore[attr-defined]

    def forward(self, input: Tensor, *args: Any) -> Tensor:
        """Compute at the bound sample; see `ResponseLayer.forward`."""
        if self._hyperparameters is None or not self._linear:
            output: Tensor = super().forward(input, *args)
            return output
        # By hand: torch's own rule would take the product with the tangent of the weight as well, where it has none.
        primal, moved = dual.parts(input)
        with torch.no_grad():
            moved = None if moved is None else self.affine(moved, self.weight, None, *args)
        sample = self._hyperparameters.bound_sample()
        if self._merges(sample, primal):
            return self._respond_merged(sample, primal, moved, *args)
        output = self.affine(primal, self.weight, self.bias, *args)
        # The gates of a shared row act on the output as well.
        rows = sample.expand(len(output), -1) if len(sample) == 1 and output.dim() >= 1 - self.channel_dim else sample
        self._check_rows(rows, primal, output)
        response = self._respond(output.new_zeros(()), output, rows, primal.detach(), *args)
        return dual.respond(output, moved, response, fresh=True)

    def _merges(self, sample: Tensor, input: Tensor) -> bool:
        """Whether a linearised pass takes the response into the weight: a shared row's, if the output is no smaller."""
        if len(sample) > 1 or "weight" not in self.responding:
            return False
        return input.dim() < 1 - self.channel_dim or self.weight.numel() <= input.numel() * self.growth

    def _respond_merged(self, sample: Tensor, input: Tensor, moved: Tensor | None, *args: Any) -> Tensor:
        """A linearised pass with the response of a shared row in the weight."""
        own = {name: self.response(name) * self.spread(name, self.gated(name, sample)[0]) for name in self.responding}
        handed = {name: dual.share_gradient(getattr(self, name), own[name], fresh=False) for name in own}
        output = self.affine(input, handed["weight"], handed.get("bias", self.bias), *args)
        with torch.no_grad():
            tangent = self.affine(input, own["weight"], own.get("bias"), *args)
        return dual.with_tangent(output, tangent if moved is None else moved.add_(tangent))

    def _check_rows(self, sample: Tensor, input: Tensor, output: Tensor) -> None:
        if output.dim() < 1 - self.channel_dim or output.shape[0] != sample.shape[0]:
            raise self.rows_error(sample, input)

    def _respond(self, start: Tensor, output: Tensor, sample: Tensor, input: Tensor, *args: Any) -> Tensor:
        """`start + (V h_n) * (R x) + (C h_n) * r`, to broadcast over `output`."""
        if "weight" in self.responding:
            gates = functional.align(self.gated("weight", sample), output, self.channel_dim)
            start = torch.addcmul(start, gates, self.affine(input, self.response("weight"), None, *args))
        if "bias" in self.responding:
            shift = self.gated("bias", sample) * self.response("bias")
            start = start + functional.align(shift, output, self.channel_dim)
        return start

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
        self._check_rows(sample, input, output)
        return self._respond(output, output, sample, input, *args)
