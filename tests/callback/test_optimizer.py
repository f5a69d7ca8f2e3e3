"""Hyperparameter optimisers that cannot do the work are refused in words, before the first step."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support import LitSmall, fit, loader, trainer

from lightning_stn import Scales, STNCallback


def callback(**settings: Any) -> STNCallback:
    return STNCallback(**{"train_steps": 1, "warmup": 0, "lr": 0.05, "seed": 1, **settings})


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (torch.optim.LBFGS, "to step without a closure, got LBFGS, which evaluates the loss several times"),
        (
            torch.optim.AdamW,
            "no weight decay, got AdamW with weight_decay=0.01, which pulls every .*AdamW, weight_decay=0",
        ),
        (partial(torch.optim.SGD, weight_decay=1e-4), "no weight decay, got SGD with weight_decay=0.0001"),
        (lambda groups: torch.optim.Adam([{**groups[0], "weight_decay": 0.1}]), "got Adam with weight_decay=0.1"),
        (torch.optim.ASGD, "no weight decay, got ASGD with lambd=0.0001"),
    ],
)
def test_optimizer_that_needs_a_closure_or_decays_is_refused(optimizer: Any, message: str) -> None:
    module = LitSmall()
    with pytest.raises(ValueError, match=message):
        fit(module, callback(optimizer=optimizer))
    assert "weight" not in module.events


def test_error_of_an_optimizer_names_the_argument() -> None:
    stn = callback(optimizer=torch.optim.LBFGS, scales=Scales(tune=True))
    with pytest.raises(ValueError, match=r"STNCallback\(optimizer=...\) cannot be built .*LBFGS doesn't support"):
        fit(LitSmall(), stn)
    stn = callback(optimizer=partial(torch.optim.Adam, momentum=0.9))
    with pytest.raises(TypeError, match=r"STNCallback\(optimizer=...\) cannot be built .*'momentum'"):
        fit(LitSmall(), stn)


@pytest.mark.parametrize("name", ["Adadelta", "Adagrad", "Adam", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"])
def test_optimizers_of_torch_without_decay_step(name: str) -> None:
    module = LitSmall()
    fit(module, callback(optimizer=getattr(torch.optim, name)), max_epochs=1)
    assert module.hyperparameters.unconstrained.isfinite().all()


def test_adamw_without_decay_steps() -> None:
    fit(LitSmall(), callback(optimizer=partial(torch.optim.AdamW, weight_decay=0)), max_epochs=1)


def test_decay_does_not_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    module, stn = LitSmall(), callback(optimizer=partial(torch.optim.AdamW, weight_decay=0))
    run, _ = fit(module, stn, max_epochs=1)
    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    state = saved["callbacks"][stn.state_key]
    state["optimizer"]["optimizer"]["param_groups"][0]["weight_decay"] = 0.01
    del state["version"], state["digest"]  # as it was before there were any
    torch.save(saved, tmp_path / "a.ckpt")
    for use in ((), ("optimizer",)):
        resumed = callback(optimizer=partial(torch.optim.AdamW, weight_decay=0), on_resume_use=use)
        again = trainer(resumed, max_epochs=2)
        if use:
            again.fit(LitSmall(), loader(24), loader(16, seed=1), ckpt_path=tmp_path / "a.ckpt")
        else:
            with pytest.raises(ValueError, match=r"AdamW with weight_decay=0\.01"):
                again.fit(LitSmall(), loader(24), loader(16, seed=1), ckpt_path=tmp_path / "a.ckpt")
