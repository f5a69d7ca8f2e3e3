"""Safeguards: skip non-finite hypergradients; warn of bounds, scales and silent gates."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.layers import ResponseLayer

PATIENCE = 25
"""Hyperparameter steps in a row without a finite hypergradient after which a run is stopped."""

SPIKE = 1e6
"""Size of a single hypergradient, as a multiple of the typical one, from which on it is skipped."""

COLLAPSED, EXPLODED = 0.02, 10.0
"""Perturbation scales as shares of where they started."""


class Watch:
    """Keeps non-finite hypergradients from the hyperparameters, and warns once of each thing that looks wrong.

    Args:
        hyperparameters: the set to watch.

    Attributes:
        skipped: hyperparameter steps that were skipped.
        in_a_row: steps that were skipped since the last one that was taken.
    """

    def __init__(self, hyperparameters: HyperparameterSet) -> None:
        self._hyperparameters = hyperparameters
        self._warned: set[tuple[str, str]] = set()
        self._looked_at_gates = False
        self.skipped = 0
        self.in_a_row = 0

    @property
    def gives_up(self) -> bool:
        """Whether too many steps in a row were skipped."""
        return self.in_a_row >= PATIENCE

    def admits(self, hypergradient: Tensor, *, rescales: bool = False, typical: float | None = None) -> bool:
        """Whether a step may be taken along this hypergradient, the same on all ranks.

        Optimisers keep a mean of squares. Where the sum of squares is not finite in float32, nothing would move again.
        A single hypergradient `SPIKE` times as large as is typical would be forgotten after thousands of steps only; if
        the next one is as large, the loss has another scale now.

        Args:
            hypergradient: any shape.
            rescales: whether a scaler answers a gradient that is not finite with a smaller scale; no warning then.
            typical: root mean square of the norms so far; None where it is not known yet.
        """
        square = float(hypergradient.float().square().sum())
        finite = math.isfinite(square) or bool(torch.isfinite(hypergradient).all())
        spikes = bool(typical) and not self.in_a_row and math.sqrt(square) > SPIKE * (typical or 0.0)
        if finite and math.isfinite(square) and not spikes:
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        if finite or not rescales:
            self._warn_of_skipped(finite, math.isfinite(square))
        if self.gives_up:
            warnings.warn(
                f"{PATIENCE} hyperparameter steps in a row had no finite hypergradient; the run stops here, with its "
                "hyperparameters as they were before and its checkpoints kept.",
                stacklevel=2,
            )
        return False

    def _warn_of_skipped(self, finite: bool, square_is_finite: bool) -> None:
        if square_is_finite:
            fault = f"A hypergradient is {SPIKE:g} times as large as those before, which would make later steps tiny"
        elif finite:
            fault = "A hypergradient is so large that its square is not finite in float32, which would end all steps"
        else:
            fault = "A hypergradient is not finite"
        self._warn_once(
            "",
            "skipping",
            f"{fault}, so this hyperparameter step is skipped, as will be others like it (stn/skipped_steps counts "
            f"them; {PATIENCE} in a row end the run). If the training loss is not finite either, the weights have "
            "diverged: lower their learning rate, clip their gradient with "
            "STNCallback(weight_step=WeightStep(gradient_clip_val=...)), or see STNModule.parameter_groups.",
        )

    def look(self) -> None:
        """Warn, once each, of hyperparameters at a bound and of scales that collapsed or exploded."""
        hyperparameters = self._hyperparameters
        places, scales = hyperparameters.unconstrained.tolist(), hyperparameters.scale.tolist()
        for name, specification in hyperparameters.specifications.items():
            own = hyperparameters.slices[name]
            bound = specification.bound_reached(places[own])
            if bound is not None:
                self._warn_once(
                    name,
                    f"bound {bound:g}",
                    f"The hyperparameter {name!r} has arrived at its bound {bound:g} and will hardly leave it; widen "
                    "the range if values beyond make sense, or take the bound for the answer.",
                )
            for scale in scales[own]:
                share = scale / specification.scale
                if share < COLLAPSED:
                    self._warn_once(
                        name,
                        "collapsed",
                        f"The hyperparameter {name!r} is hardly perturbed any more (scale {scale:.2g}, at first "
                        f"{specification.scale:g}), so that its response is no longer learnt; raise "
                        "STNCallback(scales=Scales(entropy_weight=...)), or hold the scales with Scales(tune=False).",
                    )
                elif share > EXPLODED:
                    self._warn_once(
                        name,
                        "exploded",
                        f"The hyperparameter {name!r} is perturbed over its whole range (scale {scale:.2g}, at first "
                        f"{specification.scale:g}); lower STNCallback(scales=Scales(entropy_weight=...)), or hold the "
                        "scales with Scales(tune=False).",
                    )

    def look_at_gates(self, root: nn.Module) -> None:
        """Warn of parameters that train and whose gates get no gradient; once gradients of a weight step are there."""
        if self._looked_at_gates:
            return
        self._looked_at_gates = True
        silent = [
            f"{prefix}.{name}" if prefix else name
            for prefix, layer in root.named_modules()
            if isinstance(layer, ResponseLayer)
            for name in layer.responding
            if layer.base_parameter(name).grad is not None and _gets_no_gradient(layer.gate_weights(name))
        ]
        if silent:
            self._warn_once(
                "",
                "silent gates",
                f"These parameters train but do not respond: {silent}. The network reads them past the attributes of "
                "their modules, as self._parameters[...] or a reference from before the conversion does, so that no "
                "hyperparameter is tuned through them. Read them as attributes, or leave their modules plain with "
                "convert(exclude=...).",
            )

    def _warn_once(self, name: str, kind: str, message: str) -> None:
        """Warn of one kind of fault of one hyperparameter (or of none, `name=""`), the first time in a run."""
        if (name, kind) not in self._warned:
            self._warned.add((name, kind))
            warnings.warn(message, stacklevel=3)

    def state_dict(self) -> dict[str, Any]:
        """Counts, and the warnings that were given."""
        return {
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "warned": [list(one) for one in sorted(self._warned)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self._warned = {(name, kind) for name, kind in state["warned"]}


def _gets_no_gradient(parameter: Tensor) -> bool:
    return parameter.requires_grad and parameter.grad is None
