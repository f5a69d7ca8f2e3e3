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


def test_a_layer_of_one_s_own_is_converted() -> None:
    @register_response(Doubled)
    class ResponseDoubled(AffineResponse, Doubled):
        plain = Doubled
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
    plain = Doubled
    channel_dim = -1  # type: ignore[assignment]


class WithoutChannel(AffineResponse, Doubled):
    plain = Doubled

    def affine(self, input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
        return 2 * F.linear(input, weight, bias)


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (WithoutAffine, r"WithoutAffine does not define affine; define affine\(self, input, .* output of Doubled"),
        (WithoutChannel, "WithoutChannel does not define channel_dim, .*write 'channel_dim = -1' in its body"),
    ],
)
def test_an_affine_response_says_which_member_it_lacks(response: Any, message: str) -> None:
    register_response(Doubled)(response)
    hyperparameters = HyperparameterSet({"a": Float(0.0, 1.0, init=0.5)})
    net = convert(Doubled(2, 3), hyperparameters)
    with bind(hyperparameters, hyperparameters.sample(4)), pytest.raises(NotImplementedError, match=message):
        net(torch.randn(4, 2))


def test_a_second_registration_needs_overwrite() -> None:
    with pytest.raises(ValueError, match="Linear already has ResponseLinear; pass overwrite=True"):
        register_response(nn.Linear)(registry._RESPONSES[nn.Linear])
    register_response(nn.Linear, overwrite=True)(registry._RESPONSES[nn.Linear])


def test_a_class_that_is_no_response_is_refused() -> None:
    with pytest.raises(TypeError, match="to subclass ResponseLayer and Doubled"):
        register_response(Doubled)(nn.Linear)  # type: ignore[type-var]
