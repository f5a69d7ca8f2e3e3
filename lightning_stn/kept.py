"""What a pass leaves as it was that does not count: one for the hyperparameters, for the response, or for a check."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torchmetrics import Metric


def keep_statistics(root: nn.Module) -> AbstractContextManager[None]:
    """Give modules copies of their running statistics; on exit they have the originals, unchanged.

    Statistics are all buffers of a normalisation, and floating-point buffers of other modules in training mode.
    """
    return keep_buffers(root, lambda owner, buffer: isinstance(owner, _NormBase) or buffer.is_floating_point())


@contextmanager
def keep_buffers(root: nn.Module, wanted: Callable[[nn.Module, Tensor], bool]) -> Iterator[None]:
    """Give modules in training mode copies of buffers; on exit they have the originals, unchanged.

    Args:
        root: the module that owns all others.
        wanted: whether to copy a buffer, given the module that has it and the buffer.
    """
    # Copies, since statistics restored in place would differ in version from those that backward has saved.
    owners = [module for module in root.modules() if module.training and module._buffers]
    originals = [dict(module._buffers) for module in owners]
    for module, buffers in zip(owners, originals, strict=True):
        for name, buffer in buffers.items():
            if buffer is not None and wanted(module, buffer):
                module._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for module, buffers in zip(owners, originals, strict=True):
            module._buffers.update(buffers)


@contextmanager
def keep_metrics(root: nn.Module) -> Iterator[None]:
    """Give torchmetrics' metrics below `root` copies of their states; on exit they are as they were."""
    metrics = [module for module in root.modules() if isinstance(module, Metric)]
    originals = [dict(metric.__dict__) for metric in metrics]
    for metric in metrics:
        metric.__dict__.update({name: _copied(state) for name, state in metric.metric_state.items()})
    try:
        yield
    finally:
        for metric, attributes in zip(metrics, originals, strict=True):
            metric.__dict__.clear()
            metric.__dict__.update(attributes)


def _copied(state: Any) -> Any:
    """A metric's state, which it changes in place: a tensor, or a list of tensors that it appends to."""
    return state.clone() if isinstance(state, Tensor) else list(state)
