"""Pure functions of attention: masks, and the computation between the input and output projections.

Index alphabet, beside that of `lightning_stn.functional`: `t` query position, `s` key position, `g` head, `d` feature
of a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_stn import functional


def swap_batch_and_time(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Swap the first two dimensions of each input.

    Inputs that are one tensor remain one tensor, since torch projects such inputs in one product.
    """
    swapped_query = query.transpose(0, 1)
    swapped_key = swapped_query if key is query else key.transpose(0, 1)
    return swapped_query, swapped_key, swapped_key if value is key else value.transpose(0, 1)


def score_mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor, key: Tensor, heads: int, added_keys: int
) -> Tensor | None:
    """Combine both masks of `nn.MultiheadAttention` into one that is added to the scores.

    Args:
        attn_mask: `[t, s]` or `[n * g, t, s]`; True hides a key from a query, a float is added to the score.
        key_padding_mask: `[n, s]`; True hides a key from all queries, a float is added to the scores.
        query: `[n, t, *]`.
        key: `[n, s, *]`.
        heads: `g`.
        added_keys: number of keys that will be appended to those of the input, visible to every query.

    Returns:
        A mask that broadcasts over `[n, g, t, s + added_keys]`; None if there are no masks.

    Raises:
        ValueError: a mask has another shape.
    """
    (n, t), s = query.shape[:2], key.shape[1]
    total = None
    if attn_mask is not None:
        _expect_shape("attn_mask", attn_mask, (t, s), (n * heads, t, s))
        total = _additive(attn_mask, query.dtype)
        total = total if total.dim() == 2 else total.reshape(n, heads, t, s)
    if key_padding_mask is not None:
        _expect_shape("key_padding_mask", key_padding_mask, (n, s))
        padding = _additive(key_padding_mask, query.dtype)[:, None, None]
        total = padding if total is None else total + padding
    return None if total is None else F.pad(total, (0, added_keys))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: Tensor | float,
    is_causal: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """`softmax(q k^T / sqrt(d) + mask) v`, by a fused kernel if the attention weights are not needed.

    Args:
        q: `[n, g, t, d]`.
        k: `[n, g, s, d]`.
        v: `[n, g, s, d]`.
        mask: added to the scores, or None.
        dropout: the probability that an attention weight is zeroed; `[n]` for one of each example, without a kernel.
        is_causal: hide later keys; only with `need_weights=False` and without a mask.
        need_weights: return the attention weights too.

    Returns:
        The output `[n, g, t, d]`, and the attention weights `[n, g, t, s]` or None.
    """
    by_example = isinstance(dropout, Tensor) and dropout.dim() > 0
    if not need_weights and not by_example:
        return F.scaled_dot_product_attention(q, k, v, mask, float(dropout), is_causal), None
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    if is_causal:
        mask = torch.full_like(scores[0, 0], -math.inf).triu(1)
    weights = (scores if mask is None else scores + mask).softmax(-1)
    weights = functional.dropout(weights, dropout) if by_example else F.dropout(weights, float(dropout))
    return weights @ v, weights if need_weights else None


def _expect_shape(name: str, mask: Tensor, *shapes: tuple[int, ...]) -> None:
    if tuple(mask.shape) not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"Expected {name} of shape {wanted}, got {list(mask.shape)}.")


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a boolean mask into one that is added: -inf where it is True. A float mask is returned unchanged."""
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
