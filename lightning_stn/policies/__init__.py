"""What replayed hyperparameters are at each training batch of a run, without a Trainer."""

from lightning_stn.policies.noise import Gaussian, Noise, Sinusoid
from lightning_stn.policies.policy import Policy

__all__ = ["Gaussian", "Noise", "Policy", "Sinusoid"]
