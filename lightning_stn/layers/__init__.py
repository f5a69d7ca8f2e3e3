"""Response layers: torch layers whose weights respond to the hyperparameters."""

from lightning_stn.layers.affine import AffineResponse
from lightning_stn.layers.base import ResponseLayer
from lightning_stn.layers.conv import ResponseConv1d, ResponseConv2d, ResponseConv3d
from lightning_stn.layers.linear import ResponseLinear
from lightning_stn.layers.registry import register_response, response_type

__all__ = [
    "AffineResponse",
    "ResponseConv1d",
    "ResponseConv2d",
    "ResponseConv3d",
    "ResponseLayer",
    "ResponseLinear",
    "register_response",
    "response_type",
]
