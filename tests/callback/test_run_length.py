"""Runs that are too short to tune are warned of."""

import math
import re
import warnings
from typing import Any

import pytest
from support import LitSmall, fit

from lightning_stn import DeltaSTN, STNCallback
from lightning_stn.callback.run_length import LEAST_REACH


def warned(**settings: Any) -> list[str]:
    """Warnings of a run of nine batches."""
    arguments = {key: settings.pop(key) for key in ("lr", "warmup", "anneal", "method") if key in settings}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(
            LitSmall(), STNCallback(**{"train_steps": 1, "warmup": 0, "seed": 1, **arguments}), max_epochs=3, **settings
        )
    return [str(one.message) for one in caught if "hyperparameter step" in str(one.message)]


def test_short_run_is_told_how_many_steps_it_has_and_how_many_it_should_have() -> None:
    (message,) = warned(warmup=1)
    assert message.startswith("This run of 9 training batches has 6 hyperparameter steps")
    assert "by about 0.3 unconstrained units, as from a rate of 0.1 to one of 0.13" in message
    assert "Let it have 20 steps or more: train for longer, or lower train_steps or warmup" in message


@pytest.mark.parametrize(("settings", "steps"), [({"anneal": False}, 10), ({"method": DeltaSTN()}, 67)])
def test_number_of_steps_that_a_run_should_have_follows_from_its_rate(settings: dict[str, Any], steps: int) -> None:
    (message,) = warned(**settings)
    (found,) = re.findall(r"Let it have (\d+) steps", message)
    assert int(found) == steps


def test_run_that_ends_before_its_first_step_is_told_so_alone() -> None:
    (message,) = warned(warmup=3)
    assert "ends before its first hyperparameter step" in message


@pytest.mark.parametrize("settings", [{"lr": 0.01}, {"fast_dev_run": True}], ids=str)
def test_short_run_is_not_warned_where_it_was_meant_to_be_so(settings: dict[str, Any]) -> None:
    assert warned(**settings) == []


def test_run_with_the_number_of_steps_that_the_warning_names_is_not_warned() -> None:
    steps = math.ceil(2 * LEAST_REACH / 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(LitSmall(), STNCallback(train_steps=1, warmup=0, seed=1), n=8, max_epochs=steps)
