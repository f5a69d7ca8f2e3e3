"""The kind of hyperparameter that is one of several named choices."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import Tensor

from lightning_stn.functional import choice_probabilities
from lightning_stn.specifications import Chart, Hyperparameter, Perturb, Value

START_MARGIN = 1.0
"""Margin of the initial choice's logit over the others, in units of `scale`."""


@dataclass(frozen=True, repr=False)
class Categorical(Hyperparameter):
    """One of several named choices: the argmax of perturbed logits, one unconstrained entry for each choice.

    It is read as the index of the choice, int64; of equal logits the first counts. The logit of `init` starts one scale
    above the others, which start at zero: whatever the scale, the perturbation draws `init` in 76% of cases out of 2
    choices, 63% of 3, 49% of 5 and 34% of 10, and the others equally often.

    The network must learn the effect of each choice before the logits move: give it a warm-up in which every choice is
    drawn for a thousand examples or more. The network forgets a choice that is hardly drawn, which then stays rare.

    For the weight phase only: augmentation operations, losses, masks. A choice that acts in validation as well, such as
    an activation function, is not tuned, since the validation loss is differentiated through the weights alone.

    Args:
        choices: two or more distinct printable names; they become TensorBoard tags and columns of `schedule.csv`.
        init: the initial choice.
        scale: initial standard deviation of the perturbation of every logit.
        perturb: as for `Float`.
        unit: as for `Float`.

    Raises:
        ValueError: there are fewer than two choices, one is repeated, empty or not printable (a line break or a control
            character does not survive in a CSV file or a tag), `init` is not a choice, or an argument has a wrong type.

    Example:
        Every example under the operation that was drawn for it, `[n]`, or all under one where the batch shares it:

        >>> import torch
        >>> from lightning_stn import HyperparameterSet
        >>> operation = Categorical(("none", "mirror", "noise"), init="none")
        >>> operation
        Categorical(('none', 'mirror', 'noise'), init='none')
        >>> hyperparameters = HyperparameterSet({"operation": operation})
        >>> def augment(images):
        ...     operated = torch.stack([images, images.flip(-1), images + torch.randn_like(images)])
        ...     return operated[hyperparameters["operation"], torch.arange(len(images))]
        >>> augment(torch.zeros(8, 1, 6, 6)).shape
        torch.Size([8, 1, 6, 6])
        >>> hyperparameters.values()
        {'operation': 'none'}
    """

    choices: Sequence[str]
    init: str
    _: KW_ONLY
    scale: float = 0.5
    perturb: Perturb = "example"
    unit: str = ""

    def __post_init__(self) -> None:
        """Check the choices, and keep them as a tuple."""
        choices: Any = self.choices
        if not isinstance(choices, tuple | list) or not all(isinstance(choice, str) for choice in choices):
            raise ValueError(f"{self!r}: expected choices to be a list or tuple of strings, got {choices!r}.")
        object.__setattr__(self, "choices", tuple(choices))
        if len(choices) < 2:
            raise ValueError(f"{self!r}: expected at least two choices, got {len(choices)}; with one nothing is tuned.")
        if len(set(choices)) < len(choices):
            raise ValueError(f"{self!r}: expected distinct choices, got some of {choices!r} twice; rename them.")
        unusable = [choice for choice in choices if not choice or not choice.isprintable()]
        if unusable:
            raise ValueError(
                f"{self!r}: expected choices of printable characters, got {unusable}; they become TensorBoard tags and "
                "columns of schedule.csv, so leave out line breaks and control characters."
            )
        if self.init not in choices:
            raise ValueError(f"{self!r}: expected init to be one of {list(choices)}, got {self.init!r}.")
        super().__post_init__()

    @property
    def parts(self) -> tuple[str, ...]:
        """The choices."""
        return tuple(self.choices)

    @property
    def bounds(self) -> None:
        """None: a choice is not a number."""
        return None

    def unconstrained_init(self) -> list[float]:
        """Logits, zero except that of `init`."""
        return [START_MARGIN * self.scale * (choice == self.init) for choice in self.choices]

    def read(self, unconstrained: Tensor) -> Tensor:
        """Index of the largest logit, the first of equal ones: `[..., choices]` to `[...]`, int64."""
        return unconstrained.argmax(-1)

    def to_python(self, value: Tensor) -> Value:
        """The choice with this index."""
        return self.choices[int(value)]

    def curves(self, name: str, values: Tensor, unconstrained: Tensor, scale: Tensor) -> dict[str, float]:
        """Index of the current choice, and the probability that the perturbation draws each choice."""
        probabilities = choice_probabilities(unconstrained, scale).tolist()
        return {f"value/{name}": values[0].item()} | dict(zip(self.chart(name).tags, probabilities, strict=True))

    def chart(self, name: str) -> Chart:
        """A line for the probability of each choice."""
        return Chart("Multiline", [f"probability/{label}" for label in self.labels(name)])
