"""Fine-tuning of torchvision's ResNet-18, with five tuned hyperparameters.

The network begins with torchvision's weights of ImageNet. Where they cannot be downloaded, it begins with random
weights. The output says so; then this is training from scratch, and tells nothing about fine-tuning. It trains on 250
handwritten digits, or on images from a folder for each class. Three networks start alike:

- self-tuned: strengths start at a tenth of their ranges and are tuned while the network trains;
- guess: numbers that somebody would try;
- none: no regularisation.

Each network is tested at its best epoch by validation loss. The validation images also tune the hyperparameters, so
compare by the test images, which are read once for each network.

    python examples/finetune_torchvision.py                       # about two minutes on one core
    python examples/finetune_torchvision.py --weights random      # without an attempt to download
    python examples/finetune_torchvision.py --data-dir DIR        # train/<class>/* and test/<class>/*
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch.nn.functional as F
from classifier import Batch, LitClassifier
from command_line import example_parser
from comparison import SELF_TUNED, compare_over_seeds
from images import count_classes, load_images
from torch import Tensor, nn
from torch.hub import get_dir
from torchvision.models import ResNet18_Weights, resnet18
from torchvision.transforms import v2

from lightning_stn import Float, Integer, STNModule
from lightning_stn.augment import Cutout, RandomAffine
from lightning_stn.regularizers import LabelSmoothing

SIZE = 32
"""Height and width of the images; the pretrained network is best at 224, which takes a GPU."""

NORMALISE = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
"""As in the training on ImageNet."""

HYPERPARAMETERS = {
    "dropout": Float(0.0, 0.9, init=0.1),
    "degrees": Float(0.0, 45.0, unit="degrees"),
    "translate": Float(0.0, 0.3, unit="share of the side"),
    "cutout": Integer(0, 16, init=2, unit="pixels"),
    "smoothing": Float(0.0, 0.5),
}
GUESS = {"dropout": 0.2, "degrees": 10.0, "translate": 0.1, "cutout": 8, "smoothing": 0.1}


class LitFineTuning(LitClassifier):
    """ResNet-18 with a new last layer behind a dropout, augmentation and label smoothing.

    Each strength is a number or the name of a hyperparameter; that of `dropout` is a number.
    """

    def __init__(self, weights: str | None, classes: int, strengths: Mapping[str, Any]) -> None:
        net = resnet18(weights=weights)
        net.add_module("fc", nn.Sequential(nn.Dropout(strengths["dropout"]), nn.Linear(512, classes)))  # replaces fc
        super().__init__(nn.Sequential(NORMALISE, net), classes, lr=5e-4)
        move = RandomAffine(strengths["degrees"], strengths["translate"])
        self.augment = nn.Sequential(move, Cutout(strengths["cutout"]))
        self.smoothing = LabelSmoothing(strengths["smoothing"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy with dropout, augmentation and label smoothing."""
        images, labels = batch
        logits = self.net(self.augment(images))
        return F.cross_entropy(logits, labels) + self.smoothing(logits, labels)


class SelfTuned(STNModule, LitFineTuning):
    """The same module with tuned hyperparameters; the `training_step` above gives its training loss."""

    def __init__(self, weights: str | None, classes: int) -> None:
        strengths = {name: name for name in HYPERPARAMETERS} | {"dropout": 0.1}
        super().__init__(hyperparameters=HYPERPARAMETERS, weights=weights, classes=classes, strengths=strengths)
        self.net = self.convert(self.net, dropout="dropout")

    def validation_loss(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss that the hyperparameters are tuned to minimise."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)


def available(weights: str) -> str | None:
    """The name of torchvision's weights if they are there or can be downloaded, else None; prints which."""
    if weights == "imagenet":
        try:
            ResNet18_Weights.DEFAULT.get_state_dict(progress=False)
            return "DEFAULT"
        except URLError as error:
            print(f"No weights of ImageNet ({error.reason}).")
            print(f"To fine-tune, put {ResNet18_Weights.DEFAULT.url} into {get_dir()}/checkpoints.")
    print("The network begins with random weights: this is training from scratch, not fine-tuning.")
    return None


def main(arguments: list[str] | None = None) -> None:
    """Read the arguments and run."""
    parser = example_parser(__doc__, epochs=15, out=Path("runs/finetune"))
    parser.add_argument("--weights", choices=("imagenet", "random"), default="imagenet")
    parser.add_argument("--data-dir", type=Path, help="folder of train/<class>/* and test/<class>/*")
    args = parser.parse_args(arguments)
    weights, classes = available(args.weights), count_classes(args.data_dir)
    networks: dict[str, Callable[[], LitFineTuning]] = {
        SELF_TUNED: lambda: SelfTuned(weights, classes),
        "guess": lambda: LitFineTuning(weights, classes, GUESS),
        "none": lambda: LitFineTuning(weights, classes, dict.fromkeys(GUESS, 0)),
    }
    title = "Regularisation schedules that one self-tuned run of ResNet-18 found"
    compare_over_seeds(networks, lambda seed: load_images(seed, args.data_dir, SIZE), args, title)


if __name__ == "__main__":
    main()
