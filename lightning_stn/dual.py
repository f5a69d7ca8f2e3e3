"""Pure functions of dual tensors, which are pairs of primal and tangent, for the linearised predictions of Delta-STN.

Tangents are constants: backward computes no gradient through a tangent; see `respond`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def parts(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Primal and detached tangent of a tensor; the tangent is None for a tensor without one."""
    primal, tangent = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
    return primal, None if tangent is None else tangent.detach()


def with_tangent(primal: Tensor, tangent: Tensor | None) -> Tensor:
    """The dual tensor of `primal` and `tangent`, inside `dual_level()`.

    Args:
        primal: a tensor without a tangent; returned as it is where `tangent` is None.
        tangent: broadcasts to the shape of `primal`.
    """
    if tangent is None:
        return primal
    tangent = tangent.detach().to(primal.dtype).expand(primal.shape).contiguous()
    dual: Tensor = forward_ad.make_dual(primal, tangent)  # type: ignore[no-untyped-call]
    return dual


def respond(output: Tensor, tangent: Tensor | None, response: Tensor, *, may_modify: bool) -> Tensor:
    """The dual tensor of `output` and `tangent + response`; `response` also gets the gradient of `output`.

    For a loss `L` at the first-order prediction `f + J dw`, the gradient in the response `dw` is the vjp `J^T dL`.
    The backward pass through the base network computes this vjp already, so the response takes its gradient from
    there, and none passes through tangents.

    Args:
        output: output of a layer with its base weights.
        tangent: the tangent that `output` has from the layer's input, overwritten by the sum; None for zero.
        response: the tangent that comes from the response of the layer; broadcasts with `output`.
        may_modify: no one else holds `output`, so later layers may modify it in place.
    """
    if output.shape != response.shape:
        shape = torch.broadcast_shapes(output.shape, response.shape)  # type: ignore[no-untyped-call]
        may_modify = may_modify and output.shape == shape
        # Contiguous, since torch copies into the parts of a dual tensor, which an expanded view forbids.
        output, response = output.expand(shape).contiguous(), response.expand(shape)
    response = response.to(output.dtype)
    # In place, since allocation costs as much as the sum.
    tangent = response.detach() if tangent is None else tangent.add_(response.detach())
    return with_tangent(share_gradient(output, response, may_modify=may_modify), tangent)


def share_gradient(output: Tensor, response: Tensor, *, may_modify: bool) -> Tensor:
    """`output`, whose gradient is passed to `response` as well.

    Args:
        output: a tensor without a tangent.
        response: a tensor of the same shape and precision.
        may_modify: no one else holds `output`, so later layers may modify it in place.
    """
    shared: Tensor = _ShareGradient.apply(output, response, may_modify)
    return shared


class _ShareGradient(torch.autograd.Function):
    """The first input in forward; the gradients of `output + response` in backward."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, response: Tensor, may_modify: bool) -> Tensor:
        if may_modify:
            ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        if _levels:
            raise NotImplementedError(
                "A prediction cannot be linearised where its network differentiates itself (torch.autograd.grad in its "
                "forward), since that gradient has no tangent; use DeltaSTN(linearize=False)."
            )
        return grad, grad, None


_levels: list[forward_ad.dual_level] = []
"""The levels that are open now. A list, since a backward pass may run in another thread."""


@contextmanager
def dual_level() -> Iterator[None]:
    """Inside this context tensors may have tangents, and no gradient passes through a response."""
    with forward_ad.dual_level() as level:
        _levels.append(level)
        try:
            yield
        finally:
            _levels.pop()


def apply_linear(function: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """`function(input)` with its tangent, for a linear function without a forward-mode rule in torch."""
    primal, tangent = parts(input)
    output = function(primal)
    if tangent is None:
        return output
    with torch.no_grad():
        tangent = function(tangent)
    return with_tangent(output, tangent)


def apply_symmetric(function: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """`function(input)` with its tangent, for a function with a symmetric Jacobian, such as a normalisation.

    With a symmetric Jacobian the jvp equals the vjp. Torch computes the vjp of a normalisation in a fused kernel, but
    its jvp in many small steps.
    """
    primal, input_tangent = parts(input)
    if input_tangent is None:
        return function(primal)
    with torch.enable_grad():
        leaf = primal if primal.requires_grad else primal.detach().requires_grad_()
        output = function(leaf)
    (tangent,) = torch.autograd.grad(output, leaf, input_tangent.to(output.dtype), retain_graph=True)
    return with_tangent(output if leaf is primal else output.detach(), tangent)


def has_tangent(tensor: Tensor) -> bool:
    """Whether the tensor has a tangent."""
    return parts(tensor)[1] is not None


def linear_prediction(tensor: Tensor) -> Tensor:
    """The first-order prediction, `primal + tangent`, as a tensor without a tangent; see `respond`."""
    primal, tangent = parts(tensor)
    return primal if tangent is None else primal + tangent
