"""The registry of plain modules that `convert` tunes, and the base class of the regularisers that replace them."""

import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeVar, get_args

from torch import Tensor, nn

from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.ranges import Float
from lightning_stn.rates import TunedRate
from lightning_stn.regularizer import Regularizer
from lightning_stn.specifications import Hyperparameter

Keyword = Literal["dropout", "drop_path"]
"""Arguments of `convert` that name a hyperparameter."""

_HIGHEST_RATE = 0.9
_SMALLEST_START = 0.05


class Tunable(TunedRate, Regularizer):
    """Base class of regularisers that `convert` puts in the place of a plain module.

    A subclass also subclasses the plain module. Its only strength is named after the attribute in which the plain
    module keeps its rate: `ranges = {"drop_prob": (0.0, 1.0)}`. Whoever reads this attribute gets a number; see
    `TunedRate`.
    """

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"p": (0.0, 1.0)}
    plain_type: ClassVar[type[nn.Module]]
    """The type of the plain module."""
    proportional: ClassVar[bool] = False
    """Whether modules that share a hyperparameter keep the ratios of their rates."""

    share: float = 1.0
    """The rate of this module as a share of its strength."""

    @classmethod
    def rate_name(cls) -> str:
        """Name of the strength, and of the plain module's attribute that holds its rate."""
        return next(iter(cls.ranges))

    @classmethod
    def plain_rate(cls, module: nn.Module) -> float:
        """The constant rate of a plain module, natural units."""
        rate: Any = getattr(module, cls.rate_name())
        return 0.0 if rate is None else float(rate)

    @classmethod
    def refusal(cls, module: nn.Module, *, generated: bool) -> str | None:
        """Why a plain module cannot be tuned; None if it can.

        Args:
            module: the plain module.
            generated: whether the module gets a hyperparameter that only it reads, from `specification`.
        """
        rate, highest = cls.plain_rate(module), cls._highest_rate()
        if generated and rate >= highest:
            return f"starts at {cls.rate_name()}={rate}, but a tuned rate ends at {highest}"
        return None

    @classmethod
    def specification(cls, module: nn.Module) -> Hyperparameter:
        """The hyperparameter generated for a plain module; it starts at the module's own rate, or small above zero."""
        low, _ = cls.ranges[cls.rate_name()]
        rate = cls.plain_rate(module)
        return Float(low, cls._highest_rate(), init=rate if rate > low else low + _SMALLEST_START)

    @classmethod
    def _highest_rate(cls) -> float:
        return min(_HIGHEST_RATE, cls.ranges[cls.rate_name()][1])

    @classmethod
    def adopt(cls, module: nn.Module, name: str, hyperparameters: HyperparameterSet, share: float = 1.0) -> None:
        """Turn a plain module into this regulariser in place, so that its identity, hooks and mode stay.

        Args:
            module: the plain module.
            name: name of the hyperparameter that becomes its strength.
            hyperparameters: the set that holds it.
            share: the rate as a share of the strength.
        """
        module.__class__ = cls
        assert isinstance(module, Tunable)
        setattr(module, cls.rate_name(), name)
        module.share = share
        module.attach(hyperparameters)

    def __repr__(self) -> str:
        """As every module, since that of the plain one may read the rate as a number."""
        return nn.Module.__repr__(self)

    def given(self, name: str) -> str | float:
        """The strength as it was given: a hyperparameter's name, or a constant."""
        return super().given(name) if self.tuned_by is None else self.tuned_by

    def sampled_rate(self) -> Tensor | float:
        """The rate of a weight step; see `tuned_rate`."""
        return self.tuned_rate()

    def current_rate(self) -> float:
        """The rate at the current hyperparameters, natural units."""
        return self.current_strength(self.rate_name())

    def tuned_rate(self, *, shared: bool = False) -> Tensor | float:
        """The rate of this call, natural units: `[n]` or a scalar tensor, or a constant.

        Args:
            shared: whether all examples must have the same rate.

        Raises:
            ValueError: `shared`, but the strength has a value for each example.
        """
        name = self.rate_name()
        strength = self.shared_strength(name) if shared else self.strength(name)
        return strength if self.share == 1.0 else strength * self.share

    def current_strength(self, name: str) -> float:
        """The rate of this module at the current hyperparameters, natural units."""
        return super().current_strength(name) * self.share

    def make_plain(self) -> nn.Module:
        """Become the plain module at the current rate, in place."""
        setattr(self, self.rate_name(), self.current_strength(self.rate_name()))
        self.detach()
        self.__dict__.pop("share", None)
        self.__class__ = self.plain_type  # type: ignore[assignment]
        return self


_Tunable = TypeVar("_Tunable", bound=type[Tunable])

_TUNABLE: dict[type[nn.Module], tuple[Keyword, type[Tunable]]] = {}


def register_tunable(
    plain: type[nn.Module], keyword: Keyword, *, overwrite: bool = False
) -> Callable[[_Tunable], _Tunable]:
    """Class decorator: `convert(net, hyperparameters, <keyword>=...)` turns exact instances of `plain` into the class.

    Args:
        plain: the type of the modules to tune; subclasses of it are not tuned.
        keyword: the argument of `convert` that names their hyperparameter, "dropout" or "drop_path".
        overwrite: replace an earlier registration.

    Raises:
        ValueError: `plain` is registered already, or the keyword is unknown.
        TypeError: `plain` is not a plain module type, or the decorated class is not a `Tunable` that subclasses
            `plain`, in that order, has it as its attribute `plain_type`, and has one strength.

    Example:
        >>> from lightning_stn import HyperparameterSet, convert
        >>> from lightning_stn.regularizers import TunedDropPath
        >>> class BranchDrop(nn.Module):
        ...     def __init__(self, drop_prob):
        ...         super().__init__()
        ...         self.drop_prob = drop_prob
        >>> @register_tunable(BranchDrop, "drop_path")
        ... class TunedBranchDrop(TunedDropPath, BranchDrop):
        ...     plain_type = BranchDrop
        ...     ranges = {"drop_prob": (0.0, 1.0)}
        >>> hyperparameters = HyperparameterSet({"rate": Float(0.0, 0.9, init=0.1)})
        >>> convert(nn.Sequential(BranchDrop(0.2)), hyperparameters, drop_path="rate")
        Sequential(
          (0): TunedBranchDrop(drop_prob='rate')
        )
    """
    if not (isinstance(plain, type) and issubclass(plain, nn.Module)) or issubclass(plain, Regularizer):
        raise TypeError(
            f"register_tunable: expected the type of a plain module, got {plain!r}; write "
            "@register_tunable(nn.Dropout, 'dropout')."
        )
    if keyword not in get_args(Keyword):
        raise ValueError(
            f"register_tunable: expected keyword to be one of {list(get_args(Keyword))}, got {keyword!r}; it is the "
            "argument of convert that names the hyperparameter."
        )

    def register(tunable: _Tunable) -> _Tunable:
        if plain in _TUNABLE and not overwrite:
            raise ValueError(
                f"{plain.__name__} already has {_TUNABLE[plain][1].__name__}; pass overwrite=True to replace it."
            )
        _check(tunable, plain)
        _TUNABLE[plain] = keyword, tunable
        return tunable

    return register


def _check(tunable: Any, plain: type[nn.Module]) -> None:
    name = getattr(tunable, "__name__", tunable)
    bases: tuple[type, ...] = tunable.__mro__ if isinstance(tunable, type) else ()
    if not (Tunable in bases and plain in bases and bases.index(Tunable) < bases.index(plain)):
        raise TypeError(
            f"Expected {name} to subclass Tunable and {plain.__name__}, in that order, got "
            f"{[base.__name__ for base in bases[1:]]}; change its bases."
        )
    if getattr(tunable, "plain_type", None) is not plain:
        raise TypeError(
            f"Expected {name}.plain_type to be {plain.__name__}, got {getattr(tunable, 'plain_type', None)!r}; "
            f"write 'plain_type = {plain.__name__}' in its body."
        )
    if len(tunable.ranges) != 1:
        raise TypeError(
            f"Expected {name}.ranges to have one strength, got {list(tunable.ranges)}; name the attribute of "
            f"{plain.__name__} that holds its rate."
        )


_BY_NAME: list[tuple[re.Pattern[str], Keyword, type[Tunable], str]] = []


def register_by_name(pattern: str, keyword: Keyword, tunable: type[Tunable], rate: str) -> None:
    """Let `convert` tune classes of other libraries, which need not be imported.

    Args:
        pattern: a regular expression that matches the whole name of a class, `<module>.<class>`.
        keyword: the argument of `convert` that names their hyperparameter.
        tunable: a `Tunable` that does what these classes do.
        rate: the attribute in which they keep their rate.
    """
    _BY_NAME.append((re.compile(pattern), keyword, tunable, rate))


def _recognise(plain: type[nn.Module]) -> None:
    """Register a class that is known by its name."""
    name = f"{plain.__module__}.{plain.__qualname__}"
    for pattern, keyword, tunable, rate in _BY_NAME:
        if plain not in _TUNABLE and pattern.fullmatch(name):
            attributes = {"plain_type": plain, "ranges": {rate: (0.0, 1.0)}, "__reduce__": _reduce}
            register_tunable(plain, keyword)(type(f"Tuned{plain.__name__}", (tunable, plain), attributes))


def _reduce(module: Tunable) -> tuple[Any, ...]:
    """Pickle a reference to the plain type, since the class is created at run time."""
    return _rebuild, (module.plain_type,), module.__getstate__()  # type: ignore[no-untyped-call]


def _rebuild(plain: type[nn.Module]) -> nn.Module:
    _recognise(plain)
    _, tunable = _TUNABLE[plain]
    return tunable.__new__(tunable)


def tunable_type(plain: type[nn.Module], keyword: str) -> type[Tunable] | None:
    """The class registered for exactly this type under this keyword, or None."""
    _recognise(plain)
    registered, tunable = _TUNABLE.get(plain, (None, None))
    return tunable if registered == keyword else None


def is_tunable(plain: type[nn.Module]) -> bool:
    """Whether a class is registered for exactly this type, under whatever keyword."""
    _recognise(plain)
    return plain in _TUNABLE
