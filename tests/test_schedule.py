from pathlib import Path

import pytest

from lightning_stn.schedule import Row, Schedule


def recorded() -> Schedule:
    schedule = Schedule(("rate", "count"))
    for step in (0, 10, 20):
        schedule.append(
            Row(step, step // 10, {"rate": 0.1 + step / 7, "count": step}, {"rate": 0.5, "count": 0.25 + step})
        )
    return schedule


def test_csv_round_trip_is_exact(tmp_path: Path) -> None:
    schedule = recorded()
    schedule.save(tmp_path / "schedule.csv")
    assert Schedule.load(tmp_path / "schedule.csv") == schedule
    assert (tmp_path / "schedule.csv").read_text().splitlines()[0] == "step,epoch,rate,count,rate_scale,count_scale"


@pytest.mark.parametrize(("step", "count"), [(-5, 0), (0, 0), (9, 0), (10, 10), (15, 10), (20, 20), (999, 20)])
def test_at_holds_the_last_row(step: int, count: int) -> None:
    assert recorded().at(step)["count"] == count


def test_rows_come_in_order() -> None:
    with pytest.raises(ValueError, match="a step after 20, got 20"):
        recorded().append(recorded().rows[-1])


def test_rows_have_the_schedule_s_names() -> None:
    with pytest.raises(ValueError, match=r"values and scales of \['rate', 'count'\]"):
        recorded().append(Row(30, 3, {"rate": 1.0}, {"rate": 1.0}))


def test_an_empty_schedule_has_no_values() -> None:
    with pytest.raises(ValueError, match="empty"):
        Schedule(("rate",)).at(0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the columns"),
        ("a,b\n", "expected the columns"),
        ("step,epoch,rate,rate_sigma\n", "expected the columns"),
        ("step,epoch,rate,rate_scale\n0,0,0.1\n", "line 2"),
        ("step,epoch,rate,rate_scale\n0,0,0.1,0.5\n1,0,x,0.5\n", "line 3"),
        ("step,epoch,rate,rate_scale\n5,0,0.1,0.5\n5,0,0.1,0.5\n", "line 3"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "schedule.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        Schedule.load(tmp_path / "schedule.csv")
