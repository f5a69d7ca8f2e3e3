"""Does a converted network train wherever the plain one does, with the same optimiser and learning rate?

    python tests/benchmarks/stability.py            # all networks: plain, centred by batch or example, uncentred
    python tests/benchmarks/stability.py --networks mlp --steps 200

Every network learns handwritten digits. One hyperparameter is the rate of its dropouts; six further ones act on
nothing, but all seven perturb the response. The hyperparameters stay at their start. A figure is the mean cross
entropy over the training images at the end, without dropout, at the current hyperparameters; `diverged` where it is
not finite or above that of guessing.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_stn import STN, Float, HyperparameterSet, convert
from lightning_stn.binding import attach_all, bind_weight_phase, unbind

N, BATCH = 500, 50


class Rows(nn.Module):
    """A network on the rows of an image as a sequence, and a classifier on its mean output."""

    def __init__(self, body: nn.Module, width: int, lift: bool) -> None:
        super().__init__()
        self.lift = nn.Linear(8, width) if lift else nn.Identity()
        self.body, self.drop, self.head = body, nn.Dropout(0.1), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        out = self.body(self.lift(images.squeeze(1)))
        logits: Tensor = self.head(self.drop((out[0] if isinstance(out, tuple) else out).mean(1)))
        return logits


def mlp() -> nn.Module:
    hidden = [nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.1)]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(256, 10))


def cnn() -> nn.Module:
    first = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.1)]
    second = [nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1)]
    return nn.Sequential(*first, *second, nn.Linear(512, 10))


def lstm() -> nn.Module:
    return Rows(nn.LSTM(8, 64, batch_first=True), 64, lift=False)


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
    return Rows(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), 32, lift=True)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "cnn": cnn, "lstm": lstm, "transformer": transformer}
RATES = {"sgd": (0.02, 0.05, 0.2), "adam": (1e-3, 3e-3, 1e-2)}
"""Of SGD with momentum 0.9, and of Adam."""

VARIANTS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "centred, batch": {"centred": True, "rows": 1},
    "centred, example": {"centred": True, "rows": BATCH},
    "uncentred, example": {"centred": False, "rows": BATCH},
}


def optimiser(name: str, lr: float, net: nn.Module) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    return torch.optim.Adam(net.parameters(), lr=lr)


def train(build: Callable[[], nn.Module], name: str, lr: float, variant: dict[str, Any] | None, steps: int) -> float:
    """Train from seed 0, and return the training loss at the end."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images[:N]).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels[:N])
    net = build()
    hyperparameters = HyperparameterSet({f"h{i}": Float(0.0, 0.8, init=0.1) for i in range(7)})
    if variant is not None:
        convert(net, hyperparameters, dropout="h0")
        attach_all(net, hyperparameters)
        STN(centred=variant["centred"]).prepare(net, hyperparameters)
    optimizer = optimiser(name, lr, net)
    order = torch.Generator().manual_seed(1)
    for _ in range(steps):
        chosen = torch.randperm(N, generator=order)[:BATCH]
        if variant is not None:
            bind_weight_phase(hyperparameters, hyperparameters.sample(variant["rows"], order))
        loss = F.cross_entropy(net(images[chosen]), labels[chosen])
        unbind(hyperparameters)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        return F.cross_entropy(net(images), labels).item()


def shown(loss: float) -> str:
    return f"{loss:.4f}" if loss <= math.log(10) else "diverged"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | optimiser | rate |" + "".join(f" {variant} |" for variant in VARIANTS))
    print("|---" * (3 + len(VARIANTS)) + "|")
    for network in args.networks:
        for name, rates in RATES.items():
            for lr in rates:
                losses = [train(NETWORKS[network], name, lr, variant, args.steps) for variant in VARIANTS.values()]
                print(f"| {network} | {name} | {lr:g} |" + "".join(f" {shown(loss)} |" for loss in losses), flush=True)


if __name__ == "__main__":
    main()
