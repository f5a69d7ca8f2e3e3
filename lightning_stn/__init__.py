"""Self-tuning networks for PyTorch Lightning: a network that tunes its own hyperparameters while it trains."""

from lightning_stn.callback import ScheduleReplay, STNCallback
from lightning_stn.categorical import Categorical
from lightning_stn.convert import ConversionError, convert
from lightning_stn.export import export
from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.manual_optimization import WeightStep
from lightning_stn.methods import STN, DeltaSTN, Method, Scales
from lightning_stn.module import STNModule
from lightning_stn.phases import Phase, PhaseSchedule, Warmup
from lightning_stn.policies import Gaussian, Noise, Sinusoid
from lightning_stn.ranges import Float, Integer
from lightning_stn.recipes import recommended_augmentation, recommended_hyperparameters
from lightning_stn.resumable import ResumableLoader
from lightning_stn.schedule import Schedule
from lightning_stn.specifications import Hyperparameter

__version__ = "0.2.0"

__all__ = [
    "STN",
    "Categorical",
    "ConversionError",
    "DeltaSTN",
    "Float",
    "Gaussian",
    "Hyperparameter",
    "HyperparameterSet",
    "Integer",
    "Method",
    "Noise",
    "Phase",
    "PhaseSchedule",
    "ResumableLoader",
    "STNCallback",
    "STNModule",
    "Scales",
    "Schedule",
    "ScheduleReplay",
    "Sinusoid",
    "Warmup",
    "WeightStep",
    "convert",
    "export",
    "recommended_augmentation",
    "recommended_hyperparameters",
]
