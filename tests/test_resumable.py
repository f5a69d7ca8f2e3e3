"""ResumableLoader: every example once per epoch; a checkpoint neither repeats nor skips a batch."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from lightning_stn import ResumableLoader


def flat(batches: Any) -> list[int]:
    return [number for batch in batches for number in batch.tolist()]


@given(
    size=st.integers(1, 20),
    batch_size=st.integers(1, 6),
    drop_last=st.booleans(),
    stop=st.integers(0, 30),
    seed=st.integers(0, 3),
)
def test_resumable_loader_continues_from_the_state_of_another(
    size: int, batch_size: int, drop_last: bool, stop: int, seed: int
) -> None:
    def build() -> ResumableLoader:
        return ResumableLoader(range(size), batch_size, seed=seed, drop_last=drop_last)

    if drop_last and size < batch_size:
        return
    whole, epochs = build(), []
    for _ in range(4):
        epochs.append([batch.tolist() for batch in whole])
        assert len(epochs[-1]) == len(whole)
    expected = [batch for epoch in epochs for batch in epoch]
    stop %= 3 * len(whole)
    first, seen = build(), []
    while len(seen) < stop:
        for batch in first:
            seen.append(batch.tolist())
            if len(seen) == stop:
                break
    second = build()
    second.load_state_dict(first.state_dict())
    while len(seen) < len(expected):
        seen.extend(batch.tolist() for batch in second)
    assert seen == expected


def test_resumable_loader_reads_every_example_once_per_epoch_in_a_new_order() -> None:
    loader = ResumableLoader(range(50), 8)
    first, second = flat(loader), flat(loader)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert flat(ResumableLoader(range(50), 8, seed=1)) != first
    assert flat(ResumableLoader(range(50), 8, shuffle=False)) == list(range(50))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_read_disjoint_parts_of_an_epoch(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world_size)
    parts = []
    for rank in range(world_size):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        loader = ResumableLoader(range(20), 4)
        parts.append(flat(loader))
        assert len(parts[-1]) == 20 // world_size
        assert len(loader) == -(-len(parts[-1]) // 4)
    everything = [number for part in parts for number in part]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_do_not_change_the_batches_or_advance_the_global_generator(workers: int) -> None:
    data = TensorDataset(torch.arange(12), torch.arange(12) % 2)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches = list(ResumableLoader(data, 5, num_workers=workers))
    assert torch.equal(torch.get_rng_state(), before)
    alone = list(ResumableLoader(data, 5))
    for (x, y), (other_x, other_y) in zip(batches, alone, strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size to be a whole number of at least 1, got 0"),
        ({"batch_size": 2.0}, "whole number of at least 1, got 2.0"),
        ({"batch_size": 9, "drop_last": True}, "5 examples on each rank give no batch of 9; lower batch_size"),
        ({"batch_size": 2, "sampler": None}, r"sets \['sampler'\] itself; leave them out"),
        ({"batch_size": 2, "dataset": iter([1])}, "a dataset with a length and items, got list_iterator"),
    ],
)
def test_resumable_loader_refuses_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResumableLoader(**{"dataset": range(5), **arguments})


def test_resumable_loader_refuses_the_state_of_another_loader() -> None:
    loader = ResumableLoader(range(5), 2)
    for state in ({"epoch": 0, "position": 3, "seed": 0, "announced": 0}, {"epoch": 0}):
        with pytest.raises(ValueError, match="the state of a loader with 3 batches, got"):
            loader.load_state_dict(state)
    assert (loader.epoch, loader.position, loader.seed, loader.announced) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dataset": range(7)}, "examples 6, not 7"),
        ({"batch_size": 3}, "batches 3, not 2 and batch_size 2, not 3"),
        ({"shuffle": False}, "shuffle 1, not 0"),
        ({"dataset": range(7), "drop_last": True}, "examples 6, not 7"),
    ],
)
def test_resumable_loader_refuses_the_position_in_another_order(changed: dict[str, Any], message: str) -> None:
    first = ResumableLoader(range(6), 2)
    next(iter(first))
    other = ResumableLoader(**{"dataset": range(6), "batch_size": 2, **changed})
    with pytest.raises(ValueError, match=f"the run was started with {message}.*resume with the dataset and the arg"):
        other.load_state_dict(first.state_dict())
    assert other.position == 0


def test_resumable_loader_continues_from_a_state_that_does_not_know_its_order() -> None:
    loader = ResumableLoader(range(6), 2, shuffle=False)
    loader.load_state_dict({"epoch": 0, "position": 2, "seed": 0, "announced": 0})
    assert flat(loader) == [4, 5]
