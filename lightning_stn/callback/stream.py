"""The validation stream: endless batches for the hyperparameter phase, in an order that a seed fixes."""

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from lightning_stn.randomness import derive_seed


class EndlessBatches(Sampler[list[int]]):
    """Index batches of one rank, epoch after epoch, each epoch in a new order that (seed, epoch) fixes.

    Incomplete batches are dropped if there are complete ones, since a small batch would count as much as a full one.
    The order changes from epoch to epoch, so no example is dropped for good.

    Args:
        size: examples in the dataset.
        batch_size: examples in a batch.
        seed: fixes the orders.
        rank: this rank; it reads its own share of every epoch.
        world_size: number of ranks.
        start: batches to skip at the beginning, to continue where an earlier stream stopped.
    """

    def __init__(self, size: int, batch_size: int, *, seed: int, rank: int, world_size: int, start: int = 0) -> None:
        self.size = size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = start
        self.share = size // world_size
        self.batch_size = min(batch_size, self.share)
        if not self.batch_size:
            raise ValueError(
                f"The validation stream has {size} examples for {world_size} ranks, but each rank needs at least one; "
                "give more validation data."
            )

    @property
    def batches_per_epoch(self) -> int:
        """Batches that this rank reads before the order changes."""
        return self.share // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        epoch, position = divmod(self.start, self.batches_per_epoch)
        while True:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "stream", epoch))
            order = torch.randperm(self.size, generator=generator)[self.rank :: self.world_size].tolist()
            for batch in range(position, self.batches_per_epoch):
                yield order[batch * self.batch_size : (batch + 1) * self.batch_size]
            epoch, position = epoch + 1, 0


class ValidationStream:
    """An endless stream of batches over validation data.

    A plain `DataLoader` over a map-style dataset is rebuilt with the same dataset, collate function and workers, but
    another order, so that the loader used for evaluation is not touched. A loader with a sampler or batch sampler that
    was passed (which may select a part of the dataset) is rebuilt with the same batches, pass after pass. Any other
    iterable of batches and a subclass of `DataLoader` is read from start to end repeatedly, by workers of the stream.

    A stream that goes on where another stopped loads no batch again, except of the last kind, whose batches it has to
    read; it warns of that once.

    Args:
        loader: the source.
        seed: fixes the order.
        rank: this rank.
        world_size: number of ranks; each reads its own share of a map-style dataset.

    Raises:
        ValueError: there are fewer examples than ranks, or (raised at the first read) no batches.
    """

    def __init__(self, loader: Iterable[Any], *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self.consumed = 0
        self._before = 0  # batches of loaders before this one
        self.read(loader)

    def read(self, loader: Iterable[Any]) -> None:
        """Continue with the batches of this loader."""
        self._loader = loader
        self._before = self.consumed
        self._batches: Iterator[Any] | None = None
        if _shuffles(loader):
            sampler = self._sampler(loader)  # Raises for too small a dataset now, not at the first step.
            if sampler.share < (loader.batch_size or 1):
                warnings.warn(
                    f"The validation stream has {sampler.share} examples on each rank, fewer than its batch size of "
                    f"{loader.batch_size}, so every hyperparameter step sees the same examples; give more validation "
                    "data, or a smaller batch size.",
                    stacklevel=2,
                )

    def __iter__(self) -> "ValidationStream":
        return self

    def __next__(self) -> Any:
        if self._batches is None:
            self._batches = self._start()
        batch = next(self._batches)
        self.consumed += 1
        return batch

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Return to where the stream was if this block fails."""
        consumed = self.consumed
        try:
            yield
        except BaseException:
            self.load_state_dict({"consumed": consumed, "before": self._before})
            raise

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the iterator, which cannot be copied; a copy goes on after as many batches."""
        return {**self.__dict__, "_batches": None}

    def state_dict(self) -> dict[str, int]:
        """The number of batches read, and how many of them before the present loader."""
        return {"consumed": self.consumed, "before": self._before}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the saved number of batches."""
        self.consumed = state["consumed"]
        self._before = state["before"]
        self._batches = None

    def _sampler(self, loader: "DataLoader[Any]") -> EndlessBatches:
        return EndlessBatches(
            len(loader.dataset),  # type: ignore[arg-type]
            loader.batch_size or 1,
            seed=self._seed,
            rank=self._rank,
            world_size=self._world_size,
            start=self.consumed,
        )

    def _start(self) -> Iterator[Any]:
        workers = derive_seed(self._seed, "workers", self._rank)
        skip = self.consumed - self._before
        if _shuffles(self._loader):
            return iter(_with_batches(self._loader, self._sampler(self._loader), workers))
        if _draws_indices(self._loader):
            return iter(_with_batches(self._loader, _Repeated(_indices(self._loader), skip), workers))
        if skip and not isinstance(self._loader, Sequence):
            warnings.warn(
                f"To continue where the run stopped, the validation stream reads {skip} batches of its "
                f"{type(self._loader).__name__} again, which takes as long as it did before; only a plain DataLoader "
                "over a map-style dataset can be entered in the middle. Where this takes too long, give one to "
                "STNCallback(dataloader=...).",
                stacklevel=3,
            )
        return _repeat(_apart(self._loader, workers), skip)


class _Repeated(Sampler[Any]):
    """What a sampler or batch sampler draws, pass after pass.

    Args:
        indices: the sampler; each iteration is a pass.
        skip: draws to leave out at the beginning.
    """

    def __init__(self, indices: Iterable[Any], skip: int) -> None:
        self._indices = indices
        self._skip = skip

    def __iter__(self) -> Iterator[Any]:
        return _repeat(self._indices, self._skip)


def _with_batches(loader: "DataLoader[Any]", indices: Sampler[Any], seed: int) -> "DataLoader[Any]":
    """A loader of the same dataset that reads other indices.

    Args:
        loader: the loader.
        indices: yields a list of indices for each batch, or single indices where the dataset yields batches.
        seed: from which each worker has its seed.
    """
    drawn: dict[str, Any] = {"sampler": indices, "batch_size": None}
    return DataLoader(
        loader.dataset,
        **({"batch_sampler": indices} if loader.batch_sampler is not None else drawn),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        generator=torch.Generator().manual_seed(seed),  # see `_apart`
    )


def _indices(loader: "DataLoader[Any]") -> Iterable[Any]:
    """What a loader reads its dataset by."""
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


def _draws_indices(loader: Iterable[Any]) -> TypeGuard["DataLoader[Any]"]:
    """Whether the loader certainly reads its dataset by indices."""
    return type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset)


def _shuffles(loader: Iterable[Any]) -> TypeGuard["DataLoader[Any]"]:
    """Whether the loader certainly reads its whole dataset, in an order that the stream may replace.

    Only a plain `DataLoader` that built its batch sampler by itself does. A subclass may change batches on their way,
    and a sampler that was passed may select, weigh or repeat examples.
    """
    if not _draws_indices(loader) or loader.batch_size is None:
        return False
    sampler, batches = loader.sampler, loader.batch_sampler
    if type(batches) is not BatchSampler or batches.sampler is not sampler:
        return False
    if type(sampler) is RandomSampler and (sampler.replacement or sampler.num_samples != len(loader.dataset)):  # type: ignore[arg-type]
        return False
    return type(sampler) in _WHOLE and getattr(sampler, _WHOLE[type(sampler)]) is loader.dataset


_WHOLE: dict[type, str] = {
    SequentialSampler: "data_source",
    RandomSampler: "data_source",
    DistributedSampler: "dataset",
}
"""Samplers that read a whole dataset, and the attribute that holds it."""


def _apart(loader: Iterable[Any], seed: int) -> Iterable[Any]:
    """A loader that shares data and sampler with this one, but neither persistent workers nor a generator.

    Persistent workers begin anew whenever anybody reads their loader, so that evaluation would reset the stream.
    """
    if isinstance(loader, CombinedLoader):
        return _Batches(loader)
    if not isinstance(loader, DataLoader):
        return loader
    own = copy.copy(loader)
    own._iterator = None  # torch keeps persistent workers here
    # The loader draws a base seed; drawing it from the global generator would change the training.
    own.generator = torch.Generator().manual_seed(seed)
    return own


class _Batches:
    """The batches of a `CombinedLoader`, without the numbers that it gives beside them."""

    def __init__(self, loader: CombinedLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        return (batch for batch, _, _ in self._loader)


def _repeat(loader: Iterable[Any], skip: int) -> Iterator[Any]:
    """Read a loader repeatedly, and skip the first `skip` batches."""
    seen = 0
    while True:
        before = seen
        for batch in loader:
            seen += 1
            if seen > skip:
                yield batch
        if seen == before:
            raise ValueError("The validation stream has no batches; give a loader that yields at least one.")
