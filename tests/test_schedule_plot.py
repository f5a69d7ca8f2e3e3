"""Pictures of schedules: which axes there are, and what is drawn on them."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from lightning_stn import Categorical, Float, HyperparameterSet, Integer, Schedule
from lightning_stn.schedule import Row
from lightning_stn.specifications import Hyperparameter

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

MIXED = {
    "rate": Float(0.0, 0.9, init=0.1),
    "decay": Float(1e-6, 1e-1, init=1e-4, log=True),
    "length": Integer(0, 16, init=4, unit="pixels"),
    "op": Categorical(("a", "b"), init="b"),
}


def recorded(specifications: dict[str, Hyperparameter], seed: int = 0, losses: bool = True) -> Schedule:
    hyperparameters = HyperparameterSet(specifications)
    schedule = hyperparameters.schedule()
    schedule.warmup = 20
    for step in (0, 10, 20, 30):
        scales, loss = dict.fromkeys(schedule.scale_names, 0.5), 1 / (step + 1) if losses else None
        unrounded = hyperparameters.unrounded()
        valid = 0.5 if losses and step > 20 else None
        schedule.append(Row(step, 0, hyperparameters.values(), scales, loss, valid, unrounded))
        hyperparameters.unconstrained.add_(0.3 + seed)
    return schedule


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    plt.close("all")


def titles(axes: list[Any]) -> list[str]:
    return [one.get_title() for one in axes]


@pytest.mark.parametrize("name", ["rate", "dropout_encoder_layers_0_self_attn"])
def test_legend_of_a_shared_panel_is_no_wider_than_the_panel(name: str) -> None:
    figure, axes = recorded({f"{name}_{index}": Float(0.0, 0.9, init=0.1) for index in range(10)}).plot()
    figure.canvas.draw()
    for panel in axes[1:]:
        legend, inside = panel.get_legend().get_window_extent(), panel.get_window_extent()
        assert inside.x0 <= legend.x0 < legend.x1 <= inside.x1
        assert inside.y0 <= legend.y0 < legend.y1 <= inside.y1
        assert inside.width > figure.get_window_extent().width / 4


def test_whole_number_that_does_not_move_has_whole_ticks() -> None:
    schedule = recorded({"length": Integer(0, 16, init=4), "rate": Float(0.0, 0.9, init=0.1)})
    for row in schedule.rows:
        row.values["length"] = 4
    figure, axes = schedule.plot()
    figure.canvas.draw()
    assert "4" in (labels := [text.get_text() for text in axes[1].get_yticklabels()])
    assert all(label.isdigit() for label in labels)


def test_plot_draws_losses_above_a_panel_for_each_hyperparameter() -> None:
    schedule = recorded(MIXED)
    figure, axes = schedule.plot()
    assert titles(axes) == ["", *MIXED]
    assert figure.axes == axes
    training, validation = axes[0].get_lines()
    assert list(training.get_xdata()) == [0, 10, 20, 30]
    assert list(validation.get_xdata()) == [30]
    for name, panel in zip(MIXED, axes[1:], strict=True):
        values = [row.values[name] for row in schedule.rows]
        expected = [("a", "b").index(value) if isinstance(value, str) else value for value in values]
        assert list(panel.get_lines()[0].get_ydata()) == expected
    figure.canvas.draw()


def test_axes_suit_the_values() -> None:
    _, (_, rate, decay, length, op) = recorded(MIXED).plot()
    assert decay.get_yscale() == "log"
    assert (rate.get_ylabel(), length.get_ylabel()) == ("", "pixels")
    assert [text.get_text() for text in op.get_yticklabels()] == ["a", "b"]
    assert [one.get_lines()[0].get_drawstyle() for one in (rate, length, op)] == ["default", "steps-post", "steps-post"]
    assert all(tick == round(tick) for tick in length.get_yticks())


def test_band_reaches_one_scale_to_each_side() -> None:
    schedule = recorded(MIXED)
    _, (_, rate, _, length, _) = schedule.plot()
    band, _ = rate.collections[0], rate.patches
    heights = [y for x, y in band.get_paths()[0].vertices if x == 30]
    (centre,) = MIXED["rate"].entries(schedule.rows[-1].values["rate"])
    edges = [0.9 / (1 + 2.718281828459045 ** -(centre + side)) for side in (-0.5, 0.5)]
    assert (min(heights), max(heights)) == pytest.approx(edges, rel=1e-5)
    assert not length.collections


def test_warmup_is_shaded_on_every_panel() -> None:
    _, axes = recorded(MIXED).plot()
    for one in axes:
        (shade,) = one.patches
        assert shade.get_extents().transformed(one.transData.inverted()).intervalx == pytest.approx([0, 20])


@pytest.mark.parametrize("losses", [True, False])
def test_name_of_the_warmup_lies_above_the_first_panel(losses: bool) -> None:
    figure, axes = recorded(MIXED, losses=losses).plot()
    figure.canvas.draw()
    (name,) = axes[0].texts
    assert name.get_text() == "warm-up"
    assert name.get_window_extent().y0 >= axes[0].get_window_extent().y1  # so that no legend covers it


def test_schedule_without_losses_has_no_panel_for_them() -> None:
    _, axes = recorded(MIXED, losses=False).plot()
    assert titles(axes) == list(MIXED)


def test_runs_are_drawn_over_one_another_with_their_labels() -> None:
    first, second = recorded(MIXED), recorded(MIXED, seed=1)
    _, axes = first.plot(second, labels=["seed 0", "seed 1"])
    assert [len(one.get_lines()) for one in axes] == [4, 2, 2, 2, 2]
    labels = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert labels == ["training, seed 0", "validation, seed 0", "training, seed 1", "validation, seed 1"]


def test_many_hyperparameters_share_panels_by_unit_range_and_scale() -> None:
    many: dict[str, Hyperparameter] = {f"rate{i}": Float(0.0, 0.9) for i in range(18)}
    many |= {f"path{i}": Float(0.0, 0.5) for i in range(3)} | {"angle": Float(0.0, 0.5, unit="degrees")}
    figure, axes = recorded(many).plot()
    assert [len(one.get_lines()) for one in axes] == [2, 6, 6, 6, 3, 1]
    figure.canvas.draw()
    _, axes = recorded(many).plot(group=False)
    assert titles(axes) == ["", *many]


def test_plot_draws_the_names_that_were_asked_for() -> None:
    _, axes = recorded(MIXED).plot(names=["op", "rate"])
    assert titles(axes) == ["", "op", "rate"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["rat"]}, "names holds 'rat', .*misspelt"),
        ({"names": "rate"}, "names to be a list of names, got 'rate'; None draws all"),
        ({"names": []}, r"names to be a list of names, got \[\]; None draws all"),
        ({"labels": ["a", "b"]}, r"expected 1 labels, got \['a', 'b'\]; give one for each"),
    ],
)
def test_plot_refuses_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recorded(MIXED).plot(**arguments)


@pytest.mark.parametrize("other", [Schedule(MIXED), recorded({"rate": MIXED["rate"]}), "schedule.json"])
def test_plot_refuses_what_cannot_be_drawn_over_the_schedule(other: Any) -> None:
    with pytest.raises(ValueError, match=r"Schedule\.plot: expected schedules of .* with rows, got .*; record or load"):
        recorded(MIXED).plot(other)


def test_plot_of_an_empty_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"with rows, got Schedule of rate.*: 0 rows; record or load"):
        Schedule(MIXED).plot()


def test_plot_without_matplotlib_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    message = r'Schedule\.plot needs matplotlib; run: pip install "lightning-stn\[plot\]"$'
    with pytest.raises(ModuleNotFoundError, match=message):
        recorded(MIXED).plot()


def test_data_frame_without_pandas_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="to_pandas needs pandas; run: pip install pandas"):
        recorded(MIXED).to_pandas()
