import math
from collections import Counter

import pytest

from lightning_stn import Phase, PhaseSchedule, Warmup
from lightning_stn.phases import Event, PhaseClock

W, T, V = Phase.WARMUP, Phase.WEIGHT, Phase.HYPERPARAMETER


@pytest.mark.parametrize(
    ("schedule", "epochs", "batches", "expected"),
    [
        (PhaseSchedule(2, 1, 0), 1, 4, [T, T, V, T, T, V]),
        (PhaseSchedule(1, 2, 0), 1, 2, [T, V, V, T, V, V]),
        (PhaseSchedule(2, 1, 1), 2, 3, [W, W, W, T, T, V, T]),
        (PhaseSchedule(2, 1, 0), 2, 3, [T, T, V, T, T, V, T, T, V]),
        (PhaseSchedule(2, 1, Warmup(3, "steps")), 1, 6, [W, W, W, T, T, V, T]),
        (PhaseSchedule(2, 1, Warmup(0, "steps")), 1, 2, [T, T, V]),
        (PhaseSchedule(3, 1, 1), 1, 6, [W] * 6),
    ],
)
def test_trace_alternates_the_phases(schedule: PhaseSchedule, epochs: int, batches: int, expected: list[Phase]) -> None:
    assert [event.phase for event in schedule.trace(epochs, batches)] == expected


def test_trace_counts_batches_and_epochs() -> None:
    events = list(PhaseSchedule(2, 1, 1).trace(epochs=2, batches_per_epoch=2))
    assert events == [Event(W, 0, 0), Event(W, 0, 1), Event(T, 1, 2), Event(T, 1, 3), Event(V, 1, 4)]


@pytest.mark.parametrize("schedule", [PhaseSchedule(), PhaseSchedule(3, 2, 1), PhaseSchedule(2, 1, Warmup(7, "steps"))])
def test_total_steps_agrees_with_the_trace(schedule: PhaseSchedule) -> None:
    schedule = schedule.resolve(8 * 5)
    counts = Counter(event.phase for event in schedule.trace(epochs=8, batches_per_epoch=5))
    assert schedule.total_steps(40, 5) == counts[V]
    assert schedule.warmup_batches(5) == counts[W]


@pytest.mark.parametrize(
    ("share", "batches", "epochs", "expected"),
    [
        (0.1, 205, 5, Warmup(20, "steps")),
        (0.1, 205, math.inf, Warmup(20, "steps")),
        (0.1, math.inf, 30, Warmup(3, "epochs")),
        (0.1, math.inf, math.inf, Warmup(1000, "steps")),
        (0.0, math.inf, math.inf, Warmup(0, "steps")),
    ],
)
def test_share_resolves_to_batches_or_to_epochs_or_to_a_fixed_number_of_batches(
    share: float, batches: float, epochs: float, expected: Warmup
) -> None:
    assert Warmup.parse(share).resolve(batches, epochs) == expected


@pytest.mark.parametrize("warmup", [Warmup(7, "epochs"), Warmup(7, "steps")])
def test_length_that_is_no_share_resolves_to_itself(warmup: Warmup) -> None:
    assert warmup.resolve(100, 10) == warmup.resolve(math.inf) == warmup


def test_immediate_schedule_runs_both_phases_after_one_batch() -> None:
    assert [event.phase for event in PhaseSchedule(5, 3, 9).immediate().trace(1, 1)] == [T, V]


def test_clock_continues_from_its_state() -> None:
    schedule = PhaseSchedule(3, 1, 0)
    first, second = PhaseClock(schedule), PhaseClock(schedule)
    first.finish_batch(0)
    second.load_state_dict(first.state_dict())
    assert [second.finish_batch(0) for _ in range(3)] == [0, 1, 0]


@pytest.mark.parametrize(
    "arguments",
    [{"train_steps": 0}, {"valid_steps": 0}, {"warmup": -1}, {"warmup": "5"}, {"train_steps": 1.5}],
)
def test_schedule_refuses_wrong_counts_by_name(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"({next(iter(arguments))}|length) to be a whole number"):
        PhaseSchedule(**arguments)
