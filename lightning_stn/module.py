"""`STNModule`: the two losses of a self-tuning network, and its weight step."""

import inspect
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor, nn

from lightning_stn.binding import bind_weight_phase, keep_merged, unbind
from lightning_stn.convert import convert
from lightning_stn.dual import has_tangent
from lightning_stn.export import export
from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.layers import ResponseLayer
from lightning_stn.methods.delta import base_pass, response_pass, shared_pass
from lightning_stn.specifications import Hyperparameter, Perturb

Method = Literal["stn", "delta-stn"]
ClipAlgorithm = Literal["norm", "value"]

_SIGNATURE = "lightning_stn_hyperparameters"
"""Key in a checkpoint for the signature of its hyperparameters."""

_CLOSED = (
    "A part of the network is computed anew in the backward pass, as activation checkpointing does, where the forward "
    "passes of method='delta-stn' are over; use method='stn', or do without."
)
"""Why layers refuse to compute then."""


@dataclass(frozen=True)
class WeightStepSettings:
    """How the weight step runs; set by the callback.

    Args:
        method: how the response is counted and fitted.
        linearize: for "delta-stn", whether the response is fitted on first-order predictions.
        share_primal: whether the base weights train on these as well, in one pass.
        perturb: what has a perturbation of its own.
        gradient_clip_val: largest norm, or largest entry, of the weights' gradient; None for no clipping.
        gradient_clip_algorithm: which of the two.
        accumulate_grad_batches: training batches whose gradients one optimiser step averages.
    """

    method: Method = "stn"
    linearize: bool = True
    share_primal: bool = False
    perturb: Perturb = "example"
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: ClipAlgorithm = "norm"
    accumulate_grad_batches: int = 1


class STNModule(L.LightningModule):
    """A LightningModule that tunes its own hyperparameters while it trains, together with `STNCallback`.

    Works as the only base, and in front of an existing module, `class Tuned(STNModule, ExistingLitModule)`, whose
    `training_step` then serves as `training_loss` and whose `validation_step` and `test_step` stay as they are.

    Optimisation is manual unless `self.automatic_optimization = True` is set after `super().__init__`.

    Args:
        *args: handed to the next base, and likewise `**kwargs`, so that an existing module keeps its constructor.
        hyperparameters: name to `Float`, `Integer` or `Categorical`.

    Attributes:
        hyperparameters: the `HyperparameterSet`; `self.hyperparameters["name"]` reads the value bound now.
        fits_response: whether `training_loss` runs for the response alone, as Delta-STN lets it beside the call for the
            weights. What must happen once for a batch, as keeping a hidden state, is not for this call; `self.log` does
            nothing there.

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

    def __init__(self, *args: Any, hyperparameters: Mapping[str, Hyperparameter], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False
        self.hyperparameters = HyperparameterSet(hyperparameters)
        self.weight_step_settings: WeightStepSettings | None = None
        self.fits_response = False
        self._muted = False

    def convert(
        self,
        net: nn.Module,
        *,
        dropout: str | None = None,
        drop_path: str | None = None,
        exclude: Collection[str | type[nn.Module]] = (),
    ) -> nn.Module:
        """Let a network's layers respond to this module's hyperparameters; see `lightning_stn.convert.convert`."""
        return convert(net, self.hyperparameters, dropout=dropout, drop_path=drop_path, exclude=exclude)

    def export(self, net: nn.Module | None = None) -> nn.Module:
        """A plain copy of a converted network at the current hyperparameters; see `lightning_stn.export.export`.

        Args:
            net: the network; None for the only one that this module holds.

        Raises:
            ValueError: there is none, or there are several and `net` does not say which.
        """
        if net is not None:
            return export(net)
        converted = {
            name: child
            for name, child in self.named_children()
            if any(isinstance(module, ResponseLayer) for module in child.modules())
        }
        if len(converted) != 1:
            raise ValueError(
                f"Expected one converted network, got {list(converted)}; say which, as in "
                f"export(self.{next(iter(converted), 'net')})."
            )
        return export(*converted.values())

    def parameter_groups(
        self, lr: float, *, response_lr: float | None = None, gate_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser whose steps grow with its rate, `SGD(self.parameter_groups(lr=30.0))`.

        A step of the gates moves the effective weights along the response by `|h|^2` times as much as a step of the
        weights does, `h` being the sample in unconstrained units: with many hyperparameters far from zero, and a large
        rate, more than training bears. The gates have a rate of their own here. Adam and its kind have no need of it.

        Args:
            lr: learning rate of the weights.
            response_lr: learning rate of the response weights; None for `lr`.
            gate_lr: learning rate of the gates; None for `lr / max(1, E|h|^2)` at the current hyperparameters, counted
                from the centre of the response.

        Returns:
            Three groups with every parameter that requires a gradient: weights, response weights, gates.

        Raises:
            ValueError: a rate is not a positive number.
        """
        hyperparameters = self.hyperparameters
        for name, rate in (("lr", lr), ("response_lr", response_lr), ("gate_lr", gate_lr)):
            number = isinstance(rate, int | float) and not isinstance(rate, bool) and 0 < rate < math.inf
            if not number and not (rate is None and name != "lr"):
                raise ValueError(f"parameter_groups: expected {name} to be positive, got {rate!r}; give a number.")
        if gate_lr is None:
            centre = hyperparameters.from_centre(hyperparameters.unconstrained)
            squared_norm = (centre.square() + hyperparameters.scale.square()).sum().item()
            gate_lr = lr / max(1.0, squared_norm)
        if response_lr is None:
            response_lr = lr
        layers = [module for module in self.modules() if isinstance(module, ResponseLayer)]
        gates = {id(gate): gate for layer in layers for gate in map(layer.gates, layer.responding)}
        responses = {id(r): r for layer in layers for r in map(layer.response, layer.responding)}
        weights = [p for p in self.parameters() if p.requires_grad and id(p) not in gates | responses]
        return [
            {"params": weights, "lr": lr},
            {"params": list(responses.values()), "lr": response_lr},
            {"params": list(gates.values()), "lr": gate_lr},
        ]

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        """`L_T`, the loss of the weight phase, regularisation and augmentation included.

        Override it; in front of an existing module it is that module's `training_step`.

        Returns:
            A scalar with a gradient in the weights.
        """
        step = self.inherited("training_step")
        if step is None:
            raise NotImplementedError(
                f"{type(self).__name__} has no training loss; define training_loss(self, batch, batch_idx)."
            )
        arguments = (batch, batch_idx)[: len(inspect.signature(step).parameters)]
        output = step(*arguments)
        loss: Tensor = output["loss"] if isinstance(output, Mapping) else output
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

        Raises:
            ValueError: the batch holds no tensor to tell from.
        """
        try:
            return extract_batch_size(batch)
        except Exception as error:
            raise ValueError(
                f"The number of examples in a batch of type {type(batch).__name__} cannot be inferred; "
                f"override infer_batch_size(self, batch) in {type(self).__name__}."
            ) from error

    def perturb(self, batch: Any, generator: torch.Generator | None = None) -> None:
        """Bind a perturbed sample for a weight step on `batch`: a row for each example, or one."""
        assert self.weight_step_settings is not None
        rows = self.infer_batch_size(batch) if self.weight_step_settings.perturb == "example" else 1
        bind_weight_phase(self.hyperparameters, self.hyperparameters.sample(rows, generator))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """One weight step on `training_loss`, at the sample that `STNCallback` has bound.

        Returns:
            The training loss; with automatic optimisation and Delta-STN a dictionary with the `loss` that is
            differentiated, that of base and response, and beside it the `training_loss`.

        Raises:
            RuntimeError: there is no `STNCallback`.
            ValueError: `training_loss` returns anything but a scalar tensor with a gradient.
        """
        if self.weight_step_settings is None:
            raise RuntimeError(
                f"{type(self).__name__} trains without its callback; pass callbacks=[STNCallback(...)] to the Trainer."
            )
        if self.hyperparameters.bound.values is None:  # Lightning's Tuner puts the callbacks aside.
            self.perturb(batch)
        settings = self.weight_step_settings
        if settings.method == "stn":
            loss = objective = self._scalar_training_loss(batch, batch_idx)
        elif settings.share_primal:
            loss = objective = self._shared_loss(batch, batch_idx)
        else:
            loss, objective = self._base_and_response(batch, batch_idx, settings.linearize)
        if not self.automatic_optimization:
            self._weight_step(objective, batch_idx, settings.accumulate_grad_batches)
            return loss
        return loss if objective is loss else {"loss": objective, "training_loss": loss.detach()}

    def _scalar_training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.training_loss(batch, batch_idx)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"Expected training_loss to return a scalar tensor, got {got}; return the mean loss.")
        if has_tangent(loss):
            raise ValueError(
                "training_loss calls parts of a converted network, whose prediction is therefore not linearised; call "
                "the network as convert() returned it, or use STNCallback(linearize=False)."
            )
        if not loss.requires_grad:
            raise ValueError(
                "Expected training_loss to return a loss with a gradient in the weights, got one without; compute it "
                "with the network, without torch.no_grad or detach."
            )
        return loss

    def _base_and_response(self, batch: Any, batch_idx: int, linear: bool) -> tuple[Tensor, Tensor]:
        """The loss of the base weights, and its sum with that of the response, so that one backward serves both."""
        with self._fitting_response(), response_pass(self, self.hyperparameters, linear=linear):
            response_loss = self._scalar_training_loss(batch, batch_idx)
        with base_pass(self.hyperparameters):
            loss = self._scalar_training_loss(batch, batch_idx)
        self.hyperparameters.bound.closed = _CLOSED
        return loss, loss + response_loss

    def _shared_loss(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of base and response at the first-order prediction."""
        with shared_pass(self.hyperparameters):
            loss = self._scalar_training_loss(batch, batch_idx)
        self.hyperparameters.bound.closed = _CLOSED
        return loss

    @contextmanager
    def _fitting_response(self) -> Iterator[None]:
        self.fits_response = True
        try:
            with self.muted():
                yield
        finally:
            self.fits_response = False

    def _weight_step(self, loss: Tensor, batch_idx: int, accumulate: int) -> None:
        """Backward, and every `accumulate`-th time the optimisers and the schedulers."""
        self.manual_backward(loss / accumulate)
        if (batch_idx + 1) % accumulate and not self.trainer.is_last_batch:
            return
        optimizers = self.optimizers()
        self._step_all(optimizers if isinstance(optimizers, list) else [optimizers])
        self.step_schedulers("step", batch_idx)
        if self.trainer.is_last_batch:
            self.step_schedulers("epoch", self.current_epoch)

    def _step_all(self, optimizers: list[Any]) -> None:
        """Step the optimisers, all at the scale with which their gradients were computed.

        Lightning updates the scaler of float16 behind each of them; the next would then unscale by another factor.
        """
        scaler = getattr(self.trainer.precision_plugin, "scaler", None) if len(optimizers) > 1 else None
        before, after = scaler and scaler.state_dict(), []
        for optimizer in optimizers:
            if scaler is not None:
                scaler.load_state_dict(before)
            optimizer.step()
            # Freed now, so that the hyperparameter phase has no gradient of the weights in memory.
            optimizer.zero_grad()
            if scaler is not None:
                after.append(scaler.state_dict())
        if scaler is not None:
            scaler.load_state_dict(min(after, key=lambda state: float(state["scale"])))

    def step_schedulers(self, interval: str, index: int, *, on_metric: bool = False) -> None:
        """Step the learning-rate schedulers that are due, which Lightning leaves to manual optimisation.

        Args:
            interval: "step" or "epoch".
            index: number of the batch in its epoch, or of the epoch.
            on_metric: whether those that follow a metric are stepped, or those that do not.

        Raises:
            RuntimeError: the metric of a scheduler was not logged (unless it is not `strict`).
        """
        for config in self.trainer.lr_scheduler_configs:
            due = config.interval == interval and (index + 1) % config.frequency == 0
            if not due or config.reduce_on_plateau != on_metric:
                continue
            metric = self.trainer.callback_metrics.get(config.monitor) if on_metric else None  # type: ignore[arg-type]
            if metric is None and on_metric:
                message = (
                    f"The learning-rate scheduler {type(config.scheduler).__name__} follows {config.monitor!r}, which "
                    f"was not logged; there are {sorted(self.trainer.callback_metrics)}."
                )
                if config.strict:
                    raise RuntimeError(f"{message} Log it, name another as 'monitor', or set 'strict' to False.")
                warnings.warn(message, stacklevel=2)
                continue
            self.lr_scheduler_step(config.scheduler, metric)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Free the sample, and save checkpoints by time, which Lightning leaves out in manual optimisation."""
        unbind(self.hyperparameters)
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback._train_time_interval is not None:
                automatic: Any = SimpleNamespace(automatic_optimization=True)
                callback.on_train_batch_end(self.trainer, automatic, outputs, batch, batch_idx)
        super().on_train_batch_end(outputs, batch, batch_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the current hyperparameters, also where a callback saves an averaged copy of this module instead."""
        current = self.hyperparameters.state_dict(prefix="hyperparameters.")
        checkpoint["state_dict"] |= {key: value for key, value in current.items() if key in checkpoint["state_dict"]}
        checkpoint[_SIGNATURE] = self.hyperparameters.signature
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume with hyperparameters that mean something else, before anything is loaded.

        Raises:
            ValueError: they have other names, another order, other ranges or choices.
        """
        if self._trainer is not None and self._trainer.training and _SIGNATURE in checkpoint:
            self.hyperparameters.require_signature(checkpoint[_SIGNATURE])
        super().on_load_checkpoint(checkpoint)

    def validation_step(self, batch: Any, batch_idx: int, *args: Any) -> Any:
        """Log `val_loss`, at the current hyperparameters; in front of an existing module, its own step."""
        return self._evaluation_step("validation", "val_loss", batch, batch_idx, *args)

    def test_step(self, batch: Any, batch_idx: int, *args: Any) -> Any:
        """Log `test_loss`, at the current hyperparameters; in front of an existing module, its own step."""
        return self._evaluation_step("test", "test_loss", batch, batch_idx, *args)

    def _evaluation_step(self, stage: str, tag: str, batch: Any, batch_idx: int, *args: Any) -> Any:
        step = self.inherited(f"{stage}_step")
        if step is not None:
            arguments = (batch, batch_idx, *args)
            return step(*arguments[: len(inspect.signature(step).parameters)])
        loss = self.validation_loss(batch, batch_idx)
        self.log(tag, loss, prog_bar=True, sync_dist=True, batch_size=self.infer_batch_size(batch))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Merge the weights once for the whole loop."""
        keep_merged(self.hyperparameters, True)
        super().on_validation_epoch_start()

    def on_validation_epoch_end(self) -> None:
        """Weights may move again."""
        keep_merged(self.hyperparameters, False)
        super().on_validation_epoch_end()

    def on_test_epoch_start(self) -> None:
        """Merge the weights once for the whole loop."""
        keep_merged(self.hyperparameters, True)
        super().on_test_epoch_start()

    def on_test_epoch_end(self) -> None:
        """Weights may move again."""
        keep_merged(self.hyperparameters, False)
        super().on_test_epoch_end()

    def on_predict_epoch_start(self) -> None:
        """Merge the weights once for the whole loop."""
        keep_merged(self.hyperparameters, True)
        super().on_predict_epoch_start()

    def on_predict_epoch_end(self) -> None:
        """Weights may move again."""
        keep_merged(self.hyperparameters, False)
        super().on_predict_epoch_end()

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log as every LightningModule does; nothing happens in the hyperparameter phase.

        `validation_loss` may log, but what it logs there would mix into the metrics of the training epoch.
        """
        if not self._muted:
            super().log(*args, **kwargs)

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Let `self.log` do nothing."""
        self._muted = True
        try:
            yield
        finally:
            self._muted = False

    def inherited(self, name: str) -> Callable[..., Any] | None:
        """The method of the next base, or None if that is only LightningModule's placeholder."""
        # By classes: compiled, two bound methods are never the same.
        bases = type(self).__mro__
        owner = next(base for base in bases[bases.index(STNModule) + 1 :] if name in base.__dict__)
        return None if issubclass(L.LightningModule, owner) else getattr(super(), name)
