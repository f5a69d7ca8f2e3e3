"""What conversion adds to the memory of a network: parameters, gradients, optimiser state, and the peak of two steps.

    python tests/benchmarks/memory.py [--layers 12 --width 768 --words 20000] [--hyperparameters 24]

A language model of 100 million parameters, trained by AdamW: plain; with the full response; with gates alone; and with
the full response in the upper half of its layers, the rest and the embedding left out by `convert(exclude=...)`. Each
runs in a separate process. Bytes are those of the tensors; the peak is the resident memory of the process, less what it
had before the network was built. A cell is in units of the plain network.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import torch
from report import machine
from torch import Tensor, nn

from lightning_stn import Float, HyperparameterSet, convert
from lightning_stn.binding import bind_weight_phase, unbind

FORMS = ("plain", "full response", "gates alone", "half of the layers")
COLUMNS = ("parameters", "gradients", "optimiser", "peak")
HEADS = 12


class LanguageModel(nn.Module):
    """A causal Transformer with tied embedding and output."""

    def __init__(self, layers: int, width: int, words: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        layer = nn.TransformerEncoderLayer(width, HEADS, 4 * width, 0.1, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.output = nn.Linear(width, words, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens `[n, t]` to logits `[n, t, words]`."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        hidden: Tensor = self.layers(self.embedding(tokens), mask=mask, is_causal=True)
        logits: Tensor = self.output(hidden)
        return logits


def size(tensors: Iterable[Any]) -> int:
    """Bytes of tensors, each counted once."""
    found = {id(one): one.numel() * one.element_size() for one in tensors if isinstance(one, Tensor)}
    return sum(found.values())


def measure(form: str, layers: int, width: int, words: int, count: int) -> dict[str, int]:
    """Bytes after two steps of one form."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    net: nn.Module = LanguageModel(layers, width, words)
    hyperparameters = HyperparameterSet(
        {f"dropout{index}": Float(0.0, 0.9) for index in range(count)},
        response="gates" if form == "gates alone" else "full",
    )
    lower = ["embedding", "output", *(f"layers.layers.{index}" for index in range(layers // 2))]
    if form != "plain":
        net = convert(net, hyperparameters, exclude=lower if form == "half of the layers" else ())
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    tokens = torch.randint(words, (4, 32))
    for _ in range(2):
        if form != "plain":
            bind_weight_phase(hyperparameters, hyperparameters.sample(1))
        logits = net(tokens)
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        unbind(hyperparameters)
    state = [value for one in optimizer.state.values() for value in one.values()]
    return {
        "parameters": size(net.parameters()),
        "gradients": size(parameter.grad for parameter in net.parameters()),
        "optimiser": size(state),
        "peak": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
    }


def main() -> None:
    """Measure each form in a separate process, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--words", type=int, default=20_000)
    parser.add_argument("--hyperparameters", type=int, default=24)
    parser.add_argument("--form", choices=FORMS, help="measure one, and print its bytes")
    args = parser.parse_args()
    sizes = args.layers, args.width, args.words, args.hyperparameters
    if args.form:
        print(json.dumps(measure(args.form, *sizes)))
        return
    print(machine(torch.device("cpu")))
    print(f"{'':<20}" + "".join(f"{column:>14}" for column in COLUMNS))
    unit: dict[str, int] = {}
    for form in FORMS:
        command = [sys.executable, "-W", "ignore", *sys.argv, "--form", form]
        found = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
        unit = unit or found
        cells = (f"{found[column] / unit[column]:.2f}" for column in COLUMNS)
        print(f"{form:<20}" + "".join(f"{cell:>14}" for cell in cells), flush=True)
    print("plain, MB".ljust(20) + "".join(f"{unit[column] / 1e6:>14,.0f}" for column in COLUMNS))


if __name__ == "__main__":
    main()
