"""The callbacks: one tunes hyperparameters while a network trains, one replays them."""

from lightning_stn.callback.replay import ScheduleReplay
from lightning_stn.callback.stn import STNCallback

__all__ = ["STNCallback", "ScheduleReplay"]
