"""TensorBoard: tags, the layout of custom scalars, and the tab HPARAMS."""

import re
from typing import TYPE_CHECKING

from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.specifications import PLACE

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PREFIX = "stn/"
"""Begins every tag of this package; a specification names its curves without it."""

VALUE, SCALE, INIT = "stn/value", "stn/scale", "stn/init"
HYPERGRADIENT, ENTROPY = "stn/hypergrad", "stn/entropy"
TRAIN_LOSS, VALID_LOSS = "stn/train_loss", "stn/valid_loss"
SKIPPED = "stn/skipped_steps"


def summarise(hyperparameters: HyperparameterSet, writer: "SummaryWriter") -> None:
    """Write the tab HPARAMS: initial values, and as metrics the last points of the curves.

    Lightning's `log_hyperparams` would add a point to each of these curves, `val_loss` included. Therefore this writes
    to the event file directly, through a method that is private in torch (up to 2.15) and that Lightning uses as well.
    """
    from torch.utils.tensorboard.summary import hparams  # slow to import, and here with a TensorBoard logger only

    starts = {f"{INIT}/{name}": specification.init for name, specification in hyperparameters.specifications.items()}
    # TensorBoard shows the first five until it is asked for more.
    curves = ["val_loss", VALID_LOSS, TRAIN_LOSS, *(f"{VALUE}/{name}" for name in hyperparameters.names)]
    experiment, session, _ = hparams(starts, dict.fromkeys(curves, 0.0))  # type: ignore[no-untyped-call]
    for summary in (experiment, session):
        writer._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]


def layout(hyperparameters: HyperparameterSet) -> dict[str, dict[str, list[object]]]:
    """TensorBoard's custom scalars: the places of all in their ranges, then the chart of each hyperparameter."""
    placed = [name for name, specification in hyperparameters.specifications.items() if specification.has_place]
    charts: dict[str, list[object]] = {}
    if placed:
        charts["place in the range"] = ["Multiline", [_exactly(f"{PREFIX}{PLACE}/{name}") for name in placed]]
    for name, specification in hyperparameters.specifications.items():
        kind, tags = specification.chart(name)
        tags = [f"{PREFIX}{tag}" for tag in tags]
        charts[name] = [kind, [_exactly(tag) for tag in tags] if kind == "Multiline" else tags]
    return {"Self-tuned hyperparameters": charts}


def _exactly(tag: str) -> str:
    """A pattern that matches this tag only; TensorBoard takes patterns for lines, but plain tags for a band."""
    return f"^{re.escape(tag)}$"
