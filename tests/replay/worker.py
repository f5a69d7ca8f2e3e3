"""One rank of a replay on several processes; `strategies.worker.launch` starts it in a separate process."""

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from strategies.worker import BATCHES, EPOCHS, STRATEGIES, WHOLE_BATCH, Stop, _whole, dataset, main, shard
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_stn import Float, Gaussian, ResumableLoader, Schedule, ScheduleReplay, STNModule, regularizers
from lightning_stn.schedule import Row

KINDS = {"gain": Float(0.0, None, init=0.5), "dropout": Float(0.0, 0.9, init=0.1)}
WORKER = "replay.worker"


def recorded(dropout: float) -> Schedule:
    """A schedule over the run, of which the gain changes at every step."""
    schedule = Schedule(KINDS)
    for step in range(BATCHES * EPOCHS + 1):
        schedule.append(Row(step, 0, {"gain": 0.2 + 0.02 * step, "dropout": dropout}, {"gain": 0.5, "dropout": 0.5}))
    return schedule


class Tuned(STNModule):
    """Reads both hyperparameters itself or by a converted network, in float64."""

    def __init__(self) -> None:
        super().__init__(hyperparameters=KINDS)
        net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.1), nn.Linear(6, 3))
        self.net = self.convert(net, dropout="dropout").double()

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0] * self.hyperparameters["gain"].double()), batch[1])

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Sharded(Tuned):
    """`Tuned` for FSDP2."""

    def configure_model(self) -> None:
        shard(self.net, self.device_mesh)


class Plain(L.LightningModule):
    """A regulariser that names one hyperparameter, and an attribute that a replay sets to the other."""

    def __init__(self) -> None:
        super().__init__()
        dropout = regularizers.Dropout("dropout")
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), dropout, nn.Linear(6, 3)).double()
        self.gain = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0] * self.gain), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def train(
    folder: Path,
    *,
    name: str,
    strategy: str = "ddp",
    plain: bool = False,
    values: str | None = None,
    dropout: float = 0.3,
    noise: float | None = None,
    stop: int | None = None,
    every: int = 1000,
    checkpoint: str | None = None,
    seed: int = 0,
) -> None:
    """Run once, and save the final state of every rank."""
    L.seed_everything(seed, verbose=False)
    ranks = 1 if strategy == "one" else 2
    replay = ScheduleReplay(
        values or recorded(dropout),
        attributes={"gain": "gain"} if plain else None,
        noise=None if noise is None else Gaussian(noise),
    )
    module: Any = Plain() if plain else (Sharded if strategy == "fsdp" else Tuned)()
    seen: list[Any] = []
    current: list[Any] = []

    def see(*_: Any) -> None:
        seen.append(replay.values)
        current.append({"gain": module.gain} if plain else module.hyperparameters.values())

    callbacks: list[L.Callback] = [
        replay,
        L.pytorch.callbacks.LambdaCallback(on_train_batch_start=see),
        *([] if stop is None else [Stop(stop, kill=False)]),
        ModelCheckpoint(folder / name, "{step}", every_n_train_steps=every, save_top_k=-1),
    ]
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=STRATEGIES[strategy](),
        max_epochs=EPOCHS,
        callbacks=callbacks,
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loaders = ResumableLoader(dataset(0), WHOLE_BATCH // ranks, seed=5), DataLoader(dataset(1), WHOLE_BATCH // ranks)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(module, *loaders[: 1 if plain else 2], ckpt_path=checkpoint)
        except KeyError:
            return
    end = {
        "state": {key: _whole(value).clone() for key, value in module.state_dict().items()},
        "seen": seen,
        "current": current,
        "trains": [parameter.requires_grad for parameter in module.parameters()],
        "warnings": [str(one.message) for one in caught if "ScheduleReplay" in str(one.message)],
    }
    torch.save(end, folder / f"{name}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(train)
