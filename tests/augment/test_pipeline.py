"""Augmentation in real training runs: which images are augmented, and reproducibility with loader workers."""

from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from support import trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stn import Float, STNCallback, STNModule, recommended_augmentation, recommended_hyperparameters
from lightning_stn.augment import GaussianNoise, RandomAffine, RandomErasing, RandomHorizontalFlip
from lightning_stn.regularizers import Dropout


def images(n: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.rand(n, 3, 8, 8, generator=generator), torch.arange(n) % 3)


class LitPipeline(STNModule):
    def __init__(self) -> None:
        recommended = recommended_hyperparameters("image")
        more = {name: Float(0.0, 1.0, init=0.5) for name in ("noise", "erasing", "flip")}
        super().__init__(hyperparameters={**recommended, **more, "degrees": Float(0.0, 90.0, init=20.0)})
        self.augment = nn.Sequential(
            recommended_augmentation(),
            RandomAffine(degrees="degrees"),
            RandomErasing("erasing"),
            RandomHorizontalFlip("flip"),
            GaussianNoise("noise"),
            Dropout("input_dropout"),
        )
        self.net = self.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)))
        self.seen: dict[str, list[Tensor]] = {"train": [], "tune": [], "evaluate": []}

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        x = self.augment(batch[0])
        self.seen["train"].append(x.detach())
        return F.cross_entropy(self.net(x), batch[1])

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        x = self.augment(batch[0])
        self.seen["tune" if torch.is_grad_enabled() else "evaluate"].append(x.detach())
        return F.cross_entropy(self.net(x), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def run(workers: int = 0) -> LitPipeline:
    L.seed_everything(0, verbose=False)
    module = LitPipeline()
    train = DataLoader(images(32, 0), 8, shuffle=True, num_workers=workers)
    callback = STNCallback(train_steps=2, warmup=1, seed=0, lr=0.1)
    fit = trainer(callback, max_epochs=3)
    fit.fit(module, train, DataLoader(images(16, 1), 8))
    fit.test(module, DataLoader(images(24, 2), 8), verbose=False)
    return module


def test_pipeline_leaves_validation_and_test_images_unchanged() -> None:
    """The module passes them through the pipeline too."""
    seen = run().seen
    known = {
        name: {tuple(image.flatten().tolist()) for image in images(n, seed).tensors[0]}
        for name, n, seed in (("train", 32, 0), ("valid", 16, 1), ("test", 24, 2))
    }

    def share_of(name: str, batches: list[Tensor]) -> float:
        rows = [tuple(image.flatten().tolist()) for batch in batches for image in batch]
        return sum(row in known[name] for row in rows) / len(rows)

    assert share_of("valid", seen["tune"]) == 1.0
    assert len(seen["tune"]) == 4
    evaluated = [batch for batch in seen["evaluate"]]
    assert share_of("test", evaluated[-3:]) == 1.0
    assert share_of("valid", evaluated[:-3]) == 1.0
    assert share_of("train", seen["train"]) < 0.1


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 4])
def test_results_repeat_and_do_not_depend_on_the_number_of_workers(workers: int) -> None:
    first, second = run(), run(workers)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert all(map(torch.equal, first.seen["train"], second.seen["train"]))
