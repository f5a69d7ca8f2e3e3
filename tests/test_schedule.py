import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_stn import Categorical, Float, Hyperparameter, Integer
from lightning_stn.schedule import Row, Schedule

RATE = Float(0.0, 1.0)
HEADER = "step,epoch,rate,rate_scale\n"


def recorded() -> Schedule:
    schedule = Schedule({"rate": Float(0.0, None, init=0.1), "count": Integer(0, 100)}, warmup=5)
    for step in (0, 10, 20):
        values, scales = {"rate": 0.1 + step / 7, "count": step}, {"rate": 0.5, "count": 0.25 + step}
        loss = None if step == 0 else 1.0 / step
        schedule.append(Row(step, step // 10, values, scales, loss, None, {"count": step + 0.25}))
    return schedule


def in_csv(schedule: Schedule) -> list[tuple[Any, ...]]:
    """What the CSV form holds."""
    return [(schedule.names, schedule.scale_names), *((r.step, r.epoch, r.values, r.scales) for r in schedule.rows)]


def test_json_round_trip_is_exact(tmp_path: Path) -> None:
    schedule = recorded()
    schedule.save(tmp_path / "schedule.json")
    assert Schedule.load(tmp_path / "schedule.json") == schedule
    assert json.loads((tmp_path / "schedule.json").read_text())["columns"] == schedule.columns


def test_csv_round_trip_keeps_steps_values_and_scales(tmp_path: Path) -> None:
    schedule = recorded()
    schedule.save(tmp_path / "schedule.csv")
    loaded = Schedule.load(tmp_path / "schedule.csv")
    assert in_csv(loaded) == in_csv(schedule)
    assert (tmp_path / "schedule.csv").read_text().splitlines()[0] == "step,epoch,rate,count,rate_scale,count_scale"
    assert loaded.specifications["count"].bounds == (0, 20)


def test_json_of_a_schedule_that_was_read_from_csv_keeps_it(tmp_path: Path) -> None:
    chosen().save(tmp_path / "schedule.csv")
    schedule = Schedule.load(tmp_path / "schedule.csv")
    schedule.save(tmp_path / "schedule.json")
    assert Schedule.load(tmp_path / "schedule.json") == schedule


@pytest.mark.parametrize(("step", "count"), [(-5, 0), (0, 0), (9, 0), (10, 10), (15, 10), (20, 20), (999, 20)])
def test_at_returns_the_last_row_up_to_a_step(step: int, count: int) -> None:
    assert recorded().at(step)["count"] == count


def test_append_refuses_a_step_that_does_not_increase() -> None:
    with pytest.raises(ValueError, match="a step after 20, got 20"):
        recorded().append(recorded().rows[-1])


def test_append_refuses_a_row_with_other_names() -> None:
    with pytest.raises(ValueError, match=r"values of \['rate', 'count'\] and scales of"):
        recorded().append(Row(30, 3, {"rate": 1.0}, {"rate": 1.0}))


def test_at_refuses_an_empty_schedule() -> None:
    with pytest.raises(ValueError, match="empty"):
        Schedule({"rate": RATE}).at(0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the columns"),
        ("[1]", "line 1: expected a line end"),
        ("a,b\n", "expected the columns"),
        ("step,epoch,rate,rate_sigma\n", "expected the columns"),
        ("step,epoch,rate,rate_scale\n0,0,0.1\n", "line 2"),
        ("step,epoch,rate,rate_scale\n0,0,0.1,0.5\n1,0,x,0.5\n", "line 3"),
        ("step,epoch,rate,rate_scale\n5,0,0.1,0.5\n5,0,0.1,0.5\n", "line 3"),
        ("step,epoch,op,op_flip_scale\n", "expected the columns"),
        ("step,epoch,op,op_a_scale,rate_scale\n", "expected the columns"),
        ("step,epoch,op,op_a_scale,op_b_scale\n0,0,c,0.5,0.5\n", "line 2: .*op to be one of .*'a', 'b'.*, got 'c'"),
        ("step,epoch,op,op_a_scale,op_b_scale\n0,0,a,a,0.5\n", "line 2"),
        (
            HEADER + "0,0,0.1,0.5\n1,0,0.25,0.123",
            "line 3: expected a line end, .*cut off; delete this row",
        ),
        (HEADER + "0,0,0.1,", "line 2: expected a line end"),
        ("step,epoch,rate,rate_scale", "line 1: expected a line end"),
        (HEADER + "inf,0,0.1,0.5\n", "line 2: .*Expected step to be a finite number, got 'inf'; correct the cell"),
        (HEADER + "0,1e999,0.1,0.5\n", "line 2: .*Expected epoch to be a finite number"),
        (HEADER + "1.5,0,0.1,0.5\n", "line 2: .*Expected step to be a whole number of at least 0, got '1.5'"),
        (HEADER + "-1,0,0.1,0.5\n", "line 2: .*Expected step to be a whole number of at least 0, got '-1'"),
        (HEADER + "0,0,nan,0.5\n", "line 2: .*Expected rate to be a finite number, got 'nan'"),
        (HEADER + f"0,0,{10**400},0.5\n", r"line 2: .*Expected rate to be a finite number, got '1000.*\.\.\.0*'"),
        (HEADER + f"0,0,{'5' * 5000},0.5\n", "line 2: .*Expected rate to be a finite number"),
        (HEADER + "0,0,0.1,-inf\n", "line 2: .*Expected rate_scale to be a finite number"),
        (HEADER + "0,0,0.1,0.5\n" + "9" * 200_000 + "\n", r"line 3: not CSV \(field larger than field limit"),
        (HEADER + '0,0,"0.1,0.5\n', r"line \d: not CSV \(unexpected end of data"),
        (HEADER + "0,0,0.1\r,0.5\n", r"schedule\.csv, line \d: "),
        (
            b"step,epoch,rate,rate_scale\n0,0,0.1,0.5\n1,0,\xff,0.5\n",
            "line 3: expected text in UTF-8, got the byte 0xff",
        ),
        (HEADER.encode("utf-16"), "line 1: expected text in UTF-8"),
        (HEADER + "0,0,\0,0.5\n", "line 2"),
    ],
)
def test_load_names_file_and_line_of_a_broken_file(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "schedule.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as caught:
        Schedule.load(path)
    assert str(path) in str(caught.value)


@given(st.data())
def test_load_reads_no_file_that_is_cut_off_within_a_line(tmp_path_factory: Any, data: Any) -> None:
    path = tmp_path_factory.mktemp("schedule") / "schedule.csv"
    chosen().save(path)
    whole = path.read_bytes()
    cut = data.draw(st.integers(1, len(whole) - 1).filter(lambda end: whole[end - 1 : end] != b"\n"))
    path.write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=r"schedule\.csv, line \d: "):
        Schedule.load(path)


def test_load_reads_what_a_spreadsheet_saves(tmp_path: Path) -> None:
    path = tmp_path / "schedule.csv"
    recorded().save(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert in_csv(Schedule.load(path)) == in_csv(recorded())


def test_schedule_file_is_utf_8_in_every_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("locale.getpreferredencoding", lambda *args: "ascii")
    for name in ("schedule.csv", "schedule.json"):
        chosen().save(tmp_path / name)
        assert "é/°C" in (tmp_path / name).read_bytes().decode("utf-8")
        assert in_csv(Schedule.load(tmp_path / name)) == in_csv(chosen())


@pytest.mark.parametrize("path", [0, 5, None, b"schedule.csv", 0.5])
def test_load_refuses_what_is_not_a_path(path: Any) -> None:
    with pytest.raises(TypeError, match=r"Schedule\.load: expected path to be a string or a Path, got"):
        Schedule.load(path)


def test_at_takes_any_number() -> None:
    assert recorded().at(10**400)["count"] == 20
    with pytest.raises(ValueError, match="step to be a number of training batches, got nan"):
        recorded().at(float("nan"))  # type: ignore[arg-type]


COUNT = Integer(0, 100)
CHOICES = ("1", "0.5", "nan", 'so, "quoted"', "a_scale", "é/°C")


def chosen() -> Schedule:
    schedule = Schedule({"rate": Float(0.0, None, init=1.0), "op": Categorical(CHOICES, CHOICES[0]), "count": COUNT})
    scales = {"rate": 0.5, **{f"op_{choice}": index / 7 for index, choice in enumerate(CHOICES)}, "count": 0.1}
    for step, choice in enumerate(CHOICES):
        schedule.append(Row(step, 0, {"rate": step / 3, "op": choice, "count": step}, scales))
    return schedule


def test_choices_round_trip_as_text(tmp_path: Path) -> None:
    schedule = chosen()
    schedule.save(tmp_path / "schedule.csv")
    loaded = Schedule.load(tmp_path / "schedule.csv")
    assert in_csv(loaded) == in_csv(schedule)
    assert [row.values["op"] for row in loaded.rows] == list(CHOICES)
    assert [type(value) for value in loaded.at(3).values()] == [float, str, int]
    assert loaded.csv_columns == [
        *("step", "epoch", "rate", "op", "count", "rate_scale"),
        *(f"op_{choice}_scale" for choice in CHOICES),
        "count_scale",
    ]


def test_cells_round_trip() -> None:
    schedule = chosen()
    assert [schedule.row(schedule.cells(row)) for row in schedule.rows] == schedule.rows


def test_append_refuses_an_unknown_choice() -> None:
    schedule = chosen()
    row = schedule.rows[-1]
    with pytest.raises(ValueError, match=r"Expected op to be one of .*, got 'other'"):
        schedule.append(Row(99, 0, {**row.values, "op": "other"}, row.scales))


@pytest.mark.parametrize(
    ("names", "choices"),
    [
        (("step",), {}),
        (("a", "a_scale"), {}),
        (("a", "a_b"), {"a": ("b", "c")}),
        (("a", "a_b"), {"a": ("b_c", "d")}),
        (("a", "a_b_scale"), {"a": ("b", "c")}),
        (("a",), {"a": ("b", "c", "d", "b_scale")}),
    ],
)
def test_schedule_refuses_colliding_columns(names: tuple[str, ...], choices: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(ValueError, match="collides"):
        Schedule(specified(names, choices))


@dataclass(frozen=True)
class Sizes(Hyperparameter):
    """A number with several entries."""

    init: float
    names: tuple[str, ...]
    scale: float = 0.5
    perturb: Any = "example"

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.names)

    def unconstrained_init(self) -> list[float]:
        return [self.init] * len(self.names)

    def read(self, unconstrained: torch.Tensor) -> torch.Tensor:
        return unconstrained.mean(-1)

    def to_python(self, value: torch.Tensor) -> float:
        return value.item()


Labels = dict[str, tuple[str, ...]]


def specified(names: Sequence[str], choices: Labels, parts: Labels | None = None) -> dict[str, Hyperparameter]:
    """A choice, a number with parts, or a number for each name."""
    kinds: dict[str, Hyperparameter] = dict.fromkeys(names, RATE)
    kinds |= {name: Categorical(labels, labels[0]) for name, labels in choices.items()}
    return kinds | {name: Sizes(0.5, labels) for name, labels in (parts or {}).items()}


WORDS = st.sampled_from(["a", "b", "scale", "a_b", "a_scale", "a_b_scale", "b_scale", "b_a"])


@given(st.lists(WORDS, min_size=1, max_size=5, unique=True), st.data())
def test_accepted_schedule_reads_back(tmp_path_factory: Any, names: list[str], data: Any) -> None:
    several = st.lists(WORDS, min_size=2, max_size=4, unique=True).map(tuple)
    choices = {name: data.draw(several) for name in names if data.draw(st.booleans())}
    try:
        schedule = Schedule(specified(names, choices))
    except ValueError as error:
        assert "collides" in str(error)  # noqa: PT017
        return
    folder = tmp_path_factory.mktemp("schedule")
    values = {name: choices[name][0] if name in choices else 0.5 for name in names}
    schedule.append(Row(0, 0, values, dict.fromkeys(schedule.scale_names, 0.25)))
    for name in ("schedule.csv", "schedule.json"):
        schedule.save(folder / name)
        assert in_csv(Schedule.load(folder / name)) == in_csv(schedule)


@given(st.lists(WORDS | st.sampled_from(["b_c"]), min_size=1, max_size=5, unique=True), st.data())
def test_a_schedule_with_parts_that_is_accepted_can_be_read_back(
    tmp_path_factory: Any, names: list[str], data: Any
) -> None:
    several = st.lists(WORDS, min_size=2, max_size=3, unique=True).map(tuple)
    kinds = {name: data.draw(st.sampled_from(["number", "choices", "parts"])) for name in names}
    choices, parts = (
        {name: data.draw(several) for name in names if kinds[name] == kind} for kind in ("choices", "parts")
    )
    try:
        schedule = Schedule(specified(names, choices, parts))
    except ValueError as error:
        assert "collides" in str(error)  # noqa: PT017
        return
    folder = tmp_path_factory.mktemp("schedule")
    values = {name: choices[name][0] if name in choices else 0.5 for name in names}
    schedule.append(Row(0, 0, values, dict.fromkeys(schedule.scale_names, 0.25)))
    for name in ("schedule.csv", "schedule.json"):
        schedule.save(folder / name)
        assert in_csv(Schedule.load(folder / name)) == in_csv(schedule)


def test_parts_are_columns_after_a_dot() -> None:
    schedule = Schedule({"size": Sizes(0.5, ("coarse", "fine")), "rate": RATE})
    assert schedule.csv_columns[:4] == ["step", "epoch", "size", "rate"]
    assert schedule.csv_columns[4:] == ["size.coarse_scale", "size.fine_scale", "rate_scale"]


@given(st.lists(WORDS, min_size=1, unique=True))
def test_numbers_collide_only_with_the_scale_of_another(names: list[str]) -> None:
    collide = any(f"{name}_scale" in names for name in names)
    if not collide:
        assert Schedule(dict.fromkeys(names, RATE)).scale_names == tuple(names)
