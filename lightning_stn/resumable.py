"""A training loader whose position is saved in checkpoints."""

import inspect
from collections.abc import Iterator, Sized
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed
from torch.utils.data import DataLoader, Dataset

from lightning_stn.arguments import is_whole
from lightning_stn.randomness import derive_seed

_STATE = ("epoch", "position", "seed", "announced")


class ResumableLoader:
    """Batches of a dataset in an order that (seed, epoch) fixes; a checkpoint can resume it in the middle of an epoch.

    Every checkpoint saves its state and `STNCallback` restores it, so that a resumed run reads the batches that an
    uninterrupted run would have read. Without `STNCallback`, Lightning restores the state in the middle of an epoch,
    but not at its end. Each rank reads its own share of an epoch. If the number of examples is not a multiple of the
    number of ranks, the remainder is left out; with `shuffle`, it differs from epoch to epoch. Nothing is drawn from
    torch's global generator.

    A run resumed in the middle of an epoch is exact if the dataset is deterministic: the random numbers of worker
    processes start anew. Apply random augmentation to the batch instead (`lightning_stn.augment`).

    Args:
        dataset: a map-style dataset.
        batch_size: examples in a batch, on each rank.
        shuffle: whether every epoch has a new order.
        seed: fixes the orders.
        num_workers: processes that load batches.
        drop_last: whether an incomplete batch at the end of an epoch is left out.
        **settings: further arguments of `torch.utils.data.DataLoader`, such as `collate_fn` or `pin_memory`.

    Raises:
        ValueError: an argument is out of range, set by this loader, or unknown; or an epoch would have no batch.

    Example:
        >>> loader = ResumableLoader(range(6), batch_size=2, shuffle=False)
        >>> next(iter(loader))
        tensor([0, 1])
        >>> other = ResumableLoader(range(6), batch_size=2, shuffle=False)
        >>> other.load_state_dict(loader.state_dict())
        >>> list(other)
        [tensor([2, 3]), tensor([4, 5])]
    """

    def __init__(
        self,
        dataset: "Dataset[Any] | Sized",
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        drop_last: bool = False,
        **settings: Any,
    ) -> None:
        _check_counts(batch_size=(batch_size, 1), num_workers=(num_workers, 0), seed=(seed, None))
        _check(dataset, {"shuffle": shuffle, "drop_last": drop_last}, settings)
        self.dataset: Sized = dataset  # type: ignore[assignment]
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.num_workers = num_workers
        self.drop_last = drop_last
        self.settings = settings
        self.epoch = 0
        self.position = 0
        self.announced = 0
        self._loaded = False
        if not len(self):
            raise ValueError(
                f"ResumableLoader: {self._share} examples on each rank give no batch of {batch_size}; lower batch_size "
                "or pass drop_last=False."
            )

    def __len__(self) -> int:
        """Batches in an epoch, on each rank."""
        whole, rest = divmod(self._share, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Any]:
        """Yield the remaining batches of this epoch; the next call begins the next epoch."""
        batches = self._batches()[self.position :]
        workers = torch.Generator().manual_seed(derive_seed(self.seed, "workers", self.epoch))
        loader: DataLoader[Any] = DataLoader(
            self.dataset,  # type: ignore[arg-type]
            batch_sampler=batches,
            num_workers=self.num_workers,
            generator=workers,
            **self.settings,
        )
        for batch in loader:
            # Counted before the yield: a checkpoint written on the last batch of an epoch must not repeat the epoch.
            self.position += 1
            if self.position == len(self):
                self.epoch, self.position = self.epoch + 1, 0
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, number of its batches that were read, seed, the epoch that Lightning announced last, and `_order`."""
        return {**{name: getattr(self, name) for name in _STATE}, **self._order}

    @property
    def _order(self) -> dict[str, int]:
        """What orders and positions depend on, beside the seed; batches on all ranks together count as one."""
        return {
            "examples": len(self.dataset),
            "batches": len(self),
            "batch_size": self.batch_size * self._ranks[1],
            "shuffle": int(self.shuffle),
        }

    def check_state(self, state: Any) -> None:
        """Check that this loader can continue from a saved position.

        Raises:
            ValueError: the state is damaged, or of a loader with other data, another batch size or another order.
        """
        order = self._order
        known, needed = set(_STATE) | order.keys(), set(_STATE)  # runs saved before have no order
        whole = isinstance(state, dict) and needed <= set(state) <= known and all(map(is_whole, state.values()))
        if not whole or not 0 <= state["position"] < len(self) or min(state["epoch"], state["announced"]) < 0:
            raise ValueError(
                f"ResumableLoader: expected the state of a loader with {len(self)} batches, got {state}; resume with "
                "the dataset, the batch size and the number of ranks that the run was started with."
            )
        others = [f"{name} {state[name]}, not {own}" for name, own in order.items() if state.get(name, own) != own]
        if others:
            raise ValueError(
                f"ResumableLoader: the run was started with {' and '.join(others)}, so that its position means other "
                "examples here; resume with the dataset and the arguments that the run was started with."
            )

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a saved position.

        Raises:
            ValueError: as of `check_state`.
        """
        self.check_state(state)
        self.rewind(state)
        self._loaded = True

    def state_before(self, batches: int) -> dict[str, int]:
        """The state before the last so many batches were read."""
        epoch, position = divmod(self.epoch * len(self) + self.position - batches, len(self))
        return {**self.state_dict(), "epoch": epoch, "position": position}

    def rewind(self, state: dict[str, int]) -> None:
        """Return to an earlier state of this loader; the next iteration goes on from there."""
        for name in _STATE:
            setattr(self, name, state[name])

    def set_epoch(self, epoch: int) -> None:
        """Skip the rest of an epoch that `limit_train_batches` cut short.

        Lightning calls this at the start of every epoch. `epoch` only tells a new epoch from a resumed one: the orders
        are numbered by the epochs that were read, and a resumed run may count those differently.
        """
        resumed = self._loaded and epoch <= self.announced
        if self.position and not resumed:
            self.epoch, self.position = self.epoch + 1, 0
        self.announced, self._loaded = epoch, False

    @property
    def batch_sampler(self) -> Any:
        """Where Lightning looks for `set_epoch`; it would try to replace an attribute `sampler` of this loader."""
        return SimpleNamespace(sampler=self)

    @property
    def _ranks(self) -> tuple[int, int]:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    @property
    def _share(self) -> int:
        """Examples on each rank."""
        return len(self.dataset) // self._ranks[1]

    def _batches(self) -> list[list[int]]:
        """The indices that this rank reads in the whole epoch, by batch."""
        rank, world_size = self._ranks
        size = len(self.dataset)
        order = torch.arange(size)
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
            order = torch.randperm(size, generator=generator)
        mine = order[rank::world_size][: self._share].tolist()
        return [mine[start : start + self.batch_size] for start in range(0, len(mine), self.batch_size)][: len(self)]


def _check_counts(**counts: tuple[Any, int | None]) -> None:
    """Check whole numbers, given by name with the least one that is allowed."""
    for name, (count, least) in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or (least is not None and count < least):
            at_least = "" if least is None else f" of at least {least}"
            raise ValueError(f"ResumableLoader: expected {name} to be a whole number{at_least}, got {count!r}.")


def _check(dataset: Any, flags: dict[str, Any], settings: dict[str, Any]) -> None:
    """Check the dataset, the flags by name, and the further arguments of `DataLoader`."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"ResumableLoader: expected {name} to be True or False, got {flag!r}.")
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"ResumableLoader: expected a dataset with a length and items, got {type(dataset).__name__}; "
            "pass a map-style dataset, since an iterable one has no position to resume from."
        )
    own = {"sampler", "batch_sampler", "generator", "persistent_workers"} & settings.keys()
    if own:
        raise ValueError(f"ResumableLoader sets {sorted(own)} itself; leave them out.")
    known = inspect.signature(DataLoader).parameters
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise ValueError(
            f"ResumableLoader: expected only arguments of DataLoader, got {unknown}; there are {list(known)}."
        )
