"""DropConnect: dropout of weights."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.func import functional_call

from lightning_stn import functional
from lightning_stn.layers import ResponseLayer
from lightning_stn.regularizer import Regularizer


class WeightDrop(Regularizer):
    """Drops single weights of a module, those of recurrences for instance, Merity et al. (2018), arXiv:1708.02182.

    One draw serves the batch and all time steps. The rate is therefore one that the batch shares: that of a
    hyperparameter with `perturb="batch"`, or of any under `STNCallback(perturb="batch")`. A weight and its response are
    dropped together.

    Args:
        module: the module that the weights belong to; it is called through this one.
        names: qualified names of its parameters, as `["weight_hh_l0"]`.
        p: a hyperparameter's name, or a constant rate in [0, 1].

    Raises:
        ValueError: a constant rate outside [0, 1], there are no such parameters, or there is a rate for each example.
    """

    ranges: ClassVar = {"p": (0.0, 1.0)}

    def __init__(self, module: nn.Module, names: Sequence[str], p: str | float) -> None:
        super().__init__()
        self.p = self.checked("p", p)
        if not isinstance(module, nn.Module):
            raise ValueError(f"WeightDrop: expected module to be a module, got {module!r}; pass the layer itself.")
        known = dict(module.named_parameters())
        if isinstance(names, str) or not names or not set(names) <= set(known):
            raise ValueError(f"WeightDrop: expected names to be a list from {list(known)}, got {names!r}.")
        self.module = module
        self.names = tuple(names)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, in the weight phase with dropped weights."""
        if not self.active:
            return self.module(*args, **kwargs)
        return functional_call(self.module, dict(self._dropped()), args, kwargs)

    def _dropped(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters that change, by qualified name."""
        rate = self.shared_strength("p")
        for name in self.names:
            place, _, own = name.rpartition(".")
            layer = self.module.get_submodule(place)
            weight = getattr(layer, own)
            mask = functional.keep_mask(weight.shape, rate, weight.device).to(weight.dtype)
            yield name, weight * mask
            if isinstance(layer, ResponseLayer) and own in layer.responding:
                yield ".".join(filter(None, [place, layer.response_name(own)])), layer.response(own) * mask

    def make_plain(self) -> nn.Module:
        """The module itself."""
        return self.module
