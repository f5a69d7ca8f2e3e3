"""Modules of any type, whose parameters respond while `forward` runs, for samples of one row."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import LitSmall, fit, random_gates
from torch import Tensor, nn

from lightning_stn import ConversionError, Float, HyperparameterSet, STNCallback, convert, export
from lightning_stn.binding import bind
from lightning_stn.layers import GenericResponse
from lightning_stn.methods.base import recentre


class Tokens(nn.Module):
    """Parameters of several shapes, and a child."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 4))
        self.gain = nn.Parameter(torch.tensor(2.0))
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.child = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.child(x + self.token) * self.gain * self.frozen
        return out


def converted() -> tuple[Tokens, HyperparameterSet]:
    hyperparameters = HyperparameterSet({"a": Float(0.0, 1.0, init=0.5), "b": Float(0.0, 1.0, init=0.5)})
    net = convert(Tokens().double(), hyperparameters)
    assert isinstance(net, Tokens)
    return net, hyperparameters


def test_generic_response_equals_explicit_effective_parameters() -> None:
    net, hyperparameters = converted()
    random_gates(net)
    sample, x = torch.randn(1, 2, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64)
    with bind(hyperparameters, sample):
        output = net(x)
        token = net.base_parameter("token") + (net.token_gate @ sample[0]) * net.response_token  # type: ignore[operator]
        child = net.child(x + token)  # type: ignore[operator]
    gain = net.gain + (net.gain_gate @ sample[0]).squeeze() * net.response_gain  # type: ignore[operator]
    torch.testing.assert_close(output, child * gain)


def test_gates_act_on_the_first_dimension_longer_than_one() -> None:
    net, _ = converted()
    assert net.token_gate.shape == (4, 2)  # type: ignore[union-attr]
    assert net.gain_gate.shape == (1, 2)  # type: ignore[union-attr]
    assert net.frozen_gate is None


def test_response_of_a_constant_parameter_is_not_zero() -> None:
    net, _ = converted()
    assert (net.response_token == 1).all()  # type: ignore[union-attr]
    assert net.response_gain == 2


def test_zero_gates_keep_outputs_and_state_dict_keys() -> None:
    plain = Tokens()
    net = convert(copy.deepcopy(plain), HyperparameterSet({"a": Float(0.0, 1.0, init=0.5)}))
    x = torch.randn(3, 4)
    assert torch.equal(net(x), plain(x))
    assert not net.load_state_dict(plain.state_dict(), strict=False).unexpected_keys


class Gated(nn.Module):
    """Parameters of the given names, which may be names that a response uses."""

    def __init__(self, **names: float) -> None:
        super().__init__()
        for name, value in names.items():
            self.register_parameter(name, nn.Parameter(torch.tensor([value])))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x * parameter for parameter in self._factors()]).sum(0)

    def _factors(self) -> list[Tensor]:
        return [getattr(self, name) for name in ("input_gate", "response_time")]


def test_export_keeps_parameters_that_are_named_like_a_response() -> None:
    plain = Gated(input_gate=2.0, response_time=3.0)
    net = convert(copy.deepcopy(plain), HyperparameterSet({"a": Float(0.0, 1.0, init=0.5)}))
    assert list(export(net).state_dict()) == ["input_gate", "response_time"]
    assert torch.equal(export(net)(torch.ones(2)), torch.full((2,), 5.0))


class Mixture(nn.Module):
    """A child with the name of a method of `ResponseLayer`."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(2))
        self.gate_weights = nn.Linear(2, 2)


def test_convert_refuses_attributes_that_a_response_would_hide() -> None:
    with pytest.raises(ConversionError, match=r"a response would hide its attributes \['gate_weights'\]; rename them"):
        convert(Mixture(), HyperparameterSet({"a": Float(0.0, 1.0, init=0.5)}))


def test_convert_refuses_parameter_names_that_a_response_needs() -> None:
    with pytest.raises(ConversionError, match=r"own parameters \['x_gate'\] have names that a response needs"):
        convert(Gated(x=1.0, x_gate=1.0), HyperparameterSet({"a": Float(0.0, 1.0, init=0.5)}))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_the_same_type_and_outputs(clone: Any) -> None:
    net, _ = converted()
    random_gates(net)
    other = clone(net)
    x = torch.randn(3, 4, dtype=torch.float64)
    assert isinstance(other, GenericResponse)
    assert type(other) is type(net)
    assert torch.equal(net(x), other(x))


def test_generic_response_refuses_a_row_per_example() -> None:
    net, hyperparameters = converted()
    message = "ResponseTokens: expected a sample of one row.*got 3 rows.*perturb='batch'"
    with bind(hyperparameters, torch.randn(3, 2)), pytest.raises(ValueError, match=message):
        net(torch.randn(3, 4, dtype=torch.float64))


class LitTokens(LitSmall):
    def __init__(self) -> None:
        super().__init__()
        self.body = self.convert(nn.Sequential(nn.Flatten(), nn.Linear(36, 4), Tokens(), nn.Linear(4, 3)))

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_loss(batch, batch_idx) + F.cross_entropy(self.body(batch[0]), batch[1])


def test_fit_refuses_a_row_per_example_for_generic_responses() -> None:
    message = r"body\.2 \(Tokens\)\. Share one perturbation over the batch with STNCallback\(perturb='batch'"
    with pytest.raises(ValueError, match=message):
        fit(LitTokens(), STNCallback(perturb="example"))


def test_generic_response_trains_with_a_shared_row() -> None:
    module = LitTokens()
    fit(module, STNCallback(perturb="batch", warmup=0, lr=0.05))
    assert module.body[2].token_gate.abs().sum() > 0  # type: ignore[index, union-attr, operator]


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_parametrised_layers_respond_in_their_original_parameters(wrap: Any) -> None:
    net = nn.Sequential(wrap(nn.Linear(3, 4))).eval()
    x = torch.randn(2, 3)
    expected = net(x)
    hyperparameters = HyperparameterSet({"a": Float(0.0, 1.0, init=0.9)})
    convert(net, hyperparameters)
    torch.testing.assert_close(net(x), expected)
    random_gates(net)
    recentre(net, hyperparameters, False)  # moves the base weights
    hyperparameters.unconstrained += 1.0
    assert not torch.allclose(net(x), expected)
