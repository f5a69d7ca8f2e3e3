"""The response of multi-head attention. Transformer layers, which contain it, are in `transformer.py`.

Index alphabet, beside that of `lightning_stn.functional`: `t` query position, `s` key position, `e` embedding feature.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_stn import dual, functional
from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.layers.attend import attend, score_mask, swap_batch_and_time
from lightning_stn.layers.dropout import InnerDropout
from lightning_stn.layers.linear import ResponseLinear
from lightning_stn.layers.registry import register_response

_PACKED = ("in_proj_weight", "in_proj_bias")
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


@register_response(NonDynamicallyQuantizableLinear)
class ResponseOutputProjection(ResponseLinear, NonDynamicallyQuantizableLinear):  # type: ignore[misc]
    """The output projection of `ResponseMultiheadAttention`; see `ResponseLinear`."""

    plain_type = NonDynamicallyQuantizableLinear


@register_response(nn.MultiheadAttention)
class ResponseMultiheadAttention(InnerDropout, nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose projections respond to the hyperparameters.

    All projections of example `n` (query, key, value and output) compute `W x + b + (V h_n) * (R x) + (C h_n) * r`,
    MacKay et al. (2019), arXiv:1903.03088, section 3.2; the learned key and value of `add_bias_kv` are
    `b_k + (C h_n) * r_k`. The attention between the projections is torch's. All options of torch's layer are
    supported; its fast path for inference is not used.

    Shape:
        query `[n, t, e]`, key `[n, s, kdim]`, value `[n, s, vdim]`, or time first without `batch_first`; bound sample
        `[n, h]`, or `[1, h]` to share it, in unconstrained units; outputs as torch's. Inputs without a batch dimension
        need a sample of one row.
    """

    plain_type = nn.MultiheadAttention
    per_example = True
    # Even if only `out_proj` responds: torch's layer reads the weight of `out_proj` without calling its forward.
    container = True

    def __init__(self, *args: Any, hyperparameters: HyperparameterSet, **kwargs: Any) -> None:
        super().__init__(*args, hyperparameters=hyperparameters, **kwargs)
        ResponseOutputProjection.adopt(self.out_proj, hyperparameters)

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        """Weights that a hook computes from other parameters cannot respond."""
        if not layer._parameters.keys() >= {*_PACKED, *_SEPARATE}:
            return "its weights are computed from other parameters, as by weight_norm; remove that"
        return super().refusal(layer)

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # Where this is true, nn.TransformerEncoderLayer and layers with the same fast path read the weights directly.
        return self._hyperparameters is None and bool(self.__dict__["_qkv_same_embed_dim"])

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, same: bool) -> None:
        self.__dict__["_qkv_same_embed_dim"] = same

    def draw_response(self) -> None:
        """Draw `R` with the initialisers of the torch layer, and `r` uniformly, since torch starts biases at zero."""
        for name in self.responding:
            response = self.response_weights(name)
            if response.dim() == 1:
                nn.init.uniform_(response, -(self.embed_dim**-0.5), self.embed_dim**-0.5)
            else:
                fill = nn.init.xavier_uniform_ if response.dim() == 2 else nn.init.xavier_normal_
                fill(response)

    def gate_size(self, name: str) -> int:
        """The size of the first dimension; for `bias_k` and `bias_v`, which are `[1, 1, e]`, of the last one."""
        parameter: Tensor = getattr(self, name)
        return parameter.shape[0] if parameter.dim() < 3 else parameter.shape[-1]

    def broadcast_gates(self, name: str, gated: Tensor) -> Tensor:
        """`[o]` along the first dimension, or along the last one of `bias_k` and `bias_v`."""
        return gated[:, None] if getattr(self, name).dim() == 2 else gated

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute at the bound sample; see `ResponseLayer.forward`."""
        if self._hyperparameters is not None and self._linear and query.dim() == 3:
            sample = self._hyperparameters.bound_sample()
            if len(sample) == 1:  # Gating the projections takes fewer passes than gating the weights.
                sample = sample.expand(query.shape[0 if self.batch_first else 1], -1)
                with self.reading_base():
                    return self.forward_per_example(sample, query, key, value, *args, **kwargs)
        return super().forward(query, key, value, *args, **kwargs)

    def forward_shared(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Run torch's attention with the effective parameters."""
        _refuse_nested(self, query, key, value)
        swap = self.batch_first and query.dim() == 3
        if swap:
            query, key, value = swap_batch_and_time(query, key, value)
        parameters = {name: getattr(self, name) for name in (*_PACKED, "bias_k", "bias_v", *_SEPARATE)}
        output, weights = F.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            add_zero_attn=self.add_zero_attn,
            dropout_p=self.dropout,
            out_proj_weight=self.out_proj.weight,
            out_proj_bias=self.out_proj.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=self.in_proj_weight is None,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
            **parameters,
        )
        return output.transpose(0, 1) if swap else output, weights

    def forward_per_example(
        self,
        sample: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Project each example with its row of the sample, then attend.

        Raises:
            ValueError: an input or a mask has the wrong shape, or `is_causal` is set without `attn_mask`.
        """
        if is_causal and attn_mask is None:
            raise ValueError(
                f"{type(self).__name__}: expected attn_mask beside is_causal=True, got None; pass the causal mask, "
                "since is_causal is only a hint that attn_mask is causal."
            )
        self._check_rows(sample, query, key, value)
        projected = self._projections(sample, query, key, value)
        q, k, v = projected if self.batch_first else [x.transpose(0, 1) for x in projected]
        # As in torch, is_causal replaces attn_mask only if there is no other mask and no weights are returned.
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else score_mask(attn_mask, key_padding_mask, q, k, self.num_heads, self._added_keys)
        k, v = self._extended("bias_k", sample, k), self._extended("bias_v", sample, v)
        q, k, v = (x.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2) for x in (q, k, v))
        output, weights = attend(q, k, v, mask, self.rate_of_call(), causal, need_weights)
        output = self.out_proj(output.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _check_rows(self, sample: Tensor, *inputs: Tensor) -> None:
        _refuse_nested(self, *inputs)
        batch_dim = 0 if self.batch_first else 1
        for input in inputs:
            if input.dim() != 3 or input.shape[batch_dim] != len(sample):
                raise ValueError(
                    f"{type(self).__name__}: expected query, key and value with three dimensions and, along dimension "
                    f"{batch_dim} (batch_first={self.batch_first}), one example for each of the sample's {len(sample)} "
                    f"rows, got shape {list(input.shape)}; bring the inputs to that layout, or share one row over the "
                    "batch with STNCallback(perturb='batch')."
                )

    def _projections(self, sample: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Projected queries, keys and values, in the layout of the inputs."""
        all_rows, e = slice(None), self.embed_dim
        if self.in_proj_weight is not None and query is key and key is value:
            return self._project(sample, query, "in_proj_weight", all_rows, all_rows).chunk(3, -1)
        parts = [slice(0, e), slice(e, 2 * e), slice(2 * e, 3 * e)]
        separate = self.in_proj_weight is None
        return tuple(
            self._project(sample, input, name if separate else "in_proj_weight", all_rows if separate else part, part)
            for input, name, part in zip((query, key, value), _SEPARATE, parts, strict=True)
        )

    def _project(self, sample: Tensor, input: Tensor, weight: str, rows: slice, bias_rows: slice) -> Tensor:
        """`W x + b + (V h_n) * (R x) + (C h_n) * r` for some rows of weight and bias."""
        base = getattr(self, weight)[rows]
        bias = None if self.in_proj_bias is None else self.in_proj_bias[bias_rows]
        product: Tensor | None
        if not self._linear:
            if self.responds_as_itself(weight):
                product = F.linear(input, base)
                start = product if bias is None else product + bias
            else:
                product, start = self._response_product(input, weight, rows), F.linear(input, base, bias)
            return self._respond(start, sample, product, weight, rows, bias_rows)
        primal, tangent = dual.parts(input)
        output = F.linear(primal, base, bias)
        with torch.no_grad():
            tangent = None if tangent is None else F.linear(tangent, base)
        product = self._response_product(primal.detach(), weight, rows)
        response = self._respond(output.new_zeros(()), sample, product, weight, rows, bias_rows)
        return dual.respond(output, tangent, response, may_modify=True)

    def _response_product(self, input: Tensor, weight: str, rows: slice) -> Tensor | None:
        """`R x` for some rows of the weight; None where the weight does not respond."""
        return F.linear(input, self.response_weights(weight)[rows]) if weight in self.responding else None

    def _respond(
        self, start: Tensor, sample: Tensor, product: Tensor | None, weight: str, rows: slice, bias_rows: slice
    ) -> Tensor:
        """`start + (V h_n) * (R x) + (C h_n) * r` for some rows of weight and bias.

        Args:
            start: broadcasts with the result.
            sample: `h`.
            product: `R x`; None where the weight does not respond.
            weight: name of the weight.
            rows: of the weight.
            bias_rows: of the bias.
        """
        time_dim = 1 if self.batch_first else 0
        if product is not None:
            gates = functional.gate(sample, self.gate_weights(weight)[rows]).unsqueeze(time_dim)
            start = torch.addcmul(start, gates, product)
        if "in_proj_bias" in self.responding:
            shift = self.gated("in_proj_bias", sample) * self.response_weights("in_proj_bias")
            start = start + shift[:, bias_rows].unsqueeze(time_dim)
        return start

    @property
    def _added_keys(self) -> int:
        return int(self.bias_k is not None) + int(self.add_zero_attn)

    def _extended(self, name: str, sample: Tensor, projected: Tensor) -> Tensor:
        """Keys or values `[n, s, e]`, extended by the learned one (`add_bias_kv`) and zero (`add_zero_attn`)."""
        bias: Tensor | None = getattr(self, name)
        if bias is not None:
            row = bias
            if name in self.responding:
                gates = self.gated(name, sample).unsqueeze(1)
                row = self.add_response(bias, gates, self.response_weights(name), may_modify=False)
            projected = torch.cat([projected, row.expand(len(sample), -1, -1)], 1)
        return F.pad(projected, (0, 0, 0, 1)) if self.add_zero_attn else projected


def _refuse_nested(layer: nn.Module, *inputs: Tensor) -> None:
    if any(input.is_nested for input in inputs):
        raise ValueError(
            f"{type(layer).__name__}: expected padded tensors, got a nested one, which torch supports only in a fast "
            "path that ignores the response; pass input.to_padded_tensor(0.0) with a key_padding_mask."
        )
