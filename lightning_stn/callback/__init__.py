"""The callback that alternates weight and hyperparameter phases."""

from lightning_stn.callback.stn import STNCallback

__all__ = ["STNCallback"]
