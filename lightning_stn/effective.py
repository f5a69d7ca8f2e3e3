"""Effective parameters of one pass, each built once however often it is read."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves


class _Entry(NamedTuple):
    """An effective parameter, its version, and the tensors it was built from with theirs."""

    effective: Tensor
    version: int
    sources: tuple[Tensor, ...]
    states: tuple[object, ...]


class EffectiveParameters:
    """Effective parameters by key, each built at its first reading and again when what it was built from changes.

    Under `torch.compile`, inside transforms of `torch.func`, and in a backward pass, where activation checkpoints
    compute again, each reading builds.

    Args:
        state: what is compared to see whether a source has changed: `version` within a step, `state` for longer.
    """

    def __init__(self, state: Callable[[Tensor], object]) -> None:
        self._state = state
        self._entries: dict[tuple[int, bool], _Entry] = {}

    def get(self, sources: Sequence[Tensor], build: Callable[[], Tensor], label: Callable[[], str]) -> Tensor:
        """The effective parameter that `build` returns.

        Args:
            sources: what it is built from; the first is its gate, which modules that share the parameter share too.
            build: computes it.
            label: names the parameter in error messages.

        Raises:
            RuntimeError: it was modified in place since an earlier reading.
        """
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return build()
        if in_backward() or not all(map(is_unsharded, map(type, sources))):
            return _unseen_by_checkpoints(build)
        gate = id(sources[0])
        key, states = (gate, torch.is_grad_enabled()), tuple(map(self._state, sources))
        if self._entries:
            self._check_unmodified(gate, label)
            entry = self._entries.get(key)
            if entry is not None and entry.states == states and _same(entry.sources, sources):
                return entry.effective
        effective = _unseen_by_checkpoints(build)
        self._entries[key] = _Entry(effective, version(effective), tuple(sources), states)
        if effective.requires_grad:
            # A backward pass frees the graph behind it, so that the next reading needs another one. The graph keeps its
            # hooks where no garbage collection looks: one that held this object would keep the graph for ever.
            kept = weakref.ref(self)
            effective.register_hook(lambda _: _forget(kept, key))  # type: ignore[no-untyped-call]
        return effective

    def _check_unmodified(self, gate: int, label: Callable[[], str]) -> None:
        for grad in (False, True):
            entry = self._entries.get((gate, grad))
            if entry is not None and version(entry.effective) != entry.version:
                raise RuntimeError(
                    f"{label()} was modified in place while its network ran with a response: the change is lost, since "
                    "what the network reads there is computed from the parameter. Constrain the parameter after the "
                    "step of the optimiser instead, in on_train_batch_end, by torch.nn.utils.parametrize, or leave the "
                    "module plain with convert(exclude=...)."
                )

    def __deepcopy__(self, memo: dict[int, object]) -> "EffectiveParameters":
        """An empty one, since graphs cannot be copied."""
        return EffectiveParameters(self._state)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle an empty one, for the same reason."""
        return EffectiveParameters, (self._state,)


def _forget(kept: "weakref.ref[EffectiveParameters]", key: tuple[int, bool]) -> None:
    parameters = kept()
    if parameters is not None:
        parameters._entries.pop(key, None)


def is_unsharded(kind: type[Tensor]) -> bool:
    """Whether tensors of a type are whole and show their changes, unlike sharded ones."""
    return kind is Tensor or kind is torch.nn.Parameter or issubclass(kind, torch.nn.Parameter)


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(x is y for x, y in zip(a, b, strict=True))


def version(tensor: Tensor) -> int:
    """What changes with every modification in place, but for those through `.data`."""
    return -1 if tensor.is_inference() else tensor._version


def state(tensor: Tensor) -> tuple[object, ...]:
    """What also changes where a tensor gets other entries, or another precision or device."""
    return tensor.data_ptr(), tensor.dtype, tensor.requires_grad, version(tensor)


def _unseen_by_checkpoints(build: Callable[[], Tensor]) -> Tensor:
    """Build with hooks that keep what backward needs.

    An activation checkpoint counts the tensors that its region saves, in forward and when it computes again. The
    effective parameter may be built in one of both, and read from before in the other.
    """
    if not _may_have_hooks():
        return build()
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        return build()


def _may_have_hooks() -> bool:
    """Whether hooks for saved tensors are set; True where this version of torch does not tell."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # from torch 2.8 on
    if top is None:
        return True
    try:
        return top(True) is not None
    except TypeError:  # without the argument at first
        return top() is not None


def in_backward() -> bool:
    """Whether a backward pass calls, as activation checkpoints do to compute again."""
    return torch._C._current_graph_task_id() != -1


class _Uncomputable(Tensor):
    """Shows what kind of tensor a parameter is, and refuses to be computed with."""

    reason: str

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Allow questions of precision, device and shape.

        Raises:
            ValueError: anything is computed.
        """
        if func in _QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        reasons = (arg.reason for arg in tree_leaves((args, kwargs)) if isinstance(arg, cls))
        raise ValueError(next(reasons, "A parameter that cannot be read here was computed with."))


_QUESTIONS = {
    *(getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "requires_grad", "is_cuda")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "is_floating_point", "is_complex", "__len__")),
}


def uncomputable(tensor: Tensor, reason: str) -> Tensor:
    """A view of a tensor that tells its precision, device and shape, and raises `reason` where it is computed with."""
    view = tensor.detach().as_subclass(_Uncomputable)
    view.reason = reason
    return view
