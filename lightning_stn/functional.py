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


class RowsError(ValueError):
    """A sample has neither one row nor a row for each example of what it acts on."""


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
    """Probability that each perturbed logit is the largest, `p_c = integral of prod_{d != c} F_d(t) dF_c(t)`.

    `F_c` is the distribution function of `N(lambda_c, sigma_c^2)`. Gauss-Legendre quadrature between quantiles of all
    these distributions gives the integral to 1e-6, however much the scales differ.

    Args:
        unconstrained: the logits `lambda`, `[c]`.
        scale: their perturbation scales `sigma`, `[c]`.

    Returns:
        The probabilities, `[c]`, float64.

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
    cdf = torch.special.ndtr(z)
    others = torch.stack([torch.cat([cdf[:c], cdf[c + 1 :]]).prod(0) for c in range(len(cdf))])
    return (weights * density * others).sum(-1)


def gate(sample: Tensor, gates: Tensor) -> Tensor:
    """Gate values `V h_n`, one row for each row of the sample.

    Args:
        sample: `h`, `[n, h]`, unconstrained units, counted from the centre of the response.
        gates: `V`, `[o, h]`.

    Returns:
        `[n, o]`, in the precision of `gates`.
    """
    return _without_autocast(F.linear, sample.to(gates.dtype), gates)


def gate_row(sample: Tensor, gates: Tensor) -> Tensor:
    """Gate values `V h` of a sample of one row, in fewer operators than `gate`.

    Args:
        sample: `h`, `[1, h]`, unconstrained units, counted from the centre of the response.
        gates: `V`, `[o, h]`.

    Returns:
        `[o]`, in the precision of `gates`.
    """
    return _without_autocast(torch.mv, gates, sample[0].to(gates.dtype))


def _without_autocast(product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """A product in full precision: autocast would round `h`, and so lose the small steps of the hyperparameters."""
    kind = a.device.type
    if not torch.is_autocast_enabled(kind):  # entering a context costs as much as the product
        return product(a, b)
    with torch.autocast(kind, enabled=False):
        return product(a, b)


def effective_parameter(base: Tensor, response: Tensor, gated: Tensor) -> Tensor:
    """Effective parameter `W + diag(V h) R` at a sample of one row, MacKay et al. (2019), section 3.2.

    Args:
        base: `W`, `[o, ...]`.
        response: `R`, the shape of `base`.
        gated: `V h`, in a shape that broadcasts over `base`.

    Returns:
        The effective parameter, the shape of `base`.
    """
    # The compiler fuses the backward pass itself, and transforms of torch.func need a slower kind of function.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return torch.addcmul(base, response, gated)
    effective: Tensor = _EffectiveParameter.apply(base, response, gated)
    return effective


class _EffectiveParameter(torch.autograd.Function):
    """`base + response * gated`, whose backward passes over the weights less often than autograd's.

    The incoming gradient is returned as the gradient of `base`, without a copy. The gradient of `gated` is computed
    without storing a product as large as the weights (see `sum_product`).
    """

    # Not in two parts, forward and setup_context: torch would match the arguments by name at every call, which costs
    # more than the kernel does on a small layer.
    @staticmethod
    def forward(ctx: Any, base: Tensor, response: Tensor, gated: Tensor) -> Tensor:
        ctx.save_for_backward(response, gated)
        ctx.save_for_forward(response, gated)
        return torch.addcmul(base, response, gated)

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


_IN_CACHE = 2**17
"""Numbers of a product that stay in the cache of a CPU core."""


def sum_product(a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    """`a * b` for tensors of equal shape, summed to `shape`, which broadcasts over both."""
    if a.dim() < 2 or not shape.numel() == a.shape[0] == shape[0]:
        return (a * b).sum_to_size(shape)
    # One dot product for each row, without storing `a * b`.
    a, b = a.flatten(1), b.flatten(1)
    if a.device.type != "cpu" or a.dtype not in (torch.float32, torch.float64):
        return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).reshape(shape)
    # On a CPU `bmm` takes rows one by one; a group of them is faster while its product stays in the cache.
    rows = max(1, _IN_CACHE // max(1, a.shape[1]))
    groups = [(a, b)] if len(a) <= rows else zip(torch.split(a, rows), torch.split(b, rows), strict=True)
    products = [torch.linalg.vecdot(*pair) for pair in groups]
    return (products[0] if len(products) == 1 else torch.cat(products)).reshape(shape)


def with_gate_gradient(
    output: Tensor,
    gated: Tensor | None,
    bias: Tensor | None,
    input: Tensor,
    response: Tensor,
    product: Callable[[Tensor, Tensor], Tensor],
    dim: int,
) -> Tensor:
    """Give gate and bias of a layer their gradients from its output, without computing a weight gradient.

    In `y = (W + diag(V h) R) x + b` the gradient of the gate value `V h` is `sum(dy * (R x))` over all dimensions
    except `o`. With fixed weights this costs one forward product; backward through the effective weight would cost a
    weight gradient. The gradient of the bias is computed here too, since torch's convolutions on a CPU compute the
    gradients of weight and bias together.

    Args:
        output: `y`, computed from weights and bias that require no gradient; autograd treats it as modified in place.
        gated: `V h`, `[o]`; None where the weight does not respond.
        bias: `b`, `[o]`; None where the bias does not respond.
        input: `x`.
        response: `R`.
        product: computes `R x` from `x` and `R`.
        dim: the dimension of `output` that `o` indexes, counted from the end.

    Returns:
        `output`, whose backward pass computes the gradients of `gated` and `bias`.
    """
    result: Tensor = _GateGradient.apply(output, gated, bias, input.detach(), response.detach(), product, dim)
    return result


class FrozenWeightsError(RuntimeError):
    """A requested gradient depends on weights that are held fixed."""


class _GateGradient(torch.autograd.Function):
    """Identity on `output`, marked as an in-place operation, so that later layers may modify the result in place."""

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
                "This loss differentiates the network with create_graph=True, so its gradient depends on the weights, "
                "which are held fixed here; bind the sample with frozen=False."
            )
        for_gate = for_bias = None
        if ctx.needs_input_grad[1]:
            with ctx.autocast:
                for_gate = _sum_except(ctx.dim, grad * ctx.product(*ctx.saved_tensors))
        if ctx.needs_input_grad[2]:
            for_bias = _sum_except(ctx.dim, grad)
        return grad, for_gate, for_bias, None, None, None, None


def _sum_except(dim: int, tensor: Tensor) -> Tensor:
    """Sum over all dimensions except `dim`, in float32 at least."""
    tensor = tensor.unsqueeze(0)  # torch reads an empty list of dimensions as all dimensions
    dims = [other for other in range(-tensor.dim(), 0) if other != dim]
    return tensor.sum(dims, dtype=torch.float32 if tensor.dtype.itemsize < 4 else None)


def align(rows: Tensor, like: Tensor, channel_dim: int | None = None) -> Tensor:
    """Reshape per-example values so that row `n` applies to example `n` of `like`.

    Args:
        rows: a scalar, `[n]`, or with `channel_dim` `[n, o]`.
        like: `[n, ...]`, the tensor to be multiplied.
        channel_dim: the dimension of `like` that `o` indexes.

    Returns:
        `rows` with as many dimensions as `like`, and with `channel_dim` also in the precision of `like`. A scalar is
        returned unchanged.

    Raises:
        RowsError: there is not exactly one row for each example of `like`.
    """
    if rows.dim() == 0:
        return rows
    if like.dim() == 0 or rows.shape[0] != like.shape[0]:
        raise RowsError(
            f"Expected one row per example, got {rows.shape[0]} rows for an input of shape {list(like.shape)}; "
            "keep the batch as the first dimension, or share one row over the batch (perturb='batch')."
        )
    shape = [rows.shape[0]] + [1] * (like.dim() - 1)
    if channel_dim is not None:
        shape[channel_dim] = rows.shape[1]
        rows = rows.to(like.dtype)  # Keeps outputs in half precision under autocast.
    return rows.reshape(shape)


def keep_mask(shape: Sequence[int], rate: Tensor | float, device: torch.device) -> Tensor:
    """Random factors of inverted dropout: 0 with probability `rate`, otherwise `1 / (1 - rate)`.

    Args:
        shape: the shape of the mask, whose entries are drawn independently.
        rate: probability of a zero, broadcast over `shape`.
        device: the device of the mask.

    Returns:
        The mask, float32.
    """
    # Drawn in float32: half precision has too few distinct uniform numbers for small rates.
    keep = 1 - torch.as_tensor(rate, device=device, dtype=torch.float32)
    # In place, since allocation and the conversion from bool to float cost more than the draw.
    return (
        torch.rand(shape, dtype=torch.float32, device=device)
        .lt_(keep)
        .div_(keep.clamp_min(torch.finfo(torch.float32).tiny))
    )


def dropout(input: Tensor, rate: Tensor | float, shared: Collection[int] = ()) -> Tensor:
    """Inverted dropout with one rate, or with a rate for each example.

    Args:
        input: `[n, ...]`.
        rate: probability of a zero: a number, a scalar tensor, or `[n]`.
        shared: dimensions along which the mask is constant. By default there are none, and every element is drawn
            independently; with the last two dimensions of images, whole channels are dropped.

    Returns:
        `input * mask / (1 - rate)`; zeros where the rate is 1.
    """
    constant = {dim % input.dim() for dim in shared}
    shape = [1 if dim in constant else size for dim, size in enumerate(input.shape)]
    return input * keep_mask(shape, align(torch.as_tensor(rate), input), input.device).to(input.dtype)


SELU_SATURATION = -1.0507009873554805 * 1.6732632423543772
"""The value that SELU approaches for large negative input, Klambauer et al. (2017), arXiv:1706.02515."""


def alpha_dropout(input: Tensor, rate: Tensor | float) -> Tensor:
    """Dropout that sets entries to SELU's saturation value and keeps mean 0 and variance 1.

    Klambauer et al. (2017), arXiv:1706.02515, section 3.

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
