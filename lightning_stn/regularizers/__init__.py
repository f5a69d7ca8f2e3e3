"""Tunable regularisers: dropouts in the network, penalties in the training loss."""

from lightning_stn.regularizer import Regularizer
from lightning_stn.regularizers.dropout import (
    AlphaDropout,
    Dropout,
    Dropout1d,
    Dropout2d,
    Dropout3d,
    DropPath,
    TunedDropout,
    TunedDropPath,
)
from lightning_stn.regularizers.penalties import (
    ActivationPenalty,
    L2Penalty,
    LabelSmoothing,
    Penalty,
    TemporalActivationPenalty,
)
from lightning_stn.regularizers.registry import Tunable, register_tunable, tunable_type
from lightning_stn.regularizers.sequence import EmbeddingDropout, LockedDropout
from lightning_stn.regularizers.weight_drop import WeightDrop

__all__ = [
    "ActivationPenalty",
    "AlphaDropout",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "EmbeddingDropout",
    "L2Penalty",
    "LabelSmoothing",
    "LockedDropout",
    "Penalty",
    "Regularizer",
    "TemporalActivationPenalty",
    "Tunable",
    "TunedDropPath",
    "TunedDropout",
    "WeightDrop",
    "register_tunable",
    "tunable_type",
]
