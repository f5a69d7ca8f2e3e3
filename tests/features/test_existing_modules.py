"""What an existing module does in its steps goes on when an `STNModule` stands in front of it."""

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from support import LitSmall, lightning_before, loader, small_net, trainer
from torch import Tensor

from lightning_stn import Float, STNCallback, STNModule


class Existing(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05)


def tuned(base: type[Existing], automatic: bool = False) -> Any:
    class Tuned(STNModule, base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__(hyperparameters={"dropout": Float(0.0, 0.9, init=0.1)})
            self.automatic_optimization = automatic
            self.net = self.convert(self.net, dropout="dropout")

        def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

    return Tuned()


def callback(**settings: Any) -> STNCallback:
    return STNCallback(**{"train_steps": 1, "warmup": 0, "seed": 1, **settings})


def fit(module: L.LightningModule, stn: STNCallback | None = None, **settings: Any) -> L.Trainer:
    run = trainer(stn or callback(), max_epochs=1, **settings)
    run.fit(module, loader(24), loader(16, seed=1))
    return run


class Returns(Existing):
    """Returns more than the loss, as for a callback that shows predictions."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.net(batch[0])
        return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits.detach(), "index": batch_idx}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.seen.append(outputs)


@pytest.mark.parametrize("automatic", [False, True])
@pytest.mark.parametrize("method", ["stn", "delta-stn"])
def test_outputs_of_a_step_reach_the_hooks(method: str, automatic: bool) -> None:
    module = tuned(Returns, automatic)
    fit(module, callback(method=method))
    assert [outputs["index"] for outputs in module.seen] == [0, 1, 2]
    assert all(outputs["logits"].shape == (8, 3) for outputs in module.seen)
    assert all(outputs["loss"].numel() == 1 for outputs in module.seen)


def decorated(step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(step)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        return step(self, *args, **kwargs)

    del run.__wrapped__  # as of a decorator without functools.wraps
    return run


class AnyArguments(Existing):
    def training_step(self, *args: Any) -> Any:
        batch, batch_idx = args
        return super().training_step(batch, batch_idx)


class Decorated(Existing):
    @decorated
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log(f"loss_{dataloader_idx}", batch[0].mean(), add_dataloader_idx=False)


class BatchOnly(Existing):
    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        return super().training_step(batch, 0)


@pytest.mark.parametrize("base", [AnyArguments, BatchOnly])
def test_steps_with_other_arguments_train(base: type[Existing]) -> None:
    assert fit(tuned(base)).global_step == 3


def test_decorated_step_gets_the_number_of_its_loader() -> None:
    run = trainer(callback(dataloader=loader(16, seed=1)), max_epochs=1)
    run.fit(tuned(Decorated), loader(24), [loader(16, seed=1), loader(16, seed=2)])
    assert {"loss_0", "loss_1"} <= run.callback_metrics.keys()


class TakesTheIterator(Existing):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        return super().training_step(next(dataloader_iter)[0], 0)


class ValidatesTheIterator(Existing):
    def validation_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        next(dataloader_iter)


@pytest.mark.parametrize(
    ("base", "step"),
    [(TakesTheIterator, "TakesTheIterator.training_step"), (ValidatesTheIterator, "ValidatesTheIterator.valid")],
)
def test_step_that_takes_the_iterator_of_the_loader_is_refused(base: type[Existing], step: str) -> None:
    with pytest.raises(NotImplementedError, match=f"{step}.* takes dataloader_iter.*; take batch and batch_idx"):
        fit(tuned(base))


class Skips(Existing):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


class SkipsInADictionary(Existing):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": None if batch_idx == 1 else super().training_step(batch, batch_idx)}


class SkipsByItself(LitSmall):
    def training_loss(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 1 else super().training_loss(batch, batch_idx)


@pytest.mark.parametrize("automatic", [False, True])
@pytest.mark.parametrize("build", [lambda: tuned(Skips), lambda: tuned(SkipsInADictionary), SkipsByItself])
def test_a_skipped_batch_is_refused_in_words(build: Callable[[], Any], automatic: bool) -> None:
    module = build()
    module.automatic_optimization = automatic
    with pytest.raises(ValueError, match=r"got NoneType; return the mean loss. A batch cannot be skipped"):
        fit(module)


class Adds(LitSmall):
    """Adds to the loss in `training_step`; in manual optimisation, behind the weight step."""

    def __init__(self, term: float, automatic: bool) -> None:
        super().__init__()
        self.term, self.automatic_optimization = term, automatic

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + self.term


def test_term_that_a_step_adds_behind_the_weight_step_is_named() -> None:
    with pytest.warns(
        UserWarning, match=r"Adds\.training_step returns another loss .* trains nothing; .*training_loss"
    ):
        fit(Adds(1.0, automatic=False))


@pytest.mark.parametrize(("term", "automatic"), [(0.0, False), (1.0, True)])
def test_step_whose_loss_is_trained_is_not_warned_of(term: float, automatic: bool) -> None:
    fit(Adds(term, automatic))


class WithoutLoss(Existing):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"train_loss": super().training_step(batch, batch_idx)}


def test_dictionary_of_a_step_without_a_loss_is_refused() -> None:
    with pytest.raises(ValueError, match=r"WithoutLoss\.training_step to return a loss, .*the keys \['train_loss'\]"):
        fit(tuned(WithoutLoss))


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_network_may_be_converted_as_late_as_in_a_hook(hook: str) -> None:
    class Late(LitSmall):
        def __init__(self) -> None:
            super().__init__()
            del self.net

    def build(self: Any, stage: str | None = None) -> None:
        if not hasattr(self, "net"):
            self.net = self.convert(small_net(), dropout="dropout")

    setattr(Late, hook, build)
    module: Any = Late()
    assert fit(module).global_step == 3
    assert module.net[0].weight_gate.abs().sum() > 0


def test_network_that_is_never_converted_is_refused_before_the_first_step() -> None:
    class Never(LitSmall):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

    with pytest.raises(ValueError, match=r"No layer of Never responds.*self\.net = self\.convert\(net\)"):
        fit(Never())


@pytest.mark.parametrize("every", [0, 1])
def test_a_trainer_that_logs_nothing_records_only_begin_and_end(every: int, tmp_path: Any) -> None:
    stn = callback()
    fit(LitSmall(), stn, log_every_n_steps=every, logger=CSVLogger(tmp_path))
    assert [row.step for row in stn.schedule.rows] == ([0, 1, 2, 3] if every else [0, 3])


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_a_bare_trainer_trains() -> None:
    settings: dict[str, Any] = {"accelerator": "cpu", "barebones": True, "max_epochs": 1, "logger": False}
    run = L.Trainer(callbacks=[stn := callback()], **settings)
    run.fit(LitSmall(), loader(24), loader(16, seed=1))
    assert run.global_step == 3
    assert [row.step for row in stn.schedule.rows] == [0, 3]


@pytest.mark.parametrize("twice", [copy.deepcopy, lambda stn: pickle.loads(pickle.dumps(stn))], ids=["copy", "pickle"])
def test_callback_can_be_copied_after_a_run(twice: Callable[[STNCallback], STNCallback]) -> None:
    stn = callback()
    fit(LitSmall(), stn)
    other = twice(stn)
    assert other.schedule.rows == stn.schedule.rows
    assert other._phase.stream.consumed == stn._phase.stream.consumed
    fit(LitSmall(), other)


@pytest.mark.parametrize("twice", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))], ids=["copy", "pickle"])
@pytest.mark.parametrize("workers", [{}, {"num_workers": 1, "persistent_workers": True}], ids=["", "workers"])
def test_trainer_can_be_copied_after_a_run(twice: Callable[[L.Trainer], Any], workers: dict[str, Any]) -> None:
    run = trainer(stn := callback(), max_epochs=1)
    run.fit(LitSmall(), loader(24), loader(16, seed=1, **workers))
    other = twice(run)
    (copied,) = (one for one in other.callbacks if isinstance(one, STNCallback))
    assert copied.schedule.rows == stn.schedule.rows
    ours, theirs = run.lightning_module.state_dict(), other.lightning_module.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())


def test_combined_loader_gives_its_batches_to_the_loss() -> None:
    kinds = set()

    class Both(LitSmall):
        def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
            if self.runs_for == "hyperparameters":
                kinds.add(type(batch))
                batch = batch["a"]
            return super().validation_loss(batch, batch_idx)

    both = CombinedLoader({"a": loader(16, seed=1), "b": loader(16, seed=2)}, "min_size")
    fit(Both(), callback(dataloader=both))
    assert kinds == {dict}


class Saves(Existing):
    def __init__(self, width: int = 3, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.width = width


RATES = {"dropout": Float(0.0, 0.9, init=0.1)}


class HandsOn(STNModule, Saves):
    """Hands its arguments on, as a subclass of somebody else's module does."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(hyperparameters=RATES, response="gates", **arguments)
        self.net = self.convert(self.net, dropout="dropout")

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Takes(HandsOn):
    """Has the hyperparameters from its caller."""

    def __init__(self, hyperparameters: dict[str, Any], width: int = 3) -> None:
        STNModule.__init__(self, hyperparameters=hyperparameters, width=width)
        self.net = self.convert(self.net, dropout="dropout")


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
@pytest.mark.parametrize(
    ("module", "saved"),
    [(lambda: HandsOn(width=5), {"width", "lr"}), (lambda: Takes(RATES, width=5), {"width", "lr", "hyperparameters"})],
    ids=["hands on", "takes"],
)
def test_module_that_saves_its_arguments_loads_from_its_checkpoint(
    module: Callable[[], Any], saved: set[str], tmp_path: Any
) -> None:
    tuned_module = module()
    run = fit(tuned_module, logger=CSVLogger(tmp_path))
    run.save_checkpoint(tmp_path / "last.ckpt")
    arguments = {} if lightning_before("2.6") else {"weights_only": False}  # 2.5 gives it to the module, and loads all
    loaded = type(tuned_module).load_from_checkpoint(tmp_path / "last.ckpt", **arguments)
    assert loaded.width == 5
    assert set(loaded.hparams) == saved
    assert all(torch.equal(value, tuned_module.state_dict()[name]) for name, value in loaded.state_dict().items())
    if "hyperparameters" not in saved:
        assert "Float" not in (tmp_path / "lightning_logs/version_0/hparams.yaml").read_text()


def test_arguments_that_are_named_are_saved() -> None:
    class Names(HandsOn):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"own": 1})

    assert Names().hparams["own"] == 1
