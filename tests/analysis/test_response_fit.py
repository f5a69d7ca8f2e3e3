"""Predictions of the response against training, on oracles with an exact response and after stochastic training."""

import functools
from typing import Any

import pytest
import torch
from analysis.networks import LitMlp, batches
from science.oracles import double, gauss_hermite, minimize, train
from science.test_dropout_response import FEATURES, LOGIT, MASKS, RATE, chances, least_squares, make_data
from science.test_ridge_bilevel import EXAMPLES, ONE, TWO, LitRidge, Ridge, penalised
from torch import Tensor, nn

from lightning_stn import Categorical, Float, STNModule
from lightning_stn.analysis import ResponseFit, response_fit
from lightning_stn.binding import bind
from lightning_stn.methods.base import recentre

to_convergence = functools.partial(
    torch.optim.LBFGS, max_iter=400, tolerance_grad=1e-11, tolerance_change=1e-16, line_search_fn="strong_wolfe"
)


def fitted_ridge(problem: Ridge, log_decays: Tensor) -> LitRidge:
    """A module whose response is fitted by quadrature, with a small perturbation."""
    torch.manual_seed(0)
    module = LitRidge(problem, log_decays.exp().tolist(), steps=1).double()
    nodes, mass = gauss_hermite(log_decays, double(0.05), order=3)
    inputs, targets = problem.inputs.repeat(len(nodes), 1), problem.targets.repeat(len(nodes))
    sample, weights = nodes.repeat_interleave(EXAMPLES, 0), mass.repeat_interleave(EXAMPLES) / EXAMPLES

    def expected_loss() -> Tensor:
        with bind(module.hyperparameters, sample):
            return (weights * penalised(module.net, inputs, targets, problem.per_feature(sample.exp()))).sum()

    minimize(module.net, expected_loss)
    return module


@pytest.mark.parametrize(
    "centred", [pytest.param(False, id="uncentred", marks=pytest.mark.slow), pytest.param(True, id="centred")]
)
@pytest.mark.parametrize("problem", [ONE, TWO], ids=["one decay", "two decays"])
def test_exact_response_of_ridge_regression_predicts_training_to_convergence(problem, centred):
    module = fitted_ridge(problem, problem.grid_optimum() + 1.0)
    recentre(module, module.hyperparameters, centred)
    data, valid = (problem.inputs, problem.targets), (problem.held_inputs, problem.held_targets)
    found = response_fit(module, [data], [valid], shift=(0.1, 0.2, 0.4), steps=2, optimizer=to_convergence)
    assert len(found.names) == 6 * problem.decays
    current = module.hyperparameters.unconstrained.double()
    for name, shift, actual in zip(found.names, found.shifts, found.actual, strict=True):
        there = current.clone()
        there[module.hyperparameters.slices[name]] += shift
        exact = problem.validation_losses(there) - problem.validation_losses(current)
        assert actual.item() == pytest.approx(exact.item(), abs=1e-5)
    assert found.correlation > 0.99
    assert found.slope == pytest.approx(1, abs=0.1)


class LitMasked(STNModule):
    """Least squares on inputs with dropout, as the expectation over every mask."""

    def __init__(self) -> None:
        super().__init__(hyperparameters={"rate": Float(0.0, 1.0, init=RATE, scale=0.1)})
        self.net = self.convert(nn.Linear(FEATURES, 1, bias=False))

    def errors(self, batch: Any, rate: Tensor) -> Tensor:
        """Squared errors of every mask and example, `[m, n]`, at one rate."""
        masked = batch[0] * MASKS[:, None, :] / (1 - rate)
        return (self.net(masked)[..., 0] - batch[1]).square()

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        rate = self.hyperparameters["rate"].double()
        return (chances(rate) @ self.errors(batch, rate)).mean()

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.net(batch[0])[:, 0] - batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def test_exact_response_to_dropout_predicts_training_to_convergence():
    torch.manual_seed(0)
    module, data = LitMasked().double(), make_data()
    nodes, mass = gauss_hermite(LOGIT, double(0.1), order=5)

    def expected_loss() -> Tensor:
        total = double(0.0).sum()
        for node, weight in zip(nodes, mass, strict=True):
            with bind(module.hyperparameters, node[None]):
                rate = node.sigmoid()
                total = total + weight * (chances(rate) @ module.errors(data, rate)).mean()
        return total

    minimize(module.net, expected_loss)
    valid = (data[0].flip(0), data[1].flip(0) + double(0.3, -0.3).repeat(8))
    found = response_fit(module, [data], [valid], shift=(0.1, 0.2, 0.4), steps=2, optimizer=to_convergence)
    solution = least_squares(*data)
    current = module.hyperparameters.unconstrained.double()

    def loss(logit: Tensor) -> float:
        return (valid[0] @ ((1 - logit.sigmoid()) * solution) - valid[1]).square().mean().item()

    exact = [loss(current + shift) - loss(current) for shift in found.shifts]
    assert found.actual.tolist() == pytest.approx(exact, abs=1e-5)
    assert found.correlation > 0.99
    assert found.slope == pytest.approx(1, abs=0.1)


class LitDropout(LitMasked):
    """The same with one random mask for each example and step."""

    def __init__(self) -> None:
        STNModule.__init__(self, hyperparameters={"rate": Float(0.0, 1.0, init=RATE, scale=0.3)})
        net = nn.Sequential(nn.Dropout(), nn.Linear(FEATURES, 1, bias=False))
        self.net = self.convert(net, dropout="rate")

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return self.validation_loss(batch, batch_idx)


def test_response_trained_with_random_dropout_predicts_training_with_random_dropout():
    torch.manual_seed(0)
    module, (inputs, targets) = LitDropout(), make_data()
    module.hyperparameters.centred = True
    batch = tuple(tensor.float().repeat_interleave(64, 0) for tensor in (inputs, targets))
    generator = torch.Generator().manual_seed(6)
    samples = (module.hyperparameters.sample(1, generator) for _ in range(400))
    train(module, module.hyperparameters, samples, lambda: module.training_loss(batch, 0), lr=0.05)
    held_out = inputs.flip(0).float(), targets.flip(0).float() + double(0.3, -0.3).repeat(8).float()
    found = response_fit(module, [batch], [held_out], shift=(0.2, 0.5), steps=100)
    assert found.correlation > 0.99
    assert found.slope == pytest.approx(1, abs=0.1)


DATA = batches(4, 4, 3)


def test_copies_train_as_the_module_would_at_the_shifted_value():
    class LitScaled(LitMlp):
        def training_loss(self, batch, batch_idx):
            return super().training_loss(batch, batch_idx) * self.hyperparameters["rate"]

    module = LitScaled()
    module.hyperparameters.centred = True
    found = response_fit(module, DATA, DATA, "rate", shift=0.5, steps=5)
    losses = []
    for shift in (0.0, -0.5, 0.5):
        rate = 0.9 * (module.hyperparameters.unconstrained[0] + shift).sigmoid().double()
        with module.net[0].reading_base(), module.net[2].reading_base():
            plain = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
            for own, given in zip((plain[0], plain[2]), (module.net[0], module.net[2]), strict=True):
                own.load_state_dict({"weight": given.weight, "bias": given.bias})
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
        for inputs, labels in [*DATA, *DATA[:2]]:
            optimizer.zero_grad()
            (nn.functional.cross_entropy(plain(inputs), labels) * rate).backward()
            optimizer.step()
        inputs, labels = (torch.cat(column) for column in zip(*DATA, strict=True))
        losses.append(nn.functional.cross_entropy(plain(inputs), labels).item())
    assert found.trained_loss == pytest.approx(losses[0], abs=1e-6)
    assert found.actual.tolist() == pytest.approx([losses[1] - losses[0], losses[2] - losses[0]], abs=1e-6)


def test_copies_differ_in_the_shift_alone_where_training_is_random():
    class LitRandom(LitMlp):
        def training_loss(self, batch, batch_idx):
            return super().training_loss((batch[0] + torch.randn(5), batch[1]), batch_idx)

    found = response_fit(LitRandom(), DATA, DATA, shift=0.5, steps=5)
    assert found.actual.tolist() == [0.0] * 6
    assert torch.isnan(torch.tensor(found.correlation))


@pytest.mark.parametrize("mode", [True, False], ids=["training mode", "eval mode"])
def test_copies_train_in_training_mode_and_with_base_weights_alone(mode):
    class LitWatching(LitMlp):
        def training_loss(self, batch, batch_idx):
            modes.append([self.training, self.net[0].training, self.net[1].training])
            return super().training_loss(batch, batch_idx)

    def factory(parameters):
        sizes.append([list(parameter.shape) for parameter in parameters])
        return torch.optim.SGD(parameters, lr=0.1)

    module, modes, sizes = LitWatching().train(mode), [], []
    module.net[1].eval()
    response_fit(module, DATA, DATA, "rate", steps=1, optimizer=factory)
    assert modes == [[True, True, not mode]] * 3
    assert sizes == [[[7, 5], [7], [3, 7], [3]]] * 3


def test_gradients_of_copies_are_clipped():
    module = LitMlp()
    slow, fast = (response_fit(module, DATA, DATA, "rate", steps=3, gradient_clip_val=g) for g in (1e-6, None))
    assert abs(slow.trained_loss - slow.loss) < 1e-5 < abs(fast.trained_loss - fast.loss)


def test_points_that_are_not_finite_are_left_out_of_the_correlation():
    values = double(1.0, 2.0, 3.0, torch.nan)
    found = ResponseFit(("rate",) * 4, values, values, 2 * values.nan_to_num(5.0), 1.0, 1.0)
    assert (found.correlation, found.slope) == pytest.approx((1.0, 2.0))


def test_optimizer_of_the_module_is_found_beside_its_scheduler():
    class LitScheduled(LitMlp):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    found, exact = (response_fit(m, DATA, DATA, "rate", steps=2).trained_loss for m in (LitScheduled(), LitMlp()))
    assert found == exact


def test_several_optimizers_are_refused():
    class LitTwo(LitMlp):
        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[0], self.net[2])]

    with pytest.raises(ValueError, match="expected configure_optimizers to return one optimiser, got 2; pass"):
        response_fit(LitTwo(), DATA, DATA)
    response_fit(LitTwo(), DATA, DATA, "rate", steps=1, optimizer=functools.partial(torch.optim.Adam, lr=0.1))


ARGUMENTS = {
    "no shift": ({"shift": 0.0}, ValueError, "expected shift to be a positive number in unconstrained units"),
    "no shifts": ({"shift": ()}, ValueError, "expected shift"),
    "steps that are no number": ({"steps": "10"}, ValueError, "expected steps to be a whole number of at least 1"),
    "clipping to nothing": ({"gradient_clip_val": 0}, ValueError, "expected gradient_clip_val to be a positive"),
    "no optimiser": ({"optimizer": list}, TypeError, "expected optimizer to build a torch.optim.Optimizer, got list"),
    "no training data": ({"train_loader": []}, ValueError, "expected train_loader to yield batches, got none"),
    "no validation data": ({"valid_loader": []}, ValueError, "expected a loader with at least one batch"),
    "unknown name": ({"names": "rat"}, KeyError, "'rat' or 'rate' is misspelt"),
}


@pytest.mark.parametrize(("changed", "error", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_response_fit_names_the_wrong_argument(changed, error, message):
    with pytest.raises(error, match=message):
        response_fit(LitMlp(), **{"train_loader": DATA, "valid_loader": DATA, **changed})


def test_response_fit_leaves_choices_out():
    module = LitMlp(kind=Categorical(("a", "b"), init="a"), rate=Float(0.0, 1.0))
    assert set(response_fit(module, DATA, DATA, steps=1).names) == {"rate"}
