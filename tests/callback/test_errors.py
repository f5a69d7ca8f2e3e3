"""Errors at the start of a run, and their messages."""

from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from support import LitSmall, fit, loader, small_net, trainer
from torch import Tensor, nn

from lightning_stn import Float, STNCallback, STNModule, WeightStep
from lightning_stn.augment import GaussianNoise


class Bare(STNModule):
    def __init__(self) -> None:
        super().__init__(hyperparameters={"rate": Float(0.0, 0.9, init=0.05)})
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class NoValidationLoss(Bare):
    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


class NoTrainingLoss(Bare):
    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


class NotConverted(NoValidationLoss, NoTrainingLoss):
    pass


class UnknownName(NotConverted):
    def __init__(self) -> None:
        super().__init__()
        self.convert(self.net)
        self.noise = GaussianNoise("rat")


class FixedOptimizer(LitSmall):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for n, p in self.net.named_parameters() if "response" not in n], lr=0.1)


class Plateau(LitSmall):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)]


class Detached(LitSmall):
    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return super().validation_loss(batch, batch_idx).detach()


class WithoutNetwork(LitSmall):
    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return next(self.net.parameters()).sum()


class PerExample(LitSmall):
    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")


class NotScalar(LitSmall):
    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0])


class NoTensor(LitSmall):
    def training_loss(self, batch: Any, batch_idx: int) -> Any:
        return None


class Automatic(LitSmall):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = True


class Plain(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (Plain, TypeError, "to train an STNModule, got Plain"),
        (NoValidationLoss, NotImplementedError, "no validation loss; define validation_loss"),
        (NoTrainingLoss, NotImplementedError, "no training loss; define training_loss"),
        (NotConverted, ValueError, r"No layer of NotConverted responds.*self\.convert\(net\)"),
        (UnknownName, KeyError, r"GaussianNoise 'noise' reads the hyperparameter 'rat'.*or 'rate' is misspelt"),
        (FixedOptimizer, ValueError, r"No optimiser trains.*net\.0\.response_weight.*self\.parameters\(\)"),
        (Plateau, ValueError, "ReduceLROnPlateau follows a metric, but configure_optimizers names none"),
        (Detached, ValueError, "does not depend on the hyperparameters.*without torch.no_grad"),
        (WithoutNetwork, ValueError, "does not depend on the hyperparameters"),
        (PerExample, ValueError, r"validation_loss to return a scalar tensor, got shape \[8\]"),
        (NotScalar, ValueError, r"training_loss to return a scalar tensor, got shape \[8, 3\]"),
        (NoTensor, ValueError, "training_loss to return a scalar tensor, got NoneType"),
    ],
)
def test_fit_refuses_a_module_that_cannot_be_tuned(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit(build())


def test_fit_raises_without_the_callback() -> None:
    with pytest.raises(RuntimeError, match=r"trains without its callback; pass callbacks=\[STNCallback"):
        trainer().fit(LitSmall(), loader(24), loader(16))


def test_fit_refuses_two_callbacks() -> None:
    with pytest.raises(ValueError, match="Expected one STNCallback, got 2"):
        trainer(STNCallback(), SecondCallback()).fit(LitSmall(), loader(24), loader(16))


class SecondCallback(STNCallback):
    pass


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize("options", [{"limit_val_batches": 0}, {"val": None}, {"val": "two"}])
def test_fit_refuses_no_validation_loader_and_several(options: dict[str, Any]) -> None:
    val = {"two": [loader(16), loader(16)], None: None, "one": loader(16)}[options.pop("val", "one")]
    count = 2 if isinstance(val, list) else 0
    message = f"Expected one validation loader for the hyperparameter phase, got {count}; pass one.*dataloader="
    run = trainer(STNCallback(warmup=0), **options)
    with pytest.raises(ValueError, match=message):
        run.fit(LitSmall(), loader(24), val)


@pytest.mark.parametrize(
    "options", [{"gradient_clip_val": 1.0}, {"gradient_clip_algorithm": "value"}, {"accumulate_grad_batches": 2}]
)
def test_fit_refuses_weight_step_settings_in_automatic_optimization(options: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"Lightning takes the weight step.*leave weight_step out, and pass to Trainer"
    ):
        fit(Automatic(), STNCallback(weight_step=WeightStep(**options)))


def test_fit_names_the_hook_for_a_batch_of_unknown_size() -> None:
    class Strange(LitSmall):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return object()

    with pytest.raises(ValueError, match="override infer_batch_size"):
        fit(Strange(), STNCallback(perturb="example"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_steps": 0}, "train_steps"),
        ({"valid_steps": 0}, "valid_steps"),
        ({"warmup": -1}, "Warmup: expected length to be a whole number of epochs"),
        ({"warmup": 1.5}, "share of the run"),
        ({"lr": 0.0}, "lr to be positive"),
        ({"lr": float("nan")}, "lr to be positive"),
        ({"anneal": 1}, "anneal to be True or False, got 1"),
        ({"scales": None}, "scales to be Scales"),
        ({"perturb": "row"}, "perturb='example' or perturb='batch', got 'row'"),
        ({"weight_step": 2}, "weight_step to be WeightStep"),
    ],
)
def test_callback_names_a_wrong_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        STNCallback(**arguments)


def test_schedule_raises_before_fit() -> None:
    with pytest.raises(RuntimeError, match="no schedule yet"):
        _ = STNCallback().schedule
