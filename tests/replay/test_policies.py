"""Values of a policy without a Trainer: constants, schedules, stretched and noisy ones, and wrong arguments."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from replay.cases import KINDS, recorded
from torch import Tensor

from lightning_stn import Categorical, Float, Gaussian, Integer, Noise, Schedule, ScheduleReplay, Sinusoid
from lightning_stn.policies import Policy
from lightning_stn.schedule import Row

RATE = Float(0.0, 0.9, init=0.3)
OPERATION = Categorical(("none", "mirror"), init="none")


def test_constants_are_the_same_at_every_batch() -> None:
    policy = Policy.of({"dropout": 0.3, "operation": "mirror"})
    assert [policy.values(batch) for batch in (0, 5)] == [{"dropout": 0.3, "operation": "mirror"}] * 2


def test_specification_in_the_place_of_a_constant_stands_for_its_init() -> None:
    assert Policy.of({"dropout": RATE, "operation": OPERATION}).values(0) == {"dropout": 0.3, "operation": "none"}


def test_constant_gets_the_type_of_its_specification() -> None:
    policy = Policy.of({"rate": 1, "length": 2.0}).with_specifications(
        {"rate": Float(0.0, 2.0, init=0.5), "length": Integer(0, 4, init=1)}
    )
    assert [(value, type(value)) for value in policy.values(0).values()] == [(1.0, float), (2, int)]


@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_schedule_of_equal_length_is_read_row_by_row(tmp_path: Path, suffix: str) -> None:
    schedule = recorded(18)
    schedule.save(tmp_path / f"schedule.{suffix}")
    for values in (schedule, tmp_path / f"schedule.{suffix}", str(tmp_path / f"schedule.{suffix}")):
        for length in (18, math.inf):
            policy = _of_length(Policy.of(values), length)
            assert [policy.values(row.step) for row in schedule.rows] == [row.values for row in schedule.rows]


def _of_length(policy: Policy, length: float) -> Policy:
    return replace(policy, length=length)


@pytest.mark.parametrize(("length", "steps"), [(9, [0, 2, 4, 6]), (36, [0, 0, 1, 1]), (17, [0, 1, 2, 3])])
def test_schedule_is_stretched_to_the_length_of_the_run(length: int, steps: list[int]) -> None:
    schedule = recorded(18)
    policy = _of_length(Policy.of(schedule), length)
    assert [policy.values(batch) for batch in range(4)] == [schedule.rows[step].values for step in steps]
    assert policy.values(length) == schedule.final


@pytest.mark.parametrize("length", [9, 36])
def test_schedule_without_stretch_is_read_by_the_number_of_batches(length: int) -> None:
    schedule = recorded(18)
    policy = _of_length(Policy.of(schedule, stretch=False), length)
    assert [policy.values(batch) for batch in range(9)] == [row.values for row in schedule.rows[:9]]
    assert policy.values(100) == schedule.final


def test_linear_interpolation_reads_between_rows() -> None:
    schedule = recorded(2)
    policy = _of_length(Policy.of(schedule, interpolation="linear"), 4)
    assert policy.values(1) == schedule.at(0.5, "linear")
    assert schedule.rows[0].values["dropout"] < policy.values(1)["dropout"] < schedule.rows[1].values["dropout"]


def test_final_replays_the_last_row_as_constants() -> None:
    schedule = recorded(18)
    policy = _of_length(Policy.of(schedule, final=True), 7)
    assert [policy.values(batch) for batch in (0, 7)] == [schedule.final] * 2


def test_gaussian_noise_has_the_given_scale_around_the_entry() -> None:
    policy = Policy.of({"dropout": RATE}, noise=Gaussian(0.4))
    draws = [policy.values(batch)["dropout"] for batch in range(2000)]
    entries = torch.tensor([RATE.entries(value)[0] for value in draws]) - RATE.entries(0.3)[0]
    assert float(entries.mean()) == pytest.approx(0.0, abs=0.03)
    assert float(entries.std()) == pytest.approx(0.4, rel=0.05)


@pytest.mark.parametrize(
    ("values", "settings", "expected"),
    [
        (recorded(4), {"final": True}, [0.25, 0.5]),
        (recorded(4), {}, [0.25, 0.5]),
        ({"dropout": Float(0.0, 0.9, init=0.3, scale=0.7), "length": KINDS["length"]}, {}, [0.7, 0.5]),
    ],
)
def test_noise_takes_recorded_scales_or_those_of_the_specifications(
    values: Any, settings: dict[str, Any], expected: list[float]
) -> None:
    policy = Policy.of(values, noise=Gaussian(), **settings)
    centre, drawn = policy.centre(3), policy.values(3)
    generator_like = Policy.of({name: KINDS[name] for name in KINDS}, noise=Gaussian(1.0))
    unit = _offsets(generator_like, 3)
    for name, scale, offset in zip(KINDS, expected, unit, strict=True):
        kind = policy.specifications[name]
        entry = kind.entries(centre[name])[0] + scale * offset
        assert drawn[name] == kind.value(torch.tensor([entry], dtype=torch.float64).float().double())


def _offsets(policy: Policy, batch: int) -> list[float]:
    assert policy.noise is not None
    scales = torch.ones(2, dtype=torch.float64)
    return policy.noise.offsets(scales, batch=batch, length=policy.length, seed=policy.seed).tolist()


def test_noise_depends_on_seed_and_batch_alone() -> None:
    first, second = (Policy.of({"dropout": RATE}, noise=Gaussian()) for _ in range(2))
    torch.manual_seed(1)
    ahead = [first.values(batch) for batch in range(5)]
    torch.manual_seed(2)
    assert [second.values(batch) for batch in reversed(range(5))] == ahead[::-1]
    assert len({values["dropout"] for values in ahead}) == 5
    assert Policy.of({"dropout": RATE}, noise=Gaussian(), seed=1).values(0) != ahead[0]


def test_sinusoid_repeats_after_its_period_in_batches_or_as_a_share_of_the_run() -> None:
    by_batch = Policy.of({"dropout": RATE}, noise=Sinusoid(0.5, period=8))
    by_share = _of_length(Policy.of({"dropout": RATE}, noise=Sinusoid(0.5, period=0.25)), 32)
    entries = [RATE.entries(by_batch.values(batch)["dropout"])[0] - RATE.entries(0.3)[0] for batch in range(9)]
    assert entries == pytest.approx([0.5 * math.sin(2 * math.pi * batch / 8) for batch in range(9)], abs=1e-6)
    assert [by_share.values(batch) for batch in range(32)] == [by_batch.values(batch) for batch in range(32)]


def test_sinusoid_without_amplitude_has_the_standard_deviation_of_gaussian_noise() -> None:
    scales = torch.tensor([0.3], dtype=torch.float64)
    sine = [Sinusoid(period=16).offsets(scales, batch=batch, length=1, seed=0) for batch in range(16)]
    assert float(torch.cat(sine).square().mean().sqrt()) == pytest.approx(0.3)


def test_noise_changes_a_choice_by_its_logits_and_a_sinusoid_leaves_it() -> None:
    values = {"operation": OPERATION}
    gaussian = {Policy.of(values, noise=Gaussian(2.0)).values(batch)["operation"] for batch in range(30)}
    sinusoid = {Policy.of(values, noise=Sinusoid(2.0, 7)).values(batch)["operation"] for batch in range(30)}
    assert (gaussian, sinusoid) == ({"none", "mirror"}, {"none"})


def test_values_with_noise_stay_in_their_range() -> None:
    policy = Policy.of(recorded(18), noise=Gaussian(20.0))
    for batch in range(19):
        values = policy.values(batch)
        assert 0.0 <= values["dropout"] <= 0.9
        assert isinstance(values["length"], int)
        assert 0 <= values["length"] <= 4


@dataclass(frozen=True)
class Step(Noise):
    """A further kind of noise: one step up in the middle of the run."""

    height: float = 1.0

    def offsets(self, scales: Tensor, *, batch: int, length: float, seed: int) -> Tensor:
        return self.height * scales * (batch >= length / 2)


def test_further_kind_of_noise_is_one_class() -> None:
    policy = _of_length(Policy.of({"dropout": RATE}, noise=Step(2.0)), 4)
    entries = [RATE.entries(policy.values(batch)["dropout"])[0] for batch in range(4)]
    assert [entry - entries[0] for entry in entries] == pytest.approx([0.0, 0.0, 1.0, 1.0], abs=1e-6)


def test_schedule_that_grows_afterwards_is_replayed_as_it_was() -> None:
    schedule = recorded(4)
    policy = Policy.of(schedule)
    schedule.append(Row(5, 0, {"dropout": 0.5, "length": 1}, {"dropout": 0.5, "length": 0.5}))
    assert (policy.recorded_length, policy.values(5)) == (4, recorded(4).final)


def _row(value: Any, scale: float = 0.5) -> Schedule:
    schedule = Schedule({"length": Integer(0, 4, init=1)})
    schedule.append(Row(0, 0, {"length": value}, {"length": scale}))
    return schedule


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "no values": (lambda: ScheduleReplay({}), r"expected values to give .* got no name"),
    "infinite": (lambda: ScheduleReplay({"dropout": math.inf}), r"finite number.*'dropout': inf"),
    "bool": (lambda: ScheduleReplay({"dropout": True}), r"finite number.*'dropout': True"),
    "list": (lambda: ScheduleReplay([0.3]), r"expected values to be a Schedule.*got \[0\.3\]"),  # type: ignore[arg-type]
    "empty schedule": (lambda: ScheduleReplay(Schedule(KINDS)), r"expected a schedule with rows"),
    "final of constants": (lambda: ScheduleReplay({"a": 1.0}, final=True), r"expected a schedule with final=True"),
    "final": (lambda: ScheduleReplay(recorded(), final=1), r"expected final to be True or False"),  # type: ignore[arg-type]
    "row beyond its range": (
        lambda: ScheduleReplay(_row(7)),
        r"values that the hyperparameters can have.*\n.*length=7",
    ),
    "row that is not whole": (lambda: ScheduleReplay(_row(1.5)), r"length=1\.5.*whole number"),
    "noise": (lambda: ScheduleReplay({"a": 1.0}, noise=0.3), r"expected noise to be Gaussian"),  # type: ignore[arg-type]
    "stretch": (lambda: ScheduleReplay({"a": 1.0}, stretch="no"), r"expected stretch to be True"),  # type: ignore[arg-type]
    "interpolation": (lambda: ScheduleReplay({"a": 1.0}, interpolation="cubic"), r"'step' or 'linear', got 'cubic'"),  # type: ignore[arg-type]
    "seed": (lambda: ScheduleReplay({"a": 1.0}, seed=0.5), r"expected seed to be a whole number"),  # type: ignore[arg-type]
    "weight step": (lambda: ScheduleReplay({"a": 1.0}, weight_step=2), r"expected weight_step to be WeightStep"),  # type: ignore[arg-type]
    "attributes": (lambda: ScheduleReplay({"a": 1.0}, attributes=["net.p"]), r"paths to names"),  # type: ignore[arg-type]
    "attribute": (lambda: ScheduleReplay({"a": 1.0}, attributes={"net.p": 0.3}), r"paths to names"),  # type: ignore[dict-item]
    "scale": (lambda: Gaussian(0.0), r"Gaussian: expected scale to be a positive number.*got 0\.0"),
    "amplitude": (lambda: Sinusoid("wide"), r"Sinusoid: expected amplitude.*got 'wide'"),  # type: ignore[arg-type]
    "period of two batches": (lambda: Sinusoid(period=2), r"Sinusoid: expected period.*at least 3.*got 2"),
    "period beyond the run": (lambda: Sinusoid(period=1.5), r"share of the run in \(0, 1\], got 1\.5"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_argument_is_refused_with_its_name(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ScheduleReplay(tmp_path / "schedule.json")


@pytest.mark.parametrize("values", [{"dropout": 0.3, "kind": "a"}, "schedule.csv"])
def test_noise_without_ranges_is_refused(tmp_path: Path, values: Any) -> None:
    if isinstance(values, str):
        recorded().save(tmp_path / values)
        values = tmp_path / values
    with pytest.raises(ValueError, match=r"expected ranges for noise.*none for \['dropout', '(kind|length)'\]"):
        Policy.of(values, noise=Gaussian(0.3)).values(0)


def test_share_of_a_run_of_unknown_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"length of the run to be known for period=0\.1"):
        Policy.of({"dropout": RATE}, noise=Sinusoid(0.3)).values(0)


def test_values_beyond_the_ranges_of_a_module_are_listed() -> None:
    policy = Policy.of({"dropout": 0.95, "length": 9, "kind": 3.0})
    kinds = {"dropout": RATE, "length": Integer(0, 4, init=1), "kind": OPERATION}
    with pytest.raises(ValueError, match=r"dropout=0\.95: (.|\n)*length=9: (.|\n)*kind=3\.0: .*is a choice"):
        policy.with_specifications(kinds)


def test_signature_tells_values_noise_and_length_apart() -> None:
    base = Policy.of(recorded(18))
    assert Policy.of(recorded(18)).signature() == base.signature()
    others = [Policy.of(recorded(17)), Policy.of(recorded(18), noise=Gaussian(0.1)), _of_length(base, 5)]
    changed = [{key for key, value in other.signature().items() if value != base.signature()[key]} for other in others]
    assert changed == [{"values"}, {"noise"}, {"length"}]
