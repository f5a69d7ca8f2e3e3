"""After an exception in an evaluation a module is in the modes that it had before, and the next `fit` regularises."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import LitSmall, fit, loader, trainer
from torch import Tensor

from lightning_stn import STNCallback


class FailsOnce(LitSmall):
    """Raises in the given evaluation, counted from 0; its batch norm is held in eval mode throughout."""

    def __init__(self, evaluation: int, error: type[BaseException] = ZeroDivisionError) -> None:
        super().__init__()
        self.evaluation = evaluation
        self.error = error
        self.net[2].eval()  # type: ignore[operator]

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        if not torch.is_grad_enabled():
            self.evaluation -= 1
            if self.evaluation == -1:
                raise self.error
        return super().validation_loss(batch, batch_idx)


def modes(module: LitSmall) -> dict[str, bool]:
    return {name: part.training for name, part in module.named_modules()}


def evaluate(loop: str) -> Callable[[LitSmall], None]:
    def run(module: LitSmall) -> None:
        getattr(trainer(STNCallback()), loop)(module, loader(16), **({} if loop == "predict" else {"verbose": False}))

    return run


@pytest.mark.filterwarnings("ignore:Found 1 module")
@pytest.mark.parametrize(
    ("evaluation", "run"),
    [
        (0, fit),
        (2, fit),  # in the second epoch
        (0, lambda module: fit(module, num_sanity_val_steps=1)),
        (0, evaluate("validate")),
        (0, evaluate("test")),
    ],
    ids=["validation", "later validation", "sanity check", "validate", "test"],
)
def test_module_leaves_eval_mode_after_an_exception_in_an_evaluation(
    evaluation: int, run: Callable[[LitSmall], None]
) -> None:
    module = FailsOnce(evaluation)
    before = modes(module)
    with pytest.raises(ZeroDivisionError):
        run(module)
    assert modes(module) == before
    fit(module)
    assert modes(module) == before
    assert module.hyperparameters.unread() == []


def test_module_leaves_eval_mode_after_an_exception_in_prediction() -> None:
    class Predicts(LitSmall):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            raise ZeroDivisionError

    module = Predicts()
    with pytest.raises(ZeroDivisionError):
        evaluate("predict")(module)
    assert all(modes(module).values())


def test_exception_in_training_changes_no_mode() -> None:
    class Fails(LitSmall):
        def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
            if self.trainer.global_step == 4:
                self.net[2].eval()  # type: ignore[operator]
                raise ZeroDivisionError
            return super().training_loss(batch, batch_idx)

    module = Fails()
    with pytest.raises(ZeroDivisionError):
        fit(module)
    assert [name for name, training in modes(module).items() if not training] == ["net.2"]


@pytest.mark.filterwarnings("ignore:Found .* module")
def test_every_fit_warns_of_what_nothing_reads() -> None:
    """In eval mode all are unread, whatever an earlier `fit` has read; the warning gives the reason."""
    module, stn = LitSmall(), STNCallback(train_steps=2, valid_steps=1, warmup=0, lr=0.05, seed=1)
    fit(module, stn)
    module.eval()
    said = r"Nothing read .*'dropout', 'noise', 'length'.* are in eval mode, .*'noise', 'cutout', .*Call train\(\)"
    for callback in (stn, None):
        with pytest.warns(UserWarning, match=said) as caught:
            fit(module, callback)
        assert sum("Nothing read" in str(warning.message) for warning in caught) == 1
