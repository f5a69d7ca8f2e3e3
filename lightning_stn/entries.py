"""The unconstrained entries of a set of hyperparameters: their tensors, and how these are moved, saved and loaded."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_stn.saved_values import COORDINATES, TENSORS, misfits
from lightning_stn.transforms import positive

_ADVICE = "export_for_a_plain_network"
"""Entry of the state dict that says by its name what to do where torch lists it, in a module that does not expect it.

A plain module that is given a tuned checkpoint runs no code of this package, so that no other place can say so.
"""


class Entries(nn.Module):
    """`lambda` and `rho`, and the coordinates in which gates read them.

    Both are float32 whatever the precision of the network, since small steps vanish in half precision. They never
    require a gradient: the hyperparameter phase differentiates detached copies. They are in the state dict but are not
    parameters, so that weight optimisers, weight averaging and sharding leave them alone.

    Attributes:
        unconstrained: `lambda`, `[h]`, unconstrained units: one entry for a `Float` or an `Integer`, one for each
            choice of a `Categorical`.
        raw_scale: `rho`, `[h]`; the perturbation scale is `softplus(rho)`.
        centred: whether the response is counted from the current hyperparameters, `W + diag(V (h - lambda)) R`, so that
            the base weights are those at `lambda`, or from zero, as in the first paper; initially False.
        gate_scale: what gates multiply a hyperparameter by, `W + diag(V s (h - lambda)) R`; initially 1.0.
        export_for_a_plain_network: always True; its name is the advice.
    """

    unconstrained: Tensor
    raw_scale: Tensor
    export_for_a_plain_network = True  # torch's distributed checkpoints look up every key as an attribute

    def __init__(self) -> None:
        super().__init__()
        self.centred, self.gate_scale = False, 1.0

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The names, in the order of the entries of `unconstrained`."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Return every hyperparameter and scale to its initial value."""

    def allocate(self, size: int) -> None:
        """Begin with so many entries, without values."""
        for name in TENSORS:
            setattr(self, name, torch.empty(size, dtype=torch.float32))

    def unshare(self) -> None:
        """Copy the state out of the shared memory in which spawned processes receive it."""
        for name in TENSORS:
            setattr(self, name, getattr(self, name).clone())

    @property
    def scale(self) -> Tensor:
        """`sigma = softplus(rho)`, `[h]`, unconstrained units."""
        return positive(self.raw_scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Entries":
        """Move to another device with the network, but keep the precision."""
        was_meta = self.unconstrained.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in TENSORS:
            tensor = getattr(self, name)
            moved = fn(tensor)
            setattr(self, name, moved if moved.dtype == tensor.dtype else tensor.to(moved.device))
        if was_meta and not self.unconstrained.is_meta:
            self.reset_parameters()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name in (_ADVICE, *TENSORS, *COORDINATES):
            destination[prefix + name] = torch.as_tensor(getattr(self, name))

    def misfits(self, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
        """Why a saved state cannot be loaded into this set, in words."""
        return misfits(state_dict, prefix, self.unconstrained, self.names)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        known = {prefix + name: name for name in TENSORS}
        keys = [*known, *(prefix + name for name in COORDINATES)]
        missing = [key for key in keys if key not in state_dict]
        accepted = [*keys, prefix + _ADVICE]
        unexpected = [key for key in state_dict if key.startswith(prefix) and key not in accepted]
        present = {key: getattr(self, name) for key, name in known.items() if key in state_dict}
        misfits = self.misfits(state_dict, prefix)
        error_msgs += misfits
        if strict:
            missing_keys += missing
            unexpected_keys += unexpected
        if misfits or (strict and (missing or unexpected)):
            return  # Load all or nothing: torch raises only after it has visited every module.
        for name in COORDINATES:
            setattr(self, name, torch.as_tensor(state_dict.get(prefix + name, getattr(self, name))).item())
        for key, own in present.items():
            own.copy_(state_dict[key])
