from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_stn.callback.stream import EndlessBatches, ValidationStream
from lightning_stn.randomness import derive_seed


def numbers(n: int, batch_size: int = 4, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(n)), batch_size=batch_size, **kwargs)


def flat(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


def read(stream: ValidationStream, batches: int) -> list[list[int]]:
    return [next(stream)[0].tolist() for _ in range(batches)]


def test_stream_reads_every_complete_batch_per_epoch_in_a_new_order() -> None:
    batches = read(ValidationStream(numbers(12), seed=0), 6)
    first, second = flat(batches[:3]), flat(batches[3:])
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


@pytest.mark.filterwarnings("ignore:The validation stream has 3 examples")
def test_stream_drops_incomplete_batches_unless_there_are_no_others() -> None:
    assert {len(batch) for batch in read(ValidationStream(numbers(10), seed=0), 9)} == {4}
    assert {len(batch) for batch in read(ValidationStream(numbers(3), seed=0), 3)} == {3}


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_order_depends_on_the_seed_alone(workers: int) -> None:
    first = read(ValidationStream(numbers(12, num_workers=workers), seed=5), 5)
    torch.manual_seed(99)
    assert read(ValidationStream(numbers(12, shuffle=True), seed=5), 5) == first
    assert read(ValidationStream(numbers(12), seed=6), 5) != first


def test_stream_does_not_advance_the_global_generator() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    read(ValidationStream(numbers(12), seed=5), 5)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("consumed", [0, 1, 3, 5])
@pytest.mark.parametrize("shuffles", [True, False])
def test_stream_continues_from_its_state(consumed: int, shuffles: bool) -> None:
    source: Any = numbers(12) if shuffles else [[torch.tensor([i])] for i in range(3)]
    whole = read(ValidationStream(source, seed=5), 9)
    first = ValidationStream(source, seed=5)
    read(first, consumed)
    second = ValidationStream(source, seed=5)
    second.load_state_dict(first.state_dict())
    assert read(second, 9 - consumed) == whole[consumed:]


def test_ranks_read_disjoint_parts_of_an_epoch() -> None:
    streams = [ValidationStream(numbers(13, 2), seed=3, rank=rank, world_size=3) for rank in range(3)]
    seen = [flat(read(stream, 2)) for stream in streams]
    assert len({*seen[0], *seen[1], *seen[2]}) == 12


def test_stream_keeps_the_selection_of_a_custom_sampler() -> None:
    batches = read(ValidationStream(numbers(12, sampler=SubsetRandomSampler([1, 3, 5])), seed=0), 3)
    assert set(flat(batches)) == {1, 3, 5}


class Tenfold(DataLoader[Any]):
    """Changes batches on their way."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return iter([10 * numbers] for (numbers,) in super().__iter__())


class Backwards(DataLoader[Any]):
    """Replaces the iterator that torch builds."""

    def _get_iterator(self) -> Any:
        return reversed(list(super()._get_iterator()))


TWELVE = TensorDataset(torch.arange(12))

AS_THEY_ARE: dict[str, Callable[[], DataLoader[Any]]] = {
    "batches of a part": lambda: DataLoader(TWELVE, batch_sampler=BatchSampler(SequentialSampler(range(6)), 3, False)),
    "lists of indices": lambda: DataLoader(TWELVE, batch_sampler=[[1, 2, 3], [5, 8]]),
    "a part": lambda: DataLoader(TWELVE, 3, sampler=SequentialSampler(range(6))),
    "own iteration": lambda: Tenfold(TWELVE, 4),
    "own iterator": lambda: Backwards(TWELVE, 4),
    "no batches": lambda: DataLoader(TWELVE, batch_size=None),
}
"""Loaders whose order or examples are not the stream's to choose."""


@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_stream_reads_a_loader_as_it_is_unless_it_certainly_reads_its_whole_dataset(name: str) -> None:
    build = AS_THEY_ARE[name]
    expected = [batch[0].tolist() for batch in build()]
    assert read(ValidationStream(build(), seed=5), 2 * len(expected)) == 2 * expected


SAMPLERS = [RandomSampler(TWELVE, num_samples=6), WeightedRandomSampler([1.0] * 2 + [0.0] * 10, 8)]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["fewer", "weighted"])
def test_stream_keeps_the_draws_of_a_sampler(sampler: Any) -> None:
    stream = ValidationStream(DataLoader(TWELVE, 2, sampler=sampler), seed=5)
    found = flat(read(stream, len(sampler) // 2))
    if isinstance(sampler, RandomSampler):
        assert len(set(found)) == 6
    else:
        assert set(found) <= {0, 1}


class Numbers(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.tensor(number),) for number in range(12)])


@pytest.mark.parametrize(
    "build",
    [
        lambda: DataLoader(Numbers(), 4, num_workers=1, persistent_workers=True),
        lambda: DataLoader(TWELVE, 4, sampler=SequentialSampler(range(12)), num_workers=1, persistent_workers=True),
    ],
    ids=["iterable", "sampler"],
)
def test_stream_goes_on_where_it_was_while_others_read_its_loader(build: Callable[[], DataLoader[Any]]) -> None:
    """Persistent workers belong to a loader, and begin anew for whoever reads it."""
    loader = build()
    stream = ValidationStream(loader, seed=5)
    found = []
    for _ in range(6):
        found += read(stream, 1)
        assert len(list(loader)) == 3  # an evaluation
    assert found == 2 * [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_stream_of_a_loader_as_it_is_does_not_advance_the_global_generator() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    read(ValidationStream(AS_THEY_ARE["a part"](), seed=5), 5)
    assert torch.equal(torch.rand(3), expected)


def test_stream_repeats_iterable_data() -> None:
    class Count(IterableDataset[torch.Tensor]):
        def __iter__(self) -> Iterator[torch.Tensor]:
            return iter(torch.arange(4))

    stream = ValidationStream(DataLoader(Count(), batch_size=2), seed=0)
    assert [batch.tolist() for batch in islice(stream, 3)] == [[0, 1], [2, 3], [0, 1]]


def test_stream_refuses_too_little_data() -> None:
    with pytest.raises(ValueError, match="2 examples for 3 ranks"):
        ValidationStream(numbers(2), seed=0, rank=0, world_size=3)
    with pytest.raises(ValueError, match="no batches"):
        next(ValidationStream([], seed=0))


def test_endless_batches_count_the_batches_of_one_rank() -> None:
    assert EndlessBatches(13, 4, seed=0, rank=0, world_size=3).batches_per_epoch == 1


def test_derived_seeds_are_reproducible_and_fit_a_generator() -> None:
    assert derive_seed(1, 0, "weight", 2) == derive_seed(1, 0, "weight", 2)
    seeds = {derive_seed(1, rank, phase, step) for rank in range(4) for phase in "ab" for step in range(50)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_stream_warns_of_fewer_examples_than_a_batch() -> None:
    with pytest.warns(
        UserWarning, match=r"has 5 examples on each rank, fewer than its batch size of 8.*more validation"
    ):
        stream = ValidationStream(DataLoader(TensorDataset(torch.arange(5)), 8), seed=0)
    assert sorted(next(stream)[0].tolist()) == [0, 1, 2, 3, 4]
