"""Noise around replayed values, in unconstrained units."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_stn.arguments import is_number, is_whole
from lightning_stn.randomness import derive_seed

SHORTEST_PERIOD = 3
"""Batches; a sine that is read once or twice in a period is zero at every reading."""


class Noise(ABC):
    """What is added to replayed values, in unconstrained units, before each training batch.

    A subclass is a frozen dataclass whose fields are its settings. Its offsets depend on nothing but the arguments of
    `offsets`, so that a resumed run and every rank draw the same.
    """

    @abstractmethod
    def offsets(self, scales: Tensor, *, batch: int, length: float, seed: int) -> Tensor:
        """Offsets for one batch, unconstrained units.

        Args:
            scales: perturbation scale of each unconstrained entry, `[h]`, float64: those of the last row of the
                schedule, or of the specifications.
            batch: training batches that are finished.
            length: training batches of the run; infinity where they are not known.
            seed: of the replay.

        Returns:
            `[h]`, float64.
        """


@dataclass(frozen=True)
class Gaussian(Noise):
    """Normal noise, drawn anew for each batch and shared by its examples and by all ranks.

    Args:
        scale: standard deviation, unconstrained units; None for the perturbation scales in the last row of the
            schedule or, for constants, those of the specifications.

    Raises:
        ValueError: `scale` is not a positive number.

    Example:
        >>> scales = torch.tensor([0.5, 0.1], dtype=torch.float64)
        >>> draws = [Gaussian().offsets(scales, batch=batch, length=10, seed=0) for batch in (3, 4, 3)]
        >>> torch.equal(draws[0], draws[1]), torch.equal(draws[0], draws[2])
        (False, True)
    """

    scale: float | None = None

    def __post_init__(self) -> None:
        """Check the scale."""
        _check_size("Gaussian", "scale", self.scale)

    def offsets(self, scales: Tensor, *, batch: int, length: float, seed: int) -> Tensor:
        """Normal draws; see `Noise.offsets`."""
        generator = torch.Generator().manual_seed(derive_seed(seed, "replay", batch))
        draws = torch.randn(len(scales), generator=generator, dtype=torch.float64, device="cpu")
        return draws * (scales if self.scale is None else self.scale)


@dataclass(frozen=True)
class Sinusoid(Noise):
    """A sine over the run. The logits of a choice all move alike, so that a choice stays as it is.

    Args:
        amplitude: unconstrained units; None for the square root of 2 times the scale that `Gaussian()` takes, so that
            both have one standard deviation.
        period: a whole number of training batches, or a float for a share of the run in (0, 1].

    Raises:
        ValueError: `amplitude` is not a positive number, or `period` neither a whole number of at least 3 nor a share.

    Example:
        >>> scales = torch.tensor([0.5], dtype=torch.float64)
        >>> [round(float(Sinusoid(1.0, 8).offsets(scales, batch=n, length=10, seed=0)), 2) for n in range(4)]
        [0.0, 0.71, 1.0, 0.71]
    """

    amplitude: float | None = None
    period: int | float = 0.1

    def __post_init__(self) -> None:
        """Check the settings."""
        _check_size("Sinusoid", "amplitude", self.amplitude)
        period: Any = self.period
        is_share = isinstance(period, float) and 0 < period <= 1
        if not is_share and not is_whole(period, SHORTEST_PERIOD):
            raise ValueError(
                f"Sinusoid: expected period to be a whole number of training batches of at least {SHORTEST_PERIOD}, or "
                f"a float for a share of the run in (0, 1], got {period!r}; give for instance 0.1."
            )

    def offsets(self, scales: Tensor, *, batch: int, length: float, seed: int) -> Tensor:
        """The sine at this batch; see `Noise.offsets`.

        Raises:
            ValueError: the period is a share of a run of unknown length.
        """
        period = self.period * length if isinstance(self.period, float) else self.period
        if math.isinf(period):
            raise ValueError(
                f"Sinusoid: expected the length of the run to be known for period={self.period!r}, a share of it, got "
                "a Trainer or loader without one; give period as a whole number of training batches."
            )
        amplitude = math.sqrt(2) * scales if self.amplitude is None else torch.full_like(scales, self.amplitude)
        return amplitude * math.sin(2 * math.pi * batch / period)


def _check_size(kind: str, name: str, size: Any) -> None:
    if size is not None and not (is_number(size) and size > 0):
        raise ValueError(
            f"{kind}: expected {name} to be a positive number in unconstrained units, or None for the recorded "
            f"perturbation scales, got {size!r}; give for instance 0.5."
        )
