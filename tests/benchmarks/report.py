"""Results as Markdown, with a description of the machine."""

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import lightning as L
import torch

TIMES = {
    "weight_batch": "weight step, batch",
    "weight_example": "weight step, example",
    "delta_batch": "Delta-STN, weight step, batch",
    "delta_example": "Delta-STN, weight step, example",
    "shared_batch": "in one pass, batch",
    "shared_example": "in one pass, example",
    "direct_batch": "not linearised, batch",
    "direct_example": "not linearised, example",
    "delta_fixed": "Delta-STN, hyper step, fixed scales",
    "hyper_fixed": "hyper step, fixed scales",
    "hyper_batch": "hyper step, batch",
    "hyper_example": "hyper step, example",
    "evaluation": "evaluation",
    "exported": "exported, step",
    "whole_cpu": "whole run",
    "whole_wall": "whole run, wall",
}
BYTES = {
    "parameters": "parameters",
    "activations_batch": "activations, batch",
    "activations_example": "activations, example",
    "effective_weights": "effective weights, batch, per parameter",
    "total_batch": "all, batch",
    "total_example": "all, example",
}


@dataclass
class Result:
    """Measurements of one network.

    Args:
        network: its name.
        plain: seconds of the plain step, one for each round.
        ratios: ratios to plain training by name of the quantity, one entry for each round.
        notes: failed measurements, with the reason.
    """

    network: str
    plain: list[float] = field(default_factory=list)
    ratios: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def machine(device: torch.device) -> str:
    """Processor, cores, threads, versions and device, in a line."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cpu = models[0] if models else platform.processor() or platform.machine()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return (
        f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; torch {torch.__version__}, "
        f"lightning {L.__version__}; device {name}"
    )


def tables(results: Sequence[Result], device: torch.device) -> str:
    """Times, bytes and notes."""
    unit = "CPU ms" if device.type == "cpu" else "ms"
    plain = {r.network: f"{1000 * statistics.median(r.plain):.0f}" if r.plain else "-" for r in results}
    measured = [name for name in TIMES if any(name in r.ratios for r in results)]
    times = [[r.network, plain[r.network], *(cell(r.ratios.get(name, [])) for name in measured)] for r in results]
    sizes = [[r.network, *(cell(r.ratios.get(name, [])) for name in BYTES)] for r in results]
    notes = [f"- {result.network}, {note}" for result in results for note in result.notes]
    blocks = [
        f"Times, plain = 1 (`batch`, `example`: the perturbation; first column: the plain step in {unit})\n",
        markdown(["network", "plain step", *(TIMES[name] for name in measured)], times),
    ]
    if any(name in r.ratios for r in results for name in BYTES):
        blocks += [
            "\nBytes of the weight step, plain = 1 (all: parameters, gradients, momentum, tensors kept for backward)\n",
            markdown(["network", *BYTES.values()], sizes),
        ]
    return "\n".join([*blocks, *(["\nNot measured:\n", *notes] if notes else [])])


def cell(ratios: Sequence[float]) -> str:
    """Median and quartiles; a dash where nothing was measured."""
    if not ratios:
        return "-"
    if len(ratios) == 1:
        return f"{ratios[0]:.2f}"
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
