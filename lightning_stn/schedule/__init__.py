"""The schedule of a run: what the hyperparameters were at each step, in memory and in files."""

from lightning_stn.schedule.row import Row
from lightning_stn.schedule.schedule import Interpolation, Schedule

__all__ = ["Interpolation", "Row", "Schedule"]
