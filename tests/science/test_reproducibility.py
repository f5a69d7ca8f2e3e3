"""The same seed gives the same run, bit for bit; another seed gives another run."""

from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from support import LitSmall, loader, trainer
from torch import Tensor

from lightning_stn import STNCallback, Warmup
from lightning_stn.schedule import Row


class Run(NamedTuple):
    """Schedule and final state of a run."""

    rows: list[Row]
    state: dict[str, Tensor]

    def equals(self, other: "Run") -> bool:
        """Whether schedules and states, with response and hyperparameters, are equal bit for bit."""
        weights = all(torch.equal(self.state[name], other.state[name]) for name in self.state)
        return self.rows == other.rows and weights


def run(torch_seed: int, seed: int | None, perturb: str = "example") -> Run:
    """A shuffled run over a convolutional network with dropout, noise and cutout."""
    L.seed_everything(torch_seed, verbose=False)
    module = LitSmall()
    callback = STNCallback(2, 1, warmup=1, lr=0.05, perturb=perturb, seed=seed)
    trainer(callback, max_epochs=3).fit(module, loader(48, shuffle=True), loader(24, seed=1))
    assert len(callback.schedule.rows) == 19
    assert callback.schedule.rows[-1].values != callback.schedule.rows[0].values
    return Run(callback.schedule.rows, {name: tensor.clone() for name, tensor in module.state_dict().items()})


@pytest.mark.parametrize("perturb", ["example", "batch"])
@pytest.mark.parametrize("seed", [None, 5])
def test_same_seeds_give_the_same_schedule_and_weights_bit_for_bit(seed, perturb):
    assert run(3, seed, perturb).equals(run(3, seed, perturb))


OTHERS = {"another torch seed": (4, None), "both seeds": (4, 6), "another callback seed": (3, 6)}


@pytest.mark.parametrize(("torch_seed", "seed"), OTHERS.values(), ids=OTHERS)
def test_another_seed_gives_another_schedule(torch_seed, seed):
    reference, other = run(3, None if seed is None else 5), run(torch_seed, seed)
    assert reference.rows[0].values == other.rows[0].values
    assert reference.rows[-1].values != other.rows[-1].values


class Watched(LitSmall):
    """Records the sample of every weight step."""

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        if self.runs_for == "weights":
            sample = self.hyperparameters.current_pass.sample
            self.samples = [*getattr(self, "samples", []), sample.clone()]
        return super().training_loss(batch, batch_idx)


def warmup_samples(torch_seed: int, seed: int) -> Tensor:
    """The samples `[step, n, h]` of a warm-up, in which the hyperparameters do not change."""
    L.seed_everything(torch_seed, verbose=False)
    module = Watched()
    trainer(STNCallback(2, 1, warmup=Warmup(6, "steps"), perturb="example", seed=seed), max_epochs=2).fit(
        module, loader(32), loader(16, seed=1)
    )
    return torch.stack(module.samples[:6])


def test_callback_seed_alone_fixes_the_perturbations_bit_for_bit():
    reference = warmup_samples(3, 5)
    assert torch.equal(warmup_samples(4, 5), reference)
    assert (warmup_samples(3, 6) != reference).all()
    assert len(reference.flatten(0, 1).unique(dim=0)) == 6 * 8
