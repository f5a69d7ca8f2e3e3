"""What a validation stream reads again where it goes on after another one."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from callback.test_stream import AS_THEY_ARE, Numbers, Tenfold, read
from features.runs import assert_equal_weights, callback
from support import AfterEpoch, LitSmall, images, trainer
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler

from lightning_stn import ResumableLoader
from lightning_stn.callback.stream import ValidationStream


class Counting(Dataset[Any]):
    """Twelve numbers that count how often they are read."""

    def __init__(self) -> None:
        self.read = 0

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: Any) -> Any:
        self.read += 1
        return (torch.as_tensor(index),)


INDEXED: dict[str, Callable[[Counting], DataLoader[Any]]] = {
    "shuffled": lambda data: DataLoader(data, 2),
    "sampler": lambda data: DataLoader(data, 2, sampler=SequentialSampler(range(6))),
    "batch sampler": lambda data: DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(range(6)), 2, False)),
    "lists": lambda data: DataLoader(data, batch_sampler=[[4, 1], [5, 2]]),
}


@pytest.mark.parametrize("consumed", [1, 2, 25])
@pytest.mark.parametrize("kind", INDEXED)
def test_stream_loads_no_batch_of_a_map_style_dataset_again(kind: str, consumed: int) -> None:
    whole = read(ValidationStream(INDEXED[kind](Counting()), seed=5), consumed + 2)
    data = Counting()
    stream = ValidationStream(INDEXED[kind](data), seed=5)
    stream.load_state_dict({"consumed": consumed, "before": 0})
    assert read(stream, 2) == whole[consumed:]
    assert data.read == 4


@pytest.mark.parametrize("name", [name for name in AS_THEY_ARE if name not in ("own iteration", "own iterator")])
@pytest.mark.parametrize("workers", [0, 1])
def test_stream_goes_on_within_any_loader_of_indices(name: str, workers: int) -> None:
    source = AS_THEY_ARE[name]()
    source.num_workers = workers
    whole = read(ValidationStream(source, seed=5), 9)
    stream = ValidationStream(source, seed=5)
    stream.load_state_dict({"consumed": 5, "before": 0})
    assert read(stream, 4) == whole[5:]


READ_AGAIN: dict[str, tuple[Callable[[], Any], str]] = {
    "iterable dataset": (lambda: DataLoader(Numbers(), 4), "DataLoader"),
    "subclass": (lambda: Tenfold(Counting(), 4), "Tenfold"),
    "own iterable": (lambda: Endless(), "Endless"),
}


class Endless:
    """An iterable of batches that is no loader."""

    def __iter__(self) -> Iterator[Any]:
        return ([torch.tensor([number])] for number in range(10**9))


@pytest.mark.parametrize("kind", READ_AGAIN)
def test_stream_warns_once_of_batches_that_it_has_to_read_again(kind: str) -> None:
    build, name = READ_AGAIN[kind]
    whole = read(ValidationStream(build(), seed=5), 9)
    stream = ValidationStream(build(), seed=5)
    stream.load_state_dict({"consumed": 5, "before": 0})
    with pytest.warns(UserWarning, match=f"reads 5 batches of its {name} again, .*map-style dataset") as record:
        assert read(stream, 4) == whole[5:]
    assert len(record) == 1


def test_stream_of_batches_in_memory_goes_on_without_a_warning() -> None:
    stream = ValidationStream([[torch.tensor([number])] for number in range(3)], seed=5)
    stream.load_state_dict({"consumed": 5, "before": 0})
    assert read(stream, 2) == [[2], [0]]


def test_stream_begins_a_reloaded_loader_at_its_start_and_goes_on_within_it() -> None:
    stream = ValidationStream(Endless(), seed=5)
    read(stream, 3)
    stream.read(Endless())
    assert read(stream, 2) == [[0], [1]]
    resumed = ValidationStream(Endless(), seed=5)
    resumed.load_state_dict(stream.state_dict())
    with pytest.warns(UserWarning, match="reads 2 batches"):
        assert read(resumed, 2) == [[2], [3]]


def test_stream_goes_on_from_the_state_of_an_earlier_version() -> None:
    stream = ValidationStream([[torch.tensor([number])] for number in range(3)], seed=5)
    stream.load_state_dict({"consumed": 4, "before": 0})
    assert stream.state_dict() == {"consumed": 4, "before": 0}


class Images(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([images(16, seed=1)[index] for index in range(16)])


@pytest.mark.filterwarnings("ignore:.*ModelCheckpoint")
def test_resumed_run_says_how_much_it_reads_again_and_ends_as_the_whole_one(tmp_path: Path) -> None:
    def run(epochs: int, checkpoint: Path | None = None) -> LitSmall:
        torch.manual_seed(0)
        module = LitSmall()
        fit = trainer(callback(), AfterEpoch(epochs), max_epochs=4)
        fit.fit(module, ResumableLoader(images(40), 8, seed=5), DataLoader(Images(), 4), ckpt_path=checkpoint)
        fit.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    whole = run(4)
    run(2)
    with pytest.warns(UserWarning, match="validation stream reads 5 batches of its DataLoader again") as record:
        resumed = run(4, tmp_path / "2.ckpt")
    assert sum("again" in str(one.message) for one in record) == 1
    assert_equal_weights(resumed, whole)
