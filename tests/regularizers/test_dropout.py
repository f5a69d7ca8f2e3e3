"""Dropouts, noise and cutout: the strength of each example, and the identity outside the weight phase."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_stn import Float, HyperparameterSet, Integer
from lightning_stn.augment import Cutout, GaussianNoise
from lightning_stn.augment.cutout import cutout_mask
from lightning_stn.binding import attach_all, bind_weight_phase, unbind
from lightning_stn.regularizers import AlphaDropout, Dropout, Dropout1d, Dropout2d, Dropout3d, DropPath, Regularizer

LOGITS = torch.tensor([[-3.0], [0.0], [1.0], [3.0]])
DROPOUTS = [
    (Dropout, (4, 5000), 5000),
    (Dropout, (4, 50, 100), 5000),
    (Dropout1d, (4, 5000, 2), 5000),
    (Dropout2d, (4, 5000, 2, 1), 5000),
    (Dropout3d, (4, 5000, 2, 1, 2), 5000),
]
ALL = [
    (Dropout("rate"), (4, 6)),
    (Dropout2d("rate"), (4, 3, 5, 5)),
    (AlphaDropout("rate"), (4, 6)),
    (DropPath("rate"), (4, 6)),
    (GaussianNoise("rate"), (4, 6)),
    (Cutout("length"), (4, 3, 5, 5)),
]


def attached(module: Regularizer) -> HyperparameterSet:
    hyperparameters = HyperparameterSet({"rate": Float(0.0, 1.0, init=0.5), "length": Integer(0, 4, init=2)})
    attach_all(module, hyperparameters)
    return hyperparameters


@pytest.mark.parametrize(("kind", "shape", "draws"), DROPOUTS)
def test_dropout_keeps_entries_at_the_rate_of_each_example(kind: Any, shape: tuple[int, ...], draws: int) -> None:
    """Six binomial standard deviations: a false alarm in fewer than one of 10^8 runs."""
    torch.manual_seed(0)
    module = kind("rate")
    hyperparameters = attached(module)
    sample = torch.cat([LOGITS, torch.zeros(4, 1)], dim=1)
    bind_weight_phase(hyperparameters, sample)
    output = module(torch.ones(shape))
    for row, rate in zip(output, torch.sigmoid(LOGITS[:, 0]).tolist(), strict=True):
        kept = row.reshape(draws, -1).amax(1)
        share = (kept > 0).double().mean().item()
        assert abs(share - (1 - rate)) < 6 * math.sqrt(rate * (1 - rate) / draws)
        torch.testing.assert_close(kept[kept > 0], torch.full_like(kept[kept > 0], 1 / (1 - rate)))


@pytest.mark.parametrize(
    ("kind", "shape"), [(Dropout1d, (4, 8, 5)), (Dropout2d, (4, 8, 5, 5)), (Dropout3d, (4, 8, 3, 3, 3))]
)
def test_channel_dropout_drops_whole_channels(kind: Any, shape: tuple[int, ...]) -> None:
    module = kind("rate")
    bind_weight_phase(attached(module), torch.zeros(4, 2))
    output = module(torch.ones(shape)).flatten(2)
    assert torch.equal(output.amin(2), output.amax(2))


@pytest.mark.parametrize("rows", [1, 4])
def test_dropout_applies_a_shared_row_to_every_example(rows: int) -> None:
    torch.manual_seed(0)
    module = Dropout("rate")
    bind_weight_phase(attached(module), torch.full((rows, 2), 0.0))
    share = (module(torch.ones(4, 5000)) > 0).double().mean(1)
    assert ((share - 0.5).abs() < 6 * math.sqrt(0.25 / 5000)).all()


@pytest.mark.parametrize(("module", "shape"), ALL, ids=lambda value: str(value))
def test_regularizer_is_the_identity_outside_the_weight_phase(module: Regularizer, shape: tuple[int, ...]) -> None:
    module = copy.deepcopy(module)
    hyperparameters = attached(module)
    input = torch.randn(shape)
    assert module(input) is input
    bind_weight_phase(hyperparameters, torch.ones(4, 2) * 2)
    assert not torch.equal(module(input), input)
    assert module.eval()(input) is input
    module.train()
    unbind(hyperparameters)
    assert module(input) is input


@pytest.mark.parametrize(("module", "shape"), ALL, ids=lambda value: str(value))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_regularizer_keeps_dtype_and_shape(module: Regularizer, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    module = copy.deepcopy(module)
    bind_weight_phase(attached(module), torch.zeros(4, 2))
    output = module(torch.ones(shape, dtype=dtype))
    assert output.dtype == dtype
    assert output.shape == shape


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (Dropout(0.0), (4, 6)),
        (AlphaDropout(0.0), (4, 6)),
        (DropPath(0.0), (4, 6)),
        (GaussianNoise(0.0), (4, 6)),
        (Cutout(0), (4, 3, 5, 5)),
    ],
)
def test_regularizer_with_strength_zero_is_the_identity(module: Regularizer, shape: tuple[int, ...]) -> None:
    input = torch.randn(shape)
    assert torch.equal(module(input), input)


@pytest.mark.parametrize("kind", [Dropout, AlphaDropout, DropPath])
def test_dropout_with_rate_one_returns_zeros(kind: Any) -> None:
    assert torch.equal(kind(1.0)(torch.ones(2, 3)), torch.zeros(2, 3))


def test_alpha_dropout_of_zeros_gives_the_two_values_of_torch() -> None:
    """A zero becomes one of two numbers that depend on the rate alone."""
    torch.manual_seed(0)
    module = AlphaDropout("rate")
    bind_weight_phase(attached(module), torch.cat([LOGITS, torch.zeros(4, 1)], dim=1).double())
    for row, rate in zip(module(torch.zeros(4, 500, dtype=torch.float64)), torch.sigmoid(LOGITS[:, 0]), strict=True):
        expected = F.alpha_dropout(torch.zeros(5000, dtype=torch.float64), rate.item(), training=True)
        torch.testing.assert_close(row.unique(), expected.unique(), rtol=1e-6, atol=1e-6)


def test_alpha_dropout_keeps_mean_and_variance_of_each_example() -> None:
    """Six standard errors, the variance's from the fourth moment: a false alarm in fewer than one of 10^8 runs."""
    torch.manual_seed(0)
    module, n = AlphaDropout("rate"), 100_000
    bind_weight_phase(attached(module), torch.cat([LOGITS, torch.zeros(4, 1)], dim=1))
    output = module(torch.randn(4, n)).double()
    assert (output.mean(1).abs() < 6 / math.sqrt(n)).all()
    spread = (output.pow(4).mean(1) - 1).sqrt()
    assert ((output.square().mean(1) - 1).abs() < 6 * spread / math.sqrt(n)).all()


def test_drop_path_drops_whole_branches_at_a_share_of_the_rate_of_each_example() -> None:
    """Six binomial standard deviations: a false alarm in fewer than one of 10^8 runs."""
    torch.manual_seed(0)
    module, n = DropPath("rate", share=0.5), 10_000
    bind_weight_phase(attached(module), torch.cat([LOGITS.repeat_interleave(n, 0), torch.zeros(4 * n, 1)], dim=1))
    output = module(torch.ones(4 * n, 2, 3))
    assert torch.equal(output, output[:, :1, :1].expand_as(output))
    for rows, rate in zip(output[:, 0, 0].split(n), (torch.sigmoid(LOGITS[:, 0]) / 2).tolist(), strict=True):
        assert abs((rows > 0).double().mean().item() - (1 - rate)) < 6 * math.sqrt(rate * (1 - rate) / n)
        torch.testing.assert_close(rows[rows > 0], torch.full_like(rows[rows > 0], 1 / (1 - rate)))


def test_drop_path_in_batch_mode_drops_for_the_whole_batch_and_refuses_per_example_rates() -> None:
    torch.manual_seed(0)
    module = DropPath("rate", mode="batch")
    hyperparameters = attached(module)
    bind_weight_phase(hyperparameters, torch.zeros(1, 2))
    outputs = [module(torch.ones(4, 3)) for _ in range(100)]
    assert all(output.min() == output.max() for output in outputs)
    assert 20 < sum(output.max() > 0 for output in outputs) < 80
    bind_weight_phase(hyperparameters, torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"DropPath: acts on the batch as a whole.*perturb='batch'"):
        module(torch.ones(4, 3))
    with pytest.raises(ValueError, match="expected mode='row' or mode='batch', got 'rows'"):
        DropPath(0.1, "rows")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected share to lie in \[0, 1\], got 2"):
        DropPath(0.1, share=2)


def test_dropout_with_a_constant_rate_acts_in_training_mode_as_in_torch() -> None:
    module = Dropout(0.5)
    assert not torch.equal(module(torch.ones(100)), torch.ones(100))
    assert torch.equal(module.eval()(torch.ones(100)), torch.ones(100))
    assert isinstance(module, nn.Dropout)


def test_gaussian_noise_has_the_standard_deviation_of_each_example() -> None:
    """Six standard errors of a standard deviation, `s / sqrt(2 n)`: a false alarm in fewer than one of 10^8 runs."""
    torch.manual_seed(0)
    module = GaussianNoise("rate")
    bind_weight_phase(attached(module), torch.cat([LOGITS, torch.zeros(4, 1)], dim=1))
    noise = module(torch.full((4, 5000), 7.0)) - 7.0
    expected = torch.sigmoid(LOGITS[:, 0])
    assert ((noise.std(1) - expected).abs() < 6 * expected / math.sqrt(10_000)).all()
    assert (noise.mean(1).abs() < 6 * expected / math.sqrt(5000)).all()


@given(length=st.integers(0, 9), row=st.integers(0, 6), column=st.integers(0, 4))
def test_cutout_mask_equals_a_loop_over_pixels(length: int, row: int, column: int) -> None:
    height, width = 7, 5
    mask = cutout_mask(torch.tensor([length, 0]), torch.tensor([[row, column], [0, 0]]), height, width)
    for y in range(height):
        for x in range(width):
            top, left = row - length // 2, column - length // 2
            assert mask[0, 0, y, x].item() == (top <= y < top + length and left <= x < left + length)
    assert not mask[1].any()


def test_cutout_blanks_squares_of_the_length_of_each_example() -> None:
    torch.manual_seed(0)
    module = Cutout("length", fill=-1.0)
    bind_weight_phase(attached(module), torch.tensor([[0.0, -20.0], [0.0, 0.0], [0.0, 20.0]]))
    blank = module(torch.ones(3, 2, 9, 9)) == -1.0
    areas = blank[:, 0].sum((1, 2)).tolist()
    assert areas[0] == 0
    assert 0 < areas[1] <= 4
    assert 4 <= areas[2] <= 16
    assert torch.equal(blank[:, 0], blank[:, 1])


def test_cutout_reaches_every_pixel() -> None:
    torch.manual_seed(0)
    assert (Cutout(1)(torch.ones(2000, 1, 4, 3)) == 0).any(0).all()


@pytest.mark.parametrize(
    ("module", "input", "message"),
    [
        (Dropout("rate"), torch.ones(3, 2), "4 rows for an input of shape"),
        (GaussianNoise("rate"), torch.ones(5, 2), "4 rows for an input of shape"),
        (Cutout("length"), torch.ones(3, 1, 2, 2), "4 rows for an input of shape"),
        (Cutout("length"), torch.ones(4, 2, 2), "expected images"),
    ],
)
def test_regularizer_refuses_inputs_of_wrong_shape(module: Regularizer, input: Tensor, message: str) -> None:
    bind_weight_phase(attached(module), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=message):
        module(input)


@pytest.mark.parametrize("build", [lambda: Dropout(1.5), lambda: GaussianNoise(-1.0), lambda: Cutout(-1)])
def test_regularizer_refuses_constants_out_of_range(build: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        build()


def test_regularizer_with_a_named_strength_refuses_training_before_attach() -> None:
    module = GaussianNoise("rate")
    assert module.eval()(torch.ones(2)) is not None
    with pytest.raises(RuntimeError, match=r"reads \['rate'\] but belongs to no HyperparameterSet"):
        module.train()(torch.ones(2))


def test_attach_lists_all_unknown_hyperparameters() -> None:
    net = nn.Sequential(Dropout("rat"), GaussianNoise("std"))
    with pytest.raises(KeyError, match=r"Dropout '0' reads .*'rat'.*or 'rate' is misspelt.*GaussianNoise '1' reads"):
        attach_all(net, HyperparameterSet({"rate": Float(0.0, 1.0, init=0.5)}))


def test_attach_refuses_a_second_set() -> None:
    module = Dropout("rate")
    first = attached(module)
    module.attach(first)
    with pytest.raises(ValueError, match="already reads another"):
        attached(module)


def test_repr_of_dropout_names_its_hyperparameter() -> None:
    assert repr(Dropout("rate")) == "Dropout(p='rate')"
