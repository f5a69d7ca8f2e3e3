"""Response layers of `nn.LSTM` and `nn.GRU`."""

import functools
import math
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lightning_stn import dual, functional
from lightning_stn.layers.cells import Cell, GRUCell, LSTMCell, ReluCell, State, TanhCell
from lightning_stn.layers.dropout import InnerDropout
from lightning_stn.layers.product import Affine, Product, add_present
from lightning_stn.layers.recurrence import Recurrence
from lightning_stn.layers.registry import register_response


class _ResponseRNN(InnerDropout, nn.RNNBase):
    """A recurrent layer whose weights and biases respond to the hyperparameters.

    Every parameter of every layer and direction, projections included, is `W(h) = W + diag(V h) R`, with a gate on each
    entry of its first dimension, where the units of all of the cell's gates lie side by side, MacKay et al. (2019),
    arXiv:1903.03088, section 3.2. Options, call signature and return values are those of the torch layer.

    A sample of one row runs torch's fused kernels on effective weights. A row per example, and every linearised pass,
    runs a loop over time in Python, with one matrix product and a few elementwise operations a step. The loop has first
    derivatives only, like the fused kernels.

    Shape:
        input `[t, n, i]`, or `[n, t, i]` with `batch_first`, or a `PackedSequence`; bound sample `[n, h]`, or `[1, h]`
        to share it, in unconstrained units; initial states and results as those of the torch layer. An input without a
        batch dimension needs a sample of one row.

    Subclasses define `plain_type`, `cell` and `state_sizes`.
    """

    per_example = True
    cell: ClassVar[type[Cell]]
    """Cell of the loop over time."""

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        """Weights that a hook computes from other parameters cannot respond."""
        if not layer._parameters.keys() >= set(layer._flat_weights_names):  # type: ignore[arg-type]
            return "its weights are computed from other parameters, as by weight_norm; remove that"
        return super().refusal(layer)

    def reset_parameters(self) -> None:
        """Redraw the base parameters; the response keeps its values."""
        # The method of torch would fill all parameters of the module, gates included.
        self._fill(getattr(self, name) for name in self._flat_weights_names)

    def draw_response(self) -> None:
        """Draw every `R` as torch draws the base parameters."""
        self._fill(self.response_weights(name) for name in self.responding)

    def _fill(self, tensors: Iterable[Tensor]) -> None:
        """Draw every entry from the uniform distribution on `+-1/sqrt(hidden_size)`."""
        bound = 1 / math.sqrt(self.hidden_size)
        with torch.no_grad():
            for tensor in tensors:
                tensor.uniform_(-bound, bound)

    def forward_shared(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        """Run torch's kernels on the effective parameters."""
        flat = [getattr(self, name) for name in self._flat_weights_names]
        if not torch.is_grad_enabled():
            flat = [
                _like_trained(*pair)
                for pair in zip(flat, map(self.base_parameter, self._flat_weights_names), strict=True)
            ]
        # Private names of nn.RNNBase, the same in torch 2.6 to 2.14: the list that `forward` reads, and the weak
        # references that it compares with the parameters. None in their place keeps it from rebuilding the list after
        # a functional_call.
        shadows: dict[str, Any] = {"_flat_weights": flat, "_flat_weight_refs": [None] * len(flat)}
        if torch.is_grad_enabled() and not self.training:
            # cuDNN has a backward in training mode only; without dropout both modes compute the same.
            shadows.update(training=True, dropout=0.0)
        with self.shadowed(shadows):
            return super().forward_shared(input, hx)

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """Number of features of each part of the state."""
        raise NotImplementedError

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        """Compute at the bound sample; see `ResponseLayer.forward`."""
        # The fused kernels have no forward-mode derivative, so a linearised pass takes the loop over time.
        if self._hyperparameters is not None and self._linear:
            sample = self._hyperparameters.bound_sample()
            if len(sample) == 1:
                with self.reading_base():
                    return self.forward_per_example(sample.expand(self._batch(input) or 1, -1), input, hx)
        return super().forward(input, hx)

    def forward_per_example(self, sample: Tensor, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        """Run the loop over time, with products of base and response gated by example and unit.

        Raises:
            ValueError: the sample does not have one row for each sequence of the batch.
        """
        if self._batch(input) != len(sample):
            raise self.rows_error(sample, input)
        data, batch_sizes = (input.data, input.batch_sizes) if isinstance(input, PackedSequence) else (input, None)
        if hx is None:
            directions = self.num_layers * (1 + self.bidirectional)
            hx = self._as_torch(tuple(data.new_zeros(directions, len(sample), size) for size in self.state_sizes))
        self.check_forward_args(data, hx, batch_sizes)
        output, state = self._run(sample, input, (hx,) if isinstance(hx, Tensor) else tuple(hx))
        return output, self._as_torch(state)

    @staticmethod
    def _as_torch(state: State) -> Any:
        """The state as the torch layer takes and returns it: a tuple for the LSTM, a tensor for the others."""
        return state if len(state) > 1 else state[0]

    def _batch(self, input: Tensor | PackedSequence) -> int | None:
        """Number of sequences; None for an input without a batch dimension."""
        if isinstance(input, PackedSequence):
            return int(input.batch_sizes[0])
        return input.shape[0 if self.batch_first else 1] if input.dim() == 3 else None

    def _run(self, sample: Tensor, input: Tensor | PackedSequence, state: State) -> tuple[Any, State]:
        """Convert the input to `[t, n, i]`, run all layers, and convert the output to the layout of the input."""
        if isinstance(input, PackedSequence):
            steps, lengths = pad_packed_sequence(input)
            active = torch.arange(len(steps))[:, None] < lengths
            output, state = self._layers(sample, steps, state, active.unsqueeze(-1).to(steps.device))
            return _pack_like(input, output, lengths), state
        output, state = self._layers(sample, input.transpose(0, 1) if self.batch_first else input, state, None)
        # Contiguous, for fast products in the layers that follow.
        return output.transpose(0, 1).contiguous() if self.batch_first else output, state

    def _layers(self, sample: Tensor, input: Tensor, initial: State, active: Tensor | None) -> tuple[Tensor, State]:
        """Run all layers and directions.

        Args:
            sample: `[n, h]`.
            input: `[t, n, i]`.
            initial: `[layers * directions, n, *]` each.
            active: `[t, n, 1]`, False where a sequence has ended; None where all are equally long.

        Returns:
            Output of the last layer, `[t, n, directions * p]`, and last states, shaped as the initial ones.
        """
        finals: list[State] = []
        for layer in range(self.num_layers):
            if layer:
                input = _drop(input, self.rate_of_call())
            outputs = []
            for suffix in ("", "_reverse") if self.bidirectional else ("",):
                state = tuple(part[len(finals)] for part in initial)
                output, state = self._scan(f"l{layer}{suffix}", sample, input, state, active)
                outputs.append(output)
                finals.append(state)
            input = torch.cat(outputs, -1)
        return input, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))

    def _scan(
        self, place: str, sample: Tensor, input: Tensor, state: State, active: Tensor | None
    ) -> tuple[Tensor, State]:
        """Run one layer in one direction; `place` is the suffix of its parameters, such as `l0` or `l0_reverse`."""
        if place.endswith("_reverse"):
            active = None if active is None else active.flip(0)
            output, state = self._scan_forward(place, sample, input.flip(0), state, active)
            return output.flip(0), state
        result: tuple[Tensor, State] = self._scan_forward(place, sample, input, state, active)
        return result

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _scan_forward(
        self, place: str, sample: Tensor, input: Tensor, state: State, active: Tensor | None
    ) -> tuple[Tensor, State]:
        """Run one layer from the first row of the input to the last."""
        outer, recurrent = self._affine(f"ih_{place}", sample), self._affine(f"hh_{place}", sample)
        projection = self._affine(f"hr_{place}", sample) if self.proj_size else None
        input = input.contiguous()  # Torch multiplies other layouts in one product for each example.
        if self._linear:
            return self._scan_linearised(outer, recurrent, projection, input, state, active)
        pre_activations = self.cell.pre_activations(
            outer.apply(input), lambda start: add_present(start, add_present(recurrent.bias, recurrent.shift))
        )
        pre_activations, state = _promote(pre_activations, *state)
        projecting = None if projection is None else projection.product.cast()
        return Recurrence(self.cell, recurrent.product.cast(), projecting, active).scan(pre_activations, state)

    def _scan_linearised(
        self,
        outer: Affine,
        recurrent: Affine,
        projection: Affine | None,
        input: Tensor,
        state: State,
        active: Tensor | None,
    ) -> tuple[Tensor, State]:
        """Run the base weights, with the first-order change by the response as the tangent of the results.

        The tangent is the jvp in the direction of the response of this layer and of the tangents of its inputs. The
        response gets the gradient of the pre-activations and projected outputs that it adds to; see `dual.respond`.
        """
        projecting = None if projection is None else projection.base().cast()
        recurrence = Recurrence(self.cell, recurrent.base().cast(), projecting, active)
        (input, input_tangent), states = dual.parts(input), [dual.parts(part) for part in state]
        projected = F.linear(input, outer.product.weight, outer.bias)
        pre_activations, state = _promote(
            self.cell.pre_activations(projected, lambda start: add_present(start, recurrent.bias)),
            *(primal for primal, _ in states),
        )
        with torch.no_grad():
            trace = recurrence.forward(pre_activations, state)
            derivatives = recurrence.local_derivatives(trace)
        input_response = outer.respond(input.detach())
        response = self.cell.pre_activations(
            (projected.new_zeros(()) if input_response is None else input_response).expand(projected.shape),
            lambda start: recurrent.respond(trace.previous, start),
        )
        projection_response = None
        if projection is not None and trace.hidden is not None:
            projection_response = projection.respond(trace.hidden)
        with torch.no_grad():
            tangent = response
            if input_tangent is not None:
                moved = F.linear(input_tangent, outer.product.weight)
                tangent = self.cell.pre_activations(moved, lambda start: start).add_(response)
            tangent, state_tangents = _promote(tangent, *(_tangent_or_zeros(*parts) for parts in states))
            output_tangents, final_tangents = recurrence.jvp(derivatives, tangent, projection_response, state_tangents)
        pre_activations = dual.share_gradient(pre_activations, response, may_modify=False)
        outputs, final = recurrence.with_gradients(trace, derivatives, pre_activations, projection_response, state)
        final = tuple(dual.with_tangent(*pair) for pair in zip(final, final_tangents, strict=True))
        return dual.with_tangent(outputs, output_tangents), final

    def _affine(self, place: str, sample: Tensor) -> Affine:
        """The product with `weight_<place>`, plus `bias_<place>` where there is one, with their responses."""
        weight, bias = f"weight_{place}", f"bias_{place}"
        base, offset = self._detach_frozen(getattr(self, weight)), self._detach_frozen(getattr(self, bias, None))
        response = gates = shift = None
        if weight in self.responding:
            response, gates = self._detach_frozen(self.response_weights(weight)), self.gated(weight, sample)
        if bias in self.responding:
            shift = self.gated(bias, sample) * self._detach_frozen(self.response_weights(bias))
        return Affine(Product(base, response, gates), offset, shift)

    def _detach_frozen(self, parameter: Any) -> Any:
        """The parameter, detached where the weights are held fixed."""
        return parameter.detach() if self._frozen and parameter is not None else parameter

    def rows_error(self, sample: Tensor, input: Tensor | PackedSequence) -> functional.RowsError:
        """The error for a sample whose rows do not match the sequences of the batch."""
        got = f"shape {list(input.shape)}" if isinstance(input, Tensor) else f"{self._batch(input)} packed sequences"
        return functional.RowsError(
            f"{type(self).__name__}: expected a batch of sequences, one for each of the sample's {len(sample)} rows, "
            f"as dimension {0 if self.batch_first else 1} of the input (batch_first={self.batch_first}), got {got}; "
            "bring the input to that layout, or share one row over the batch with STNCallback(perturb='batch')."
        )


def _drop(input: Tensor, rate: Tensor | float) -> Tensor:
    """Dropout of `[t, n, i]` at one rate, or at a rate of each example, `[n]`."""
    if isinstance(rate, Tensor) and rate.dim():
        return functional.dropout(input.transpose(0, 1), rate).transpose(0, 1)
    return F.dropout(input, float(rate))


def _like_trained(tensor: Tensor, base: Tensor) -> Tensor:
    """An effective parameter without a graph that says whether its base trains.

    Torch's CPU kernels sum in another order where no weight requires a gradient. Inside transforms of torch.func, which
    forbid `requires_grad_`, the last bit may differ.
    """
    if tensor is base or tensor.requires_grad or not base.requires_grad:
        return tensor
    with suppress(RuntimeError):
        return tensor.detach().requires_grad_()
    return tensor


def _promote(pre_activations: Tensor, *state: Tensor) -> tuple[Tensor, State]:
    """Pre-activations and state in one precision, the highest among them."""
    dtype = functools.reduce(torch.promote_types, [part.dtype for part in state], pre_activations.dtype)
    return pre_activations.to(dtype), tuple(part.to(dtype) for part in state)


def _tangent_or_zeros(primal: Tensor, tangent: Tensor | None) -> Tensor:
    return torch.zeros_like(primal) if tangent is None else tangent


def _pack_like(packed: PackedSequence, output: Tensor, lengths: Tensor) -> PackedSequence:
    """Pack the output in the layout of `packed`.

    Args:
        packed: gives batch sizes and order of the examples.
        output: `[t, n, *]`, with the examples in their order before packing.
        lengths: those of the sequences, `[n]`, in the same order.
    """
    order = packed.sorted_indices
    if order is not None:
        output, lengths = output.index_select(1, order), lengths[order.to(lengths.device)]
    data = dual.apply_linear(lambda steps: pack_padded_sequence(steps, lengths).data, output)
    return PackedSequence(data, packed.batch_sizes, order, packed.unsorted_indices)


@register_response(nn.LSTM)
class ResponseLSTM(_ResponseRNN, nn.LSTM):
    """`nn.LSTM` whose weights and biases respond to the hyperparameters; see `ResponseLayer`."""

    plain_type = nn.LSTM
    cell = LSTMCell

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """Number of features of the output `h` and of the cell state `c`."""
        return self.proj_size or self.hidden_size, self.hidden_size


@register_response(nn.GRU)
class ResponseGRU(_ResponseRNN, nn.GRU):
    """`nn.GRU` whose weights and biases respond to the hyperparameters; see `ResponseLayer`."""

    plain_type = nn.GRU
    cell = GRUCell

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """Number of features of the output `h`."""
        return (self.hidden_size,)


@register_response(nn.RNN)
class ResponseRNN(_ResponseRNN, nn.RNN):
    """`nn.RNN` whose weights and biases respond to the hyperparameters; see `ResponseLayer`."""

    plain_type = nn.RNN

    @property
    def cell(self) -> type[Cell]:  # type: ignore[override]
        """The cell of the layer's nonlinearity."""
        return ReluCell if self.nonlinearity == "relu" else TanhCell

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """Number of features of the output `h`."""
        return (self.hidden_size,)
