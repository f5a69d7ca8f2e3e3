"""Names and bases that a user's class shares with `STNModule` by chance."""

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from features.test_existing_modules import Existing, callback, fit
from support import LitSmall, loader
from torch import Tensor, nn

from lightning_stn import Float, STNModule
from lightning_stn.collisions import public_names

RATES = {"dropout": Float(0.0, 0.9, init=0.1)}
NAMES = sorted(public_names(STNModule, L.LightningModule))


def test_names_of_the_mixin_are_these() -> None:
    """A further name needs a rule for what a user may do with it."""
    assert [
        *("convert", "export", "hyperparameters", "infer_batch_size", "parameter_groups", "runs_for", "schedule"),
        *("sweep", "training_loss", "validation_loss"),
    ] == NAMES


def test_private_names_of_the_mixin_meet_no_others() -> None:
    module = LitSmall()
    own = {name for base in STNModule.__mro__ for name in vars(base) if base.__module__.startswith("lightning_stn")}
    own |= vars(module).keys() - vars(L.LightningModule()).keys()
    private = {name for name in own if name.startswith("_") and not name.endswith("__")}
    assert private
    assert {name for name in private if not name.startswith("_stn_")} <= vars(L.LightningModule).keys()


@pytest.mark.parametrize("name", ["_outputs", "_perturb", "_muted", "_evaluation_step", "_inherited", "perturb"])
def test_other_names_are_free_for_attributes_and_methods(name: str) -> None:
    class Keeps(LitSmall):
        def __init__(self) -> None:
            super().__init__()
            setattr(self, name, [])

        def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
            getattr(self, name).append(batch_idx)
            return super().training_loss(batch, batch_idx)

    class Defines(LitSmall):
        pass

    module = Keeps()
    fit(module)
    assert getattr(module, name) == [0, 1, 2]
    setattr(Defines, name, lambda self: 1 / 0)
    fit(Defines())


ATTRIBUTES = ["hyperparameters", "runs_for", "schedule"]
"""Names of the mixin that are no methods."""

CRITERIA: list[Any] = [nn.CrossEntropyLoss(), F.cross_entropy, torch.tensor(1.0), None, [], nn.Parameter(torch.ones(1))]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", CRITERIA, ids=lambda value: type(value).__name__)
def test_assignment_to_a_name_of_the_mixin_is_refused(name: str, value: Any) -> None:
    class Assigns(LitSmall):
        def __init__(self) -> None:
            super().__init__()
            setattr(self, name, value)

    with pytest.raises(TypeError, match=f"Assigns: cannot assign .* to '{name}'.*STNModule uses otherwise.*{name}_"):
        Assigns()


class Keyed(Existing):
    def __init__(self) -> None:
        super().__init__()
        self.hyperparameters = {"lr": 0.05}


class Criterion(Existing):
    def __init__(self) -> None:
        super().__init__()
        self.training_loss = nn.CrossEntropyLoss()


@pytest.mark.parametrize(("base", "name"), [(Keyed, "hyperparameters"), (Criterion, "training_loss")])
def test_assignment_in_an_existing_module_is_refused_at_its_line(base: type[Existing], name: str) -> None:
    class Tuned(STNModule, base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__(hyperparameters=RATES)

    with pytest.raises(TypeError, match=f"Tuned: cannot assign .* to '{name}'") as error:
        Tuned()
    assert error.traceback[-3].name == "__init__"
    assert str(error.traceback[-3].path) == __file__


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `torch.compile` and other decorators that keep the signature."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return run


def test_function_with_the_parameters_of_a_method_may_take_its_place() -> None:
    module: Any = LitSmall()
    calls = []

    def training_loss(batch: Any, batch_idx: int) -> Tensor:
        calls.append(batch_idx)
        return LitSmall.training_loss(module, batch, batch_idx)

    module.training_loss = training_loss
    module.infer_batch_size = lambda batch: len(batch[1])
    fit(module, callback(perturb="example"))
    assert set(calls) == {0, 1, 2}
    del module.training_loss, module.infer_batch_size
    module.validation_loss = decorated(module.validation_loss)
    fit(module)


BODIES: dict[str, Any] = {
    "hyperparameters": RATES,
    "runs_for": "weights",
    "training_loss": nn.CrossEntropyLoss(),
    "validation_loss": None,
    "convert": True,
    "export": property(lambda self: None),
    "infer_batch_size": 8,
    "schedule": "cosine",
}


@pytest.mark.parametrize("name", BODIES)
def test_class_that_gives_a_name_of_the_mixin_another_meaning_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"Own defines {name}, which STNModule uses otherwise: {name}.*another name"):
        type("Own", (STNModule,), {name: BODIES[name]})
    front = type("Own", (), {name: BODIES[name]})
    with pytest.raises(TypeError, match=f"Own defines {name}, which STNModule uses otherwise"):
        type("Tuned", (front, STNModule), {})


def test_class_may_extend_methods_of_the_mixin() -> None:
    class Extends(LitSmall):
        def export(self, net: nn.Module | None = None) -> nn.Module:
            return nn.Sequential(super().export(net), nn.Softmax(-1))

        @staticmethod
        def infer_batch_size(batch: Any) -> int:  # type: ignore[override]
            return len(batch[1])

    assert isinstance(Extends().export(), nn.Sequential)
    fit(Extends(), callback(perturb="example"))


class Helpers(Existing):
    """Calls its own method by a name of the mixin."""

    def training_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.training_loss(self.net(batch[0]), batch[1])


def method(*_: Any) -> None:
    """Stands for a method of another meaning."""


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ATTRIBUTES])
def test_method_of_an_existing_module_that_the_mixin_would_hide_is_refused(name: str) -> None:
    base = type("Base", (Existing,), {name: method})
    message = f"Base.{name} would be hidden by STNModule in Tuned.*or write {name} = Base.{name}"
    with pytest.raises(TypeError, match=message):
        type("Tuned", (STNModule, base), {})
    kept = type("Tuned", (STNModule, base), {name: getattr(base, name)})
    assert getattr(kept, name) is method


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attribute_of_an_existing_module_that_collides_with_one_of_the_mixin_is_refused(name: str) -> None:
    base = type("Base", (Existing,), {name: property(method)})
    with pytest.raises(TypeError, match=f"Base.{name} would be hidden.*Give each another name there"):
        type("Tuned", (STNModule, base), {})


def test_helper_that_the_mixin_would_hide_is_called_by_its_class() -> None:
    with pytest.raises(TypeError, match=r"Helpers\.training_loss would be hidden by STNModule"):
        type("Tuned", (STNModule, Helpers), {})

    class Tuned(STNModule, Helpers):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(hyperparameters=RATES)
            self.net = self.convert(self.net, dropout="dropout")

        def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
            return Helpers.training_loss(self, self.net(batch[0]), batch[1])

        validation_loss = training_loss

    assert fit(Tuned()).global_step == 3


class Grandchild(Existing):
    pass


class Ready(STNModule, Existing):
    pass


WRONG: dict[str, tuple[tuple[type, ...], str]] = {
    "existing": ((Existing, STNModule), r"class Own\(STNModule, Existing\)"),
    "its subclass": ((Grandchild, STNModule), r"class Own\(STNModule, Grandchild\)"),
    "a subclass of the mixin": ((Grandchild, Ready), r"class Own\(Ready, Grandchild\)"),
    "several": ((Existing, STNModule, L.LightningModule), r"class Own\(STNModule, Existing, LightningModule\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bases_in_the_wrong_order_are_refused_with_the_right_one(case: str) -> None:
    bases, right = WRONG[case]
    with pytest.raises(TypeError, match=f"Expected STNModule in front of other bases.*; write {right}"):
        type("Own", bases, {})


class Losses:
    """Both losses, for several modules."""

    def training_loss(self: Any, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    validation_loss = training_loss


def test_class_that_is_no_module_may_stand_in_front() -> None:
    class Own(Losses, STNModule):
        def __init__(self) -> None:
            super().__init__(hyperparameters=RATES)
            self.net = self.convert(Existing().net, dropout="dropout")

        configure_optimizers = Existing.configure_optimizers

    assert fit(Own()).global_step == 3
    with pytest.raises(TypeError, match=r"Losses\.training_loss, Losses\.validation_loss would be hidden"):
        type("Behind", (STNModule, Losses), {})


@pytest.mark.parametrize("twice", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_module_can_be_copied(twice: Callable[[LitSmall], LitSmall]) -> None:
    module = LitSmall()
    images = next(iter(loader(8)))[0]
    assert torch.equal(twice(module).eval().net(images), module.eval().net(images))
