"""Safety nets: steps that must not be taken, and hyperparameters that have stopped to mean anything."""

import warnings

import torch
from torch import Tensor

from lightning_stn.hyperparameters import HyperparameterSet

PATIENCE = 25
"""Hyperparameter steps in a row without a finite hypergradient after which a run is stopped."""

COLLAPSED, EXPLODED = 0.02, 10.0
"""Perturbation scales as shares of where they started."""


class Watch:
    """Keeps non-finite hypergradients from the hyperparameters, and says once what looks wrong.

    Args:
        hyperparameters: what is watched.

    Attributes:
        skipped: hyperparameter steps that were not taken.
        in_a_row: those among them since the last step that was.
    """

    def __init__(self, hyperparameters: HyperparameterSet) -> None:
        self._hyperparameters = hyperparameters
        self._told_of_skipping = False
        self._told: set[tuple[str, str]] = set()
        self.skipped = 0
        self.in_a_row = 0

    @property
    def gives_up(self) -> bool:
        """Whether too many steps in a row were skipped."""
        return self.in_a_row >= PATIENCE

    def admits(self, hypergradient: Tensor, *, rescales: bool = False) -> bool:
        """Whether a step may be taken along this hypergradient, the same on all ranks.

        Args:
            hypergradient: any shape.
            rescales: whether a scaler will answer one that is not finite with a smaller scale, which needs no words.
        """
        if bool(torch.isfinite(hypergradient).all()):
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        if not rescales and not self._told_of_skipping:
            self._told_of_skipping = True
            warnings.warn(
                "A hypergradient is not finite, so this hyperparameter step is skipped, as will be others like it "
                f"(stn/skipped_steps counts them; {PATIENCE} in a row end the run). If the training loss is not finite "
                "either, the weights have diverged: lower their learning rate, clip their gradient with "
                "STNCallback(gradient_clip_val=...), or see STNModule.parameter_groups.",
                stacklevel=2,
            )
        if self.gives_up:
            warnings.warn(
                f"{PATIENCE} hyperparameter steps in a row had no finite hypergradient; the run stops here, with its "
                "hyperparameters as they were before and its checkpoints kept.",
                stacklevel=2,
            )
        return False

    def look(self) -> None:
        """Warn, once each, of hyperparameters at a bound and of scales that collapsed or exploded."""
        hyperparameters = self._hyperparameters
        places, scales = hyperparameters.unconstrained.tolist(), hyperparameters.scale.tolist()
        for name, specification in hyperparameters.specifications.items():
            own = hyperparameters.slices[name]
            bound = specification.bound_reached(places[own])
            for scale in scales[own]:
                if bound is not None:
                    self._tell(
                        name,
                        f"has arrived at its bound {bound:g} and will hardly leave it; widen the range if values "
                        "beyond make sense, or take the bound for the answer.",
                    )
                share = scale / specification.scale
                if share < COLLAPSED:
                    self._tell(
                        name,
                        f"is hardly perturbed any more (scale {scale:.2g}, at first {specification.scale:g}), so that "
                        "its response is no longer learnt; raise STNCallback(entropy_weight=...), or hold the scales "
                        "with tune_scales=False.",
                    )
                elif share > EXPLODED:
                    self._tell(
                        name,
                        f"is perturbed over its whole range (scale {scale:.2g}, at first {specification.scale:g}); "
                        "lower STNCallback(entropy_weight=...), or hold the scales with tune_scales=False.",
                    )

    def _tell(self, name: str, what: str) -> None:
        kind = what.split()[1]
        if (name, kind) not in self._told:
            self._told.add((name, kind))
            warnings.warn(f"The hyperparameter {name!r} {what}", stacklevel=3)
