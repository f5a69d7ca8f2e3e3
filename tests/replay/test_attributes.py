"""Attributes that a replay sets, by their paths from the module."""

import re
from typing import Any

import pytest
import torch
from replay.cases import Plain, Watch, fit, recorded
from replay.test_stn_module import Tuned
from support import loader, trainer
from torch import Tensor, nn

from lightning_stn import (
    Categorical,
    Float,
    Gaussian,
    HyperparameterSet,
    Integer,
    ScheduleReplay,
    convert,
    regularizers,
)
from lightning_stn.augment import Cutout
from lightning_stn.policies.attributes import Attributes


class Mixed(nn.Module):
    """A module of somebody else's, with plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.rate, self.most, self.mode, self.unset, self.flag = 0.5, 3, "a", None, True
        self.steps = [nn.Dropout(0.5), nn.Dropout(0.5)]
        self.register_buffer("level", torch.tensor(0.5))

    @property
    def fixed(self) -> float:
        return self.rate

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.drop(input)
        return output


PATHS = {
    "net.3.drop.p": "dropout",
    "net.3.steps.1.p": "dropout",
    "net.3.rate": "dropout",
    "net.3.most": "length",
    "net.3.mode": "mode",
    "net.3.unset": "length",
}
VALUES = {"dropout": 0.2, "length": 2, "mode": "b"}


def test_attributes_keep_their_types_and_the_others_stay() -> None:
    module = Plain(Mixed())
    Attributes(module, PATHS, VALUES).set(VALUES)
    mixed = module.net[3]
    assert isinstance(mixed, Mixed)
    assert (mixed.drop.p, mixed.rate, mixed.most, mixed.mode, mixed.unset) == (0.2, 0.2, 2, "b", 2)
    assert [step.p for step in mixed.steps] == [0.5, 0.2]


WRONG = {
    "net.3.drop.q": r"net\.3\.drop \(Dropout\) has no attribute 'q'",
    "net.9.p": r"net \(Sequential\) has no attribute '9'",
    "net.3.steps.4.p": r"net\.3\.steps has no entry 4",
    "net.3.drop": r"'net\.3\.drop': expected a number, as 'dropout' is, got Dropout",
    "net.3.mode": r"'net\.3\.mode': expected a number, as 'dropout' is, got str",
    "net.3.flag": r"expected a number, as 'dropout' is, got bool",
    "net.3.level": r"expected a number, as 'dropout' is, got Tensor",
    "net.3.fixed": r"'fixed' of net\.3 cannot be set",
    "tuned.p": r"tuned reads the hyperparameter 'rate' itself; leave the path out",
    "cutout.length": r"cutout reads the hyperparameter 'length' itself; leave the path out",
    "": r"'': the module \(Plain\) has no attribute ''",
}


def test_every_wrong_attribute_is_listed_at_once_before_training() -> None:
    module = Plain(Mixed())
    module.tuned, module.cutout = regularizers.Dropout("rate"), Cutout("length")
    paths = dict.fromkeys(WRONG, "dropout") | {"net.3.rate": "droput"}
    with pytest.raises(ValueError, match=r"expected attributes to lead from paths in Plain") as caught:
        fit(module, ScheduleReplay({"dropout": 0.2, "rate": 0.1, "length": 2}, attributes=paths))
    for message in [*WRONG.values(), r"'net\.3\.rate': there is no hyperparameter 'droput' among \['dropout'"]:
        assert re.search(message, str(caught.value)), message
    assert not module.losses


def test_attributes_have_the_values_of_every_row_and_keep_the_last() -> None:
    schedule = recorded(6)
    module = Plain(Mixed())
    watch = Watch(lambda module: (module.net[3].drop.p, module.net[3].most))
    replay = ScheduleReplay(schedule, attributes={"net.3.drop.p": "dropout", "net.3.most": "length"})
    fit(module, replay, watch)
    assert watch.seen == [tuple(row.values.values()) for row in schedule.rows[:6]]
    assert (module.net[3].drop.p, module.net[3].most) == tuple(schedule.final.values())
    assert type(module.net[3].most) is int


def test_network_with_replayed_rate_trains_bit_for_bit_as_with_the_constant() -> None:
    ends = []
    for rate, attributes in ((0.3, {"net.3.rate": "dropout"}), (0.5, {"net.3.drop.p": "dropout"})):
        torch.manual_seed(0)
        module = Plain(Mixed())
        module.net[3].drop.p = rate
        fit(module, ScheduleReplay({"dropout": 0.3}, attributes=attributes))
        ends.append((module.losses, dict(module.state_dict())))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


def test_noise_moves_attributes_and_is_gone_after_the_run() -> None:
    kinds = {
        "dropout": Float(0.0, 0.9, init=0.3),
        "length": Integer(0, 4, init=2),
        "mode": Categorical(("a", "b"), "b"),
    }
    module = Plain(Mixed())
    paths = {"net.3.drop.p": "dropout", "net.3.most": "length", "net.3.mode": "mode"}
    watch = Watch(lambda module: module.net[3].drop.p)
    fit(module, ScheduleReplay(kinds, attributes=paths, noise=Gaussian()), watch)
    assert len(set(watch.seen)) == 6
    assert (module.net[3].drop.p, module.net[3].most, module.net[3].mode) == (0.3, 2, "b")


def test_rate_that_a_converted_layer_reads_itself_is_refused() -> None:
    module = nn.Module()
    module.lstm = convert(nn.LSTM(2, 3, 2, dropout=0.3), HyperparameterSet({"rate": Float(0.0, 0.9)}), dropout="rate")
    with pytest.raises(ValueError, match=r"lstm reads the hyperparameter 'rate' itself; leave the path out"):
        Attributes(module, {"lstm.dropout": "rate"}, {"rate": 0.2})


class WithAttribute(Tuned):
    def __init__(self) -> None:
        super().__init__()
        self.depth = 0

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.depth == int(self.hyperparameters["length"])
        return super().training_loss(batch, batch_idx)


def test_attributes_of_an_stn_module_follow_beside_its_hyperparameters() -> None:
    module = WithAttribute()
    values = {"dropout": 0.3, "length": 2, "mode": 0.7}
    with pytest.raises(ValueError, match=r"(?s)dropout=0\.95.*'deep': .*has no attribute 'deep'"):
        fit(module, ScheduleReplay({**values, "dropout": 0.95}, attributes={"deep": "mode"}))
    fit(module, ScheduleReplay({"dropout": 0.3, "length": 2}, attributes={"depth": "length"}))
    assert module.depth == 2


class Late(Plain):
    def configure_model(self) -> None:
        self.net.insert(3, nn.Dropout(0.5))


def test_attributes_built_in_configure_model_are_found() -> None:
    module = Late()
    fit(module, ScheduleReplay({"dropout": 0.3}, attributes={"net.3.p": "dropout"}))
    assert module.net[3].p == 0.3


def test_validation_alone_sets_nothing() -> None:
    module = Plain(Mixed())
    run = trainer(ScheduleReplay({"dropout": 0.3}, attributes={"net.3.drop.p": "dropout"}))
    run.validate(module, loader(16), verbose=False)
    assert module.net[3].drop.p == 0.5
