"""Registration of response layers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_stn import Float, HyperparameterSet, convert
from lightning_stn.binding import bind
from lightning_stn.layers import AffineResponse, register_response, registry


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.fixture(autouse=True)
def _restore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_RESPONSES", dict(registry._RESPONSES))


def test_convert_uses_a_registered_response_layer() -> None:
    @register_response(Doubled)
    class ResponseDoubled(AffineResponse, Doubled):
        plain_type = Doubled
        channel_dim = -1  # type: ignore[assignment]

        def affine(self, input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
            return 2 * F.linear(input, weight, bias)

    plain = Doubled(2, 3)
    x = torch.randn(4, 2)
    expected = plain(x)
    hyperparameters = HyperparameterSet({"a": Float(0.0, 1.0, init=0.5)})
    assert torch.equal(convert(plain, hyperparameters)(x), expected)
    assert type(plain) is ResponseDoubled


class WithoutAffine(AffineResponse, Doubled):
    plain_type = Doubled
    channel_dim = -1  # type: ignore[assignment]


class WithoutChannel(AffineResponse, Doubled):
    plain_type = Doubled

    def affine(self, input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
        return 2 * F.linear(input, weight, bias)


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (WithoutAffine, r"WithoutAffine does not define affine; define affine\(self, input, .* output of Doubled"),
        (WithoutChannel, "WithoutChannel does not define channel_dim, .*write 'channel_dim = -1' in its body"),
    ],
)
def test_affine_response_names_the_member_that_is_missing(response: Any, message: str) -> None:
    register_response(Doubled)(response)
    hyperparameters = HyperparameterSet({"a": Float(0.0, 1.0, init=0.5)})
    net = convert(Doubled(2, 3), hyperparameters)
    with bind(hyperparameters, hyperparameters.sample(4)), pytest.raises(NotImplementedError, match=message):
        net(torch.randn(4, 2))


class Bare(nn.Module):
    """A linear layer without `reset_parameters`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class ResponseBare(AffineResponse, Bare):
    plain_type = Bare
    channel_dim = -1  # type: ignore[assignment]

    def affine(self, input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
        return F.linear(input, weight, bias)


def test_affine_response_draws_its_weights_for_a_layer_without_an_initialiser() -> None:
    register_response(Bare)(ResponseBare)
    hyperparameters = HyperparameterSet({"a": Float(0.0, 1.0, init=0.5)})
    layer = convert(Bare(), hyperparameters)
    assert layer.response_weight.std() > 0.1
    assert torch.equal(layer.response_bias, torch.ones(3))


def test_second_registration_needs_overwrite() -> None:
    with pytest.raises(ValueError, match="Linear already has ResponseLinear; pass overwrite=True"):
        register_response(nn.Linear)(registry._RESPONSES[nn.Linear])
    register_response(nn.Linear, overwrite=True)(registry._RESPONSES[nn.Linear])


def test_registration_refuses_a_class_that_is_no_response_layer() -> None:
    with pytest.raises(TypeError, match="to subclass ResponseLayer and Doubled"):
        register_response(Doubled)(nn.Linear)  # type: ignore[type-var]
