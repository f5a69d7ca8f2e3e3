"""Fifteen regularisation hyperparameters of AlexNet on CIFAR-10, tuned in one training run.

The first experiment of MacKay et al. (2019), arXiv:1903.03088: seven dropout rates, dropout and scaling of the input,
jitter of hue, contrast, saturation and brightness, and length and number of cutout's holes. A fifth of the training
images tunes the hyperparameters. Three networks start from the same weights and train on the same batches:

- self-tuned: the hyperparameters start weak and are tuned while the network trains;
- fixed: the hyperparameters keep the start values of the self-tuned network;
- none: no regularisation.

The validation images tune the hyperparameters, so the validation score favours the self-tuned network. Compare by the
test images, which are read once for each network, after its training.

    python examples/cifar10_alexnet.py                                    # 5,000 images, thin layers: for a CPU
    python examples/cifar10_alexnet.py --data-dir DIR --seeds 0 1 2       # {train,test}/<class>/*, no download
    python examples/cifar10_alexnet.py --subset 0 --width 1 --lr 0.01 --hyperparameter-lr 3e-3    # for a GPU
    tensorboard --logdir runs/cifar10                                     # every hyperparameter over time
"""

import argparse
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch.nn.functional as F
from cifar10_data import Batch, CIFAR10Data, LitCIFAR10
from command_line import positive, set_up, summary
from comparison import Scores, compare, print_summary
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from lightning_stn import STNCallback, STNModule, recommended_augmentation, recommended_hyperparameters
from lightning_stn.augment import ColorJitter, Cutout, InputScale
from lightning_stn.regularizers import Dropout

DROPOUT = 0.05
HYPERPARAMETERS = recommended_hyperparameters("image")
START = {name: specification.init for name, specification in HYPERPARAMETERS.items()}
COLUMNS = ("val_loss", "val_accuracy", "test_loss", "test_accuracy")


def alexnet(width: float, dropout: float = DROPOUT, input_dropout: float | str = DROPOUT) -> nn.Module:
    """AlexNet for images of 32 x 32 pixels, with a dropout on the input and after each layer but the last.

    Args:
        width: 1 for the channels and units of AlexNet, less for thinner layers.
        dropout: rate of the dropouts after the layers.
        input_dropout: rate of the dropout on the pixels, or the name of a hyperparameter.
    """
    channels = [3, *(int(width * full) for full in (64, 192, 384, 256, 256))]
    units = int(width * 4096)
    layers: OrderedDict[str, nn.Module] = OrderedDict(input_dropout=Dropout(input_dropout))
    for number in range(1, 6):
        stride = 2 if number == 1 else 1
        layers[f"conv{number}"] = nn.Conv2d(channels[number - 1], channels[number], 3, stride, padding=1)
        layers[f"relu{number}"] = nn.ReLU()
        if number in (1, 2, 5):
            layers[f"pool{number}"] = nn.MaxPool2d(2)
        layers[f"after_conv{number}"] = nn.Dropout(dropout)
    layers["flatten"] = nn.Flatten()
    for number, inputs in enumerate((4 * channels[-1], units), start=1):
        layers[f"hidden{number}"] = nn.Linear(inputs, units)
        layers[f"relu{number + 5}"] = nn.ReLU()
        layers[f"after_hidden{number}"] = nn.Dropout(dropout)
    layers["output"] = nn.Linear(units, 10)
    return nn.Sequential(layers)


def fixed(width: float, lr: float) -> LitCIFAR10:
    """The network with all hyperparameters fixed at their start values."""
    jitter = {name: START[name] for name in ("brightness", "contrast", "saturation", "hue")}
    cutout = Cutout(START["cutout_length"], START["cutout_holes"])
    augment = nn.Sequential(ColorJitter(**jitter), InputScale(START["input_scale"]), cutout)
    return LitCIFAR10(alexnet(width), augment, lr)


def unregularised(width: float, lr: float) -> LitCIFAR10:
    """The network without dropout and augmentation."""
    return LitCIFAR10(alexnet(width, 0.0, 0.0), nn.Identity(), lr)


class SelfTunedAlexNet(STNModule, LitCIFAR10):
    """The same module with tuned hyperparameters; the `training_step` of `LitCIFAR10` gives its training loss."""

    def __init__(self, width: float, lr: float) -> None:
        net = alexnet(width, input_dropout="input_dropout")
        super().__init__(hyperparameters=HYPERPARAMETERS, net=net, augment=recommended_augmentation(), lr=lr)
        self.net = self.convert(self.net, dropout="per-layer")  # seven more hyperparameters

    def validation_loss(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss that the hyperparameters are tuned to minimise."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)


NETWORKS: dict[str, Callable[[float, float], LitCIFAR10]] = {
    "self-tuned": SelfTunedAlexNet,
    "fixed": fixed,
    "none": unregularised,
}


def run(seed: int, args: argparse.Namespace, name: str, callbacks: list[L.Callback]) -> tuple[LitCIFAR10, Scores]:
    """Train one network from this seed; return it, and its scores after the last epoch."""
    print(f"  training: {name}", flush=True)
    L.seed_everything(seed, verbose=False)
    data = CIFAR10Data(args.data_dir, args.subset or None, num_workers=args.num_workers, seed=seed)
    module = NETWORKS[name](args.width, args.lr)
    trainer = L.Trainer(
        max_epochs=args.epochs,
        callbacks=callbacks,
        logger=TensorBoardLogger(args.out / f"seed{seed}", name=name),
        accelerator=args.accelerator,
        devices=args.devices,
        precision=args.precision,
        log_every_n_steps=10,
        check_val_every_n_epoch=5,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=args.progress,
        enable_model_summary=False,
    )
    data.prepare_data()
    data.setup("fit")
    begin = time.perf_counter()
    trainer.fit(module, datamodule=data)
    scores = {"seconds": time.perf_counter() - begin}
    scores |= trainer.validate(module, datamodule=data, verbose=False)[0]
    scores |= trainer.test(module, datamodule=data, verbose=False)[0]
    return module, scores


def compare_networks(seed: int, args: argparse.Namespace) -> dict[str, Scores]:
    """Train the networks from one seed; print their scores, and plot the schedules."""
    print(f"\nSeed {seed}, {args.epochs} epochs", flush=True)
    stn = STNCallback(lr=args.hyperparameter_lr, method=args.method, perturb=args.perturb)
    title = f"Regularisation schedules that one self-tuned run of AlexNet found, seed {seed}"
    picture = args.out / f"seed{seed}" / "schedules.png"
    return compare(args.networks, lambda *what: run(seed, args, *what), stn, picture, title, COLUMNS)


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=summary(__doc__))
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="train/<class>/* and test/<class>/*")
    parser.add_argument("--subset", type=int, default=5000, help="images, a fifth of them for tuning; 0 for all")
    parser.add_argument("--width", type=float, default=0.25, help="of the layers; 1 for AlexNet's")
    parser.add_argument("--epochs", type=positive, default=60)
    parser.add_argument("--lr", type=float, default=0.03, help="of SGD with momentum; 0.01 in the paper")
    parser.add_argument("--hyperparameter-lr", type=float, help="by default from the length of the run")
    parser.add_argument("--method", choices=("stn", "delta-stn"), default="stn")
    parser.add_argument("--perturb", choices=("batch", "example"), default="batch")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seed", "--seeds", type=int, nargs="+", default=[0], help="one comparison for each of them")
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--progress", action="store_true", help="show Lightning's progress bar")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"), help="folder of the logs and pictures")
    args = parser.parse_args()

    set_up(args.threads)
    runs = [compare_networks(seed, args) for seed in args.seed]
    if len(runs) > 1:
        print_summary(runs, ["val_loss", "test_loss", "test_accuracy"])
    print(f"\nAll hyperparameters over time: tensorboard --logdir {args.out}")


if __name__ == "__main__":
    main()
