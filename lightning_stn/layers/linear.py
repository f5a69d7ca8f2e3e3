"""The response of `nn.Linear`."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_stn.layers.affine import AffineResponse
from lightning_stn.layers.registry import register_response


@register_response(nn.Linear)
class ResponseLinear(AffineResponse, nn.Linear):  # type: ignore[misc]
    """`nn.Linear` whose weight and bias respond to the hyperparameters.

    Example `n` sees `W x + b + (V h_n) * (R x) + (C h_n) * r`, MacKay et al. (2019), section 3.2.

    Shape:
        input `[n, *, in_features]`; bound sample `[n, h]`, or `[1, h]` to share it, in unconstrained units; output
        `[n, *, out_features]`. Gates act on the last dimension; row `n` applies to index `n` of the first dimension.
    """

    plain = nn.Linear

    @property
    def channel_dim(self) -> int:
        """The last dimension."""
        return -1

    @property
    def growth(self) -> float:
        """Output features for each input feature."""
        return self.out_features / self.in_features

    def affine(self, input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
        """`W x + b`."""
        return F.linear(input, weight, bias)
