"""What the hypergradients of a run tell about it: how many directions are tuned, and how much of them is signal."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from lightning_stn.hyperparameters import HyperparameterSet

WINDOW = 100
"""Hyperparameter steps over which means are taken, roughly: the weight of a step falls by a factor of e within it."""

FEWEST = 50
"""Hyperparameter steps before the statistics are given."""

FEWEST_FOR_NORM = 10
"""Hyperparameter steps before their typical norm is given."""

ONE_DIRECTION = 0.9
"""Share of the first direction above which a run is warned."""

PULLED = 0.5
"""Signal to noise above which a hyperparameter counts as still moving; over a window, five standard errors."""


class HypergradientStatistics:
    """Running first and second moments of the hypergradients.

    Args:
        hyperparameters: the set whose hypergradients come.

    Attributes:
        count: hypergradients so far.
    """

    def __init__(self, hyperparameters: HyperparameterSet) -> None:
        self._hyperparameters = hyperparameters
        self._mean: Tensor | None = None
        self._second: Tensor | None = None
        self._weight = 0.0
        self._warned = False
        self.count = 0

    def update(self, hypergradient: Tensor) -> None:
        """Take in the hypergradient of a step, `[h]`."""
        gradient = hypergradient.detach().cpu().double()  # on the CPU, since MPS has no float64
        if self._mean is None or self._second is None:
            self._mean, self._second = torch.zeros_like(gradient), gradient.new_zeros(len(gradient), len(gradient))
        keep = math.exp(-1 / WINDOW)
        self._mean.mul_(keep).add_(gradient, alpha=1 - keep)
        self._second.mul_(keep).add_(torch.outer(gradient, gradient), alpha=1 - keep)
        self._weight = keep * self._weight + 1 - keep
        self.count += 1

    @property
    def typical_norm(self) -> float | None:
        """Root mean square of the norms of the hypergradients; None before `FEWEST_FOR_NORM` steps."""
        if self.count < FEWEST_FOR_NORM or self._second is None:
            return None
        return math.sqrt(float(self._second.diagonal().sum()) / self._weight)

    @property
    def first_direction(self) -> float | None:
        """Share of the first principal direction in the variation of the hypergradients, by their correlations.

        It is 1 where all hypergradients rise and fall together, and 1 over their number where they are uncorrelated.
        None before `FEWEST` steps, and where fewer than two hypergradients vary.
        """
        if self.count < FEWEST or self._mean is None or self._second is None:
            return None
        covariance = self._second / self._weight - torch.outer(self._mean, self._mean) / self._weight**2
        deviations = covariance.diagonal().clamp_min(0).sqrt()
        varies = deviations > 1e-9 * self._second.diagonal().sqrt()
        if int(varies.sum()) < 2:
            return None
        correlations = (covariance / torch.outer(deviations, deviations))[varies][:, varies]
        return float(torch.linalg.eigvalsh(correlations)[-1] / len(correlations))

    @property
    def signal_to_noise(self) -> Tensor | None:
        """Mean over standard deviation of each hypergradient, `[h]`, with the sign of the mean; None at first."""
        if self.count < FEWEST or self._mean is None or self._second is None:
            return None
        mean = self._mean / self._weight
        variance = (self._second.diagonal() / self._weight - mean.square()).clamp_min(0)
        return torch.where(mean == 0, mean, mean / variance.sqrt().clamp_min(1e-12 * mean.abs().amax()))

    def metrics(self) -> dict[str, float]:
        """What is logged: share of the first direction, median of signal to noise. Warns if one direction is tuned."""
        metrics = {}
        if (share := self.first_direction) is not None:
            metrics["stn/first_direction"] = share
            self._look(share)
        if (ratios := self.signal_to_noise) is not None:
            metrics["stn/signal_to_noise"] = float(ratios.abs().median())
        return metrics

    def _look(self, share: float) -> None:
        """Warn, once, of a run in which one direction is tuned, and not each hyperparameter."""
        if self._warned or self.count < 2 * FEWEST or len(self._hyperparameters.names) < 3:
            return
        if share > ONE_DIRECTION:
            self._warned = True
            warnings.warn(
                f"The hypergradients of all {len(self._hyperparameters.names)} hyperparameters have risen and fallen "
                f"together for some {WINDOW} steps (stn/first_direction: {share:.2f}), so that the run tunes one "
                "direction and does not tell the hyperparameters apart. An uncentred response does this, "
                "STN(centred=False); so does one that has hardly been learned: use STN(), a longer warm-up, or a "
                "larger scale.",
                stacklevel=2,
            )

    def pulled(self) -> dict[str, str]:
        """Entries that the validation loss still moves consistently, by label: "up" or "down"."""
        ratios = self.signal_to_noise
        if ratios is None:
            return {}
        labelled = zip(self._hyperparameters.labels, ratios.tolist(), strict=True)
        return {label: "down" if ratio > 0 else "up" for label, ratio in labelled if abs(ratio) > PULLED}

    def slight(self, share: float) -> list[str]:
        """Entries, by label, that change the validation loss by less than this share of what the largest one does.

        The change is the root mean square of the hypergradient times the perturbation scale.
        """
        if self.count < FEWEST or self._second is None:
            return []
        changes = (self._second.diagonal() / self._weight).sqrt() * self._hyperparameters.scale.cpu().double()
        small = (changes < share * changes.max()).tolist()
        return [label for label, is_small in zip(self._hyperparameters.labels, small, strict=True) if is_small]

    def state_dict(self) -> dict[str, Any]:
        """Moments, their weight, and whether the warning was given."""
        moments = [None if moment is None else moment.clone() for moment in (self._mean, self._second)]
        return {"moments": moments, "weight": self._weight, "count": self.count, "warned": self._warned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._mean, self._second = (None if m is None else m.cpu().clone() for m in state["moments"])
        self._weight, self.count, self._warned = state["weight"], state["count"], state["warned"]
