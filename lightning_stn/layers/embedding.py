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
        indices `[n, *]`; bound sample `[n, h]`, or `[1, h]` to share it, in unconstrained units; output
        `[n, *, embedding_dim]`.
    """

    plain = nn.Embedding
    per_example = True

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        """With `max_norm`, which renormalises vectors at each look-up, an embedding cannot respond."""
        if getattr(layer, "max_norm", None) is not None:
            return "max_norm rewrites the weights at each look-up, so that they cannot respond; remove max_norm"
        return super().refusal(layer)

    def draw_response(self) -> None:
        """Draw `R` from a standard normal distribution, with zeros at `padding_idx`, as torch draws `W`."""
        with torch.no_grad():
            self.response("weight").normal_()
            if self.padding_idx is not None:
                self.response("weight")[self.padding_idx].zero_()

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
        base = self._look_up(input, self.base("weight"))
        if self._hyperparameters is None or self._hyperparameters.at_centre:
            return base
        gates = self.gated("weight", self._hyperparameters.bound_sample())
        response = self._look_up(input, self.response("weight"))
        if gates.shape[0] == 1:
            return self.add_response(base, gates[0], response)
        if base.dim() < 2 or base.shape[0] != gates.shape[0]:
            raise self.rows_error(gates, input)
        return self.add_response(base, functional.align(gates, base, -1), response)

    def _look_up(self, input: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(
            input, weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq, sparse=self.sparse
        )
