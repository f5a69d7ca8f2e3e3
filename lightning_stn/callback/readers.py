"""What reads replayed values in a module: its hyperparameters, its regularisers, and attributes."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from lightning.pytorch import LightningModule

from lightning_stn.binding import BoundModule, attach_all
from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.manual_optimization import WeightStep
from lightning_stn.module import STNModule
from lightning_stn.passes import Pass
from lightning_stn.policies import Policy
from lightning_stn.policies.attributes import Attributes
from lightning_stn.policies.bound import as_tensors, move
from lightning_stn.policies.checks import READER
from lightning_stn.specifications import Value
from lightning_stn.weight_phase import WeightPhase


class Readers:
    """Gives replayed values to whatever reads them.

    An `STNModule` has a set of hyperparameters. In any other module regularisers and augmentations that name
    hyperparameters are attached to a set of this object, outside the module, so that the module gets neither
    parameters nor state-dict keys.

    Args:
        module: the module of the run.
        policy: the values.
        paths: attribute to name of the hyperparameter; see `Attributes`.
        step: how the weights of an `STNModule` step in manual optimisation.
        device: of the run.

    Attributes:
        policy: the values, with the specifications of the module where it has some.
    """

    def __init__(
        self,
        module: LightningModule,
        policy: Policy,
        paths: Mapping[str, str],
        step: WeightStep,
        device: torch.device,
    ) -> None:
        self.policy = policy
        self._module, self._paths, self._step, self._device = module, paths, step, device
        self._set: HyperparameterSet | None = module.hyperparameters if isinstance(module, STNModule) else None
        self._attributes: Attributes | None = None
        self._entered: tuple[dict[str, Value], dict[str, Value]] | None = None

    def attach(self, *, complete: bool) -> bool:
        """Attach what the module holds now, and return whether nothing is wrong with it.

        Args:
            complete: whether the module holds all of its parts, so that attributes can be looked up.

        Raises:
            ValueError: the module is complete, and hyperparameters have no value or cannot have theirs, regularisers
                read what is not replayed, or attributes do not exist; the message lists all of them.
        """
        problems = list(self._attach_set())
        if complete:
            try:
                self._attributes = Attributes(self._module, self._paths, self.policy.centre(0))
            except ValueError as error:
                problems.append(error.args[0])
        if problems and complete:
            raise ValueError("\n".join(problems))
        return not problems

    def _attach_set(self) -> Iterable[str]:
        """Attach regularisers to the set; yields what is wrong, in words."""
        module, policy = self._module, self.policy
        if isinstance(module, STNModule):
            current = module.hyperparameters.values()
            missing = {name: value for name, value in current.items() if name not in policy.names}
            if missing:
                yield (
                    f"{READER}: expected a value for every hyperparameter of {type(module).__name__}, got none for "
                    f"{list(missing)}; add them, for instance as constants, {missing}."
                )
                return
            try:
                self.policy = policy.with_specifications(module.hyperparameters.specifications)
            except ValueError as error:
                yield error.args[0]
        elif self._set is None and any(bound.reads() for bound in _bound(module)):
            if not policy.specifications:
                yield f"{READER}: expected numbers for {_reads(module)}, got {policy.centre(0)}; give numbers."
                return
            self._set = HyperparameterSet(policy.specifications).to(self._device)
        if self._set is not None:
            try:
                attach_all(module, self._set)
            except (KeyError, ValueError) as error:
                yield f"{READER}: {error.args[0]}"

    def enter(self, batch: int, *, noise: bool = True) -> dict[str, Value]:
        """Put the values for the training batch after `batch` finished ones in force, and return them.

        Args:
            batch: training batches that are finished.
            noise: whether to add the noise of the policy. The current hyperparameters never have it.
        """
        centre = self.policy.centre(batch)
        values = self.policy.values(batch) if noise else centre
        if self._set is not None and (centre, values) != self._entered:
            move(self._set, {name: centre[name] for name in self._set.names})
            tensors = as_tensors(self._set, values, self._device)
            if isinstance(self._module, STNModule):
                self._module._stn_phase = WeightPhase(step=self._step, values=tensors)
            else:
                self._set.current_pass = Pass(values=tensors)
            self._entered = centre, values
        if self._attributes is not None:
            self._attributes.set(values)
        return values

    def begin(self, length: float) -> None:
        """Begin a run of so many training batches, infinity where the number is not known; count what is read."""
        self.policy = replace(self.policy, length=length)
        self._entered = None  # a checkpoint may have changed the current hyperparameters since
        if self._set is not None:
            self._set.forget_reads()

    def unread(self) -> list[str]:
        """Replayed names that no attribute, no regulariser and no code has read since `begin`."""
        read = {*self._paths.values(), *_reads(self._module)}
        if self._set is not None:
            read |= set(self._set.names) - set(self._set.unread())
        return [name for name in self.policy.names if name not in read]

    def detach(self) -> None:
        """Leave the module as it was, but for the last values of attributes and of an `STNModule`'s hyperparameters."""
        if isinstance(self._module, STNModule):
            self._module._stn_phase = None
            self._module.hyperparameters.current_pass = Pass()
        elif self._set is not None:
            for bound in _bound(self._module):
                if bound.hyperparameters is self._set:
                    bound.detach()
            self._set = None


def _bound(module: LightningModule) -> list[BoundModule]:
    return [inner for inner in module.modules() if isinstance(inner, BoundModule)]


def _reads(module: LightningModule) -> list[str]:
    return list(dict.fromkeys(name for bound in _bound(module) for name in bound.reads()))
