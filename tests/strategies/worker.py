"""One rank of a run on several: `launch` starts it in a separate process, `ends` reads the state that it saves.

All noise is a function of the example, so that two ranks with half a batch each see the noise that one process sees.
"""

import atexit
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, TensorDataset

from lightning_stn import Float, ResumableLoader, Scales, STNCallback, STNModule, WeightStep, functional
from lightning_stn.binding import bind_weight_phase
from lightning_stn.layers import ResponseLayer

EXAMPLES, WHOLE_BATCH, EPOCHS = 64, 8, 7
BATCHES = EXAMPLES // WHOLE_BATCH
Batch = tuple[Tensor, Tensor, Tensor]


def dataset(seed: int) -> TensorDataset:
    """Inputs, labels, and noise for each example."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(EXAMPLES) % 3
    inputs = torch.randn(EXAMPLES, 5, generator=generator, dtype=torch.float64) + labels.unsqueeze(-1)
    return TensorDataset(inputs, labels, torch.randn(EXAMPLES, 2, generator=generator))


class Reader(nn.Module):
    """Reads the inputs one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.norm, self.head = nn.LSTM(1, 4, batch_first=True), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        last: Tensor = self.head(self.norm(self.recurrent(inputs.unsqueeze(-1))[0]))[:, -1]
        return last


class Lit(STNModule):
    """Two hyperparameters, an input gain and a penalty, on a small network in float64.

    Args:
        drawn: draw perturbations and dropout from the generator, instead of taking noise from the examples.
        automatic: leave the weight step to Lightning.
        recurrent: read the inputs one by one.
    """

    def __init__(self, drawn: bool = False, automatic: bool = False, recurrent: bool = False) -> None:
        super().__init__(hyperparameters={"gain": Float(0.0, None, init=0.5), "decay": Float(0.0, None, init=0.01)})
        self.automatic_optimization = automatic
        self.drawn = drawn
        dropout = nn.Dropout(0.1 if drawn else 0.0)
        net = Reader() if recurrent else nn.Sequential(nn.Linear(5, 6), nn.Tanh(), dropout, nn.Linear(6, 3))
        self.net = self.convert(net).double()
        self.samples: list[Tensor] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.wrapped: set[str] = set()

    def _stn_perturb(self, batch: Batch, generator: torch.Generator | None = None) -> None:
        if self.drawn:
            super()._stn_perturb(batch, generator)
        else:
            hyperparameters = self.hyperparameters
            sample = functional.perturb(hyperparameters.unconstrained, hyperparameters.scale, batch[2])
            bind_weight_phase(hyperparameters, sample)
        assert self.hyperparameters.current_pass.sample is not None
        self.samples.append(self.hyperparameters.current_pass.sample.clone())

    def training_loss(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, labels, _ = batch
        gain, decay = (self.hyperparameters[name].double().reshape(-1, 1) for name in ("gain", "decay"))
        logits = self.net(inputs * gain)
        return F.cross_entropy(logits, labels) + (decay * logits.square()).mean()

    def validation_loss(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, labels, _ = batch
        return F.cross_entropy(self.net(inputs), labels)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.wrapped |= {type(self.trainer.strategy.model).__name__, type(next(self.net.parameters())).__name__}
        self.gradients.append(
            {name: _whole(p.grad).clone() for name, p in self.named_parameters() if p.grad is not None}
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def shard(net: nn.Module, mesh: Any) -> None:
    """Shard a converted network by FSDP2, layer by layer."""
    from torch.distributed.fsdp import fully_shard

    for layer in net.modules():
        if isinstance(layer, ResponseLayer):
            fully_shard(layer, mesh=mesh["data_parallel"])
    fully_shard(net, mesh=mesh["data_parallel"])


class Sharded(Lit):
    """`Lit` for FSDP2: converted in the constructor, sharded in `configure_model`."""

    def configure_model(self) -> None:
        shard(self.net, self.device_mesh)


class ByExample(STNCallback):
    """Takes the noise of the hyperparameter phase from the examples."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        draw = self._phase._noise

        def noise(trainer: L.Trainer, module: STNModule, batch: Batch, number: int) -> Tensor | None:
            return draw(trainer, module, batch, number) if module.drawn else batch[2]  # type: ignore[return-value]

        self._phase._noise = noise  # type: ignore[method-assign]


class Stop(L.Callback):
    """Raises before a batch, or kills the process with SIGKILL."""

    def __init__(self, batch: int, kill: bool) -> None:
        self.batch, self.kill = batch, kill

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch * BATCHES + batch_idx == self.batch:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyError("interrupted")


class StopOne(L.Callback):
    """Raises on the first rank before a batch, where the other one hangs until there is a checkpoint, and dies."""

    def __init__(self, batch: int, checkpoint: Path) -> None:
        self.batch, self.checkpoint = batch, checkpoint

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch * BATCHES + batch_idx == self.batch:
            if trainer.is_global_zero:
                raise KeyError("interrupted")
            deadline = time.monotonic() + 60
            while not self.checkpoint.exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)


STRATEGIES: dict[str, Any] = {
    "one": lambda: "auto",
    "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
    "static": lambda: DDPStrategy(process_group_backend="gloo", static_graph=True),
    "spawn": lambda: DDPStrategy(process_group_backend="gloo", start_method="spawn"),
    "fork": lambda: DDPStrategy(process_group_backend="gloo", start_method="fork"),
    "fsdp": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"),
}


def train(
    folder: Path,
    *,
    strategy: str,
    name: str,
    stop: int | None = None,
    stop_one: int | None = None,
    kill: bool = False,
    every: int = 1000,
    checkpoint: str | None = None,
    seed: int = 0,
    module: dict[str, Any] | None = None,
    **stn: Any,
) -> None:
    """Run once, and save the final state of every rank."""
    L.seed_everything(seed, verbose=False)
    ranks = 1 if strategy == "one" else 2
    lit = (Sharded if strategy == "fsdp" else Lit)(**(module or {}))
    # Both kinds of steps with a row per example, and steps of about `lr` for every hyperparameter.
    settings = {
        **{"train_steps": 2, "valid_steps": 1, "warmup": 0, "perturb": "example", "lr": 0.05, "seed": seed},
        **{"scales": Scales(tune=True), "optimizer": torch.optim.Adam, "anneal": False},
        **stn,
    }
    if "weight_step" in stn:
        settings["weight_step"] = WeightStep(**stn["weight_step"])
    stn_callback = ByExample(**settings)
    callbacks: list[L.Callback] = [stn_callback, EndsGroup()]
    callbacks += [] if stop is None else [Stop(stop, kill)]
    if stop_one is not None:
        on_exception = OnExceptionCheckpoint(folder / name)
        callbacks += [StopOne(stop_one, Path(on_exception.ckpt_path)), on_exception]
    callbacks.append(ModelCheckpoint(folder / name, "{step}", every_n_train_steps=every, save_top_k=-1))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=STRATEGIES[strategy](),
        max_epochs=EPOCHS,
        callbacks=callbacks,
        logger=CSVLogger(folder, name=name, version="log"),
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batch_size = WHOLE_BATCH // ranks
    loaders = ResumableLoader(dataset(0), batch_size, seed=5), DataLoader(dataset(1), batch_size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(lit, *loaders, ckpt_path=checkpoint)
        except KeyError:
            return
    end = {
        "state": {key: _whole(value).clone() for key, value in lit.state_dict().items()},
        "samples": lit.samples,
        "gradients": lit.gradients,
        "callback": {k: v for k, v in stn_callback.state_dict().items() if k != "record"},
        "schedule": [stn_callback.schedule.cells(row) for row in stn_callback.schedule.rows],
        "same schedule": lit.schedule == stn_callback.schedule,
        "optimizers": tree_map_only(Tensor, _whole, [optimizer.state_dict() for optimizer in trainer.optimizers]),
        "wrapped": sorted(lit.wrapped),
        "warnings": [str(warning.message) for warning in caught],
    }
    torch.save(end, folder / f"{name}-{trainer.global_rank}.pt")
    if every < 1000 and strategy != "one":
        trainer.save_checkpoint(folder / f"{name}-end.ckpt")


def _whole(tensor: Tensor) -> Tensor:
    """The full tensor, if it is sharded over the ranks."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return int(server.getsockname()[1])


def launch(
    folder: Path, *jobs: dict[str, Any], ranks: int = 2, timeout: float = 240, worker: str = "strategies.worker"
) -> list[int]:
    """Run jobs one after the other on `ranks` processes, each by `train` of a module; return their exit codes."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(list(jobs), folder / "jobs.pt")
    port = str(free_port())
    processes = []
    for rank in range(ranks):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if ranks > 1:
            environment |= {
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": port,
                "WORLD_SIZE": str(ranks),
                "NODE_RANK": "0",
                "LOCAL_RANK": str(rank),
            }
        command = [sys.executable, "-m", worker, str(folder)]
        with open(folder / f"log-{rank}.txt", "w") as log:
            place = Path(__file__).parents[1]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=place))
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, code in enumerate(codes):
        if code:  # pytest shows this where a test fails
            print(f"Rank {rank} ended with {code}:\n{(folder / f'log-{rank}.txt').read_text()[-4000:]}")
    return codes


def ends(folder: Path, name: str, ranks: int = 2) -> list[dict[str, Any]]:
    """Final state of each rank of a job."""
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(ranks)]


def end_group() -> None:
    """End the process group, whose threads may still run when the interpreter ends, which then aborts."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class EndsGroup(L.Callback):
    """Ends the process group of a process that `trainer.fit` has started, when its interpreter ends."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if multiprocessing.parent_process() is not None:
            atexit.register(end_group)


def main(train: Callable[..., None]) -> None:
    """Run the jobs of this process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    for job in torch.load(place / "jobs.pt"):
        train(place, **job)
    end_group()


if __name__ == "__main__":
    main(train)
