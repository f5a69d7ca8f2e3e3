"""Objects as text: in the interpreter, in a notebook, in a printed module."""

import copy
import pickle
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from support import LitSmall, fit, loader, trainer

from lightning_stn import (
    Categorical,
    DeltaSTN,
    Float,
    Hyperparameter,
    HyperparameterSet,
    Integer,
    Scales,
    STNCallback,
    Warmup,
    WeightStep,
)

SPECIFICATIONS: dict[str, Hyperparameter] = {
    "Float(0.0, 0.9)": Float(0.0, 0.9),
    "Float(0.0, 0.9, init=0.05)": Float(low=0.0, high=0.9, init=0.05, scale=0.5),
    "Float(0.0, None, init=0.1, unit='pixels')": Float(0.0, None, init=0.1, unit="pixels"),
    "Float(1e-06, 0.1, log=True)": Float(1e-6, 0.1, log=True),
    "Float(1e-06, 0.1, init=0.001, scale=1.0, perturb='batch', log=True)": Float(
        1e-6, 0.1, init=1e-3, scale=1.0, perturb="batch", log=True
    ),
    "Integer(0, 16)": Integer(0, 16),
    "Integer(0, 16, init=4)": Integer(0, 16, init=4),
    "Categorical(('none', 'mirror'), init='none')": Categorical(["none", "mirror"], init="none"),
}


@pytest.mark.parametrize("text", SPECIFICATIONS)
def test_specification_reads_as_it_is_written_and_evaluates_to_itself(text: str) -> None:
    specification = SPECIFICATIONS[text]
    assert repr(specification) == text
    assert eval(text) == specification


@pytest.mark.parametrize("text", SPECIFICATIONS)
def test_copy_of_a_specification_is_equal_and_reads_the_same(text: str) -> None:
    specification = SPECIFICATIONS[text]
    for twice in (copy.deepcopy(specification), pickle.loads(pickle.dumps(specification))):
        assert twice == specification
        assert hash(twice) == hash(specification)
        assert repr(twice) == text


def test_default_start_is_left_out_wherever_it_came_from() -> None:
    assert repr(Float(0.0, 1.0, init=0.1)) == repr(Float(0.0, 1.0)) == "Float(0.0, 1.0)"
    assert repr(replace(Float(0.0, 1.0), high=0.5)) == "Float(0.0, 0.5, init=0.1)"


GARBAGE: list[Any] = [None, "a", True, float("nan"), float("inf"), 10**400, 1e-320, -1.0, torch.ones(2), [1], Float]


@pytest.mark.parametrize("value", GARBAGE, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("field", ["low", "high", "init", "scale", "perturb", "unit", "log"])
@pytest.mark.parametrize("log", [False, True])
def test_specification_is_shown_whatever_its_fields_hold(field: str, value: Any, log: bool) -> None:
    """Errors show a specification before its fields have been checked."""
    arguments: dict[str, Any] = {"low": 0.5, "high": 0.9, "init": 0.7, "log": log, field: value}
    specification = object.__new__(Float)
    vars(specification).update({"scale": 0.5, "perturb": "example", "unit": "", **arguments})
    assert repr(specification).startswith("Float(")
    number = object.__new__(Integer)
    vars(number).update(vars(specification) | {"low": 0, "high": 4, "init": 1} | {field: value})
    assert repr(number).startswith("Integer(")


def test_signature_which_checkpoints_hold_names_every_field() -> None:
    assert Float(0.0, 0.9).signature == "Float(low=0.0, high=0.9, perturb='example', log=False)"
    assert Integer(0, 4).signature == "Integer(low=0, high=4, perturb='example')"


def mixed() -> HyperparameterSet:
    hyperparameters = HyperparameterSet(
        {
            "rate": Float(0.0, 0.9, init=0.3),
            "length": Integer(0, 16, unit="pixels"),
            "operation": Categorical(("none", "mirror"), init="none"),
        }
    )
    hyperparameters.unconstrained += 1.0
    hyperparameters.raw_scale[-1] += 1.0
    return hyperparameters


def test_set_shows_start_value_and_scale_in_a_table() -> None:
    first, header, _, rate, length, operation, last = repr(mixed()).splitlines()
    assert (first, last) == ("HyperparameterSet(", ")")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (header, rate, length, operation)]
    assert cells == [
        ["hyperparameter", "specification", "start", "value", "scale", "unit"],
        ["rate", "Float(0.0, 0.9, init=0.3)", "0.3", "0.5185", "0.5", ""],
        ["length", "Integer(0, 16, unit='pixels')", "2", "5", "0.5", "pixels"],
        ["operation", "Categorical(('none', 'mirror'), init='none')", "none", "none", "0.5 to 1.016", ""],
    ]
    assert len({len(line) for line in (header, rate, length, operation)}) == 1


def test_table_of_a_set_has_a_unit_only_where_there_is_one() -> None:
    assert "unit" not in HyperparameterSet({"rate": Float(0.0, 0.9)}).table()[0]


def test_set_shows_the_same_table_in_a_notebook() -> None:
    html = mixed()._repr_html_()
    assert html.count("<tr>") == 4
    assert "<caption>HyperparameterSet of rate, length, operation</caption>" in html
    assert "<td>Categorical((&#x27;none&#x27;, &#x27;mirror&#x27;), init=&#x27;none&#x27;)</td>" in html
    assert "<td>0.5185</td>" in html


def test_set_without_values_shows_its_specifications() -> None:
    shown = repr(mixed().to("meta"))
    assert "Float(0.0, 0.9, init=0.3)" in shown
    assert "0.5185" not in shown


def test_printed_module_shows_the_table_once() -> None:
    shown = repr(LitSmall())
    assert shown.count("| hyperparameter |") == 1
    assert "(hyperparameters): HyperparameterSet(" in shown


class Named(STNCallback):
    """Has another constructor."""

    def __init__(self, rate: float) -> None:
        super().__init__(lr=rate)


def build(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters)


class Builds:
    def __call__(self, parameters: Any) -> torch.optim.Optimizer:
        return build(parameters)


CALLBACKS: dict[str, STNCallback] = {
    "STNCallback()": STNCallback(),
    "STNCallback(train_steps=5, lr=0.02)": STNCallback(5, lr=0.02),
    "STNCallback(method=DeltaSTN())": STNCallback(method="delta-stn"),
    "STNCallback(method=DeltaSTN(passes=1))": STNCallback(method=DeltaSTN(passes=1)),
    "STNCallback(warmup=3, seed=0)": STNCallback(warmup=Warmup(3), seed=0),
    "STNCallback(warmup=0.2)": STNCallback(warmup=0.2),
    "STNCallback(warmup=Warmup(300, unit='steps'))": STNCallback(warmup=Warmup(300, "steps")),
    "STNCallback(scales=Scales(tune=True), weight_step=WeightStep(gradient_clip_val=1.0))": STNCallback(
        scales=Scales(tune=True), weight_step=WeightStep(gradient_clip_val=1.0)
    ),
    "STNCallback(optimizer=Adam)": STNCallback(optimizer=torch.optim.Adam),
    "STNCallback(optimizer=partial(SGD, momentum=0.9))": STNCallback(optimizer=partial(torch.optim.SGD, momentum=0.9)),
    "STNCallback(optimizer=build)": STNCallback(optimizer=build),
    "STNCallback(optimizer=Builds(...))": STNCallback(optimizer=Builds()),
    "STNCallback(dataloader=DataLoader(...), on_resume_use=['lr', 'seed'])": STNCallback(
        dataloader=loader(8), on_resume_use=("seed", "lr")
    ),
    "Named(lr=0.5)": Named(0.5),
}


@pytest.mark.parametrize("text", CALLBACKS)
def test_callback_shows_what_differs_from_the_defaults(text: str) -> None:
    assert repr(CALLBACKS[text]) == text


def test_callback_shows_what_a_run_derives_from_its_length() -> None:
    callback = STNCallback(train_steps=1)
    trainer(callback, max_epochs=10).fit(LitSmall(), loader(24), loader(16, seed=1))
    expected = "STNCallback(train_steps=1)  # this run: warm-up of 3 training batches, lr=0.1, derived from its length"
    assert repr(callback) == expected


def test_callback_of_a_run_that_derives_nothing_shows_its_arguments_alone() -> None:
    callback = STNCallback(train_steps=1, warmup=1, lr=0.05)
    fit(LitSmall(), callback)
    assert repr(callback) == "STNCallback(train_steps=1, warmup=1, lr=0.05)"


@pytest.mark.filterwarnings("ignore:A resumed run keeps the settings of its checkpoint")
def test_callback_of_a_resumed_run_shows_what_its_checkpoint_has_changed(tmp_path: Any) -> None:
    run, _ = fit(LitSmall(), STNCallback(train_steps=1, warmup=0, lr=0.05, seed=1))
    run.save_checkpoint(tmp_path / "last.ckpt")
    callback = STNCallback(train_steps=2, warmup=0, lr=0.02, seed=3)
    fit(LitSmall(), callback, max_epochs=3, ckpt_path=tmp_path / "last.ckpt")
    expected = "STNCallback(train_steps=2, warmup=0, lr=0.02, seed=3)  # this run: lr=0.05, train_steps=1, seed=1"
    assert repr(callback) == expected


EXPLAINED = ("STNCallback", "STNModule", "HyperparameterSet", "Float", "Integer", "Categorical", "ScheduleReplay")


@pytest.mark.parametrize("name", [*EXPLAINED, "Schedule"])
def test_help_of_the_main_classes_has_an_example(name: str) -> None:
    import lightning_stn

    text = getattr(lightning_stn, name).__doc__
    assert "Example:" in text
    assert ">>> " in text
