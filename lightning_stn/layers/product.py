"""Products with base and response weights, `W x + g_n * (R x)`, and their derivatives.

A sequence is `[t, n, i]`, in the package's index alphabet. Products inside a loop over time stack `W` and `R` in one
matrix; the gradients of weights and gates are computed for all time steps at once.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Product(NamedTuple):
    """`W x + g_n * (R x)`.

    Args:
        weight: `W`, `[o, i]`.
        response: `R`, `[o, i]`; None where the weight does not respond.
        gates: `g = V h_n`, `[n, o]`; None where the weight does not respond.
    """

    weight: Tensor
    response: Tensor | None = None
    gates: Tensor | None = None

    def cast(self) -> "Product":
        """The product in the precision of autocast; unchanged without autocast and for float64 weights."""
        kind = self.weight.device.type
        if not torch.is_autocast_enabled(kind) or self.weight.dtype == torch.float64:
            return self
        dtype = torch.get_autocast_dtype(kind)
        response = None if self.response is None else self.response.to(dtype)
        return Product(self.weight.to(dtype), response, self.gates)

    def stack(self) -> "Stacked":
        """The product with both weights in one matrix."""
        return Stacked(self.weight if self.response is None else torch.cat([self.weight, self.response]), self.gates)

    def gradients(
        self, needed: Sequence[bool], grad: Tensor, inputs: Tensor, responses: Tensor | None
    ) -> list[Tensor | None]:
        """Gradients in `W`, `R` and `g`, summed over time; None for those that are not needed.

        Args:
            needed: which of the three gradients to compute.
            grad: gradient in the product, `[t, n, o]`.
            inputs: `x`, `[t, n, i]`.
            responses: `R x`, `[t, n, o]`; None where the weight does not respond.
        """
        weight_grad = _weight_gradient(grad, inputs, self.weight) if needed[0] else None
        response_grad = gates_grad = None
        if self.response is not None and self.gates is not None and responses is not None:
            if needed[1]:
                response_grad = _weight_gradient(grad * self.gates.to(grad.dtype), inputs, self.response)
            if needed[2]:
                gates_grad = (grad * responses).sum(0).to(self.gates.dtype)
        return [weight_grad, response_grad, gates_grad]


def _weight_gradient(grad: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
    """`sum_tn grad_o x_i`, `[o, i]`, in the precision of the weight."""
    # (x^T grad)^T, since grad^T x is slower on a CPU where a width is no multiple of the vector length.
    return (inputs.flatten(0, -2).to(weight.dtype).t() @ grad.flatten(0, -2).to(weight.dtype)).t()


class Stacked(NamedTuple):
    """`W x + g_n * (R x)` with `R` below `W` in one matrix, so that one matrix product computes `W x` and `R x`.

    Args:
        weights: `[2 o, i]`, or `W` alone, `[o, i]`, where the weight does not respond.
        gates: `g`, `[n, o]`; None where the weight does not respond.
    """

    weights: Tensor
    gates: Tensor | None

    def apply(
        self, input: Tensor, start: Tensor | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`start + W x + g_n * (R x)` and `R x`, in the precision of the input.

        Linear in `x` and `start`, so it computes the jvp as well, from their tangents.

        Args:
            input: `x`, `[n, i]`.
            start: `[n, o]`; None for zero.
            out: receives the sum, `[n, o]`; needs a `start`. Without it the sum is a new tensor.

        Returns:
            The sum, and `R x`, `[n, o]`, which is None where the weight does not respond.
        """
        weights, gates = self
        if gates is None and start is not None and start.dtype == input.dtype == weights.dtype:
            return torch.addmm(start, input, weights.t(), out=out), None
        output = F.linear(input.to(weights.dtype), weights).to(input.dtype)
        response = None
        if gates is not None:
            output, response = output.chunk(2, -1)
            output = torch.addcmul(output, gates.to(output.dtype), response)
        return output if start is None else torch.add(output, start, out=out), response

    def transpose(self) -> "Transposed":
        """The transpose of the product, with the matrix copied into the layout that a loop over time reads fastest."""
        return Transposed(self.weights.t().contiguous(), self.gates)


class Transposed(NamedTuple):
    """The transpose of a product, `y` to `W^T y + R^T (g_n * y)`.

    Args:
        weights: `[i, 2 o]`, or `W^T` alone, `[i, o]`, where the weight does not respond.
        gates: `g`, `[n, o]`; None where the weight does not respond.
    """

    weights: Tensor
    gates: Tensor | None

    def vjp(self, grad: Tensor) -> Tensor:
        """Gradient in `x`, `[n, i]`, from the gradient in `W x + g_n * (R x)`, `[n, o]`."""
        weights, gates = self
        if gates is not None:
            grad = torch.cat([grad, grad * gates.to(grad.dtype)], -1)
        return F.linear(grad.to(weights.dtype), weights).to(grad.dtype)


class Affine(NamedTuple):
    """`W x + b + (V h_n) * (R x) + (C h_n) * r`.

    Args:
        product: `W`, `R` and `V h_n`.
        bias: `b`, `[o]`; None without a bias.
        shift: `(C h_n) * r`, `[n, o]`; None where the bias does not respond.
    """

    product: Product
    bias: Tensor | None
    shift: Tensor | None

    def apply(self, input: Tensor) -> Tensor:
        """`W x + b + (V h_n) * (R x) + (C h_n) * r`, `[t, n, o]`, of `x`, `[t, n, i]`."""
        output = self.respond(input, F.linear(input, self.product.weight, self.bias))
        assert output is not None
        return output

    def base(self) -> Product:
        """`W x`, the product without the response."""
        return Product(self.product.weight)

    def respond(self, input: Tensor, start: Tensor | None = None) -> Tensor | None:
        """`start + (V h_n) * (R x) + (C h_n) * r`; None where there is neither a start nor a response."""
        start = add_present(start, self.shift)
        if self.product.response is None:
            return start
        return gated_product(input.new_zeros(()) if start is None else start, self.product, input)


def add_present(*terms: Tensor | None) -> Tensor | None:
    """Sum of the terms that are not None; None where all of them are."""
    present = [term for term in terms if term is not None]
    return functools.reduce(torch.add, present) if present else None


def gated_product(start: Tensor, product: Product, input: Tensor) -> Tensor:
    """`start + g_n * (R x)`, `[t, n, o]`, with the product `R x` in the precision of autocast.

    The result has first derivatives only.

    Args:
        start: broadcasts with the result.
        product: a product with a response.
        input: `x`, `[t, n, i]`.
    """
    output: Tensor = _GatedProduct.apply(start, *product.cast(), input)
    return output


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for the backward of an autograd function without a second derivative: asking for one raises.

    `torch.autograd.function.once_differentiable` raises only where the incoming gradient requires a gradient. Elsewhere
    it returns constants, and a second derivative would silently be wrong.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():  # under create_graph=True
            raise RuntimeError(
                "Expected create_graph=False, got True: a recurrent response layer has no second derivative, like "
                "torch's fused recurrent layers; leave the layer plain with convert(exclude=...), or remove the "
                "gradient of a gradient from the loss."
            )
        return backward(ctx, *grads)

    return checked


class _GatedProduct(torch.autograd.Function):
    """`start + g_n * (R x)`, whose backward uses `Product.gradients`."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, weight: Tensor, response: Tensor, gates: Tensor, input: Tensor) -> Tensor:
        responses = F.linear(input, response)
        ctx.shape = start.shape
        ctx.save_for_backward(weight, response, gates, input, responses)
        return torch.addcmul(start, gates, responses)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *product, input, responses = ctx.saved_tensors
        grads = Product(*product).gradients([False, *ctx.needs_input_grad[2:4]], grad, input, responses)
        input_grad = None
        if ctx.needs_input_grad[4]:
            _, response, gates = product
            input_grad = Stacked(response, None).transpose().vjp(grad * gates)
        return grad.sum_to_size(ctx.shape), *grads, input_grad
