"""The set that holds the hyperparameters' current values, scales and bound sample."""

import difflib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lightning_stn import functional
from lightning_stn.passes import Pass
from lightning_stn.saved_values import COORDINATES, TENSORS, misfits
from lightning_stn.schedule import Schedule, Value
from lightning_stn.specifications import Hyperparameter, ResponseForm, check_specifications, empty_schedule
from lightning_stn.transforms import positive, positive_inverse


class HyperparameterSet(nn.Module):
    """The hyperparameters of one network: current values, perturbation scales, and the bound sample.

    `unconstrained` and `raw_scale` are float32 whatever the precision of the network, since small steps vanish in half
    precision. They never require a gradient: the hyperparameter phase differentiates detached copies. They are in the
    state dict but are not parameters, so that weight optimisers, weight averaging and sharding leave them alone.

    Args:
        specifications: name to `Float`, `Integer`, `Categorical` or another kind. A name is a Python identifier.
        response: what layers that respond to the set learn beside their weights: "full", gates and response weights, or
            "gates" alone; see `lightning_stn.layers.ResponseLayer`.

    Attributes:
        unconstrained: `lambda`, `[h]`, unconstrained units: one entry for a `Float` or an `Integer`, one for each
            choice of a `Categorical`.
        raw_scale: `rho`, `[h]`; the perturbation scale is `softplus(rho)`.
        centred: whether the response is counted from the current hyperparameters, `W + diag(V (h - lambda)) R`, so that
            the base weights are those at `lambda`, or from zero, as in the first paper; initially False.
        gate_scale: what gates multiply a hyperparameter by, `W + diag(V s (h - lambda)) R`; initially 1.0.
        networks: the networks that respond to the set, as `convert` returned them.
        current_pass: what the networks run for now; `running` changes it for the duration of a block.
        names: the names, in the order of the entries.
        slices: name to the slice of its entries.

    Raises:
        ValueError: there are no hyperparameters, a name is not usable, columns of `schedule.csv` would collide, or
            `response` is unknown.
        TypeError: `specifications` is not a mapping, or one of them is not a `Hyperparameter`.

    Example:
        >>> from lightning_stn import Float, Integer
        >>> hyperparameters = HyperparameterSet({"dropout": Float(0.0, 1.0, init=0.5), "holes": Integer(0, 4, init=1)})
        >>> hyperparameters.values()
        {'dropout': 0.5, 'holes': 1}
        >>> hyperparameters.sample(8).shape
        torch.Size([8, 2])
    """

    unconstrained: Tensor
    raw_scale: Tensor

    def __init__(self, specifications: Mapping[str, Hyperparameter], *, response: ResponseForm = "full") -> None:
        super().__init__()
        if response not in get_args(ResponseForm):
            raise ValueError(f"Expected response to be 'full' or 'gates', got {response!r}.")
        self.response = response
        if isinstance(specifications, Mapping) and not specifications:
            raise ValueError("hyperparameters: expected at least one hyperparameter, got none; name what to tune.")
        self._specifications: dict[str, Hyperparameter] = {}
        self.slices: dict[str, slice] = {}
        self._frozen, self.centred, self.gate_scale = False, False, 1.0
        self.networks: list[nn.Module] = []
        self.current_pass = Pass()
        self._read: dict[str, bool] = {}  # a dictionary, since compiled graphs can write to one
        self._extend(specifications)

    def _extend(self, specifications: Mapping[str, Hyperparameter]) -> None:
        check_specifications(specifications, self._specifications)
        empty_schedule({**self._specifications, **specifications})  # Refuses columns that collide, before any change.
        end = len(self)
        for name, specification in specifications.items():
            self.slices[name] = slice(end, end := end + specification.size)
            self._specifications[name] = specification
        for name in TENSORS:
            setattr(self, name, torch.empty(len(self), dtype=torch.float32))
        self.reset_parameters()

    def add(self, specifications: Mapping[str, Hyperparameter]) -> None:
        """Append hyperparameters, before any layer responds to the set.

        Raises:
            RuntimeError: layers respond to the set already.
            ValueError: a name is taken or not usable.
            TypeError: as for the constructor.
        """
        if self._frozen:
            raise RuntimeError(
                "Hyperparameters cannot be added once layers respond to the set, since each layer has a gate for every "
                "hyperparameter; name them in the constructor, or convert all networks in one call."
            )
        self._extend(specifications)

    def freeze(self) -> None:
        """Fix the number of hyperparameters; called by the first layer that responds to them."""
        self._frozen = True

    def reset_parameters(self) -> None:
        """Return every hyperparameter and scale to its initial value."""
        inits = [entry for s in self.specifications.values() for entry in s.unconstrained_init()]
        scales = [s.scale for s in self.specifications.values() for _ in range(s.size)]
        values, widths = torch.tensor([inits, scales], dtype=torch.float64, device="cpu")
        self.unconstrained.copy_(values)
        self.raw_scale.copy_(positive_inverse(widths))

    def unshare(self) -> None:
        """Copy the state out of the shared memory in which spawned processes receive it."""
        for name in TENSORS:
            setattr(self, name, getattr(self, name).clone())

    @property
    def specifications(self) -> Mapping[str, Hyperparameter]:
        """Specifications by name."""
        return self._specifications

    @property
    def signature(self) -> dict[str, str]:
        """Signatures of the specifications by name; two sets with one signature can exchange their state."""
        return {name: specification.signature for name, specification in self.specifications.items()}

    def require_signature(self, saved: Mapping[str, str]) -> None:
        """Check that the state of a saved set can be loaded into this one.

        Args:
            saved: the `signature` of the saved set.

        Raises:
            ValueError: names, their order, ranges or choices differ.
        """
        if list(self.signature.items()) != list(saved.items()):
            raise ValueError(
                f"The checkpoint was saved with the hyperparameters {dict(saved)}, but this module has "
                f"{self.signature}, which would give the saved state another meaning; resume with the "
                "hyperparameters of the checkpoint (init and scale may differ), or begin a new run."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the order of the entries of `unconstrained`."""
        return tuple(self._specifications)

    @property
    def labels(self) -> tuple[str, ...]:
        """A label for each entry of `unconstrained`: `<name>`, or `<name>/<choice>` for the logit of a choice."""
        return tuple(label for name, s in self.specifications.items() for label in s.labels(name))

    @property
    def scale(self) -> Tensor:
        """`sigma = softplus(rho)`, `[h]`, unconstrained units."""
        return positive(self.raw_scale)

    def __len__(self) -> int:
        return sum(specification.size for specification in self._specifications.values())

    def schedule(self) -> Schedule:
        """An empty schedule of these hyperparameters."""
        return empty_schedule(self.specifications)

    def require(self, name: str, reader: str) -> None:
        """Check that a hyperparameter exists.

        Raises:
            KeyError: no hyperparameter has this name; the message lists the names.
        """
        if name not in self._specifications:
            close = difflib.get_close_matches(str(name), self.names, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise KeyError(f"{reader} reads the hyperparameter {name!r}, which is not one of {list(self.names)}.{hint}")

    def require_number(self, name: str, reader: str) -> None:
        """Check that a hyperparameter exists and is a number.

        Raises:
            KeyError: no hyperparameter has this name; the message lists the names.
            ValueError: the hyperparameter is not a number.
        """
        self.require(name, reader)
        specification = self.specifications[name]
        if not specification.is_number:
            raise ValueError(
                f"{reader} expects a number, but the hyperparameter {name!r} is a {type(specification).__name__}; name "
                f"a Float or an Integer there, and read hyperparameters[{name!r}], the index of the choice, in your "
                "own code."
            )

    def constrain(self, unconstrained: Tensor) -> dict[str, Tensor]:
        """Values in natural units, by name.

        Args:
            unconstrained: `[..., h]`, unconstrained units.

        Returns:
            For each name a tensor of shape `[...]`; int64 for an `Integer`, and for a `Categorical`, which is read as
            the index of its choice.
        """
        return {name: s.read(unconstrained[..., self.slices[name]]) for name, s in self.specifications.items()}

    def values(self) -> dict[str, Value]:
        """The current hyperparameters in natural units, as Python numbers; a `Categorical` as its choice."""
        # In float64, so that an initial value reads back as given, to the precision of a float32 logit.
        values = self.constrain(self.unconstrained.cpu().double())
        return {name: self.specifications[name].to_python(value) for name, value in values.items()}

    def noise(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`eps`, standard normal, `[n, h]`; columns of a hyperparameter with `perturb="batch"` have equal rows.

        Args:
            n: number of rows.
            generator: a generator on the CPU, so that every device draws the same numbers.

        Raises:
            ValueError: `n` is not a whole number of at least 0.
        """
        if not isinstance(n, int) or n < 0:
            raise ValueError(
                f"Expected the number of rows of a sample to be a whole number of at least 0, got {n!r}; if "
                "infer_batch_size is overridden, return the number of examples from it as an int."
            )
        noise = torch.randn(n, len(self), generator=generator, dtype=torch.float32, device="cpu")
        for name, specification in self.specifications.items():
            if specification.perturb == "batch":
                noise[:, self.slices[name]] = noise[:1, self.slices[name]].clone()
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

    def gate_input(self, sample: Tensor) -> Tensor:
        """What gates read for a sample: its distance from the centre, scaled; gradients reach the sample."""
        distance = sample - self.unconstrained if self.centred else sample
        return distance if self.gate_scale == 1.0 else self.gate_scale * distance

    @contextmanager
    def running(self, run: Pass) -> Iterator[None]:
        """Enter a pass; on exit the previous pass is current again."""
        before, self.current_pass = self.current_pass, run
        try:
            yield
        finally:
            self.current_pass = before

    @property
    def at_centre(self) -> bool:
        """Whether layers compute with their base weights alone."""
        return self.centred and self.current_pass.sample is None

    def bound_sample(self) -> Tensor:
        """What gates read, `[n, h]` or `[1, h]`: for the sample of the current pass or, without one, for `lambda`."""
        sample = self.current_pass.sample
        return self.gate_input(self.current()) if sample is None else sample

    def bound_values(self, sample: Tensor) -> dict[str, Tensor]:
        """Natural units of a sample, by name: `[n]`, or a scalar for what the batch shares."""
        values = self.constrain(sample.detach())
        for name, specification in self.specifications.items():
            if sample.shape[0] == 1 or specification.perturb == "batch":
                values[name] = values[name][0]
        return values

    def forget_reads(self) -> None:
        """Count from now on what is read, for `unread`."""
        self._read.clear()

    def unread(self) -> list[str]:
        """Names that nothing has read in the weight phase so far, or since `forget_reads`."""
        return [name for name in self.names if name not in self._read]

    def __getitem__(self, name: str) -> Tensor:
        """The active value in natural units, without a gradient; of a `Categorical` the index of the choice, int64.

        In the weight phase `[n]`, or a scalar tensor where the batch shares it (`perturb="batch"`, or a sample of one
        row); otherwise the current value, a scalar tensor.
        """
        values = self.current_pass.values
        if values is not None:
            self.require(name, "The training loss")
            self._read[name] = True
            return values[name]
        self.require(name, "This code")
        return self.specifications[name].read(self.unconstrained[self.slices[name]])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HyperparameterSet":
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
        for name in (*TENSORS, *COORDINATES):
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
        unexpected = [key for key in state_dict if key.startswith(prefix) and key not in keys]
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

    def extra_repr(self) -> str:
        """One line per hyperparameter."""
        return "\n".join(f"{name}={specification!r}" for name, specification in self.specifications.items())
