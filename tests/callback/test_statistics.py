"""Statistics of the hypergradients against NumPy's, and what a run says about them."""

import math
import warnings

import numpy as np
import pytest
import torch
from support import LitSmall, fit
from torch import Tensor

from lightning_stn import Float, HyperparameterSet, STNCallback
from lightning_stn.callback.statistics import FEWEST, WINDOW, HypergradientStatistics


def statistics(gradients: Tensor) -> HypergradientStatistics:
    names = [f"h{i}" for i in range(gradients.shape[1])]
    found = HypergradientStatistics(HyperparameterSet({name: Float(0.0, 1.0) for name in names}))
    for gradient in gradients:
        found.update(gradient)
    return found


def draw(steps: int, h: int, common: float = 0.0, mean: float = 0.0) -> Tensor:
    """Hypergradients with a common part and a mean."""
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(steps, h, generator=generator, dtype=torch.float64)
    return mean + own + common * torch.randn(steps, 1, generator=generator, dtype=torch.float64)


def test_statistics_equal_weighted_moments_of_numpy() -> None:
    gradients = draw(80, 4, common=1.0, mean=0.3)
    weights = np.exp(-np.arange(80)[::-1] / WINDOW)
    covariance = np.cov(gradients.numpy().T, aweights=weights, ddof=0)
    deviations = np.sqrt(covariance.diagonal())
    correlations = covariance / np.outer(deviations, deviations)
    found = statistics(gradients)
    assert math.isclose(found.first_direction or 0, np.linalg.eigvalsh(correlations)[-1] / 4, rel_tol=1e-9)
    ratios = np.average(gradients.numpy(), axis=0, weights=weights) / deviations
    np.testing.assert_allclose(found.signal_to_noise, ratios, rtol=1e-9)
    assert found.metrics() == {
        "stn/first_direction": found.first_direction,
        "stn/signal_to_noise": pytest.approx(np.sort(np.abs(ratios))[1], rel=1e-9),  # the lower of the middle two
    }


def test_scale_of_a_hypergradient_does_not_change_the_share_of_the_first_direction() -> None:
    gradients = draw(80, 3, common=1.0)
    scaled = gradients * torch.tensor([1.0, 1e-6, 1e3], dtype=torch.float64)
    share = statistics(gradients).first_direction
    assert share is not None
    assert math.isclose(share, statistics(scaled).first_direction or 0, rel_tol=1e-6)


def test_strong_common_mean_counts_as_signal_and_not_as_one_direction() -> None:
    found = statistics(draw(300, 4, mean=10.0))
    assert (found.first_direction or 1) < 0.5
    assert found.signal_to_noise is not None
    assert found.signal_to_noise.min() > 5


@pytest.mark.parametrize(("common", "warns"), [(20.0, True), (1.0, False)])
def test_one_direction_is_reported_once(common: float, warns: bool) -> None:
    found = statistics(draw(2 * FEWEST, 3, common=common))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found.metrics()
        found.metrics()
    assert len(caught) == warns
    if warns:
        assert "tunes one direction" in str(caught[0].message)


@pytest.mark.parametrize("steps", [0, 1, FEWEST - 1])
def test_few_steps_give_no_statistics(steps: int) -> None:
    found = statistics(draw(steps, 3))
    assert found.metrics() == {}
    assert found.pulled() == {}


def test_hypergradients_of_zero_give_no_direction_and_no_signal() -> None:
    found = statistics(torch.zeros(FEWEST, 3))
    assert found.first_direction is None
    assert found.metrics() == {"stn/signal_to_noise": 0.0}


def test_saved_statistics_continue_as_those_of_one_run() -> None:
    gradients = draw(120, 3, common=1.0, mean=0.2)
    first, whole = statistics(gradients[:70]), statistics(gradients)
    second = statistics(gradients[:0])
    second.load_state_dict(first.state_dict())
    for gradient in gradients[70:]:
        second.update(gradient)
    assert second.metrics() == whole.metrics()
    assert second.state_dict().keys() == whole.state_dict().keys()


def test_hyperparameters_that_are_still_pulled_are_named() -> None:
    gradients = draw(200, 3)
    gradients[:, 0] += 5
    gradients[:, 2] -= 5
    found = statistics(gradients)
    assert found.pulled() == {"h0": "down", "h2": "up"}


def test_hyperparameters_with_little_influence_are_named() -> None:
    gradients = draw(200, 3)
    gradients[:, 1] *= 1e-4
    found = statistics(gradients)
    assert found.slight(0.01) == ["h1"]
    assert found.slight(1e-6) == []
    assert statistics(gradients[:10]).slight(0.01) == []


def test_run_takes_in_every_hyperparameter_step() -> None:
    callback = STNCallback(train_steps=1, warmup=0, seed=0)
    fit(LitSmall(), callback, max_epochs=20)
    assert callback.state_dict()["statistics"]["count"] == 60
