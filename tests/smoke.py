"""Trains an installed package for a few batches; `.ci/run` runs it for the wheel and for the sdist.

    python -I tests/smoke.py

`-I` leaves PYTHONPATH and the folder of this file out of `sys.path`, so that no checkout hides the installed package.
"""

import importlib.metadata
import sys
import sysconfig
import tempfile
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_stn
from lightning_stn import Float, Schedule, STNCallback, STNModule

Batch = tuple[Tensor, Tensor]


class Small(STNModule):
    """A network with one tuned dropout rate."""

    def __init__(self) -> None:
        super().__init__(hyperparameters={"dropout": Float(0.0, 0.9, init=0.2)})
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 2))
        self.net = self.convert(net, dropout="dropout")

    def training_loss(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    validation_loss = training_loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def check_installation() -> None:
    """Check that the imported package is the one that pip has installed here, whole and of the version it names."""
    folder = Path(lightning_stn.__file__).parent
    assert folder.parent == Path(sysconfig.get_path("purelib")), f"imported from {folder}, not from this environment"
    version = importlib.metadata.version("lightning-stn")
    assert version == lightning_stn.__version__, f"metadata say {version}, the package {lightning_stn.__version__}"
    assert (folder / "py.typed").exists(), "py.typed is not installed"
    installed = importlib.metadata.files("lightning-stn") or []
    foreign = {str(path) for path in installed if not path.parts[0].startswith("lightning_stn")}
    assert not foreign, f"files outside the package are installed: {sorted(foreign)}"


def check_training(folder: Path) -> None:
    """Train, tune, read the schedule back, and export."""
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8)
    module, stn = Small(), STNCallback(train_steps=1, warmup=0, lr=0.1)
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        default_root_dir=folder,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[stn],
    )
    trainer.fit(module, data, data)
    rows = stn.schedule.rows
    assert rows[0].values["dropout"] != rows[-1].values["dropout"], "the hyperparameter has not moved"
    (path,) = folder.rglob("schedule.json")
    assert Schedule.load(path).rows == rows
    net = module.eval().export()
    torch.testing.assert_close(net(x), module.net(x))
    assert {type(layer).__module__.partition(".")[0] for layer in net.modules()} == {"torch"}


if __name__ == "__main__":
    check_installation()
    with tempfile.TemporaryDirectory() as name:
        check_training(Path(name))
    print(f"lightning_stn {lightning_stn.__version__} in {sys.prefix}, Python {sys.version.split()[0]}: ok")
