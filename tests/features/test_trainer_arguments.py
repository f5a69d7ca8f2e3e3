"""Arguments of the Trainer that only automatic optimisation has."""

import sys
from typing import Any

import lightning as L
import pytest
from features.runs import Traced, callback, train
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support import loader, trainer


class WithCallbacks(Traced):
    """Brings a further callback."""

    def configure_callbacks(self) -> Any:
        return [*super().configure_callbacks(), L.Callback()]


@pytest.mark.parametrize("kind", [Traced, WithCallbacks])
@pytest.mark.parametrize(
    ("arguments", "ours"),
    [
        ({"gradient_clip_val": 0.5}, r"gradient_clip_val=0\.5"),
        (
            {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
            r"gradient_clip_val=0\.5, gradient_clip_algorithm='value'",
        ),
        ({"accumulate_grad_batches": 4}, "accumulate_grad_batches=4"),
        (
            {"gradient_clip_val": 2.0, "accumulate_grad_batches": 4},
            r"gradient_clip_val=2\.0, accumulate_grad_batches=4",
        ),
    ],
)
def test_arguments_of_the_trainer_that_manual_optimisation_refuses_name_those_of_the_callback(
    kind: type[Traced], arguments: dict[str, Any], ours: str
) -> None:
    message = rf"got Trainer\({ours}\); write STNCallback\(weight_step=WeightStep\({ours}\)\)"
    module = kind()
    with pytest.raises(ValueError, match=message):
        train(module, stn=callback(), **arguments)
    with pytest.raises(ValueError, match=message):
        trainer(**arguments).fit(module, loader(24), loader(16))  # the callback was forgotten as well
    assert module.rates == []
    train(kind(automatic=True), stn=callback(), max_epochs=1, **arguments)


class OnlyItsCallbacks(Traced):
    """Does not call the hook of `STNModule`."""

    def configure_callbacks(self) -> Any:
        return [L.Callback()]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes")
def test_refusal_by_lightning_has_a_note_with_the_arguments_of_the_callback() -> None:
    with pytest.raises(MisconfigurationException, match="not supported for manual optimization") as error:
        train(OnlyItsCallbacks(), stn=callback(), gradient_clip_val=0.5)
    (note,) = error.value.__notes__
    assert "write STNCallback(weight_step=WeightStep(gradient_clip_val=0.5))" in note
    with pytest.raises(ZeroDivisionError) as other:
        train(OnlyItsCallbacks(), Fails(), stn=callback())
    assert not hasattr(other.value, "__notes__")


class Fails(L.Callback):
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        raise ZeroDivisionError


def test_accumulation_by_a_schedule_is_refused_in_manual_optimisation() -> None:
    with pytest.raises(NotImplementedError, match=r"GradientAccumulationScheduler does not work.*WeightStep\(accumul"):
        train(Traced(), GradientAccumulationScheduler({0: 2}))
    train(Traced(automatic=True), GradientAccumulationScheduler({0: 2}), max_epochs=1)


def test_arguments_of_the_trainer_do_not_matter_in_an_evaluation() -> None:
    module = Traced()
    train(module, max_epochs=1)
    trainer(gradient_clip_val=0.5, accumulate_grad_batches=2).validate(module, loader(16), verbose=False)
