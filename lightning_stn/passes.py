"""What one run of a network is for, as an immutable value."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lightning_stn.effective import EffectiveParameters, state, version


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
        ended: whether the forward pass is over, and only its backward pass may still compute.
        refusal: why no response layer may compute in this pass; empty where layers may compute.
        keep: whether effective parameters are kept for the whole pass; with a sample they always are.

    Attributes:
        effective: the effective parameters that have been read so far; None where none are kept.
    """

    sample: Tensor | None = None
    values: Mapping[str, Tensor] | None = None
    frozen: bool = False
    held: frozenset[int] = frozenset()
    tangent: bool = False
    extra: bool = False
    ended: bool = False
    refusal: str = ""
    keep: bool = False
    effective: EffectiveParameters | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Keep effective parameters, apart from those of the pass that this one was derived from."""
        if self.keep or self.sample is not None:
            object.__setattr__(self, "effective", EffectiveParameters(state if self.keep else version))
