"""Wrong uses of the public API: each raises its own message and leaves nothing half changed."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import StochasticWeightAveraging
from support import fit, images, loader, small_net, trainer
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from lightning_stn import (
    STN,
    Categorical,
    ConversionError,
    DeltaSTN,
    Float,
    HyperparameterSet,
    Integer,
    PhaseSchedule,
    ResumableLoader,
    Scales,
    Schedule,
    STNCallback,
    STNModule,
    Warmup,
    WeightStep,
    convert,
    export,
    recommended_hyperparameters,
)
from lightning_stn.augment import (
    ColorJitter,
    CutMix,
    Cutout,
    GaussianNoise,
    InputScale,
    MixUp,
    RandomAffine,
    RandomErasing,
    RandomHorizontalFlip,
)
from lightning_stn.binding import BoundModule, attach_all, bind, bind_weight_phase
from lightning_stn.functional import RowsError
from lightning_stn.layers import AffineResponse, ResponseLayer, ResponseLinear, register_response, registry
from lightning_stn.regularizers import (
    ActivationPenalty,
    Dropout,
    Dropout2d,
    DropPath,
    EmbeddingDropout,
    L2Penalty,
    LabelSmoothing,
    LockedDropout,
    TemporalActivationPenalty,
    WeightDrop,
)
from lightning_stn.schedule import Row

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

NAN, INF = math.nan, math.inf


# State that a wrong use could change, and how it is compared.


def snapshot(subject: Any) -> Any:
    """State of a subject that a wrong use could change, as plain values."""
    if isinstance(subject, Tensor):
        return subject.dtype, list(subject.shape), subject.requires_grad, subject.detach().numpy().tobytes()
    if isinstance(subject, nn.Module):
        return _of_module(subject)
    if isinstance(subject, STNCallback):
        return snapshot(subject.state_dict()), subject._arguments, subject._restored
    if isinstance(subject, Schedule):
        return dict(subject.specifications), list(subject.rows), subject.warmup
    if isinstance(subject, ResumableLoader):
        return snapshot(vars(subject))
    if isinstance(subject, Path):
        return {str(path): path.read_bytes() for path in sorted(subject.rglob("*")) if path.is_file()}
    if isinstance(subject, dict):
        return {key: snapshot(value) for key, value in subject.items()}
    if isinstance(subject, list | tuple):
        return [snapshot(part) for part in subject]
    return subject


def _of_module(root: nn.Module) -> dict[str, Any]:
    sets = [module for module in root.modules() if isinstance(module, HyperparameterSet)]
    sets += [module.hyperparameters for module in root.modules() if isinstance(module, BoundModule)]
    return {
        "modules": {
            name: (
                type(module),
                module.training,
                module.extra_repr(),
                id(module.hyperparameters) if isinstance(module, BoundModule) else None,
            )
            for name, module in root.named_modules()
        },
        "tensors": {name: snapshot(tensor) for name, tensor in root.state_dict(keep_vars=True).items()},
        "gradients": {name: parameter.grad is None for name, parameter in root.named_parameters()},
        "sets": [_of_set(one) for one in {id(one): one for one in sets if one is not None}.values()],
        "step": getattr(root, "_stn_phase", None),
        "own hooks": sorted(name for name in vars(root) if hasattr(type(root), name) and name != "hyperparameters"),
    }


def _of_set(one: HyperparameterSet) -> dict[str, Any]:
    return {
        "names": one.names,
        "values": one.values(),
        "tensors": snapshot([one.unconstrained, one.raw_scale]),
        "bound": snapshot(vars(one.current_pass)),
        "closed": one._frozen,
    }


def world() -> list[Any]:
    """Global state: registered responses, autograd mode, default dtype."""
    return [dict(registry._RESPONSES), torch.is_grad_enabled(), torch.get_default_dtype()]


# Subjects of the wrong uses.


def a_set() -> HyperparameterSet:
    return HyperparameterSet(
        {
            "rate": Float(0.0, 0.9, init=0.1),
            "shared": Float(0.0, 0.9, init=0.1, perturb="batch"),
            "count": Integer(0, 4, init=1),
            "choice": Categorical(["none", "mirror"], init="none"),
            "open": Float(None, None, init=0.0),
        }
    )


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))


def responding(module: nn.Module, rows: int = 3) -> tuple[nn.Module, HyperparameterSet]:
    """A converted module in the weight phase, bound to a sample of `rows` rows."""
    hyperparameters = a_set()
    net = convert(module, hyperparameters)
    bind_weight_phase(hyperparameters, hyperparameters.sample(rows))
    return net, hyperparameters


def acting(module: nn.Module, rows: int = 3) -> tuple[nn.Module, HyperparameterSet]:
    """A regulariser in the weight phase, bound to a sample of `rows` rows."""
    hyperparameters = a_set()
    attach_all(module, hyperparameters)
    bind_weight_phase(hyperparameters, hyperparameters.sample(rows))
    return module, hyperparameters


def pixels(*shape: int) -> Tensor:
    return torch.rand(*shape or (3, 3, 8, 8))


def recorded() -> Schedule:
    schedule = Schedule({"rate": Float(0.0, 1.0), "op": Categorical(("a", "b"), "a")})
    scales = {"rate": 0.5, "op_a": 0.5, "op_b": 0.5}
    for step in (10, 20):
        schedule.append(Row(step, 0, {"rate": 0.1, "op": "a"}, scales))
    return schedule


def written(text: str) -> Callable[[Path], Path]:
    """Write the text to `schedule.csv` in a folder; return the folder."""

    def write(folder: Path) -> Path:
        (folder / "schedule.csv").write_text(text)
        return folder

    return write


class Lit(STNModule):
    """A correct module by default. Its learning rate is zero, so that only a wrong use can change a weight."""

    def __init__(
        self,
        specifications: dict[str, Any] | None = None,
        *,
        net: Callable[[], nn.Module] = mlp,
        dropout: str | None = "rate",
        beside: nn.Module | None = None,
        training: Callable[[Tensor], Any] | None = None,
        validation: Callable[[Tensor], Any] | None = None,
        rows: Any = None,
        tuning: Any = (),
        automatic: bool = False,
    ) -> None:
        super().__init__(hyperparameters=specifications or {"rate": Float(0.0, 0.9, init=0.1)})
        STN().prepare(self, self.hyperparameters)  # as the callback does before it checks anything else
        self.automatic_optimization = automatic
        self.net = self.convert(net(), dropout=dropout)
        self.beside = nn.Identity() if beside is None else beside
        self.training_output, self.validation_output, self.rows = training, validation, rows
        if tuning != ():
            self.tuning_dataloader = lambda: tuning

    def training_loss(self, batch: Any, batch_idx: int) -> Any:
        output = self.net(self.beside(batch[0]))
        return self.training_output(output) if self.training_output else F.cross_entropy(output, batch[1])

    def validation_loss(self, batch: Any, batch_idx: int) -> Any:
        output = self.net(batch[0])
        return self.validation_output(output) if self.validation_output else F.cross_entropy(output, batch[1])

    def infer_batch_size(self, batch: Any) -> int:
        return super().infer_batch_size(batch) if self.rows is None else self.rows

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Unwrapped(Lit):
    def __init__(self) -> None:
        STNModule.__init__(self, hyperparameters={"rate": Float(0.0, 0.9, init=0.1)})
        self.net = mlp()


class Losses(STNModule):
    def __init__(self) -> None:
        super().__init__(hyperparameters={"rate": Float(0.0, 0.9, init=0.1)})
        self.net = self.convert(mlp(), dropout="rate")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class NoValidationLoss(Losses):
    def training_loss(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]).sum()


class NoTrainingLoss(Losses):
    def validation_loss(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]).sum()


class OtherParameters(Lit):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for name, p in self.named_parameters() if "response" not in name], lr=0.0)


class Plateau(Lit):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)]


class Plain(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(36))

    def forward(self, input: Tensor) -> Tensor:
        return input * self.table


class OwnLinear(nn.Linear):
    pass


class NoPlain(ResponseLayer, OwnLinear):  # type: ignore[misc]
    pass


class OtherPlain(AffineResponse, OwnLinear):  # type: ignore[misc]
    plain_type = nn.Linear


class ReversedBases(OwnLinear, AffineResponse):  # type: ignore[misc]
    plain_type = OwnLinear


class SecondCallback(STNCallback):
    pass


def quick(**arguments: Any) -> STNCallback:
    return STNCallback(**{"train_steps": 1, "warmup": 0, "lr": 0.05, "seed": 1, **arguments})


# The cases.


class Case(NamedTuple):
    """A wrong use: `do` acts on the subject that `given` builds, which may use a temporary folder."""

    given: Callable[[Path], Any]
    do: Callable[[Any], Any]
    error: type[Exception]
    message: str


def building(error: type[Exception], message: str, build: Callable[[], Any]) -> Case:
    """A wrong argument to a constructor or function, so that there is no subject."""
    return Case(lambda folder: None, lambda given: build(), error, message)


def using(error: type[Exception], message: str, given: Callable[[], Any], do: Callable[[Any], Any]) -> Case:
    """A wrong use of the subject that `given` builds."""
    return Case(lambda folder: given(), do, error, message)


def starting(
    error: type[Exception],
    message: str,
    module: Callable[[], L.LightningModule],
    callback: Callable[[], STNCallback] = quick,
    **options: Any,
) -> Case:
    """A run that is refused before its first step: neither module nor callback changes."""
    return using(
        error, message, lambda: [module(), callback()], lambda given: fit(*given, **{"max_epochs": 1, **options})
    )


def running(
    error: type[Exception],
    message: str,
    module: Callable[[], L.LightningModule],
    callback: Callable[[], STNCallback] = quick,
) -> Case:
    """A run that fails in a step; its module, with the regularisers attached beforehand, must not change."""

    def attached() -> Any:
        lit: Any = module()
        attach_all(lit, lit.hyperparameters)
        return lit

    return using(error, message, attached, lambda module: fit(module, callback(), max_epochs=1))


SPECIFICATIONS = {
    "Float: an empty range": building(
        ValueError, r"expected low < high, got 1\.0 and 0\.0; the range is empty", lambda: Float(1.0, 0.0, init=0.5)
    ),
    "Float: init on a bound": building(
        ValueError,
        r"init=0\.0.*init strictly between low and high.*move init inwards",
        lambda: Float(0.0, 1.0, init=0.0),
    ),
    "Float: init beyond a bound": building(
        ValueError, r"init=2\.0.*init strictly between low and high.*widen the range", lambda: Float(0.0, 1.0, init=2.0)
    ),
    "Float: init is nan": building(
        ValueError, "init to be a finite number, got nan; write it as a plain", lambda: Float(0.0, 1.0, init=NAN)
    ),
    "Float: an infinite bound": building(
        ValueError, "high to be a finite number, got inf; write it as a plain", lambda: Float(0.0, INF, init=0.5)
    ),
    "Float: text": building(
        ValueError, "low to be a finite number, got '0'; write it as a plain", lambda: Float("0", 1.0, init=0.5)
    ),
    "Float: a tensor": building(
        ValueError,
        r"init to be a finite number, got tensor\(0\.5000\); write it as a plain Python number",
        lambda: Float(0.0, 1.0, init=torch.tensor(0.5)),
    ),
    "Float: NumPy's float32": building(
        ValueError, r"init to be a finite number, got .*0\.5.*; write it", lambda: Float(0.0, 1.0, init=np.float32(0.5))
    ),
    "Float: a bool": building(
        ValueError, "high to be a finite number, got True; write it as a plain", lambda: Float(0.0, True, init=0.5)
    ),
    "Float: log of a negative range": building(
        ValueError,
        r"log=True needs a positive range, got low=-1\.0; give low >= 0",
        lambda: Float(-1.0, 1.0, 0.5, log=True),
    ),
    "Float: log of an open range": building(
        ValueError, "log=True needs a positive range, got low=None; give", lambda: Float(None, 1.0, init=0.5, log=True)
    ),
    "Float: log is text": building(
        ValueError, "log to be True or False, got 'yes'", lambda: Float(0.0, 1.0, init=0.5, log="yes")
    ),
    "Float: a negative scale": building(
        ValueError, r"scale > 0, .*got -1\.0; to hold a value fixed", lambda: Float(0.0, 1.0, init=0.5, scale=-1.0)
    ),
    "Float: scale is None": building(
        ValueError, "scale to be a finite number, got None; 0.5 suits", lambda: Float(0.0, 1.0, init=0.5, scale=None)
    ),
    "Float: an unknown perturb": building(
        ValueError, "perturb='example' or perturb='batch', got 'row'", lambda: Float(0.0, 1.0, init=0.5, perturb="row")
    ),
    "Integer: a float": building(
        ValueError, r"high to be a whole number, got 4\.0; write it", lambda: Integer(0, 4.0, init=1)
    ),
    "Integer: an open range": building(
        ValueError, "high to be a whole number, got None; write it", lambda: Integer(0, None, init=1)
    ),
    "Integer: init outside": building(
        ValueError, "low <= init <= high, got init=5; move it into the range", lambda: Integer(0, 4, init=5)
    ),
    "Integer: a range of one number": building(
        ValueError, "expected low < high, got 3 and 3; the range is empty", lambda: Integer(3, 3, init=3)
    ),
    "Integer: too large a range": building(
        ValueError,
        r"Integer\(0, 10000000, .*cannot be resolved; use Float\(..., log=True\)",
        lambda: Integer(0, 10**7, init=1),
    ),
    "Integer: a bool": building(ValueError, "init to be a whole number, got True", lambda: Integer(0, 4, init=True)),
    "Categorical: text": building(
        ValueError, "choices to be a list or tuple of strings, got 'ab'", lambda: Categorical("ab", init="a")
    ),
    "Categorical: one choice": building(
        ValueError, "at least two choices, got 1; with one nothing is tuned", lambda: Categorical(["a"], init="a")
    ),
    "Categorical: the same choice twice": building(
        ValueError,
        r"distinct choices, got some of \['a', 'a'\] twice; rename",
        lambda: Categorical(["a", "a"], init="a"),
    ),
    "Categorical: unknown init": building(
        ValueError, r"init to be one of \['a', 'b'\], got 'c'", lambda: Categorical(["a", "b"], init="c")
    ),
    "Categorical: a line break": building(
        ValueError,
        r"printable characters, got \['a\\n'\]; .*leave out line breaks",
        lambda: Categorical(["a\n", "b"], "b"),
    ),
    "recommended_hyperparameters: unknown task": building(
        ValueError, "task='image' or task='language', got 'audio'; build", lambda: recommended_hyperparameters("audio")
    ),
}

ONE = {"a": Float(0.0, 1.0, init=0.5)}
COLLIDING = {"a": ONE["a"], "a_scale": ONE["a"]}


def without(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: tensor + 1 for name, tensor in state.items() if name != key}


SETS = {
    "set: no hyperparameters": building(
        ValueError,
        "at least one hyperparameter, got none; name what",
        lambda: convert(nn.Linear(2, 2), HyperparameterSet({})),
    ),
    "set: a list": building(
        TypeError, r"as a dictionary from names to .*got \[Float.*; write \{", lambda: HyperparameterSet([ONE["a"]])
    ),
    "set: a number": building(
        TypeError,
        r"'a' to be a Hyperparameter, such as a Float, .*got 0\.5; write for instance Float\(",
        lambda: HyperparameterSet({"a": 0.5}),
    ),
    "set: a class": building(
        TypeError,
        r"'a' to be a Hyperparameter, .*got <class.*Float'>; write for",
        lambda: HyperparameterSet({"a": Float}),
    ),
    "set: a name with a space": building(
        ValueError,
        "name to be a Python identifier, got 'my rate'; it becomes",
        lambda: HyperparameterSet({"my rate": 1}),
    ),
    "set: a name that is a number": building(
        ValueError, "name to be a Python identifier, got 3; it becomes", lambda: HyperparameterSet({3: ONE["a"]})
    ),
    "set: colliding columns": building(
        ValueError, r"collides.*\['a_scale'\] would appear twice; rename", lambda: HyperparameterSet(COLLIDING)
    ),
    "set: an unknown name": using(
        KeyError, r"'rates'.*not one of \['rate', .*or 'rate' is misspelt", a_set, lambda given: given["rates"]
    ),
    "set: a position": using(
        KeyError, r"hyperparameter 0, which is not one of \['rate'", a_set, lambda given: given[0]
    ),
    "set: a name that is taken": using(
        ValueError,
        "'rate' exists already; choose another",
        a_set,
        lambda given: given.add({"b": ONE["a"], "rate": ONE["a"]}),
    ),
    "set: adding a value that is no specification": using(
        TypeError,
        "'c' to be a Hyperparameter, .*got None; write",
        a_set,
        lambda given: given.add({"b": ONE["a"], "c": None}),
    ),
    "set: adding a list": using(
        TypeError, r"as a dictionary.*got \['b'\]; write", a_set, lambda given: given.add(["b"])
    ),
    "set: adding colliding columns": using(
        ValueError, "collides.*rename", a_set, lambda given: given.add({"rate_scale": ONE["a"]})
    ),
    "set: adding after conversion": using(
        RuntimeError,
        "cannot be added once layers respond.*name them in the constructor",
        lambda: responding(nn.Linear(2, 2)),
        lambda given: given[1].add(ONE),
    ),
    "set: a negative number of rows": using(
        ValueError, "number of rows .*got -1; if infer_batch_size", a_set, lambda given: given.sample(-1)
    ),
    "set: a fractional number of rows": using(
        ValueError, r"number of rows .*got 2\.5; if infer_batch_size", a_set, lambda given: given.sample(2.5)
    ),
    "set: the state of a larger set": using(
        RuntimeError,
        "raw_scale has 7 entries, but the hyperparameters .* have 6; load it into a module with",
        a_set,
        # The first tensor fits, but must not be loaded either.
        lambda given: given.load_state_dict({"unconstrained": torch.ones(6), "raw_scale": torch.ones(7)}),
    ),
    "set: a missing key": using(
        RuntimeError,
        r"Missing key\(s\) in state_dict: \"raw_scale\"",
        a_set,
        lambda given: given.load_state_dict(without(given.state_dict(), "raw_scale")),
    ),
    "set: an unexpected key": using(
        RuntimeError,
        r"Unexpected key\(s\) in state_dict: \"sigma\"",
        a_set,
        lambda given: given.load_state_dict({**without(given.state_dict(), ""), "sigma": torch.ones(1)}),
    ),
}

NETWORKS = {
    "convert: a class": using(
        TypeError,
        "net to be a network, .*got <class.*Linear'>; build it",
        a_set,
        lambda given: convert(nn.Linear, given),
    ),
    "convert: None as the network": using(
        TypeError, "net to be a network, .*got None; build it", a_set, lambda given: convert(None, given)
    ),
    "convert: a dictionary as the set": using(
        TypeError, "to be a HyperparameterSet, got dict; build", mlp, lambda given: convert(given, ONE)
    ),
    "convert: an unknown dropout": using(
        KeyError,
        r"dropout=.*'rat', which is not one of \['rate', .*or 'rate' is misspelt",
        lambda: [mlp(), a_set()],
        lambda given: convert(*given, dropout="rat"),
    ),
    "convert: a misspelt per-layer": using(
        KeyError,
        "a name or 'per-layer', reads the hyperparameter 'per_layer', which is not one of",
        lambda: [mlp(), a_set()],
        lambda given: convert(*given, dropout="per_layer"),
    ),
    "convert: a rate as dropout": using(
        KeyError,
        r"a name or 'per-layer', reads the hyperparameter 0\.5, which is not one of",
        lambda: [mlp(), a_set()],
        lambda given: convert(*given, dropout=0.5),
    ),
    "convert: a choice as dropout": using(
        ValueError,
        "dropout=.*expects a number, but the hyperparameter 'choice' is a Categorical; name a Float",
        lambda: [mlp(), a_set()],
        lambda given: convert(*given, dropout="choice"),
    ),
    "convert: dropout without bounds": using(
        ValueError,
        r"dropout=.*expected p in \[0, 1\], but the hyperparameter 'open' is Float.*narrow its range",
        lambda: [mlp(), a_set()],
        lambda given: convert(*given, dropout="open"),
    ),
    "convert: an unknown drop_path": using(
        KeyError,
        "drop_path=.*'rat'.*or 'rate' is misspelt",
        lambda: [nn.Sequential(nn.Linear(2, 2), StochasticDepth(0.1, "row")), a_set()],
        lambda given: convert(*given, drop_path="rat"),
    ),
    "convert: drop_path beyond 1": using(
        ValueError,
        r"drop_path=.*expected p in \[0, 1\], but the hyperparameter 'count' is Integer.*narrow its range",
        lambda: [nn.Sequential(nn.Linear(2, 2), StochasticDepth(0.1, "row")), a_set()],
        lambda given: convert(*given, drop_path="count"),
    ),
    "convert: a converted network": using(
        ConversionError,
        r"1 \(ResponseLinear\): converted already.*\n.*\nLeave a module plain with exclude",
        lambda: responding(mlp()),
        lambda given: convert(*given),
    ),
    "convert: layers that cannot respond": using(
        ConversionError,
        r"1 \(ParameterList\): its parameters are read from outside.*\n  2 \(Embedding\): .*\n.*register_response",
        lambda: [
            nn.Sequential(nn.Linear(2, 2), nn.ParameterList([torch.ones(1)]), nn.Embedding(2, 2, max_norm=1.0)),
            a_set(),
        ],
        lambda given: convert(*given),
    ),
    "convert: a lazy layer": using(
        ConversionError,
        r"1 \(LazyLinear\): its parameters have no shape yet; run one batch",
        lambda: [nn.ModuleList([nn.Linear(2, 2)]), a_set()],
        lambda given: convert(nn.Sequential(given[0][0], nn.LazyLinear(2)), given[1]),
    ),
    "convert: an embedding with max_norm": using(
        ConversionError,
        r"1 \(Embedding\): max_norm rewrites the weights.*\n.*exclude=\[name or type\]",
        lambda: [nn.Sequential(nn.Linear(2, 2), nn.Embedding(3, 2, max_norm=1.0)), a_set()],
        lambda given: convert(*given),
    ),
    "convert: a dropout that cannot be tuned": using(
        ConversionError,
        r"1 \(FeatureAlphaDropout\): this kind of dropout cannot be tuned.*\n.*exclude=",
        lambda: [nn.Sequential(nn.Linear(2, 2), nn.FeatureAlphaDropout()), a_set()],
        lambda given: convert(*given, dropout="rate"),
    ),
    "convert: per-layer with a rate above the range": using(
        ConversionError,
        r"1 \(Dropout\): starts at p=0\.95, but a tuned rate ends at 0\.9.*\n.*exclude=",
        lambda: [nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.95)), a_set()],
        lambda given: convert(*given, dropout="per-layer"),
    ),
    "convert: per-layer with a name that is taken": using(
        ValueError,
        "'dropout_3' exists already; choose another name",
        lambda: [mlp(), HyperparameterSet({"dropout_3": ONE["a"]})],
        lambda given: convert(*given, dropout="per-layer"),
    ),
    "convert: per-layer in a second network": using(
        RuntimeError,
        "cannot be added once layers respond.*convert all networks in one call",
        lambda: [mlp(), responding(nn.Linear(2, 2))[1]],
        lambda given: convert(*given, dropout="per-layer"),
    ),
    "convert: exclude matches nothing": using(
        ConversionError,
        r"exclude: no module is called 'back\*'; there are \['0', '1', '2', '3', '4'\]",
        lambda: [mlp(), a_set()],
        lambda given: convert(*given, exclude=["1", "back*"]),
    ),
    "convert: exclude is text": using(
        ConversionError,
        "exclude: expected a list of names, .*got '1'; put it in a list",
        lambda: [mlp(), a_set()],
        lambda given: convert(*given, exclude="1"),
    ),
    "convert: exclude is a type": using(
        ConversionError,
        "exclude: expected a list of names, .*got <class.*Linear'>; put it in a list",
        lambda: [mlp(), a_set()],
        lambda given: convert(*given, exclude=nn.Linear),
    ),
    "convert: exclude names a module instance": using(
        ConversionError,
        r"exclude: expected names, patterns or types, got Linear\(.*; give its name or its type",
        lambda: [mlp(), a_set()],
        lambda given: convert(*given, exclude=[given[0][1]]),
    ),
    "export: a plain network": using(
        ValueError, "converted network, got Sequential without a response layer; pass what", mlp, export
    ),
    "export: a string": building(TypeError, "net to be a network, .*got 'net'; pass what", lambda: Lit().export("net")),
    "export: a module without a converted network": using(
        ValueError, r"Expected one converted network, got \[\]; say which", Unwrapped, lambda module: module.export()
    ),
    "export: a module with two converted networks": using(
        ValueError,
        r"Expected one converted network, got \['net', 'beside'\]; say which, as in export\(self\.net\)",
        lambda: two_networks(),
        lambda module: module.export(),
    ),
    "export: an unattached regulariser": using(
        RuntimeError,
        r"Dropout reads \['rate'\] but belongs to no HyperparameterSet yet.*call attach",
        lambda: nn.Sequential(Dropout("rate")),
        export,
    ),
    "export: a penalty inside the network": using(
        ValueError,
        "L2Penalty is a term of the training loss, .*hold it in the STNModule",
        lambda: responding(nn.Sequential(nn.Linear(2, 2), L2Penalty(0.1)))[0],
        export,
    ),
    "export: MixUp inside the network": using(
        ValueError,
        "MixUp takes images and labels, .*call it in training_loss",
        lambda: responding(nn.Sequential(nn.Linear(2, 2), MixUp(0.1, 3)))[0],
        export,
    ),
    "parameter_groups: a negative rate": using(
        ValueError, r"lr to be positive, got -1\.0; give", Lit, lambda module: module.parameter_groups(-1.0)
    ),
    "parameter_groups: lr is None": using(
        ValueError, "lr to be positive, got None; give", Lit, lambda module: module.parameter_groups(None)
    ),
    "parameter_groups: text": using(
        ValueError, "lr to be positive, got '30'; give", Lit, lambda module: module.parameter_groups("30")
    ),
    "parameter_groups: an infinite rate": using(
        ValueError, "lr to be positive, got inf; give", Lit, lambda module: module.parameter_groups(INF)
    ),
    "parameter_groups: gate_lr is zero": using(
        ValueError, "gate_lr to be positive, got 0; give", Lit, lambda module: module.parameter_groups(1.0, gate_lr=0)
    ),
    "parameter_groups: response_lr is zero": using(
        ValueError,
        "response_lr to be positive, got 0; give",
        Lit,
        lambda module: module.parameter_groups(1.0, response_lr=0),
    ),
    "infer_batch_size: an object without tensors": using(
        ValueError,
        r"batch of type object cannot be inferred; override infer_batch_size\(self, batch\) in Lit",
        Lit,
        lambda module: module.infer_batch_size(object()),
    ),
    "STNModule: a list": building(
        TypeError, r"hyperparameters as a dictionary from .*got \[1\]; write", lambda: STNModule(hyperparameters=[1])
    ),
    "training_step: called without a Trainer": using(
        RuntimeError,
        r"Lit trains without its callback; pass callbacks=\[STNCallback",
        Lit,
        lambda module: module.training_step((pixels(2, 1, 6, 6), torch.zeros(2)), 0),
    ),
}


def two_networks() -> Lit:
    module = Lit()
    module.beside = module.convert(nn.Linear(36, 36))
    return module


def call(*inputs: Any) -> Callable[[Any], Any]:
    """Call the module of the subject with these inputs."""
    return lambda given: given[0](*inputs)


LAYERS = {
    "Linear: fewer rows": using(
        RowsError,
        r"ResponseLinear: .*the sample's 3 rows .*got shape \[4, 2\]; keep the batch first, or share one row",
        lambda: responding(nn.Linear(2, 2)),
        call(torch.ones(4, 2)),
    ),
    "Linear: no batch": using(
        RowsError,
        r"ResponseLinear: .*3 rows .*got shape \[2\]; keep the batch first",
        lambda: responding(nn.Linear(2, 2)),
        call(torch.ones(2)),
    ),
    "Conv2d: more rows": using(
        RowsError,
        r"ResponseConv2d: .*3 rows .*got shape \[2, 1, 4, 4\]; keep the batch first",
        lambda: responding(nn.Conv2d(1, 2, 3)),
        call(torch.ones(2, 1, 4, 4)),
    ),
    "Embedding: time first": using(
        RowsError,
        r"ResponseEmbedding: .*3 rows .*got shape \[5, 3\]; keep the batch first",
        lambda: responding(nn.Embedding(4, 2)),
        call(torch.zeros(5, 3, dtype=torch.long)),
    ),
    "LayerNorm: fewer rows": using(
        RowsError,
        r"ResponseLayerNorm: .*3 rows .*got shape \[4, 2\]; keep the batch first",
        lambda: responding(nn.LayerNorm(2)),
        call(torch.ones(4, 2)),
    ),
    "BatchNorm2d: fewer rows, in evaluation": using(
        RowsError,
        r"ResponseBatchNorm2d: .*3 rows .*got shape \[4, 2, 3, 3\]; keep the batch first",
        lambda: responding(nn.BatchNorm2d(2).eval()),
        call(torch.ones(4, 2, 3, 3)),
    ),
    "LSTM: the batch first": using(
        RowsError,
        r"ResponseLSTM: .*3 rows, as dimension 1 .*got shape \[3, 5, 2\]; bring the input",
        lambda: responding(nn.LSTM(2, 2)),
        call(torch.ones(3, 5, 2)),
    ),
    "MultiheadAttention: time first": using(
        ValueError,
        r"ResponseMultiheadAttention: .*dimension 1 \(batch_first=False\).*3 rows, got shape \[3, 5, 4\]; bring the",
        lambda: responding(nn.MultiheadAttention(4, 2)),
        call(*[torch.ones(3, 5, 4)] * 3),
    ),
    "TransformerEncoderLayer: time first": using(
        ValueError,
        r"got batch_first=False and shape \[5, 3, 4\]; build the layer with batch_first=True",
        lambda: responding(nn.TransformerEncoderLayer(4, 2, 8)),
        call(torch.ones(5, 3, 4)),
    ),
    "generic response: a row for each example": using(
        ValueError,
        r"ResponseTokens: expected a sample of one row, .* got 3 rows; share one row",
        lambda: responding(Tokens()),
        call(torch.ones(3, 36)),
    ),
    "bind: another set's sample": using(
        ValueError,
        r"sample of shape \[n, 6\], a column for each .*got \[3, 2\]; draw one with",
        lambda: responding(nn.Linear(2, 2)),
        lambda given: bind(given[1], torch.ones(3, 2)).__enter__(),
    ),
    "bind_weight_phase: one dimension": using(
        ValueError,
        r"sample of shape \[n, 6\].*got \[6\]; draw one with",
        a_set,
        lambda given: bind_weight_phase(given, torch.ones(6)),
    ),
    "ResponseLinear: a dictionary": building(
        TypeError,
        "ResponseLinear: expected hyperparameters to be a HyperparameterSet, got dict; build",
        lambda: ResponseLinear(2, 2, hyperparameters=ONE),
    ),
    "register_response: a registered type": building(
        ValueError,
        "Linear already has ResponseLinear; pass overwrite=True",
        lambda: register_response(nn.Linear)(ResponseLinear),
    ),
    "register_response: without parentheses": building(
        TypeError,
        r"type of a plain module, got <class.*ResponseLinear'>; write @register_response\(nn\.Linear\)",
        lambda: register_response(ResponseLinear),
    ),
    "register_response: an instance": building(
        TypeError, r"type of a plain module, got OwnLinear\(.*; write", lambda: register_response(OwnLinear(2, 2))
    ),
    "register_response: a class without a response": building(
        TypeError,
        r"OwnLinear to subclass ResponseLayer and OwnLinear, .*got \['Linear', 'Module', 'object'\]; change its bases",
        lambda: register_response(OwnLinear)(OwnLinear),
    ),
    "register_response: a function": building(
        TypeError,
        r"convert to subclass ResponseLayer .*got \[\]; change",
        lambda: register_response(OwnLinear)(convert),
    ),
    "register_response: bases in the wrong order": building(
        TypeError,
        r"in that order, got \['OwnLinear', .*'ResponseLayer', .*change its bases",
        lambda: register_response(OwnLinear)(ReversedBases),
    ),
    "register_response: no plain type": building(
        TypeError,
        r"NoPlain\.plain_type to be OwnLinear, got None; write 'plain_type = OwnLinear'",
        lambda: register_response(OwnLinear)(NoPlain),
    ),
    "register_response: another plain type": building(
        TypeError,
        r"OtherPlain\.plain_type to be OwnLinear, got <class.*Linear'>; write",
        lambda: register_response(OwnLinear)(OtherPlain),
    ),
}


def constant(strength: str, got: str, build: Callable[[], Any]) -> Case:
    message = f"expected {strength} to be a hyperparameter's name or a number .*, got {got}"
    return building(ValueError, message, build)


REGULARIZERS = {
    "Dropout: beyond 1": constant("p", r"1\.5", lambda: Dropout(1.5)),
    "Dropout: nan": constant("p", "nan", lambda: Dropout(NAN)),
    "Dropout: a bool": constant("p", "True", lambda: Dropout(True)),
    "Dropout: None": constant("p", "None", lambda: Dropout(None)),
    "Dropout: whole numbers": using(
        ValueError,
        "Dropout: expected a floating point input, got torch.int64; convert",
        lambda: [Dropout(0.5)],
        call(torch.ones(3, 2, dtype=torch.long)),
    ),
    "Dropout: fewer rows": using(
        RowsError,
        r"one row per example, got 3 rows for an input of shape \[4, 2\]; keep the batch",
        lambda: acting(Dropout("rate")),
        call(torch.ones(4, 2)),
    ),
    "Dropout2d: no channels": using(
        ValueError,
        r"Dropout2d: .*4 dimensions, got shape \[3, 2\]; use the dropout of the right number",
        lambda: acting(Dropout2d("rate")),
        call(torch.ones(3, 2)),
    ),
    "DropPath: an unknown mode": building(
        ValueError, "mode='row' or mode='batch', got 'rows'", lambda: DropPath(0.1, mode="rows")
    ),
    "DropPath: text as share": building(
        ValueError, r"share to lie in \[0, 1\], got '1'", lambda: DropPath(0.1, share="1")
    ),
    "DropPath: a rate for each example of the batch": using(
        ValueError,
        r"DropPath: acts on the batch as a whole, but 'rate' has a value for each .*perturb='batch'",
        lambda: acting(DropPath("rate", mode="batch")),
        call(torch.ones(3, 2)),
    ),
    "LockedDropout: no time": using(
        ValueError,
        r"LockedDropout: expected a batch of sequences .*got shape \[3\]; keep",
        lambda: acting(LockedDropout("rate")),
        call(torch.ones(3)),
    ),
    "EmbeddingDropout: no time": using(
        ValueError,
        r"EmbeddingDropout: expected words \[n, t\], got shape \[3\]; keep",
        lambda: acting(EmbeddingDropout(nn.Embedding(4, 2), "rate")),
        call(torch.zeros(3, dtype=torch.long)),
    ),
    "EmbeddingDropout: no embedding": building(
        ValueError,
        "embedding to be an nn.Module, got Tensor; pass the nn.Embedding",
        lambda: EmbeddingDropout(torch.ones(1), 0.1),
    ),
    "WeightDrop: unknown names": building(
        ValueError,
        r"names to be a list from \['weight', 'bias'\], got \['w'\]",
        lambda: WeightDrop(OwnLinear(2, 2), ["w"], 0.1),
    ),
    "WeightDrop: text": building(
        ValueError, r"names to be a list from .*, got 'weight'", lambda: WeightDrop(OwnLinear(2, 2), "weight", 0.1)
    ),
    "WeightDrop: no module": building(
        ValueError, "module to be an nn.Module, got 'lstm'; pass the layer", lambda: WeightDrop("lstm", ["weight"], 0.1)
    ),
    "WeightDrop: a rate for each example": using(
        ValueError,
        r"WeightDrop: acts on the batch as a whole, but 'rate' has .*perturb='batch'",
        lambda: acting(WeightDrop(nn.Linear(2, 2), ["weight"], "rate")),
        call(torch.ones(3, 2)),
    ),
    "L2Penalty: negative": constant("weight", r"-0\.1", lambda: L2Penalty(-0.1)),
    "L2Penalty: text as names": building(
        ValueError, "names to be a list of patterns, got the string 'weight'; put", lambda: L2Penalty(0.1, "weight")
    ),
    "L2Penalty: names without a match": using(
        ValueError,
        r"no trainable parameter matches \['w\?'\]; there are \['1\.weight', .*\]; give names",
        lambda: [L2Penalty(0.1, ["w?"]), mlp()],
        lambda given: given[0](given[1]),
    ),
    "L2Penalty: activations": using(
        ValueError, "L2Penalty: expected a network, got Tensor; call", lambda: [L2Penalty(0.1)], call(torch.ones(3, 2))
    ),
    "ActivationPenalty: the output tuple of an LSTM": using(
        ValueError,
        "ActivationPenalty: expected activations as a tensor .*got tuple; .*pass the outputs of .*without its state",
        lambda: acting(ActivationPenalty("rate")),
        call((torch.ones(3, 2), None)),
    ),
    "TemporalActivationPenalty: no time": using(
        ValueError,
        r"TemporalActivationPenalty: expected activations .*got shape \[3\]; keep the batch",
        lambda: acting(TemporalActivationPenalty("rate")),
        call(torch.ones(3)),
    ),
    "ActivationPenalty: time first": using(
        ValueError,
        r"3 sampled weights, got 5; keep the batch first, or declare 'rate' with perturb='batch'",
        lambda: acting(ActivationPenalty("rate")),
        call(torch.ones(5, 3, 2)),
    ),
    "LabelSmoothing: negative": constant("weight", "-1", lambda: LabelSmoothing(-1)),
    "LabelSmoothing: probabilities": using(
        ValueError,
        r"class indices of shape \[3\], .*got shape \[3, 2\] of torch.float32; smooth class indices",
        lambda: acting(LabelSmoothing("rate")),
        call(torch.ones(3, 2), torch.ones(3, 2)),
    ),
    "attach: no set": using(
        TypeError,
        "GaussianNoise: expected hyperparameters to be a HyperparameterSet, got dict; build",
        lambda: GaussianNoise("rate"),
        lambda module: module.attach(ONE),
    ),
    "attach: an unknown name beside a known one": using(
        KeyError,
        r"GaussianNoise '1' reads the hyperparameter 'rat', which is not one of .*or 'rate' is misspelt",
        lambda: [nn.Sequential(GaussianNoise("rate"), GaussianNoise("rat")), a_set()],
        lambda given: attach_all(*given),
    ),
    "attach: to a second set": using(
        ValueError,
        "GaussianNoise '0' already reads another HyperparameterSet, as a copy of .* Build a new module",
        lambda: [nn.Sequential(acting(GaussianNoise("rate"))[0], GaussianNoise("rate")), a_set()],
        lambda given: attach_all(*given),
    ),
    "attach: a choice as a strength": using(
        ValueError,
        "expects a number, but the hyperparameter 'choice' is a Categorical; name a Float",
        lambda: [GaussianNoise("choice"), a_set()],
        lambda given: attach_all(*given),
    ),
    "attach: a range too wide": using(
        ValueError,
        "GaussianNoise: expected std of at least 0, but the hyperparameter 'open' is Float.*narrow its range",
        lambda: [GaussianNoise("open"), a_set()],
        lambda given: attach_all(*given),
    ),
    "training: an unattached regulariser": using(
        RuntimeError,
        r"Dropout reads \['rate'\] but belongs to no HyperparameterSet yet.*call attach\(hyperparameters\)",
        lambda: [Dropout("rate")],
        call(torch.ones(3, 2)),
    ),
}

LABELS = torch.tensor([0, 1, 2])
AUGMENTATIONS = {
    "Cutout: negative": constant("length", "-1", lambda: Cutout(-1)),
    "Cutout: max_holes is text": building(
        ValueError, "max_holes to be at least 0, got '4'; give", lambda: Cutout(2, "count", max_holes="4")
    ),
    "Cutout: infinitely many holes": building(
        ValueError,
        "holes to be .* a number of at least 0, got inf; give",
        lambda: Cutout(2, INF),
    ),
    "Cutout: no upper bound for the holes": using(
        ValueError,
        "upper bound for the number of holes, but the hyperparameter 'holes' is Float.*; declare an Integer, or pass",
        lambda: [Cutout(2, "holes"), HyperparameterSet({"holes": Float(0.0, None, init=1.0)})],
        lambda given: attach_all(*given),
    ),
    "Cutout: an unknown length beside known holes": using(
        KeyError,
        "Cutout reads the hyperparameter 'size', which is not one of",
        lambda: [Cutout("size", "count"), a_set()],
        lambda given: attach_all(*given),
    ),
    "Cutout: one image": using(
        ValueError,
        r"Cutout: expected images .*got shape \[3, 8, 8\]; reshape it to four dimensions",
        lambda: acting(Cutout("count")),
        call(pixels(3, 8, 8)),
    ),
    "Cutout: a fractional fill of uint8 images": using(
        ValueError,
        r"0\.\.255 for uint8 images, got 0\.5; change it, or convert the images",
        lambda: [Cutout(2, fill=0.5)],
        call(torch.zeros(3, 1, 8, 8, dtype=torch.uint8)),
    ),
    "ColorJitter: hue beyond 0.5": constant("hue", r"0\.7", lambda: ColorJitter(hue=0.7)),
    "ColorJitter: channels last": using(
        ValueError,
        r"ColorJitter: expected 1 or 3 channels .*got shape \[3, 8, 8, 4\]; permute",
        lambda: acting(ColorJitter("rate")),
        call(pixels(3, 8, 8, 4)),
    ),
    "ColorJitter: whole numbers": using(
        ValueError,
        "floating point dtype or uint8, got torch.int64; convert the input",
        lambda: acting(ColorJitter("rate")),
        call(torch.zeros(3, 3, 8, 8, dtype=torch.long)),
    ),
    "GaussianNoise: negative": constant("std", r"-0\.1", lambda: GaussianNoise(-0.1)),
    "GaussianNoise: fewer rows": using(
        RowsError,
        r"one row per example, got 3 rows for an input of shape \[2, 5\]; keep the batch",
        lambda: acting(GaussianNoise("rate")),
        call(torch.ones(2, 5)),
    ),
    "InputScale: beyond 1": constant("scale", r"2\.0", lambda: InputScale(2.0)),
    "RandomAffine: interpolation": building(
        ValueError, "interpolation 'bilinear' or 'nearest', got 'cubic'", lambda: RandomAffine(interpolation="cubic")
    ),
    "RandomAffine: shear": constant("shear", "91", lambda: RandomAffine(shear=91)),
    "RandomErasing: scale is a number": building(
        ValueError, r"scale to be \(low, high\) within \[0, 1\], got 0\.5", lambda: RandomErasing(0.1, scale=0.5)
    ),
    "RandomErasing: ratio from 0": building(
        ValueError,
        r"ratio to be \(low, high\) with 0 < low <= high, got \(0, 1\)",
        lambda: RandomErasing(0.1, ratio=(0, 1)),
    ),
    "RandomHorizontalFlip: beyond 1": constant("p", "2", lambda: RandomHorizontalFlip(2)),
    "MixUp: a fractional number of classes": building(
        ValueError, r"num_classes to be at least 1, got 2\.5; give", lambda: MixUp(1.0, 2.5)
    ),
    "MixUp: fewer labels": using(
        ValueError,
        r"MixUp: expected labels .*with n = 3, got shape \[2\] of torch.int64; flatten",
        lambda: acting(MixUp("rate", 3)),
        call(pixels(), LABELS[:2]),
    ),
    "MixUp: a label too large": using(
        ValueError,
        "MixUp: expected labels among the whole numbers 0 to 1, got 0 to 2; count classes from 0, or raise num_classes",
        lambda: acting(MixUp("rate", 2)),
        call(pixels(), LABELS),
    ),
    "CutMix: no images": using(
        ValueError,
        r"CutMix: expected images .*got shape \[3, 5\]; reshape",
        lambda: acting(CutMix("rate", 3)),
        call(torch.ones(3, 5), LABELS),
    ),
}

RATE = {"rate": Float(0.0, 1.0)}
HEADER = "step,epoch,rate,rate_scale\n"
STATE = {"epoch": 1, "position": 1, "seed": 5, "announced": 1}


def load(folder: Path) -> Schedule:
    return Schedule.load(folder / "schedule.csv")


def five(**arguments: Any) -> ResumableLoader:
    return ResumableLoader(**{"dataset": range(5), "batch_size": 2, **arguments})


SCHEDULES_AND_LOADERS = {
    "Schedule: text as specifications": building(
        TypeError, "dictionary from names to specifications, got 'rate'; write", lambda: Schedule("rate")
    ),
    "Schedule: no hyperparameters": building(
        ValueError, "expected at least one hyperparameter, got none; give", lambda: Schedule({})
    ),
    "Schedule: a name that is a column": building(
        ValueError,
        r"\['train_loss'\] would appear twice; rename",
        lambda: Schedule({"train_loss": Float(0.0, 1.0)}),
    ),
    "Schedule: a warm-up that is no number": building(
        ValueError,
        "warmup to be a number of training batches, or None, got '5'",
        lambda: Schedule({"rate": Float(0.0, 1.0)}, warmup="5"),
    ),
    "Schedule: an unknown interpolation": using(
        ValueError, "interpolation='step' or 'linear', got 'cubic'", recorded, lambda given: given.at(15, "cubic")
    ),
    "Schedule: a whole number that is not the rounded one": using(
        ValueError,
        "count.unrounded to be rounded to 4, got 5.0; correct one",
        lambda: Schedule({"count": Integer(0, 9)}),
        lambda given: given.append(Row(0, 0, {"count": 4}, {"count": 0.5}, unrounded={"count": 5.0})),
    ),
    "Schedule: a step that does not increase": using(
        ValueError, "a step after 20, got 20; rows are", recorded, lambda given: given.append(given.rows[-1])
    ),
    "Schedule: other names": using(
        ValueError,
        r"values of \['rate', 'op'\] and scales of .*got \['rate'\] and \['rate'\]; give all",
        recorded,
        lambda given: given.append(Row(30, 0, {"rate": 0.1}, {"rate": 0.1})),
    ),
    "Schedule: an unknown choice": using(
        ValueError,
        r"op to be one of \['a', 'b'\], got 'c'; give one of them",
        recorded,
        lambda given: given.append(Row(30, 0, {"rate": 0.1, "op": "c"}, given.rows[0].scales)),
    ),
    "Schedule: too few cells": using(
        ValueError, "Expected 9 cells, got 2", recorded, lambda given: given.append(given.row([30, 0]))
    ),
    "Schedule: empty": using(
        ValueError, "schedule is empty; record or load one", lambda: Schedule(RATE), lambda given: given.at(0)
    ),
    "Schedule: a step that is text": using(
        ValueError, "step to be a number of training batches, got '10'; give", recorded, lambda given: given.at("10")
    ),
    "Schedule: a step that is nan": using(
        ValueError, "step to be a number of training batches, got nan; give", recorded, lambda given: given.at(NAN)
    ),
    "Schedule.load: an empty file": Case(
        written(""), load, ValueError, r"schedule\.csv: expected the columns step, epoch, .*got \[\]; give the schedule"
    ),
    "Schedule.load: other columns": Case(
        written("a,b\n1,2\n"), load, ValueError, r"schedule\.csv: expected the columns .*got \['a', 'b'\]; give the"
    ),
    "Schedule.load: text for a number": Case(
        written(HEADER + "1,0,0.1,0.5\n2,0,much,0.5\n"), load, ValueError, r"schedule\.csv, line 3: not a row .*'much'"
    ),
    "Schedule.load: a line cut off": Case(
        written(HEADER + "1,0,0.1\n"), load, ValueError, r"line 2: not a row of a schedule \(Expected 6 cells, got 3"
    ),
    "Schedule.load: steps that go back": Case(
        written(HEADER + "2,0,0.1,0.5\n1,0,0.1,0.5\n"), load, ValueError, r"line 3: .*a step after 2, got 1; rows are"
    ),
    "ResumableLoader: a batch size of 0": building(
        ValueError, "batch_size to be a whole number of at least 1, got 0", lambda: five(batch_size=0)
    ),
    "ResumableLoader: a bool": building(
        ValueError, "batch_size to be a whole number of at least 1, got True", lambda: five(batch_size=True)
    ),
    "ResumableLoader: an iterable dataset": building(
        ValueError, "dataset with a length and items, got list_iterator; pass a map", lambda: five(dataset=iter([1]))
    ),
    "ResumableLoader: no examples": building(
        ValueError, "0 examples on each rank give no batch of 2; lower", lambda: five(dataset=[])
    ),
    "ResumableLoader: too few for a batch": building(
        ValueError, "5 examples .*no batch of 9; lower batch_size or pass", lambda: five(batch_size=9, drop_last=True)
    ),
    "ResumableLoader: a sampler": building(
        ValueError, r"sets \['sampler'\] itself; leave", lambda: five(sampler=[0, 1])
    ),
    "ResumableLoader: an unknown setting": building(
        ValueError, r"arguments of DataLoader, got \['colate_fn'\]; there are", lambda: five(colate_fn=list)
    ),
    "ResumableLoader: negative workers": building(
        ValueError, "num_workers to be a whole number of at least 0, got -1", lambda: five(num_workers=-1)
    ),
    "ResumableLoader: a fractional seed": building(
        ValueError, r"seed to be a whole number, got 1\.5", lambda: five(seed=1.5)
    ),
    "ResumableLoader: shuffle is text": building(
        ValueError, "shuffle to be True or False, got 'no'", lambda: five(shuffle="no")
    ),
    "ResumableLoader: a longer loader's state": using(
        ValueError,
        "state of a loader with 3 batches, got .*'position': 3.*; resume with the dataset",
        five,
        lambda given: given.load_state_dict({**STATE, "position": 3}),
    ),
    "ResumableLoader: a state without a seed": using(
        ValueError,
        "state of a loader with 3 batches, got .*; resume with",
        five,
        lambda given: given.load_state_dict({key: STATE[key] for key in ("epoch", "position", "announced")}),
    ),
    "ResumableLoader: a position that is text": using(
        ValueError,
        "state of a loader with 3 batches, got .*'position': '1'.*; resume with",
        five,
        lambda given: given.load_state_dict({**STATE, "position": "1"}),
    ),
    "ResumableLoader: None as the state": using(
        ValueError,
        "state of a loader with 3 batches, got None; resume",
        five,
        lambda given: given.load_state_dict(None),
    ),
}


def argument(message: str, **arguments: Any) -> Case:
    return building(ValueError, message, lambda: STNCallback(**arguments))


CALLBACK = {
    "STNCallback: train_steps": argument("train_steps to be a whole number of at least 1, got 0", train_steps=0),
    "STNCallback: valid_steps": argument(r"valid_steps to be a whole number of at least 1, got 1\.5", valid_steps=1.5),
    "STNCallback: warmup": argument("length to be a whole number of epochs of at least 0, got -1", warmup=-1),
    "STNCallback: warmup is text": argument(r"warmup to be a whole number of epochs, .*got '9'", warmup="9"),
    "STNCallback: warmup of more than the run": argument(r"share of the run in \[0, 1\), got 5\.0", warmup=5.0),
    "Warmup: an unknown unit": building(
        ValueError, "unit to be one of 'epochs', 'steps', 'share', got 'batches'", lambda: Warmup(3, "batches")
    ),
    "Warmup: half a step": building(
        ValueError, r"whole number of steps of at least 0, got 2\.5; a share", lambda: Warmup(2.5, "steps")
    ),
    "STNCallback: optimizer": argument(
        "optimizer to build one from parameter groups, got 'adam'; pass", optimizer="adam"
    ),
    "STNCallback: an optimiser instance": building(
        ValueError,
        r"(?s)optimizer to build one from parameter groups, got Adam.*; pass a class such as torch\.optim\.Adam",
        lambda: STNCallback(optimizer=torch.optim.Adam([torch.zeros(1)])),
    ),
    "STNCallback: lr": argument(r"lr to be positive, or None, got 0\.0", lr=0.0),
    "STNCallback: lr is text": argument("lr to be positive, or None, got 'auto'", lr="auto"),
    "STNCallback: scales": argument(r"scales to be Scales\(\.\.\.\), got False", scales=False),
    "Scales: lr": building(ValueError, "Scales: expected lr to be positive, or None, got nan", lambda: Scales(lr=NAN)),
    "Scales: tune": building(ValueError, "tune to be True or False, got 'yes'", lambda: Scales(tune="yes")),
    "Scales: entropy_weight": building(
        ValueError, "entropy_weight to be a number of at least 0, got -1", lambda: Scales(entropy_weight=-1)
    ),
    "STNCallback: method": argument("such as .* method='delta-stn' or method='stn', got 'delta'", method="delta"),
    "STNCallback: method is a class": argument("expected a method such as .*got <class", method=DeltaSTN),
    "DeltaSTN: linearize": building(ValueError, "linearize to be True or False, got 1", lambda: DeltaSTN(linearize=1)),
    "DeltaSTN: passes": building(ValueError, "passes=1 or passes=2, got 3", lambda: DeltaSTN(passes=3)),
    "DeltaSTN: one pass, not linearised": building(
        ValueError, "passes=1.*linearize=False", lambda: DeltaSTN(linearize=False, passes=1)
    ),
    "STNCallback: perturb": argument("perturb='example' or perturb='batch', got 'row'", perturb="row"),
    "STNCallback: dataloader": argument("dataloader to be an iterable of batches, got int; wrap", dataloader=3),
    "STNCallback: a dataset": argument(
        "dataloader to be an iterable of batches, got TensorDataset; wrap a dataset in a DataLoader",
        dataloader=images(3),
    ),
    "STNCallback: weight_step": argument(r"weight_step to be WeightStep\(\.\.\.\), got 1\.0", weight_step=1.0),
    "WeightStep: gradient_clip_val": building(
        ValueError, "gradient_clip_val to be positive, or None, got inf", lambda: WeightStep(gradient_clip_val=INF)
    ),
    "WeightStep: gradient_clip_algorithm": building(
        ValueError,
        "gradient_clip_algorithm='norm' or gradient_clip_algorithm='value', got 'max'",
        lambda: WeightStep(gradient_clip_algorithm="max"),
    ),
    "WeightStep: accumulate_grad_batches": building(
        ValueError,
        "accumulate_grad_batches to be a whole number of at least 1, got True",
        lambda: WeightStep(accumulate_grad_batches=True),
    ),
    "STNCallback: seed": argument(r"seed to be a whole number, or None, got 1\.5", seed=1.5),
    "STNCallback: on_resume_use": argument(
        r"on_resume_use to name some of \['train_steps', .*got \['rate'\]", on_resume_use=["rate"]
    ),
    "STNCallback: on_resume_use is a number": argument("on_resume_use to name some of .*got 3", on_resume_use=3),
    "STNCallback: on_resume_use names a number": argument(
        r"on_resume_use to name some of .*got \[3, 'lr'\]", on_resume_use=[3, "lr"]
    ),
    "STNCallback: schedule before fit": using(
        RuntimeError,
        "no schedule yet; it is recorded while trainer.fit runs",
        STNCallback,
        lambda given: given.schedule,
    ),
    "PhaseSchedule: text": building(
        ValueError, "train_steps to be a whole number of at least 1, got '2'", lambda: PhaseSchedule(train_steps="2")
    ),
}


def saved(folder: Path) -> Path:
    """Save the checkpoint of a one-epoch run in a folder; return the folder."""
    run, _ = fit(Lit(), quick(), max_epochs=1)
    run.save_checkpoint(folder / "last.ckpt")
    return folder


def resuming(specifications: dict[str, Any], message: str) -> Case:
    def given(folder: Path) -> list[Any]:
        return [Lit(specifications), quick(), saved(folder)]

    def resume(given: list[Any]) -> None:
        module, callback, folder = given
        run = trainer(callback, max_epochs=2)
        run.fit(module, loader(24), loader(16, seed=1), ckpt_path=folder / "last.ckpt")

    return Case(given, resume, ValueError, message)


def trained() -> Lit:
    module = Lit()
    fit(module, quick(), max_epochs=1)
    return module


ELSEWHERE = torch.ones(3, requires_grad=True)
RUNS = {
    "fit: a plain module": starting(
        TypeError, "STNCallback to train an STNModule, got Plain; derive Plain from STNModule", Plain
    ),
    "fit: no validation loss": starting(
        NotImplementedError,
        r"NoValidationLoss has no validation loss; define validation_loss\(self",
        NoValidationLoss,
    ),
    "fit: no training loss": starting(
        NotImplementedError, r"NoTrainingLoss has no training loss; define training_loss\(self", NoTrainingLoss
    ),
    "fit: nothing converted": starting(
        ValueError, r"No layer of Unwrapped responds.*wrap the network: self\.net = self\.convert\(net\)", Unwrapped
    ),
    "fit: an unknown name": starting(
        KeyError,
        "GaussianNoise 'beside.1' reads the hyperparameter 'rat', .*or 'rate' is misspelt",
        lambda: Lit(beside=nn.Sequential(GaussianNoise("rate"), GaussianNoise("rat"))),
    ),
    "fit: another module's regulariser": starting(
        ValueError,
        "GaussianNoise 'beside' already reads another HyperparameterSet, as a copy of .* Build a new module",
        lambda: Lit(beside=acting(GaussianNoise("rate"))[0]),
    ),
    "fit: a layer that needs a shared row": starting(
        ValueError,
        r"do not support a perturbation for each example: net\.1 \(Tokens\)\. Share one .*perturb='batch'",
        lambda: Lit(net=lambda: nn.Sequential(nn.Flatten(), Tokens(), nn.Dropout(0.1), nn.Linear(36, 3))),
        lambda: quick(perturb="example"),
    ),
    "fit: clipping by the callback in automatic optimization": starting(
        ValueError,
        r"Lightning takes the weight step.*gradient_clip_val=1\.0.*leave weight_step out, and pass to Trainer",
        lambda: Lit(automatic=True),
        lambda: quick(weight_step=WeightStep(gradient_clip_val=1.0)),
    ),
    "fit: response parameters without an optimiser": starting(
        ValueError,
        r"No optimiser trains these response parameters: \['net\.1\.response_weight', .*from self\.parameters\(\)",
        OtherParameters,
    ),
    "fit: a scheduler without a metric": starting(
        ValueError, "ReduceLROnPlateau follows a metric, but configure_optimizers names none; return", Plateau
    ),
    "fit: no validation data": starting(
        ValueError,
        r"Expected one validation loader .*got 0; pass one to trainer\.fit",
        Lit,
        limit_val_batches=0,
    ),
    "fit: two validation loaders": using(
        ValueError,
        r"Expected one validation loader .*got 2; .*give STNCallback\(dataloader=",
        lambda: [Lit(), quick()],
        lambda given: trainer(given[1]).fit(given[0], loader(24), [loader(16), loader(16)]),
    ),
    "fit: tuning_dataloader returns None": starting(
        ValueError,
        r"Lit\.tuning_dataloader\(\) to return validation batches, got NoneType; return a DataLoader",
        lambda: Lit(tuning=None),
    ),
    "fit: an optimizer argument that returns None": starting(
        TypeError,
        r"Expected STNCallback\(optimizer=...\) to return a torch.optim.Optimizer, got NoneType; pass",
        Lit,
        lambda: quick(optimizer=lambda groups: None),
    ),
    "fit: two callbacks": using(
        ValueError,
        "Expected one STNCallback, got 2; give the Trainer one",
        lambda: [Lit(), quick(), SecondCallback()],
        lambda given: trainer(*given[1:]).fit(given[0], loader(24), loader(16)),
    ),
    "fit: stochastic weight averaging": using(
        NotImplementedError,
        "does not support StochasticWeightAveraging.*Use Lightning's WeightAveraging",
        lambda: [Lit(), quick()],
        lambda given: trainer(given[1], StochasticWeightAveraging(swa_lrs=0.01)).fit(given[0], loader(24), loader(16)),
    ),
    "fit: no callback": using(
        RuntimeError,
        r"Lit trains without its callback; pass callbacks=\[STNCallback",
        Lit,
        lambda module: trainer().fit(module, loader(24), loader(16)),
    ),
    "fit: no callback in a second run": using(
        RuntimeError,
        r"Lit trains without its callback; pass callbacks=\[STNCallback",
        trained,
        lambda module: trainer().fit(module, loader(24), loader(16)),
    ),
    "fit: a training loss for each example": running(
        ValueError,
        r"training_loss to return a scalar tensor, got shape \[8, 3\]; return the mean loss",
        lambda: Lit(training=lambda output: output),
    ),
    "fit: training_loss returns None": running(
        ValueError,
        "training_loss to return a scalar tensor, got NoneType; return the mean loss",
        lambda: Lit(training=lambda output: None),
    ),
    "fit: training_loss returns a number": running(
        ValueError, "training_loss to return a scalar tensor, got float", lambda: Lit(training=lambda output: 1.0)
    ),
    "fit: a training loss without a gradient": running(
        ValueError,
        r"training_loss to return a loss with a gradient .*got one without; compute it .*without torch\.no_grad",
        lambda: Lit(training=lambda output: output.detach().sum()),
    ),
    "fit: a validation loss for each example": running(
        ValueError,
        r"validation_loss to return a scalar tensor, got shape \[8, 3\]; return the mean loss",
        lambda: Lit(validation=lambda output: output),
    ),
    "fit: validation_loss returns None": running(
        ValueError,
        "validation_loss to return a scalar tensor, got NoneType; return the mean loss",
        lambda: Lit(validation=lambda output: None),
    ),
    "fit: validation_loss returns a number": running(
        ValueError,
        "validation_loss to return a scalar tensor, got float; return the mean loss",
        lambda: Lit(validation=lambda output: output.sum().item()),
    ),
    "fit: a validation loss without a gradient": running(
        ValueError,
        r"does not depend on the hyperparameters.*Compute it with the network .*without torch\.no_grad",
        lambda: Lit(validation=lambda output: output.detach().sum()),
    ),
    "fit: a validation loss without the network": running(
        ValueError,
        "does not depend on the hyperparameters: no response layer led to it. Compute it with the network",
        lambda: Lit(validation=lambda output: ELSEWHERE.sum()),
    ),
    "fit: fewer rows than examples": running(
        RowsError,
        r"one row per example, got 5 rows for an input of shape \[8, 1, 6, 6\]; keep the batch",
        lambda: Lit(beside=GaussianNoise("rate"), rows=5),
        lambda: quick(perturb="example"),
    ),
    "fit: infer_batch_size returns text": running(
        ValueError,
        "number of rows .*got '8'; if infer_batch_size is overridden, return",
        lambda: Lit(rows="8"),
        lambda: quick(perturb="example"),
    ),
    "fit: a rate for each example of a batch-wise DropPath": running(
        ValueError,
        "DropPath: acts on the batch as a whole, but 'rate' has a value for each .*perturb='batch'",
        lambda: Lit(beside=DropPath("rate", mode="batch")),
        lambda: quick(perturb="example"),
    ),
    "resume: another range": resuming(
        {"rate": Float(0.0, 0.5, init=0.1)},
        r"saved with the hyperparameters .*high=0\.9.*this module has .*high=0\.5.*; resume with the hyperparameters",
    ),
    "resume: more hyperparameters": resuming(
        {"rate": Float(0.0, 0.9, init=0.1), "more": Float(0.0, 1.0, init=0.5)},
        "saved with the hyperparameters .*this module has .*'more'.*; resume with the hyperparameters",
    ),
}

TABLES = (SPECIFICATIONS, SETS, NETWORKS, LAYERS, REGULARIZERS, AUGMENTATIONS, SCHEDULES_AND_LOADERS, CALLBACK, RUNS)
CASES: dict[str, Case] = {name: case for table in TABLES for name, case in table.items()}


@pytest.mark.parametrize("name", CASES)
def test_wrong_use_raises_its_message_and_changes_nothing(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    given = case.given(tmp_path)
    before = snapshot([world(), given])
    with pytest.raises(case.error, match=case.message) as caught:
        case.do(given)
    assert type(caught.value) is case.error
    assert snapshot([world(), given]) == before


def test_case_names_are_unique() -> None:
    assert len(CASES) == sum(map(len, TABLES))


def _move(module: Lit) -> None:
    module.hyperparameters.unconstrained += 1


def _bind(module: Lit) -> None:
    bind_weight_phase(module.hyperparameters, module.hyperparameters.sample(1))


def _nudge(module: Lit) -> None:
    module.net[1].weight.data[0, 0] += 1e-3


@pytest.mark.parametrize(
    "change",
    [
        _move,
        _bind,
        _nudge,
        lambda module: module.net[1].weight.requires_grad_(False),
        lambda module: module.net[3].eval(),
        lambda module: module.net[3].detach(),
        lambda module: setattr(module.net[3], "p", 0.5),
        lambda module: module.net.append(nn.Identity()),
        lambda module: module.net(torch.ones(1, 1, 6, 6)).sum().backward(),
        lambda module: setattr(module.hyperparameters, "_frozen", False),
        lambda module: setattr(module, "configure_optimizers", None),
        lambda module: setattr(module, "_stn_phase", 1),
        lambda module: module.convert(module.beside.append(nn.Linear(2, 2))),
    ],
)
def test_snapshot_detects_any_change_of_a_module(change: Callable[[Lit], Any]) -> None:
    module = Lit(beside=nn.Sequential())
    before = snapshot(module)
    assert snapshot(module) == before
    change(module)
    assert snapshot(module) != before


def test_snapshot_detects_changes_of_files_schedules_loaders_callbacks_and_globals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, schedule, batches, callback = written("a")(tmp_path), recorded(), five(), quick()
    before = snapshot([world(), folder]), snapshot(schedule), snapshot(batches), snapshot(callback)
    written("b")(tmp_path)
    schedule.append(Row(30, 0, schedule.rows[0].values, schedule.rows[0].scales))
    next(iter(batches))
    fit(Lit(), callback, max_epochs=1)
    after = snapshot([world(), folder]), snapshot(schedule), snapshot(batches), snapshot(callback)
    assert all(one != other for one, other in zip(before, after, strict=True))
    monkeypatch.setattr(registry, "_RESPONSES", {})
    assert snapshot(world()) != before[0][0]
