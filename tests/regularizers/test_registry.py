"""A kind of dropout defined outside the package becomes tunable by one registration."""

from typing import Any, ClassVar

import pytest
import torch
from support import LitSmall, fit, small_net
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from lightning_stn import ConversionError, Float, HyperparameterSet, convert, export
from lightning_stn.binding import bind_weight_phase, unbind
from lightning_stn.layers import ResponseLinear
from lightning_stn.regularizers import (
    Dropout,
    DropPath,
    Tunable,
    TunedDropout,
    TunedDropPath,
    register_tunable,
    registry,
    tunable_type,
)


class MyDropPath(nn.Module):
    def __init__(self, drop_prob: float | None = None) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, input: Tensor) -> Tensor:
        return input


class WordDropout(nn.Dropout):
    pass


@pytest.fixture(autouse=True)
def _restore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_TUNABLE", dict(registry._TUNABLE))


@pytest.fixture
def tuned() -> type[TunedDropPath]:
    @register_tunable(MyDropPath, "drop_path")
    class TunedMyDropPath(TunedDropPath, MyDropPath):
        plain_type = MyDropPath
        ranges: ClassVar = {"drop_prob": (0.0, 1.0)}

    return TunedMyDropPath


def rates(high: float | None = 0.9) -> HyperparameterSet:
    return HyperparameterSet({"rate": Float(0.0, high, init=0.1)})


def test_a_registered_module_is_tuned_in_place_in_proportion_to_all_branches(tuned: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 4), MyDropPath(0.1), StochasticDepth(0.4, "row"), MyDropPath(None))
    modules, hyperparameters = list(net), rates()
    net[1].register_forward_hook(lambda *_: calls.append(1))
    calls: list[int] = []
    assert convert(net.train(), hyperparameters, drop_path="rate") is net
    assert list(net) == modules
    assert [type(module) for module in net] == [ResponseLinear, tuned, DropPath, tuned]
    assert [(net[i].share, net[i].reads()) for i in (1, 2, 3)] == [(0.25, ["rate"]), (1.0, ["rate"]), (0.0, ["rate"])]
    torch.manual_seed(0)
    bind_weight_phase(hyperparameters, torch.full((4000, 1), 5.0))
    rows = net[1](torch.ones(4000, 2, 3))
    kept = rows.amax((1, 2)) > 0
    rate = 0.25 * hyperparameters.constrain(torch.tensor([5.0]))["rate"].item()
    assert abs(kept.double().mean().item() - (1 - rate)) < 6 * (rate * (1 - rate) / 4000) ** 0.5
    torch.testing.assert_close(rows[kept], torch.full_like(rows[kept], 1 / (1 - rate)))
    assert calls == [1]
    assert torch.equal(net[3](torch.ones(4000, 2)), torch.ones(4000, 2))


def test_a_registered_module_exports_as_its_plain_type_at_its_own_rate(tuned: Any) -> None:
    net = convert(nn.Sequential(nn.Linear(4, 4), MyDropPath(0.1), MyDropPath(0.2)), rates(), drop_path="rate")
    taken: Any = export(net)
    assert [type(module) for module in taken] == [nn.Linear, MyDropPath, MyDropPath]
    assert [taken[1].drop_prob, taken[2].drop_prob] == pytest.approx([0.05, 0.1])
    assert set(vars(taken[1])) == set(vars(MyDropPath(0.1)))


class TunedWordDropout(TunedDropout, WordDropout):
    plain_type = WordDropout


class LitWords(LitSmall):
    def __init__(self) -> None:
        super().__init__({"noise": Float(0.0, 0.5, init=0.1), "length": Float(0.0, 4.0, init=2.0)}, dropout=None)
        self.net = self.convert(nn.Sequential(*small_net()[:5], WordDropout(0.3), nn.Linear(144, 3)), dropout="noise")


def test_a_registered_dropout_is_tuned_in_a_run() -> None:
    register_tunable(WordDropout, "dropout")(TunedWordDropout)
    module = LitWords()
    fit(module, max_epochs=1)
    taken: Any = module.export()
    assert type(taken[5]) is WordDropout
    assert taken[5].p == module.hyperparameters.values()["noise"]


def test_a_registered_dropout_gets_a_hyperparameter_per_layer_that_starts_at_its_rate() -> None:
    register_tunable(WordDropout, "dropout")(TunedWordDropout)
    hyperparameters = rates()
    net = convert(nn.Sequential(WordDropout(0.3), nn.Linear(2, 2)), hyperparameters, dropout="per-layer")
    assert type(net[0]) is TunedWordDropout  # type: ignore[index]
    assert hyperparameters.specifications["dropout_0"] == Float(0.0, 0.9, init=0.3)


def test_exact_types_are_registered_under_one_keyword(tuned: Any) -> None:
    assert tunable_type(MyDropPath, "drop_path") is tuned
    assert tunable_type(MyDropPath, "dropout") is None
    assert tunable_type(nn.Dropout, "dropout") is Dropout
    assert tunable_type(type("Other", (MyDropPath,), {}), "drop_path") is None
    net = nn.Sequential(nn.Linear(2, 2), MyDropPath(0.1))
    assert type(convert(net, rates(), dropout="rate")[1]) is MyDropPath  # type: ignore[index]


def test_an_unregistered_subclass_of_a_dropout_is_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 2), WordDropout(0.1))
    with pytest.raises(ConversionError, match=r"1 \(WordDropout\): this kind of dropout cannot be tuned"):
        convert(net, rates(), dropout="rate")
    assert type(convert(net, rates())[1]) is WordDropout  # type: ignore[index]


def test_convert_changes_nothing_if_a_registered_module_cannot_be_tuned() -> None:
    class Owner(MyDropPath):
        def __init__(self) -> None:
            super().__init__(0.1)
            self.scale = nn.Parameter(torch.ones(1))

    class Cautious(TunedDropPath):
        ranges: ClassVar = {"drop_prob": (0.0, 1.0)}

        @classmethod
        def refusal(cls, module: nn.Module, *, generated: bool) -> str | None:
            return "its batches are too small"

    register_tunable(Owner, "drop_path")(type("TunedOwner", (TunedDropPath, Owner), {"plain_type": Owner}))
    register_tunable(MyDropPath, "drop_path")(type("Tuned", (Cautious, MyDropPath), {"plain_type": MyDropPath}))
    net = nn.Sequential(nn.Linear(2, 2), MyDropPath(0.1), Owner())
    with pytest.raises(
        ConversionError,
        match=r"1 \(MyDropPath\): its batches are too small\.\n  2 \(Owner\): it owns trainable parameters",
    ):
        convert(net, rates(), drop_path="rate")
    assert [type(module) for module in net] == [nn.Linear, MyDropPath, Owner]


def test_convert_changes_nothing_if_a_hyperparameter_exceeds_the_range_of_a_registered_module() -> None:
    class Low(TunedDropPath, MyDropPath):
        plain_type = MyDropPath
        ranges: ClassVar = {"drop_prob": (0.0, 0.5)}

    register_tunable(MyDropPath, "drop_path")(Low)
    net = nn.Sequential(nn.Linear(2, 2), MyDropPath(0.1))
    with pytest.raises(ValueError, match=r"Low 'convert\(drop_path=...\)': expected drop_prob in \[0, 0\.5\]"):
        convert(net, rates(0.9), drop_path="rate")
    assert [type(module) for module in net] == [nn.Linear, MyDropPath]
    convert(net, rates(0.5), drop_path="rate")
    assert type(net[1]) is Low


def test_a_second_registration_needs_overwrite(tuned: Any) -> None:
    with pytest.raises(ValueError, match="MyDropPath already has TunedMyDropPath; pass overwrite=True"):
        register_tunable(MyDropPath, "drop_path")(tuned)
    register_tunable(MyDropPath, "dropout", overwrite=True)(tuned)
    assert tunable_type(MyDropPath, "dropout") is tuned


class TurnedRound(MyDropPath, TunedDropPath):
    plain_type = MyDropPath


class NoPlain(TunedDropPath, MyDropPath):
    pass


class TwoRates(Tunable, MyDropPath):
    plain_type = MyDropPath
    ranges: ClassVar = {"drop_prob": (0.0, 1.0), "p": (0.0, 1.0)}


@pytest.mark.parametrize(
    ("plain", "keyword", "tunable", "error", "message"),
    [
        (MyDropPath, "drop", NoPlain, ValueError, r"keyword to be one of \['dropout', 'drop_path'\], got 'drop'"),
        (MyDropPath(), "dropout", NoPlain, TypeError, "expected the type of a plain module, got MyDropPath"),
        (Dropout, "dropout", NoPlain, TypeError, "expected the type of a plain module, got <class"),
        (MyDropPath, "dropout", MyDropPath, TypeError, "MyDropPath to subclass Tunable and MyDropPath"),
        (
            MyDropPath,
            "dropout",
            TurnedRound,
            TypeError,
            "subclass Tunable and MyDropPath, in that order",
        ),
        (MyDropPath, "dropout", convert, TypeError, r"convert to subclass Tunable .*got \[\]; change its bases"),
        (
            MyDropPath,
            "dropout",
            NoPlain,
            TypeError,
            r"NoPlain\.plain_type to be MyDropPath, got None; write 'plain_type =",
        ),
        (
            MyDropPath,
            "dropout",
            TwoRates,
            TypeError,
            r"ranges to have one strength, got \['drop_prob', 'p'\]",
        ),
    ],
)
def test_register_tunable_refuses(plain: Any, keyword: Any, tunable: Any, error: Any, message: str) -> None:
    before = dict(registry._TUNABLE)
    with pytest.raises(error, match=message):
        register_tunable(plain, keyword)(tunable)
    assert before == registry._TUNABLE


@pytest.mark.parametrize("module", ["timm.layers.drop", "transformers.models.swin.modeling_swin"])
def test_stochastic_depth_of_known_libraries_is_tuned_without_importing_them(module: str) -> None:
    kind = type("DropPath", (MyDropPath,), {"__module__": module})
    hyperparameters = rates()
    net = convert(nn.Sequential(nn.Linear(2, 2), kind(0.2), kind(0.4)), hyperparameters, drop_path="rate")
    assert [layer.share for layer in net[1:]] == [0.5, 1.0]  # type: ignore[index]
    assert isinstance(net[1], TunedDropPath)  # type: ignore[index]
    bind_weight_phase(hyperparameters, torch.full((4000, 1), 5.0))
    kept = net.train()[2](torch.ones(4000, 2)).amax(1) > 0  # type: ignore[index, operator]
    unbind(hyperparameters)
    assert kept.float().mean().item() == pytest.approx(1 - 0.9 * torch.tensor(5.0).sigmoid().item(), abs=0.03)
    assert type(export(net)[1]) is kind  # type: ignore[index]
    assert type(convert(nn.Sequential(nn.Linear(2, 2), kind(0.2)), rates(), dropout="rate")[1]) is kind  # type: ignore[index]
