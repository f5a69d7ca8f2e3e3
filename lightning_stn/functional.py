"""Pure tensor functions of the method.

Index alphabet of this package: `n` example, `h` hyperparameter, `i`/`o` input/output feature, `t` time, `g` group.
A *sample* has shape `[n, h]`, one row per example, or `[1, h]`, one row that the mini-batch shares.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def perturb(unconstrained: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """`h = lambda + sigma * eps`, MacKay et al. (2019), arXiv:1903.03088, section 3.3.

    Args:
        unconstrained: `lambda`, `[h]`, unconstrained units.
        scale: `sigma`, `[h]`, standard deviation in unconstrained units.
        noise: `eps`, standard normal, `[n, h]`.

    Returns:
        The sample, `[n, h]`, in unconstrained units.
    """
    return torch.addcmul(unconstrained, scale, noise)


def entropy(scale: Tensor) -> Tensor:
    """Entropy of the perturbation, `sum_h log(sigma_h sqrt(2 pi e))`, in nats.

    Args:
        scale: `sigma`, `[h]`, positive.

    Returns:
        A scalar.
    """
    return scale.log().sum() + 0.5 * scale.numel() * math.log(2 * math.pi * math.e)


def choice_probabilities(unconstrained: Tensor, scale: Tensor) -> Tensor:
    """How probably each perturbed logit is the largest, `p_c = integral of prod_{d != c} F_d(t) dF_c(t)`.

    `F_c` is the distribution function of `N(lambda_c, sigma_c^2)`. Gauss-Legendre quadrature between the quantiles of
    all of them is exact to 1e-6 however much the scales differ.

    Args:
        unconstrained: the logits `lambda`, `[c]`.
        scale: their perturbation scales `sigma`, `[c]`.

    Returns:
        `[c]`, float64.

    >>> choice_probabilities(torch.tensor([1.0, 0.0, 0.0]), torch.full((3,), 0.5))
    tensor([0.8658, 0.0671, 0.0671], dtype=torch.float64)
    """
    centre, width = unconstrained.double().unsqueeze(-1), scale.double().unsqueeze(-1)
    edges = torch.linspace(-8, 8, 65, dtype=torch.float64, device=centre.device)
    edges = (centre + width * edges).flatten().sort().values.unsqueeze(-1)
    nodes = edges.new_tensor([-math.sqrt(0.6), 0.0, math.sqrt(0.6)]) / 2 + 0.5
    points = (edges[:-1] + edges.diff(dim=0) * nodes).flatten()
    weights = (edges.diff(dim=0) * edges.new_tensor([5.0, 8.0, 5.0]) / 18).flatten()
    z = (points - centre) / width
    density = (-z.square() / 2).exp() / (width * math.sqrt(2 * math.pi))
    below = torch.special.ndtr(z)
    others = torch.stack([torch.cat([below[:c], below[c + 1 :]]).prod(0) for c in range(len(below))])
    return (weights * density * others).sum(-1)


def gate(sample: Tensor, gates: Tensor) -> Tensor:
    """`V h_n` for every row of the sample: `[n, h]` and `[o, h]` give `[n, o]`, in the gates' own precision."""
    # Autocast would round `h`, whose small steps are the hyperparameters' movement.
    with torch.autocast(gates.device.type, enabled=False):
        return F.linear(sample.to(gates.dtype), gates)


def merge(base: Tensor, response: Tensor, gated: Tensor) -> Tensor:
    """Effective parameter `W + diag(V h) R` of one row, MacKay et al. (2019), section 3.2.

    Args:
        base: `W`, `[o, ...]`.
        response: `R`, the shape of `base`.
        gated: `V h`, in a shape that broadcasts over `base`.

    Returns:
        The effective parameter, the shape of `base`.
    """
    if torch.compiler.is_compiling():
        return torch.addcmul(base, response, gated)  # the compiler fuses the passes of backward by itself
    merged: Tensor = _Merge.apply(base, response, gated)
    return merged


class _Merge(torch.autograd.Function):
    """`base + response * gated`, with fewer passes over the weights in backward than autograd takes by itself.

    The base's gradient is the effective parameter's own, and the gate's needs no product of the size of the weights.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(base: Tensor, response: Tensor, gated: Tensor) -> Tensor:
        return torch.addcmul(base, response, gated)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def jvp(ctx: Any, base: Tensor | None, response: Tensor | None, gated: Tensor | None) -> Tensor:
        saved_response, saved_gated = ctx.saved_tensors
        terms = [] if base is None else [base]
        terms += [] if response is None else [response * saved_gated]
        terms += [] if gated is None else [saved_response * gated]
        return sum(terms[1:], start=terms[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        response, gated = ctx.saved_tensors
        for_response = grad * gated if ctx.needs_input_grad[1] else None
        for_gate = sum_product(grad, response, gated.shape) if ctx.needs_input_grad[2] else None
        return grad, for_response, for_gate


def sum_product(a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    """`a * b`, of equal shapes, summed to a shape that broadcasts over both."""
    if a.dim() > 1 and shape.numel() == a.shape[0] == shape[0]:
        # Row by row, without writing the product down.
        return torch.bmm(a.flatten(1).unsqueeze(1), b.flatten(1).unsqueeze(2)).reshape(shape)
    return (a * b).sum_to_size(shape)


def carry_gradient(
    output: Tensor,
    gated: Tensor | None,
    bias: Tensor | None,
    input: Tensor,
    response: Tensor,
    product: Callable[[Tensor, Tensor], Tensor],
    dim: int,
) -> Tensor:
    """Let the gradient of a merged layer's output reach its gate and its bias, past the weights.

    In `y = (W + diag(V h) R) x + b` the gate has the gradient `sum(g * (R x))` over all dimensions but its own. With
    the weights held fixed that is one forward product, where the way through the effective weights is a weight
    gradient. The bias comes along since torch's convolutions on a CPU compute both gradients for the sake of one.

    Args:
        output: `y`, computed with weights and bias that require no gradient; it is returned, marked as changed.
        gated: `V h`, `[o]`; None where the weight does not respond.
        bias: `b`, `[o]`; None for none.
        input: `x`.
        response: `R`.
        product: computes `R x` from `x` and `R`.
        dim: the dimension of `output` that `o` indexes, counted from the end.

    Returns:
        `output`, through which `gated` and `bias` get their gradients.
    """
    carried: Tensor = _CarryGradient.apply(output, gated, bias, input.detach(), response.detach(), product, dim)
    return carried


class FrozenWeightsError(RuntimeError):
    """A gradient is asked for that leads through weights held fixed."""


class _CarryGradient(torch.autograd.Function):
    """The identity on `output`, in place, so that the layers behind may work in place as well."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        gated: Tensor | None,
        bias: Tensor | None,
        input: Tensor,
        response: Tensor,
        product: Any,
        dim: int,
    ) -> Tensor:
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(input, response)
        ctx.product, ctx.dim = product, dim
        kind = output.device.type
        ctx.autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # under create_graph=True
            raise FrozenWeightsError(
                "This loss differentiates the network, so that its own gradient leads through the weights, but they "
                "are held fixed here; bind the sample with frozen=False."
            )
        for_gate = for_bias = None
        if ctx.needs_input_grad[1]:
            with ctx.autocast:
                for_gate = _sum_but(ctx.dim, grad * ctx.product(*ctx.saved_tensors))
        if ctx.needs_input_grad[2]:
            for_bias = _sum_but(ctx.dim, grad)
        return grad, for_gate, for_bias, None, None, None, None


def _sum_but(dim: int, tensor: Tensor) -> Tensor:
    """The sum over all dimensions but one, in float32 at least."""
    tensor = tensor.unsqueeze(0)  # torch takes an empty list of dimensions for all of them
    dims = [other for other in range(-tensor.dim(), 0) if other != dim]
    return tensor.sum(dims, dtype=torch.float32 if tensor.dtype.itemsize < 4 else None)


def align(rows: Tensor, like: Tensor, channel_dim: int | None = None) -> Tensor:
    """Reshape per-example quantities so that they broadcast against `like` over the batch, and over nothing else.

    Args:
        rows: a scalar, `[n]`, or with `channel_dim` `[n, o]`.
        like: `[n, ...]`, the tensor to be multiplied.
        channel_dim: the dimension of `like` that `o` indexes.

    Returns:
        `rows` as a view with as many dimensions as `like`, with `channel_dim` in its precision; unchanged where it is a
        scalar.

    Raises:
        ValueError: there is not exactly one row for each example of `like`.
    """
    if rows.dim() == 0:
        return rows
    if like.dim() == 0 or rows.shape[0] != like.shape[0]:
        raise ValueError(
            f"Expected one row per example, got {rows.shape[0]} rows for an input of shape {list(like.shape)}; "
            "keep the batch as the first dimension, or share one row over the batch (perturb='batch')."
        )
    shape = [rows.shape[0]] + [1] * (like.dim() - 1)
    if channel_dim is not None:
        shape[channel_dim] = rows.shape[1]
        rows = rows.to(like.dtype)  # Under autocast the output stays as short as the product that it belongs to.
    return rows.reshape(shape)


def keep_mask(shape: Sequence[int], rate: Tensor | float, device: torch.device) -> Tensor:
    """Inverted dropout's factors: 0 with probability `rate`, otherwise `1 / (1 - rate)`.

    Args:
        shape: one draw for each entry.
        rate: probability of a zero, broadcast over `shape`.
        device: where to draw.

    Returns:
        `shape`, float32.
    """
    # Drawn in float32: half precision has too few distinct uniform numbers for small rates.
    keep = 1 - torch.as_tensor(rate, device=device, dtype=torch.float32)
    # In place, since fresh memory and the step from bool to float cost more than the draw.
    return (
        torch.rand(shape, dtype=torch.float32, device=device)
        .lt_(keep)
        .div_(keep.clamp_min(torch.finfo(torch.float32).tiny))
    )


def dropout(input: Tensor, rate: Tensor | float, shared: Collection[int] = ()) -> Tensor:
    """Inverted dropout whose rate may differ from example to example.

    Args:
        input: `[n, ...]`.
        rate: probability of a zero: a number, a scalar tensor, or `[n]`.
        shared: dimensions that share one draw (none: every element has its own; the last two of images: whole
            channels).

    Returns:
        `input * mask / (1 - rate)`; zeros where the rate is 1.
    """
    alone = {dim % input.dim() for dim in shared}
    shape = [1 if dim in alone else size for dim, size in enumerate(input.shape)]
    return input * keep_mask(shape, align(torch.as_tensor(rate), input), input.device).to(input.dtype)


SELU_SATURATION = -1.0507009873554805 * 1.6732632423543772
"""The value that SELU approaches for large negative input, Klambauer et al. (2017), arXiv:1706.02515."""


def alpha_dropout(input: Tensor, rate: Tensor | float) -> Tensor:
    """Dropout to SELU's saturation value that keeps mean 0 and variance 1, Klambauer et al. (2017), section 3.

    Args:
        input: `[n, ...]`.
        rate: probability that an entry is replaced: a number, a scalar tensor, or `[n]`.

    Returns:
        `a (input or saturation) + b` with `a = (q + saturation^2 q (1 - q))^-1/2`, `b = -a (1 - q) saturation` and
        `q = 1 - rate`; zeros where the rate is 1.
    """
    rate = align(torch.as_tensor(rate, device=input.device, dtype=torch.float32), input)
    keep = 1 - rate
    kept = torch.rand(input.shape, device=input.device, dtype=torch.float32) < keep
    scale = torch.where(keep > 0, (keep * (1 + rate * SELU_SATURATION**2)).rsqrt(), torch.zeros_like(keep))
    shift = -scale * rate * SELU_SATURATION
    replaced = torch.where(kept, input, SELU_SATURATION)
    return (replaced * scale + shift).to(input.dtype)
