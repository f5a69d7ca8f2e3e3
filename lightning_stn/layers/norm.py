"""The responses of the normalisation layers."""

from typing import Any

from torch import Tensor, nn

from lightning_stn.layers.base import ResponseLayer
from lightning_stn.layers.registry import register_response


class NormResponse(ResponseLayer):
    """A normalisation whose scale and shift respond to the hyperparameters.

    With `z` the normalised input, example `n` sees `z * (w + (V h_n) * R) + b + (C h_n) * r`, every entry of scale and
    shift with a gate of its own. Statistics do not respond: they are torch's, taken over the same entries as ever.

    Shape:
        input `[n, *]`; bound sample `[n, h]`, or `[1, h]` to share it, in unconstrained units; output like the input.
    """

    per_example = True

    def gate_size(self, name: str) -> int:
        """A gate for each entry."""
        size: int = getattr(self, name).numel()
        return size

    def spread(self, name: str, gated: Tensor) -> Tensor:
        """`[o]` in the shape of the parameter."""
        return gated.view_as(getattr(self, name))

    def align(self, rows: Tensor, output: Tensor) -> Tensor:
        """Scales or shifts of all examples, `[n, *parameter]`, to broadcast over the output, in its precision."""
        return rows.reshape(*rows.shape[:2], *[1] * (output.dim() - 2)).to(output.dtype)

    def forward_per_example(self, sample: Tensor, input: Tensor, *args: Any) -> Tensor:
        """Normalise plainly, then scale and shift each example by its own."""
        names = [name for name in ("weight", "bias") if self._parameters.get(name) is not None]
        with self.shadowed(dict.fromkeys(names)):
            output: Tensor = self.plain.forward(self, input, *args)
        if output.dim() < 2 or output.shape[0] != len(sample):
            raise self.rows_error(sample, input)
        if "weight" in names:
            output = output * self.align(self._rows("weight", sample), output)
        if "bias" in names:
            output = output + self.align(self._rows("bias", sample), output)
        return output

    def _rows(self, name: str, sample: Tensor) -> Tensor:
        """One parameter for each example, `[n, *parameter]`."""
        parameter = getattr(self, name)
        if name not in self.responding:
            return parameter.expand(len(sample), *parameter.shape)  # type: ignore[no-any-return]
        return self.add_response(parameter, self.gated(name, sample).reshape(-1, *parameter.shape), self.response(name))


class _LastDimensions(NormResponse):
    """Parameters of the shape of the last dimensions."""

    def align(self, rows: Tensor, output: Tensor) -> Tensor:
        """`[n, *parameter]` over `[n, *, *parameter]`."""
        between = output.dim() - rows.dim()
        return rows.reshape(rows.shape[0], *[1] * between, *rows.shape[1:]).to(output.dtype)


@register_response(nn.LayerNorm)
class ResponseLayerNorm(_LastDimensions, nn.LayerNorm):
    """`nn.LayerNorm` whose scale and shift respond; see `NormResponse`."""

    plain = nn.LayerNorm


@register_response(nn.RMSNorm)
class ResponseRMSNorm(_LastDimensions, nn.RMSNorm):
    """`nn.RMSNorm` whose scale responds; see `NormResponse`."""

    plain = nn.RMSNorm


@register_response(nn.GroupNorm)
class ResponseGroupNorm(NormResponse, nn.GroupNorm):
    """`nn.GroupNorm` whose scale and shift respond; see `NormResponse`."""

    plain = nn.GroupNorm


@register_response(nn.BatchNorm1d)
class ResponseBatchNorm1d(NormResponse, nn.BatchNorm1d):
    """`nn.BatchNorm1d` whose scale and shift respond; see `NormResponse`."""

    plain = nn.BatchNorm1d


@register_response(nn.BatchNorm2d)
class ResponseBatchNorm2d(NormResponse, nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose scale and shift respond; see `NormResponse`."""

    plain = nn.BatchNorm2d


@register_response(nn.BatchNorm3d)
class ResponseBatchNorm3d(NormResponse, nn.BatchNorm3d):
    """`nn.BatchNorm3d` whose scale and shift respond; see `NormResponse`."""

    plain = nn.BatchNorm3d


@register_response(nn.SyncBatchNorm)
class ResponseSyncBatchNorm(NormResponse, nn.SyncBatchNorm):
    """`nn.SyncBatchNorm` whose scale and shift respond; see `NormResponse`."""

    plain = nn.SyncBatchNorm
