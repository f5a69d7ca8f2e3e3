import copy
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_stn import Categorical, Float, Hyperparameter, HyperparameterSet, Integer, convert
from lightning_stn.augment import GaussianNoise
from lightning_stn.binding import attach_all, bind, bind_weight_phase, unbind
from lightning_stn.regularizers import L2Penalty
from lightning_stn.schedule import Row


def both() -> HyperparameterSet:
    return HyperparameterSet({"rate": Float(0.0, 1.0, init=0.25), "count": Integer(0, 4, init=4, perturb="batch")})


@pytest.mark.parametrize(
    "specification",
    [
        Float(0.0, 0.9, init=0.05),
        Float(0.0, None, init=0.05),
        Float(None, 0.0, init=-3.0),
        Float(None, None, init=2.0),
        Float(1e-6, 1e-1, init=1e-4, log=True),
        Float(0.0, None, init=1e-4, log=True),
    ],
)
def test_start_of_a_float_reads_back(specification: Float) -> None:
    values = HyperparameterSet({"x": specification}).values()
    assert values["x"] == pytest.approx(specification.init, rel=1e-5)


@given(st.integers(-50, 50), st.integers(1, 60), st.data())
def test_start_of_an_integer_reads_back_exactly(low: int, width: int, data: Any) -> None:
    init = data.draw(st.integers(low, low + width))
    value = HyperparameterSet({"x": Integer(low, low + width, init)}).values()["x"]
    assert value == init
    assert isinstance(value, int)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 24), (-3, 3)])
def test_every_integer_is_reached(low: int, high: int) -> None:
    unconstrained = torch.linspace(-20, 20, 20001)
    assert Integer(low, high, low).constrain(unconstrained).unique().tolist() == list(range(low, high + 1))


def test_the_largest_integer_range_is_resolved() -> None:
    for init in (0, 1, 2**19, 2**20 - 1, 2**20):
        assert HyperparameterSet({"x": Integer(0, 2**20, init)}).values()["x"] == init


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Float(1.0, 1.0, init=1.0), "range is empty"),
        (lambda: Float(2.0, 1.0, init=1.5), "range is empty"),
        (lambda: Float(0.0, 1.0, init=0.0), "strictly between"),
        (lambda: Float(0.0, 1.0, init=1.0), "strictly between"),
        (lambda: Float(0.0, None, init=-1.0), "strictly between"),
        (lambda: Float(None, 0.0, init=0.5), "strictly between"),
        (lambda: Float(-1.0, 1.0, init=0.5, log=True), "log=True needs a positive range"),
        (lambda: Float(None, None, init=0.5, log=True), "log=True needs a positive range"),
        (lambda: Float(0.0, 1.0, init="0.5"), "init to be a finite number"),  # type: ignore[arg-type]
        (lambda: Float(0.0, float("inf"), init=0.5), "high to be a finite number"),
        (lambda: Float(0.0, 1.0, init=0.5, scale=0.0), "scale > 0"),
        (lambda: Float(0.0, 1.0, init=0.5, scale=float("nan")), "scale to be a finite number"),
        (lambda: Float(0.0, 1.0, init=0.5, perturb="row"), "perturb='example' or perturb='batch'"),  # type: ignore[arg-type]
        (lambda: Integer(0, 4, init=2.0), "init to be a whole number"),  # type: ignore[arg-type]
        (lambda: Integer(0, True, init=0), "high to be a whole number"),
        (lambda: Integer(3, 3, init=3), "range is empty"),
        (lambda: Integer(0, 4, init=5), "low <= init <= high"),
        (lambda: Integer(0, 2**21, init=5), "cannot be resolved"),
        (lambda: convert(nn.Linear(2, 2), HyperparameterSet({})), "at least one hyperparameter"),
        (lambda: HyperparameterSet({"a b": Float(0.0, 1.0, 0.5)}), "Python identifier"),
        (lambda: HyperparameterSet({"step": Float(0.0, 1.0, 0.5)}), "collides"),
        (lambda: HyperparameterSet({"a": Float(0.0, 1.0, 0.5), "a_scale": Float(0.0, 1.0, 0.5)}), "collides"),
    ],
)
def test_specifications_refuse_wrong_arguments(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_set_refuses_a_value_that_is_no_specification() -> None:
    with pytest.raises(TypeError, match=r"'x' to be a Hyperparameter, such as a Float, .*, got 0\.5; write"):
        HyperparameterSet({"x": 0.5})  # type: ignore[dict-item]


@pytest.mark.parametrize("rate", [0.25, 0.0])
def test_set_may_be_empty_until_a_conversion_generates_its_hyperparameters(rate: float) -> None:
    hyperparameters, net = HyperparameterSet({}), nn.Sequential(nn.Linear(2, 2), nn.Dropout(rate), nn.Dropout(0.5))
    assert (repr(hyperparameters), len(hyperparameters), hyperparameters.values()) == ("HyperparameterSet()", 0, {})
    assert "<tr></tr>" in hyperparameters._repr_html_()
    convert(net, hyperparameters, dropout="per-layer")
    assert hyperparameters.values() == ({"dropout_1": 0.25} if rate else {}) | {"dropout_2": 0.5}


def test_conversion_that_generates_nothing_leaves_the_network_plain() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(ValueError, match=r"at least one .*or give each dropout one with convert\(net, dropout="):
        convert(net, HyperparameterSet({}), dropout="per-layer")
    assert type(net[0]) is nn.Linear


def test_add_appends_until_layers_respond() -> None:
    hyperparameters = both()
    hyperparameters.add({"more": Float(0.0, 1.0, init=0.75)})
    assert list(hyperparameters.values()) == ["rate", "count", "more"]
    with pytest.raises(ValueError, match="exists already"):
        hyperparameters.add({"more": Float(0.0, 1.0, init=0.5)})
    hyperparameters.freeze()
    with pytest.raises(RuntimeError, match="cannot be added once layers respond"):
        hyperparameters.add({"late": Float(0.0, 1.0, init=0.5)})
    assert len(hyperparameters) == 3


@pytest.mark.parametrize("move", [lambda s: s.half(), lambda s: s.to(torch.bfloat16), lambda s: s.double()])
def test_set_stays_float32_when_its_module_changes_dtype(move: Any) -> None:
    hyperparameters = both()
    before = hyperparameters.unconstrained.clone()
    moved = move(torch.nn.ModuleDict({"set": hyperparameters, "net": torch.nn.Linear(1, 1)}))
    assert moved["net"].weight.dtype != torch.float32
    assert hyperparameters.raw_scale.dtype == torch.float32
    assert torch.equal(hyperparameters.unconstrained, before)


def test_set_created_under_a_half_precision_default_is_float32() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        hyperparameters = both()
    finally:
        torch.set_default_dtype(torch.float32)
    assert hyperparameters.unconstrained.dtype == torch.float32
    assert torch.equal(hyperparameters.unconstrained, both().unconstrained)


def test_set_materialised_from_meta_has_its_start_values() -> None:
    with torch.device("meta"):
        hyperparameters = both()
    assert hyperparameters.to_empty(device="cpu").values() == both().values()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copied_set_is_equal_and_independent(clone: Any) -> None:
    hyperparameters = both()
    other = clone(hyperparameters)
    hyperparameters.unconstrained.data.add_(1.0)
    assert other.values() == both().values()
    assert other.specifications == hyperparameters.specifications


def test_no_parameter_of_a_set_requires_a_gradient() -> None:
    assert not any(parameter.requires_grad for parameter in both().parameters())


def test_noise_depends_on_the_generator_alone() -> None:
    hyperparameters = both()
    first, second = (hyperparameters.noise(5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, hyperparameters.noise(5, torch.Generator().manual_seed(4)))


def test_set_reads_the_bound_sample() -> None:
    hyperparameters = both()
    hyperparameters.centred = False
    assert hyperparameters["rate"].item() == pytest.approx(0.25)
    assert hyperparameters["count"].item() == 4
    sample = hyperparameters.sample(6)
    bind_weight_phase(hyperparameters, sample)
    assert torch.equal(hyperparameters["rate"], torch.sigmoid(sample[:, 0]))
    assert hyperparameters["count"].shape == ()
    with bind(hyperparameters, hyperparameters.sample(3)):
        assert hyperparameters.bound_sample().shape == (3, 2)
        assert hyperparameters["rate"].shape == ()
        assert hyperparameters["rate"].item() == pytest.approx(0.25)
    assert hyperparameters.bound_sample() is sample
    unbind(hyperparameters)
    assert torch.equal(hyperparameters.bound_sample(), hyperparameters.unconstrained[None])


def test_sample_of_one_row_reads_as_scalars() -> None:
    hyperparameters = both()
    bind_weight_phase(hyperparameters, hyperparameters.sample(1))
    assert hyperparameters["rate"].shape == hyperparameters["count"].shape == ()


def test_exception_unbinds_the_sample() -> None:
    hyperparameters = both()
    with pytest.raises(ZeroDivisionError), bind(hyperparameters, hyperparameters.sample(3)):
        raise ZeroDivisionError
    assert hyperparameters.bound_sample().shape == (1, 2)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(KeyError, match=r"'rates'.*\['rate', 'count'\].*or 'rate' is misspelt"):
        both()["rates"]


def misspelt() -> HyperparameterSet:
    return HyperparameterSet({"dropuot": Float(0.0, 1.0, init=0.5)})


READERS: dict[str, Callable[[HyperparameterSet], Any]] = {
    "a loss": lambda known: known["dropout"],
    "convert": lambda known: convert(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), known, dropout="dropout"),
    "a regulariser": lambda known: attach_all(nn.Sequential(GaussianNoise("dropout")), known),
    "a penalty": lambda known: L2Penalty("dropout").attach(known),
}


@pytest.mark.parametrize("reader", READERS)
def test_names_that_differ_in_spelling_are_both_shown_and_neither_is_called_right(reader: str) -> None:
    with pytest.raises(KeyError, match=r"'dropout' or 'dropuot' is misspelt; correct it here, or in hyperparameters="):
        READERS[reader](misspelt())


def test_unknown_name_that_resembles_no_other_is_to_be_added() -> None:
    with pytest.raises(KeyError, match=r"'width', which is not one of \['dropuot'\]: use one of them, or add it to"):
        misspelt()["width"]


def test_unread_counts_only_reads_in_the_weight_phase() -> None:
    hyperparameters = both()
    hyperparameters["rate"]
    assert hyperparameters.unread() == ["rate", "count"]
    bind_weight_phase(hyperparameters, hyperparameters.sample(2))
    hyperparameters["rate"]
    assert hyperparameters.unread() == ["count"]


def test_state_is_in_the_state_dict_but_not_in_parameters_or_buffers() -> None:
    """So that weight optimisers, weight averaging and sharding leave it alone."""
    ours, other = (HyperparameterSet({"a": Float(0.0, 1.0, init=init)}) for init in (0.2, 0.7))
    assert not list(ours.parameters())
    assert not list(ours.buffers())
    names = ["export_for_a_plain_network", "unconstrained", "raw_scale", "centred", "gate_scale"]
    assert list(ours.state_dict()) == names
    other.load_state_dict(ours.state_dict())
    assert other.values() == ours.values()
    copied = copy.deepcopy(ours)
    copied.unconstrained += 1
    assert copied.values() != ours.values()
    moved = ours.to("meta")
    assert moved.unconstrained.is_meta


def test_load_state_dict_refuses_wrong_keys_and_sizes() -> None:
    ours = HyperparameterSet({"a": Float(0.0, 1.0, init=0.2)})
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(RuntimeError, match="unconstrained has 2 entries, but the hyperparameters"):
        ours.load_state_dict({**before, "unconstrained": torch.zeros(2)})
    with pytest.raises(RuntimeError, match=r"Missing key.*raw_scale"):
        ours.load_state_dict({name: value for name, value in before.items() if name != "raw_scale"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*sigma"):
        ours.load_state_dict({**before, "sigma": torch.ones(1)})
    assert all(torch.equal(ours.state_dict()[name], before[name]) for name in before)


def calls(work: Callable[[], Any]) -> int:
    """Number of Python and C functions that a piece of work calls."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


def many(n: int, kind: Callable[[int], Hyperparameter]) -> dict[str, Hyperparameter]:
    return {f"h{index}": kind(index) for index in range(n)}


@pytest.mark.parametrize(
    "kind",
    [
        lambda index: Float(0.0, 1.0, init=0.5),
        lambda index: Integer(0, 4),
        lambda index: Categorical(["a", "b", "c"], init="a"),
        lambda index: Categorical(["a", "b"], init="a") if index % 2 else Float(0.0, None, init=1.0),
    ],
    ids=["numbers", "integers", "choices", "both"],
)
def test_cost_of_a_set_is_linear_in_its_hyperparameters(kind: Callable[[int], Hyperparameter]) -> None:
    def build_and_read(n: int) -> None:
        hyperparameters = HyperparameterSet(many(n, kind))
        schedule = hyperparameters.schedule()
        schedule.append(Row(0, 0, hyperparameters.values(), dict.fromkeys(schedule.scale_names, 0.5)))
        schedule.row(schedule.cells(schedule.rows[0]))
        hyperparameters.noise(2)
        hyperparameters.require_signature(hyperparameters.signature)

    build_and_read(1)  # imports
    few, more = (calls(lambda n=n: build_and_read(n)) for n in (100, 400))
    assert more < 5 * few


def test_hyperparameters_of_one_family_are_read_as_each_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [torch.rand(3, generator=generator, dtype=torch.float64).tolist() for _ in range(20)]
    kinds: dict[str, Any] = {}
    for index, (first, second, third) in enumerate(draws):
        kinds[f"linear{index}"] = Float(10 * first - 5, 10 * first - 4 + 9 * second)
        kinds[f"log{index}"] = Float(10 ** (-8 * first), 10 ** (-8 * first) * (2 + 1000 * third), log=True)
    kinds |= {"half": Float(0.0, None, init=1.0), "whole": Integer(0, 9), "choice": Categorical(("a", "b"), "a")}
    kinds |= {"to_zero": Float(0.0, 1.0, init=0.1, log=True), "wide": Float(-3e38, -1e38)}
    hyperparameters = HyperparameterSet(kinds)
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-13)):
        for shape in ((), (3,), (2, 5)):
            entries = 8 * torch.randn(*shape, len(hyperparameters), generator=generator, dtype=torch.float64)
            values = hyperparameters.constrain(entries.to(dtype))
            assert list(values) == list(kinds)
            for name, kind in kinds.items():
                alone = kind.read(entries.to(dtype)[..., hyperparameters.slices[name]])
                torch.testing.assert_close(values[name], alone, rtol=tolerance, atol=tolerance)


def test_bounds_are_reached_and_never_passed_when_ranges_are_read_together() -> None:
    kinds = {"first": Float(0.1, 0.7), "second": Float(-0.3, 1e-3), "third": Float(1e-7, 0.3, log=True)}
    hyperparameters = HyperparameterSet({**kinds, "fourth": Float(1e-5, 0.1, log=True)})
    for entry in (-1e4, 1e4):
        for name, value in hyperparameters.constrain(torch.full((4,), entry)).items():
            low, high = hyperparameters.specifications[name].bounds or (0, 0)
            assert torch.tensor(low) <= value <= torch.tensor(high)
            assert value == pytest.approx(low if entry < 0 else high, rel=1e-5, abs=1e-6)


def test_subclass_that_reads_in_another_way_is_read_alone() -> None:
    @dataclass(frozen=True)
    class Halved(Float):
        def constrain(self, unconstrained: torch.Tensor) -> torch.Tensor:
            return super().constrain(unconstrained) / 2

    hyperparameters = HyperparameterSet({"whole": Float(0.0, 0.8), "half": Halved(0.0, 0.8), "other": Float(0.0, 0.8)})
    values = hyperparameters.constrain(torch.zeros(3))
    assert [value.item() for value in values.values()] == pytest.approx([0.4, 0.2, 0.4])


def test_ranges_that_were_first_read_in_inference_mode_can_be_differentiated() -> None:
    hyperparameters = HyperparameterSet({"first": Float(0.0, 0.8), "second": Float(0.1, 0.5)})
    with torch.inference_mode():
        hyperparameters.constrain(torch.zeros(2))
    entries = torch.zeros(2, requires_grad=True)
    values = torch.stack(list(hyperparameters.constrain(entries).values()))
    (gradient,) = torch.autograd.grad(values.sum(), entries)
    assert gradient.tolist() == pytest.approx([0.2, 0.1])
