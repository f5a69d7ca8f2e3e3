"""Cells of the LSTM, the GRU and the simple recurrent layer: one time step, its local derivatives, its jvp and its vjp.

Shapes use the package's index alphabet, with `o` for the features of the cell (`hidden_size`), and two more letters:
`d` for the pre-activations of all gates, side by side, and `p` for the features of the output, which are those of the
cell unless a projection follows. Equations name the gates of a cell as torch's documentation does; `g_n` is the
response gate of the recurrent weight for example `n`. A prime marks a value after the step, `dx` is the tangent of `x`,
and `x~` is the gradient of the loss in `x`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_stn.layers.product import Stacked, Transposed

State = tuple[Tensor, ...]
"""`(h, c)` of an LSTM, `(h,)` of all others; `h` is `[n, p]` and `c` is `[n, o]`."""

AddRecurrent = Callable[[Tensor | None], Tensor | None]
"""Adds the terms that belong to the recurrent product to a tensor; None stands for zero."""


class LocalDerivatives(NamedTuple):
    """Derivatives of the elementwise part of a cell, at all time steps or at one.

    Args:
        pre_activations: in the pre-activations, `[t, n, d]`: of `c'` in `i, f, g` of an LSTM, of `h'` in all others.
        state: of `c'` in `c` (LSTM) or of `h'` in `h` (GRU), at fixed pre-activations, `[t, n, o]`.
        output: of `h'` in `c'`, `[t, n, o]`; None for a cell without `c`.
    """

    pre_activations: Tensor
    state: Tensor
    output: Tensor | None = None

    def steps(self) -> list["LocalDerivatives"]:
        """The local derivatives of each time step."""
        outputs = [None] * len(self.state) if self.output is None else self.output.unbind(0)
        parts = zip(self.pre_activations.unbind(0), self.state.unbind(0), outputs, strict=True)
        return [LocalDerivatives(*step) for step in parts]


class Cell(ABC):
    """One time step of a recurrent layer.

    The pre-activations of a step, `[n, d]`, are the part that is known before the loop over time plus the recurrent
    product `W h + g_n * (R h)`, which enters the last columns. In the methods `pre_activations` is the first part only.
    """

    @staticmethod
    def pre_activations(projected: Tensor, add_recurrent: AddRecurrent) -> Tensor:
        """Pre-activations without the recurrent product: input projection plus recurrent bias, `[t, n, d]`.

        By default the columns keep torch's order.

        Args:
            projected: the input projection, `[t, n, *]`, with its columns in torch's order.
            add_recurrent: adds the recurrent bias, in torch's order of columns.
        """
        output = add_recurrent(projected)
        assert output is not None
        return output

    @staticmethod
    @abstractmethod
    def step(pre_activations: Tensor, recurrent: Stacked, state: State, out: Tensor) -> tuple[State, Tensor | None]:
        """The next state, and `R h`, which is None where the recurrent weight does not respond.

        Args:
            pre_activations: `[n, d]`.
            recurrent: the recurrent product.
            state: the state before the step.
            out: receives the activations that `local_derivatives` reads, `[n, d]`.
        """

    @staticmethod
    @abstractmethod
    def local_derivatives(activations: Tensor, before: State, after: State) -> LocalDerivatives:
        """Local derivatives of all time steps.

        Args:
            activations: those that `step` wrote to `out`, `[t, n, d]`.
            before: the states before the steps, `[t, n, *]` each.
            after: the states after the steps, `[t, n, *]` each.
        """

    @staticmethod
    @abstractmethod
    def jvp(derivatives: LocalDerivatives, tangent: Tensor, recurrent: Stacked, state: State) -> State:
        """Tangent of the next state.

        Args:
            derivatives: those of the step.
            tangent: that of the pre-activations without the recurrent product, `[n, d]`.
            recurrent: the recurrent product, whose weights and gates have no tangent.
            state: tangents of the state before the step.
        """

    @staticmethod
    @abstractmethod
    def vjp(derivatives: LocalDerivatives, recurrent: Transposed, grad: State, out: Tensor) -> State:
        """Gradient in the state before the step.

        Args:
            derivatives: those of the step.
            recurrent: the transpose of the recurrent product.
            grad: gradient in the next state.
            out: receives the gradient in the pre-activations, `[n, d]`.
        """


class LSTMCell(Cell):
    """The cell of `nn.LSTM`, Hochreiter and Schmidhuber (1997).

    The pre-activations `a` are those of `i, f, g, o`, in torch's order, and the recurrent product enters all of them::

        i = sigmoid(a_i)    f = sigmoid(a_f)    g = tanh(a_g)    o = sigmoid(a_o)
        c' = f c + i g
        h' = o tanh(c')
    """

    @staticmethod
    def step(pre_activations: Tensor, recurrent: Stacked, state: State, out: Tensor) -> tuple[State, Tensor | None]:
        """`c' = f c + i g` and `h' = o tanh(c')`; the activations are `i, f, g, o`."""
        h, c = state
        activations, response = recurrent.apply(h, pre_activations, out)
        i, f, g, o = activations.chunk(4, -1)
        activations[:, : 2 * c.shape[-1]].sigmoid_()
        g.tanh_()
        o.sigmoid_()
        c = torch.addcmul(i * g, f, c)
        return (o * c.tanh(), c), response

    @staticmethod
    def local_derivatives(activations: Tensor, before: State, after: State) -> LocalDerivatives:
        """Local derivatives of the LSTM.

        ::

            dc'/da_i = i (1 - i) g        dc'/da_f = f (1 - f) c           dc'/da_g = i (1 - g^2)
            dh'/da_o = o (1 - o) tanh(c')
            dc'/dc = f                    dh'/dc' = o (1 - tanh(c')^2)
        """
        i, f, g, o = activations.chunk(4, -1)
        tanh_c = after[1].tanh()
        # s (1 - s) of all columns in one kernel; the columns of g, which is no sigmoid, are overwritten.
        columns = torch.addcmul(activations, activations, activations, value=-1)
        in_i, in_f, in_g, in_o = columns.chunk(4, -1)
        in_i.mul_(g)
        in_f.mul_(before[1])
        torch.addcmul(i, i, g * g, value=-1, out=in_g)
        in_o.mul_(tanh_c)
        return LocalDerivatives(columns, f, torch.addcmul(o, o, tanh_c * tanh_c, value=-1))

    @staticmethod
    def jvp(derivatives: LocalDerivatives, tangent: Tensor, recurrent: Stacked, state: State) -> State:
        """Tangents of `h'` and `c'`, where `da` includes the recurrent product with `dh`.

        ::

            dc' = (dc'/da_i) da_i + (dc'/da_f) da_f + (dc'/da_g) da_g + f dc
            dh' = (dh'/da_o) da_o + (dh'/dc') dc'
        """
        h, c = state
        terms = recurrent.apply(h, tangent)[0].mul_(derivatives.pre_activations).view(len(c), 4, c.shape[-1])
        c = terms[:, :3].sum(1).addcmul_(derivatives.state, c)
        assert derivatives.output is not None
        return torch.addcmul(terms[:, 3], derivatives.output, c), c

    @staticmethod
    def vjp(derivatives: LocalDerivatives, recurrent: Transposed, grad: State, out: Tensor) -> State:
        """Gradients in `h` and `c`.

        ::

            u = c'~ + (dh'/dc') h'~
            a_k~ = (dc'/da_k) u  for k = i, f, g        a_o~ = (dh'/da_o) h'~
            h~ = W^T a~ + R^T (g_n * a~)                c~ = f u
        """
        h, c = grad
        assert derivatives.output is not None
        c = torch.addcmul(c, derivatives.output, h)
        columns, grads = (part.view(len(c), 4, c.shape[-1]) for part in (derivatives.pre_activations, out))
        torch.mul(columns[:, :3], c.unsqueeze(1), out=grads[:, :3])
        torch.mul(columns[:, 3], h, out=grads[:, 3])
        return recurrent.vjp(out), derivatives.state * c


class GRUCell(Cell):
    """The cell of `nn.GRU`, after Cho et al. (2014), arXiv:1406.1078.

    The pre-activations are those of `n, r, z` and `m`, the recurrent part of `n`, which torch calls
    `W_hn h + b_hn`; the recurrent product enters the last three::

        r = sigmoid(a_r)    z = sigmoid(a_z)    n = tanh(a_n + r m)
        h' = (1 - z) n + z h
    """

    @staticmethod
    def pre_activations(projected: Tensor, add_recurrent: AddRecurrent) -> Tensor:
        """Input projection, in torch's order `r, z, n`, plus recurrent bias `r, z, m`; ordered as `n, r, z, m`."""
        o = projected.shape[-1] // 3
        recurrent = add_recurrent(None)
        recurrent = projected.new_zeros(()) if recurrent is None else recurrent
        recurrent = recurrent.expand(projected.shape)
        both = projected[..., : 2 * o] + recurrent[..., : 2 * o]
        return torch.cat([projected[..., 2 * o :], both, recurrent[..., 2 * o :]], -1)

    @staticmethod
    def step(pre_activations: Tensor, recurrent: Stacked, state: State, out: Tensor) -> tuple[State, Tensor | None]:
        """`h' = (1 - z) n + z h`; the activations are `n, r, z, m`."""
        (h,) = state
        o = h.shape[-1]
        gates, response = recurrent.apply(h, pre_activations[:, o:])
        gates[:, : 2 * o].sigmoid_()
        r, z, m = gates.chunk(3, -1)
        n = torch.addcmul(pre_activations[:, :o], r, m).tanh_()
        torch.cat([n, gates], -1, out=out)
        return (torch.addcmul(n, z, h - n),), response

    @staticmethod
    def local_derivatives(activations: Tensor, before: State, after: State) -> LocalDerivatives:
        """Local derivatives of the GRU.

        ::

            dh'/da_n = (1 - z) (1 - n^2)            dh'/dm = (dh'/da_n) r
            dh'/da_r = (dh'/da_n) m r (1 - r)       dh'/da_z = (h - n) z (1 - z)
            dh'/dh = z
        """
        n, r, z, m = activations.chunk(4, -1)
        in_n = (1 - z) * (1 - n * n)
        in_r = in_n * m * r * (1 - r)
        in_z = (before[0] - n) * z * (1 - z)
        return LocalDerivatives(torch.cat([in_n, in_r, in_z, in_n * r], -1), z)

    @staticmethod
    def jvp(derivatives: LocalDerivatives, tangent: Tensor, recurrent: Stacked, state: State) -> State:
        """Tangent of `h'`, where `da_r`, `da_z` and `dm` include the recurrent product with `dh`.

        ::

            dh' = (dh'/da_n) da_n + (dh'/da_r) da_r + (dh'/da_z) da_z + (dh'/dm) dm + z dh
        """
        (h,) = state
        o = h.shape[-1]
        terms = recurrent.apply(h, tangent[:, o:])[0].mul_(derivatives.pre_activations[:, o:])
        new = terms.view(len(h), 3, o).sum(1).addcmul_(derivatives.pre_activations[:, :o], tangent[:, :o])
        return (new.addcmul_(derivatives.state, h),)

    @staticmethod
    def vjp(derivatives: LocalDerivatives, recurrent: Transposed, grad: State, out: Tensor) -> State:
        """Gradient in `h`.

        ::

            a~ = (dh'/da) h'~  for the columns n, r, z, m
            h~ = W^T a_rzm~ + R^T (g_n * a_rzm~) + z h'~
        """
        (h,) = grad
        columns, grads = (part.view(len(h), 4, h.shape[-1]) for part in (derivatives.pre_activations, out))
        torch.mul(columns, h.unsqueeze(1), out=grads)
        return (torch.addcmul(recurrent.vjp(out[:, h.shape[-1] :]), derivatives.state, h),)


class TanhCell(Cell):
    """The cell of `nn.RNN`, Elman (1990): `h' = tanh(a)`, and the recurrent product enters all of `a`."""

    @classmethod
    def step(
        cls, pre_activations: Tensor, recurrent: Stacked, state: State, out: Tensor
    ) -> tuple[State, Tensor | None]:
        """`h'`, which is the activation too."""
        activations, response = recurrent.apply(state[0], pre_activations, out)
        return (cls.activate(activations),), response

    @staticmethod
    def activate(pre_activations: Tensor) -> Tensor:
        """The nonlinearity, in place."""
        return pre_activations.tanh_()

    @staticmethod
    def local_derivatives(activations: Tensor, before: State, after: State) -> LocalDerivatives:
        """`dh'/da = 1 - h'^2`."""
        return LocalDerivatives(1 - activations * activations, _zeros_like(activations))

    @staticmethod
    def jvp(derivatives: LocalDerivatives, tangent: Tensor, recurrent: Stacked, state: State) -> State:
        """`dh' = (dh'/da) da`, where `da` includes the recurrent product with `dh`."""
        return (recurrent.apply(state[0], tangent)[0].mul_(derivatives.pre_activations),)

    @staticmethod
    def vjp(derivatives: LocalDerivatives, recurrent: Transposed, grad: State, out: Tensor) -> State:
        """`a~ = (dh'/da) h'~` and `h~ = W^T a~ + R^T (g_n * a~)`."""
        torch.mul(derivatives.pre_activations, grad[0], out=out)
        return (recurrent.vjp(out),)


class ReluCell(TanhCell):
    """The cell of `nn.RNN(nonlinearity="relu")`: `h' = max(a, 0)`."""

    @staticmethod
    def activate(pre_activations: Tensor) -> Tensor:
        """The nonlinearity, in place."""
        return pre_activations.relu_()

    @staticmethod
    def local_derivatives(activations: Tensor, before: State, after: State) -> LocalDerivatives:
        """`dh'/da` is 1 where `h'` is positive, and 0 elsewhere."""
        return LocalDerivatives((activations > 0).to(activations.dtype), _zeros_like(activations))


def _zeros_like(tensor: Tensor) -> Tensor:
    """Zeros that take no memory."""
    return tensor.new_zeros(()).expand_as(tensor)
