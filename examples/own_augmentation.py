"""One's own augmentation, an elastic distortion of handwritten digits, with tuned strengths.

`Elastic` reads its strengths as the augmentations of `lightning_stn.augment` do: each is the name of a hyperparameter,
which is tuned, or a number. Three networks start from the same weights and train on the same 250 digits:

- self-tuned: strengths and dropout rates start at a tenth of their ranges and are tuned while the network trains;
- guess: numbers that somebody would try;
- none: no regularisation.

Each network is tested at its best epoch by validation loss. The validation images also tune the hyperparameters, so
compare by the test images, which are read once for each network.

    python examples/own_augmentation.py                    # about a minute on one core
    python examples/own_augmentation.py --seeds 0 1 2      # three times that
"""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from command_line import example_parser
from comparison import SELF_TUNED, Loaders, compare_over_seeds
from digits import Batch, LitDigits, load_data
from lightning import LightningModule
from torch import Tensor

from lightning_stn import Float, STNModule
from lightning_stn.augment import Augmentation


class Elastic(Augmentation):
    """Bends images by a smooth random field, with draws that differ between examples; Simard et al. (2003).

    Args:
        bend: standard deviation of the shifts, as a share of the image's side: a hyperparameter's name, or a constant.
        fade: share of the ink that is lost at most, in [0, 1]: a hyperparameter's name, or a constant.

    Shape:
        images `[n, c, height, width]`, floating point, to the same.
    """

    ranges: ClassVar = {"bend": (0.0, 1.0), "fade": (0.0, 1.0)}  # allowed values of each strength

    def __init__(self, bend: str | float, fade: str | float) -> None:
        super().__init__()
        self.bend = self.checked("bend", bend)
        self.fade = self.checked("fade", fade)

    def forward(self, images: Tensor) -> Tensor:
        """Bend and fade in the weight phase; otherwise return the input."""
        if not self.active or self.all_off:
            return images
        bend = self.rows("bend", images)[:, None, None, None]  # a strength for each example, `[n]`
        knots = torch.randn(len(images), 2, 3, 3, device=images.device) * (2 * bend)  # the side runs from -1 to 1
        shifts = F.interpolate(knots, images.shape[-2:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        identity = torch.eye(2, 3, device=images.device).expand(len(images), 2, 3)
        grid = F.affine_grid(identity, list(images.shape), align_corners=False)
        ink = 1 - self.rows("fade", images) * torch.rand(len(images), device=images.device)
        return F.grid_sample(images, grid + shifts, align_corners=False) * ink[:, None, None, None]


class LitBentDigits(LitDigits):
    """The module of `digits.py`, with this augmentation in place of its noise and cutout."""

    def __init__(self, dropout: float = 0.1, bend: str | float = 0.02, fade: str | float = 0.1) -> None:
        super().__init__(dropout)
        self.augment = Elastic(bend, fade)


class SelfTuned(STNModule, LitBentDigits):
    """The same module with tuned hyperparameters."""

    def __init__(self) -> None:
        hyperparameters = {"bend": Float(0.0, 0.2, unit="share of the side"), "fade": Float(0.0, 1.0)}
        super().__init__(hyperparameters=hyperparameters, bend="bend", fade="fade")  # named where they act
        self.net = self.convert(self.net, dropout="per-layer")

    def validation_loss(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss that the hyperparameters are tuned to minimise."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)


NETWORKS: dict[str, Callable[[], LightningModule]] = {
    SELF_TUNED: SelfTuned,
    "guess": lambda: LitBentDigits(dropout=0.3, bend=0.05, fade=0.3),
    "none": lambda: LitBentDigits(dropout=0.0, bend=0.0, fade=0.0),
}


def main(arguments: list[str] | None = None) -> None:
    """Read the arguments and run."""
    args = example_parser(__doc__, epochs=100, out=Path("runs/own_augmentation")).parse_args(arguments)
    title = "Strengths of one's own augmentation, tuned on 250 digits"
    compare_over_seeds(NETWORKS, lambda seed: Loaders(*load_data(seed)), args, title)


if __name__ == "__main__":
    main()
