"""Augmentation on the device of the batch, after the loader: each example meets its own sampled strength."""

from lightning_stn.augment.cutout import Cutout
from lightning_stn.augment.noise import GaussianNoise

__all__ = ["Cutout", "GaussianNoise"]
