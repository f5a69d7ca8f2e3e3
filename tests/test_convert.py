import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from support import random_gates, small_net
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from lightning_stn import ConversionError, Float, HyperparameterSet, convert, export
from lightning_stn.binding import bind_weight_phase, unbind
from lightning_stn.layers import ResponseConv2d, ResponseLayer, ResponseLinear
from lightning_stn.regularizers import Dropout, Dropout2d, DropPath


def one() -> HyperparameterSet:
    return HyperparameterSet({"rate": Float(0.0, 0.9, init=0.05)})


def test_convert_changes_only_the_class_of_layers_and_dropouts() -> None:
    net = small_net().double()
    before = {name: (id(module), module.training) for name, module in net.named_modules()}
    state = copy.deepcopy(net.state_dict())
    assert convert(net, one(), dropout="rate") is net
    kinds = [type(module) for module in net]
    assert kinds[0] is ResponseConv2d
    assert kinds[3] is Dropout2d
    assert kinds[5] is ResponseLinear
    assert kinds[7] is Dropout
    assert {name: (id(module), module.training) for name, module in net.named_modules()} == before
    assert all(torch.equal(net.state_dict()[key], value) for key, value in state.items())
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float64}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_convert_keeps_the_outputs(training: bool, grad: bool) -> None:
    net = small_net().train(training)
    x = torch.randn(5, 1, 6, 6)
    net[3].p = net[7].p = 0.0  # type: ignore[assignment]
    with torch.set_grad_enabled(grad):
        expected = copy.deepcopy(net)(x)
        assert torch.equal(convert(net, one(), dropout="rate", zero_rates=True)(x), expected)


def test_convert_without_a_dropout_name_keeps_constant_rates() -> None:
    net = convert(small_net(), one())
    assert type(net[3]) is nn.Dropout2d  # type: ignore[index]
    assert net[7].p == 0.1  # type: ignore[index]


def test_per_layer_adds_a_hyperparameter_for_each_dropout() -> None:
    hyperparameters = one()
    net = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3)), "head": nn.Dropout(0.0)})
    convert(net, hyperparameters, dropout="per-layer", zero_rates=True)
    values = hyperparameters.values()
    assert list(values) == ["rate", "dropout_body_1", "dropout_head"]
    assert values["dropout_body_1"] == pytest.approx(0.3)
    assert values["dropout_head"] == pytest.approx(0.05)
    assert net["body"][0].weight_gate.shape == (2, 3)  # type: ignore[index]
    assert net["head"].given("p") == "dropout_head"


@pytest.mark.parametrize("dropout", ["rate", "per-layer"])
def test_dropouts_that_are_switched_off_stay_so_unless_asked_for(dropout: str) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3), nn.Dropout(0.0))
    convert(net, one(), dropout=dropout)
    assert [type(net[1]), type(net[2])] == [Dropout, nn.Dropout]
    off = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0))
    with pytest.raises(ConversionError, match=r"switched off, with a rate of 0: \['1'\]; .*pass zero_rates=True"):
        convert(off, one(), dropout=dropout)
    assert type(convert(off, one(), dropout=dropout, zero_rates=True)[1]) is Dropout  # type: ignore[index]


class Constant(nn.Module):
    """Drops by a function, at a rate that no module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.attention_dropout = nn.Linear(2, 2), 0.3


def test_rates_that_no_module_of_their_own_applies_are_named_at_conversion() -> None:
    with pytest.warns(
        UserWarning, match=r"look like rates of dropout, and stay constant: \['0.attention_dropout=0.3'\]"
    ):
        convert(nn.Sequential(Constant(), nn.Dropout(0.1)), one(), dropout="rate")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)), one(), dropout="rate")
        convert(nn.Sequential(Constant(), nn.Dropout(0.1)), one())


def test_convert_refuses_a_second_per_layer_conversion() -> None:
    hyperparameters = one()
    convert(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), hyperparameters, dropout="per-layer")
    other = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    with pytest.raises(RuntimeError, match="convert all networks in one call"):
        convert(other, hyperparameters, dropout="per-layer")
    assert type(other[0]) is nn.Linear
    assert type(other[1]) is nn.Dropout


def test_shared_drop_path_rate_is_scaled_by_the_initial_rate_of_each_branch() -> None:
    net = nn.Sequential(StochasticDepth(0.1, "row"), nn.Linear(2, 2), StochasticDepth(0.4, "batch"))
    convert(net, one(), drop_path="rate")
    first, last = net[0], net[2]
    assert isinstance(first, DropPath)
    assert isinstance(last, DropPath)
    assert (first.given("p"), first.mode, first.share) == ("rate", "row", 0.25)
    assert (last.given("p"), last.mode, last.share) == ("rate", "batch", 1.0)
    exported = export(net)
    assert type(exported[0]) is StochasticDepth  # type: ignore[index]
    assert exported[0].p == pytest.approx(exported[2].p / 4)  # type: ignore[index]


def test_convert_without_a_drop_path_name_keeps_constant_rates() -> None:
    assert type(convert(nn.Sequential(StochasticDepth(0.1, "row")), one())[0]) is StochasticDepth  # type: ignore[index]
    with pytest.raises(KeyError, match=r"drop_path.*'rat'.*or 'rate' is misspelt"):
        convert(nn.Sequential(StochasticDepth(0.1, "row")), one(), drop_path="rat")


def test_convert_refuses_dropouts_with_the_same_hyperparameter_name() -> None:
    net = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Dropout(0.1)}), "a_b": nn.Dropout(0.2), "c": nn.Linear(2, 2)})
    with pytest.raises(
        ConversionError, match=r"a_b: its hyperparameter would be called 'dropout_a_b', as that of a\.b"
    ):
        convert(net, one(), dropout="per-layer")
    assert type(net["c"]) is nn.Linear


def test_convert_accepts_a_single_layer() -> None:
    layer = nn.Linear(2, 2)
    assert isinstance(convert(layer, one()), ResponseLinear)


def test_convert_keeps_a_shared_layer_shared() -> None:
    layer = nn.Linear(3, 3)
    net = convert(nn.Sequential(layer, nn.ReLU(), layer), one())
    assert net[0] is net[2]  # type: ignore[index]


class OwnForward(nn.RNN):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return super().forward(input, hx)


def test_convert_lists_all_problems_and_changes_nothing() -> None:
    net = nn.Sequential(
        nn.Linear(2, 2),
        nn.ParameterList([torch.ones(1)]),
        nn.Sequential(nn.Embedding(3, 2, max_norm=1.0)),
        nn.FeatureAlphaDropout(),
        nn.Dropout(0.95),
        nn.LazyLinear(2),
        torch.nn.utils.spectral_norm(nn.Linear(2, 2)),
        OwnForward(2, 2),
    )
    with pytest.raises(ConversionError) as error:
        convert(net, one(), dropout="per-layer")
    message = str(error.value)
    wanted = [
        "1 (ParameterList): its parameters are read from outside",
        "2.0 (Embedding): max_norm",
        "3 (FeatureAlphaDropout)",
    ]
    wanted += [
        "4 (Dropout): starts at p=0.95",
        "5 (LazyLinear): its parameters have no shape",
        "6 (Linear): its weight is",
    ]
    for part in [*wanted, "7 (OwnForward): torch does not read all parameters of a RNNBase", "exclude="]:
        assert part in message
    assert type(net[0]) is nn.Linear


@pytest.mark.parametrize("exclude", [["1"], ["[1]"], [nn.LayerNorm], ["1", nn.LayerNorm]])
def test_excluded_modules_stay_plain(exclude: Any) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    convert(net, one(), exclude=exclude)
    assert [isinstance(module, ResponseLayer) for module in net] == [True, False, True]


def test_exclude_covers_submodules() -> None:
    net = nn.ModuleDict({"backbone": nn.Sequential(nn.Linear(2, 2)), "head": nn.Linear(2, 2)})
    convert(net, one(), exclude=["backbone"])
    assert type(net["backbone"][0]) is nn.Linear  # type: ignore[index]
    assert type(net["head"]) is ResponseLinear


def test_convert_refuses_an_exclusion_without_a_match() -> None:
    with pytest.raises(ConversionError, match=r"no module is called 'bakbone'; there are \['0'\]"):
        convert(nn.Sequential(nn.Linear(2, 2)), one(), exclude=["bakbone"])


def test_convert_refuses_a_converted_network() -> None:
    net = convert(nn.Sequential(nn.Linear(2, 2)), one())
    with pytest.raises(ConversionError, match="0 \\(ResponseLinear\\): converted already"):
        convert(net, one())


def test_convert_refuses_an_unknown_name_before_any_change() -> None:
    net = small_net()
    with pytest.raises(KeyError, match="'drop'"):
        convert(net, one(), dropout="drop")
    assert type(net[0]) is nn.Conv2d


def test_convert_keeps_hooks() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    calls = []
    net[0].register_forward_hook(lambda *_: calls.append(1))
    convert(net, one())(torch.ones(1, 2))
    assert calls == [1]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copied_network_reads_the_copied_set(clone: Any) -> None:
    hyperparameters = one()
    both = nn.ModuleDict({"set": hyperparameters, "net": convert(nn.Sequential(nn.Linear(2, 2)), hyperparameters)})
    random_gates(both)
    x = torch.randn(3, 2)
    other = clone(both)
    assert torch.equal(both["net"](x), other["net"](x))
    other["set"].unconstrained.data.add_(1)
    assert not torch.equal(both["net"](x), other["net"](x))


def test_state_dict_of_a_converted_network_has_no_hyperparameters() -> None:
    net = convert(nn.Sequential(nn.Linear(2, 2)), one())
    names = {"weight", "bias", "response_weight", "response_bias", "weight_gate", "bias_gate"}
    assert set(net.state_dict()) == {f"0.{name}" for name in names}


@pytest.mark.parametrize("rows", [1, 5])
def test_converted_network_compiles_without_graph_breaks(rows: int) -> None:
    hyperparameters = one()
    net = random_gates(convert(small_net().train(), hyperparameters, dropout="rate"))
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    x, sample = torch.randn(5, 1, 6, 6), torch.randn(rows, 1)
    bind_weight_phase(hyperparameters, sample)
    torch.manual_seed(0)
    expected = net(x)
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(x), expected)
    unbind(hyperparameters)
    torch.testing.assert_close(compiled(x), net(x))
