"""Response layers: torch layers whose weights respond to the hyperparameters."""

from lightning_stn.layers.activation import ResponsePReLU
from lightning_stn.layers.affine import AffineResponse
from lightning_stn.layers.attention import ResponseMultiheadAttention, ResponseOutputProjection
from lightning_stn.layers.base import ResponseLayer
from lightning_stn.layers.conv import (
    ResponseConv1d,
    ResponseConv2d,
    ResponseConv3d,
    ResponseConvTranspose1d,
    ResponseConvTranspose2d,
    ResponseConvTranspose3d,
)
from lightning_stn.layers.embedding import ResponseEmbedding
from lightning_stn.layers.generic import GenericResponse, generic_response
from lightning_stn.layers.linear import ResponseLinear
from lightning_stn.layers.norm import (
    NormResponse,
    ResponseBatchNorm1d,
    ResponseBatchNorm2d,
    ResponseBatchNorm3d,
    ResponseGroupNorm,
    ResponseInstanceNorm1d,
    ResponseInstanceNorm2d,
    ResponseInstanceNorm3d,
    ResponseLayerNorm,
    ResponseRMSNorm,
    ResponseSyncBatchNorm,
)
from lightning_stn.layers.recurrent import ResponseGRU, ResponseLSTM, ResponseRNN
from lightning_stn.layers.registry import register_response, response_type
from lightning_stn.layers.transformer import (
    ResponseTransformerDecoderLayer,
    ResponseTransformerEncoder,
    ResponseTransformerEncoderLayer,
)

__all__ = [
    "AffineResponse",
    "GenericResponse",
    "NormResponse",
    "ResponseBatchNorm1d",
    "ResponseBatchNorm2d",
    "ResponseBatchNorm3d",
    "ResponseConv1d",
    "ResponseConv2d",
    "ResponseConv3d",
    "ResponseConvTranspose1d",
    "ResponseConvTranspose2d",
    "ResponseConvTranspose3d",
    "ResponseEmbedding",
    "ResponseGRU",
    "ResponseGroupNorm",
    "ResponseInstanceNorm1d",
    "ResponseInstanceNorm2d",
    "ResponseInstanceNorm3d",
    "ResponseLSTM",
    "ResponseLayer",
    "ResponseLayerNorm",
    "ResponseLinear",
    "ResponseMultiheadAttention",
    "ResponseOutputProjection",
    "ResponsePReLU",
    "ResponseRMSNorm",
    "ResponseRNN",
    "ResponseSyncBatchNorm",
    "ResponseTransformerDecoderLayer",
    "ResponseTransformerEncoder",
    "ResponseTransformerEncoderLayer",
    "generic_response",
    "register_response",
    "response_type",
]
