"""Which set a module reads, and the passes that bind a sample of it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.passes import Pass


class BoundModule(nn.Module):
    """A module that reads the sample bound to a `HyperparameterSet`.

    The set lives outside the module tree, so it adds no state-dict keys and no parameters here, while deep copies,
    pickles and compiled graphs keep it.
    """

    _hyperparameters: HyperparameterSet | None = None

    @property
    def hyperparameters(self) -> HyperparameterSet | None:
        """The set that this module reads, or None before it is attached to one."""
        return self._hyperparameters

    def attach(self, hyperparameters: HyperparameterSet, name: str = "") -> None:
        """Read from this set until `detach`.

        Args:
            hyperparameters: the set.
            name: the qualified name of this module, for error messages.

        Raises:
            TypeError: `hyperparameters` is not a `HyperparameterSet`.
            KeyError: this module reads a hyperparameter that the set does not have.
            ValueError: it was attached to another set before.
        """
        self._require_set(hyperparameters)
        if self._hyperparameters is not None and self._hyperparameters is not hyperparameters:
            raise ValueError(
                f"{type(self).__name__} {name!r} already reads another HyperparameterSet, as a copy "
                "of a converted network does. Build a new module for each network that is tuned; for a copy that is "
                "not, such as a teacher, use export(net)."
            )
        for wanted in self.reads():
            hyperparameters.require(wanted, self._label(name))
        self.__dict__["_hyperparameters"] = hyperparameters

    def _require_set(self, hyperparameters: HyperparameterSet) -> None:
        if not isinstance(hyperparameters, HyperparameterSet):
            raise TypeError(
                f"{type(self).__name__}: expected hyperparameters to be a HyperparameterSet, got "
                f"{type(hyperparameters).__name__}; build HyperparameterSet({{...}}), or pass an STNModule's."
            )

    def _label(self, name: str) -> str:
        return f"{type(self).__name__} {name!r}" if name else type(self).__name__

    def detach(self) -> None:
        """Read from no set."""
        self.__dict__.pop("_hyperparameters", None)

    def reads(self) -> list[str]:
        """Names of the hyperparameters that this module reads."""
        return []


def attach_all(root: nn.Module, hyperparameters: HyperparameterSet) -> None:
    """Attach every module below `root` to a set; all of them, or none.

    Args:
        root: the module to search.
        hyperparameters: the set.

    Raises:
        KeyError: modules read hyperparameters that the set does not have; the message names each module.
        ValueError: modules cannot use what they read, or read another set; the message names each module.
    """
    problems: list[Exception] = []
    joined: list[BoundModule] = []
    for name, module in root.named_modules():
        if isinstance(module, BoundModule):
            if module.hyperparameters is None:
                joined.append(module)
            try:
                module.attach(hyperparameters, name)
            except (KeyError, ValueError) as error:
                problems.append(error)
    if problems:
        for module in joined:
            module.detach()
        kind = KeyError if any(isinstance(problem, KeyError) for problem in problems) else ValueError
        raise kind(" ".join(str(problem.args[0]) for problem in problems))


def bind_weight_phase(hyperparameters: HyperparameterSet, sample: Tensor) -> None:
    """Bind a sample and its values: response layers respond, regularisers act. `unbind` ends the weight phase.

    Args:
        hyperparameters: the set.
        sample: `[n, h]` or `[1, h]`, unconstrained units.

    Raises:
        ValueError: the sample has another shape.
    """
    _check_sample(hyperparameters, sample)
    hyperparameters.current_pass = Pass(hyperparameters.gate_input(sample), values=hyperparameters.bound_values(sample))


def _check_sample(hyperparameters: HyperparameterSet, sample: Tensor) -> None:
    h = len(hyperparameters)
    if sample.dim() != 2 or sample.shape[1] != h:
        raise ValueError(
            f"Expected a sample of shape [n, {h}], a column for each entry of {list(hyperparameters.names)}, got "
            f"{list(sample.shape)}; draw one with hyperparameters.sample(n)."
        )


def unbind(hyperparameters: HyperparameterSet) -> None:
    """End a step: layers respond to the current hyperparameters again, and regularisers do not act."""
    hyperparameters.current_pass = Pass()


def cache_effective_parameters(hyperparameters: HyperparameterSet, keep: bool) -> None:
    """Start or end the reuse of effective parameters, for a loop in which weights and hyperparameters stay the same."""
    hyperparameters.current_pass = Pass(keep=keep)


@contextmanager
def bind(hyperparameters: HyperparameterSet, sample: Tensor, *, frozen: bool = False) -> Iterator[None]:
    """Bind a sample for response layers alone; on exit the previous pass is current again.

    Args:
        hyperparameters: the set.
        sample: `[n, h]` or `[1, h]`, unconstrained units.
        frozen: detach the network's weights, so that only the sample gets a gradient, at a lower cost.

    Raises:
        ValueError: the sample has another shape.
    """
    _check_sample(hyperparameters, sample)
    with hyperparameters.running(Pass(hyperparameters.gate_input(sample), frozen=frozen)):
        yield
