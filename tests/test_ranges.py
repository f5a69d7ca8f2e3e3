"""Start values of `Float` and `Integer` where none is given."""

import math
from collections.abc import Callable

import pytest
import torch

from lightning_stn import Categorical, Float, HyperparameterSet, Integer


@pytest.mark.parametrize(
    ("specification", "start"),
    [
        (Float(0.0, 0.8), 0.08),
        (Float(-1.0, 1.0), -0.8),
        (Float(0.5, 1.5, perturb="batch"), 0.6),
        (Float(1e-6, 1e-2, log=True), 1e-4),  # the middle of the logarithm
        (Integer(0, 20), 2),
        (Integer(0, 4), 1),  # not on the bound
        (Integer(3, 4), 4),
    ],
)
def test_range_without_init_starts_in_its_lower_part_or_in_the_middle_of_its_logarithm(
    specification: Float | Integer, start: float
) -> None:
    assert math.isclose(specification.init, start, rel_tol=1e-12)
    assert math.isclose(float(HyperparameterSet({"a": specification}).values()["a"]), start, rel_tol=1e-6)


def test_given_init_stays() -> None:
    assert Float(0.0, 1.0, 0.5).init == 0.5
    assert Integer(0, 4, init=0).init == 0


@pytest.mark.parametrize(
    "build",
    [lambda: Float(0.0, None), lambda: Float(None, 1.0), lambda: Float(None, None), lambda: Float(0.0, 1.0, log=True)],
)
def test_range_without_a_natural_start_asks_for_init(build: Callable[[], Float]) -> None:
    with pytest.raises(ValueError, match=r"expected init for a range.*got None; give the value"):
        build()


HUGE = 10**400


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Float(0.0, HUGE, init=0.5), "expected high to be 0, or between 1.2e-38 and 3.4e.38 in size"),
        (lambda: Float(-HUGE, 1.0, init=0.5), "expected low to be 0, or between"),
        (lambda: Float(0.0, None, init=HUGE), "expected init to be 0, or between"),
        (lambda: Float(0.0, 1e39, init=0.5), "expected high to be 0, or between .*give the hyperparameter other units"),
        (lambda: Float(0.0, 1e-50, init=1e-51), "expected high to be 0, or between"),
        (lambda: Float(0.0, 1.0, init=1e-50), "expected init to be 0, or between"),
        (lambda: Float(1e-60, 1.0, init=0.1, log=True), "expected low to be 0, or between"),
        (lambda: Float(-3e38, 3e38, init=0.0), "expected high - low of at most 3.4e.38"),
        (lambda: Float(0.0, 1.0, init=1 - 1e-9), "expected low, init and high to differ in float32, got"),
        (lambda: Float(1e8, 1e8 + 1, init=1e8 + 0.5), "to differ in float32, .*give the distance from low"),
        (lambda: Float(1e8, None, init=1e8 + 0.5), "to differ in float32"),
        (lambda: Integer(0, HUGE, init=1), "expected high to be a whole number of int64"),
        (lambda: Integer(HUGE, HUGE + 4), "expected low to be a whole number of int64"),
        (lambda: Integer(2**63 - 4, 2**63), "expected high to be a whole number of int64"),
        (lambda: Integer(0, 4, init=-HUGE), "expected init to be a whole number of int64"),
        (lambda: Float(0.0, 1.0, scale=HUGE), "expected scale to be a finite number"),
        (lambda: Float(0.0, 1.0, scale=1e30), r"expected scale of at most 1e\+06"),
        (lambda: Float(0.0, 1.0, scale=1e-50), "expected scale > 0"),
        (lambda: Categorical(["a", "b"], "a", scale=HUGE), "expected scale to be a finite number"),
    ],
)
def test_numbers_that_float32_does_not_hold_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("low", [10**8, -(10**8) - 4, 2**24, 2**53, 2**63 - 5, -(2**63)])
def test_every_integer_far_from_zero_is_sampled(low: int) -> None:
    hyperparameters = HyperparameterSet({"a": Integer(low, low + 4, init=low + 2, scale=2.0)})
    assert hyperparameters.values() == {"a": low + 2}
    drawn = hyperparameters.constrain(hyperparameters.sample(4000, torch.Generator().manual_seed(0)))["a"]
    assert drawn.unique().tolist() == list(range(low, low + 5))
    assert abs((drawn - low).double().mean() - 2) < 0.1


@pytest.mark.parametrize("low", [0, 7, 10**8])
def test_default_start_of_an_integer_far_from_zero_lies_in_its_range(low: int) -> None:
    assert Integer(low, low + 20).init == low + 2


@pytest.mark.parametrize(
    "specification",
    [
        Float(0.0, None, init=1.0, log=True, scale=100.0),
        Float(1e-38 * 2, None, init=1.0, log=True, scale=100.0),
        Float(0.0, 3e38, init=1.0, log=True, scale=100.0),
        Float(None, None, init=3e38, scale=1e6),
        Float(-1.7e38, 1.7e38, init=0.0, scale=1e6),
        Float(None, 0.0, init=-3e38, scale=1e6),
        Float(0.1, 0.9, init=0.3, scale=1e6),
        Integer(-(2**63), -(2**63) + 2**20, scale=1e6),
    ],
)
def test_samples_of_any_width_are_finite_and_within_their_bounds(specification: Float | Integer) -> None:
    hyperparameters = HyperparameterSet({"a": specification})
    drawn = hyperparameters.constrain(hyperparameters.sample(4000, torch.Generator().manual_seed(0)))["a"].double()
    low, high = specification.bounds
    assert drawn.isfinite().all()
    assert low - 1e-7 * abs(low) <= drawn.min()
    assert drawn.max() <= high + 1e-7 * abs(high)
    if isinstance(specification, Float) and specification.log:
        assert drawn.min() > 0
