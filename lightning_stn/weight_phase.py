"""What an `STNModule` has to know of the weight phase of a run."""

from dataclasses import dataclass, field

from lightning_stn.manual_optimization import WeightStep
from lightning_stn.methods import STN, Method
from lightning_stn.specifications import Perturb


@dataclass(frozen=True)
class WeightPhase:
    """How the weight phase of a run works; `STNCallback` gives it to the module.

    Args:
        method: computes the objective.
        perturb: "example" draws a perturbation for each example, "batch" one for the mini-batch.
        step: how the weights step in manual optimisation.
    """

    method: Method = field(default_factory=STN)
    perturb: Perturb = "batch"
    step: WeightStep = field(default_factory=WeightStep)
