"""Learning rates for weights, response weights and gates."""

from typing import Any

from torch import nn

from lightning_stn.arguments import is_number
from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.layers import ResponseLayer


def parameter_groups(
    root: nn.Module,
    hyperparameters: HyperparameterSet,
    lr: float,
    *,
    response_lr: float | None = None,
    gate_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser whose steps grow with its rate, such as SGD.

    A step of the gates changes the effective weights along the response by `|h|^2` times as much as a step of the
    weights does, where `h` is the sample in unconstrained units. With many hyperparameters far from zero and a large
    rate, training becomes unstable, so the gates get a smaller rate.

    Args:
        root: the module that owns the networks.
        hyperparameters: the set that they respond to.
        lr: learning rate of the weights.
        response_lr: learning rate of the response weights; None for `lr`.
        gate_lr: learning rate of the gates; None for `lr / max(1, E|h|^2)` at the current hyperparameters, counted
            from the centre of the response.

    Returns:
        Three groups with every parameter that requires a gradient: weights, response weights, gates.

    Raises:
        ValueError: a rate is not a positive number.
    """
    for name, rate in (("lr", lr), ("response_lr", response_lr), ("gate_lr", gate_lr)):
        if rate is None and name != "lr":
            continue
        if rate is None or not is_number(rate) or rate <= 0:
            raise ValueError(f"parameter_groups: expected {name} to be positive, got {rate!r}; give a number.")
    if gate_lr is None:
        centre = hyperparameters.gate_input(hyperparameters.unconstrained)
        spread = hyperparameters.gate_scale * hyperparameters.scale
        squared_norm = (centre.square() + spread.square()).sum().item()
        gate_lr = lr / max(1.0, squared_norm)
    if response_lr is None:
        response_lr = lr
    layers = [module for module in root.modules() if isinstance(module, ResponseLayer)]
    gates = {id(gate): gate for layer in layers for gate in map(layer.gate_weights, layer.responding)}
    responses = {
        id(r): r
        for layer in layers
        for r in map(layer.response_weights, filter(layer.stores_response, layer.responding))
    }
    weights = [p for p in root.parameters() if p.requires_grad and id(p) not in gates | responses]
    return [
        {"params": weights, "lr": lr},
        {"params": list(responses.values()), "lr": response_lr},
        {"params": list(gates.values()), "lr": gate_lr},
    ]
