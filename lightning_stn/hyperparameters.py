"""Hyperparameters: their ranges, and the set that holds their current values, scales and bound sample."""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from types import UnionType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions.transforms import Transform

from lightning_stn import functional
from lightning_stn.transforms import invert, positive, positive_inverse, range_transform

Per = Literal["example", "batch"]

_LARGEST_INTEGER_RANGE = 2**20
"""Above this, float32 logits no longer reach every integer."""


@dataclass(frozen=True)
class _Ranged:
    """What every kind of hyperparameter shares: a range, a start, and how it is perturbed."""

    low: float | None
    high: float | None
    init: float
    _: KW_ONLY
    scale: float = 0.5
    per: Per = "example"

    def _check(self, wanted: type | UnionType, kind: str) -> None:
        for name in ("low", "high", "init", "scale"):
            number: Any = getattr(self, name)
            if number is None and name in ("low", "high") and isinstance(self, Float):
                continue
            accepted = int | float if name == "scale" else wanted
            if isinstance(number, bool) or not isinstance(number, accepted) or not math.isfinite(getattr(self, name)):
                raise ValueError(f"{self!r}: expected {name} to be a {kind}, got {number!r}.")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"{self!r}: the range is empty; expected low < high.")
        if self.scale <= 0:
            raise ValueError(f"{self!r}: expected scale > 0, a standard deviation in unconstrained units.")
        if self.per not in ("example", "batch"):
            raise ValueError(f"{self!r}: expected per='example' or per='batch'.")

    @property
    def transform(self) -> Transform:
        """From unconstrained to natural units (for an integer: before rounding)."""
        raise NotImplementedError

    def constrain(self, unconstrained: Tensor) -> Tensor:
        """Values in natural units, elementwise."""
        value: Tensor = self.transform(unconstrained)
        return value

    def unconstrained_init(self) -> float:
        """`init` in unconstrained units."""
        return invert(self.transform, self.init)


@dataclass(frozen=True)
class Float(_Ranged):
    """A real hyperparameter.

    Args:
        low: lower bound, natural units; None for no bound.
        high: upper bound, natural units; None for no bound.
        init: the value to start from, strictly between the bounds, natural units.
        scale: initial standard deviation of the perturbation, unconstrained units.
        per: "example" draws a perturbation for each example, "batch" shares one over the mini-batch (for what acts on
            a batch as a whole, such as the weight of a penalty).
        log: perturb and step on the logarithm, for positive quantities that span orders of magnitude.

    Raises:
        ValueError: the range is empty, `init` lies on or beyond a bound, `log` meets a range that is not positive, or
            an argument has a wrong type.
    """

    _: KW_ONLY
    log: bool = False

    def __post_init__(self) -> None:
        """Check the range."""
        self._check(int | float, "finite number")
        if self.log and (self.low is None or self.low < 0):
            raise ValueError(f"{self!r}: log=True needs a positive range; give low >= 0.")
        if (self.low is not None and self.init <= self.low) or (self.high is not None and self.init >= self.high):
            raise ValueError(
                f"{self!r}: expected init strictly between low and high, since a bound lies infinitely far away in "
                f"unconstrained units; move init inwards or widen the range."
            )

    @cached_property
    def transform(self) -> Transform:
        """From unconstrained to natural units."""
        return range_transform(self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Integer(_Ranged):
    """A whole-number hyperparameter; each integer of the closed range owns an equal share of the underlying range.

    Args:
        low: smallest value; it is reached.
        high: largest value; it is reached.
        init: the value to start from; the bounds are allowed.
        scale: initial standard deviation of the perturbation, unconstrained units.
        per: as for `Float`.

    Raises:
        ValueError: the range has fewer than two integers or more than 2**20, `init` lies outside it, or an argument is
            not a whole number.
    """

    low: int
    high: int
    init: int

    def __post_init__(self) -> None:
        """Check the range."""
        self._check(int, "whole number")
        if self.high - self.low > _LARGEST_INTEGER_RANGE:
            raise ValueError(
                f"{self!r}: a range of more than {_LARGEST_INTEGER_RANGE} integers cannot be resolved; "
                "use Float(..., log=True) and round where it is read."
            )
        if not self.low <= self.init <= self.high:
            raise ValueError(f"{self!r}: expected low <= init <= high.")

    @cached_property
    def transform(self) -> Transform:
        """From unconstrained units to the real range that is rounded, half an integer wider at each end."""
        return range_transform(self.low - 0.5, self.high + 0.5)

    def constrain(self, unconstrained: Tensor) -> Tensor:
        """Values in natural units, elementwise, as int64."""
        return super().constrain(unconstrained).round().clamp(self.low, self.high).to(torch.int64)


Hyperparameter = Float | Integer


@dataclass
class Bound:
    """What a network reads during one step; empty between steps.

    Args:
        sample: `[n, h]` or `[1, h]`, unconstrained units; read by response layers.
        values: natural units by name, `[n]` or scalar; present in the weight phase only, read by regularisers.
        frozen: whether the network's weights are held fixed, so that only the sample needs a gradient.
        merged: by layer, effective parameters at the current hyperparameters; present while an evaluation loop runs.
        read: the names read in a weight phase so far (a dict, since compiled graphs can write to one).
    """

    sample: Tensor | None = None
    values: dict[str, Tensor] | None = None
    frozen: bool = False
    merged: dict[int, dict[str, Tensor]] | None = None
    read: dict[str, bool] = field(default_factory=dict)


class HyperparameterSet(nn.Module):
    """The hyperparameters of one network: where they are, how far they are perturbed, and what is bound now.

    `unconstrained` and `raw_scale` are float32 whatever the precision of the network (small steps vanish in half
    precision) and never require a gradient: the hyperparameter phase differentiates detached copies of them.

    Args:
        specifications: name to `Float` or `Integer`. A name is letters, digits and underscores.

    Attributes:
        unconstrained: `lambda`, `[h]`, unconstrained units.
        raw_scale: `rho`, `[h]`; the perturbation scale is `softplus(rho)`.
        names: the names, in the order of the entries.

    Raises:
        ValueError: there are no hyperparameters, or a name is not usable.
        TypeError: a specification is not one of this package's.

    Example:
        >>> hyperparameters = HyperparameterSet({"dropout": Float(0.0, 1.0, init=0.5), "holes": Integer(0, 4, init=1)})
        >>> hyperparameters.values()
        {'dropout': 0.5, 'holes': 1}
        >>> hyperparameters.sample(8).shape
        torch.Size([8, 2])
    """

    unconstrained: nn.Parameter
    raw_scale: nn.Parameter

    def __init__(self, specifications: Mapping[str, Hyperparameter]) -> None:
        super().__init__()
        if not specifications:
            raise ValueError("Expected at least one hyperparameter, got none; name what shall be tuned.")
        self._specifications: dict[str, Hyperparameter] = {}
        self._frozen = False
        self.bound = Bound()
        self._extend(specifications)

    def _extend(self, specifications: Mapping[str, Hyperparameter]) -> None:
        self._check(specifications)
        self._specifications.update(specifications)
        for name in ("unconstrained", "raw_scale"):
            entries = torch.empty(len(self), dtype=torch.float32)
            setattr(self, name, nn.Parameter(entries, requires_grad=False))
        self.reset_parameters()

    def _check(self, specifications: Mapping[str, Hyperparameter]) -> None:
        taken = {*self._specifications, *specifications}
        for name, specification in specifications.items():
            if not isinstance(name, str) or not name.isidentifier():
                raise ValueError(
                    f"Expected a hyperparameter's name to be a Python identifier, got {name!r}; "
                    "it becomes a TensorBoard tag and a CSV column."
                )
            if name in self._specifications:
                raise ValueError(f"Hyperparameter {name!r} exists already; choose another name.")
            if f"{name}_scale" in taken or name in ("step", "epoch"):
                raise ValueError(f"The name {name!r} collides with a column of schedule.csv; choose another name.")
            if not isinstance(specification, Hyperparameter):
                raise TypeError(
                    f"Expected hyperparameter {name!r} to be a Float or an Integer, got {type(specification).__name__}."
                )

    def add(self, specifications: Mapping[str, Hyperparameter]) -> None:
        """Append hyperparameters, before any layer responds to the set.

        Raises:
            RuntimeError: response layers already have gates for the present hyperparameters.
            ValueError: a name is taken or not usable.
        """
        if self._frozen:
            raise RuntimeError(
                "Hyperparameters cannot be added once layers respond to the set, since each layer holds a gate for "
                "every one of them; name them in the constructor, or convert all networks in one call."
            )
        self._extend(specifications)

    def freeze(self) -> None:
        """Fix the number of hyperparameters; called by the first layer that responds to them."""
        self._frozen = True

    def reset_parameters(self) -> None:
        """Return every hyperparameter and scale to its initial value."""
        specifications = self.specifications.values()
        values = torch.tensor([s.unconstrained_init() for s in specifications], dtype=torch.float64, device="cpu")
        scales = torch.tensor([s.scale for s in specifications], dtype=torch.float64, device="cpu")
        self.unconstrained.data.copy_(values)
        self.raw_scale.data.copy_(positive_inverse(scales))

    @property
    def specifications(self) -> Mapping[str, Hyperparameter]:
        """Name to `Float` or `Integer`."""
        return self._specifications

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the order of the entries of `unconstrained`."""
        return tuple(self._specifications)

    @property
    def scale(self) -> Tensor:
        """`sigma = softplus(rho)`, `[h]`, unconstrained units."""
        return positive(self.raw_scale)

    def __len__(self) -> int:
        return len(self._specifications)

    def require(self, name: str, reader: str) -> None:
        """Check that a hyperparameter exists.

        Raises:
            KeyError: there is none called `name`; the message lists those there are.
        """
        if name not in self._specifications:
            close = difflib.get_close_matches(name, self.names, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise KeyError(f"{reader} reads the hyperparameter {name!r}, which is not one of {list(self.names)}.{hint}")

    def constrain(self, unconstrained: Tensor) -> dict[str, Tensor]:
        """Natural units, name by name.

        Args:
            unconstrained: `[..., h]`, unconstrained units.

        Returns:
            For each name a tensor of shape `[...]`; int64 for an `Integer`.
        """
        columns = zip(self.specifications.items(), unconstrained.unbind(-1), strict=True)
        return {name: specification.constrain(column) for (name, specification), column in columns}

    def values(self) -> dict[str, float | int]:
        """The current hyperparameters in natural units, as Python numbers."""
        # In float64, so that a start value reads back as it was given, to the precision of a float32 logit.
        values = self.constrain(self.unconstrained.detach().cpu().double())
        return {name: value.item() for name, value in values.items()}

    def noise(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`eps`, standard normal, `[n, h]`, equal in all rows where a hyperparameter is shared by the batch.

        Args:
            n: number of rows.
            generator: a generator on the CPU, so that every device draws the same numbers.
        """
        noise = torch.randn(n, len(self), generator=generator, dtype=torch.float32, device="cpu")
        shared = [index for index, s in enumerate(self.specifications.values()) if s.per == "batch"]
        noise[:, shared] = noise[:1, shared]
        return noise.to(self.unconstrained.device)

    def sample(self, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """`lambda + sigma * eps`, `[n, h]`, unconstrained units."""
        return functional.perturb(self.unconstrained, self.scale, self.noise(n, generator))

    def entropy(self) -> Tensor:
        """Entropy of the perturbation in nats, a scalar."""
        return functional.entropy(self.scale)

    def current(self) -> Tensor:
        """`lambda` as a sample of one row, `[1, h]`."""
        return self.unconstrained.unsqueeze(0)

    def bound_sample(self) -> Tensor:
        """The sample bound now, or, between steps, the current hyperparameters: `[n, h]` or `[1, h]`."""
        return self.current() if self.bound.sample is None else self.bound.sample

    def bound_values(self, sample: Tensor) -> dict[str, Tensor]:
        """Natural units of a sample, by name: `[n]`, or a scalar for what the batch shares."""
        values = self.constrain(sample.detach())
        for name, specification in self.specifications.items():
            if sample.shape[0] == 1 or specification.per == "batch":
                values[name] = values[name][0]
        return values

    def unread(self) -> list[str]:
        """Names that nothing has read in the weight phase so far."""
        return [name for name in self.names if name not in self.bound.read]

    def __getitem__(self, name: str) -> Tensor:
        """The value bound now, in natural units, without a gradient.

        In the weight phase `[n]`, or a scalar tensor where the batch shares it (`per="batch"`, or a sample of one row);
        otherwise the current value, a scalar tensor.
        """
        if self.bound.values is not None:
            self.require(name, "The training loss")
            self.bound.read[name] = True
            return self.bound.values[name]
        self.require(name, "This code")
        index = self.names.index(name)
        return self.specifications[name].constrain(self.unconstrained.detach()[index])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HyperparameterSet":
        """Follow the network to another device, but never to another precision."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        was_meta = self.unconstrained.is_meta
        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        if was_meta and not self.unconstrained.is_meta:
            self.reset_parameters()
        return self

    def extra_repr(self) -> str:
        """One hyperparameter a line."""
        return "\n".join(f"{name}={specification!r}" for name, specification in self.specifications.items())
