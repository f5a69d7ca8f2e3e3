"""MixUp and CutMix: mixtures of two examples and of their labels, each example at its own strength."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Gamma

from lightning_stn import functional
from lightning_stn.arguments import is_whole
from lightning_stn.augment.base import Augmentation, box_mask, in_float


def draw_share(alpha: Tensor) -> Tensor:
    """Draws from `Beta(alpha, alpha)`, one for each entry; 1 where alpha is 0.

    `Beta = sigmoid(log g - log g')` of two Gamma draws, `g(alpha) = g(alpha + 1) u^(1 / alpha)` with uniform `u`,
    Marsaglia and Tsang (2000), section 6. Logarithms make small alphas exact, where torch's `Beta` underflows to 1/2.
    """
    # So small that every draw is 0 or 1, and so large that every draw is 1/2: beyond, Gamma is not finite.
    shape = alpha.clamp(1e-6, 1e12)

    def log_gamma_draw() -> Tensor:
        # 1 - rand lies in (0, 1], so its logarithm is finite.
        gamma = Gamma(shape + 1, torch.ones_like(shape), validate_args=False)
        return gamma.sample().log() + (1 - torch.rand_like(shape)).log() / shape

    share = torch.sigmoid(log_gamma_draw() - log_gamma_draw())
    return torch.where(alpha > 0, share, torch.ones_like(share))


def mix_rows(input: Tensor, share: Tensor) -> Tensor:
    """`share_n x_n + (1 - share_n) x_(n-1)` in the dtype of the input; exactly `x_n` for a share of 1."""

    def compute(wide: Tensor) -> Tensor:
        return torch.lerp(wide.roll(1, 0), wide, functional.align(share, wide).to(wide.dtype))

    return in_float(input, compute)


class _Mix(Augmentation):
    """Base class of mixtures, called as `images, targets = mix(images, labels)`; a subclass defines `mix`."""

    ranges: ClassVar = {"alpha": (0, math.inf)}

    def __init__(self, alpha: str | float, num_classes: int) -> None:
        super().__init__()
        if not is_whole(num_classes, 1):
            raise ValueError(
                f"{type(self).__name__}: expected num_classes to be at least 1, got {num_classes!r}; give the number "
                "of classes as a whole number."
            )
        self.alpha = self.checked("alpha", alpha)
        self.num_classes = num_classes

    def forward(self, input: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix in the weight phase; otherwise return the input, and its labels as targets."""
        targets = self.targets(input, labels)
        if not self.active or self.all_off or not len(input):
            return input, targets
        mixed, share = self.mix(input, draw_share(self.rows("alpha", input)))
        return mixed, mix_rows(targets, share)

    def mix(self, input: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """Mix each example with the previous one.

        Args:
            input: `[n, ...]`.
            share: share of itself that each example should keep, `[n]`.

        Returns:
            The mixture, and the share that each example kept, `[n]`.
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
            except RuntimeError as error:  # torch checks the range of labels on a CPU only
                raise ValueError(
                    f"{type(self).__name__}: expected labels among the whole numbers 0 to {self.num_classes - 1}, got "
                    f"{labels.min()} to {labels.max()}; count classes from 0, or raise num_classes."
                ) from error
        raise ValueError(
            f"{type(self).__name__}: expected labels as whole numbers [n] or as probabilities [n, {self.num_classes}] "
            f"with n = {n}, got shape {list(labels.shape)} of {labels.dtype}; flatten or convert them."
        )

    def make_plain(self) -> nn.Module:
        """Refuse: a mixture has no plain counterpart.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{type(self).__name__} takes images and labels, and has no plain counterpart in an exported network; call "
            "it in training_loss."
        )

    def extra_repr(self) -> str:
        """The strength and the number of classes."""
        return f"{super().extra_repr()}, num_classes={self.num_classes}"


class MixUp(_Mix):
    """Blends each example and its label with the previous one, Zhang et al. (2018), arXiv:1710.09412.

    Called as `images, targets = mixup(images, labels)`. Images and labels become `lam x_n + (1 - lam) x_(n-1)`, with
    `lam ~ Beta(alpha_n, alpha_n)` for each example. Outside the weight phase targets are one-hot, so the same loss,
    `F.cross_entropy(logits, targets)`, fits every phase.

    Args:
        alpha: at least 0, and 0 for no mixing: the name of a hyperparameter, or a constant. As alpha falls towards 0,
            `lam` becomes 0 or 1: each example stays itself or becomes the previous one.
        num_classes: number of classes.

    Shape:
        input `[n, *]`, floating point or uint8, and labels `[n]`, or probabilities `[n, num_classes]`, to the same
        shape and targets `[n, num_classes]`, float32 (probabilities keep their dtype).

    Raises:
        ValueError: a constant is out of range, or labels have another shape.
    """

    def mix(self, input: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """Blend whole examples."""
        return mix_rows(input, share), share


def draw_boxes(share: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Boxes with uniformly drawn centres, which cover `1 - share` of an image before they are clipped at the border.

    Args:
        share: share of an image outside its box, `[n]`, in [0, 1].
        height: of the images, in pixels.
        width: of the images, in pixels.

    Returns:
        `start` and `end` as for `box_mask`, both `[n, 2]`.
    """
    size = torch.tensor([height, width], device=share.device)
    centre = (torch.rand(len(share), 2, device=share.device, dtype=torch.float32) * size).floor()
    half = (0.5 * (1 - share).sqrt().unsqueeze(1) * size).floor()
    return (centre - half).clamp_min(0), (centre + half).minimum(size)


class CutMix(_Mix):
    """Pastes a box of the previous example into each example, Yun et al. (2019), arXiv:1905.04899, as torchvision does.

    Called as `images, targets = cutmix(images, labels)`. The box covers `1 - lam` of the image before it is clipped at
    the border, with `lam ~ Beta(alpha_n, alpha_n)` for each example; labels are mixed by the area that was pasted.
    Outside the weight phase targets are one-hot, so the same loss, `F.cross_entropy(logits, targets)`, fits every
    phase.

    Args:
        alpha: at least 0, and 0 for no mixing: the name of a hyperparameter, or a constant.
        num_classes: number of classes.

    Shape:
        images `[n, c, height, width]` and labels `[n]`, or probabilities `[n, num_classes]`, to the same shape and
        targets `[n, num_classes]`, float32 (probabilities keep their dtype).

    Raises:
        ValueError: a constant is out of range, the input does not have four dimensions, or labels have another shape.
    """

    def forward(self, input: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix in the weight phase; otherwise return the input, and its labels as targets."""
        self.check_images(input)
        return super().forward(input, labels)

    def mix(self, input: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """Paste a box."""
        height, width = input.shape[-2:]
        start, end = draw_boxes(share, height, width)
        mask = box_mask(start.unsqueeze(1), end.unsqueeze(1), height, width)
        kept = 1 - (end - start).prod(1) / (height * width)
        return torch.where(mask, input.roll(1, 0), input), kept
