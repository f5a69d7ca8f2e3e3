"""Categorical hyperparameters: entries, start, values read, and errors."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ProgressBar
from support import LitSmall, loader, small_net, trainer
from torch import Tensor, nn

from lightning_stn import Categorical, Float, HyperparameterSet, Integer, STNCallback, convert
from lightning_stn.augment import GaussianNoise
from lightning_stn.binding import attach_all, bind_weight_phase
from lightning_stn.functional import choice_probabilities

CHOICES = ("none", "mirror", "noise")


def mixed(perturb: Any = "example") -> HyperparameterSet:
    return HyperparameterSet(
        {
            "rate": Float(0.0, 1.0, init=0.25, scale=0.3),
            "operation": Categorical(CHOICES, init="mirror", scale=0.4, perturb=perturb),
            "count": Integer(0, 4, init=3, scale=0.2),
        }
    )


def test_categorical_has_an_entry_per_choice() -> None:
    hyperparameters = mixed()
    assert len(hyperparameters) == len(hyperparameters.unconstrained) == len(hyperparameters.raw_scale) == 5
    assert hyperparameters.names == ("rate", "operation", "count")
    assert hyperparameters.slices == {"rate": slice(0, 1), "operation": slice(1, 4), "count": slice(4, 5)}
    assert hyperparameters.labels == ("rate", "operation/none", "operation/mirror", "operation/noise", "count")
    torch.testing.assert_close(hyperparameters.scale.data, torch.tensor([0.3, 0.4, 0.4, 0.4, 0.2]))
    torch.testing.assert_close(hyperparameters.unconstrained.data[1:4], torch.tensor([0.0, 0.4, 0.0]))
    assert hyperparameters.noise(6).shape == (6, 5)


@given(st.lists(st.text("abc /,\"'é", min_size=1), min_size=2, unique=True), st.data())
def test_start_of_a_categorical_reads_back(choices: Sequence[str], data: Any) -> None:
    init = data.draw(st.sampled_from(choices))
    hyperparameters = HyperparameterSet({"x": Categorical(choices, init, scale=0.01)})
    assert hyperparameters.values() == {"x": init}
    assert choices[int(hyperparameters["x"])] == init


def test_a_list_of_choices_becomes_a_tuple() -> None:
    assert Categorical(["a", "b"], "a") == Categorical(("a", "b"), init="a")
    assert hash(Categorical(["a", "b"], "a")) == hash(Categorical(("a", "b"), "a"))


def test_value_is_the_index_of_the_first_largest_logit() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [1.0, 0.0, 1.0], [-3.0, -2.0, -1.0]])
    unconstrained = torch.cat([torch.zeros(3, 1), logits, torch.zeros(3, 1)], dim=1)
    values = mixed().constrain(unconstrained.expand(2, 3, 5))["operation"]
    assert values.dtype == torch.int64
    assert values.tolist() == [[1, 0, 2]] * 2


def test_bound_sample_of_a_categorical_reads_as_an_index() -> None:
    hyperparameters = mixed()
    assert hyperparameters["operation"].shape == ()
    assert hyperparameters["operation"].item() == CHOICES.index("mirror")
    sample = hyperparameters.sample(64)
    bind_weight_phase(hyperparameters, sample)
    assert torch.equal(hyperparameters["operation"], sample[:, 1:4].argmax(-1))
    assert len(hyperparameters["operation"].unique()) == 3
    assert hyperparameters.unread() == ["rate", "count"]
    bind_weight_phase(hyperparameters, hyperparameters.sample(1))
    assert hyperparameters["operation"].shape == ()


def test_noise_per_batch_is_shared_by_rows_but_not_by_logits() -> None:
    hyperparameters = mixed(perturb="batch")
    noise = hyperparameters.noise(8)
    assert [len(column.unique()) for column in noise.T] == [8, 1, 1, 1, 8]
    assert len(noise[0].unique()) == 5
    bind_weight_phase(hyperparameters, hyperparameters.sample(8))
    assert hyperparameters["operation"].shape == ()


@pytest.mark.parametrize("scale", [0.1, 0.5, 2.0])
@pytest.mark.parametrize(("count", "chance"), [(2, 0.76), (3, 0.63), (5, 0.49), (10, 0.34)])
def test_start_is_drawn_with_the_documented_probability(count: int, chance: float, scale: float) -> None:
    choices = [str(index) for index in range(count)]
    hyperparameters = HyperparameterSet({"x": Categorical(choices, "1", scale=scale)})
    probabilities = choice_probabilities(hyperparameters.unconstrained, hyperparameters.scale)
    assert probabilities[1].item() == pytest.approx(chance, abs=0.005)
    torch.testing.assert_close(probabilities[0], (1 - probabilities[1]) / (count - 1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scales", [(0.5, 0.5), (0.01, 3.0), (2.0, 1e-6)])
def test_probabilities_of_two_choices_are_those_of_the_normal_difference(scales: tuple[float, float]) -> None:
    logits, scale = torch.tensor([0.3, -0.2], dtype=torch.float64), torch.tensor(scales, dtype=torch.float64)
    expected = torch.special.ndtr((logits[0] - logits[1]) / scale.norm())
    torch.testing.assert_close(choice_probabilities(logits, scale)[0], expected, rtol=0, atol=1e-6)


def test_probabilities_are_the_frequencies_of_the_argmax() -> None:
    """Within five standard errors of a binomial frequency."""
    logits, scale = torch.tensor([1.0, 0.5, -4.0, 0.7]), torch.tensor([0.2, 1.0, 3.0, 0.5])
    draws = 200_000
    noise = torch.randn(draws, 4, generator=torch.Generator().manual_seed(0))
    frequencies = (logits + scale * noise).argmax(-1).bincount(minlength=4).double() / draws
    probabilities = choice_probabilities(logits, scale)
    assert probabilities.sum().item() == pytest.approx(1.0)
    assert ((frequencies - probabilities).abs() < 5 * (probabilities * (1 - probabilities) / draws).sqrt()).all()


def test_state_without_categoricals_has_one_entry_per_hyperparameter() -> None:
    state = HyperparameterSet({"rate": Float(0.0, 1.0, init=0.25), "count": Integer(0, 4, init=3)}).state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    scalars = dict.fromkeys(("export_for_a_plain_network", "centred", "gate_scale"), ())
    assert shapes == {"unconstrained": (2,), "raw_scale": (2,), **scalars}


def test_layers_have_a_gate_for_each_entry() -> None:
    net = convert(nn.Linear(4, 3), mixed())
    assert net.weight_gate.shape == net.bias_gate.shape == (3, 5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Categorical("relu", "r"), "choices to be a list or tuple of strings, got 'relu'"),
        (lambda: Categorical({"a", "b"}, "a"), "choices to be a list or tuple of strings"),  # type: ignore[arg-type]
        (lambda: Categorical(["a", 1], "a"), "choices to be a list or tuple of strings"),  # type: ignore[list-item]
        (lambda: Categorical(["a"], "a"), "at least two choices, got 1"),
        (lambda: Categorical(["a", "b", "a"], "a"), "distinct choices"),
        (lambda: Categorical(["a", ""], "a"), r"printable characters, got \[''\]"),
        (lambda: Categorical(["a", "b\nc"], "a"), "printable characters"),
        (lambda: Categorical(["a", "b\rc"], "a"), "printable characters"),
        (lambda: Categorical(["a", "b"], "c"), r"init to be one of \['a', 'b'\], got 'c'"),
        (lambda: Categorical(["a", "b"], 0), "init to be one of"),  # type: ignore[arg-type]
        (lambda: Categorical(["a", "b"], "a", scale=-1.0), "scale > 0"),
        (lambda: Categorical(["a", "b"], "a", scale=True), "scale to be a finite number"),
        (lambda: Categorical(["a", "b"], "a", perturb="row"), "perturb='example' or perturb='batch'"),  # type: ignore[arg-type]
    ],
)
def test_categorical_refuses_wrong_arguments(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


NUMBER = Float(0.0, 1.0, init=0.5)


@pytest.mark.parametrize(
    ("others", "choices"),
    [
        (["x_b"], ("b", "c")),  # the entry of choice `b` has the name of the number
        (["x_b"], ("b_c", "d")),  # the scale of choice `b_c` reads as that of choice `c` of `x_b`
        (["x_b_scale"], ("b", "c")),
    ],
)
def test_names_that_collide_with_a_choice_are_refused(others: list[str], choices: list[str]) -> None:
    first: dict[str, Any] = {"x": Categorical(choices, choices[0])}
    second: dict[str, Any] = {name: NUMBER for name in others}
    with pytest.raises(ValueError, match="collides"):
        HyperparameterSet(first | second)
    with pytest.raises(ValueError, match="collides"):
        HyperparameterSet(first).add(second)


def test_names_with_a_common_prefix_are_accepted() -> None:
    operation = Categorical(("a", "b"), "a")
    HyperparameterSet({"x": operation, "x_strength": NUMBER, "x_scale": NUMBER, "x_more": operation})


@pytest.mark.parametrize(
    "use",
    [
        lambda h: convert(small_net(), h, dropout="operation"),
        lambda h: attach_all(nn.Sequential(GaussianNoise("operation")), h),
    ],
)
def test_categorical_is_refused_as_a_strength(use: Any) -> None:
    with pytest.raises(ValueError, match="expects a number, but the hyperparameter 'operation' is a Categorical"):
        use(mixed())


class LitAugmented(LitSmall):
    """Applies to each example the operation drawn for it."""

    def __init__(self, perturb: Any = "example") -> None:
        super().__init__({"operation": Categorical(CHOICES, "mirror", perturb=perturb)}, dropout=None)
        self.noise = self.cutout = nn.Identity()
        self.drawn: list[Tensor] = []

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        index = self.hyperparameters["operation"]
        operated = torch.stack([images, images.flip(-1), images + torch.randn_like(images)])
        if self.runs_for == "weights":  # as in the check of the rows
            self.drawn.append(index)
        chosen = operated[index, torch.arange(len(images))]
        return nn.functional.cross_entropy(self.net(chosen), labels)


@pytest.mark.parametrize(
    ("per", "perturb", "shape"), [("example", "example", (8,)), ("batch", "example", ()), ("example", "batch", ())]
)
def test_a_run_draws_choices_and_shows_the_current_one(per: Any, perturb: Any, shape: tuple[int, ...]) -> None:
    module = LitAugmented(per)
    shown: list[Any] = []

    class Bar(ProgressBar):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            shown.append(self.get_metrics(trainer, pl_module)["operation"])

    stn = STNCallback(warmup=0, lr=0.5, perturb=perturb, seed=1)
    trainer(stn, Bar(), enable_progress_bar=True).fit(module, loader(24), loader(16, seed=1))
    assert {tuple(index.shape) for index in module.drawn} == {shape}
    choice = module.hyperparameters.values()["operation"]
    assert shown[-1] == choice
    assert not torch.equal(module.hyperparameters.unconstrained, LitAugmented().hyperparameters.unconstrained)
