"""The responses of activations with parameters."""

import torch
from torch import Tensor, nn

from lightning_stn.layers.base import ResponseLayer
from lightning_stn.layers.registry import register_response


@register_response(nn.PReLU)
class ResponsePReLU(ResponseLayer, nn.PReLU):
    """`nn.PReLU` whose slopes respond: `max(0, x) + (w + (V h_n) * R) * min(0, x)`, with a gate for each slope.

    Shape:
        input `[n, *]`, or `[n, c, *]` with a slope for each channel; bound sample `[n, h]`, or `[1, h]` to share it, in
        unconstrained units; output like the input.
    """

    plain_type = nn.PReLU
    per_example = True

    def forward_per_example(self, sample: Tensor, input: Tensor) -> Tensor:
        """Scale the negative entries of each example by its slopes."""
        if input.dim() < 1 or len(input) != len(sample):
            raise self.rows_error(sample, input)
        slopes = self.base_parameter("weight").expand(len(sample), -1)
        if "weight" in self.responding:
            gates = self.gated("weight", sample)
            slopes = self.add_response(slopes, gates, self.response_weights("weight"), may_modify=False)
        shape = [*slopes.shape, *[1] * (input.dim() - 2)][: input.dim()]
        return torch.where(input >= 0, input, slopes.reshape(shape).to(input.dtype) * input)
