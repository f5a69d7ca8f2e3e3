import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_stn.transforms import invert, positive, positive_inverse, range_transform

RANGES = [
    (0.0, 0.9, False),
    (-2.0, 5.0, False),
    (0.0, None, False),
    (-1.0, None, False),
    (None, 3.0, False),
    (None, None, False),
    (1e-5, 1e-1, True),
    (0.0, None, True),
    (0.0, 10.0, True),
    (2.0, None, True),
]


def closed_form(u: float, low: float | None, high: float | None) -> float:
    if low is not None and high is not None:
        return low + (high - low) / (1 + math.exp(-u))
    if low is not None:
        return low + math.log1p(math.exp(u))
    if high is not None:
        return high - math.log1p(math.exp(-u))
    return u


@pytest.mark.parametrize(("low", "high", "log"), RANGES)
@given(u=st.floats(-8, 8))
def test_transform_equals_its_formula(low: float | None, high: float | None, log: bool, u: float) -> None:
    transform = range_transform(low, high, log=log)
    value = transform(torch.tensor(u, dtype=torch.float64)).item()
    if log:
        logs = (math.log(low) if low else None, math.log(high) if high is not None else None)
        expected = math.exp(closed_form(u, *logs))
    else:
        expected = closed_form(u, low, high)
    assert value == pytest.approx(expected, rel=1e-12)
    assert low is None or value > low
    assert high is None or value < high
    assert invert(transform, value) == pytest.approx(u, abs=1e-6)


@pytest.mark.parametrize(("low", "high", "log"), RANGES)
def test_transform_increases(low: float | None, high: float | None, log: bool) -> None:
    values = range_transform(low, high, log=log)(torch.linspace(-10, 10, 101, dtype=torch.float64))
    assert (values.diff() > 0).all()


@given(st.floats(1e-3, 50))
def test_positive_is_softplus(scale: float) -> None:
    raw = positive_inverse(torch.tensor(scale, dtype=torch.float64))
    assert raw.item() == pytest.approx(math.log(math.expm1(scale)), abs=1e-9)
    assert positive(raw).item() == pytest.approx(scale)
