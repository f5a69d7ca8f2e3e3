"""What a trained `STNModule` gives: its schedule, a plain network, and curves of its validation loss."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from lightning_stn.analysis import Sweep, sweep
from lightning_stn.export import export
from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.layers import ResponseLayer
from lightning_stn.schedule import Schedule
from lightning_stn.schedule.handover import Handover


class Results(nn.Module):
    """The part of `STNModule` that is asked after the training."""

    hyperparameters: HyperparameterSet
    _stn_handover: Handover

    @property
    def schedule(self) -> Schedule:
        """The hyperparameters over the last run of `STNCallback` that trained this module: `STNCallback.schedule`.

        A module that was loaded from a checkpoint has none.

        Raises:
            RuntimeError: no `STNCallback` has trained this module.
        """
        schedule = self._stn_handover.receive()
        if schedule is None:
            name = type(self).__name__
            raise RuntimeError(
                f"Expected {name} to be trained by STNCallback, which records its schedule, got {name} before such a "
                "run; call trainer.fit with Trainer(callbacks=[STNCallback()]), or read the file of an earlier run "
                "with Schedule.load(path)."
            )
        return schedule

    def export(self, net: nn.Module | None = None) -> nn.Module:
        """A plain copy of a converted network at the current hyperparameters; see `lightning_stn.export.export`.

        A checkpoint of this module loads into this class alone. For the plain module that it was derived from, load it
        here first: `plain.net.load_state_dict(Tuned.load_from_checkpoint(path).export().state_dict())`.

        Args:
            net: the network; None for the only one that this module holds.

        Raises:
            ValueError: there is none, or there are several and `net` does not say which.
        """
        if net is not None:
            return export(net)
        converted = {
            name: child
            for name, child in self.named_children()
            if any(isinstance(module, ResponseLayer) for module in child.modules())
        }
        if len(converted) != 1:
            raise ValueError(
                f"Expected one converted network, got {list(converted)}; say which, as in "
                f"export(self.{next(iter(converted), 'net')})."
            )
        return export(*converted.values())

    def sweep(
        self,
        loader: Iterable[Any],
        names: str | Sequence[str] | None = None,
        *,
        points: int = 21,
        width: float = 2.0,
        batches: int | None = None,
    ) -> Sweep:
        """The validation loss as a function of each hyperparameter; see `lightning_stn.analysis.sweep`."""
        return sweep(self, loader, names, points=points, width=width, batches=batches)
