"""The responses of torch's transformer layers.

Their fast paths for inference read parameters directly and would ignore the response, so they are switched off here.
"""

from typing import Any

from torch import Tensor, nn

from lightning_stn.binding import BoundModule
from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.layers.base import ResponseLayer
from lightning_stn.layers.registry import register_response, response_type


class _ResponseContainer(ResponseLayer):
    """A transformer module whose children hold all parameters and respond; it runs torch's code."""

    per_example = True
    container = True

    def __init__(self, *args: Any, hyperparameters: HyperparameterSet, **kwargs: Any) -> None:
        super().__init__(*args, hyperparameters=hyperparameters, **kwargs)
        for child in list(self.modules())[1:]:
            response = response_type(type(child))
            if response is not None:
                response.adopt(child, hyperparameters)
            elif isinstance(child, BoundModule):
                child.attach(hyperparameters)

    def forward_per_example(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run torch's `forward`; the children gate by example."""
        output: Tensor = self.forward_shared(*args, **kwargs)
        return output


class _ResponseTransformerLayer(_ResponseContainer):
    """A layer of attention and a feed-forward network.

    A row for each example needs `batch_first=True`, since the gates of the feed-forward network expect the examples
    along the first dimension.
    """

    self_attn: nn.MultiheadAttention

    def check_rows(self, sample: Tensor, input: Tensor) -> None:
        """Check that the first dimension holds the examples, one for each row of the sample.

        Raises:
            ValueError: the layer has `batch_first=False`, or the input has no batch or another number of examples.
        """
        batch_first = self.self_attn.batch_first
        if not batch_first or input.dim() != 3 or input.shape[0] != len(sample):
            raise ValueError(
                f"{type(self).__name__}: expected batch_first=True and an input with three dimensions and one example "
                f"for each of the sample's {len(sample)} rows, got batch_first={batch_first} and shape "
                f"{list(input.shape)}; build the layer with batch_first=True, or share one row over the batch with "
                "STNCallback(perturb='batch')."
            )


@register_response(nn.TransformerEncoderLayer)
class ResponseTransformerEncoderLayer(_ResponseTransformerLayer, nn.TransformerEncoderLayer):
    """`nn.TransformerEncoderLayer` whose children respond, also in evaluation without gradients.

    Shape:
        as torch's; a bound sample `[n, h]` needs an input `[n, t, features]` and `batch_first=True`.
    """

    plain_type = nn.TransformerEncoderLayer

    @property
    def activation_relu_or_gelu(self) -> int:
        """Always 0: torch then finds no fused kernel for this layer's activation and skips its fast path."""
        return 0

    @activation_relu_or_gelu.setter
    def activation_relu_or_gelu(self, kind: int) -> None:
        self.__dict__["activation_relu_or_gelu"] = kind

    def forward_per_example(self, sample: Tensor, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Check the rows, then run torch's `forward`."""
        self.check_rows(sample, src)
        return super().forward_per_example(sample, src, *args, **kwargs)


@register_response(nn.TransformerDecoderLayer)
class ResponseTransformerDecoderLayer(_ResponseTransformerLayer, nn.TransformerDecoderLayer):
    """`nn.TransformerDecoderLayer` whose children respond.

    Shape:
        as torch's; a bound sample `[n, h]` needs inputs `[n, t, features]` and `batch_first=True`.
    """

    plain_type = nn.TransformerDecoderLayer

    def forward_per_example(self, sample: Tensor, tgt: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Check the rows, then run torch's `forward`."""
        self.check_rows(sample, tgt)
        return super().forward_per_example(sample, tgt, *args, **kwargs)


@register_response(nn.TransformerEncoder)
class ResponseTransformerEncoder(_ResponseContainer, nn.TransformerEncoder):
    """`nn.TransformerEncoder` whose children respond; it never packs padded inputs into nested tensors."""

    plain_type = nn.TransformerEncoder

    @property
    def use_nested_tensor(self) -> bool:
        """Always False, since nested tensors exist for the fast path only."""
        return False

    @use_nested_tensor.setter
    def use_nested_tensor(self, use: bool) -> None:
        self.__dict__["use_nested_tensor"] = use
