"""One run: training, the best epoch by validation loss, and one reading of the test data at this epoch."""

import copy
import datetime
import math
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tasks import Constants, Folders, Task

import lightning_stn
from lightning_stn import ScheduleReplay, STNCallback, STNModule, WeightStep
from lightning_stn.methods import OptimizerFactory, SharedAdam
from lightning_stn.specifications import ResponseForm

RECORD_EVERY = 10
"""Training batches from one row of a schedule to the next."""

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}

Prune = Callable[[int, float], bool]
"""From epoch and validation loss to whether the run should end."""


@dataclass(eq=False)
class BestEpoch(L.Callback):
    """Keeps the module's state at the best epoch, in memory, and the validation loss of every epoch.

    Attributes:
        curve: for each epoch its number, its validation loss, and the CPU seconds since the start, validation included.
        best: index in `curve` of the lowest validation loss; None if none was finite.
        state: state dict at this epoch.
        values: hyperparameters of a tuned run at this epoch, natural units.
    """

    prune: Prune | None = None
    begin: float = field(default_factory=time.process_time)
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    best: int | None = None
    state: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] | None = None
    pruned: bool = False

    @property
    def best_loss(self) -> float:
        """The lowest validation loss so far."""
        return math.inf if self.best is None else self.curve[self.best][1]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the validation loss, keep the state if it is the best, and end the run if it is pruned."""
        loss = trainer.callback_metrics["val_loss"].item()
        if loss < self.best_loss:
            self.best = len(self.curve)
            self.state = copy.deepcopy(pl_module.state_dict())
            self.values = _values(pl_module)
        self.curve.append((trainer.current_epoch, loss, round(time.process_time() - self.begin, 3)))
        if self.prune is not None and self.prune(trainer.current_epoch, loss):
            self.pruned = trainer.should_stop = True


def _values(module: L.LightningModule) -> dict[str, Any] | None:
    return module.hyperparameters.values() if isinstance(module, STNModule) else None


class Hypergradients:
    """The hypergradients of `lambda` at all steps of a run, as its optimiser gets them."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def recorded(self, factory: OptimizerFactory, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """An optimiser of the factory, whose steps are recorded."""
        (unconstrained,) = groups[0]["params"]
        optimizer = factory(groups)
        optimizer.register_step_pre_hook(lambda *_: self.seen.append(unconstrained.grad.clone()))
        return optimizer

    def summary(self) -> dict[str, Any]:
        """Median correlation between two hyperparameters, share of the first direction, mean and standard deviation."""
        if len(self.seen) < 3:
            return {"correlation": None, "first_direction": None, "hypergradient": None}
        gradients = torch.stack(self.seen).double()
        correlations = torch.corrcoef(gradients.T)
        pairs = correlations[torch.triu(torch.ones_like(correlations), 1).bool()]
        return {
            "correlation": pairs.nanquantile(0.5).item(),
            "first_direction": torch.linalg.eigvalsh(correlations.nan_to_num())[-1].item() / len(correlations),
            "hypergradient": [gradients.mean(0).tolist(), gradients.std(0).tolist()],
        }


@dataclass(frozen=True)
class Run:
    """How to train one network.

    Args:
        task: the task.
        seed: fixes weights, the order of the data, and which examples are drawn.
        folders: data and cache.
        epochs: length of the run; None for the task's.
        rate: factor of the learning rate of the weights.
    """

    task: Task
    seed: int
    folders: Folders
    epochs: int | None = None
    rate: float = 1.0

    @property
    def length(self) -> int:
        """Number of epochs."""
        return self.epochs or self.task.epochs

    def plain(self, constants: Constants | None, prune: Prune | None = None) -> dict[str, Any]:
        """Train the plain module at constants; None for no regularisation. Returns the fields of a row."""
        L.seed_everything(self.seed, verbose=False)
        module = self.task.build(constants, self.folders)
        row = self._train(module, [], {"gradient_clip_val": self.task.clip}, prune)
        return {"hyperparameters": dict(self.task.off if constants is None else constants), **row}

    @property
    def batches(self) -> int:
        """Training batches of the run."""
        return self.length * len(self.task.loaders(self.seed, self.folders).train)

    def replayed(self, replay: ScheduleReplay) -> dict[str, Any]:
        """Train the plain module at the values of a replay. Returns the fields of a row."""
        L.seed_everything(self.seed, verbose=False)
        module = self.task.build({name: name for name in self.task.space}, self.folders)  # type: ignore[misc]
        row = self._train(module, [replay], {"gradient_clip_val": self.task.clip}, None)
        return {"hyperparameters": None, **row, "final": replay.values}

    def tuned(
        self, settings: dict[str, Any], start: Constants, response: ResponseForm, keep: Path | None = None
    ) -> dict[str, Any]:
        """Train the self-tuned module from these values by `STNCallback(**settings)`. Returns the fields of a row.

        Args:
            settings: arguments of the callback.
            start: values, natural units.
            response: argument of the module.
            keep: where to save the schedule, or None.
        """
        L.seed_everything(self.seed, verbose=False)
        module = self.task.tuned(start, self.folders, response)
        begin = module.hyperparameters.values()
        clipping = {} if self.task.clip is None else {"weight_step": WeightStep(gradient_clip_val=self.task.clip)}
        settings = clipping | settings
        factory, seen = settings.get("optimizer", SharedAdam), Hypergradients()
        stn = STNCallback(**settings | {"optimizer": partial(seen.recorded, factory)})
        row = self._train(module, [stn], {"log_every_n_steps": RECORD_EVERY}, None)
        if keep is not None:
            keep.parent.mkdir(parents=True, exist_ok=True)
            stn.schedule.save(keep)
        described = {name: repr(value) for name, value in settings.items()}
        return {"hyperparameters": begin, "settings": described, "response": response, **row, **seen.summary()}

    def _train(
        self, module: L.LightningModule, callbacks: list[L.Callback], arguments: dict[str, Any], prune: Prune | None
    ) -> dict[str, Any]:
        train, valid, test = self.task.loaders(self.seed, self.folders)
        if self.rate != 1.0:
            module.optimizer = partial(_at_rate, module.optimizer, self.rate)  # type: ignore[assignment, arg-type]
        trainer = L.Trainer(
            max_epochs=self.length,
            callbacks=[*callbacks, best := BestEpoch(prune)],
            accelerator="cpu",
            num_sanity_val_steps=0,
            **QUIET,
            **arguments,
        )
        trainer.fit(module, train, valid)
        seconds = time.process_time() - best.begin
        final = _values(module)  # before the state of the best epoch takes their place
        return {
            "epochs": self.length,
            "best_epoch": None if best.best is None else best.curve[best.best][0],
            "best_val_loss": best.best_loss,
            "last_val_loss": best.curve[-1][1],
            "test": None if best.best is None else self._test(module, best.state, test),
            "cpu_seconds": round(seconds, 3),
            "pruned": best.pruned,
            "values_at_best": best.values,
            "final": final,
            "curve": [[epoch, round(loss, 6), at] for epoch, loss, at in best.curve],
        }

    def _test(self, module: L.LightningModule, state: dict[str, Any], test: Any) -> dict[str, float]:
        """Loss and metric of the best state on the test data; a self-tuned network is exported before."""
        module.load_state_dict(state)
        plain = module
        if isinstance(module, STNModule):
            plain = self.task.build(None, self.folders)
            plain.net = module.export()
        trainer = L.Trainer(accelerator="cpu", **QUIET)
        scores = trainer.test(plain, test, verbose=False)[0]
        loss = scores["test_loss"]
        derived = {"perplexity": math.exp(min(loss, 700.0)), "rmse": math.sqrt(loss)}
        metric = self.task.metric
        return {"loss": loss, metric: derived.get(metric, scores.get(f"test_{metric}"))}


def _at_rate(build: Callable[[], torch.optim.Optimizer], factor: float) -> torch.optim.Optimizer:
    """The optimiser of a task, with another learning rate."""
    optimizer = build()
    for group in optimizer.param_groups:
        group["lr"] *= factor
    return optimizer


def provenance() -> dict[str, Any]:
    """Versions and date of a run."""
    versions = {"lightning_stn": lightning_stn.__version__, "torch": torch.__version__, "lightning": L.__version__}
    return {"versions": versions | {"commit": _commit()}, "date": datetime.date.today().isoformat()}


def _commit() -> str | None:
    """The commit of this clone, with `-dirty` behind it if files have changed; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
