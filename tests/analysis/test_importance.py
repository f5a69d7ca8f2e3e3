"""Hyperparameters that matter come first, and the sign says which way the loss falls."""

import pytest
import torch
from analysis.networks import LitMlp, batches, loss_by_hand

from lightning_stn.analysis import importance

DATA = batches(4, 4, 3)


def with_gates(**columns: float) -> LitMlp:
    """Gates of each hyperparameter multiplied by a number."""
    module = LitMlp()
    for layer in (module.net[0], module.net[2]):
        for gates in (layer.weight_gate, layer.bias_gate):
            gates.data[:] = gates[:, :1] * torch.tensor([columns[name] for name in module.hyperparameters.names])
    return module


def test_importance_puts_a_hyperparameter_that_matters_before_one_that_does_not():
    found = importance(with_gates(rate=0.0, noise=0.1, length=1.0), DATA)
    assert found.names == ("length", "noise", "rate")
    assert found.ranges[0] > 5 * found.ranges[1] > 0
    assert found.ranges[2].item() == found.effects[2].item() == 0
    assert [row["to lower the loss"] for row in found.table()][-1] == "-"


def test_effect_is_the_derivative_of_the_loss_for_one_scale():
    module, step = LitMlp(), 1e-4
    found = importance(module, DATA)
    for name, effect in zip(found.names, found.effects.tolist(), strict=True):
        entry = module.hyperparameters.slices[name].start
        losses = []
        for sign in (-1, 1):
            sample = module.hyperparameters.unconstrained.double()
            sample[entry] += sign * step
            losses.append(loss_by_hand(module, sample, DATA))
        derivative = (losses[1] - losses[0]) / (2 * step)
        assert effect == pytest.approx(derivative * module.hyperparameters.scale[entry].item(), rel=1e-4)


def test_range_spans_the_losses_within_one_scale():
    module = LitMlp()
    found = importance(module, DATA, "rate", points=3)
    losses = []
    for multiple in (-1.0, 0.0, 1.0):
        sample = module.hyperparameters.unconstrained.double()
        sample[0] += multiple * 0.3
        losses.append(loss_by_hand(module, sample, DATA))
    assert found.losses[0].tolist() == pytest.approx(losses, abs=1e-6)
    assert found.ranges.item() == pytest.approx(max(losses) - min(losses), abs=1e-6)


def test_opposite_responses_have_opposite_directions():
    found = importance(with_gates(rate=0.5, noise=-0.5, length=0.0), DATA)
    directions = {row["hyperparameter"]: row["to lower the loss"] for row in found.table()}
    assert {directions["rate"], directions["noise"]} == {"raise", "lower"}


def test_importance_without_a_finite_loss_comes_last():
    class LitOverflow(LitMlp):
        def validation_loss(self, batch, batch_idx):
            sample = self.hyperparameters.current_pass.sample
            lost = sample[0, 0] != 0
            return super().validation_loss(batch, batch_idx) + (torch.nan if lost else 0)

    module = LitOverflow()
    module.hyperparameters.centred = True
    found = importance(module, DATA, points=2)
    assert found.names[-1] == "rate"
    assert found.ranges.isfinite().tolist() == [True, True, False]
