"""Exported networks: plain types and keys, the same outputs, and no dependence on this package."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import LitSmall, fit, random_gates, small_net
from torch import nn

from lightning_stn import Float, HyperparameterSet, Integer, convert, export
from lightning_stn.augment import Cutout, GaussianNoise
from lightning_stn.methods.base import recentre
from lightning_stn.regularizers import Dropout, LockedDropout


def tuned(net: nn.Module, dropout: str | None = None, centred: bool = False) -> nn.Module:
    """A converted network; with `centred` its response is centred as in Delta-STN, and `lambda` has moved since."""
    hyperparameters = HyperparameterSet({"rate": Float(0.0, 0.9, init=0.3), "length": Integer(0, 4, init=1)})
    recentre(convert(net, hyperparameters, dropout=dropout), hyperparameters, False)
    random_gates(net, 0.3)
    recentre(net, hyperparameters, centred)
    if centred:
        hyperparameters.unconstrained += 0.5
    return net


CASES = [
    (lambda: small_net(), (5, 1, 6, 6)),
    (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.RMSNorm(6), nn.Linear(6, 2)), (5, 4)),
    (lambda: nn.Sequential(nn.ConvTranspose2d(2, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.BatchNorm2d(4)), (5, 2, 3, 3)),
    (lambda: nn.Linear(4, 6), (5, 4)),
]


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("build", "shape"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_export_keeps_outputs_types_and_keys(
    build: Any, shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, centred: bool
) -> None:
    plain = build().to(dtype)
    net = tuned(copy.deepcopy(plain), centred=centred).eval()
    before = copy.deepcopy(net.state_dict())
    exported = export(net)
    x = torch.randn(shape, dtype=dtype)
    torch.testing.assert_close(exported(x), net(x), rtol=tolerance, atol=tolerance)
    assert not torch.allclose(exported(x), plain.eval()(x))
    assert [type(module) for module in exported.modules()] == [type(module) for module in plain.modules()]
    assert list(exported.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert [p.requires_grad for p in exported.parameters()] == [p.requires_grad for p in plain.parameters()]


def test_export_sets_dropouts_to_the_current_rate_and_removes_augmentation() -> None:
    net = tuned(
        nn.Sequential(nn.Linear(4, 4), nn.Dropout(), GaussianNoise("rate"), Cutout("length"), Dropout(0.25)), "rate"
    )
    for module in net:
        if hasattr(module, "attach"):
            module.attach(net[0].hyperparameters)  # type: ignore[index]
    exported = export(net)
    assert [type(module) for module in exported] == [nn.Linear, nn.Dropout, nn.Identity, nn.Identity, nn.Dropout]
    assert exported[1].p == pytest.approx(0.3)  # type: ignore[index]
    assert exported[4].p == 0.25  # type: ignore[index]
    assert not torch.equal(exported[1](torch.ones(1000)), torch.ones(1000))  # type: ignore[index]


def test_exported_network_can_be_trained() -> None:
    exported = export(tuned(small_net()))
    exported(torch.randn(4, 1, 6, 6)).sum().backward()
    assert all(parameter.grad is not None for parameter in exported.parameters())


@pytest.mark.parametrize("reverse", [False, True])
def test_export_keeps_tied_weights_tied(reverse: bool) -> None:
    """So that its state dict, loaded into a new plain network, gives the same network."""

    def build() -> nn.Sequential:
        encoder, decoder = nn.Embedding(5, 3), nn.Linear(3, 5)
        if reverse:
            encoder.weight = decoder.weight
        else:
            decoder.weight = encoder.weight
        return nn.Sequential(encoder, decoder)

    net = tuned(build())
    exported, fresh, indices = export(net), build(), torch.arange(5)
    assert exported[0].weight is exported[1].weight  # type: ignore[index]
    torch.testing.assert_close(exported(indices), net(indices))
    fresh.load_state_dict(exported.state_dict())
    assert torch.equal(fresh(indices), exported(indices))


class Named(nn.Parameter):
    """A subclass, by which an optimiser may choose its settings."""


def test_parameters_of_a_subclass_respond_and_keep_their_type() -> None:
    net = nn.Linear(2, 3)
    net.weight = Named(net.weight.detach())
    net = tuned(net)  # type: ignore[assignment]
    assert net(torch.ones(2)).grad_fn is not None
    exported = export(net)
    assert type(exported.weight) is Named
    torch.testing.assert_close(exported(torch.ones(2)), net(torch.ones(2)))
    assert not torch.allclose(exported.weight, net.base_parameter("weight"))  # type: ignore[operator]


def test_export_keeps_attributes_of_parameters() -> None:
    net = nn.Linear(2, 3)
    net.weight._no_weight_decay = True  # type: ignore[attr-defined]
    exported = export(tuned(net))
    assert exported.weight._no_weight_decay  # type: ignore[union-attr]


def test_export_refuses_a_plain_network() -> None:
    with pytest.raises(ValueError, match="Expected a converted network, got Linear"):
        export(nn.Linear(2, 2))


def test_module_exports_its_only_network() -> None:
    module = LitSmall()
    fit(module)
    x = torch.randn(4, 1, 6, 6)
    module.eval()
    torch.testing.assert_close(module.export()(x), module.net(x))
    module.other = module.convert(nn.Linear(2, 2))  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"got \['net', 'other'\]; say which, as in export\(self.net\)"):
        module.export()
    assert type(module.export(module.net)[0]) is nn.Conv2d  # type: ignore[index]


def test_exported_network_loads_without_this_package(tmp_path: Path) -> None:
    net = tuned(small_net(), "rate").eval()
    exported, x = export(net), torch.randn(3, 1, 6, 6)
    torch.save({"net": exported, "x": x, "y": net(x).detach()}, tmp_path / "net.pt")
    program = torch.export.export(exported, (x,))
    torch.export.save(program, tmp_path / "net.pt2")
    code = (
        "import sys; sys.modules['lightning_stn'] = None\n"
        "import torch\n"
        "saved = torch.load(sys.argv[1] + '/net.pt', weights_only=False)\n"
        "torch.testing.assert_close(saved['net'](saved['x']), saved['y'])\n"
        "program = torch.export.load(sys.argv[1] + '/net.pt2').module()\n"
        "torch.testing.assert_close(program(saved['x']), saved['y'])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=tmp_path)


def test_export_removes_a_regulariser_from_all_its_places() -> None:
    drop = LockedDropout(0.1)
    exported = export(
        convert(nn.Sequential(nn.Linear(2, 2), drop, drop), HyperparameterSet({"a": Float(0.0, 1.0, init=0.5)}))
    )
    assert [type(module) for module in exported] == [nn.Linear, nn.Identity, nn.Identity]  # type: ignore[attr-defined]
