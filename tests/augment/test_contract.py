"""Properties of every augmentation: the identity outside the weight phase and at strength 0, and accepted inputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_stn import Float, HyperparameterSet, Integer
from lightning_stn.augment import (
    Augmentation,
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
from lightning_stn.binding import attach_all, bind_weight_phase, unbind

CASES: dict[str, tuple[Callable[[], Augmentation], dict[str, float]]] = {
    "brightness": (lambda: ColorJitter(brightness="brightness"), {"brightness": 0.9}),
    "contrast": (lambda: ColorJitter(contrast="contrast"), {"contrast": 0.9}),
    "saturation": (lambda: ColorJitter(saturation="saturation"), {"saturation": 0.9}),
    "hue": (lambda: ColorJitter(hue="hue"), {"hue": 0.5}),
    "jitter": (
        lambda: ColorJitter("brightness", "contrast", "saturation", "hue"),
        {"brightness": 0.9, "contrast": 0.9, "saturation": 0.9, "hue": 0.5},
    ),
    "degrees": (lambda: RandomAffine(degrees="degrees"), {"degrees": 90.0}),
    "translate": (lambda: RandomAffine(translate="translate", fill=3.0), {"translate": 0.5}),
    "scale": (lambda: RandomAffine(scale="scale", interpolation="nearest"), {"scale": 0.9}),
    "shear": (lambda: RandomAffine(shear="shear"), {"shear": 45.0}),
    "affine": (
        lambda: RandomAffine("degrees", "translate", "scale", "shear"),
        {"degrees": 90.0, "translate": 0.5, "scale": 0.9, "shear": 45.0},
    ),
    "input scale": (lambda: InputScale("scale"), {"scale": 0.9}),
    "noise": (lambda: GaussianNoise("std"), {"std": 20.0}),
    "cutout length": (lambda: Cutout("length", holes=2, fill=7.0), {"length": 5.0}),
    "cutout holes": (lambda: Cutout(5, "holes", fill=7.0, max_holes=3), {"holes": 3.0}),
    "erasing": (lambda: RandomErasing("p", value=7.0), {"p": 1.0}),
    "flip": (lambda: RandomHorizontalFlip("p"), {"p": 1.0}),
    "mixup": (lambda: MixUp("alpha", num_classes=3), {"alpha": 50.0}),
    "cutmix": (lambda: CutMix("alpha", num_classes=3), {"alpha": 50.0}),
}
LABELS = torch.tensor([0, 1, 2, 0])
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8]
every_case = pytest.mark.parametrize("case", CASES)


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random colours, none of them grey, black or white."""
    pixels = 0.1 + 0.8 * torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return pixels.to(dtype) if dtype.is_floating_point else (255 * pixels).to(dtype)


def call(module: Augmentation, input: Tensor) -> Tensor:
    output = module(input, LABELS[: len(input)]) if isinstance(module, MixUp | CutMix) else module(input)
    return output[0] if isinstance(output, tuple) else output


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_augmentation_keeps_only_the_examples_with_strength_zero(bind_values: Any, case: str, dtype: Any) -> None:
    build, values = CASES[case]
    torch.manual_seed(0)
    module = build()
    bind_values(module, **{name: [0.0, value, 0.0, value] for name, value in values.items()})
    input = images(4, 3, 8, 9, dtype=dtype)
    before = input.clone()
    output = call(module, input)
    assert torch.equal(input, before)
    assert output.dtype == dtype
    assert output.shape == input.shape
    assert [torch.equal(a, b) for a, b in zip(output, input, strict=True)] == [True, False, True, False]


@every_case
@pytest.mark.parametrize("rows", ["scalar", "per example"])
@pytest.mark.parametrize("shape", [(1, 3, 8, 9), (4, 1, 8, 9), (0, 3, 8, 9), (0, 1, 8, 9)], ids=str)
def test_augmentation_keeps_shape_and_dtype_for_shared_and_per_example_strengths(
    bind_values: Any, case: str, rows: str, shape: tuple[int, ...]
) -> None:
    build, values = CASES[case]
    module = build()
    bind_values(module, **{name: value if rows == "scalar" else [value] * shape[0] for name, value in values.items()})
    for dtype in (torch.float32, torch.uint8):
        output = call(module, images(*shape, dtype=dtype))
        assert output.dtype == dtype
        assert output.shape == shape


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("mixup", "cutmix", "flip")])
def test_draws_differ_between_examples_that_share_a_strength(bind_values: Any, case: str) -> None:
    build, values = CASES[case]
    torch.manual_seed(0)
    module = build()
    bind_values(module, **values)
    output = call(module, images(1, 3, 16, 16).expand(4, -1, -1, -1))
    assert not any(torch.equal(output[0], row) for row in output[1:])


@every_case
def test_draws_do_not_depend_on_the_default_dtype(bind_values: Any, case: str) -> None:
    """As under Lightning's `bf16-true`. The tolerance allows for constants that are rounded to the default dtype."""
    build, values = CASES[case]
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        module = build()
        bind_values(module, **values)
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            outputs.append(call(module, images(4, 3, 40, 300)))
        finally:
            torch.set_default_dtype(torch.float32)
    assert outputs[0].dtype == outputs[1].dtype
    torch.testing.assert_close(*outputs, rtol=0.01, atol=0.01)


@every_case
def test_augmentation_is_the_identity_outside_the_weight_phase(bind_values: Any, case: str) -> None:
    build, values = CASES[case]
    module = build()
    hyperparameters = bind_values(module, **values)
    input = images(4, 3, 8, 9)
    assert call(module, input) is not input
    assert call(module.eval(), input) is input
    module.train()
    unbind(hyperparameters)
    assert call(module, input) is input


@pytest.mark.parametrize(
    "module",
    [
        ColorJitter(),
        RandomAffine(),
        InputScale(0),
        GaussianNoise(0.0),
        Cutout(0),
        Cutout(4, holes=0),
        RandomErasing(0.0),
        RandomHorizontalFlip(0),
        MixUp(0.0, 3),
        CutMix(0.0, 3),
    ],
    ids=str,
)
def test_augmentation_with_constants_of_zero_returns_its_input_and_draws_nothing(module: Augmentation) -> None:
    input = images(4, 3, 8, 9)
    state = torch.get_rng_state()
    assert call(module.train(), input) is input
    assert torch.equal(torch.get_rng_state(), state)


@every_case
def test_augmentation_is_repeated_by_the_same_seed(bind_values: Any, case: str) -> None:
    build, values = CASES[case]
    module = build()
    bind_values(module, **values)
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(call(module, images(4, 3, 8, 9)))
    assert torch.equal(*outputs)


@every_case
def test_augmentation_is_unchanged_by_autocast(bind_values: Any, case: str) -> None:
    build, values = CASES[case]
    module = build()
    bind_values(module, **values)
    torch.manual_seed(3)
    expected = call(module, images(4, 3, 8, 9))
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(call(module, images(4, 3, 8, 9)), expected)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ColorJitter(brightness=-0.1), "expected brightness to be .* at least 0, got -0.1"),
        (lambda: ColorJitter(contrast=(0.8, 1.2)), r"expected contrast to be .* number .* got \(0.8, 1.2\)"),
        (lambda: ColorJitter(hue=0.6), r"expected hue to be .* in \[0, 0.5\], got 0.6"),
        (lambda: RandomAffine(degrees=-1), "expected degrees"),
        (lambda: RandomAffine(translate=1.1), r"expected translate .* in \[0, 1\]"),
        (lambda: RandomAffine(scale=float("nan")), "expected scale"),
        (lambda: RandomAffine(shear=91), r"expected shear .* in \[0, 90\]"),
        (lambda: RandomAffine(5, interpolation="cubic"), "expected interpolation 'bilinear' or 'nearest', got 'cubic'"),
        (lambda: InputScale(2), "expected scale"),
        (lambda: Cutout(-1), "expected length"),
        (lambda: Cutout(1, holes=-1), "expected holes"),
        (lambda: Cutout(1, "holes", max_holes=-1), "expected max_holes to be at least 0, got -1"),
        (lambda: RandomErasing(1.5), r"expected p to be .* in \[0, 1\]"),
        (lambda: RandomErasing(0.5, scale=(0.5, 0.1)), r"expected scale to be \(low, high\) within \[0, 1\]"),
        (lambda: RandomErasing(0.5, ratio=(0.0, 1.0)), r"expected ratio to be \(low, high\) with 0 < low"),
        (lambda: RandomHorizontalFlip(-1), "expected p"),
        (lambda: MixUp(-1, 3), "expected alpha"),
        (lambda: CutMix(1, 0), "expected num_classes to be at least 1"),
    ],
)
def test_augmentation_refuses_arguments_out_of_range(build: Callable[[], Augmentation], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("module", "input", "message"),
    [
        (
            ColorJitter(0.5),
            torch.ones(3, 8, 8),
            r"ColorJitter: expected images \[n, c, height, width\], got .*\[3, 8, 8\]",
        ),
        (
            ColorJitter(0.5),
            torch.ones(2, 4, 8, 8),
            r"expected 1 or 3 channels in dimension 1, got shape \[2, 4, 8, 8\]",
        ),
        (RandomAffine(5), torch.ones(8, 8), "RandomAffine: expected images"),
        (Cutout(1), torch.ones(2, 8, 8), "Cutout: expected images"),
        (RandomErasing(0.5), torch.ones(2, 8, 8), "RandomErasing: expected images"),
        (RandomHorizontalFlip(0.5), torch.ones(2, 8), "RandomHorizontalFlip: expected images"),
        (CutMix(1.0, 3), torch.ones(2, 8), "CutMix: expected images"),
        (GaussianNoise(1.0), torch.ones(2, 8, dtype=torch.int64), "floating point dtype or uint8, got torch.int64"),
        (Cutout(4, fill=0.5), torch.ones(2, 3, 8, 8, dtype=torch.uint8), "whole numbers 0..255 for uint8 .* got 0.5"),
    ],
)
def test_augmentation_refuses_inputs_of_wrong_shape_or_dtype(module: Augmentation, input: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(module.train(), input)


@every_case
def test_augmentation_refuses_a_sample_of_another_batch_size(bind_values: Any, case: str) -> None:
    build, values = CASES[case]
    module = build()
    bind_values(module, **{name: [value] * 3 for name, value in values.items()})
    with pytest.raises(ValueError, match="3 rows for an input of shape"):
        call(module, images(4, 3, 8, 9))


@pytest.mark.parametrize(
    ("module", "specification", "message"),
    [
        (
            ColorJitter(hue="strength"),
            Float(0.0, 1.0, init=0.1),
            r"expected hue in \[0, 0.5\], but the hyperparameter 'strength'",
        ),
        (GaussianNoise("strength"), Float(None, None, init=0.1), "expected std of at least 0"),
        (Cutout("strength"), Integer(-1, 4, init=0), "expected length of at least 0"),
        (Cutout(4, "strength"), Float(0.0, None, init=0.1), "expected an upper bound for the number of holes"),
    ],
)
def test_attach_refuses_a_hyperparameter_with_too_wide_a_range(module: Any, specification: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach_all(module, HyperparameterSet({"strength": specification}))
    assert module.hyperparameters is None


def test_attach_refuses_an_unknown_hyperparameter() -> None:
    with pytest.raises(KeyError, match="Cutout reads the hyperparameter 'hole'"):
        attach_all(Cutout(4, "hole"), HyperparameterSet({"holes": Integer(0, 4, init=1)}))


def test_augmentation_applies_the_sample_bound_to_its_set() -> None:
    torch.manual_seed(0)
    module = RandomHorizontalFlip("p")
    hyperparameters = HyperparameterSet({"p": Float(0.0, 1.0, init=0.5)})
    attach_all(module, hyperparameters)
    bind_weight_phase(hyperparameters, torch.tensor([[-90.0], [90.0]]))
    input = images(2, 3, 4, 5)
    assert torch.equal(module(input), torch.stack([input[0], input[1].flip(-1)]))


def test_augmentation_passes_gradients_to_its_input() -> None:
    torch.manual_seed(0)
    input = images(2, 3, 8, 8).requires_grad_()
    module = torch.nn.Sequential(
        ColorJitter(0.5, 0.5, 0.5, 0.1), RandomAffine(10, 0.1, 0.1, 5), Cutout(2), InputScale(0.2), GaussianNoise(0.1)
    )
    (grad,) = torch.autograd.grad(module(input).sum(), input)
    assert grad.isfinite().all()
    assert grad.any()


def test_repr_of_an_augmentation_names_its_strengths() -> None:
    assert repr(ColorJitter("b", hue=0.1)) == "ColorJitter(brightness='b', contrast=0.0, saturation=0.0, hue=0.1)"
    assert repr(MixUp("alpha", 3)) == "MixUp(alpha='alpha', num_classes=3)"
