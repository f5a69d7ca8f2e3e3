"""Rates of dropout that are tuned, and read as a number by whoever reads the attribute that holds them."""

from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_stn.binding import BoundModule


class TunedRate(BoundModule):
    """A module with a rate of dropout in the attribute `rate_name()`: a constant, or tuned by a hyperparameter.

    Setting the attribute to the name of a hyperparameter makes the rate a tuned one. Reading it then gives the rate in
    force as a number, as fused attention needs that takes `dropout_p=self.drop.p`.
    """

    plain_type: ClassVar[type[nn.Module]]

    @classmethod
    def rate_name(cls) -> str:
        """Name of the attribute."""
        raise NotImplementedError

    @property
    def tuned_by(self) -> str | None:
        """Name of the hyperparameter; None for a constant rate."""
        return self.__dict__.get("_tuned_by")

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; that of the rate may be the name of a hyperparameter."""
        if name == self.rate_name():
            self.__dict__.pop("_tuned_by", None)
            if isinstance(value, str):
                self.__dict__.pop(name, None)
                self.__dict__["_tuned_by"] = value
                return
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """The rate in force as a number, and every other attribute as it is."""
        if "_tuned_by" in self.__dict__ and name == self.rate_name():
            return self._rate_in_force()
        return super().__getattr__(name)

    def sampled_rate(self) -> Tensor | float:
        """The rate of a weight step, natural units: `[n]` or a scalar tensor, or a constant."""
        raise NotImplementedError

    def current_rate(self) -> float:
        """The rate at the current hyperparameters, natural units.

        Raises:
            RuntimeError: the rate is tuned, but the module is not attached.
        """
        raise NotImplementedError

    def rate_of_rows(self) -> Tensor | float:
        """The rate in force, natural units: `[n]` or a scalar tensor in a weight step, or a number.

        In the hyperparameter phase it is zero, and between steps the current rate.

        Raises:
            RuntimeError: the rate is tuned, but the module is not attached.
        """
        if self._hyperparameters is None:
            return self.current_rate()
        run = self._hyperparameters.current_pass
        if run.values is not None:
            return self.sampled_rate()
        return self.current_rate() if run.sample is None else 0.0

    @property
    def _at_current(self) -> bool:
        """Whether all examples have the current hyperparameters, as in Delta-STN's pass of the base weights."""
        return self._hyperparameters is not None and self._hyperparameters.current_pass.sample is None

    def _rate_in_force(self) -> float:
        """The rate in force as one number.

        Raises:
            RuntimeError: the module is not attached.
            ValueError: each example has a rate.
        """
        rate = self.rate_of_rows()
        if isinstance(rate, Tensor) and rate.dim() and self._at_current:
            rate = rate[0]
        if isinstance(rate, Tensor) and rate.dim():
            raise ValueError(
                f"{self.plain_type.__name__}: {self.rate_name()!r} is read as one number, but each example has its own "
                f"rate under a sample of {len(rate)} rows; share one row over the batch with "
                "STNCallback(perturb='batch')."
            )
        return float(rate)
