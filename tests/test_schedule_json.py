"""The JSON form of a schedule: what it holds, and files that are malformed, cut off, huge or hostile."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_stn import Categorical, Float, Hyperparameter, HyperparameterSet, Integer, Schedule
from lightning_stn.schedule import Row, text_file

SPECIFICATIONS = {
    "rate": Float(0.0, 0.9, init=0.05),
    "decay": Float(1e-6, 1e-1, init=3e-4, log=True),
    "length": Integer(0, 16, init=4, unit="pixels"),
    "op": Categorical(("a", "b"), init="b"),
}


def recorded() -> Schedule:
    hyperparameters = HyperparameterSet(SPECIFICATIONS)
    schedule = hyperparameters.schedule()
    for step in (0, 10, 20):
        scales = dict.fromkeys(schedule.scale_names, 0.5)
        unrounded = hyperparameters.unrounded()
        schedule.append(Row(step, step // 10, hyperparameters.values(), scales, 0.25, None, unrounded))
        hyperparameters.unconstrained.add_(0.37)
    schedule.warmup = 7
    return schedule


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of three rows."""
    recorded().save(tmp_path / "schedule.json")
    return tmp_path / "schedule.json"


def test_json_holds_ranges_starts_units_warmup_and_losses(path: Path) -> None:
    schedule = Schedule.load(path)
    assert schedule.specifications == SPECIFICATIONS
    assert schedule.specifications["length"].unit == "pixels"
    assert (schedule.warmup, schedule.rows[0].train_loss, schedule.rows[0].valid_loss) == (7, 0.25, None)


def test_values_are_written_as_short_decimals(path: Path) -> None:
    document = json.loads(path.read_text())
    assert document["rows"][0] == [0, 0, 0.05, 0.0003, 4, "b", 0.5, 0.5, 0.5, 0.5, 0.5, 0.25, None, 4.0]


@given(st.floats(-12, 12, width=32), st.floats(-12, 12, width=32))
def test_recorded_value_gives_back_the_float32_entry(rate: float, decay: float) -> None:
    hyperparameters = HyperparameterSet(SPECIFICATIONS)
    hyperparameters.unconstrained[0], hyperparameters.unconstrained[1] = rate, decay
    for name, entry in zip(("rate", "decay"), hyperparameters.unconstrained, strict=False):
        value = hyperparameters.values()[name]
        (given_back,) = hyperparameters.specifications[name].entries(value)
        # In the middle of a range the value, in float64, is coarser than the entry.
        assert float(entry.new_tensor(given_back)) == pytest.approx(float(entry), rel=0, abs=1e-15)


def test_at_interpolates_in_unconstrained_units() -> None:
    schedule = recorded()
    halfway = HyperparameterSet(SPECIFICATIONS)
    halfway.unconstrained.add_(0.37 / 2)
    values = schedule.at(5, "linear")
    assert values["rate"] == pytest.approx(halfway.values()["rate"], rel=1e-6)
    assert values["decay"] == pytest.approx(halfway.values()["decay"], rel=1e-5)
    assert values["length"] == halfway.values()["length"]
    assert values["op"] == schedule.at(5)["op"]
    for step in (-1, 0, 10, 20, 21):
        assert schedule.at(step, "linear") == schedule.at(step)


def test_whole_numbers_interpolate_between_the_numbers_before_rounding() -> None:
    schedule = Schedule({"length": Integer(0, 16)})
    for step, real in ((0, 4.4), (10, 5.4)):
        schedule.append(Row(step, 0, {"length": round(real)}, {"length": 0.5}, unrounded={"length": real}))
    assert [schedule.at(step, "linear")["length"] for step in (0, 2, 9)] == [4, 5, 5]


def edited(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Edit the document of a file."""

    def change(path: Path) -> None:
        document = json.loads(path.read_text())
        edit(document)
        path.write_text(json.dumps(document))

    return change


def replaced(old: str, new: str) -> Callable[[Path], None]:
    """Replace text of a file."""

    def change(path: Path) -> None:
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return change


SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut off": (lambda path: os.truncate(path, path.stat().st_size - 30), r"line \d+: not JSON .*may be cut off"),
    "without its end": (replaced("\n]\n}\n", ""), r"line \d+: not JSON .*delete the last line and end the text"),
    "two documents": (lambda path: path.write_text(path.read_text() * 2), r"line \d+: not JSON \(Extra data\)"),
    "another format": (replaced("lightning_stn.Schedule", "optuna"), "expected format to be .*, got 'optuna'"),
    "a newer version": (replaced('"version": 1', '"version": 99'), "version .*up to 1, got 99; read .* a newer one"),
    "a version that is text": (replaced('"version": 1', '"version": "1"'), "version to be a whole number up to 1"),
    "no rows": (edited(lambda document: document.pop("rows")), "expected rows as list, got None"),
    "rows that are text": (edited(lambda document: document.update(rows="many")), "expected rows as list, got 'many'"),
    "a warm-up that is text": (edited(lambda document: document.update(warmup="7")), "expected warmup as .*got '7'"),
    "a negative warm-up": (edited(lambda document: document.update(warmup=-1)), "warmup to be a number .*got -1"),
    "a row that is an object": (edited(lambda document: document["rows"].append({})), r"rows\[3\]: not a row .*a list"),
    "a row too short": (edited(lambda document: document["rows"][1].pop()), r"rows\[1\]: .*Expected 14 cells, got 13"),
    "a row twice": (edited(lambda d: d["rows"].append(d["rows"][-1])), r"rows\[3\]: .*a step after 20, got 20"),
    "a value that is text": (replaced("0.05, 0.0003", '"much", 0.0003'), r"rows\[0\]: .*rate to be a finite .*'much'"),
    "a value that is true": (replaced("0.05, 0.0003", "true, 0.0003"), r"rows\[0\]: .*rate to be a finite .*True"),
    "a value that is a list": (replaced("0.05, 0.0003", "[], 0.0003"), r"rows\[0\]: .*rate to be a finite number"),
    "NaN": (replaced("0.05, 0.0003", "NaN, 0.0003"), "not the JSON of a schedule .*finite numbers, got NaN"),
    "a huge number": (replaced("0.05, 0.0003", "9" * 5000 + ", 0.0003"), "not the JSON of a schedule"),
    "an infinite number": (replaced("0.05, 0.0003", "1e999, 0.0003"), r"rows\[0\]: .*rate to be a finite number"),
    "an unknown choice": (replaced('"b", 0.5', '"c", 0.5'), r"rows\[0\]: .*op to be one of \['a', 'b'\], got 'c'"),
    "a whole number that is not rounded": (replaced("0.25, null, 4.0", "0.25, null, 9"), r"rows\[0\]: .*rounded to 4"),
    "other columns": (edited(lambda d: d["columns"].reverse()), "expected columns to be"),
    "an unknown kind": (replaced('"kind": "Float"', '"kind": "os.system"'), "hyperparameters.rate: .*'os.system'; imp"),
    "a kind that is a list": (replaced('"kind": "Float"', '"kind": []'), "hyperparameters.rate: expected a kind"),
    "an unknown field": (replaced('"high": 0.9', '"top": 0.9'), r"hyperparameters.rate: .*got \['top'\]; leave"),
    "a missing field": (replaced('"high": 0.9, ', ""), "hyperparameters.rate: .*high"),
    "an empty range": (replaced('"high": 0.9', '"high": -1'), "hyperparameters.rate: .*low < high"),
    "hyperparameters that are a list": (
        edited(lambda document: document.update(hyperparameters=[])),
        "expected hyperparameters as dict",
    ),
    "no hyperparameters": (
        edited(lambda document: document.update(hyperparameters={})),
        "expected at least one hyperparameter",
    ),
    "a name that is no identifier": (replaced('"rate": {', '"a b": {'), "name to be a Python identifier, got 'a b'"),
    "a key twice": (replaced('"warmup": 7', '"warmup": 7, "warmup": 8'), r"each key once, got \['warmup'\] twice"),
    "nested too deeply": (lambda path: path.write_text('{"a":' * 100_000), "not the JSON of a schedule|not JSON"),
    "a list": (lambda path: path.write_text("[]\n"), "expected the columns"),
    "empty": (lambda path: path.write_text(""), "expected the columns"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_load_says_what_is_wrong_with_a_file_and_leaves_it(path: Path, name: str) -> None:
    spoil, message = SPOILED[name]
    spoil(path)
    content = path.read_bytes()
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        Schedule.load(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1500
    assert path.read_bytes() == content


def test_load_refuses_a_file_beyond_the_limit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_file, "LARGEST_FILE", 100)
    with pytest.raises(ValueError, match="expected a file of at most 100 bytes, got"):
        Schedule.load(path)


@given(st.data())
def test_file_cut_off_anywhere_is_refused_with_a_line(tmp_path_factory: Any, data: Any) -> None:
    path = tmp_path_factory.mktemp("schedule") / "schedule.json"
    recorded().save(path)
    os.truncate(path, data.draw(st.integers(3, path.stat().st_size - 3)))
    with pytest.raises(ValueError, match=r"schedule\.json, line \d+: not JSON"):
        Schedule.load(path)


def test_row_without_a_number_before_rounding_is_read(path: Path) -> None:
    edited(lambda document: document["rows"][0].__setitem__(-1, None))(path)
    assert Schedule.load(path).rows[0].unrounded == {}


def test_thin_keeps_the_first_and_the_last_row() -> None:
    for count in range(1, 12):
        schedule = Schedule({"rate": Float(0.0, 1.0)}, [Row(i, 0, {"rate": 0.5}, {"rate": 0.5}) for i in range(count)])
        schedule.thin()
        steps = [row.step for row in schedule.rows]
        assert steps == sorted({*range(0, count, 2), count - 1})


def test_short_forms_of_a_long_schedule_are_short() -> None:
    names = [f"rate{i}" for i in range(40)]
    schedule = Schedule(dict.fromkeys(names, Float(0.0, 1.0)))
    assert repr(schedule) == "Schedule of rate0, rate1, rate2, rate3, rate4, ...: 0 rows"
    for step in range(1000):
        schedule.append(Row(step, 0, dict.fromkeys(names, 0.5), dict.fromkeys(names, 0.5)))
    assert repr(schedule) == "Schedule of rate0, rate1, rate2, rate3, rate4, ...: 1000 rows, steps 0 to 999"
    assert len(schedule) == 1000
    assert schedule._repr_html_().count("<tr>") == 41


def test_html_table_shows_ranges_and_escapes_choices() -> None:
    schedule = Schedule({"rate": Float(0.0, None, init=1.0, unit="<px>"), "op": Categorical(("<a>", "b"), init="<a>")})
    schedule.append(Row(0, 0, {"rate": 0.123456, "op": "<a>"}, dict.fromkeys(schedule.scale_names, 0.5)))
    table = schedule._repr_html_()
    assert "0 to ∞ &lt;px&gt;" in table
    assert "<td>0.1235</td>" in table
    assert "<a>" not in table


def test_data_frame_has_all_columns() -> None:
    pytest.importorskip("pandas")
    schedule = recorded()
    frame = schedule.to_pandas()
    assert list(frame.columns) == schedule.columns
    assert frame["rate"].tolist() == [row.values["rate"] for row in schedule.rows]
    assert frame["valid_loss"].isna().all()


def test_kind_whose_fields_json_does_not_hold_is_refused() -> None:
    class Odd(Float):
        def to_plain(self) -> dict[str, Any]:
            return {**super().to_plain(), "low": {1, 2}}

    with pytest.raises(ValueError, match=r"fields of 'rate' to be finite numbers.*give other fields to its kind"):
        Schedule({"rate": Odd(0.0, 1.0)})


def test_another_class_of_the_same_name_does_not_take_the_place_of_a_kind(path: Path) -> None:
    class Float(Hyperparameter):
        pass

    assert Hyperparameter.kinds["Float"] is not Float
    assert Schedule.load(path).specifications == SPECIFICATIONS


def test_kind_of_a_user_is_found_by_its_name(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Doubled(Float):
        """A further kind."""

    schedule = Schedule({"rate": Doubled(0.0, 1.0)})
    schedule.save(tmp_path / "schedule.json")
    assert type(Schedule.load(tmp_path / "schedule.json").specifications["rate"]) is Doubled
