"""A tuned checkpoint and the plain module that the tuned one was derived from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from features.test_existing_modules import RATES, Existing, callback, fit
from support import loader, trainer
from torch import Tensor

from lightning_stn import STN, STNModule

INPUTS: Tensor = next(iter(loader(8, seed=3)))[0]


class Tuned(STNModule, Existing):
    def __init__(self) -> None:
        super().__init__(hyperparameters=RATES)
        self.net = self.convert(self.net, dropout="dropout")

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def trained(folder: Path, centred: bool = True) -> tuple[Tuned, Path]:
    module = Tuned()
    run = fit(module, callback(method=STN(centred=centred), lr=1.0))
    run.save_checkpoint(folder / "tuned.ckpt")
    return module.eval(), folder / "tuned.ckpt"


LOADS: dict[str, Callable[[Path], Any]] = {
    "load_from_checkpoint": Existing.load_from_checkpoint,
    "load_state_dict": lambda path: Existing().load_state_dict(torch.load(path, weights_only=True)["state_dict"]),
    "validate": lambda path: trainer().validate(Existing(), loader(16), ckpt_path=path, verbose=False),
    "fit": lambda path: trainer().fit(Existing(), loader(16), loader(16), ckpt_path=path),
}


@pytest.mark.parametrize("how", LOADS)
def test_plain_module_refuses_a_tuned_checkpoint_and_the_first_key_names_export(how: str, tmp_path: Path) -> None:
    _, path = trained(tmp_path)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*: "hyperparameters\.export_for_a_plain_network", '):
        LOADS[how](path)


def test_exported_network_of_a_tuned_checkpoint_loads_into_the_plain_module(tmp_path: Path) -> None:
    module, path = trained(tmp_path)
    plain = Existing().eval()
    plain.net.load_state_dict(Tuned.load_from_checkpoint(path).export().state_dict())
    torch.testing.assert_close(plain.net(INPUTS), module.net(INPUTS))


@pytest.mark.parametrize("centred", [True, False])
def test_loading_what_fits_gives_the_network_of_a_centred_response_only(centred: bool, tmp_path: Path) -> None:
    module, path = trained(tmp_path, centred)
    with pytest.warns(UserWarning, match=r"in the checkpoint: \['hyperparameters\.export_for_a_plain_network', "):
        plain = Existing.load_from_checkpoint(path, strict=False).eval()
    assert torch.allclose(plain.net(INPUTS), module.net(INPUTS)) == centred


def test_states_with_and_without_the_advice_load_into_the_tuned_module(tmp_path: Path) -> None:
    module, _ = trained(tmp_path)
    state = module.state_dict()
    Tuned().load_state_dict(state)
    del state["hyperparameters.export_for_a_plain_network"]  # as saved by earlier versions
    Tuned().load_state_dict(state)


def test_plain_checkpoint_in_the_tuned_module_lacks_what_conversion_adds_alone() -> None:
    missing, unexpected = Tuned().load_state_dict(Existing().state_dict(), strict=False)
    assert unexpected == []
    assert {"hyperparameters.unconstrained", "net.0.weight_gate"} <= set(missing)
    assert not any("export" in key for key in missing)
