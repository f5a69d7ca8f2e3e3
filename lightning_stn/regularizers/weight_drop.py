"""DropConnect: dropout of weights."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.func import functional_call

from lightning_stn import functional
from lightning_stn.layers import ResponseLayer
from lightning_stn.regularizer import Regularizer


class WeightDrop(Regularizer):
    """Drops single weights of a module, such as the recurrent ones of an LSTM, Merity et al. (2018), arXiv:1708.02182.

    The batch and all time steps share one mask, so the batch must share the rate: declare the hyperparameter with
    `perturb="batch"`, or use `STNCallback(perturb="batch")`. A weight and its response are dropped together.

    Args:
        module: the module that owns the weights; call it through this wrapper.
        names: qualified names of the parameters to drop, such as `["weight_hh_l0"]`.
        p: a hyperparameter's name, or a constant rate in [0, 1].

    Raises:
        ValueError: a constant rate is outside [0, 1], a name is not that of a parameter, or each example has a rate.
    """

    ranges: ClassVar = {"p": (0.0, 1.0)}

    def __init__(self, module: nn.Module, names: Sequence[str], p: str | float) -> None:
        super().__init__()
        self.p = self.checked("p", p)
        if not isinstance(module, nn.Module):
            raise ValueError(f"WeightDrop: expected module to be an nn.Module, got {module!r}; pass the layer itself.")
        known = dict(module.named_parameters())
        listed = isinstance(names, Sequence) and not isinstance(names, str)
        if not listed or not names or not all(isinstance(name, str) and name in known for name in names):
            raise ValueError(f"WeightDrop: expected names to be a list from {list(known)}, got {names!r}.")
        self.module = module
        self.names = tuple(names)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, with dropped weights in the weight phase."""
        if not self.active:
            return self.module(*args, **kwargs)
        return functional_call(self.module, dict(self._dropped()), args, kwargs)

    def _dropped(self) -> Iterator[tuple[str, Tensor]]:
        """Masked weights, and their masked responses, by qualified name."""
        rate = self.shared_strength("p")
        for name in self.names:
            path, _, parameter = name.rpartition(".")
            layer = self.module.get_submodule(path)
            weight = layer._parameters[parameter]
            assert weight is not None
            mask = functional.keep_mask(weight.shape, rate, weight.device).to(weight.dtype)
            yield name, weight * mask
            if isinstance(layer, ResponseLayer) and parameter in layer.responding and layer.stores_response(parameter):
                yield (
                    ".".join(filter(None, [path, layer.response_name(parameter)])),
                    layer.response_weights(parameter) * mask,
                )

    def make_plain(self) -> nn.Module:
        """The wrapped module."""
        return self.module
