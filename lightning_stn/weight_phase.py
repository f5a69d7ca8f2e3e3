"""What an `STNModule` has to know of the weight phase of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lightning_stn.manual_optimization import WeightStep
from lightning_stn.methods import STN, Method
from lightning_stn.specifications import Perturb


@dataclass(frozen=True)
class WeightPhase:
    """How the weight phase of a run works; `STNCallback` or `ScheduleReplay` gives it to the module.

    Args:
        method: computes the objective.
        perturb: "example" draws a perturbation for each example, "batch" one for the mini-batch.
        step: how the weights step in manual optimisation.
        values: natural units by name, scalars, at which regularisers act while layers do not respond; None where a
            perturbed sample is drawn.
    """

    method: Method = field(default_factory=STN)
    perturb: Perturb = "batch"
    step: WeightStep = field(default_factory=WeightStep)
    values: Mapping[str, Tensor] | None = None
