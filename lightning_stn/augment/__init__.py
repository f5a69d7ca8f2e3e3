"""Augmentation on the device of the batch, after the loader: each example is augmented at its own sampled strength.

A custom augmentation needs no class of this package. `training_loss` runs in the weight phase only, where
`self.hyperparameters["name"]` is the sampled strength of each example, `[n]`, or a scalar that the batch shares:

```python
def training_loss(self, batch, batch_idx):
    images, labels = batch
    strengths = self.hyperparameters["sharpness"].expand(len(images)).tolist()
    images = torch.stack([adjust_sharpness(image, 1 + s) for image, s in zip(images, strengths)])
    return F.cross_entropy(self.net(images), labels)
```

To reuse it in other networks, write it as a subclass of `Augmentation`.

Example:
    >>> class Posterise(Augmentation):
    ...     '''Rounds colours to multiples of a step; a step of 0 changes nothing.'''
    ...
    ...     ranges = {"step": (0, 1)}
    ...
    ...     def __init__(self, step):
    ...         super().__init__()
    ...         self.step = self.checked("step", step)
    ...
    ...     def forward(self, input):
    ...         if not self.active or self.all_off:
    ...             return input
    ...         step = self.rows("step", input).reshape(-1, 1, 1, 1)
    ...         return ((input / step).round() * step).where(step > 0, input)
    >>> import torch
    >>> Posterise(0.5)(torch.tensor([[[[0.1, 0.4, 0.9]]]]))
    tensor([[[[0.0000, 0.5000, 1.0000]]]])
"""

from lightning_stn.augment.affine import RandomAffine
from lightning_stn.augment.base import Augmentation
from lightning_stn.augment.color import ColorJitter
from lightning_stn.augment.cutout import Cutout
from lightning_stn.augment.erasing import RandomErasing
from lightning_stn.augment.flip import RandomHorizontalFlip
from lightning_stn.augment.mix import CutMix, MixUp
from lightning_stn.augment.noise import GaussianNoise, InputScale

__all__ = [
    "Augmentation",
    "ColorJitter",
    "CutMix",
    "Cutout",
    "GaussianNoise",
    "InputScale",
    "MixUp",
    "RandomAffine",
    "RandomErasing",
    "RandomHorizontalFlip",
]
