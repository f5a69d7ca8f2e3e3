"""Recommended hyperparameters: those of MacKay et al. (2019), arXiv:1903.03088, section 5, with their start values."""

from typing import Literal

from torch import nn

from lightning_stn.augment import ColorJitter, Cutout, InputScale
from lightning_stn.ranges import Float, Integer
from lightning_stn.specifications import Hyperparameter

_START = 0.05


def recommended_hyperparameters(task: Literal["image", "language"]) -> dict[str, Hyperparameter]:
    """Ranges and start values for a kind of network, by name.

    "image": `input_dropout` (for a dropout on the pixels), and the hyperparameters of `recommended_augmentation`:
    `input_scale`, `hue`, `contrast`, `saturation`, `brightness`, `cutout_length` (pixels) and `cutout_holes`.
    `convert(dropout="per-layer")` adds one for each dropout inside the network, starting at its rate.

    "language": for recurrent networks, `output_dropout`, `input_dropout`, `hidden_dropout` and `embedding_dropout`
    (`LockedDropout` and `EmbeddingDropout`), `weight_dropout` (`WeightDrop`, so shared by the batch), and the
    weights `ar` and `tar` of `ActivationPenalty` and `TemporalActivationPenalty`.

    Args:
        task: the kind of network.

    Returns:
        A new dictionary, for `STNModule(hyperparameters=...)`; remove the hyperparameters that no module reads.

    Raises:
        ValueError: `task` is neither "image" nor "language".
    """
    if task == "image":
        return {
            "input_dropout": Float(0.0, 1.0, init=_START),
            "input_scale": Float(0.0, 0.3, init=_START, unit="range of the factor"),
            "hue": Float(0.0, 0.5, init=_START, unit="range of the jitter"),
            "contrast": Float(0.0, 1.0, init=_START, unit="range of the jitter"),
            "saturation": Float(0.0, 1.0, init=_START, unit="range of the jitter"),
            "brightness": Float(0.0, 1.0, init=_START, unit="range of the jitter"),
            "cutout_length": Integer(0, 24, init=4, unit="pixels"),
            "cutout_holes": Integer(0, 4, init=1, unit="holes"),
        }
    if task == "language":
        rates = ("output_dropout", "input_dropout", "hidden_dropout", "embedding_dropout")
        return {
            **{name: Float(0.0, 0.9, init=_START) for name in rates},
            "weight_dropout": Float(0.0, 0.9, init=_START, perturb="batch"),
            "ar": Float(0.0, None, init=_START, unit="weight"),
            "tar": Float(0.0, None, init=_START, unit="weight"),
        }
    raise ValueError(
        f"recommended_hyperparameters: expected task='image' or task='language', got {task!r}; build "
        "your own dictionary for another kind of network."
    )


def recommended_augmentation() -> nn.Sequential:
    """Colour jitter, input scale and cutout at the hyperparameters of `recommended_hyperparameters("image")`.

    Shape:
        images `[n, 1 or 3, height, width]`, floating point in [0, 1] or uint8, to the same shape and dtype.
    """
    return nn.Sequential(
        ColorJitter(brightness="brightness", contrast="contrast", saturation="saturation", hue="hue"),
        InputScale("input_scale"),
        Cutout(length="cutout_length", holes="cutout_holes"),
    )
