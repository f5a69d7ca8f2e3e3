"""A choice among augmentations, tuned in a real run that starts at an operation that destroys the signal.

Inputs are the pattern of their class plus noise. Shuffled features carry no information about the class. If validation
inputs are distributed as training inputs, no operation is right; if half of them are mirrored, mirroring half is right.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stn import Categorical, STNCallback, STNModule
from lightning_stn.functional import choice_probabilities

CLASSES, FEATURES, EXAMPLES = 4, 12, 256
PROBABILITY = 0.9
"""Smallest final probability of the right choice; chance is 1/3, and the start is 0.18."""


def mirror_half(x: Tensor) -> Tensor:
    return torch.where(torch.rand(len(x), 1) < 0.5, x.flip(-1), x)


OPERATIONS = {
    "none": lambda x: x,
    "noise": lambda x: x + 2 * torch.randn_like(x),
    "shuffle": lambda x: x.gather(1, torch.rand_like(x).argsort(1)),
    "mirror": mirror_half,
}

PROBLEMS = {
    "harmless": (("none", "noise", "shuffle"), False, "none"),
    "helpful": (("none", "shuffle", "mirror"), True, "mirror"),
}


def data(seed: int, *, mirrored: bool) -> TensorDataset:
    """Inputs `[n, i]`, with `mirrored` half of them mirrored, and labels `[n]`."""
    patterns = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(EXAMPLES) % CLASSES
    inputs = patterns[labels] + 0.7 * torch.randn(EXAMPLES, FEATURES, generator=generator)
    if mirrored:
        inputs = torch.where(torch.rand(EXAMPLES, 1, generator=generator) < 0.5, inputs.flip(-1), inputs)
    return TensorDataset(inputs, labels)


class LitChoosing(STNModule):
    """Applies to each training example the operation that was drawn for it, and none to validation examples."""

    def __init__(self, choices: tuple[str, ...]) -> None:
        super().__init__(hyperparameters={"operation": Categorical(choices, init="shuffle")})
        self.operations = [OPERATIONS[choice] for choice in choices]
        net = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES))
        self.net = self.convert(net)

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        augmented = torch.stack([operation(inputs) for operation in self.operations])
        chosen = augmented[self.hyperparameters["operation"], torch.arange(len(inputs))]
        return F.cross_entropy(self.net(chosen), labels)

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_choice_moves_from_a_destructive_operation_to_the_right_one(problem: str, seed: int) -> None:
    choices, mirrored, right = PROBLEMS[problem]
    torch.manual_seed(seed)
    module = LitChoosing(choices)
    callback = STNCallback(train_steps=2, warmup=20, perturb="example", lr=0.1, anneal=False, seed=seed)
    order = torch.Generator().manual_seed(seed)
    train = DataLoader(data(1, mirrored=False), batch_size=32, shuffle=True, generator=order)
    valid = DataLoader(data(2, mirrored=mirrored), batch_size=64)
    trainer(callback, max_epochs=60, check_val_every_n_epoch=60, log_every_n_steps=10).fit(module, train, valid)
    assert callback.schedule.rows[0].values["operation"] == "shuffle"
    hyperparameters = module.hyperparameters
    assert hyperparameters.values()["operation"] == right
    probabilities = choice_probabilities(hyperparameters.unconstrained, hyperparameters.scale)
    assert probabilities[choices.index(right)] > PROBABILITY
