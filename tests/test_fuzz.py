"""Public constructors and `Schedule.load` under arbitrary arguments: they work, or say which argument is wrong."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_stn import (
    STN,
    Categorical,
    DeltaSTN,
    Float,
    HyperparameterSet,
    Integer,
    PhaseSchedule,
    ResumableLoader,
    Scales,
    Schedule,
    STNCallback,
    Warmup,
    WeightStep,
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
from lightning_stn.regularizers import (
    ActivationPenalty,
    AlphaDropout,
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


class Odd:
    def __repr__(self) -> str:
        return "Odd()"


ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.5, 1.5, float("nan"), float("inf"), -float("inf")),
    *(1e-50, 1e-38, 1e7, 1e30, 3e38, 1e39, 2**31, 2**63, 2**64, -(2**65), 10**400, -(10**400), 1j),
    *(
        "",
        "x",
        "dropout",
        b"x",
        (),
        [],
        {},
        (1, 2),
        [0.1, "a"],
        (0.5, float("nan")),
        (0.1, 10**400),
        {"a": 1},
        {1: "a"},
    ),
    *(
        np.float32(0.5),
        np.float64(0.5),
        np.int64(3),
        np.array([0.5]),
        torch.tensor(0.5),
        torch.zeros(2),
        Odd(),
        Float,
        len,
    ),
]


class Subject(NamedTuple):
    """A constructor, arguments that it accepts, and what to do with what it builds; the result must not hold NaN."""

    build: Callable[..., Any]
    arguments: dict[str, Any]
    use: Callable[[Any], Any] = lambda built: None


def sampled(specification: Any) -> list[Tensor]:
    hyperparameters = HyperparameterSet({"a": specification})
    hyperparameters.schedule()
    values = [float(value) for value in hyperparameters.values().values() if not isinstance(value, str)]
    drawn = hyperparameters.sample(64, torch.Generator().manual_seed(0))
    return [
        hyperparameters.scale,
        hyperparameters.entropy(),
        torch.tensor(values),
        *hyperparameters.constrain(drawn).values(),
    ]


def on(*inputs: Tensor) -> Callable[[Any], Any]:
    """Run a module of constants in training mode."""
    return lambda module: None if module.reads() else module(*inputs)


PIXELS, LABELS, SEQUENCE = torch.rand(3, 3, 8, 8), torch.tensor([0, 1, 1]), torch.rand(3, 4, 5)
RANGE = {"low": 0, "high": 4, "init": 1, "scale": 0.5, "perturb": "batch"}
SUBJECTS = {
    "Float": Subject(Float, {**RANGE, "log": False}, sampled),
    "Integer": Subject(Integer, RANGE, sampled),
    "Categorical": Subject(
        Categorical, {"choices": ("a", "b"), "init": "a", "scale": 0.5, "perturb": "example"}, sampled
    ),
    "HyperparameterSet": Subject(
        lambda hyperparameters, response: HyperparameterSet(hyperparameters, response=response),
        {"hyperparameters": {"a": Float(0.0, 1.0)}, "response": "full"},
    ),
    "Warmup": Subject(Warmup, {"length": 1, "unit": "epochs"}, lambda warmup: warmup.resolve(100, 5)),
    "PhaseSchedule": Subject(
        PhaseSchedule,
        {"train_steps": 2, "valid_steps": 1, "warmup": 1},
        lambda schedule: schedule.resolve(10).total_steps(100, 10),
    ),
    "Scales": Subject(Scales, {"tune": True, "lr": 0.1, "entropy_weight": 0.1}),
    "WeightStep": Subject(
        WeightStep, {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "norm", "accumulate_grad_batches": 1}
    ),
    "STN": Subject(STN, {"centred": True, "gate_scale": 0.5}),
    "DeltaSTN": Subject(DeltaSTN, {"linearize": True, "passes": 2}),
    "STNCallback": Subject(
        STNCallback,
        {
            **{"train_steps": 2, "valid_steps": 1, "warmup": 1, "method": "stn", "perturb": "batch", "lr": 0.1},
            **{"anneal": True, "optimizer": torch.optim.Adam, "scales": Scales(), "weight_step": WeightStep()},
            **{"dataloader": None, "seed": 1, "on_resume_use": ()},
        },
    ),
    "ResumableLoader": Subject(
        lambda **arguments: ResumableLoader(range(6), **arguments),
        {"batch_size": 2, "shuffle": True, "seed": 1, "drop_last": False},
        list,
    ),
    "Schedule": Subject(
        lambda hyperparameters, **arguments: Schedule(hyperparameters, **arguments),
        {"hyperparameters": {"a": Float(0.0, 1.0)}, "rows": [], "warmup": None},
        lambda schedule: schedule.columns,
    ),
    "ColorJitter": Subject(
        ColorJitter, {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.1}, on(PIXELS)
    ),
    "RandomAffine": Subject(
        RandomAffine,
        {"degrees": 9, "translate": 0.1, "scale": 0.1, "shear": 5, "interpolation": "bilinear", "fill": 0.0},
        on(PIXELS),
    ),
    "Cutout": Subject(Cutout, {"length": 2, "holes": 1, "fill": 0.0, "max_holes": None}, on(PIXELS)),
    "RandomErasing": Subject(
        RandomErasing, {"p": 0.5, "scale": (0.02, 0.33), "ratio": (0.3, 3.3), "value": 0.0}, on(PIXELS)
    ),
    "RandomHorizontalFlip": Subject(RandomHorizontalFlip, {"p": 0.5}, on(PIXELS)),
    "GaussianNoise": Subject(GaussianNoise, {"std": 0.1}, on(PIXELS)),
    "InputScale": Subject(InputScale, {"scale": 0.1}, on(PIXELS)),
    "MixUp": Subject(lambda alpha: MixUp(alpha, 2), {"alpha": 0.4}, on(PIXELS, LABELS)),
    "CutMix": Subject(lambda alpha: CutMix(alpha, 2), {"alpha": 0.4}, on(PIXELS, LABELS)),
    "MixUp of classes": Subject(MixUp, {"alpha": 0.4, "num_classes": 2}),
    "Dropout": Subject(Dropout, {"p": 0.1}, on(PIXELS)),
    "Dropout2d": Subject(Dropout2d, {"p": 0.1}, on(PIXELS)),
    "AlphaDropout": Subject(AlphaDropout, {"p": 0.1}, on(PIXELS)),
    "DropPath": Subject(DropPath, {"p": 0.1, "mode": "row", "share": 1.0}, on(PIXELS)),
    "LockedDropout": Subject(LockedDropout, {"p": 0.1, "batch_first": True}, on(SEQUENCE)),
    "EmbeddingDropout": Subject(
        EmbeddingDropout, {"embedding": nn.Embedding(3, 2), "p": 0.1, "batch_first": True}, on(LABELS[None])
    ),
    "WeightDrop": Subject(WeightDrop, {"module": nn.Linear(5, 2), "names": ["weight"], "p": 0.1}, on(SEQUENCE)),
    "L2Penalty": Subject(L2Penalty, {"weight": 0.1, "names": ()}, on(nn.Linear(2, 2))),  # type: ignore[arg-type]
    "ActivationPenalty": Subject(ActivationPenalty, {"weight": 0.1, "batch_first": True}, on(SEQUENCE)),
    "TemporalActivationPenalty": Subject(TemporalActivationPenalty, {"weight": 0.1, "batch_first": True}, on(SEQUENCE)),
    "LabelSmoothing": Subject(LabelSmoothing, {"weight": 0.1, "ignore_index": -100}, on(torch.rand(3, 2), LABELS)),
}


def holds_nan(result: Any) -> bool:
    if isinstance(result, Tensor):
        return bool(result.isnan().any())
    return isinstance(result, list | tuple) and any(map(holds_nan, result))


def attempt(name: str, odd: dict[str, Any]) -> None:
    """Build and use a subject with odd arguments: it works, or the error names one of them."""
    subject = SUBJECTS[name]
    try:
        built = subject.build(**{**subject.arguments, **odd})
    except (ValueError, TypeError) as error:
        message = str(error)
        names = (rf"\b{argument.removesuffix('s')}s?\b" for argument in odd)  # hyperparameters: hyperparameter 'a'
        assert any(re.search(name, message, re.IGNORECASE) for name in names), (odd, message)
        return
    torch.manual_seed(0)
    assert not holds_nan(subject.use(built)), odd


@st.composite
def attempts(draw: Any) -> tuple[str, dict[str, Any]]:
    name = draw(st.sampled_from(sorted(SUBJECTS)))
    arguments = draw(st.lists(st.sampled_from(sorted(SUBJECTS[name].arguments)), min_size=1, max_size=3, unique=True))
    values = st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=3)
    return name, {argument: draw(values) for argument in arguments}


@pytest.mark.parametrize("name", SUBJECTS)
def test_constructors_name_any_odd_argument(name: str) -> None:
    for argument in SUBJECTS[name].arguments:
        for value in ODD:
            attempt(name, {argument: value})


@settings(max_examples=300, deadline=None)
@given(attempts())
def test_constructors_name_one_of_several_odd_arguments(case: tuple[str, dict[str, Any]]) -> None:
    attempt(*case)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None)
@given(attempts())
def test_constructors_name_one_of_many_odd_arguments(case: tuple[str, dict[str, Any]]) -> None:
    attempt(*case)


CELLS = st.sampled_from(["0", "1", "-1", "0.5", "nan", "inf", "1e999", "9" * 500, "", "a", '"', "a,b", "\0", "é", "\r"])
HEADERS = st.sampled_from(["step,epoch,rate,rate_scale", "step,epoch,op,op_a_scale,op_b_scale", "step,epoch", ""])


@st.composite
def files(draw: Any) -> bytes:
    rows = draw(st.lists(st.lists(CELLS, min_size=3, max_size=5).map(",".join), max_size=3))
    text = draw(st.sampled_from(["\n", "\r\n", "\r"])).join([draw(HEADERS), *rows, ""])
    content = bytearray(text.encode(draw(st.sampled_from(["utf-8", "utf-16", "latin-1"]))))
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(content)))
        content[place : place + draw(st.integers(0, 3))] = draw(st.binary(max_size=2))
    return bytes(content)


def load(path: Path, content: bytes) -> None:
    """Load a file: it reads as finite numbers, or the error names the file."""
    path.write_bytes(content)
    try:
        schedule = Schedule.load(path)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017
        return
    for row in schedule.rows:
        numbers = [value for value in [*row.values.values(), *row.scales.values()] if not isinstance(value, str)]
        assert all(abs(float(number)) < float("inf") for number in numbers)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=files() | st.binary(max_size=60))
def test_load_reads_a_file_or_names_it(content: bytes, tmp_path: Path) -> None:
    load(tmp_path / "schedule.csv", content)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=files() | st.binary(max_size=60))
def test_load_reads_any_of_many_files_or_names_it(content: bytes, tmp_path: Path) -> None:
    load(tmp_path / "schedule.csv", content)
