"""Recurrences over time, their gradients and their tangents.

What does not wait for the step before is computed for all steps at once: slopes, products with the response, gradients
of weights. The loops over time hold one product and a few elementwise operations a step.

Index alphabet: `t` time, `n` example, `i` input and `o` output feature. A *drive* is all that enters a cell from
outside at a time step, `[n, d]`; the product with the previous output adds to its last columns.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

State = tuple[Tensor, ...]
"""`(h, c)` of an LSTM, `(h,)` of a GRU."""

Add = Callable[[Tensor | None], Tensor | None]
"""Adds something to a tensor; None stands for zero."""


class Product(NamedTuple):
    """`W x + g_n * (R x)`.

    Args:
        weight: `W`, `[o, i]`.
        response: `R`, `[o, i]`; None where the weight does not respond.
        gates: `g`, `[n, o]`; None where the weight does not respond.
    """

    weight: Tensor
    response: Tensor | None = None
    gates: Tensor | None = None

    def cast(self) -> "Product":
        """In the precision that autocast asks for."""
        kind = self.weight.device.type
        if not torch.is_autocast_enabled(kind) or self.weight.dtype == torch.float64:
            return self
        short = torch.get_autocast_dtype(kind)
        response = None if self.response is None else self.response.to(short)
        return Product(self.weight.to(short), response, self.gates)

    @property
    def factors(self) -> tuple[Tensor, Tensor | None]:
        """Both weights in one matrix, so that they take one product, and the gates."""
        return self.weight if self.response is None else torch.cat([self.weight, self.response]), self.gates


Factors = tuple[Tensor, Tensor | None]
"""A product's weights, the response's below the base's, `[o, i]` or `[2 o, i]`, and its gates."""


def _push(
    factors: Factors, input: Tensor, start: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """`start + W x + g * (R x)`, in the input's precision, and `R x` where there is one.

    The first is fresh, or in `out`, which wants a `start`.
    """
    weights, gates = factors
    if gates is None and start is not None and start.dtype == input.dtype == weights.dtype:
        return torch.addmm(start, input, weights.t(), out=out), None
    output = F.linear(input.to(weights.dtype), weights).to(input.dtype)
    response = None
    if gates is not None:
        output, response = output.chunk(2, -1)
        output = torch.addcmul(output, gates.to(output.dtype), response)
    return output if start is None else torch.add(output, start, out=out), response


def _transpose(factors: Factors) -> Factors:
    """The weights `[i, o]`, laid out for `_pull`."""
    return factors[0].t().contiguous(), factors[1]


def _pull(transposed: Factors, grad: Tensor) -> Tensor:
    """From the gradient in `W x + g * (R x)` to that in `x`."""
    weights, gates = transposed
    if gates is not None:
        grad = torch.cat([grad, grad * gates.to(grad.dtype)], -1)
    return F.linear(grad.to(weights.dtype), weights).to(grad.dtype)


class Slopes(NamedTuple):
    """Derivatives of a cell at all time steps.

    Args:
        drive: of the state in the drive, `[t, n, d]`: a column acts on the part of the state that it enters.
        carry: of the part that is carried along in itself, `[t, n, o]`.
        output: of the LSTM's output in its cell's state, `[t, n, o]`.
    """

    drive: Tensor
    carry: Tensor
    output: Tensor | None = None

    def steps(self) -> list["Slopes"]:
        """One by one."""
        outputs = [None] * len(self.drive) if self.output is None else self.output.unbind(0)
        return [Slopes(*parts) for parts in zip(self.drive.unbind(0), self.carry.unbind(0), outputs, strict=True)]


class LSTMCell:
    """`c' = sigmoid(f) c + sigmoid(i) tanh(g)` and `h' = sigmoid(o) tanh(c')`, as documented for `nn.LSTM`."""

    @staticmethod
    def drive(projected: Tensor, add: Add) -> Tensor:
        """What comes from the input, `[t, n, 4 o]`, and what is added to the product with the previous output."""
        drive = add(projected)
        assert drive is not None
        return drive

    @staticmethod
    def step(drive: Tensor, factors: Factors, state: State, out: Tensor) -> tuple[State, Tensor | None]:
        """The next state, and `R h`; in `out`, shaped as the drive, what the slopes are computed from."""
        h, c = state
        units, response = _push(factors, h, drive, out)
        i, f, g, o = units.chunk(4, -1)
        units[:, : 2 * c.shape[-1]].sigmoid_()
        g.tanh_()
        o.sigmoid_()
        c = torch.addcmul(i * g, f, c)
        return (o * c.tanh(), c), response

    @staticmethod
    def slopes(units: Tensor, before: State, after: State) -> Slopes:
        """At all time steps, from the activations `i, f, g, o` and the states before and after each step."""
        i, f, g, o = units.chunk(4, -1)
        squashed = after[1].tanh()
        # All sigmoids' slopes, s (1 - s), in one pass, then in place.
        drive = torch.addcmul(units, units, units, value=-1)
        for_i, for_f, for_g, for_o = drive.chunk(4, -1)
        for_i.mul_(g)
        for_f.mul_(before[1])
        torch.addcmul(i, i, g * g, value=-1, out=for_g)
        for_o.mul_(squashed)
        return Slopes(drive, f, torch.addcmul(o, o, squashed * squashed, value=-1))

    @staticmethod
    def push(slopes: Slopes, drive: Tensor, factors: Factors, state: State) -> State:
        """A step's derivative in direction of `drive` and `state`."""
        h, c = state
        moved = _push(factors, h, drive)[0].mul_(slopes.drive).view(len(c), 4, c.shape[-1])
        c = moved[:, :3].sum(1).addcmul_(slopes.carry, c)
        assert slopes.output is not None
        return torch.addcmul(moved[:, 3], slopes.output, c), c

    @staticmethod
    def pull(slopes: Slopes, factors: Factors, grad: State, out: Tensor) -> State:
        """A step's gradient in the state before, from that in the state behind it; in `out` that in the drive."""
        h, c = grad
        assert slopes.output is not None
        c = torch.addcmul(c, slopes.output, h)
        gates, columns = (part.view(len(c), 4, c.shape[-1]) for part in (slopes.drive, out))
        torch.mul(gates[:, :3], c.unsqueeze(1), out=columns[:, :3])
        torch.mul(gates[:, 3], h, out=columns[:, 3])
        return _pull(factors, out), slopes.carry * c


class GRUCell:
    """`h' = (1 - z) n + z h` with `n = tanh(n_x + r n_h)`, `r, z` sigmoids, as documented for `nn.GRU`.

    Its drive has the columns `n_x, r, z, n_h`.
    """

    @staticmethod
    def drive(projected: Tensor, add: Add) -> Tensor:
        """What comes from the input, `[t, n, 3 o]`, and what is added to the product with the previous output."""
        o = projected.shape[-1] // 3
        added = add(None)
        added = projected.new_zeros(()) if added is None else added
        added = added.expand(projected.shape)
        both = projected[..., : 2 * o] + added[..., : 2 * o]
        return torch.cat([projected[..., 2 * o :], both, added[..., 2 * o :]], -1)

    @staticmethod
    def step(drive: Tensor, factors: Factors, state: State, out: Tensor) -> tuple[State, Tensor | None]:
        """The next state, and `R h`; in `out`, shaped as the drive, what the slopes are computed from."""
        (h,) = state
        o = h.shape[-1]
        units, response = _push(factors, h, drive[:, o:])
        units[:, : 2 * o].sigmoid_()
        r, z, n_h = units.chunk(3, -1)
        n = torch.addcmul(drive[:, :o], r, n_h).tanh_()
        torch.cat([n, units], -1, out=out)
        return (torch.addcmul(n, z, h - n),), response

    @staticmethod
    def slopes(units: Tensor, before: State, after: State) -> Slopes:
        """At all time steps, from `n, r, z, n_h` and the states before each step."""
        n, r, z, n_h = units.chunk(4, -1)
        for_n = (1 - z) * (1 - n * n)
        return Slopes(torch.cat([for_n, for_n * n_h * r * (1 - r), (before[0] - n) * z * (1 - z), for_n * r], -1), z)

    @staticmethod
    def push(slopes: Slopes, drive: Tensor, factors: Factors, state: State) -> State:
        """A step's derivative in direction of `drive` and `state`."""
        (h,) = state
        o = h.shape[-1]
        moved = _push(factors, h, drive[:, o:])[0].mul_(slopes.drive[:, o:])
        new = moved.view(len(h), 3, o).sum(1).addcmul_(slopes.drive[:, :o], drive[:, :o])
        return (new.addcmul_(slopes.carry, h),)

    @staticmethod
    def pull(slopes: Slopes, factors: Factors, grad: State, out: Tensor) -> State:
        """A step's gradient in the state before, from that in the state behind it; in `out` that in the drive."""
        (h,) = grad
        gates, columns = (part.view(len(h), 4, h.shape[-1]) for part in (slopes.drive, out))
        torch.mul(gates, h.unsqueeze(1), out=columns)
        return (torch.addcmul(_pull(factors, out[:, h.shape[-1] :]), slopes.carry, h),)


Cell = type[LSTMCell] | type[GRUCell]


class Trace(NamedTuple):
    """What a run over time leaves behind.

    Args:
        states: every part of the state before the first step and after each, `[t + 1, n, *]`.
        hidden: the outputs before their projection, `[t, n, o]`; None without one.
        units: what the slopes are computed from, `[t, n, *]`; None where they have been.
        response: `R h` of the recurrent product, `[t, n, *]`; None where it does not respond.
        out_response: the same of the projection.
    """

    states: State
    hidden: Tensor | None
    units: Tensor | None
    response: Tensor | None
    out_response: Tensor | None

    @property
    def outputs(self) -> Tensor:
        """`[t, n, o]`."""
        return self.states[0][1:]

    @property
    def previous(self) -> Tensor:
        """The output before each step, `[t, n, o]`."""
        return self.states[0][:-1]

    @property
    def final(self) -> State:
        """The last state, `[n, *]` each."""
        return tuple(part[-1] for part in self.states)


def _in_full(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without autocast: every product has the precision of its weights, and all else that of the state."""

    @wraps(function)
    def run(self: Any, *args: Any) -> Any:
        kinds = {arg.device.type for arg in args if isinstance(arg, Tensor)}
        with ExitStack() as stack:
            for kind in kinds:
                stack.enter_context(torch.autocast(kind, enabled=False))
            return function(self, *args)

    return run


class Recurrence(NamedTuple):
    """One layer in one direction.

    Args:
        cell: its kind.
        recurrent: the product with the previous output.
        projection: the product that makes the output from the cell's own; None without one.
        active: `[t, n, 1]`, False where a sequence has not begun, or has ended; None where all are equally long.
    """

    cell: Cell
    recurrent: Product
    projection: Product | None
    active: Tensor | None

    def scan(self, drive: Tensor, state: State) -> tuple[Tensor, State]:
        """Outputs `[t, n, o]` and last state, `[n, *]` each, from drive `[t, n, d]` and initial state.

        Gradients lead to everything, and can be taken once.
        """
        with torch.no_grad():
            trace = self.run(drive, state)
        return self.attach(trace, None, drive, None, state)

    def attach(
        self, trace: Trace, slopes: Slopes | None, drive: Tensor, projected: Tensor | None, state: State
    ) -> tuple[Tensor, State]:
        """Outputs and last state of a run, through which gradients lead to everything, and can be taken once.

        Args:
            trace: that of the run.
            slopes: likewise; None where they are not known yet.
            drive: see `scan`.
            projected: something that has the gradient of the projections, `[t, n, o]`; None for nothing.
            state: see `scan`.
        """
        outputs, *final = _Scan.apply(
            self, trace, slopes, drive, projected, *self.recurrent, *(self.projection or [None] * 3), *state
        )
        return outputs, tuple(final)

    @_in_full
    def run(self, drive: Tensor, state: State) -> Trace:
        """The same without a graph, and with all that comes up on the way."""
        factors, out_factors = self._factors()
        states, hidden, responses, out_responses = [state], [], [], []
        units = torch.empty_like(drive)
        for t, (entering, unit) in enumerate(zip(drive.unbind(0), units.unbind(0), strict=True)):
            new, response = self.cell.step(entering, factors, state, unit)
            responses.append(response)
            if out_factors is not None:
                hidden.append(new[0])
                output, response = _push(out_factors, new[0])
                new = (output, *new[1:])
                out_responses.append(response)
            state = self._select(t, new, state)
            states.append(state)
        return Trace(
            states=tuple(torch.stack(parts) for parts in zip(*states, strict=True)),
            hidden=_stack(hidden),
            units=units,
            response=_stack(responses),
            out_response=_stack(out_responses),
        )

    def slopes(self, trace: Trace) -> Slopes:
        """The derivatives at all steps of a run."""
        before, after = (tuple(part[place] for part in trace.states) for place in (slice(-1), slice(1, None)))
        assert trace.units is not None
        return self.cell.slopes(trace.units, before, after)

    @_in_full
    def push(self, slopes: Slopes, drive: Tensor, projected: Tensor | None, state: State) -> tuple[Tensor, State]:
        """The derivative of a run in direction of drive, projections and initial state, at fixed weights.

        Args:
            slopes: those of the run.
            drive: `[t, n, d]`.
            projected: what is added to the projections, `[t, n, o]`.
            state: `[n, *]` each.

        Returns:
            Derivatives of the outputs, `[t, n, o]`, and of the last state.
        """
        factors, out_factors = self._factors()
        outputs = []
        for t, (slope, entering) in enumerate(zip(slopes.steps(), drive.unbind(0), strict=True)):
            new = self.cell.push(slope, entering, factors, state)
            if out_factors is not None:
                new = (_push(out_factors, new[0], None if projected is None else projected[t])[0], *new[1:])
            state = self._select(t, new, state)
            outputs.append(state[0])
        return torch.stack(outputs), state

    @_in_full
    def pull(self, slopes: Slopes, for_outputs: Tensor, grad: State) -> tuple[Tensor, Tensor | None, State]:
        """The transpose of `push`: gradients in drive, projections and state from those in outputs and last state."""
        factors, out_factors = (None if part is None else _transpose(part) for part in self._factors())
        assert factors is not None
        for_drive = torch.empty_like(slopes.drive)
        for_projected = None if out_factors is None else torch.empty_like(for_outputs)
        for t, slope in reversed(list(enumerate(slopes.steps()))):
            grad = arrived = (grad[0] + for_outputs[t], *grad[1:])
            if self.active is not None:
                grad = tuple(part.where(self.active[t], 0) for part in arrived)
            if for_projected is not None and out_factors is not None:
                for_projected[t] = grad[0]
                grad = (_pull(out_factors, grad[0]), *grad[1:])
            grad = self.cell.pull(slope, factors, grad, for_drive[t])
            if self.active is not None:
                passed = (part.where(~self.active[t], 0) for part in arrived)
                grad = tuple(new + old for new, old in zip(grad, passed, strict=True))
        return for_drive, for_projected, grad

    def _factors(self) -> tuple[Factors, Factors | None]:
        return self.recurrent.factors, None if self.projection is None else self.projection.factors

    def _select(self, t: int, new: State, old: State) -> State:
        """The new state, or the old one where a sequence has not begun, or has ended."""
        if self.active is None:
            return new
        return tuple(torch.where(self.active[t], *parts) for parts in zip(new, old, strict=True))


def _stack(parts: Sequence[Tensor | None]) -> Tensor | None:
    """All steps of something in one tensor; None where there is none."""
    present = [part for part in parts if part is not None]
    return torch.stack(present) if present else None


def _once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse second derivatives; torch's own `once_differentiable` lets gradients in chosen tensors be wrong."""

    @wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():  # under create_graph=True
            raise RuntimeError(
                "A recurrent layer is differentiated with create_graph=True, but like torch's fused ones it has no "
                "second derivative; leave it plain with convert(exclude=...), or do without a gradient of a gradient."
            )
        return backward(ctx, *grads)

    return checked


class _Scan(torch.autograd.Function):
    """A run with all its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        recurrence: Recurrence,
        trace: Trace,
        slopes: Slopes | None,
        drive: Tensor,
        projected: Tensor | None,
        *rest: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.cell = recurrence.cell
        if slopes is not None:
            trace = trace._replace(units=None)  # done with
        ctx.save_for_backward(recurrence.active, *rest[:6], *(slopes or [None] * 3), *trace[1:], *trace.states)
        # Copies, since autograd forbids to work in place on a view that a function returns.
        return trace.outputs.clone(), *(part.clone() for part in trace.final)

    @staticmethod
    @_once
    def backward(ctx: Any, for_outputs: Tensor, *for_state: Tensor) -> tuple[Tensor | None, ...]:
        active, *products = ctx.saved_tensors[:7]
        trace = Trace(ctx.saved_tensors[14:], *ctx.saved_tensors[10:14])
        recurrence = _recurrence(ctx.cell, products, active)
        slopes = Slopes(*ctx.saved_tensors[7:10]) if trace.units is None else recurrence.slopes(trace)
        for_drive, for_projected, for_initial = recurrence.pull(slopes, for_outputs, for_state)
        needed, units = ctx.needs_input_grad[5:11], len(recurrence.recurrent.weight)
        grads = _gradients(recurrence.recurrent, needed[:3], for_drive[..., -units:], trace.previous, trace.response)
        if recurrence.projection is not None and for_projected is not None and trace.hidden is not None:
            grads += _gradients(recurrence.projection, needed[3:], for_projected, trace.hidden, trace.out_response)
        else:
            grads += [None] * 3
        return None, None, None, for_drive, for_projected if ctx.needs_input_grad[4] else None, *grads, *for_initial


def _recurrence(cell: Cell, products: Sequence[Any], active: Tensor | None) -> Recurrence:
    projection = None if products[3] is None else Product(*products[3:])
    return Recurrence(cell, Product(*products[:3]), projection, active)


def _gradients(
    product: Product, needed: Sequence[bool], grad: Tensor, inputs: Tensor, responses: Tensor | None
) -> list[Tensor | None]:
    """Gradients in `W`, `R` and `g` of the products of all time steps, where they are needed."""
    weight, response, gates = product
    for_weight = _outer(grad, inputs, weight) if needed[0] else None
    for_response = for_gates = None
    if response is not None and gates is not None and responses is not None:
        for_response = _outer(grad * gates.to(grad.dtype), inputs, response) if needed[1] else None
        for_gates = (grad * responses).sum(0).to(gates.dtype) if needed[2] else None
    return [for_weight, for_response, for_gates]


def _outer(grad: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a weight, in its precision."""
    # In this order: the other one is slower by half on a CPU, for widths that are no multiple of its vectors.
    return (inputs.flatten(0, -2).to(weight.dtype).t() @ grad.flatten(0, -2).to(weight.dtype)).t()


def add_response(start: Tensor, product: Product, input: Tensor) -> Tensor:
    """`start + g * (R x)` at all time steps, `[t, n, o]`; gradients lead to all of it, and can be taken once.

    Args:
        start: broadcasts with the result.
        product: one that responds.
        input: `x`, `[t, n, i]`.
    """
    added: Tensor = _Response.apply(start, *product.cast(), input)
    return added


class _Response(torch.autograd.Function):
    """The same, with `_gradients`."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, weight: Tensor, response: Tensor, gates: Tensor, input: Tensor) -> Tensor:
        product = F.linear(input, response)
        ctx.shape = start.shape
        ctx.save_for_backward(weight, response, gates, input, product)
        return torch.addcmul(start, gates, product)

    @staticmethod
    @_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *product, input, responses = ctx.saved_tensors
        grads = _gradients(Product(*product), [False, *ctx.needs_input_grad[2:4]], grad, input, responses)
        for_input = None
        if ctx.needs_input_grad[4]:
            _, response, gates = product
            for_input = _pull(_transpose((response, None)), grad * gates)
        return grad.sum_to_size(ctx.shape), *grads, for_input
