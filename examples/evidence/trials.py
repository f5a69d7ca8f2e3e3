"""What is trained on a task: baselines, searches, self-tuning methods and their controls, each an entry of `WHAT`.

An entry trains one run at a time and returns the fields of its row. It may read the rows before it: a search the
earlier trials, a control the run whose final values it takes.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from results import Key, Row
from results import trials as rows_of_search
from tasks import Constants, Task, at_fraction, bounds, is_logarithmic
from training import Prune, Run

from lightning_stn import STN, Hyperparameter, Integer, PhaseSchedule, Scales, ScheduleReplay, Warmup
from lightning_stn.policies import Gaussian, Noise, Sinusoid
from lightning_stn.specifications import ResponseForm


class Waiting(Exception):
    """A run needs a row that the file does not have yet."""


@dataclass(frozen=True)
class Place:
    """Where a run stands.

    Args:
        key: of the run.
        run: trains it.
        rows: the file so far.
    """

    key: Key
    run: Run
    rows: Mapping[Key, Row]


class Entry(Protocol):
    """One value of `WHAT`."""

    searches: bool
    """Whether it has several trials."""

    def train(self, place: Place) -> Row:
        """Train one run, and return the fields of its row."""


@dataclass(frozen=True)
class Baseline:
    """A plain run at constants.

    Args:
        constants: of a task.
        rate: factor of the learning rate of the weights.
    """

    constants: Callable[[Task], Constants]
    rate: float = 1.0
    searches: bool = False

    def train(self, place: Place) -> Row:
        """Train at the constants."""
        return replace(place.run, rate=self.rate).plain(self.constants(place.run.task))


def guess(fraction: float) -> Callable[[Task], Constants]:
    """Every hyperparameter at a fraction: dropouts at this rate, all others at this fraction of their range."""

    def constants(task: Task) -> Constants:
        return {name: at_fraction(name, specification, fraction) for name, specification in task.space.items()}

    return constants


def draw(space: Mapping[str, Hyperparameter], generator: random.Random) -> Constants:
    """A point of the space: uniform, of a logarithmic range uniform in the logarithm."""
    return {name: _draw(specification, generator) for name, specification in space.items()}


def _draw(specification: Hyperparameter, generator: random.Random) -> float:
    low, high = bounds(specification)
    if isinstance(specification, Integer):
        return generator.randint(int(low), int(high))
    if is_logarithmic(specification):
        return low * (high / low) ** generator.random()
    return generator.uniform(low, high)


@dataclass(frozen=True)
class Search:
    """Trials at drawn constants; each trial keeps its best epoch, and the search its best trial.

    Args:
        sampler: "random", or "tpe" for Optuna's tree-structured Parzen estimator.
        pruned: whether Optuna's `MedianPruner` ends trials early, after five whole trials and a quarter of the epochs.
    """

    sampler: Literal["random", "tpe"]
    pruned: bool = False
    searches: bool = True

    def train(self, place: Place) -> Row:
        """Train the next trial."""
        key, task = place.key, place.run.task
        before = rows_of_search(place.rows.values(), key.task, key.what, key.seed)
        if (self.pruned or self.sampler == "tpe") and len(before) < key.trial:
            raise Waiting(f"trial {len(before)} of {key.what}")
        generator = random.Random(f"{key.task} {key.seed} {key.trial}")  # the same trials with and without a pruner
        constants = draw(task.space, generator)
        if self.sampler == "random" and not self.pruned:
            return place.run.plain(constants)
        trial = self._ask(task, before[: key.trial], generator.randrange(2**31), place.run.length, constants)
        if self.sampler == "tpe":
            constants = _suggest(trial, task.space)
        return place.run.plain(constants, _prune(trial) if self.pruned else None)

    def _ask(self, task: Task, before: Sequence[Row], seed: int, epochs: int, constants: Constants) -> Any:
        """A trial of an Optuna study that holds the trials before it, so that a search can go on from the file."""
        import optuna  # an optional dependency

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=epochs // 4)
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed), pruner=pruner)
        study.add_trials([_finished(task, row) for row in before])
        if self.sampler == "random":
            study.enqueue_trial(constants)
        return study.ask()


def _suggest(trial: Any, space: Mapping[str, Hyperparameter]) -> Constants:
    return {
        name: trial.suggest_int(name, *map(int, bounds(specification)))
        if isinstance(specification, Integer)
        else trial.suggest_float(name, *bounds(specification), log=is_logarithmic(specification))
        for name, specification in space.items()
    }


def _finished(task: Task, row: Row) -> Any:
    """An earlier trial, as Optuna keeps it."""
    from optuna.distributions import FloatDistribution, IntDistribution
    from optuna.trial import TrialState, create_trial

    distributions = {
        name: IntDistribution(*map(int, bounds(specification)))
        if isinstance(specification, Integer)
        else FloatDistribution(*bounds(specification), log=is_logarithmic(specification))
        for name, specification in task.space.items()
    }
    losses = {epoch: loss for epoch, loss, _ in row["curve"] if loss is not None}
    failed = row["best_val_loss"] is None
    return create_trial(
        state=TrialState.FAIL if failed else TrialState.PRUNED if row["pruned"] else TrialState.COMPLETE,
        value=None if failed else row["best_val_loss"],
        params=row["hyperparameters"],
        distributions=distributions,
        intermediate_values=losses,
    )


def _prune(trial: Any) -> Prune:
    def prune(epoch: int, loss: float) -> bool:
        trial.report(loss, epoch)
        stops: bool = trial.should_prune()
        return stops

    return prune


@dataclass(frozen=True)
class Method:
    """One self-tuned run.

    Args:
        settings: arguments of `STNCallback`.
        travel: sets the learning rate to this distance, divided by the number of hyperparameter steps, at most 0.1;
            None for the method's own rule.
        response: argument of `STNModule`.
        start: the guess from which the run starts, see `at_fraction`; None for `Task.start`.
        rate: factor of the learning rate of the weights.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    travel: float | None = None
    response: ResponseForm = "full"
    start: float | None = None
    rate: float = 1.0
    searches: bool = False

    def train(self, place: Place) -> Row:
        """Train once."""
        return self.run(place.run, self.start_values(place.run.task), _schedule_file(place))

    def start_values(self, task: Task) -> Constants:
        """Where the run starts, natural units."""
        return task.start if self.start is None else guess(self.start)(task)

    def run(self, run: Run, start: Constants, keep: Path | None = None, **settings: Any) -> Row:
        """Train once from these values, with further settings; save the schedule where `keep` says."""
        settings = self.settings | settings
        if self.travel is not None:
            steps = run.batches * 0.9 / settings.get("train_steps", PhaseSchedule().train_steps)
            settings["lr"] = min(self.travel / steps, 0.1)
        return replace(run, rate=self.rate).tuned(settings, start, self.response, keep)


def _schedule_file(place: Place) -> Path:
    """Where the schedule of a self-tuned run is kept between runs."""
    name = f"{place.key.task}-{place.key.what}-{place.key.seed}-{place.run.length}.json"
    return place.run.folders.cache / "schedules" / name


@dataclass(frozen=True)
class Control:
    """A run beside one self-tuned run, which shows where its loss comes from.

    Args:
        method: name of the self-tuned run.
        values: "start" for its start values, "final" for its values after the last epoch.
        converted: whether the network is converted and its hyperparameters are perturbed, but never tuned.
    """

    method: str
    values: Literal["start", "final"]
    converted: bool
    searches: bool = False

    def train(self, place: Place) -> Row:
        """Train at constants, or with a warm-up that lasts the whole run."""
        if self.values == "final":
            tuned = place.rows.get(place.key._replace(what=self.method))
            if tuned is None:
                raise Waiting(f"the final values of {self.method}")
            constants = tuned["final"]
        else:
            constants = METHODS[self.method].start_values(place.run.task)
        if not self.converted:
            return place.run.plain(constants)
        never = Warmup(place.run.length, "epochs")
        return METHODS[self.method].run(place.run, constants, warmup=never)


@dataclass(frozen=True)
class Replay:
    """A plain network whose regularisation follows a self-tuned run, MacKay et al. (2019), Table 1.

    Args:
        method: name of the self-tuned run, which is trained once more where its schedule was not kept.
        final: whether its final values are in force throughout.
        noise: around the values.
    """

    method: str
    final: bool = False
    noise: Noise | None = None
    searches: bool = False

    def train(self, place: Place) -> Row:
        """Train once."""
        tuned = Place(place.key._replace(what=self.method), place.run, place.rows)
        schedule = _schedule_file(tuned)
        if not schedule.exists():
            METHODS[self.method].train(tuned)
        return place.run.replayed(ScheduleReplay(schedule, final=self.final, noise=self.noise, seed=place.key.seed))


BASELINES: dict[str, Callable[[Task], Constants]] = {
    "none": lambda task: task.off,
    "weak": guess(0.05),
    "guess-0.1": guess(0.1),
    "guess-0.3": guess(0.3),
    "guess-0.5": guess(0.5),
}

GUESSES = tuple(name for name in BASELINES if name.startswith("guess-"))

SEARCHES: dict[str, Search] = {
    "random": Search("random"),
    "random-pruned": Search("random", pruned=True),
    "tpe": Search("tpe"),
    "tpe-pruned": Search("tpe", pruned=True),
}

FIRST: dict[str, Any] = {
    "method": STN(centred=False),
    "perturb": "example",
    "train_steps": 2,
    "anneal": False,
    "optimizer": torch.optim.Adam,
    "scales": Scales(tune=True),
}
"""What the first version of this package did by default."""

METHODS: dict[str, Method] = {
    "stn": Method(),
    "delta-stn": Method({"method": "delta-stn"}),
    "first-version": Method(FIRST, travel=30.0),
    "uncentred": Method({"method": STN(centred=False)}),
    "per-example": Method({"perturb": "example"}),
    "gates": Method(response="gates"),
    "whole-gates": Method({"method": STN(gate_scale=1.0)}),
    "adam": Method({"optimizer": torch.optim.Adam}),
    "constant-rate": Method({"anneal": False}),
    "tuned-scales": Method({"scales": Scales(tune=True)}),
    "faster": Method(travel=27.0),
    "more-steps": Method({"train_steps": 2}),
    "from-0.1": Method(start=0.1),
}
"""Self-tuned runs: `stn` with all defaults, Delta-STN, the first version, and `stn` with one setting changed."""

CONTROLS: dict[str, tuple[Literal["start", "final"], bool]] = {
    "untuned": ("start", True),
    "final": ("final", False),
    "final-converted": ("final", True),
}
"""For each method `<method>:<control>`: the values at which it trains, and whether the network is converted."""

REPLAYS: dict[str, dict[str, Any]] = {
    "replay": {},
    "gaussian": {"final": True, "noise": Gaussian()},
    "sinusoid": {"final": True, "noise": Sinusoid()},
}
"""For each method `<method>:<replay>`: its schedule, or noise around its final values, in a plain network."""

FACTORS = (0.25, 0.5, 2, 4)
"""Other learning rates of the weights, in units of the task's: `<baseline or method>:rate-<factor>`."""

WHAT: dict[str, Entry] = {
    **{name: Baseline(constants) for name, constants in BASELINES.items()},
    **{f"{name}:rate-{factor}": Baseline(BASELINES[name], factor) for name in BASELINES for factor in FACTORS},
    **SEARCHES,
    **METHODS,
    **{f"{name}:rate-{factor}": replace(METHODS[name], rate=factor) for name in METHODS for factor in FACTORS},
    **{
        f"{method}:{name}": Control(method, values, converted)
        for method in METHODS
        for name, (values, converted) in CONTROLS.items()
    },
    **{f"{method}:{name}": Replay(method, **replay) for method in METHODS for name, replay in REPLAYS.items()},
}
