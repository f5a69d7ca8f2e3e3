"""Bijections between unconstrained and natural units, built from `torch.distributions.transforms`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    SigmoidTransform,
    SoftplusTransform,
    Transform,
    identity_transform,
)

_SIGMOID, _SOFTPLUS = SigmoidTransform(), SoftplusTransform()


def range_transform(low: float | None, high: float | None, *, log: bool = False) -> Transform:
    """Increasing bijection from the real line onto the open range `(low, high)`.

    | range | transform |
    |---|---|
    | `(low, high)` | `low + (high - low) sigmoid(u)` |
    | `(low, inf)` | `low + softplus(u)` |
    | `(-inf, high)` | `high - softplus(-u)` |
    | `(-inf, inf)` | `u` |

    Args:
        low: lower bound in natural units; None for no bound.
        high: upper bound in natural units; None for no bound.
        log: apply the same table to the logarithm of the range, then `exp`. Zero then counts as no lower bound.

    Returns:
        The transform from unconstrained to natural units.
    """
    if log:
        log_low = math.log(low) if low else None
        log_high = math.log(high) if high is not None else None
        return ComposeTransform([range_transform(log_low, log_high), ExpTransform()])
    if low is not None and high is not None:
        return ComposeTransform([SigmoidTransform(), AffineTransform(low, high - low)])
    if low is not None:
        return ComposeTransform([_SOFTPLUS, AffineTransform(low, 1.0)])
    if high is not None:
        return ComposeTransform([AffineTransform(0.0, -1.0), _SOFTPLUS, AffineTransform(high, -1.0)])
    return identity_transform


def positive(raw: Tensor) -> Tensor:
    """`softplus(raw)`: perturbation scales from their unconstrained form, MacKay et al. (2019), section 3.3."""
    scale: Tensor = _SOFTPLUS(raw)
    return scale


def positive_inverse(scale: Tensor) -> Tensor:
    """Inverse of `positive`."""
    raw: Tensor = _SOFTPLUS.inv(scale)
    return raw


def invert(transform: Transform, value: float) -> float:
    """The unconstrained number that `transform` maps to `value`, computed in float64."""
    return float(transform.inv(torch.tensor(float(value), dtype=torch.float64, device="cpu")))


class BoundedRanges:
    """Values in several ranges with two bounds, never beyond them: `range_transform`, column by column, in one go.

    Args:
        bounds: lower and upper bound of each range, natural units.
        log: as for `range_transform`, of all ranges.
    """

    def __init__(self, bounds: Sequence[tuple[float, float]], log: bool) -> None:
        self._log = log
        inner = [(math.log(low), math.log(high)) if log else (low, high) for low, high in bounds]
        starts, spans = zip(*((low, high - low) for low, high in inner), strict=True)
        self._numbers = [starts, spans, *zip(*bounds, strict=True)]
        self._tensors: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the tensors, whose device a copy may not have."""
        return {**vars(self), "_tensors": {}}

    def __call__(self, unconstrained: Tensor) -> Tensor:
        """Natural units, `[..., k]`, of entries `[..., k]`, unconstrained units."""
        key = unconstrained.device, unconstrained.dtype
        if key not in self._tensors:
            with torch.inference_mode(False):  # tensors that are made in inference mode cannot be differentiated with
                self._tensors[key] = torch.tensor(self._numbers, dtype=key[1], device=key[0])
        start, span, low, high = self._tensors[key]
        place: Tensor = _SIGMOID(unconstrained)
        value: Tensor = start + span * place
        return (value.exp() if self._log else value).clamp(low, high)
