"""Networks of timm, transformers and torchvision: exact conversion, training, export; hypergradients by differences."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from support import random_gates

from lightning_stn import STN, Float, HyperparameterSet
from lightning_stn.binding import bind

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("timm", reason="needs pip install -e '.[networks]'")
pytest.importorskip("transformers", reason="needs pip install -e '.[networks]'")
import zoo  # type: ignore[import-not-found]

ZOO = zoo.zoo()
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", ZOO)
def test_network_converts_exactly_trains_and_exports(name: str) -> None:
    outcome = zoo.examine(name, *ZOO[name])
    assert outcome.exact == 0
    assert outcome.shared == "ok"
    assert outcome.silent == "none"
    assert outcome.delta == "ok"
    assert outcome.rows == "ok" or outcome.rows.startswith(("ValueError: ", "RowsError: "))
    assert outcome.export < 1e-4
    assert outcome.fresh < 1e-4


DIFFERENCES = (
    "bert",  # a decoder tied to the embedding
    "gpt2",  # the same, and Conv1D layers
    "roberta",
    "albert",  # layers that are called several times
    "electra",
    "distilbert",
    "hf-swin",
    "tv/vit",  # fused attention; the network itself holds tokens and positions
    "tv/swin",  # parents that read the weights of their children
    "tv/densenet",
    "timm/vit_tiny_patch16_224",  # fused attention
    "timm/xcit_nano_12_p16_224",
)


@pytest.mark.parametrize("name", DIFFERENCES)
@pytest.mark.parametrize("centred", [True, False])
def test_hypergradient_equals_central_differences(name: str, centred: bool) -> None:
    build, x = ZOO[name]
    torch.manual_seed(0)
    net = build().double().eval()
    x = x.double() if x.is_floating_point() else x
    specifications = {"rate": Float(0.0, 0.9, init=0.1), "other": Float(0.0, 1.0, init=0.5)}
    hyperparameters = HyperparameterSet(specifications)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zoo.tune_dropouts(net, hyperparameters)
    random_gates(net, 0.02)
    STN(centred=centred).prepare(net, hyperparameters)
    target = torch.randn(zoo.prediction(net, x).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss(unconstrained: torch.Tensor, frozen: bool = False) -> torch.Tensor:
        with bind(hyperparameters, unconstrained.unsqueeze(0), frozen=frozen):
            value: torch.Tensor = (zoo.prediction(net, x) * target).mean()
        return value

    # In float64, since the difference from the centre must not lose what a step of 1e-5 adds.
    hyperparameters.unconstrained = hyperparameters.unconstrained.double()
    leaf = hyperparameters.unconstrained.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(leaf, frozen=True), leaf)
    width = 1e-5
    with torch.no_grad():
        steps = width * torch.eye(2, dtype=torch.float64)
        expected = torch.stack([(loss(leaf + s) - loss(leaf - s)) / (2 * width) for s in steps])
    assert expected.abs().max() > 0
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5
