"""The responses of normalisation layers."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_stn import dual
from lightning_stn.layers.base import ResponseLayer
from lightning_stn.layers.registry import register_response, register_response_by_name


class NormResponse(ResponseLayer):
    """A normalisation whose scale and shift respond to the hyperparameters.

    With `z` the normalised input, example `n` sees `z * (w + (V h_n) * R) + b + (C h_n) * r`, with a gate for each
    entry of scale and shift. Statistics do not respond: they are those of torch's layer.

    Shape:
        input `[n, *]`; bound sample `[n, h]`, or `[1, h]` to share it, in unconstrained units; output like the input.
    """

    per_example = True

    def gate_size(self, name: str) -> int:
        """A gate for each entry."""
        size: int = getattr(self, name).numel()
        return size

    def broadcast_gates(self, name: str, gated: Tensor) -> Tensor:
        """`[o]` in the shape of the parameter."""
        return gated.view_as(getattr(self, name))

    def align(self, rows: Tensor, output: Tensor) -> Tensor:
        """Reshape scales or shifts, `[n, *parameter]`, to broadcast over the output, and cast them to its precision."""
        return rows.reshape(*rows.shape[:2], *[1] * (output.dim() - 2)).to(output.dtype)

    def forward(self, input: Tensor, *args: Any) -> Tensor:
        """Compute at the bound sample; see `ResponseLayer.forward`."""
        if self._hyperparameters is None or not self._linear:
            output: Tensor = super().forward(input, *args)
            return output
        with self.reading_base():
            return self._forward_linearized(self._hyperparameters.bound_sample(), input, *args)

    def _forward_linearized(self, sample: Tensor, input: Tensor, *args: Any) -> Tensor:
        # Without scale and shift the Jacobian of a normalisation is symmetric, whatever its statistics.
        with self.shadowed(self._neutral()):
            normalised = dual.apply_symmetric(lambda input: self.plain_type.forward(self, input, *args), input)
        if len(sample) > 1:
            self._check_rows(sample, normalised)
        return self._scale(sample, *dual.parts(normalised))

    def _scale(self, sample: Tensor, normalised: Tensor, tangent: Tensor | None) -> Tensor:
        """`z * w + b` with the tangent `dz * w + z * (V h_n) * R + (C h_n) * r`; `dz` is `tangent`, and overwritten."""
        output, response = normalised, normalised.new_zeros(())
        rows = {name: self.align(self._row(name), normalised) for name in self._affine_names}
        if "weight" in rows:
            output = torch.addcmul(rows.get("bias", response), output, rows["weight"])
            tangent = None if tangent is None else tangent.mul_(rows["weight"].detach())
        if "bias" in self.responding:
            response = self.align(self._shifts("bias", sample), normalised)
        if "weight" in self.responding:
            scales = self.align(self._shifts("weight", sample), normalised)
            response = torch.addcmul(response, normalised.detach(), scales)
        if not self.responding:
            return dual.with_tangent(output, tangent)
        return dual.respond(output, tangent, response, may_modify=True)

    def forward_per_example(self, sample: Tensor, input: Tensor, *args: Any) -> Tensor:
        """Normalise without scale and shift, then scale and shift each example by its row."""
        with self.shadowed(self._neutral()):
            output: Tensor = self.plain_type.forward(self, input, *args)
        self._check_rows(sample, output)
        for name, combine in (("weight", torch.mul), ("bias", torch.add)):
            if name in self._affine_names:
                rows = self._row(name)
                if name in self.responding:
                    rows = rows + self._shifts(name, sample)
                output = combine(output, self.align(rows, output))
        return output

    def _neutral(self) -> dict[str, Any]:
        """What stands for scale and shift where the plain layer shall normalise alone."""
        return dict.fromkeys(self._affine_names)

    @property
    def _affine_names(self) -> list[str]:
        return [name for name in ("weight", "bias") if self._parameters.get(name) is not None]

    def _row(self, name: str) -> Tensor:
        """One base parameter, `[1, *parameter]`."""
        parameter: Tensor = getattr(self, name)
        return parameter.unsqueeze(0)

    def _check_rows(self, sample: Tensor, output: Tensor) -> None:
        if output.dim() < 2 or output.shape[0] != len(sample):
            raise self.rows_error(sample, output)

    def _shifts(self, name: str, sample: Tensor) -> Tensor:
        """`(V h_n) * R` of one parameter, `[n, *parameter]`."""
        response = self.response_weights(name)
        return self.gated(name, sample).reshape(-1, *response.shape) * response


class _LastDimensions(NormResponse):
    """A normalisation whose scale and shift have the shape of the last dimensions of the input."""

    def align(self, rows: Tensor, output: Tensor) -> Tensor:
        """`[n, *parameter]` over `[n, *, *parameter]`."""
        if output.dim() < rows.dim():
            return rows[0].to(output.dtype)
        between = output.dim() - rows.dim()
        return rows.reshape(rows.shape[0], *[1] * between, *rows.shape[1:]).to(output.dtype)


@register_response(nn.LayerNorm)
class ResponseLayerNorm(_LastDimensions, nn.LayerNorm):
    """`nn.LayerNorm` whose scale and shift respond; see `NormResponse`."""

    plain_type = nn.LayerNorm


@register_response(nn.RMSNorm)
class ResponseRMSNorm(_LastDimensions, nn.RMSNorm):
    """`nn.RMSNorm` whose scale responds; see `NormResponse`."""

    plain_type = nn.RMSNorm


@register_response(nn.GroupNorm)
class ResponseGroupNorm(NormResponse, nn.GroupNorm):
    """`nn.GroupNorm` whose scale and shift respond; see `NormResponse`."""

    plain_type = nn.GroupNorm


class _BatchNormResponse(NormResponse):
    """Batch normalisation, by statistics of each channel."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None
    eps: float

    def forward(self, input: Tensor, *args: Any) -> Tensor:
        """Compute at the bound sample; see `ResponseLayer.forward`."""
        hyperparameters = self._hyperparameters
        if hyperparameters is not None and self._linear and (self.training or self.running_mean is None):
            sample = hyperparameters.bound_sample()
            # With one value per channel torch raises; leave that case to it.
            if len(sample) == 1 and "weight" in self._affine_names and input.numel() > input.shape[1]:
                with self.reading_base():
                    return self._forward_fused(sample, input)
        output: Tensor = super().forward(input, *args)
        return output

    def _forward_fused(self, sample: Tensor, input: Tensor) -> Tensor:
        """A linearised pass with batch statistics, by torch's fused kernels.

        The scale of a channel commutes with the symmetric Jacobian of the normalisation, so the Jacobian of the whole
        layer is symmetric too, and the jvp is computed as a vjp.
        """
        self._check_input_dim(input)
        primal, tangent = dual.parts(input)
        responses = {name: self._shifts(name, sample)[0] for name in self.responding}
        shared = {
            name: dual.share_gradient(getattr(self, name), response, may_modify=False)
            for name, response in responses.items()
        }
        weight, bias = (shared.get(name, getattr(self, name)) for name in ("weight", "bias"))
        running = (self.running_mean, self.running_var) if self.training else (None, None)
        output, mean, inverse = torch.native_batch_norm(
            primal, weight, bias, *running, True, self._count_batch() if self.training else 0.0, self.eps
        )
        with torch.no_grad():
            if tangent is not None:
                tangent, *_ = torch.ops.aten.native_batch_norm_backward(
                    tangent, primal, weight, *running, mean, inverse, True, self.eps, [True, False, False]
                )
            # The response `z * (V h) * R + (C h) * r` as an affine map of the input, `scale * x + shift`.
            zero = mean.new_zeros(())
            scale = responses.get("weight", zero) * inverse
            shift = responses.get("bias", zero) - mean * scale
            rows = (self.align(row.unsqueeze(0), output) for row in (shift, scale))
            response = torch.addcmul(next(rows), primal, next(rows))
        return dual.with_tangent(output, response if tangent is None else tangent.add_(response))

    def _count_batch(self) -> float:
        """Count the batch, and return the weight of its statistics in the running ones, as torch computes it."""
        if self.num_batches_tracked is None:
            return 0.0
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum


@register_response(nn.BatchNorm1d)
class ResponseBatchNorm1d(_BatchNormResponse, nn.BatchNorm1d):
    """`nn.BatchNorm1d` whose scale and shift respond; see `NormResponse`."""

    plain_type = nn.BatchNorm1d


@register_response(nn.BatchNorm2d)
class ResponseBatchNorm2d(_BatchNormResponse, nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose scale and shift respond; see `NormResponse`."""

    plain_type = nn.BatchNorm2d


@register_response(nn.BatchNorm3d)
class ResponseBatchNorm3d(_BatchNormResponse, nn.BatchNorm3d):
    """`nn.BatchNorm3d` whose scale and shift respond; see `NormResponse`."""

    plain_type = nn.BatchNorm3d


@register_response(nn.SyncBatchNorm)
class ResponseSyncBatchNorm(NormResponse, nn.SyncBatchNorm):
    """`nn.SyncBatchNorm` whose scale and shift respond; see `NormResponse`."""

    plain_type = nn.SyncBatchNorm


@register_response(nn.InstanceNorm1d)
class ResponseInstanceNorm1d(NormResponse, nn.InstanceNorm1d):
    """`nn.InstanceNorm1d` whose scale and shift respond; see `NormResponse`."""

    plain_type = nn.InstanceNorm1d


@register_response(nn.InstanceNorm2d)
class ResponseInstanceNorm2d(NormResponse, nn.InstanceNorm2d):
    """`nn.InstanceNorm2d` whose scale and shift respond; see `NormResponse`."""

    plain_type = nn.InstanceNorm2d


@register_response(nn.InstanceNorm3d)
class ResponseInstanceNorm3d(NormResponse, nn.InstanceNorm3d):
    """`nn.InstanceNorm3d` whose scale and shift respond; see `NormResponse`."""

    plain_type = nn.InstanceNorm3d


@register_response_by_name(r"(timm\.layers\.norm|torchvision\.models\.convnext)\.(LayerNorm2d|GroupNorm1)")
class _ResponseChannelNorm(NormResponse):
    """Normalisations of other libraries with a scale for each channel."""


@register_response_by_name(r"timm\.layers\.norm\.LayerNorm")
class _ResponseForeignLayerNorm(_LastDimensions):
    """timm's layer normalisation, which overrides `forward`."""


@register_response_by_name(r"transformers\.models\..*\.(\w*RMSNorm|T5LayerNorm)")
class _ResponseForeignRMSNorm(_LastDimensions):
    """Root-mean-square normalisations that multiply by their weight in Python."""

    def _neutral(self) -> dict[str, Any]:
        return {"weight": torch.ones_like(self.weight)}


@register_response_by_name(r"timm\.layers\.norm_act\.(BatchNormAct2d|GroupNormAct|GroupNorm1Act|LayerNormAct2d)")
class _ResponseNormAct(NormResponse):
    """Normalisations that also drop and apply an activation."""

    drop: nn.Module
    act: nn.Module

    def forward_per_example(self, sample: Tensor, input: Tensor, *args: Any) -> Tensor:
        """Normalise, scale and shift each example by its row, and then apply the activation."""
        with self.shadowed({"drop": nn.Identity(), "act": nn.Identity()}):
            output = super().forward_per_example(sample, input, *args)
        result: Tensor = self.act(self.drop(output))
        return result

    def _forward_linearized(self, sample: Tensor, input: Tensor, *args: Any) -> Tensor:
        with self.shadowed({"drop": nn.Identity(), "act": nn.Identity()}):
            output = super()._forward_linearized(sample, input, *args)
        result: Tensor = self.act(self.drop(output))
        return result
