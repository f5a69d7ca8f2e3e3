"""The responses of convolutions and transposed convolutions."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_stn.layers.affine import AffineResponse
from lightning_stn.layers.registry import register_response


class _ResponseConv(AffineResponse):
    """A convolution whose kernels and biases respond to the hyperparameters.

    Example `n` sees `W * x + b + (V h_n) (R * x) + (C h_n) r`, gated by output channel, MacKay et al. (2019),
    section 3.2. All options of torch's layer are supported: stride, padding and its modes, dilation, groups.

    Shape:
        input `[n, i, ...]`; bound sample `[n, h]`, or `[1, h]` to share it, in unconstrained units; output
        `[n, o, ...]`. An input without a batch dimension needs a sample of one row.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    in_channels: int
    out_channels: int

    @property
    def growth(self) -> float:
        """Output entries for each input entry, `o / i / prod(stride)`, up to borders."""
        return self.out_channels / self.in_channels / math.prod(self.stride)

    @property
    def channel_dim(self) -> int:
        """The dimension before the spatial ones."""
        return -1 - len(self.kernel_size)

    def affine(self, input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
        """The convolution of torch's layer, padding modes included."""
        output: Tensor = self._conv_forward(input, weight, bias)
        return output


class _ResponseConvTranspose(_ResponseConv):
    """A transposed convolution whose kernels and biases respond, gated by output channel.

    With `g` groups the weight is `[i, o / g, ...]`: each group has a block of rows and `o / g` of the gates.
    """

    transposed_convolution: ClassVar[Callable[..., Tensor]]
    groups: int

    @property
    def growth(self) -> float:
        """Output entries for each input entry, `o / i * prod(stride)`, up to borders."""
        return self.out_channels / self.in_channels * math.prod(self.stride)

    def gate_size(self, name: str) -> int:
        """A gate for each output channel."""
        return self.out_channels

    def broadcast_gates(self, name: str, gated: Tensor) -> Tensor:
        """`[o]` over `[i, o / g, ...]`: the gates of a group's output channels act on the rows of that group."""
        if name == "bias":
            return gated
        channels = self.weight.shape[0]
        by_group = gated.reshape(self.groups, 1, -1).expand(-1, channels // self.groups, -1)
        return by_group.reshape(channels, -1, *[1] * len(self.kernel_size))

    def unit_sums(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """Sum over the input channels of each group, and over the kernel."""
        if name == "bias":
            return a * b
        return (a * b).flatten(2).sum(2).reshape(self.groups, -1, self.out_channels // self.groups).sum(1).flatten()

    def affine(self, input: Tensor, weight: Tensor, bias: Tensor | None, output_size: Any = None) -> Tensor:
        """The transposed convolution of torch's layer."""
        output_padding = self._output_padding(
            input,
            output_size,
            self.stride,
            self.padding,
            self.kernel_size,
            len(self.kernel_size),
            self.dilation,
        )
        convolve = type(self).transposed_convolution
        return convolve(input, weight, bias, self.stride, self.padding, output_padding, self.groups, self.dilation)


@register_response(nn.Conv1d)
class ResponseConv1d(_ResponseConv, nn.Conv1d):
    """`nn.Conv1d` whose kernels and biases respond to the hyperparameters; see `AffineResponse`."""

    plain_type = nn.Conv1d


@register_response(nn.Conv2d)
class ResponseConv2d(_ResponseConv, nn.Conv2d):
    """`nn.Conv2d` whose kernels and biases respond to the hyperparameters; see `AffineResponse`."""

    plain_type = nn.Conv2d


@register_response(nn.Conv3d)
class ResponseConv3d(_ResponseConv, nn.Conv3d):
    """`nn.Conv3d` whose kernels and biases respond to the hyperparameters; see `AffineResponse`."""

    plain_type = nn.Conv3d


@register_response(nn.ConvTranspose1d)
class ResponseConvTranspose1d(_ResponseConvTranspose, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` whose kernels and biases respond to the hyperparameters; see `AffineResponse`."""

    plain_type = nn.ConvTranspose1d
    transposed_convolution = F.conv_transpose1d


@register_response(nn.ConvTranspose2d)
class ResponseConvTranspose2d(_ResponseConvTranspose, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` whose kernels and biases respond to the hyperparameters; see `AffineResponse`."""

    plain_type = nn.ConvTranspose2d
    transposed_convolution = F.conv_transpose2d


@register_response(nn.ConvTranspose3d)
class ResponseConvTranspose3d(_ResponseConvTranspose, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` whose kernels and biases respond to the hyperparameters; see `AffineResponse`."""

    plain_type = nn.ConvTranspose3d
    transposed_convolution = F.conv_transpose3d
