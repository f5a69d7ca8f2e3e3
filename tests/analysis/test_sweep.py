"""Curves of the validation loss equal evaluations with effective weights that are built by hand."""

import pytest
import torch
from analysis.networks import LitMlp, batches, loss_by_hand
from torch import nn

from lightning_stn import Categorical, Float, STNModule
from lightning_stn.analysis import sweep, sweep_pair
from lightning_stn.binding import bind

DATA = batches(4, 4, 3)

COORDINATES = {"uncentred": (False, 1.0), "centred": (True, 1.0), "centred, half gates": (True, 0.5)}
"""`centred` and `gate_scale` of the set."""


def in_coordinates(module: LitMlp, coordinates: tuple[bool, float]) -> LitMlp:
    module.hyperparameters.centred, module.hyperparameters.gate_scale = coordinates
    return module


@pytest.mark.parametrize("coordinates", COORDINATES.values(), ids=COORDINATES)
@pytest.mark.parametrize("response", ["full", "gates"])
def test_sweep_equals_evaluation_with_effective_weights_built_by_hand(response, coordinates):
    module = in_coordinates(LitMlp(response), coordinates)
    found = sweep(module, DATA, points=5, width=1.5)
    assert found.names == ("rate", "noise", "length")
    assert found.offsets.tolist() == [-1.5, -0.75, 0.0, 0.75, 1.5]
    exact = torch.empty(3, 5).double()
    for entry in range(3):
        for point, offset in enumerate(found.offsets):
            sample = module.hyperparameters.unconstrained.double()
            sample[entry] += offset
            exact[entry, point] = loss_by_hand(module, sample, DATA)
    torch.testing.assert_close(found.losses, exact, rtol=0, atol=1e-10)
    assert found.losses.std(1).min() > 1e-3
    now = loss_by_hand(module, module.hyperparameters.unconstrained, DATA)
    assert found.loss == pytest.approx(now, abs=1e-10)
    assert found.losses[:, 2].tolist() == pytest.approx([now] * 3, abs=1e-10)


@pytest.mark.parametrize("coordinates", COORDINATES.values(), ids=COORDINATES)
def test_sweep_pair_equals_evaluation_with_effective_weights_built_by_hand(coordinates):
    module = in_coordinates(LitMlp(), coordinates)
    found = sweep_pair(module, DATA, ("length", "rate"), points=3, width=1.0)
    exact = torch.empty(3, 3).double()
    for row, first in enumerate(found.offsets):
        for column, second in enumerate(found.offsets):
            sample = module.hyperparameters.unconstrained.double()
            sample[2] += first
            sample[0] += second
            exact[row, column] = loss_by_hand(module, sample, DATA)
    assert found.names == ("length", "rate")
    torch.testing.assert_close(found.losses, exact, rtol=0, atol=1e-10)


def test_sweep_of_a_float32_network_equals_that_in_float64():
    module = LitMlp()
    exact = sweep(module, DATA, points=3).losses
    single = [(inputs.float(), labels) for inputs, labels in DATA]
    torch.testing.assert_close(sweep(module.float(), single, points=3).losses, exact, rtol=1e-5, atol=1e-5)


def test_sweep_gives_values_in_natural_units_and_whole_numbers_before_rounding():
    found = sweep(LitMlp(), DATA, points=3, width=1.0)
    rate, noise, length = (one.value for one in found.swept)
    assert (rate, noise, length) == (0.1, 0.2, 2.0)
    assert found.values["rate"].tolist() == pytest.approx([0.9 / (1 + 8 * torch.e), 0.1, 0.9 / (1 + 8 / torch.e)])
    assert found.values["noise"].tolist() == pytest.approx([0.2 / torch.e, 0.2, 0.2 * torch.e])
    assert found.values["length"].tolist() == pytest.approx([0.8447, 2.0, 3.1553], abs=1e-4)


def test_table_has_a_row_for_each_point_and_print_one_for_each_hyperparameter():
    found = sweep(LitMlp(), DATA, ("noise", "rate"), points=3)
    assert [row["hyperparameter"] for row in found.table()] == ["noise"] * 3 + ["rate"] * 3
    assert [row["loss"] for row in found.table()] == found.losses.flatten().tolist()
    assert len(str(found).splitlines()) == 4
    assert repr(found) == "Sweep of noise, rate: 3 points each, 2 unconstrained units each way"
    lowest = found.summary()[0]
    assert lowest["lowest loss"] == found.losses[0].min().item()
    assert lowest["lowest at"] == found.values["noise"][found.losses[0].argmin()].item()


def test_module_sweep_is_the_short_form():
    module = LitMlp()
    found = module.sweep(DATA, "rate", points=4, width=0.5, batches=2)
    exact = sweep(module, DATA[:2], ["rate"], points=4, width=0.5)
    torch.testing.assert_close(found.losses, exact.losses)


def test_sweep_reads_the_loader_once():
    module, read = LitMlp(), []

    def loader():
        for batch in DATA:
            read.append(batch)
            yield batch

    found = sweep(module, loader(), points=3)
    assert len(read) == len(DATA)
    torch.testing.assert_close(found.losses, sweep(module, DATA, points=3).losses)


def test_sweep_counts_batches_equally_where_their_sizes_are_unknown():
    class LitUnknown(LitMlp):
        def infer_batch_size(self, batch):
            raise ValueError("no size")

    module = LitUnknown()
    sample = module.hyperparameters.unconstrained
    parts = [loss_by_hand(module, sample, [batch]) for batch in DATA]
    assert sweep(module, DATA, "rate", points=2).loss == pytest.approx(sum(parts) / 3)


def test_sweep_of_a_network_with_a_hidden_state_sees_the_batches_in_order():
    class LitStateful(LitMlp):
        state = 0.0

        def validation_loss(self, batch, batch_idx):
            before = self.state if batch_idx else torch.zeros(3).double()
            self.state = before + self.net(batch[0]).mean(0)
            return self.state.square().sum()

    module, equal = LitStateful(), batches(4, 4, 4)
    sample = module.hyperparameters.unconstrained.double()
    sample[0] += 1.0
    found = sweep(module, equal, "rate", points=3, width=1.0)
    state, losses = torch.zeros(3).double(), []
    for inputs, _ in equal:
        with torch.no_grad(), bind(module.hyperparameters, sample[None]):
            state = state + module.net(inputs).mean(0)
        losses.append(state.square().sum().item())
    assert found.losses[0, -1].item() == pytest.approx(sum(losses) / 3)


def test_sweep_draws_the_same_random_numbers_at_all_points():
    class LitNoisy(LitMlp):
        def validation_loss(self, batch, batch_idx):
            return torch.rand(()) + 0 * self.net(batch[0]).sum()

    found = sweep(LitNoisy(), DATA, points=3)
    assert found.losses.unique().numel() == 1
    assert found.loss == found.losses[0, 0]


def test_losses_that_are_not_finite_stay_in_the_sweep_and_out_of_its_summary():
    class LitOverflow(LitMlp):
        def validation_loss(self, batch, batch_idx):
            loss = super().validation_loss(batch, batch_idx)
            return loss / 0 if loss > self.limit else loss

    module = LitOverflow()
    module.limit = torch.inf
    whole = sweep(module, DATA[:1], "rate", points=5)
    module.limit = whole.losses.median().item()
    cut = sweep(module, DATA[:1], "rate", points=5)
    assert cut.losses.isinf().sum() == 2
    assert cut.summary()[0]["highest loss"] == module.limit
    module.limit = -torch.inf
    assert "nan" in str(sweep(module, DATA[:1], "rate", points=5))
    assert "nan" in str(sweep_pair(module, DATA[:1], ("rate", "noise"), points=2))


def test_sweep_leaves_choices_out_unless_they_are_named():
    module = LitMlp(kind=Categorical(("a", "b"), init="a"), rate=Float(0.0, 1.0))
    assert sweep(module, DATA, points=2).names == ("rate",)
    with pytest.raises(ValueError, match="expected names of numbers, got 'kind', a Categorical"):
        sweep(module, DATA, "kind")
    with pytest.raises(ValueError, match="got only \\['kind'\\]"):
        sweep(LitMlp(kind=Categorical(("a", "b"), init="a")), DATA)


ARGUMENTS = {
    "unknown name": ({"names": "dropuot"}, KeyError, "'dropuot', which is not one of"),
    "names that are no names": ({"names": [3]}, TypeError, "expected names to be a list of names, got \\[3\\]"),
    "no names": ({"names": []}, ValueError, "expected names to be different hyperparameters, got \\[\\]"),
    "a name twice": ({"names": ["rate", "rate"]}, ValueError, "name each once"),
    "one point": ({"points": 1}, ValueError, "expected points to be a whole number of at least 2, got 1"),
    "fractional points": ({"points": 2.5}, ValueError, "got 2.5"),
    "no width": ({"width": 0.0}, ValueError, "expected width to be a positive number"),
    "width that is no number": ({"width": float("nan")}, ValueError, "expected width"),
    "no batches": ({"batches": 0}, ValueError, "expected batches to be a whole number of at least 1, got 0"),
    "empty loader": ({"loader": []}, ValueError, "expected a loader with at least one batch, got none"),
    "no examples": ({"loader": batches(0)}, ValueError, "at least one example, got batches of the sizes \\[0\\]"),
}


@pytest.mark.parametrize(("changed", "error", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_sweep_names_the_wrong_argument(changed, error, message):
    with pytest.raises(error, match=message):
        sweep(LitMlp(), **{"loader": DATA, **changed})


@pytest.mark.parametrize("names", ["rate", ("rate", "noise", "length")])
def test_sweep_pair_refuses_other_numbers_of_hyperparameters(names):
    with pytest.raises(ValueError, match="expected names to be two hyperparameters"):
        sweep_pair(LitMlp(), DATA, names)


@pytest.mark.parametrize("module", [None, nn.Linear(2, 2)], ids=["None", "a plain network"])
def test_sweep_refuses_what_is_no_stn_module(module):
    with pytest.raises(TypeError, match=f"sweep: expected module to be an STNModule, got {type(module).__name__}"):
        sweep(module, DATA)


def test_sweep_refuses_a_module_without_a_converted_network():
    class LitPlain(STNModule):
        def __init__(self):
            super().__init__(hyperparameters={"rate": Float(0.0, 1.0)})
            self.net = nn.Linear(2, 2)

    with pytest.raises(ValueError, match="expected module to hold a converted network, got LitPlain"):
        sweep(LitPlain(), DATA)


def test_sweep_refuses_a_loss_that_is_no_scalar():
    class LitRows(LitMlp):
        def validation_loss(self, batch, batch_idx):
            return self.net(batch[0])

    with pytest.raises(ValueError, match="Expected validation_loss to return a scalar tensor"):
        sweep(LitRows(), DATA)
