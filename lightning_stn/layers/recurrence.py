"""The loop of a recurrent layer over time: forward, jvp, vjp and the autograd function that joins them.

The loops hold one matrix product and a few elementwise operations a step. Everything that does not depend on the
previous step is computed for all steps at once: local derivatives, products with the response, gradients of weights.
Shapes use the letters of `lightning_stn.layers.cells`.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_stn.layers.cells import Cell, LocalDerivatives, State
from lightning_stn.layers.product import Product, Stacked, first_order


class Trace(NamedTuple):
    """Results of a forward pass, and the intermediates that its vjp and jvp need.

    Args:
        states: every part of the state before the first step and after each step, `[t + 1, n, *]`.
        hidden: outputs of the cell before the projection, `[t, n, o]`; None without a projection.
        activations: the tensor that the cell computes its local derivatives from, `[t, n, d]`; None where the local
            derivatives are known already.
        recurrent_response: `R h` of the recurrent product, `[t, n, *]`; None where its weight does not respond.
        projection_response: `R h` of the projection, `[t, n, p]`; None where its weight does not respond.
    """

    states: State
    hidden: Tensor | None
    activations: Tensor | None
    recurrent_response: Tensor | None
    projection_response: Tensor | None

    @property
    def outputs(self) -> Tensor:
        """The output of each step, `[t, n, p]`."""
        return self.states[0][1:]

    @property
    def previous(self) -> Tensor:
        """The output before each step, `[t, n, p]`."""
        return self.states[0][:-1]

    @property
    def final(self) -> State:
        """The last state, `[n, *]` each."""
        return tuple(part[-1] for part in self.states)


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: products run in the precision of their weights, and everything else in that of the state."""

    @wraps(function)
    def run(self: Any, *args: Any) -> Any:
        kinds = {arg.device.type for arg in args if isinstance(arg, Tensor)}
        with ExitStack() as stack:
            for kind in kinds:
                stack.enter_context(torch.autocast(kind, enabled=False))
            return function(self, *args)

    return run


class Recurrence(NamedTuple):
    """One layer of a recurrent network in one direction.

    Args:
        cell: the cell of each step.
        recurrent: the product with the previous output.
        projection: the product that gives the output from the cell's `h`; None without a projection.
        active: `[t, n, 1]`, False before a sequence begins and after it ends; None where all are equally long.
    """

    cell: type[Cell]
    recurrent: Product
    projection: Product | None
    active: Tensor | None

    def scan(self, pre_activations: Tensor, state: State) -> tuple[Tensor, State]:
        """Outputs and last state, with first derivatives in every argument, weight and gate.

        Args:
            pre_activations: those without the recurrent product, `[t, n, d]`; see `Cell`.
            state: the initial state, `[n, *]` each.

        Returns:
            Outputs, `[t, n, p]`, and last state, `[n, *]` each.
        """
        with torch.no_grad():
            trace = self.forward(pre_activations, state)
        return self.with_gradients(trace, None, pre_activations, None, state)

    def with_gradients(
        self,
        trace: Trace,
        derivatives: LocalDerivatives | None,
        pre_activations: Tensor,
        projection_tangent: Tensor | None,
        state: State,
    ) -> tuple[Tensor, State]:
        """Outputs and last state of a finished forward pass, with first derivatives in all that they depend on.

        Args:
            trace: that of the forward pass.
            derivatives: those of the forward pass; None to compute them in backward.
            pre_activations: see `scan`.
            projection_tangent: the tangent that the response adds to the projected outputs, `[t, n, p]`, which gets
                their gradient; None for zero.
            state: see `scan`.
        """
        outputs, *final = _Scan.apply(
            self,
            trace,
            derivatives,
            pre_activations,
            projection_tangent,
            *self.recurrent,
            *(self.projection or [None] * 3),
            *state,
        )
        return outputs, tuple(final)

    @_without_autocast
    def forward(self, pre_activations: Tensor, state: State) -> Trace:
        """Forward pass without autograd; also returns the intermediates that backward needs. See `scan`."""
        recurrent, projection = self._stack()
        states, hidden, responses, projection_responses = [state], [], [], []
        activations = torch.empty_like(pre_activations)
        for t, (entering, out) in enumerate(zip(pre_activations.unbind(0), activations.unbind(0), strict=True)):
            new, response = self.cell.step(entering, recurrent, state, out)
            responses.append(response)
            if projection is not None:
                hidden.append(new[0])
                output, response = projection.apply(new[0])
                new = (output, *new[1:])
                projection_responses.append(response)
            state = self._select(t, new, state)
            states.append(state)
        return Trace(
            states=tuple(torch.stack(parts) for parts in zip(*states, strict=True)),
            hidden=_stack_steps(hidden),
            activations=activations,
            recurrent_response=_stack_steps(responses),
            projection_response=_stack_steps(projection_responses),
        )

    def local_derivatives(self, trace: Trace) -> LocalDerivatives:
        """Local derivatives of the cell at all steps of a forward pass."""
        before, after = (tuple(part[steps] for part in trace.states) for steps in (slice(-1), slice(1, None)))
        assert trace.activations is not None
        return self.cell.local_derivatives(trace.activations, before, after)

    @_without_autocast
    def jvp(
        self, derivatives: LocalDerivatives, tangent: Tensor, projection_tangent: Tensor | None, state: State
    ) -> tuple[Tensor, State]:
        """Tangents of outputs and last state, for weights and gates without a tangent.

        Args:
            derivatives: those of the forward pass.
            tangent: that of the pre-activations without the recurrent product, `[t, n, d]`.
            projection_tangent: added to the tangents of the projected outputs, `[t, n, p]`; None for zero.
            state: tangents of the initial state, `[n, *]` each.

        Returns:
            Tangents of the outputs, `[t, n, p]`, and of the last state, `[n, *]` each.
        """
        recurrent, projection = self._stack()
        outputs = []
        for t, (step, entering) in enumerate(zip(derivatives.steps(), tangent.unbind(0), strict=True)):
            new = self.cell.jvp(step, entering, recurrent, state)
            if projection is not None:
                start = None if projection_tangent is None else projection_tangent[t]
                new = (projection.apply(new[0], start)[0], *new[1:])
            state = self._select(t, new, state)
            outputs.append(state[0])
        return torch.stack(outputs), state

    @_without_autocast
    def vjp(
        self, derivatives: LocalDerivatives, output_grads: Tensor, grad: State
    ) -> tuple[Tensor, Tensor | None, State]:
        """Transpose of `jvp`.

        Args:
            derivatives: those of the forward pass.
            output_grads: gradient in the outputs, `[t, n, p]`.
            grad: gradient in the last state, `[n, *]` each.

        Returns:
            Gradients in the pre-activations, `[t, n, d]`, in the projected outputs, `[t, n, p]`, None without a
            projection, and in the initial state, `[n, *]` each.
        """
        recurrent, projection = (None if part is None else part.transpose() for part in self._stack())
        assert recurrent is not None
        pre_activation_grads = torch.empty_like(derivatives.pre_activations)
        projected_grads = None if projection is None else torch.empty_like(output_grads)
        for t, step in reversed(list(enumerate(derivatives.steps()))):
            grad = incoming = (grad[0] + output_grads[t], *grad[1:])
            if self.active is not None:
                grad = tuple(part.where(self.active[t], 0) for part in incoming)
            if projected_grads is not None and projection is not None:
                projected_grads[t] = grad[0]
                grad = (projection.vjp(grad[0]), *grad[1:])
            grad = self.cell.vjp(step, recurrent, grad, pre_activation_grads[t])
            if self.active is not None:
                passed = (part.where(~self.active[t], 0) for part in incoming)
                grad = tuple(new + old for new, old in zip(grad, passed, strict=True))
        return pre_activation_grads, projected_grads, grad

    def _stack(self) -> tuple[Stacked, Stacked | None]:
        return self.recurrent.stack(), None if self.projection is None else self.projection.stack()

    def _select(self, t: int, new: State, old: State) -> State:
        """The new state where a sequence is active, the old one elsewhere."""
        if self.active is None:
            return new
        return tuple(torch.where(self.active[t], *parts) for parts in zip(new, old, strict=True))


def _stack_steps(steps: Sequence[Tensor | None]) -> Tensor | None:
    """The tensors of all steps in one, `[t, *]`; None where there are none."""
    present = [step for step in steps if step is not None]
    return torch.stack(present) if present else None


class _Scan(torch.autograd.Function):
    """Results of a forward pass, with gradients in pre-activations, weights, gates and initial state."""

    @staticmethod
    def forward(
        ctx: Any,
        recurrence: Recurrence,
        trace: Trace,
        derivatives: LocalDerivatives | None,
        pre_activations: Tensor,
        projection_tangent: Tensor | None,
        *rest: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.cell = recurrence.cell
        if derivatives is not None:
            trace = trace._replace(activations=None)  # Saves memory; only `local_derivatives` reads them.
        products = rest[:6]
        ctx.save_for_backward(recurrence.active, *products, *(derivatives or [None] * 3), *trace[1:], *trace.states)
        # Copies, since autograd forbids in-place changes of a view that a function returns.
        return trace.outputs.clone(), *(part.clone() for part in trace.final)

    @staticmethod
    @first_order
    def backward(ctx: Any, output_grads: Tensor, *state_grads: Tensor) -> tuple[Tensor | None, ...]:
        active, *saved = ctx.saved_tensors
        recurrent, projection = Product(*saved[:3]), None if saved[3] is None else Product(*saved[3:6])
        recurrence = Recurrence(ctx.cell, recurrent, projection, active)
        trace = Trace(tuple(saved[13:]), *saved[9:13])
        known = trace.activations is None
        derivatives = LocalDerivatives(*saved[6:9]) if known else recurrence.local_derivatives(trace)
        pre_activation_grads, projected_grads, initial_grads = recurrence.vjp(derivatives, output_grads, state_grads)
        needed = ctx.needs_input_grad[5:11]
        product_grads = recurrent.gradients(
            needed[:3], pre_activation_grads[..., -len(recurrent.weight) :], trace.previous, trace.recurrent_response
        )
        if projection is not None and projected_grads is not None and trace.hidden is not None:
            product_grads += projection.gradients(needed[3:], projected_grads, trace.hidden, trace.projection_response)
        else:
            product_grads += [None] * 3
        projection_grad = projected_grads if ctx.needs_input_grad[4] else None
        return None, None, None, pre_activation_grads, projection_grad, *product_grads, *initial_grads
