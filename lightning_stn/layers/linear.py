"""The response of `nn.Linear`."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_stn import functional
from lightning_stn.layers.affine import AffineResponse
from lightning_stn.layers.registry import register_response, register_response_by_name


@register_response_by_name(r"timm\.layers\.linear\.Linear")
class _LinearResponse(AffineResponse):
    """A linear layer whose weight and bias respond to the hyperparameters.

    Example `n` sees `W x + b + (V h_n) * (R x) + (C h_n) * r`, MacKay et al. (2019), section 3.2.

    Shape:
        input `[n, *, in_features]`; bound sample `[n, h]`, or `[1, h]` to share it, in unconstrained units; output
        `[n, *, out_features]`. Gates act on the last dimension; row `n` applies to index `n` of the first dimension.
    """

    gates_both = True
    in_features: int
    out_features: int

    @property
    def channel_dim(self) -> int:
        """The last dimension."""
        return -1

    @property
    def growth(self) -> float:
        """Output features for each input feature."""
        return self.out_features / max(self.in_features, 1)

    def affine(self, input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
        """`W x + b`."""
        # Without a gradient torch takes one product for each example where another dimension comes first in memory.
        return F.linear(input.contiguous(), weight, bias)

    def _respond(
        self, start: Tensor, output: Tensor, sample: Tensor, input: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """`start + (V h_n) * (R x) + (C h_n) * r`; gates on the input where the weight is that of an embedding."""
        if not self.gates_elsewhere("weight"):
            return super()._respond(start, output, sample, input, *args, **kwargs)
        gates = functional.align(self.gated("weight", sample), input, -1)
        start = start + self.affine(input * gates, self.response_weights("weight"), None)
        return self._shift(start, output, sample)


@register_response(nn.Linear)
class ResponseLinear(_LinearResponse, nn.Linear):  # type: ignore[misc]
    """`nn.Linear` whose weight and bias respond; see `AffineResponse`.

    Shape:
        input `[n, *, in_features]`; bound sample `[n, h]`, or `[1, h]` to share it, in unconstrained units; output
        `[n, *, out_features]`. Gates act on the last dimension; row `n` applies to index `n` of the first dimension.
    """

    plain_type = nn.Linear


@register_response_by_name(r"transformers\.pytorch_utils\.Conv1D")
class _ResponseConv1D(AffineResponse):
    """The linear layer of GPT-2, whose weight is `[i, o]`."""

    @property
    def channel_dim(self) -> int:
        """The last dimension."""
        return -1

    def gate_size(self, name: str) -> int:
        """A gate for each output feature."""
        size: int = getattr(self, name).shape[-1]
        return size

    def broadcast_gates(self, name: str, gated: Tensor) -> Tensor:
        """`[o]` broadcasts over the weight `[i, o]` as it is."""
        return gated

    def affine(self, input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """`x W + b`."""
        return F.linear(input, weight.t(), bias)
