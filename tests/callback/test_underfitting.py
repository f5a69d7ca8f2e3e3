"""Whether the report calls a network underfitting: on recorded losses, and on networks that under- and overfit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stn import Categorical, Float, Integer, Schedule, STNCallback, STNModule
from lightning_stn.callback.report import report
from lightning_stn.callback.underfitting import underfitting
from lightning_stn.schedule import Row
from lightning_stn.specifications import Hyperparameter, Value

DROPOUT: dict[str, Hyperparameter] = {"dropout": Float(0.0, 0.9)}


def run(
    train: list[float | None],
    valid: list[float | None],
    end: dict[str, Value],
    specifications: dict[str, Hyperparameter] = DROPOUT,
    slight: tuple[str, ...] = (),
) -> Any:
    """What is found in a run with these losses and these last values."""
    schedule = Schedule(specifications)
    scales = dict.fromkeys(schedule.scale_names, 0.5)
    starts = {name: one.init for name, one in specifications.items()}
    for index, (train_loss, valid_loss) in enumerate(zip(train, valid, strict=True)):
        values = end if index + 1 == len(train) else starts
        schedule.append(Row(100 * index, 0, values, scales, train_loss=train_loss, valid_loss=valid_loss))
    return underfitting(schedule, slight)


LOSSES: dict[str, tuple[list[float | None], list[float | None], bool]] = {
    "training above validation": ([2.0, 1.0, 0.9, 0.9, 0.9], [2.0, 1.0, 0.8, 0.8, 0.8], True),
    "training hardly below validation": ([2.0, 1.0, 0.9, 0.75, 0.75], [2.0, 1.0, 0.8, 0.8, 0.8], True),
    "training below validation": ([2.0, 1.0, 0.9, 0.7, 0.7], [2.0, 1.0, 0.8, 0.8, 0.8], False),
    "training below validation at the end alone": ([2.0, 1.0, 0.9, 0.9, 0.6], [2.0, 1.0, 0.8, 0.8, 0.8], False),
    "training fits": ([2.0, 1.0, 0.5, 0.1, 0.1], [2.0, 1.0, 0.5, 0.1, 0.1], False),
    "negative losses of an overfitting network": ([1.0, 0.0, -1.0, -2.0, -2.0], [1.0, 0.0, -1.0, -1.5, -1.5], False),
    "no validation losses at the end": ([2.0, 1.0, 0.9, 0.9, 0.9], [2.0, 1.0, 0.8, None, None], False),
    "no training losses": ([None] * 5, [2.0, 1.0, 0.8, 0.8, 0.8], False),
}


@pytest.mark.parametrize("case", LOSSES)
def test_network_underfits_where_its_training_loss_is_not_below_its_validation_loss(case: str) -> None:
    train, valid, underfits = LOSSES[case]
    found = run(train, valid, {"dropout": 0.01})
    assert (found is not None) == underfits


def test_report_tells_both_losses_the_hyperparameters_and_what_to_do() -> None:
    train, valid, _ = LOSSES["training above validation"]
    assert str(run(train, valid, {"dropout": 0.01})) == (
        "The network underfits: at the end of the run its training loss, 0.9, was not below its validation loss, 0.8. "
        "Regularisation can only raise both, which is why dropout ended near zero. Use a larger network, train for "
        "longer, raise the learning rate of the weights, or weaken what is not tuned, such as fixed augmentation or "
        "label smoothing."
    )


NOISE, DECAY = Float(0.0, None, init=0.1), Float(1e-6, 1e-1, log=True, init=1e-3)
ENDS: dict[str, tuple[dict[str, Hyperparameter], dict[str, Value], list[str]]] = {
    "still on": (DROPOUT, {"dropout": 0.08}, []),
    "near zero from the start": ({"dropout": Float(0.0, 0.9, init=0.01)}, {"dropout": 0.005}, []),
    "without an upper end": ({"noise": NOISE}, {"noise": 0.01}, ["noise"]),
    "without an upper end, still on": ({"noise": NOISE}, {"noise": 0.09}, []),
    "on a logarithmic scale": ({"decay": DECAY}, {"decay": 1.2e-6}, ["decay"]),
    "on a logarithmic scale, still on": ({"decay": DECAY}, {"decay": 1e-4}, []),
    "not a strength": ({"angle": Float(-10.0, 10.0, init=5.0)}, {"angle": -9.99}, []),
    "a choice": ({"op": Categorical(("none", "noise"), init="noise")}, {"op": "none"}, []),
    "a whole number": ({"length": Integer(0, 16, init=4)}, {"length": 0}, ["length"]),
    "beside another that is on": ({**DROPOUT, "noise": NOISE}, {"dropout": 0.01, "noise": 0.3}, []),
    "beside another that is small": ({**DROPOUT, "noise": NOISE}, {"dropout": 0.01, "noise": 0.1}, ["dropout"]),
    "beside a small whole number": ({**DROPOUT, "holes": Integer(0, 4)}, {"dropout": 0.01, "holes": 1}, ["dropout"]),
}


@pytest.mark.parametrize("case", ENDS)
def test_underfitting_explains_strengths_that_fell_to_zero_where_none_is_left(case: str) -> None:
    specifications, end, names = ENDS[case]
    train, valid, _ = LOSSES["training above validation"]
    found = run(train, valid, end, specifications)
    assert (found.names if found else []) == names


def test_strength_that_hardly_matters_does_not_hide_that_a_network_underfits() -> None:
    train, valid, _ = LOSSES["training above validation"]
    both, end = {**DROPOUT, "noise": NOISE}, {"dropout": 0.01, "noise": 0.3}
    assert run(train, valid, end, both, slight=("noise",)).names == ["dropout"]


class LitTeacher(STNModule):
    """A network of a given width, trained on the classes that a linear teacher assigns."""

    def __init__(self, width: int) -> None:
        super().__init__(hyperparameters=DROPOUT)
        net = nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Dropout(), nn.Linear(width, 8))
        self.net = self.convert(net, dropout="dropout")

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    validation_loss = training_loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def examples(n: int, seed: int) -> TensorDataset:
    generator, teacher = (torch.Generator().manual_seed(one) for one in (seed, 0))
    inputs = torch.randn(n, 16, generator=generator)
    return TensorDataset(inputs, (inputs @ torch.randn(16, 8, generator=teacher)).argmax(-1))


def trained(width: int, n: int, epochs: int, seed: int) -> tuple[STNCallback, str]:
    """A run with default settings, and the words of its report."""
    torch.manual_seed(seed)
    stn = STNCallback()
    run = trainer(stn, max_epochs=epochs, log_every_n_steps=8, check_val_every_n_epoch=epochs)
    run.fit(LitTeacher(width), DataLoader(examples(n, 1), 32, shuffle=True), DataLoader(examples(512, 2), 128))
    return stn, report(stn._recorder, stn._phase.statistics)


@pytest.mark.parametrize("seed", [0, 1])
def test_network_that_is_too_small_is_said_to_underfit(seed: int) -> None:
    stn, words = trained(width=2, n=1024, epochs=12, seed=seed)
    assert float(stn.schedule.final["dropout"]) < 0.03
    assert words.count("The network underfits: at the end of the run its training loss, ") == 1
    assert "which is why dropout ended near zero. Use a larger network" in words


@pytest.mark.parametrize("seed", [0, 1])
def test_network_that_overfits_is_not_said_to_underfit(seed: int) -> None:
    stn, words = trained(width=128, n=128, epochs=60, seed=seed)
    assert "underfits" not in words
    first, *rest = stn.schedule.rows
    fallen = Schedule(DROPOUT, [first, *(replace(row, values={"dropout": 0.001}) for row in rest)])
    assert underfitting(fallen, ()) is None
