"""Pure functions of dual tensors: a primal and its tangent, for the linearised predictions of Delta-STN.

Tangents are constants: no gradient passes through them; see `respond`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def parts(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Primal and tangent, the latter a constant; None where there is no tangent."""
    primal, tangent = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
    return primal, None if tangent is None else tangent.detach()


def with_tangent(primal: Tensor, tangent: Tensor | None) -> Tensor:
    """A dual tensor, in a dual level; without a tangent it is `primal` itself.

    Args:
        primal: a tensor without a tangent.
        tangent: broadcasts to the shape of `primal`.
    """
    if tangent is None:
        return primal
    tangent = tangent.detach().to(primal.dtype).expand(primal.shape).contiguous()
    dual: Tensor = forward_ad.make_dual(primal, tangent)  # type: ignore[no-untyped-call]
    return dual


def respond(output: Tensor, moved: Tensor | None, response: Tensor, *, fresh: bool) -> Tensor:
    """A dual tensor of `output` and `moved + response`, with the gradient of `output` handed to `response` as well.

    The gradient of a loss at the first-order prediction `f + J dw` in the response `dw` is `J^T dL`: what the backward
    pass through the base network computes for weights, and nothing of it passes through tangents.

    Args:
        output: of the base network.
        moved: its tangent, from the tangents of its inputs, which is overwritten; None for none.
        response: what the response adds to that; broadcasts with `output`.
        fresh: whether `output` is nobody else's, so that it can be marked as changed, and changed in place behind.
    """
    if output.shape != response.shape:
        shape = torch.broadcast_shapes(output.shape, response.shape)  # type: ignore[no-untyped-call]
        fresh = fresh and output.shape == shape
        # Contiguous, since torch copies into the parts of a dual tensor, which an expanded view forbids.
        output, response = output.expand(shape).contiguous(), response.expand(shape)
    response = response.to(output.dtype)
    # In place, since fresh memory costs as much as the sum.
    tangent = response.detach() if moved is None else moved.add_(response.detach())
    return with_tangent(share_gradient(output, response, fresh=fresh), tangent)


def share_gradient(output: Tensor, response: Tensor, *, fresh: bool) -> Tensor:
    """`output`, whose gradient is that of `response` as well; both of one shape and one precision."""
    shared: Tensor = _ShareGradient.apply(output, response, fresh)
    return shared


class _ShareGradient(torch.autograd.Function):
    """The first input, with the gradient of a sum."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, response: Tensor, fresh: bool) -> Tensor:
        if fresh:
            ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, grad, None


def apply_linear(function: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """`function(input)`, for a linear function that torch has no forward-mode rule for."""
    primal, moved = parts(input)
    output = function(primal)
    if moved is None:
        return output
    with torch.no_grad():
        moved = function(moved)
    return with_tangent(output, moved)


def apply_symmetric(function: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """`function(input)` with its tangent, for a function whose Jacobian is symmetric, as that of a normalisation is.

    For such a function the backward pass computes the forward-mode derivative too, and torch has it in fused kernels,
    where its rules of forward mode are many small steps.
    """
    primal, moved = parts(input)
    if moved is None:
        return function(primal)
    with torch.enable_grad():
        leaf = primal if primal.requires_grad else primal.detach().requires_grad_()
        output = function(leaf)
    (tangent,) = torch.autograd.grad(output, leaf, moved.to(output.dtype), retain_graph=True)
    return with_tangent(output if leaf is primal else output.detach(), tangent)


def has_tangent(tensor: Tensor) -> bool:
    """Whether the tensor has a tangent."""
    return parts(tensor)[1] is not None


def linear_prediction(tensor: Tensor) -> Tensor:
    """Primal and tangent in one sum, without a tangent any more: the first-order prediction. See `respond`."""
    primal, tangent = parts(tensor)
    return primal if tangent is None else primal + tangent
