"""`STNModule`: the two losses of a self-tuning network."""

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import lightning as L
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_stn.binding import bind_weight_phase, unbind
from lightning_stn.checkpoint import check_before_loading, save_hyperparameters
from lightning_stn.collisions import check_assignment, check_class, public_names
from lightning_stn.convert import Network, convert
from lightning_stn.evaluation import CachedEvaluation, evaluate
from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.inherited import accepted, inherited, own_arguments
from lightning_stn.manual_optimization import check_arguments, save_checkpoints_by_time
from lightning_stn.methods import parameter_groups
from lightning_stn.methods.base import check_loss, end_forward
from lightning_stn.passes import Pass
from lightning_stn.results import Results
from lightning_stn.schedule.handover import Handover
from lightning_stn.specifications import Hyperparameter, ResponseForm
from lightning_stn.weight_phase import WeightPhase


class STNModule(Results, CachedEvaluation):
    """A LightningModule that tunes its own hyperparameters while it trains, together with `STNCallback`.

    Works as the only base, and in front of an existing module, `class Tuned(STNModule, ExistingLitModule)`, whose
    `training_step` then serves as `training_loss` and whose `validation_step` and `test_step` stay as they are.

    Optimisation is manual unless `self.automatic_optimization = True` is set after `super().__init__`.

    Args:
        *args: passed to the next base, as is `**kwargs`, so that an existing module keeps its constructor.
        hyperparameters: name to `Float`, `Integer` or `Categorical`; `{}` if `self.convert(net, dropout="per-layer")`
            generates all of them.
        response: what layers learn beside their weights: "full", gates and response weights, or "gates" alone, so
            that conversion adds no parameters as large as the weights.

    Attributes:
        hyperparameters: the `HyperparameterSet`; `self.hyperparameters["name"]` reads the active value.

    Example:
        >>> import torch.nn.functional as F
        >>> from lightning_stn import Float
        >>> class LitDigits(STNModule):
        ...     def __init__(self):
        ...         super().__init__(hyperparameters={"dropout": Float(0.0, 0.9, init=0.05)})
        ...         net = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Dropout(), nn.Linear(100, 10))
        ...         self.net = self.convert(net, dropout="dropout")
        ...
        ...     def training_loss(self, batch, batch_idx):
        ...         return F.cross_entropy(self.net(batch[0]), batch[1])
        ...
        ...     def validation_loss(self, batch, batch_idx):
        ...         return F.cross_entropy(self.net(batch[0]), batch[1])
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.Adam(self.parameters())
        >>> round(LitDigits().hyperparameters.values()["dropout"], 6)
        0.05
    """

    hyperparameters: HyperparameterSet

    def __init__(
        self,
        *args: Any,
        hyperparameters: Mapping[str, Hyperparameter],
        response: ResponseForm = "full",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False
        self.hyperparameters = HyperparameterSet(hyperparameters, response=response)
        self._stn_handover = Handover()
        self._stn_phase: WeightPhase | None = None
        self._stn_muted = False
        self._stn_outputs: dict[str, Any] = {}
        self._stn_last_loss: Tensor | None = None
        self._stn_stepped = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_class(cls, STNModule, L.LightningModule)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":  # a text that Lightning sets around every hook, tens of times a step
            return object.__setattr__(self, name, value)
        if name in _NAMES:
            check_assignment(self, STNModule, name, value)
        super().__setattr__(name, value)

    @property
    def runs_for(self) -> Literal["weights", "response", "hyperparameters", "evaluation"]:
        """What a loss is being computed for.

        "weights": the training loss of a weight step. "response": the same loss once more, in which Delta-STN fits the
        response, or, with `perturb="example"`, the first step checks the rows; what must happen once for a batch, such
        as keeping a hidden state, belongs to the other call. "hyperparameters": the validation loss of a hyperparameter
        step. "evaluation": everything else.

        For "response" and "hyperparameters" `self.log` does nothing and metrics keep their states, since these losses
        belong to no epoch's training or validation. Lists of predictions and the like are for the module to leave.
        """
        run = self.hyperparameters.current_pass
        if self._stn_muted:
            return "hyperparameters"
        if run.values is None:
            return "evaluation"
        return "response" if run.extra else "weights"

    def convert(
        self,
        net: Network,
        *,
        dropout: str | None = None,
        drop_path: str | None = None,
        zero_rates: bool = False,
        exclude: Collection[str | type[nn.Module]] = (),
    ) -> Network:
        """Let a network's layers respond to this module's hyperparameters; see `lightning_stn.convert.convert`."""
        rates = {"dropout": dropout, "drop_path": drop_path}
        return convert(net, self.hyperparameters, **rates, zero_rates=zero_rates, exclude=exclude)

    def parameter_groups(
        self, lr: float, *, response_lr: float | None = None, gate_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Weights, response weights and gates in groups, for SGD at large rates; see `methods.parameter_groups`.

        `torch.optim.SGD(self.parameter_groups(lr=30.0))`; Adam and its kind have no need of it.
        """
        return parameter_groups(self, self.hyperparameters, lr, response_lr=response_lr, gate_lr=gate_lr)

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        """`L_T`, the loss of the weight phase, regularisation and augmentation included.

        Override it; in front of an existing module it is that module's `training_step`.

        Returns:
            A scalar with a gradient in the weights.
        """
        step = inherited(self, STNModule, "training_step")
        if step is None:
            raise NotImplementedError(
                f"{type(self).__name__} has no training loss; define training_loss(self, batch, batch_idx)."
            )
        output = step(*accepted(step, batch, batch_idx))
        if not isinstance(output, Mapping):
            return output  # type: ignore[no-any-return]
        if "loss" not in output:
            raise ValueError(
                f"Expected {step.__qualname__} to return a loss, or a dictionary with the key 'loss', got the keys "
                f"{list(output)}; add the loss to them."
            )
        if self.runs_for != "response":
            self._stn_outputs = {name: value for name, value in output.items() if name != "loss"}
        loss: Tensor = output["loss"]
        return loss

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        """`L_V`, the loss of the hyperparameter phase and `val_loss`: no regularisation, no augmentation.

        Override it. It runs in eval mode, with gradients in the hyperparameter phase; `self.log` does nothing there.

        Returns:
            A scalar, a mean over the batch.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no validation loss; define validation_loss(self, batch, batch_idx)."
        )

    def infer_batch_size(self, batch: Any) -> int:
        """Number of examples in a batch: how many perturbations to draw. Override it for unusual batches.

        By default it is the size that the first dimensions of all tensors share; scalars do not count.

        Raises:
            ValueError: the batch holds no tensor to tell from, or tensors of different sizes.
        """
        sizes: list[int] = []
        apply_to_collection(batch, Tensor, lambda tensor: sizes.append(len(tensor)) if tensor.dim() else None)
        if len(set(sizes)) == 1:
            return sizes[0]
        raise ValueError(
            f"The number of examples in a batch of type {type(batch).__name__} cannot be inferred; override "
            f"infer_batch_size(self, batch) in {type(self).__name__}. First dimensions of its tensors: {set(sizes)}."
        )

    def _stn_perturb(self, batch: Any, generator: torch.Generator | None = None) -> None:
        """Bind what a weight step on `batch` reads: a perturbed sample, a row for each example or one; or values."""
        phase = self._stn_phase
        assert phase is not None
        if phase.values is not None:
            self.hyperparameters.current_pass = Pass(values=phase.values)
            return
        rows = self.infer_batch_size(batch) if phase.perturb == "example" else 1
        bind_weight_phase(self.hyperparameters, self.hyperparameters.sample(rows, generator))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """One weight step on `training_loss`, at the sample that `STNCallback` has bound.

        Returns:
            The training loss; in a dictionary where an existing module's `training_step` returned further values, or
            where automatic optimisation differentiates another objective as `loss`, with the `training_loss` beside it.

        Raises:
            RuntimeError: there is no `STNCallback`.
            ValueError: `training_loss` returns anything but a scalar tensor with a gradient.
        """
        phase = self._stn_phase
        if phase is None:
            raise RuntimeError(
                f"{type(self).__name__} trains without its callback; pass callbacks=[STNCallback(...)] to the Trainer."
            )
        if self.hyperparameters.current_pass.values is None:  # Lightning's Tuner puts the callbacks aside.
            self._stn_perturb(batch)
        loss, objective = phase.method.objective(
            self, self.hyperparameters, lambda: _checked_training_loss(self, batch, batch_idx)
        )
        end_forward(self.hyperparameters)
        self._stn_last_loss = loss.detach()
        if not self.automatic_optimization:
            phase.step.take(self, objective, batch_idx)
            self._stn_stepped = True
        outputs, self._stn_outputs = self._stn_outputs, {}
        if self.automatic_optimization and objective is not loss:
            return {**outputs, "loss": objective, "training_loss": loss.detach()}
        return {**outputs, "loss": loss} if outputs else loss

    def configure_callbacks(self) -> Any:
        """Check the Trainer's arguments; Lightning's own check, which comes after this hook, does not know ours.

        Raises:
            ValueError: the Trainer has arguments for clipping or accumulation, and optimisation is manual.
        """
        if self.trainer.training:
            check_arguments(self)
        return super().configure_callbacks()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Unbind the sample, and save checkpoints by time."""
        unbind(self.hyperparameters)
        save_checkpoints_by_time(self, outputs, batch, batch_idx)
        super().on_train_batch_end(outputs, batch, batch_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the current hyperparameters, also where a callback saves an averaged copy of this module instead."""
        save_hyperparameters(self.hyperparameters, checkpoint)
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that does not fit, before anything of it is loaded.

        Raises:
            ValueError: its hyperparameters have other names, another order, other ranges or choices, or are not finite;
                or the state of `STNCallback` in it is damaged.
        """
        resumes = self._trainer is not None and self._trainer.training
        check_before_loading(self.hyperparameters, checkpoint, self._trainer if resumes else None, self)
        super().on_load_checkpoint(checkpoint)

    def validation_step(self, batch: Any, batch_idx: int, *args: Any) -> Any:
        """Log `val_loss`, at the current hyperparameters; in front of an existing module, its own step."""
        return evaluate(self, STNModule, "validation", "val_loss", batch, batch_idx, *args)

    def test_step(self, batch: Any, batch_idx: int, *args: Any) -> Any:
        """Log `test_loss`, at the current hyperparameters; in front of an existing module, its own step."""
        return evaluate(self, STNModule, "test", "test_loss", batch, batch_idx, *args)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log as every LightningModule does, but neither in the hyperparameter phase nor in the response's own pass.

        There `validation_loss` and `training_loss` may log, but their values would mix into the metrics of the epoch.
        """
        if self.runs_for in ("weights", "evaluation"):
            super().log(*args, **kwargs)

    @contextmanager
    def _stn_mute(self) -> Iterator[None]:
        """Within the block `self.log` does nothing."""
        self._stn_muted = True
        try:
            yield
        finally:
            self._stn_muted = False

    def save_hyperparameters(self, *args: Any, ignore: Any = None, frame: Any = None, logger: bool = True) -> None:
        """As in every LightningModule, but for the arguments of `STNModule` that a subclass gives by itself.

        Otherwise `load_from_checkpoint` would pass these a second time.
        """
        frame = frame or inspect.currentframe().f_back  # type: ignore[union-attr]
        ignored = ignore if args else own_arguments(type(self), STNModule, ignore)
        super().save_hyperparameters(*args, ignore=ignored, frame=frame, logger=logger)


_NAMES = public_names(STNModule, L.LightningModule)


def _checked_training_loss(module: STNModule, batch: Any, batch_idx: int) -> Tensor:
    loss = check_loss(module.training_loss(batch, batch_idx), "training_loss")
    if not loss.requires_grad:
        raise ValueError(
            "Expected training_loss to return a loss with a gradient in the weights, got one without; compute it "
            "with the network, without torch.no_grad or detach."
        )
    return loss
