"""Distribution of a sample. Seeds are fixed; each bound states how rarely a correct sampler violates it."""

import math

import pytest
import torch
from torch import Tensor

from lightning_stn import Float, HyperparameterSet, Integer
from lightning_stn.binding import bind_weight_phase, unbind

DRAWS = 200_000
SMALLEST_CHANCE = 1e-6
"""Probability that a correct sampler fails a test, for each test."""
DEVIATIONS = 4.9
"""Bound in standard deviations, which a normal variable exceeds with probability 1e-6."""


def normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


def bin_probabilities(low: int, high: int, init: int, scale: float) -> Tensor:
    """Probability of each integer: the normal mass between the logits of the edges of its bin."""

    def logit(value: float) -> float:
        below, above = value - (low - 0.5), (high + 0.5) - value
        return -math.inf if below <= 0 else math.inf if above <= 0 else math.log(below / above)

    cumulative = [normal_cdf((logit(edge - 0.5) - logit(init)) / scale) for edge in range(low, high + 2)]
    return torch.tensor(cumulative, dtype=torch.float64).diff()


def chi_square_chance(counts: Tensor, probabilities: Tensor) -> float:
    """Probability of a larger Pearson statistic; bins of fewer than ten expected draws are pooled."""
    expected = probabilities * counts.sum()
    rare = expected < 10
    counts = torch.cat([counts[~rare], counts[rare].sum(0, keepdim=True)]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum(0, keepdim=True)])
    if expected[-1] < 10:
        if counts[-1] >= 40:  # A Poisson count of mean below 10 reaches 40 with probability below 1e-11.
            return 0.0
        counts, expected = counts[:-1], expected[:-1]
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = torch.tensor(len(expected) - 1, dtype=torch.float64)
    return torch.special.gammaincc(degrees / 2, statistic / 2).item()


INTEGERS = [(0, 4, 1, 0.5), (2, 9, 9, 1.5), (-3, 3, 0, 3.0), (0, 1, 0, 0.7), (1, 40, 7, 1.0)]


def integer_counts(low: int, high: int, init: int, scale: float) -> Tensor:
    """Number of times that a large sample contains each integer of the range."""
    hyperparameters = HyperparameterSet({"count": Integer(low, high, init=init, scale=scale)})
    bind_weight_phase(hyperparameters, hyperparameters.sample(DRAWS, torch.Generator().manual_seed(0)))
    values = hyperparameters["count"]
    unbind(hyperparameters)
    return torch.bincount(values - low, minlength=high - low + 1)


@pytest.mark.parametrize(("low", "high", "init", "scale"), INTEGERS)
def test_integer_values_have_the_probabilities_of_the_analytic_logit_bins(low, high, init, scale):
    counts, probabilities = integer_counts(low, high, init, scale), bin_probabilities(low, high, init, scale)
    assert len(counts) == len(probabilities)
    assert chi_square_chance(counts, probabilities) > SMALLEST_CHANCE


@pytest.mark.parametrize(("init", "scale"), [(1, 0.515), (2, 0.5)], ids=["scale 3 percent too large", "another start"])
def test_chi_square_bound_detects_integers_with_other_probabilities(init, scale):
    assert chi_square_chance(integer_counts(0, 4, init, scale), bin_probabilities(0, 4, 1, 0.5)) < SMALLEST_CHANCE


MIXED = {
    "per_example": Float(0.0, 1.0, init=0.3, scale=0.5),
    "per_batch": Float(None, None, init=2.0, scale=1.5, perturb="batch"),
    "count_per_example": Integer(0, 9, init=4, scale=0.7),
    "count_per_batch": Integer(1, 5, init=2, scale=0.2, perturb="batch"),
}


def assert_moments(draws: Tensor, mean: Tensor, scale: Tensor) -> None:
    """Mean and variance of each column, within `DEVIATIONS` standard errors of a normal sample's."""
    count = len(draws)
    assert ((draws.mean(0) - mean).abs() < DEVIATIONS * scale / math.sqrt(count)).all()
    assert ((draws.var(0) / scale**2 - 1).abs() < DEVIATIONS * math.sqrt(2 / (count - 1))).all()


def test_per_batch_columns_are_equal_over_rows_and_per_example_columns_differ():
    hyperparameters = HyperparameterSet(MIXED)
    sample = hyperparameters.sample(1000, torch.Generator().manual_seed(1))
    distinct = [len(column.unique()) for column in sample.T]
    assert distinct[1] == distinct[3] == 1
    assert min(distinct[0], distinct[2]) > 990
    bind_weight_phase(hyperparameters, sample)
    shapes = {name: tuple(hyperparameters[name].shape) for name in MIXED}
    unbind(hyperparameters)
    assert shapes == {"per_example": (1000,), "per_batch": (), "count_per_example": (1000,), "count_per_batch": ()}


def test_moments_of_a_sample_are_lambda_and_sigma_squared():
    hyperparameters = HyperparameterSet(MIXED)
    sample = hyperparameters.sample(DRAWS, torch.Generator().manual_seed(2)).double()
    per_example = [0, 2]
    assert_moments(
        sample[:, per_example], hyperparameters.unconstrained.double()[per_example], torch.tensor([0.5, 0.7])
    )


def test_moments_over_batches_are_lambda_and_sigma_squared_for_per_batch_columns_too():
    hyperparameters, generator = HyperparameterSet(MIXED), torch.Generator().manual_seed(3)
    rows = torch.stack([hyperparameters.sample(2, generator)[-1] for _ in range(4000)]).double()
    scale = torch.tensor([specification.scale for specification in MIXED.values()])
    assert_moments(rows, hyperparameters.unconstrained.double(), scale)


def test_columns_and_rows_of_a_sample_are_uncorrelated():
    """Correlations of independent normals are normal with standard error `1 / sqrt(n)`, for large n."""
    hyperparameters = HyperparameterSet({name: Float(None, None, init=0.0) for name in ("a", "b", "c")})
    sample = hyperparameters.sample(DRAWS, torch.Generator().manual_seed(4))
    columns = torch.corrcoef(sample.T)[(0, 0, 1), (1, 2, 2)]
    neighbours = torch.corrcoef(torch.stack([sample[:-1, 0], sample[1:, 0]]))[0, 1]
    assert torch.cat([columns, neighbours[None]]).abs().max() < DEVIATIONS / math.sqrt(DRAWS)
