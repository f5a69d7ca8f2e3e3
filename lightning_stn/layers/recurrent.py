"""The responses of the LSTM and the GRU."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lightning_stn import functional
from lightning_stn.layers.base import ResponseLayer
from lightning_stn.layers.registry import register_response

State = tuple[Tensor, ...]
"""`(h, c)` of an LSTM, `(h,)` of a GRU."""


class _Affine(NamedTuple):
    """`W x + b + (V h_n) * (R x) + (C h_n) * r`, with all that does not depend on `x` computed once for a sequence.

    Args:
        weights: `W` above `R`, `[2 o, i]`, so that both take one product; `W` alone where it does not respond.
        gates: `V h_n`, `[n, o]`; None where the weight does not respond.
        shift: `b + (C h_n) * r`, `[n, o]`; `b` alone where it does not respond; None without a bias.
        linear: whether the response is a tangent.
    """

    weights: Tensor
    gates: Tensor | None
    shift: Tensor | None
    linear: bool

    def apply(self, input: Tensor) -> Tensor:
        """`[..., n, i]` to `[..., n, o]`."""
        if self.linear and self.gates is not None:
            weights, response_weights = self.weights.chunk(2)
            response = F.linear(functional.without_tangent(input), response_weights)
            output = functional.apply_linear(lambda x: F.linear(x, weights.detach()), input)
            output = functional.with_tangent(output, self.gates * response)
        else:
            output = F.linear(input, self.weights)
            if self.gates is not None:
                base, response = output.chunk(2, -1)
                output = torch.addcmul(base, self.gates, response)
        return output if self.shift is None else output + self.shift


class _ResponseRNN(ResponseLayer, nn.RNNBase):
    """A recurrent layer whose weights and biases respond to the hyperparameters.

    Every parameter of every layer and direction, projections included, is `W(h) = W + diag(V h) R`, gated by its first
    dimension (the units of all of the cell's gates side by side), MacKay et al. (2019), arXiv:1903.03088, section 3.2.
    Every option of torch's layer is kept, and so are its ways to call it and what it returns.

    A sample of one row runs torch's fused kernels on effective parameters. A row per example unrolls the sequence in
    Python, with the input products of all time steps in one; expect it to be several times slower.

    Shape:
        input `[t, n, i]`, or `[n, t, i]` with `batch_first`, or a `PackedSequence`; bound sample `[n, h]`, or `[1, h]`
        to share it, in unconstrained units; initial states and results as torch's. An input without a batch dimension
        needs a sample of one row.

    A family gives `plain`, `state_sizes` and `cell`.
    """

    per_example = True

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

    def cell(self, projected: Tensor, recurrent: _Affine, state: State) -> State:
        """One time step of all examples.

        Args:
            projected: the input product of this step, `[n, o]`.
            recurrent: the product with the previous output.
            state: `[n, *]` each.
        """
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
        return output.transpose(0, 1) if self.batch_first else output, state

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
        projected = self._affine(f"ih_{place}", sample).apply(input).unbind(0)
        recurrent = self._affine(f"hh_{place}", sample)
        project = self._affine(f"hr_{place}", sample) if self.proj_size else None
        outputs = list(projected)
        order = range(len(outputs))
        for t in reversed(order) if place.endswith("_reverse") else order:
            new = self.cell(projected[t], recurrent, state)
            if project is not None:
                new = (project.apply(new[0]), *new[1:])
            if active is not None:
                new = tuple(torch.where(active[t], *parts) for parts in zip(new, state, strict=True))
            state, outputs[t] = new, new[0]
        return torch.stack(outputs), state

    def _affine(self, place: str, sample: Tensor) -> _Affine:
        """The product with `weight_<place>`, with its bias where there is one."""
        responding = self.responding
        name, bias_name = f"weight_{place}", f"bias_{place}"
        weights: Tensor = getattr(self, name)
        bias: Tensor | None = getattr(self, bias_name, None)
        gates = None
        if name in responding:
            weights, gates = torch.cat([weights, self.response(name)]), self.gated(name, sample)
        if bias is not None and bias_name in responding:
            bias = self.add_response(bias, self.gated(bias_name, sample), self.response(bias_name))
        return _Affine(weights, gates, bias, self._linear)

    def rows_error(self, sample: Tensor, input: Tensor | PackedSequence) -> ValueError:
        """The error for a sample whose rows do not match the sequences of the batch."""
        got = f"shape {list(input.shape)}" if isinstance(input, Tensor) else f"{self._batch(input)} packed sequences"
        return ValueError(
            f"{type(self).__name__}: expected a batch of sequences, one for each of the sample's {len(sample)} rows, "
            f"as dimension {0 if self.batch_first else 1} of the input (batch_first={self.batch_first}), got {got}; "
            "bring the input to that layout, or share one row over the batch with STNCallback(perturb='batch')."
        )


def _pack_like(packed: PackedSequence, output: Tensor, lengths: Tensor) -> PackedSequence:
    """Pack `[t, n, o]`, with the examples in their original order, as the input was packed."""
    order = packed.sorted_indices
    if order is not None:
        output, lengths = output.index_select(1, order), lengths[order.to(lengths.device)]
    data = pack_padded_sequence(output, lengths).data
    return PackedSequence(data, packed.batch_sizes, order, packed.unsorted_indices)


@register_response(nn.LSTM)
class ResponseLSTM(_ResponseRNN, nn.LSTM):
    """`nn.LSTM` whose weights and biases respond to the hyperparameters; see `ResponseLayer`."""

    plain = nn.LSTM

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """Width of the output and of the cell's state."""
        return self.proj_size or self.hidden_size, self.hidden_size

    def cell(self, projected: Tensor, recurrent: _Affine, state: State) -> State:
        """`c' = sigmoid(f) c + sigmoid(i) tanh(g)` and `h' = sigmoid(o) tanh(c')`, as documented for `nn.LSTM`."""
        h, c = state
        i, f, g, o = (projected + recurrent.apply(h)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


@register_response(nn.GRU)
class ResponseGRU(_ResponseRNN, nn.GRU):
    """`nn.GRU` whose weights and biases respond to the hyperparameters; see `ResponseLayer`."""

    plain = nn.GRU

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """Width of the output."""
        return (self.hidden_size,)

    def cell(self, projected: Tensor, recurrent: _Affine, state: State) -> State:
        """`h' = (1 - z) tanh(n_x + r n_h) + z h`, with `r, z` the sigmoids of theirs, as documented for `nn.GRU`."""
        (h,) = state
        r, z, n = projected.chunk(3, -1)
        r_h, z_h, n_h = recurrent.apply(h).chunk(3, -1)
        n = (n + (r + r_h).sigmoid() * n_h).tanh()
        return (n + (z + z_h).sigmoid() * (h - n),)
