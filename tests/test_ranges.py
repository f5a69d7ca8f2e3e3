"""Start values of `Float` and `Integer` where none is given."""

import math
from collections.abc import Callable

import pytest

from lightning_stn import Float, HyperparameterSet, Integer


@pytest.mark.parametrize(
    ("specification", "start"),
    [
        (Float(0.0, 0.8), 0.08),
        (Float(-1.0, 1.0), -0.8),
        (Float(0.5, 1.5, perturb="batch"), 0.6),
        (Float(1e-6, 1e-1, log=True), 1e-6 * 10**0.5),
        (Integer(0, 20), 2),
        (Integer(0, 4), 1),  # not on the bound
        (Integer(3, 4), 4),
    ],
)
def test_range_without_init_starts_a_tenth_above_its_lower_bound(specification: Float | Integer, start: float) -> None:
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
