"""What one run of a network is for, as an immutable value."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pass:
    """What one run of a network is for; `HyperparameterSet.running` enters and leaves it as a whole.

    The default is the pass between steps: response layers compute at the current hyperparameters, and regularisers do
    not act.

    Args:
        sample: `[n, h]` or `[1, h]`, unconstrained units, counted from the centre of the response; response layers read
            it. None stands for the current hyperparameters.
        values: natural units by name, `[n]` or scalar, at which regularisers act; None outside the weight phase.
        frozen: whether response layers detach the network's weights, so that only the sample gets a gradient.
        held: identities of the parameters that train in other passes, and get no gradient in this one.
        tangent: whether the response enters as the tangent of a forward-mode derivative at the base weights.
        extra: whether this is a further pass over the batch of a step, which logs nothing and keeps no hidden state.
        cache: effective parameters at the current hyperparameters, by layer, filled as layers compute; None keeps none.
        refusal: why no response layer may compute in this pass; empty where layers may compute.
    """

    sample: Tensor | None = None
    values: Mapping[str, Tensor] | None = None
    frozen: bool = False
    held: frozenset[int] = frozenset()
    tangent: bool = False
    extra: bool = False
    cache: dict[int, dict[str, Tensor]] | None = None
    refusal: str = ""
