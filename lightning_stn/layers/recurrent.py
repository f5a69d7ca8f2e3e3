"""The responses of the LSTM and the GRU."""

import functools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lightning_stn import dual
from lightning_stn.layers.base import ResponseLayer
from lightning_stn.layers.recurrence import Cell, GRUCell, LSTMCell, Product, Recurrence, State, add_response
from lightning_stn.layers.registry import register_response


class _Affine(NamedTuple):
    """`W x + b + (V h_n) * (R x) + (C h_n) * r`.

    Args:
        product: `W`, `R` and `V h_n`.
        bias: `b`, `[o]`; None without one.
        shift: `(C h_n) * r`, `[n, o]`; None where the bias does not respond.
    """

    product: Product
    bias: Tensor | None
    shift: Tensor | None

    def apply(self, input: Tensor) -> Tensor:
        """`[t, n, i]` to `[t, n, o]`."""
        output = self.respond(input, F.linear(input, self.product.weight, self.bias))
        assert output is not None
        return output

    def base(self) -> Product:
        """The product without the response."""
        return Product(self.product.weight)

    def respond(self, input: Tensor, start: Tensor | None = None) -> Tensor | None:
        """`start + (V h_n) * (R x) + (C h_n) * r`; None where there is none of them."""
        start = _sum(start, self.shift)
        if self.product.response is None:
            return start
        return add_response(input.new_zeros(()) if start is None else start, self.product, input)


def _sum(*terms: Tensor | None) -> Tensor | None:
    """Of those that there are; None where there are none."""
    present = [term for term in terms if term is not None]
    return functools.reduce(torch.add, present) if present else None


class _ResponseRNN(ResponseLayer, nn.RNNBase):
    """A recurrent layer whose weights and biases respond to the hyperparameters.

    Every parameter of every layer and direction, projections included, is `W(h) = W + diag(V h) R`, gated by its first
    dimension (the units of all of the cell's gates side by side), MacKay et al. (2019), arXiv:1903.03088, section 3.2.
    Every option of torch's layer is kept, and so are its ways to call it and what it returns.

    A sample of one row runs torch's fused kernels on effective parameters. With a row per example, and in a
    linearised pass, the sequence is run through in Python, with one product and a few elementwise operations a step; it
    can then be differentiated once, as with the fused kernels.

    Shape:
        input `[t, n, i]`, or `[n, t, i]` with `batch_first`, or a `PackedSequence`; bound sample `[n, h]`, or `[1, h]`
        to share it, in unconstrained units; initial states and results as torch's. An input without a batch dimension
        needs a sample of one row.

    A family gives `plain`, `cell` and `state_sizes`.
    """

    per_example = True
    cell: ClassVar[Cell]

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        """Weights that are computed from other parameters, by a hook, cannot be found."""
        if not layer._parameters.keys() >= set(layer._flat_weights_names):  # type: ignore[arg-type]
            return "its weights are computed from other parameters; use torch.nn.utils.parametrizations instead"
        return super().refusal(layer)

    def reset_parameters(self) -> None:
        """Redraw the layer's own parameters, and leave the response as it is."""
        # Torch's own would fill whatever the module holds, gates included.
        self._fill(getattr(self, name) for name in self._flat_weights_names)

    def reset_response(self) -> None:
        """Draw every `R` as torch draws the layer's own parameters."""
        self._fill(self.response(name) for name in self.responding)

    def _fill(self, tensors: Iterable[Tensor]) -> None:
        """Uniform in `+-1/sqrt(hidden_size)`."""
        bound = 1 / math.sqrt(self.hidden_size)
        with torch.no_grad():
            for tensor in tensors:
                tensor.uniform_(-bound, bound)

    @contextmanager
    def shadowed(self, parameters: dict[str, Any]) -> Iterator[None]:
        """Let torch's `forward` run on these tensors instead of the parameters."""
        flat = [parameters.get(name, getattr(self, name)) for name in self._flat_weights_names]
        if not torch.is_grad_enabled():
            # Torch's CPU kernels add up in another order where no weight asks for a gradient. Inside the transforms of
            # torch.func, which forbid to ask for one, the last bit may differ.
            with suppress(RuntimeError):
                for name, tensor in parameters.items():
                    tensor.requires_grad_(getattr(self, name).requires_grad)
        # Private names of nn.RNNBase, the same in torch 2.4 to 2.14: what `forward` reads, and the weak references
        # that it compares with the parameters; without them it would fill the list anew after a functional_call.
        shadows: dict[str, Any] = {"_flat_weights": flat, "_flat_weight_refs": [None] * len(flat)}
        if torch.is_grad_enabled() and not self.training:
            # cuDNN has a backward in training mode only; without dropout the two modes compute the same.
            shadows.update(training=True, dropout=0.0)
        own = {name: self.__dict__[name] for name in shadows}
        self.__dict__.update(shadows)
        try:
            yield
        finally:
            self.__dict__.update(own)

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """Width of each part of the state."""
        raise NotImplementedError

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        """Compute at the bound sample; torch's fused kernels have no forward-mode derivative."""
        if self._hyperparameters is not None and self._linear:
            sample = self._hyperparameters.bound_sample()
            if len(sample) == 1:
                return self.forward_per_example(sample.expand(self._batch(input) or 1, -1), input, hx)
        return super().forward(input, hx)

    def forward_per_example(self, sample: Tensor, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        """Unroll over time, base and response products side by side, gated by example and unit.

        Raises:
            ValueError: there is not one row for each sequence of the batch.
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
        """The state as torch's layer takes and returns it: that of a GRU bare."""
        return state if len(state) > 1 else state[0]

    def _batch(self, input: Tensor | PackedSequence) -> int | None:
        """The number of sequences; None for an input without a batch dimension."""
        if isinstance(input, PackedSequence):
            return int(input.batch_sizes[0])
        return input.shape[0 if self.batch_first else 1] if input.dim() == 3 else None

    def _run(self, sample: Tensor, input: Tensor | PackedSequence, state: State) -> tuple[Any, State]:
        """Bring any layout of the input to `[t, n, i]`, and the output back."""
        if isinstance(input, PackedSequence):
            steps, lengths = pad_packed_sequence(input)
            active = torch.arange(len(steps))[:, None] < lengths
            output, state = self._layers(sample, steps, state, active.unsqueeze(-1).to(steps.device))
            return _pack_like(input, output, lengths), state
        output, state = self._layers(sample, input.transpose(0, 1) if self.batch_first else input, state, None)
        # Contiguous, for the sake of products with it.
        return output.transpose(0, 1).contiguous() if self.batch_first else output, state

    def _layers(self, sample: Tensor, input: Tensor, initial: State, active: Tensor | None) -> tuple[Tensor, State]:
        """All layers and directions.

        Args:
            sample: `[n, h]`.
            input: `[t, n, i]`.
            initial: `[layers * directions, n, *]` each.
            active: `[t, n, 1]`, False where a sequence has not begun, or has ended; None where all are equally long.
        """
        finals: list[State] = []
        for layer in range(self.num_layers):
            if layer:
                input = F.dropout(input, self.dropout, self.training)
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
        """One layer in one direction, called `l0` or `l0_reverse`, and so on."""
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
        outer, inner = self._affine(f"ih_{place}", sample), self._affine(f"hh_{place}", sample)
        out = self._affine(f"hr_{place}", sample) if self.proj_size else None
        input = input.contiguous()  # Torch takes products of other layouts batch by batch.
        if self._linear:
            return self._scan_tangents(outer, inner, out, input, state, active)
        drive = self.cell.drive(outer.apply(input), lambda start: _sum(start, _sum(inner.bias, inner.shift)))
        recurrence = Recurrence(self.cell, inner.product.cast(), None if out is None else out.product.cast(), active)
        drive, state = _alike(drive, *state)
        return recurrence.scan(drive, state)

    def _scan_tangents(
        self, outer: _Affine, inner: _Affine, out: _Affine | None, input: Tensor, state: State, active: Tensor | None
    ) -> tuple[Tensor, State]:
        """The run at the base weights, and its tangents."""
        projection = None if out is None else out.base().cast()
        recurrence = Recurrence(self.cell, inner.base().cast(), projection, active)
        (input, moved), states = dual.parts(input), [dual.parts(part) for part in state]
        projected = F.linear(input, outer.product.weight, outer.bias)
        drive, state = _alike(
            self.cell.drive(projected, lambda start: _sum(start, inner.bias)), *(primal for primal, _ in states)
        )
        with torch.no_grad():
            trace = recurrence.run(drive, state)
            slopes = recurrence.slopes(trace)
            moved = None if moved is None else F.linear(moved, outer.product.weight)
        # What the response adds to drive and projections, and the same with what comes from the layers before.
        response = outer.respond(input.detach())
        own = self.cell.drive(
            (projected.new_zeros(()) if response is None else response).expand(projected.shape),
            lambda start: inner.respond(trace.previous, start),
        )
        own_projected = None if out is None else out.respond(trace.hidden)
        with torch.no_grad():
            push = own if moved is None else self.cell.drive(moved, lambda start: start).add_(own)
            push, directions = _alike(
                push, *(torch.zeros_like(primal) if tangent is None else tangent for primal, tangent in states)
            )
            tangents, final_tangents = recurrence.push(slopes, push, own_projected, directions)
        drive = dual.share_gradient(drive, own, may_modify=False)
        outputs, final = recurrence.attach(trace, slopes, drive, own_projected, state)
        final = tuple(dual.with_tangent(*pair) for pair in zip(final, final_tangents, strict=True))
        return dual.with_tangent(outputs, tangents), final

    def _affine(self, place: str, sample: Tensor) -> _Affine:
        """The product with `weight_<place>`, with its bias where there is one."""
        weight, bias = f"weight_{place}", f"bias_{place}"
        base, offset = self._fixed(getattr(self, weight)), self._fixed(getattr(self, bias, None))
        response = gates = shift = None
        if weight in self.responding:
            response, gates = self._fixed(self.response(weight)), self.gated(weight, sample)
        if bias in self.responding:
            shift = self.gated(bias, sample) * self._fixed(self.response(bias))
        return _Affine(Product(base, response, gates), offset, shift)

    def _fixed(self, parameter: Any) -> Any:
        """A parameter, without its gradient where the weights are held fixed."""
        return parameter.detach() if self._frozen and parameter is not None else parameter

    def rows_error(self, sample: Tensor, input: Tensor | PackedSequence) -> ValueError:
        """The error for a sample whose rows do not match the sequences of the batch."""
        got = f"shape {list(input.shape)}" if isinstance(input, Tensor) else f"{self._batch(input)} packed sequences"
        return ValueError(
            f"{type(self).__name__}: expected a batch of sequences, one for each of the sample's {len(sample)} rows, "
            f"as dimension {0 if self.batch_first else 1} of the input (batch_first={self.batch_first}), got {got}; "
            "bring the input to that layout, or share one row over the batch with STNCallback(perturb='batch')."
        )


def _alike(drive: Tensor, *state: Tensor) -> tuple[Tensor, State]:
    """Drive and state in one precision, the higher of theirs."""
    kind = functools.reduce(torch.promote_types, [part.dtype for part in state], drive.dtype)
    return drive.to(kind), tuple(part.to(kind) for part in state)


def _pack_like(packed: PackedSequence, output: Tensor, lengths: Tensor) -> PackedSequence:
    """Pack `[t, n, o]`, with the examples in their original order, as the input was packed."""
    order = packed.sorted_indices
    if order is not None:
        output, lengths = output.index_select(1, order), lengths[order.to(lengths.device)]
    data = dual.apply_linear(lambda steps: pack_padded_sequence(steps, lengths).data, output)
    return PackedSequence(data, packed.batch_sizes, order, packed.unsorted_indices)


@register_response(nn.LSTM)
class ResponseLSTM(_ResponseRNN, nn.LSTM):
    """`nn.LSTM` whose weights and biases respond to the hyperparameters; see `ResponseLayer`."""

    plain = nn.LSTM
    cell = LSTMCell

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """Width of the output and of the cell's state."""
        return self.proj_size or self.hidden_size, self.hidden_size


@register_response(nn.GRU)
class ResponseGRU(_ResponseRNN, nn.GRU):
    """`nn.GRU` whose weights and biases respond to the hyperparameters; see `ResponseLayer`."""

    plain = nn.GRU
    cell = GRUCell

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """Width of the output."""
        return (self.hidden_size,)
