"""The set that holds the hyperparameters' current values, scales and bound sample."""

from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor, nn

from lightning_stn import functional
from lightning_stn.entries import Entries
from lightning_stn.named import check_specifications, describe_unknown
from lightning_stn.passes import Pass
from lightning_stn.reading import Reader
from lightning_stn.schedule import Schedule
from lightning_stn.schedule.tables import Cell, describe_span, markdown, to_html
from lightning_stn.specifications import Hyperparameter, ResponseForm, Value, surroundings
from lightning_stn.transforms import positive_inverse


class HyperparameterSet(Entries):
    """The hyperparameters of one network: current values, perturbation scales, and the bound sample.

    Args:
        specifications: name to `Float`, `Integer`, `Categorical` or another kind. A name is a Python identifier. May be
            empty until a layer responds, for `convert(net, hyperparameters, dropout="per-layer")`.
        response: what layers that respond to the set learn beside their weights: "full", gates and response weights, or
            "gates" alone; see `lightning_stn.layers.ResponseLayer`.

    Attributes, beside those of `Entries`:
        networks: the networks that respond to the set, as `convert` returned them.
        current_pass: what the networks run for now; `running` changes it for the duration of a block.
        names: the names, in the order of the entries.
        slices: name to the slice of its entries.

    Raises:
        ValueError: a name is not usable, columns of its schedule would collide, or `response` is unknown.
        TypeError: `specifications` is not a mapping, or one of them is not a `Hyperparameter`.

    Example:
        >>> from lightning_stn import Float, Integer
        >>> hyperparameters = HyperparameterSet({"dropout": Float(0.0, 1.0, init=0.5), "holes": Integer(0, 4)})
        >>> hyperparameters
        HyperparameterSet(
          | hyperparameter | specification             | start | value | scale |
          |----------------|---------------------------|------:|------:|------:|
          | dropout        | Float(0.0, 1.0, init=0.5) |   0.5 |   0.5 |   0.5 |
          | holes          | Integer(0, 4)             |     1 |     1 |   0.5 |
        )
        >>> hyperparameters.values()
        {'dropout': 0.5, 'holes': 1}
        >>> hyperparameters.sample(8).shape
        torch.Size([8, 2])
    """

    def __init__(self, specifications: Mapping[str, Hyperparameter], *, response: ResponseForm = "full") -> None:
        super().__init__()
        if response not in get_args(ResponseForm):
            raise ValueError(f"Expected response to be 'full' or 'gates', got {response!r}.")
        self.response = response
        self._specifications: dict[str, Hyperparameter] = {}
        self.slices: dict[str, slice] = {}
        self._size = 0
        self._frozen = False
        self.networks: list[nn.Module] = []
        self.current_pass = Pass()
        self._read: dict[str, bool] = {}  # a dictionary, since compiled graphs can write to one
        self._extend(specifications)

    def _extend(self, specifications: Mapping[str, Hyperparameter]) -> None:
        check_specifications(specifications, self._specifications)
        if specifications:
            Schedule({**self._specifications, **specifications})  # Refuses columns that collide, before any change.
        end = self._size
        for name, specification in specifications.items():
            self.slices[name] = slice(end, end := end + specification.size)
            self._specifications[name] = specification
        self._size = end
        self._shared = [self.slices[name] for name, s in self._specifications.items() if s.perturb == "batch"]
        self._reader = Reader(self._specifications, self.slices)
        self.allocate(end)
        self.reset_parameters()

    def add(self, specifications: Mapping[str, Hyperparameter]) -> None:
        """Append hyperparameters, before any layer responds to the set.

        Raises:
            RuntimeError: layers respond to the set already.
            ValueError: a name is taken or not usable.
            TypeError: as for the constructor.
        """
        if self._frozen:
            raise RuntimeError(
                "Hyperparameters cannot be added once layers respond to the set, since each layer has a gate for every "
                "hyperparameter; name them in the constructor, or convert all networks in one call."
            )
        self._extend(specifications)

    def freeze(self) -> None:
        """Fix the number of hyperparameters; called by the first layer that responds to them.

        Raises:
            ValueError: there are none.
        """
        if not self._size:
            raise ValueError(
                "hyperparameters: expected at least one hyperparameter, got none; name what to tune, or give each "
                "dropout one with convert(net, dropout='per-layer')."
            )
        self._frozen = True

    def reset_parameters(self) -> None:
        """Return every hyperparameter and scale to its initial value."""
        inits = [entry for s in self.specifications.values() for entry in s.unconstrained_init()]
        scales = [s.scale for s in self.specifications.values() for _ in range(s.size)]
        values, widths = torch.tensor([inits, scales], dtype=torch.float64, device="cpu")
        self.unconstrained.copy_(values)
        self.raw_scale.copy_(positive_inverse(widths))

    @property
    def specifications(self) -> Mapping[str, Hyperparameter]:
        """Specifications by name."""
        return self._specifications

    @property
    def signature(self) -> dict[str, str]:
        """Signatures of the specifications by name; two sets with one signature can exchange their state."""
        return {name: specification.signature for name, specification in self.specifications.items()}

    def require_signature(self, saved: Mapping[str, str]) -> None:
        """Check that the state of a saved set can be loaded into this one.

        Args:
            saved: the `signature` of the saved set.

        Raises:
            ValueError: names, their order, ranges or choices differ.
        """
        if list(self.signature.items()) != list(saved.items()):
            raise ValueError(
                f"The checkpoint was saved with the hyperparameters {dict(saved)}, but this module has "
                f"{self.signature}, which would give the saved state another meaning; resume with the "
                "hyperparameters of the checkpoint (init and scale may differ), or begin a new run."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the order of the entries of `unconstrained`."""
        return tuple(self._specifications)

    @property
    def labels(self) -> tuple[str, ...]:
        """A label for each entry of `unconstrained`: `<name>`, or `<name>/<choice>` for the logit of a choice."""
        return tuple(label for name, s in self.specifications.items() for label in s.labels(name))

    def __len__(self) -> int:
        return self._size

    def schedule(self) -> Schedule:
        """An empty schedule of these hyperparameters."""
        return Schedule(self.specifications)

    def require(self, name: str, reader: str) -> None:
        """Check that a hyperparameter exists.

        Raises:
            KeyError: no hyperparameter has this name; the message lists the names.
        """
        if name not in self._specifications:
            raise KeyError(f"{reader} reads the hyperparameter {name!r}, {describe_unknown(name, self.names)}")

    def require_number(self, name: str, reader: str) -> None:
        """Check that a hyperparameter exists and is a number.

        Raises:
            KeyError: no hyperparameter has this name; the message lists the names.
            ValueError: the hyperparameter is not a number.
        """
        self.require(name, reader)
        specification = self.specifications[name]
        if not specification.is_number:
            raise ValueError(
                f"{reader} expects a number, but the hyperparameter {name!r} is a {type(specification).__name__}; name "
                f"a Float or an Integer there, and read hyperparameters[{name!r}], the index of the choice, in your "
                "own code."
            )

    def constrain(self, unconstrained: Tensor) -> Mapping[str, Tensor]:
        """Values in natural units, by name.

        Args:
            unconstrained: `[..., h]`, unconstrained units.

        Returns:
            For each name a tensor of shape `[...]`; int64 for an `Integer`, and for a `Categorical`, which is read as
            the index of its choice.
        """
        return self._reader.read(unconstrained)

    def values(self) -> dict[str, Value]:
        """The current hyperparameters in natural units, as Python numbers; a `Categorical` as its choice.

        A real number is the shortest decimal that stands for the same float32 number in unconstrained units.
        """
        values = self.constrain(surroundings(self.unconstrained.cpu().double()))
        return {name: specification.written(values[name]) for name, specification in self.specifications.items()}

    def unrounded(self) -> dict[str, float]:
        """Of whole numbers the real numbers that are rounded to the current values, natural units, by name."""
        entries = self.unconstrained.cpu().double()
        numbers = {name: s.unrounded(entries[self.slices[name]]) for name, s in self.specifications.items()}
        return {name: number for name, number in numbers.items() if number is not None}

    def noise(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`eps`, standard normal, `[n, h]`; columns of a hyperparameter with `perturb="batch"` have equal rows.

        Args:
            n: number of rows.
            generator: a generator on the CPU, so that every device draws the same numbers.

        Raises:
            ValueError: `n` is not a whole number of at least 0.
        """
        if not isinstance(n, int) or n < 0:
            raise ValueError(
                f"Expected the number of rows of a sample to be a whole number of at least 0, got {n!r}; if "
                "infer_batch_size is overridden, return the number of examples from it as an int."
            )
        noise = torch.randn(n, len(self), generator=generator, dtype=torch.float32, device="cpu")
        if n > 1:
            for own in self._shared:
                noise[:, own] = noise[:1, own].clone()
        return noise.to(self.unconstrained.device)

    def sample(self, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """`lambda + sigma * eps`, `[n, h]`, unconstrained units."""
        return functional.perturb(self.unconstrained, self.scale, self.noise(n, generator))

    def entropy(self) -> Tensor:
        """Entropy of the perturbation in nats, a scalar."""
        return functional.entropy(self.scale)

    def current(self) -> Tensor:
        """`lambda` as a sample of one row, `[1, h]`."""
        return self.unconstrained.unsqueeze(0)

    def gate_input(self, sample: Tensor) -> Tensor:
        """What gates read for a sample: its distance from the centre, scaled; gradients reach the sample."""
        distance = sample - self.unconstrained if self.centred else sample
        return distance if self.gate_scale == 1.0 else self.gate_scale * distance

    def running(self, run: Pass) -> "Running":
        """Enter a pass; on exit the previous pass is current again."""
        return Running(self, run)

    @property
    def at_centre(self) -> bool:
        """Whether layers compute with their base weights alone."""
        return self.centred and self.current_pass.sample is None

    def bound_sample(self) -> Tensor:
        """What gates read, `[n, h]` or `[1, h]`: for the sample of the current pass or, without one, for `lambda`."""
        sample = self.current_pass.sample
        return self.gate_input(self.current()) if sample is None else sample

    def bound_values(self, sample: Tensor) -> Mapping[str, Tensor]:
        """Natural units of a sample, by name: `[n]`, or a scalar for what the batch shares."""
        rows = sample.detach()
        return self._reader.read(rows[0]) if rows.shape[0] == 1 else self._reader.read_rows(rows)

    def forget_reads(self) -> None:
        """Count from now on what is read, for `unread`."""
        self._read.clear()

    def unread(self) -> list[str]:
        """Names that nothing has read in the weight phase so far, or since `forget_reads`."""
        return [name for name in self.names if name not in self._read]

    def __getitem__(self, name: str) -> Tensor:
        """The active value in natural units, without a gradient; of a `Categorical` the index of the choice, int64.

        In the weight phase `[n]`, or a scalar tensor where the batch shares it (`perturb="batch"`, or a sample of one
        row); otherwise the current value, a scalar tensor.
        """
        values = self.current_pass.values
        if values is not None:
            self.require(name, "The training loss")
            self._read[name] = True
            return values[name]
        self.require(name, "This code")
        return self.specifications[name].read(self.unconstrained[self.slices[name]])

    def table(self) -> list[dict[str, Cell]]:
        """A row for each hyperparameter: how it is specified, its start and its current value, its current scale.

        Start and value are in natural units, with their unit in a further column where there are units. The scale is in
        unconstrained units; a `Categorical`, which has one for each choice, shows the smallest and the largest.
        """
        has_state = not self.unconstrained.is_meta
        values, scales = (self.values(), self.scale.tolist()) if has_state else ({}, [])
        units = any(specification.unit for specification in self.specifications.values())
        rows: list[dict[str, Cell]] = []
        for name, specification in self.specifications.items():
            row: dict[str, Cell] = {
                "hyperparameter": name,
                "specification": repr(specification),
                "start": specification.init,
                "value": values.get(name, ""),
                "scale": describe_span(scales[self.slices[name]]) if has_state else "",
            }
            rows.append(row | ({"unit": specification.unit} if units else {}))
        return rows

    def extra_repr(self) -> str:
        """The table; see `table`."""
        return markdown(self.table())

    def _repr_html_(self) -> str:
        """The table for notebooks."""
        return to_html(f"HyperparameterSet of {', '.join(self.names)}", self.table())


class Running:
    """A context in which a pass is the current one of a set; a class, since older compilers cannot trace a generator.

    Args:
        hyperparameters: the set.
        run: the pass.
    """

    def __init__(self, hyperparameters: HyperparameterSet, run: Pass) -> None:
        self._hyperparameters, self._run = hyperparameters, run

    def __enter__(self) -> None:
        self._before = self._hyperparameters.current_pass
        self._hyperparameters.current_pass = self._run

    def __exit__(self, *exception: object) -> None:
        self._hyperparameters.current_pass = self._before
