"""Mixtures of two examples and of their labels, each example at its own strength."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Gamma

from lightning_stn import functional
from lightning_stn.augment.base import Augmentation, box_mask, in_float


def draw_share(alpha: Tensor) -> Tensor:
    """A draw from `Beta(alpha, alpha)` for each entry, and 1 where alpha is 0.

    `Beta = sigmoid(log g - log g')` of two Gamma draws, `g(alpha) = g(alpha + 1) u^(1 / alpha)` with uniform `u`,
    Marsaglia and Tsang (2000), section 6. Logarithms keep small alphas right, where torch's `Beta` underflows to 1/2.
    """
    shape = alpha.clamp_min(1e-6)  # far enough down that every draw is 0 or 1

    def log_gamma_draw() -> Tensor:
        # 1 - rand lies in (0, 1].
        gamma = Gamma(shape + 1, torch.ones_like(shape), validate_args=False)
        return gamma.sample().log() + (1 - torch.rand_like(shape)).log() / shape

    share = torch.sigmoid(log_gamma_draw() - log_gamma_draw())
    return torch.where(alpha > 0, share, torch.ones_like(share))


def mix_rows(input: Tensor, share: Tensor) -> Tensor:
    """`share_n x_n + (1 - share_n) x_(n-1)`, exactly `x_n` for a share of 1; the dtype of the input."""

    def compute(wide: Tensor) -> Tensor:
        return torch.lerp(wide.roll(1, 0), wide, functional.align(share, wide).to(wide.dtype))

    return in_float(input, compute)


class _Mix(Augmentation):
    """Called as `images, targets = mix(images, labels)`; a subclass says how images are mixed."""

    ranges: ClassVar = {"alpha": (0, math.inf)}

    def __init__(self, alpha: str | float, num_classes: int) -> None:
        super().__init__()
        if not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(
                f"{type(self).__name__}: expected num_classes to be at least 1, got {num_classes!r}; give the number "
                "of the classes that labels count from 0."
            )
        self.alpha = self.checked("alpha", alpha)
        self.num_classes = num_classes

    def forward(self, input: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix, in the weight phase; otherwise return the input and its labels as targets."""
        targets = self.targets(input, labels)
        if not self.active or self.all_off or not len(input):
            return input, targets
        mixed, share = self.mix(input, draw_share(self.rows("alpha", input)))
        return mixed, mix_rows(targets, share)

    def mix(self, input: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """Mix each example with the one before it.

        Args:
            input: `[n, ...]`.
            share: how much of itself an example shall keep, `[n]`.

        Returns:
            The mixture, and the share kept, `[n]`.
        """
        raise NotImplementedError

    def targets(self, input: Tensor, labels: Tensor) -> Tensor:
        """Labels as probabilities, `[n, num_classes]`.

        Raises:
            ValueError: labels are neither class indices `[n]` nor probabilities `[n, num_classes]`.
        """
        n = input.shape[0]
        if labels.is_floating_point():
            if labels.shape == (n, self.num_classes):
                return labels
        elif labels.shape == (n,):
            try:
                return F.one_hot(labels.long(), self.num_classes).float()
            except RuntimeError as error:  # torch looks at the labels where that costs nothing: on a CPU
                raise ValueError(
                    f"{type(self).__name__}: expected labels among the whole numbers 0 to {self.num_classes - 1}, got "
                    f"{labels.min()} to {labels.max()}; count classes from 0, or raise num_classes."
                ) from error
        raise ValueError(
            f"{type(self).__name__}: expected labels as whole numbers [n] or as probabilities [n, {self.num_classes}] "
            f"with n = {n}, got shape {list(labels.shape)} of {labels.dtype}; flatten or convert them."
        )

    def make_plain(self) -> nn.Module:
        """Nothing can stand in.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{type(self).__name__} takes images and labels, and has no plain counterpart inside a network that is "
            "taken away; call it in training_loss."
        )

    def extra_repr(self) -> str:
        """The strength and the number of classes."""
        return f"{super().extra_repr()}, num_classes={self.num_classes}"


class MixUp(_Mix):
    """Blends each example, and its label, with the one before it, Zhang et al. (2018), arXiv:1710.09412.

    Called as `images, targets = mixup(images, labels)`: `lam x_n + (1 - lam) x_(n-1)`, and likewise the labels, with
    `lam ~ Beta(alpha_n, alpha_n)` for each example. Targets are one-hot outside the weight phase, so that one loss,
    `F.cross_entropy(logits, targets)`, serves both.

    Args:
        alpha: at least 0, and 0 for no mixing: the name of a hyperparameter, or a constant. As alpha falls towards 0,
            `lam` becomes 0 or 1: each example is itself or the one before it.
        num_classes: number of classes.

    Shape:
        input `[n, *]`, floating point or uint8, and labels `[n]`, or probabilities `[n, num_classes]`, to the shape of
        the input and targets `[n, num_classes]`, float32 (probabilities keep their dtype).

    Raises:
        ValueError: a constant out of range, or labels of another shape.
    """

    def mix(self, input: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """Blend all of an example."""
        return mix_rows(input, share), share


def draw_boxes(share: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """A box at a uniformly drawn place that covers `1 - share` of an image, less what the border clips.

    Args:
        share: `[n]`, in [0, 1].
        height: rows.
        width: columns.

    Returns:
        Row and column of the first pixel inside and of the first behind, both `[n, 2]`.
    """
    size = torch.tensor([height, width], device=share.device)
    centre = (torch.rand(len(share), 2, device=share.device, dtype=torch.float32) * size).floor()
    half = (0.5 * (1 - share).sqrt().unsqueeze(1) * size).floor()
    return (centre - half).clamp_min(0), (centre + half).minimum(size)


class CutMix(_Mix):
    """Pastes a box of the example before into each example, Yun et al. (2019), arXiv:1905.04899, as torchvision does.

    Called as `images, targets = cutmix(images, labels)`. The box covers `1 - lam` of the image, less what the border
    clips, with `lam ~ Beta(alpha_n, alpha_n)` for each example; labels are mixed by the area that was pasted. Targets
    are one-hot outside the weight phase, so that one loss, `F.cross_entropy(logits, targets)`, serves both.

    Args:
        alpha: at least 0, and 0 for no mixing: the name of a hyperparameter, or a constant.
        num_classes: number of classes.

    Shape:
        images `[n, c, height, width]` and labels `[n]`, or probabilities `[n, num_classes]`, to the same shape and
        targets `[n, num_classes]`, float32 (probabilities keep their dtype).

    Raises:
        ValueError: a constant out of range, an input without four dimensions, or labels of another shape.
    """

    def forward(self, input: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix, in the weight phase; otherwise return the input and its labels as targets."""
        self.check_images(input)
        return super().forward(input, labels)

    def mix(self, input: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """Paste a box."""
        height, width = input.shape[-2:]
        start, end = draw_boxes(share, height, width)
        mask = box_mask(start.unsqueeze(1), end.unsqueeze(1), height, width)
        kept = 1 - (end - start).prod(1) / (height * width)
        return torch.where(mask, input.roll(1, 0), input), kept
