"""The rate of a tuned dropout as whoever reads it gets it: a number, the one in force."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import fit
from torch import Tensor, nn

from lightning_stn import Float, HyperparameterSet, STNCallback, STNModule, convert, export
from lightning_stn.binding import bind, bind_weight_phase, unbind
from lightning_stn.regularizers import Dropout, DropPath


class Fused(nn.Module):
    """Attention whose fused kernel drops at the rate of a module that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.drop = nn.Linear(6, 18), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).chunk(3, -1)
        rate = self.drop.p if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, dropout_p=rate)


def converted() -> tuple[Any, HyperparameterSet]:
    hyperparameters = HyperparameterSet({"rate": Float(0.0, 0.9, init=0.3)})
    return convert(Fused(), hyperparameters, dropout="rate"), hyperparameters


def test_rate_is_that_of_the_step_zero_in_the_hyperparameter_phase_and_current_between_steps() -> None:
    net, hyperparameters = converted()
    assert net.drop.p == pytest.approx(0.3)
    sample = hyperparameters.sample(1, torch.Generator().manual_seed(0))
    bind_weight_phase(hyperparameters, sample)
    assert net.drop.p == pytest.approx(hyperparameters.constrain(sample)["rate"].item())
    assert net.drop.p != pytest.approx(0.3, abs=1e-3)
    assert hyperparameters.unread() == []
    unbind(hyperparameters)
    with bind(hyperparameters, sample):
        assert net.drop.p == 0.0
    assert isinstance(net.drop.p, float)
    assert repr(net.drop) == "Dropout(p='rate')"
    assert export(net).drop.p == pytest.approx(0.3)  # type: ignore[union-attr]


def test_fused_attention_drops_at_the_rate_of_the_step() -> None:
    """Of 4,000 equal values the mean over positions is one, and the variance that of dropped and rescaled weights."""
    net, hyperparameters = converted()
    with torch.no_grad():
        net.project.weight.zero_()
        net.project.bias.fill_(1.0)
    bind_weight_phase(hyperparameters, torch.full((1, 1), 20.0))  # a rate of 0.9
    out = net(torch.randn(4000, 10, 6))[:, :, 0]
    unbind(hyperparameters)
    assert out.mean().item() == pytest.approx(1.0, abs=0.05)
    assert out.var().item() == pytest.approx(0.9 / (1 - 0.9) / 10, rel=0.05)


def test_rate_for_each_example_is_refused_where_one_number_is_read() -> None:
    net, hyperparameters = converted()
    bind_weight_phase(hyperparameters, hyperparameters.sample(4))
    with pytest.raises(ValueError, match=r"Dropout: 'p' is read as one number, .* a sample of 4 rows; share one row"):
        net(torch.randn(4, 5, 6))
    unbind(hyperparameters)


class LitFused(STNModule):
    def __init__(self) -> None:
        super().__init__(hyperparameters={"rate": Float(0.0, 0.9, init=0.3)})
        head = nn.Sequential(nn.Flatten(2), Fused(), nn.Flatten(), nn.Linear(36, 3))
        self.net = self.convert(head, dropout="rate")

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0].squeeze(1)), batch[1])

    validation_loss = training_loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def test_dropout_of_fused_attention_is_tuned() -> None:
    module = LitFused()
    fit(module, STNCallback(1, 1, warmup=0, lr=0.1))
    assert module.hyperparameters.values()["rate"] != pytest.approx(0.3, abs=1e-3)


def test_unattached_rate_can_be_shown_but_not_read() -> None:
    layer = Dropout("rate")
    assert "p='rate'" in repr(layer)
    assert "p='rate'" in repr(DropPath("rate"))
    with pytest.raises(RuntimeError, match=r"Dropout reads \['rate'\] but belongs to no HyperparameterSet"):
        _ = layer.p
