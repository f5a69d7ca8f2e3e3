"""Regularisers whose strengths are hyperparameters: each example meets its own sampled value."""

from lightning_stn.regularizers.dropout import Dropout, Dropout1d, Dropout2d, Dropout3d, tuned_dropout

__all__ = ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "tuned_dropout"]
