"""Dropout inside recurrent layers and attention, at a tuned rate."""

from typing import Any

import pytest
import torch
from support import random_gates
from torch import Tensor, nn

from lightning_stn import DeltaSTN, Float, HyperparameterSet, convert, export
from lightning_stn.binding import bind, bind_weight_phase, unbind
from lightning_stn.layers import ResponseLSTM, ResponseMultiheadAttention

N, T, WIDTH = 8, 6, 4


class Attends(nn.Module):
    def __init__(self, batch_first: bool, need_weights: bool) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 2, dropout=0.2, batch_first=batch_first)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x, x, x, need_weights=self.need_weights)[0]
        return out


class Recurs(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.inner = kind(WIDTH, WIDTH, 2, dropout=0.2, **options)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)[0]
        return out


NETWORKS = {
    "attention": lambda: Attends(True, False),
    "attention, weights": lambda: Attends(True, True),
    "attention, time first": lambda: Attends(False, False),
    "lstm": lambda: Recurs(nn.LSTM, batch_first=True),
    "gru, time first": lambda: Recurs(nn.GRU),
}
every_network = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)


def converted(build: Any) -> tuple[Any, HyperparameterSet, Tensor]:
    torch.manual_seed(0)
    hyperparameters = HyperparameterSet({"rate": Float(0.0, 1.0, init=0.3)})
    net = convert(build(), hyperparameters, dropout="rate")
    first = getattr(net.inner, "batch_first", True)  # type: ignore[union-attr]
    x = torch.randn(N, T, WIDTH) if first else torch.randn(T, N, WIDTH)
    return net, hyperparameters, x


def run(net: Any, hyperparameters: HyperparameterSet, sample: Tensor, x: Tensor, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    bind_weight_phase(hyperparameters, sample)
    out: Tensor = net(x)
    unbind(hyperparameters)
    return out


OFF, ON = torch.full((1, 1), -20.0), torch.full((1, 1), 1.0)


@every_network
def test_rate_acts_in_the_weight_phase_alone(build: Any) -> None:
    net, hyperparameters, x = converted(build)
    quiet = run(net, hyperparameters, OFF, x)
    assert hyperparameters.unread() == []
    assert not torch.allclose(run(net, hyperparameters, ON, x), quiet)
    with bind(hyperparameters, ON):
        torch.testing.assert_close(net(x), quiet)  # gates are zero
    torch.testing.assert_close(net.eval()(x), quiet)


@every_network
def test_each_example_has_its_rate(build: Any) -> None:
    net, hyperparameters, x = converted(build)
    rows = torch.cat([OFF.expand(N // 2, 1), ON.expand(N // 2, 1)])
    examples = 0 if net.inner.batch_first else 1
    quiet, mixed = (run(net, hyperparameters, s, x).movedim(examples, 0) for s in (OFF.expand(N, 1), rows))
    torch.testing.assert_close(mixed[: N // 2], quiet[: N // 2])
    assert not torch.isclose(mixed[N // 2 :], quiet[N // 2 :]).all(1).any()


@pytest.mark.parametrize("rows", [1, 400])
def test_weights_of_attention_are_zero_at_the_rate(rows: int) -> None:
    torch.manual_seed(0)
    hyperparameters = HyperparameterSet({"rate": Float(0.0, 1.0, init=0.3)})
    layer = convert(nn.MultiheadAttention(WIDTH, 2, dropout=0.2, batch_first=True), hyperparameters, dropout="rate")
    x = torch.randn(400, 10, WIDTH)
    bind_weight_phase(hyperparameters, torch.logit(torch.tensor([[0.7]])).expand(rows, 1))
    _, weights = layer(x, x, x, average_attn_weights=False)
    unbind(hyperparameters)
    assert (weights == 0).float().mean().item() == pytest.approx(0.7, abs=0.01)


def test_causal_attention_with_a_rate_for_each_example_sees_no_later_position() -> None:
    torch.manual_seed(0)
    hyperparameters = HyperparameterSet({"rate": Float(0.0, 1.0, init=0.3)})
    layer: Any = convert(
        nn.MultiheadAttention(WIDTH, 2, dropout=0.2, batch_first=True), hyperparameters, dropout="rate"
    )
    mask = nn.Transformer.generate_square_subsequent_mask(T)
    x = torch.randn(N, T, WIDTH)
    later = x.clone()
    later[:, -1] += 1
    outputs = []
    for inputs in (x, later):
        torch.manual_seed(1)
        bind_weight_phase(hyperparameters, ON.expand(N, 1))
        outputs.append(layer(inputs, inputs, inputs, attn_mask=mask, need_weights=False, is_causal=True)[0])
        unbind(hyperparameters)
    torch.testing.assert_close(outputs[0][:, :-1], outputs[1][:, :-1])


@every_network
@pytest.mark.parametrize("rows", [1, N])
def test_delta_stn_trains_with_it(build: Any, rows: int) -> None:
    net, hyperparameters, x = converted(build)
    random_gates(net, 0.1)
    method = DeltaSTN()
    method.prepare(net, hyperparameters)
    bind_weight_phase(hyperparameters, ON.expand(rows, 1))
    _, objective = method.objective(net, hyperparameters, lambda: net(x).square().sum())
    objective.backward()
    unbind(hyperparameters)
    gates = [parameter.grad for name, parameter in net.named_parameters() if name.endswith("_gate")]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gates)


@every_network
def test_export_has_the_current_rate_and_the_network_stays_tuned(build: Any) -> None:
    net, _, _ = converted(build)
    assert export(net).inner.dropout == pytest.approx(0.3)  # type: ignore[union-attr]
    assert net.inner.reads() == ["rate"]
    assert isinstance(net.inner, ResponseMultiheadAttention) or "dropout=rate" in repr(net.inner)


def test_each_rate_gets_its_hyperparameter_and_rates_without_effect_are_left_alone() -> None:
    hyperparameters = HyperparameterSet({"rate": Float(0.0, 1.0, init=0.3)})
    net = nn.ModuleDict(
        {
            "lstm": nn.LSTM(2, 2, 2, dropout=0.4),
            "single": nn.GRU(2, 2, 1),
            "off": nn.MultiheadAttention(2, 1),
            "layer": nn.TransformerEncoderLayer(2, 1, 2, dropout=0.2),
        }
    )
    convert(net, hyperparameters, dropout="per-layer")
    values = hyperparameters.values()
    assert values["dropout_lstm"] == pytest.approx(0.4)
    assert values["dropout_layer_self_attn"] == pytest.approx(0.2)
    assert {"dropout_single", "dropout_off"}.isdisjoint(values)
    assert isinstance(net["lstm"], ResponseLSTM)
    assert net["off"].dropout == 0.0
