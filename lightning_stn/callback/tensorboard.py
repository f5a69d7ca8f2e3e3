"""What TensorBoard shows of a run: tags, the layout of custom scalars, and the tab HPARAMS."""

import re
from collections.abc import Iterable

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.schedule import Schedule

VALUE, SCALE, LOWER, UPPER = "stn/value", "stn/scale", "stn/lower", "stn/upper"
INIT, PROBABILITY = "stn/init", "stn/probability"
HYPERGRADIENT, ENTROPY = "stn/hypergrad", "stn/entropy"
TRAIN_LOSS, VALID_LOSS = "stn/train_loss", "stn/valid_loss"
SKIPPED = "stn/skipped_steps"


def summarise(hyperparameters: HyperparameterSet, writer: SummaryWriter) -> None:
    """Let the tab HPARAMS show where the hyperparameters start, and as metrics the last points of their curves.

    Lightning's `log_hyperparams` would draw a point on each of these curves, also on that of `val_loss`. Hence this way
    to the event file, which is private in torch, up to 2.15, and used by Lightning likewise.
    """
    starts = {f"{INIT}/{name}": specification.init for name, specification in hyperparameters.specifications.items()}
    curves = [*(f"{VALUE}/{name}" for name in hyperparameters.names), TRAIN_LOSS, VALID_LOSS, "val_loss"]
    experiment, session, _ = hparams(starts, dict.fromkeys(curves, 0.0))  # type: ignore[no-untyped-call]
    for summary in (experiment, session):
        writer._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]


def layout(schedule: Schedule) -> dict[str, dict[str, list[object]]]:
    """TensorBoard's custom scalars: all schedules on one chart, then a chart for each hyperparameter.

    It shows a number with its band of one scale up and down, and of a `Categorical` how probably each choice is drawn.
    """
    charts: dict[str, list[object]] = {"all": ["Multiline", _exactly(f"{VALUE}/{name}" for name in schedule.names)]}
    for name in schedule.names:
        if name in schedule.choices:
            tags = _exactly(f"{PROBABILITY}/{name}/{choice}" for choice in schedule.choices[name])
            charts[name] = ["Multiline", tags]
        else:
            charts[name] = ["Margin", [f"{tag}/{name}" for tag in (VALUE, LOWER, UPPER)]]
    return {"Self-tuned hyperparameters": charts}


def _exactly(tags: Iterable[str]) -> list[str]:
    """Patterns that match these tags and no others."""
    return [f"^{re.escape(tag)}$" for tag in tags]
