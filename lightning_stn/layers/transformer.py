"""Torch's transformer layers, kept off their inference fast paths, which read parameters and pass a response by."""

from typing import Any

from torch import Tensor, nn

from lightning_stn.binding import BoundModule
from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.layers.base import ResponseLayer
from lightning_stn.layers.registry import register_response, response_type


class _ResponseContainer(ResponseLayer):
    """A transformer module: it has no parameters of its own, its children respond, and torch's own code runs."""

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

    def forward_merged(self, effective: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Torch's own arithmetic."""
        output: Tensor = self.plain.forward(self, *args, **kwargs)
        return output

    def forward_per_example(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Torch's own arithmetic."""
        return self.forward_merged({}, *args, **kwargs)


class _ResponseTransformerLayer(_ResponseContainer):
    """A layer of attention and a feed-forward part.

    The feed-forward part follows the first dimension, so a row for each example needs `batch_first=True`.
    """

    self_attn: nn.MultiheadAttention

    def check_rows(self, sample: Tensor, input: Tensor) -> None:
        """Check that the examples come first.

        Raises:
            ValueError: the layer takes time first, or the input has no batch or another number of examples.
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
    """`nn.TransformerEncoderLayer` whose children respond, in evaluation without gradients too.

    Shape:
        as torch's; a bound sample `[n, h]` needs an input `[n, t, features]` and `batch_first=True`.
    """

    plain = nn.TransformerEncoderLayer

    @property
    def activation_relu_or_gelu(self) -> int:
        """0: torch's way of saying that no fused kernel has this layer's activation, its documented way out."""
        return 0

    @activation_relu_or_gelu.setter
    def activation_relu_or_gelu(self, kind: int) -> None:
        self.__dict__["activation_relu_or_gelu"] = kind

    def forward_per_example(self, sample: Tensor, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Torch's own arithmetic, examples first."""
        self.check_rows(sample, src)
        return self.forward_merged({}, src, *args, **kwargs)


@register_response(nn.TransformerDecoderLayer)
class ResponseTransformerDecoderLayer(_ResponseTransformerLayer, nn.TransformerDecoderLayer):
    """`nn.TransformerDecoderLayer` whose children respond.

    Shape:
        as torch's; a bound sample `[n, h]` needs inputs `[n, t, features]` and `batch_first=True`.
    """

    plain = nn.TransformerDecoderLayer

    def forward_per_example(self, sample: Tensor, tgt: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Torch's own arithmetic, examples first."""
        self.check_rows(sample, tgt)
        return self.forward_merged({}, tgt, *args, **kwargs)


@register_response(nn.TransformerEncoder)
class ResponseTransformerEncoder(_ResponseContainer, nn.TransformerEncoder):
    """`nn.TransformerEncoder` whose children respond; it never packs padded inputs into nested tensors."""

    plain = nn.TransformerEncoder

    @property
    def use_nested_tensor(self) -> bool:
        """False: nested tensors are for the fast path only."""
        return False

    @use_nested_tensor.setter
    def use_nested_tensor(self, use: bool) -> None:
        self.__dict__["use_nested_tensor"] = use
