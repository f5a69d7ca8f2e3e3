"""The responses of the convolutions."""

from typing import Any

from torch import Tensor, nn

from lightning_stn.layers.affine import AffineResponse
from lightning_stn.layers.registry import register_response


class _ResponseConv(AffineResponse):
    """A convolution whose kernels and biases respond to the hyperparameters.

    Example `n` sees `W * x + b + (V h_n) (R * x) + (C h_n) r`, gated by output channel, MacKay et al. (2019),
    section 3.2. Every constructor option of torch's layer is kept: stride, padding and its modes, dilation, groups.

    Shape:
        input `[n, i, ...]`; bound sample `[n, h]`, or `[1, h]` to share it, in unconstrained units; output
        `[n, o, ...]`. An input without a batch dimension needs a sample of one row.
    """

    kernel_size: tuple[int, ...]

    @property
    def channel_dim(self) -> int:
        """The dimension before the spatial ones."""
        return -1 - len(self.kernel_size)

    def affine(self, input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
        """The plain layer's own convolution, padding modes included."""
        output: Tensor = self._conv_forward(input, weight, bias)  # type: ignore[operator]
        return output


@register_response(nn.Conv1d)
class ResponseConv1d(_ResponseConv, nn.Conv1d):
    """`nn.Conv1d` whose kernels and biases respond to the hyperparameters; see `ResponseLayer`."""

    plain = nn.Conv1d


@register_response(nn.Conv2d)
class ResponseConv2d(_ResponseConv, nn.Conv2d):
    """`nn.Conv2d` whose kernels and biases respond to the hyperparameters; see `ResponseLayer`."""

    plain = nn.Conv2d


@register_response(nn.Conv3d)
class ResponseConv3d(_ResponseConv, nn.Conv3d):
    """`nn.Conv3d` whose kernels and biases respond to the hyperparameters; see `ResponseLayer`."""

    plain = nn.Conv3d
