"""Figures of few and many hyperparameters, in light and dark, with gaps."""

import builtins
import warnings

import matplotlib as mpl
import pytest
import torch

from lightning_stn.analysis import Importance, PairSweep, ResponseFit, Sweep, Swept

mpl.use("Agg")
import matplotlib.pyplot as plt

OFFSETS = torch.linspace(-2, 2, 5).double()
STYLES = ["default", "dark_background"]


def swept(count: int) -> tuple[Swept, ...]:
    return tuple(Swept(f"layer_{i}_attention_dropout", "", 0.5, 0.5, OFFSETS.sigmoid()) for i in range(count))


def make_sweep(count: int) -> Sweep:
    losses = torch.arange(1, count + 1).double()[:, None] * OFFSETS.square() + 1
    losses[0, 0] = torch.nan
    return Sweep(swept(count), OFFSETS, losses, 1.0)


def make_pair() -> PairSweep:
    losses = OFFSETS.square()[:, None] + OFFSETS
    losses[0, 0] = torch.inf
    return PairSweep((swept(2)[0], swept(2)[1]), OFFSETS, losses, 0.0)


def make_importance(count: int) -> Importance:
    losses = torch.linspace(1, 0, count).double()[:, None] * torch.tensor([-1.0, torch.nan, 1.0])
    return Importance(swept(count), losses, losses[:, -1], 0.0)


def make_fit(count: int) -> ResponseFit:
    shifts = torch.tensor([-0.5, 0.5]).double().repeat(count)
    predicted = torch.linspace(-1, 1, 2 * count).double()
    actual = 2 * predicted + 0.1 * shifts
    actual[0] = torch.nan
    return ResponseFit(tuple(one.name for one in swept(count) for _ in "-+"), shifts, predicted, actual, 1.0, 1.0)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("count", [1, 3, pytest.param(40, marks=pytest.mark.slow)])
def test_sweep_has_a_panel_for_each_hyperparameter(count, style):
    with plt.style.context(style):
        figure, panels = make_sweep(count).plot()
        figure.canvas.draw()
    assert len(panels) == count
    assert "".join(panels[-1].get_title().split("\n")) == f"layer_{count - 1}_attention_dropout"
    curve = panels[0].lines[1]
    assert curve.get_ydata()[1:].tolist() == [2.0, 1.0, 2.0, 5.0]
    assert panels[0].get_ylim() == panels[-1].get_ylim()
    assert [text.get_text() for text in panels[0].get_xticklabels()] == ["0.12", "0.5", "0.88"]


def test_panels_of_a_sweep_have_their_own_loss_axes_on_request():
    _, panels = make_sweep(3).plot(same_scale=False)
    assert panels[0].get_ylim() != panels[-1].get_ylim()


@pytest.mark.parametrize("style", STYLES)
def test_pair_sweep_marks_the_lowest_finite_loss(style):
    with plt.style.context(style):
        figure, ax = make_pair().plot()
        figure.canvas.draw()
    star = ax.lines[-1]
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (0.0, -2.0)


@pytest.mark.parametrize("fill", [1.0, torch.nan], ids=["constant", "not finite"])
def test_figures_of_losses_without_a_shape_raise_no_warning(fill):
    constant = torch.full((5, 5), fill).double()
    results = (
        PairSweep((swept(2)[0], swept(2)[1]), OFFSETS, constant, fill),
        Sweep(swept(5), OFFSETS, constant, fill),
        Importance(swept(5), constant, constant[0], fill),
        ResponseFit(("rate",) * 5, OFFSETS, constant[0], constant[0], fill, fill),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for result in results:
            result.plot()[0].canvas.draw()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("count", [3, 40])
def test_importance_has_two_bars_for_each_hyperparameter(count, style):
    with plt.style.context(style):
        figure, ax = make_importance(count).plot()
        figure.canvas.draw()
    assert [len(bars) for bars in ax.containers] == [count, count]
    assert ax.containers[0][0].get_width() == 1.0
    assert ax.containers[1][0].get_width() == -1.0


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("count", [3, 40])
def test_response_fit_names_few_hyperparameters_in_the_legend_and_of_many_the_farthest(count, style):
    with plt.style.context(style):
        figure, ax = make_fit(count).plot()
        figure.canvas.draw()
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert ("layer_0_attention_dropout" in legend) == (count == 3)
    assert bool(ax.texts) == (count == 40)
    assert ax.get_title() == f"correlation 0.999, slope {make_fit(count).slope:.2f}"


@pytest.mark.parametrize("make", [make_pair, lambda: make_importance(3), lambda: make_fit(3)])
def test_plot_draws_on_given_axes(make):
    figure, ax = plt.subplots()
    assert make().plot(ax) == (figure, ax)


def test_plot_without_matplotlib_says_how_to_install_it(monkeypatch):
    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ModuleNotFoundError, match=r'needs matplotlib; run: pip install "lightning-stn\[plot\]"$'):
        make_sweep(1).plot()
