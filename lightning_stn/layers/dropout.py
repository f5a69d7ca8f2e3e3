"""Response layers that drop inside, as recurrent layers and attention do."""

from torch import Tensor

from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.layers.base import ResponseLayer
from lightning_stn.rates import TunedRate


class InnerDropout(TunedRate, ResponseLayer):
    """A response layer with a rate of dropout in its attribute `dropout`, which `convert(dropout=...)` tunes too."""

    @classmethod
    def rate_name(cls) -> str:
        """The name that torch gives the attribute."""
        return "dropout"

    def tune_rate(self, name: str, hyperparameters: HyperparameterSet) -> None:
        """Let a hyperparameter set the rate from now on.

        Raises:
            KeyError: the set has no hyperparameter of this name.
        """
        hyperparameters.require(name, type(self).__name__)
        setattr(self, self.rate_name(), name)

    def reads(self) -> list[str]:
        """The hyperparameter of a tuned rate."""
        return [] if self.tuned_by is None else [self.tuned_by]

    def sampled_rate(self) -> Tensor | float:
        """The rate of a weight step, natural units: `[n]` or a scalar tensor, or the constant."""
        if self._hyperparameters is None or self.tuned_by is None:
            return self.current_rate()
        return self._hyperparameters[self.tuned_by]

    def current_rate(self) -> float:
        """The rate at the current hyperparameters, natural units."""
        if self._hyperparameters is None or self.tuned_by is None:
            return self._constant()
        value = self._hyperparameters.values()[self.tuned_by]
        assert not isinstance(value, str)
        return value

    def rate_of_call(self) -> Tensor | float:
        """The rate of this call: zero in evaluation; of a tuned rate `[n]` or a scalar tensor in a weight step."""
        if not self.training:
            return 0.0
        return self.rate_of_rows() if self.tuned_by is not None else self._constant()

    def remove_response(self) -> None:
        """Turn this layer into the plain layer, with the current rate; see `ResponseLayer.remove_response`."""
        setattr(self, self.rate_name(), self.current_rate())
        super().remove_response()

    def _constant(self) -> float:
        constant: float = getattr(self, self.rate_name())
        return constant

    def extra_repr(self) -> str:
        """As the plain layer has it, with the name of the hyperparameter as a tuned rate."""
        if self.tuned_by is None:
            return super().extra_repr()
        with self.shadowed({"dropout": self.tuned_by}):
            return super().extra_repr()
