"""Sources and structures of batches: data modules, several loaders, nested batches, uneven sizes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from features.runs import MODES, Traced, assert_equal_weights, callback
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from support import images, loader, trainer
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from lightning_stn import ResumableLoader

PERTURB = ("example", "batch")


def build(kind: type[Traced] = Traced, automatic: bool = False) -> Any:
    L.seed_everything(3, verbose=False)
    module = kind(automatic)
    L.seed_everything(4, verbose=False)
    return module


def assert_moved(module: Traced) -> None:
    """Every hyperparameter has moved, in as many steps as were due."""
    assert (module.hyperparameters.unconstrained != Traced().hyperparameters.unconstrained).all()
    assert module.events.count("hyperparameter") == module.events.count("weight") // 2 > 0


class Counting(L.LightningDataModule):
    """Holds raw bytes, scaled in the hook after the transfer; records the calls of its hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append("setup " + stage)
        self.train, self.valid = (
            [((x * 32 + 128).round().clamp(0, 255).byte(), y) for x, y in images(n, seed)]
            for n, seed in ((40, 0), (16, 1))
        )

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, batch_size=8)

    def val_dataloader(self) -> Any:
        return DataLoader(self.valid, batch_size=8)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls.append("training" if self.trainer.training else "validating")
        return batch[0].float() / 32 - 4, batch[1]

    def teardown(self, stage: str) -> None:
        self.calls.append("teardown " + stage)


@pytest.mark.parametrize("automatic", MODES)
def test_data_module_hooks_run_in_both_phases(automatic: bool) -> None:
    """Its hook gets the batches of the hyperparameter phase too; the run equals one on loaders of scaled images."""
    module, data = build(automatic=automatic), Counting()
    run = trainer(callback(), max_epochs=2)
    run.fit(module, datamodule=data)
    assert data.calls[:2] == ["prepare_data", "setup fit"]
    assert data.calls[-1] == "teardown fit"
    assert data.calls.count("training") == 2 * 5
    assert data.calls.count("validating") == 2 * 2 + module.events.count("hyperparameter")
    assert_moved(module)
    plain = build(automatic=automatic)
    scaled = [[(x.float() / 32 - 4, y) for x, y in part] for part in (data.train, data.valid)]
    trainer(callback(), max_epochs=2).fit(plain, *(DataLoader(part, batch_size=8) for part in scaled))
    assert_equal_weights(module, plain)


class Sources(Traced):
    """Records the batch sizes of the hyperparameter phase, which identify the loader."""

    def __init__(self, automatic: bool = False) -> None:
        super().__init__(automatic)
        self.tuned: set[int] = set()

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        if torch.is_grad_enabled():
            self.tuned.add(len(batch[1]))
        return super().validation_loss(batch, batch_idx)


class ByLoader(Sources):
    """Overrides `validation_step`, as modules for several loaders do."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # type: ignore[override]
        name = ("clean", "shifted")[dataloader_idx]
        self.log(f"loss_{name}", self.validation_loss(batch, batch_idx), add_dataloader_idx=False)


def expected_loss(module: Traced, source: DataLoader[Any]) -> float:
    x, y = source.dataset[:]
    with torch.no_grad():
        return float(F.cross_entropy(module.eval().net(x), y))


@pytest.mark.parametrize("mapping", [False, True])
@pytest.mark.parametrize("chosen", ["argument", "hook"])
@pytest.mark.parametrize("kind", [Sources, ByLoader])
def test_one_of_several_validation_loaders_is_tuned_on(kind: type[Sources], chosen: str, mapping: bool) -> None:
    """The argument or the hook selects the loader to tune on; Lightning validates on all, and logs each separately."""
    clean, shifted, tuning = loader(16, 8, seed=1), loader(12, 4, seed=2), loader(15, 5, seed=3)
    module = build(kind)
    if chosen == "hook":
        module.tuning_dataloader = lambda: tuning
    stn = callback(dataloader=shifted if chosen == "argument" else None)
    run = trainer(stn, max_epochs=2)
    run.fit(module, loader(40), {"clean": clean, "shifted": shifted} if mapping else [clean, shifted])
    assert module.tuned == {4 if chosen == "argument" else 5}
    assert_moved(module)
    names = [f"loss_{name}" for name in ("clean", "shifted")]
    if kind is Sources:
        names = ["val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"]
    for name, source in zip(names, (clean, shifted), strict=True):
        assert float(run.callback_metrics[name]) == pytest.approx(expected_loss(module, source), rel=1e-5)
    assert "val_loss" not in run.callback_metrics
    results = run.test(module, [clean, shifted], verbose=False)
    for index, source in enumerate((clean, shifted)):
        loss = results[index][f"test_loss/dataloader_idx_{index}"]
        assert loss == pytest.approx(expected_loss(module, source), rel=1e-5)


class Pair(Traced):
    """Trains on the concatenated batches of two loaders."""

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        parts = [part for part in batch.values() if part is not None]
        x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        assert len(self.hyperparameters.bound_sample()) in (1, len(y))
        return super().training_loss((x, y), batch_idx)

    def infer_batch_size(self, batch: Any) -> int:
        if isinstance(batch, Mapping):
            return sum(len(part[1]) for part in batch.values() if part is not None)
        return super().infer_batch_size(batch)


PAIRS: dict[str, tuple[Callable[..., Any], int]] = {
    "dict": (lambda a, b: {"a": a, "b": b}, 5),
    "max_size_cycle": (lambda a, b: CombinedLoader({"a": a, "b": b}, "max_size_cycle"), 5),
    "min_size": (lambda a, b: CombinedLoader({"a": a, "b": b}, "min_size"), 3),
    "max_size": (lambda a, b: CombinedLoader({"a": a, "b": b}, "max_size"), 5),
}


UNCHECKED = pytest.mark.filterwarnings("ignore:.*could not check with")
"""For batches that the check of the rows cannot enlarge."""


@UNCHECKED
@pytest.mark.parametrize("perturb", PERTURB)
@pytest.mark.parametrize("resumable", [False, True])
@pytest.mark.parametrize("mode", PAIRS)
def test_run_trains_on_several_loaders_at_once(mode: str, resumable: bool, perturb: str) -> None:
    combine, batches = PAIRS[mode]
    kind = ResumableLoader if resumable else DataLoader
    module = build(Pair)
    run = trainer(callback(perturb=perturb), max_epochs=2)
    run.fit(module, combine(kind(images(40), 8), kind(images(12, 5), 4)), loader(16, seed=1))
    assert module.events.count("weight") == 2 * batches
    assert_moved(module)


class Named(NamedTuple):
    x: Tensor
    rest: dict[str, Tensor]


@dataclass
class Record:
    x: Tensor
    rest: tuple[Tensor]


class Strange:
    """Neither a collection nor a dataclass."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


PACKED: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "dict": (lambda x, y: {"x": x, "y": y}, lambda b: (b["x"], b["y"])),
    "nested tuple": (lambda x, y: ((x, (y, x.mean((1, 2, 3)))),), lambda b: (b[0][0], b[0][1][0])),
    "nested dict": (lambda x, y: {"in": {"x": [x]}, "out": (y,)}, lambda b: (b["in"]["x"][0], b["out"][0])),
    "named tuple": (lambda x, y: Named(x, {"y": y}), lambda b: (b.x, b.rest["y"])),
    "dataclass": (lambda x, y: Record(x, (y,)), lambda b: (b.x, b.rest[0])),
    "strings beside tensors": (
        lambda x, y: {"names": [f"image {i}" for i in range(len(x))], "x": x, "y": y},
        lambda b: (b["x"], b["y"]),
    ),
    "strange": (Strange, lambda b: (b.x, b.y)),
}


def packing(kind: str, n: int, seed: int = 0) -> DataLoader[Any]:
    pack, _ = PACKED[kind]
    return DataLoader(images(n, seed), batch_size=8, collate_fn=lambda rows: pack(*default_collate(rows)))


def unpacking(kind: str, base: type[Traced] = Traced) -> type[Traced]:
    """A module whose losses unpack the batch."""
    _, unpack = PACKED[kind]

    class Unpacks(base):  # type: ignore[misc, valid-type]
        def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_loss(unpack(batch), batch_idx)

        def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
            return super().validation_loss(unpack(batch), batch_idx)

    return Unpacks


def packed_run(kind: str, base: type[Traced] = Traced, perturb: str = "example") -> tuple[Traced, Any]:
    module = build(unpacking(kind, base))
    run = trainer(callback(perturb=perturb), max_epochs=2)
    run.fit(module, packing(kind, 40), packing(kind, 16, 1))
    return module, run


def plain_run(n: int = 40, valid: int = 16, perturb: str = "example") -> tuple[Traced, Any]:
    module = build()
    run = trainer(callback(perturb=perturb), max_epochs=2)
    run.fit(module, loader(n), loader(valid, seed=1))
    return module, run


@pytest.mark.parametrize("perturb", PERTURB)
@pytest.mark.parametrize("kind", [kind for kind in PACKED if kind != "strange"])
def test_batches_of_any_structure_give_the_same_run(kind: str, perturb: str) -> None:
    (module, run), (plain, plain_trainer) = packed_run(kind, perturb=perturb), plain_run(perturb=perturb)
    assert_moved(module)
    assert_equal_weights(module, plain)
    assert torch.equal(run.callback_metrics["val_loss"], plain_trainer.callback_metrics["val_loss"])


def test_fit_names_the_hook_for_a_batch_of_unknown_size() -> None:
    message = r"examples in a batch of type Strange cannot be inferred; override infer_batch_size\(self, batch\) in Unp"
    with pytest.raises(ValueError, match=message):
        packed_run("strange")


@UNCHECKED
@pytest.mark.parametrize("perturb", PERTURB)
def test_batch_of_unknown_size_trains_with_the_hook(perturb: str) -> None:
    class Knows(Traced):
        def infer_batch_size(self, batch: Any) -> int:
            return len(batch.y)

    module, run = packed_run("strange", Knows, perturb)
    plain, plain_trainer = plain_run(perturb=perturb)
    assert_moved(module)
    assert_equal_weights(module, plain)
    assert torch.equal(run.callback_metrics["val_loss"], plain_trainer.callback_metrics["val_loss"])


@pytest.mark.parametrize("automatic", MODES)
@pytest.mark.parametrize("perturb", PERTURB)
@pytest.mark.parametrize("rest", [3, 1])
def test_smaller_last_batch_is_trained_and_validated_but_not_tuned_on(rest: int, perturb: str, automatic: bool) -> None:
    """Training draws a row per example of it, the stream drops it, and validation counts its examples once each."""
    rows: list[int] = []
    tuned: set[int] = set()

    class Watch(Traced):
        def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
            if self.runs_for == "weights":  # as in the check of the rows
                rows.append(len(self.hyperparameters.bound_sample()))
            return super().training_loss(batch, batch_idx)

        def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
            if torch.is_grad_enabled():
                tuned.add(len(batch[1]))
            return super().validation_loss(batch, batch_idx)

    module, validation = build(Watch, automatic), loader(16 + rest, seed=1)
    run = trainer(callback(perturb=perturb), max_epochs=2)
    run.fit(module, loader(24 + rest), validation)
    assert rows == ([8, 8, 8, rest] if perturb == "example" else [1] * 4) * 2
    assert tuned == {8}
    assert_moved(module)
    assert float(run.callback_metrics["val_loss"]) == pytest.approx(expected_loss(module, validation), rel=1e-5)


class Mixed(Traced):
    """Gets a batch with a scalar in front, as a temperature or a weight of the loss."""

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        if self.runs_for == "weights":
            assert self.hyperparameters["dropout"].shape == (len(batch["y"]),)
        return super().training_loss((batch["x"], batch["y"]), batch_idx)

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return super().validation_loss((batch["x"], batch["y"]), batch_idx)


def collated(extra: Callable[[int], Tensor]) -> Callable[[Any], Any]:
    """Puts another tensor in front of the examples of a batch."""

    def collate(items: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        x, y = (torch.stack([torch.as_tensor(part) for part in parts]) for parts in zip(*items, strict=True))
        return {"extra": extra(len(items)), "x": x, "y": y}

    return collate


def test_scalars_in_a_batch_do_not_count_as_examples() -> None:
    module, collate = build(Mixed), collated(lambda n: torch.tensor(2.0))
    trainer(callback(perturb="example"), max_epochs=1).fit(
        module, loader(24, collate_fn=collate), loader(16, seed=1, collate_fn=collate)
    )
    assert_moved(module)


@pytest.mark.parametrize("extra", [lambda n: torch.ones(3), lambda n: torch.ones(2 * n)], ids=["fixed", "twice"])
def test_rows_of_a_batch_of_several_sizes_need_the_hook(extra: Callable[[int], Tensor]) -> None:
    data = loader(24, collate_fn=collated(extra)), loader(16, seed=1, collate_fn=collated(extra))
    message = r"batch of type dict cannot be inferred; override infer_batch_size.* in Mixed"
    with pytest.raises(ValueError, match=message):
        trainer(callback(perturb="example"), max_epochs=1).fit(build(Mixed), *data)
    module = build(Mixed, False)
    module.infer_batch_size = lambda batch: len(batch["y"])  # type: ignore[method-assign]
    trainer(callback(perturb="example"), max_epochs=1).fit(module, *data)
    assert_moved(module)


def test_a_batch_of_several_sizes_is_weighted_in_the_mean_of_an_epoch_as_lightning_weights_it() -> None:
    class Shared(Mixed):
        def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
            return Traced.training_loss(self, (batch["x"], batch["y"]), batch_idx)

    collate = collated(lambda n: torch.ones(3))
    run = trainer(callback(perturb="batch"), max_epochs=1)
    with pytest.warns(UserWarning, match="ambiguous collection"):
        run.fit(build(Shared), loader(24, collate_fn=collate), loader(16, seed=1, collate_fn=collate))
    assert torch.isfinite(run.callback_metrics["val_loss"])
