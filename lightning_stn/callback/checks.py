"""Checks before the first step, so that a mistake costs seconds and not a run."""

import warnings
from collections.abc import Iterable
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from lightning_stn.callback.settings import Settings
from lightning_stn.inherited import inherited
from lightning_stn.layers import ResponseLayer
from lightning_stn.manual_optimization import AUTOMATIC, WeightStep
from lightning_stn.methods.optimizers import needs_closure
from lightning_stn.module import STNModule


def require_stn_module(module: LightningModule) -> STNModule:
    """The module as an `STNModule`.

    Raises:
        TypeError: the module is not an `STNModule`.
        NotImplementedError: the module has no validation loss, or no training loss.
    """
    name = type(module).__name__
    if not isinstance(module, STNModule):
        raise TypeError(f"Expected STNCallback to train an STNModule, got {name}; derive {name} from STNModule.")
    if type(module).validation_loss is STNModule.validation_loss:
        raise NotImplementedError(f"{name} has no validation loss; define validation_loss(self, batch, batch_idx).")
    if type(module).training_loss is STNModule.training_loss and inherited(module, STNModule, "training_step") is None:
        raise NotImplementedError(f"{name} has no training loss; define training_loss(self, batch, batch_idx).")
    return module


def is_converted(module: STNModule) -> bool:
    """Whether any layer responds to the hyperparameters."""
    return any(isinstance(layer, ResponseLayer) and layer.responding for layer in module.modules())


def check_network(module: STNModule, perturb: str) -> None:
    """Check the layers of the module, which may have been converted as late as in `setup` or `configure_model`.

    Raises:
        ValueError: no layer responds to the hyperparameters, parameters have been replaced since the conversion, or a
            layer does not support `perturb="example"`.
    """
    if not is_converted(module):
        raise ValueError(
            f"No layer of {type(module).__name__} responds to the hyperparameters, so nothing could tune them; "
            "wrap the network: self.net = self.convert(net)."
        )
    late = [
        f"{qualified}.{name}"
        for qualified, layer in module.named_modules()
        if isinstance(layer, ResponseLayer)
        for name in layer.responding
        if name not in layer._parameters
    ]
    if late:
        raise ValueError(
            f"These parameters have been replaced since the conversion: {late}. Register a parametrization, or prune, "
            "before convert(), so that what it is computed from responds."
        )
    shared_only = [
        f"{qualified} ({layer.plain_type.__name__})"
        for qualified, layer in module.named_modules()
        if isinstance(layer, ResponseLayer) and layer.responding and not layer.supports_rows()
    ]
    if perturb == "example" and shared_only:
        raise ValueError(
            f"These modules do not support a perturbation for each example: {', '.join(shared_only)}. Share one "
            "perturbation over the batch with STNCallback(perturb='batch'), or leave the modules plain with "
            "convert(exclude=[...])."
        )


def check_trainer(trainer: Trainer, module: STNModule, settings: Settings, kind: type[Callback]) -> None:
    """Refuse combinations of Trainer, module and settings that do not work.

    Args:
        trainer: the Trainer of the run.
        module: the module of the run.
        settings: those of the run.
        kind: of callback that the Trainer may have only one of.

    Raises:
        ValueError: there is more than one callback of this kind, or `weight_step` is given with automatic optimisation,
            where the Trainer clips and accumulates.
        NotImplementedError: the strategy, or a callback beside this one, is not supported.
    """
    if module.automatic_optimization and settings.weight_step != WeightStep():
        raise ValueError(
            "With automatic_optimization = True Lightning takes the weight step, but STNCallback got "
            f"weight_step={settings.weight_step!r}; leave weight_step out, and pass to Trainer(...) those of its "
            "settings that the Trainer has."
        )
    check_surroundings(trainer, module, kind)


def check_surroundings(trainer: Trainer, module: STNModule, kind: type[Callback]) -> None:
    """Refuse callbacks and strategies with which an `STNModule` cannot train.

    Args:
        trainer: the Trainer of the run.
        module: the module of the run.
        kind: of callback that asks, and that the Trainer may have only one of.

    Raises:
        ValueError: there is more than one callback of this kind.
        NotImplementedError: the strategy, or a callback beside this one, is not supported.
    """
    _check_callbacks(trainer, module, kind)
    _check_strategy(trainer, module, kind.__name__)


def _check_callbacks(trainer: Trainer, module: STNModule, kind: type[Callback]) -> None:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    count = sum(isinstance(callback, kind) for callback in callbacks)
    if count > 1:
        raise ValueError(f"Expected one {kind.__name__}, got {count}; give the Trainer one.")
    if any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks):
        raise NotImplementedError(
            f"{kind.__name__} does not support StochasticWeightAveraging: it ends with an epoch in which Lightning "
            "leaves out the backward pass, while the phases of this callback go on. Use Lightning's WeightAveraging or "
            "EMAWeightAveraging, which average the weights and leave the hyperparameters alone."
        )
    by_epoch = any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks)
    if by_epoch and not module.automatic_optimization:
        raise NotImplementedError(
            "GradientAccumulationScheduler does not work in manual optimisation; accumulate as many batches in all "
            f"epochs with {kind.__name__}(weight_step=WeightStep(accumulate_grad_batches=...)), or {AUTOMATIC}."
        )


def _check_strategy(trainer: Trainer, module: STNModule, name: str) -> None:
    if isinstance(trainer.strategy, FSDPStrategy):
        raise NotImplementedError(
            f"{name} does not support FSDPStrategy: it flattens the parameters that a layer's response needs one "
            "by one. Use strategy=ModelParallelStrategy(...), which shards each parameter for itself (FSDP2), or 'ddp'."
        )
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        raise NotImplementedError(
            f"{name} does not support DeepSpeedStrategy: its engine owns backward and optimiser step, and the "
            "hyperparameter phase needs a gradient beside them. Use strategy='ddp', or ModelParallelStrategy(...)."
        )
    # Lightning 2.6 was the first to reduce the gradients of a static graph's first backward in manual optimisation.
    static = isinstance(trainer.strategy, DDPStrategy) and trainer.strategy._ddp_kwargs.get("static_graph")
    if static and not module.automatic_optimization and lightning.__version__.startswith("2.5."):
        raise NotImplementedError(
            f"{name} does not support static_graph=True before Lightning 2.6, in whose manual optimisation each "
            "rank would step along its local gradient. Update Lightning, leave static_graph out, or set "
            "self.automatic_optimization = True."
        )


def check_optimizers(trainer: Trainer, module: STNModule) -> None:
    """Check that the weight optimisers train every response parameter, and can step in manual optimisation.

    Raises:
        ValueError: response parameters belong to no optimiser; the message names them.
        NotImplementedError: an optimiser evaluates the loss by itself, which manual optimisation does not offer.
    """
    for optimizer in trainer.optimizers:
        if needs_closure(optimizer) and not module.automatic_optimization:
            alone = ", and return this optimiser alone" if len(trainer.optimizers) > 1 else ""
            raise NotImplementedError(
                f"{type(optimizer).__name__} evaluates the loss several times in a step, for which manual optimisation "
                f"has no closure; set self.automatic_optimization = True after super().__init__(...){alone}."
            )
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    responses = {
        id(parameter)
        for layer in module.modules()
        if isinstance(layer, ResponseLayer)
        for parameter in layer.response_parameters()
        if parameter.requires_grad
    }
    missing = [name for name, parameter in module.named_parameters() if id(parameter) in responses - held]
    if missing:
        raise ValueError(
            f"No optimiser trains these response parameters: {missing}. Build the optimiser in configure_optimizers "
            "from self.parameters(), after the network has been converted."
        )


PATIENCE = 20
"""Batches after which an optimiser must have stepped."""


class WeightProgress:
    """Stops a run in which a `training_step` of the user's own takes the place of the weight step.

    Args:
        trainer: the Trainer of the run, with its optimisers.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._handles = [optimizer.register_step_post_hook(self._note) for optimizer in trainer.optimizers]
        self._stepped = False

    def _note(self, *_: Any) -> None:
        """Note a step, by whatever way the optimiser was called."""
        self._stepped = True

    def check(self, trainer: Trainer, module: STNModule, batches: int) -> None:
        """Check that an optimiser has stepped.

        Args:
            trainer: the Trainer of the run.
            module: the module of the run.
            batches: training batches so far.

        Raises:
            RuntimeError: no optimiser has stepped in the first epoch, or in 20 batches of it.
        """
        if self._stepped or module.automatic_optimization:
            for handle in self._handles:  # not in the hook, while torch goes through the hooks
                handle.remove()
            self._handles.clear()
            return
        owner = next(base for base in type(module).__mro__ if "training_step" in base.__dict__)
        if owner is not STNModule and (batches >= PATIENCE or trainer.is_last_batch):
            raise RuntimeError(
                f"No optimiser has stepped in {batches} batches: {owner.__name__} defines a training_step beside "
                "training_loss, which takes the place of the weight step. Rename it to training_loss, return "
                "super().training_step(batch, batch_idx) from it, or step the optimisers in it by hand."
            )


def warn_of_untrained_loss(module: STNModule, outputs: Any) -> None:
    """Warn of a `training_step` that returns another loss than the one on which the weight step has been taken.

    Manual optimisation steps inside `STNModule.training_step`, so that a term added behind it trains nothing.
    """
    trained, returned = module._stn_last_loss, (outputs or {}).get("loss")
    owner = next(base for base in type(module).__mro__ if "training_step" in base.__dict__)
    if owner is STNModule or module.automatic_optimization or trained is None or returned is None:
        return
    if not torch.allclose(trained, returned.to(trained), rtol=0.0, atol=0.0, equal_nan=True):
        warnings.warn(
            f"{owner.__name__}.training_step returns another loss than super().training_step(batch, batch_idx), which "
            "has taken the weight step already, so that the difference trains nothing; change the loss in "
            "training_loss(self, batch, batch_idx), with super().training_loss(batch, batch_idx).",
            stacklevel=3,
        )


def tuning_loader(trainer: Trainer, module: STNModule, dataloader: Iterable[Any] | None) -> Iterable[Any]:
    """The batches of the hyperparameter phase.

    They come from `dataloader`; if it is None, from the hook `tuning_dataloader()` of the module or the datamodule; if
    there is no hook, from the validation loader.

    Raises:
        ValueError: there is no validation loader, there are several and none was selected, or the hook returns no
            batches.
    """
    if dataloader is not None:
        return dataloader
    for owner in (module, getattr(trainer, "datamodule", None)):
        hook = getattr(owner, "tuning_dataloader", None)
        if hook is not None:
            loader: Iterable[Any] = hook()
            if not isinstance(loader, Iterable):
                raise ValueError(
                    f"Expected {type(owner).__name__}.tuning_dataloader() to return validation batches, got "
                    f"{type(loader).__name__}; return a DataLoader."
                )
            return loader
    if trainer.enable_validation:
        # Lightning loads and reloads the loaders only when it validates, which may be after this epoch.
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
    loaders = trainer.val_dataloaders
    if isinstance(loaders, CombinedLoader):
        loaders = loaders.flattened
    elif isinstance(loaders, dict):
        loaders = list(loaders.values())
    elif not isinstance(loaders, list | tuple):
        loaders = [] if loaders is None else [loaders]
    if len(loaders) != 1:
        raise ValueError(
            f"Expected one validation loader for the hyperparameter phase, got {len(loaders)}; pass one to trainer.fit "
            "(with limit_val_batches above 0), define tuning_dataloader(), or give STNCallback(dataloader=...)."
        )
    only: Iterable[Any] = loaders[0]
    return only
