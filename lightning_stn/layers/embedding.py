"""The response of `nn.Embedding`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_stn import functional
from lightning_stn.layers.base import ResponseLayer
from lightning_stn.layers.registry import register_response


@register_response(nn.Embedding)
class ResponseEmbedding(ResponseLayer, nn.Embedding):
    """`nn.Embedding` whose vectors respond to the hyperparameters.

    The vector of index `k` in example `n` is `W_k + (V h_n) * R_k`, with a gate on each entry of the vectors. Vectors
    are looked up in both tables, so that the effective table is never built.

    Shape:
        indices `[n, *]`, or `[1, *, *]` where all examples share them; bound sample `[n, h]`, or `[1, h]` to share it,
        in unconstrained units; output `[n, *, embedding_dim]`.
    """

    plain_type = nn.Embedding
    per_example = True
    gates_both = True

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        """With `max_norm`, which renormalises vectors at each look-up, an embedding cannot respond."""
        if getattr(layer, "max_norm", None) is not None:
            return "max_norm rewrites the weights at each look-up, so that they cannot respond; remove max_norm"
        return super().refusal(layer)

    def draw_response(self) -> None:
        """Draw `R` from a standard normal distribution, with zeros at `padding_idx`, as torch draws `W`."""
        with torch.no_grad():
            self.response_weights("weight").normal_()
            if self.padding_idx is not None:
                self.response_weights("weight")[self.padding_idx].zero_()

    def gate_size(self, name: str) -> int:
        """A gate for each entry of a vector."""
        return self.embedding_dim

    def broadcast_gates(self, name: str, gated: Tensor) -> Tensor:
        """`[o]` broadcasts over the table `[k, o]` as it is."""
        return gated

    def forward(self, input: Tensor) -> Tensor:
        """Look up vectors in both tables, and gate those of the response.

        Raises:
            ValueError: the bound sample has neither one row nor a row per example.
        """
        base = self._look_up(input, self.base_parameter("weight"))
        if self._hyperparameters is None or self._hyperparameters.at_centre:
            return base
        rows = self.gated("weight", self._hyperparameters.bound_sample())
        response = base
        if not self.responds_as_itself("weight"):
            response = self._look_up(input, self.response_weights("weight"))
        shared = input.dim() > 1 and len(input) == 1  # such as positions, `[1, t]`, which all examples share
        if len(rows) > 1 and not shared and (base.dim() < 2 or len(base) != len(rows)):
            raise self.rows_error(rows, input)
        return self.add_response(base, self._gates(rows, input, base), response)

    def _gates(self, rows: Tensor, input: Tensor, output: Tensor) -> Tensor:
        """Gates of the looked-up vectors, which broadcast over the output."""
        if self.gates_elsewhere("weight"):  # a gate for each vector of the table
            input = input.expand(len(rows), *input.shape[1:]) if input.dim() > 1 and len(input) == 1 else input
            by_example = rows.expand(len(input) if input.dim() else 1, -1)
            return by_example.gather(1, input.reshape(len(by_example), -1)).view(*input.shape, 1)
        if len(rows) == 1:
            return rows[0]
        return functional.align(rows, output.expand(len(rows), *output.shape[1:]), -1)

    def _look_up(self, input: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(
            input, weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq, sparse=self.sparse
        )
