"""Callback that applies :class:`SANM` to an unmodified LightningModule by wrapping its training step."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from sanm_lightning.compat import set_up_again
from sanm_lightning.epoch_means import EpochMeans
from sanm_lightning.sanm.checks import (
    LabelCheck,
    check_images,
    height_and_width,
    image_size_of,
    is_reached,
    require_same_module,
    require_whole_weights,
    warn_of_few_steps,
    warn_of_long_warmup,
)
from sanm_lightning.sanm.feature_extractor import FeatureExtractor, FeatureTap, shadow
from sanm_lightning.sanm.foreign_batch import (
    SampleIndex,
    images_and_labels,
    probabilities,
    rebuilt,
    tensor_or_none,
)
from sanm_lightning.sanm.foreign_checkpoint import (
    add_hidden,
    add_parameters,
    add_to_optimizer_states,
    split_from_optimizer_states,
)
from sanm_lightning.sanm.foreign_network import find_network
from sanm_lightning.sanm.inference import inference_context
from sanm_lightning.sanm.module import SANM
from sanm_lightning.sanm.normalization import Normalization
from sanm_lightning.sanm.rehearsal import require_probabilities
from sanm_lightning.sanm.views import Views
from sanm_lightning.state_callback import SampleStateCallback, size_states, write_synced_states

__all__ = ["FeatureTap", "SANMCallback"]

KEY = "_sanm"
WARMUP_EPOCHS = 1


class SANMCallback(L.Callback):
    """Apply SANM to a module with a standard ``training_step`` on ``(x, y)`` batches, without modifying the module.

    Before the first mask, the step receives its batches unchanged. Then it receives masked images and regularized labels
    as class probabilities (B, C). The reconstruction term, computed from the features of the last forward pass of the
    step, is added to its loss. The loss must accept probabilities, and have the same value for class indices and one-hot
    rows, as ``F.cross_entropy`` without class weights does; other steps are detected before the first update by a run on a
    copy of the module, and ``SANM(labels=False)`` keeps ``y`` unchanged. Images in the batch are in [0, 1], or normalized
    by ``mean`` and ``std``, with any number of channels. Label quality is estimated by sample index if the data module has
    ``num_samples`` and the batch has an index: ``batch.index``, or the third element of ``(x, y, index)`` (see ``index``).
    Otherwise it is estimated from a window of recent losses. Further elements of a batch are passed on.

    It supports modules of ``lightning`` and ``pytorch_lightning``, with any optimizer and scheduler: decoder parameters
    that are missing in the optimizer are added to its first parameter group. The decoder is saved in the callback's
    state, so the module's state dict is unchanged. The first mask is applied after ``SANM(warmup_epochs=)`` epochs
    (default: 1).

    Logged per epoch, as means over steps: ``train/quality``, ``train/masked_fraction``, ``train/reconstruction_loss``
    (L_r), each averaged over the active SANMs, and ``train/classification_loss`` (the loss without the terms beta L_r).

    Args:
        sanm: SANM with its options; None means ``SANM()``.
        network: name of the classifier submodule; None tries common names (network, model, net, backbone, encoder,
            classifier), then the module itself.
        layer: name of the network's submodule whose output is the last feature map; None detects it.
        image_size: H, W of the training images; None uses that of the data module, or of a batch.
        wrap: whether to wrap the training step; False, for methods that call SANM, only fits label quality once per
            epoch and logs metrics.
        rehearse: whether to run the step on a copy of the module before the first update, to detect steps that use
            labels as class indices.
        index: whether the third element of tuple batches is the position of each sample in the training set, 0 to N - 1;
            None determines it on the first batch (integers of shape (B,), B >= 4, all different and in range), and logs
            the result.
        mean: mean of the normalization (x - mean) / std of the images in the batches, for each channel or for all; fill
            and reconstruction are then made in [0, 1]. None for images in [0, 1].
        std: standard deviation of the normalization, for each channel or for all.

    Raises:
        ValueError: if only one of ``mean`` and ``std`` is given, or a value is out of its range.
        MisconfigurationException: before the first update, if module, images or labels are not supported. Strategies that shard
            weights (FSDP, DeepSpeed, tensor parallelism) are not supported; DDP is.
    """

    def __init__(
        self,
        sanm: SANM | None = None,
        network: str | None = None,
        layer: str | None = None,
        image_size: tuple[int, int] | None = None,
        wrap: bool = True,
        rehearse: bool = True,
        index: bool | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
    ) -> None:
        self.sanm = SANM() if sanm is None else sanm
        self.sanm.normalization = Normalization.from_arguments(mean, std) or self.sanm.normalization
        self.index = index
        self.network, self.layer, self.image_size, self.wrap = network, layer, image_size, wrap
        self.tap: FeatureExtractor | None = None
        self.rehearse = rehearse
        self._fitted = -1  # epoch of the last fit of label quality
        self._means, self._logged = EpochMeans(), [self.sanm]
        self._masked_steps: Tensor | None = None  # on the device, to avoid synchronization
        self._index = SampleIndex(index)
        self._label_check = LabelCheck()
        self._resumed: dict[str, Any] | None = None  # checkpoint, until the optimizers are restored
        self._joined = False
        self._states: SampleStateCallback | None = None  # if the trainer has none
        self._undo: list[Callable[[], Any]] = []

    # Setup and teardown

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Wrap the step and create the decoder, before DDP and the optimizers are created."""
        if stage != "fit":
            return
        require_whole_weights(trainer, pl_module)
        self._unwrap()
        for part in self._sanms(pl_module):  # without seed_everything, the seeds of the processes differ
            part.seed = trainer.strategy.broadcast(part.seed)
        data = getattr(trainer, "datamodule", None)
        if not any(module is self.sanm for module in pl_module.modules()):
            size_states(self.sanm, trainer, type(pl_module).__name__)
        others = [part for part in trainer.callbacks if isinstance(part, SampleStateCallback)]  # type: ignore[attr-defined]
        self._states = None if others else SampleStateCallback()
        if self._states is not None:
            self._states.setup(trainer, pl_module, stage)
        if not self.wrap or not self.sanm.enabled:
            self._say_maps(pl_module)
            self._renew_copies(trainer, pl_module)
            return
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"expected automatic optimization in {type(pl_module).__name__}, got manual optimization; call SANM in "
                "the training step (see the two calls of SANM)"
            )
        size = self.image_size or getattr(data, "image_size", None) or image_size_of(trainer)
        height, width = height_and_width(size)
        tap = self.tap = find_network(pl_module, self.sanm, self.network, self.layer, (height, width))
        self._undo.append(tap.remove)
        if tap.num_classes < 2:
            raise MisconfigurationException(
                f"expected a network with a logit for each of C >= 2 classes for SANM, got one logit in "
                f"{type(pl_module).__name__}; use two logits and F.cross_entropy"
            )
        if not any(module is self.sanm for module in pl_module.modules()):
            self._undo += add_hidden(pl_module, KEY, self.sanm)
            self._joined = True
        self.sanm.to(next(pl_module.parameters()).device)
        try:
            self.sanm.build(tap, (height, width))
        except ValueError as error:
            message = str(error).replace(type(tap).__name__, type(tap.network).__name__)
            raise MisconfigurationException(f"{message} (in {type(pl_module).__name__})") from error
        self._say_maps(pl_module)
        self._index = SampleIndex(self.index)
        self._wrap_step(pl_module, tap)
        self._renew_copies(trainer, pl_module)

    def _renew_copies(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        set_up_again(trainer, pl_module, {module for part in self._sanms(pl_module) for module in part.modules()})

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check per-sample state, add the decoder to the optimizer before its state is restored, warn of a long warm-up."""
        if self._states is not None:
            self._states.on_fit_start(trainer, pl_module)
        add_parameters(trainer.optimizers, self.sanm, KEY)
        resumed, self._resumed = self._resumed, None
        if self.wrap:
            require_same_module(self.sanm, pl_module, resumed is not None)
        if resumed is not None:
            self._add_to_states(trainer, resumed)
        if self.sanm.enabled:
            warn_of_long_warmup(trainer, self._first_masked_epoch(pl_module))

    def _add_to_states(self, trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
        """Add the decoder to the optimizer states of a checkpoint, unless they contain it."""
        if self.tap is not None:
            removed = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("optimizer_states", [])
            add_to_optimizer_states(checkpoint.get("optimizer_states", []), trainer.optimizers, self.sanm, removed)

    def _first_masked_epoch(self, pl_module: L.LightningModule) -> int:
        warmup = WARMUP_EPOCHS if self.wrap else getattr(pl_module, "warmup_epochs", 0)
        return int(warmup if self.sanm.warmup_epochs is None else self.sanm.warmup_epochs)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the module."""
        self._unwrap()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore the module."""
        self._unwrap()

    def _unwrap(self) -> None:
        while self._undo:
            self._undo.pop()()
        self.tap = None

    # The step

    def _wrap_step(self, pl_module: L.LightningModule, tap: FeatureExtractor) -> None:
        step = pl_module.training_step
        checked = False

        @functools.wraps(step)
        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal checked
            if not checked:
                checked = True
                images, labels = images_and_labels(batch)
                check_images(images, self.sanm)
                self._label_check(probabilities(labels, tap.num_classes), labels, now=True)
                reached = is_reached(pl_module.trainer, self._first_masked_epoch(pl_module))
                if self.rehearse and self.sanm.softens_labels and reached:
                    require_probabilities(pl_module, tap, step, batch, args, kwargs)
            return self._masked_step(pl_module, tap, step, batch, args, kwargs)

        training_step.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]  # inspected by Lightning
        self._undo.append(shadow(pl_module, "training_step", training_step))

    def _masked_step(
        self,
        pl_module: L.LightningModule,
        tap: FeatureExtractor,
        step: Callable[..., Any],
        batch: Any,
        args: Any,
        kwargs: Any,
    ) -> Any:
        images, labels = images_and_labels(batch)
        index, true_labels = self._index(batch, pl_module.trainer), tensor_or_none(batch, "true_labels")
        targets = probabilities(labels, tap.num_classes)
        self._label_check(targets, labels)
        quality = None
        if self.sanm.masking(pl_module.current_epoch, WARMUP_EPOCHS):
            quality = self.sanm.source_of_quality(targets, index, true_labels)
        views = self.sanm(tap, images, targets, quality)
        tap.forget()
        out = step(self._batch_of(views, batch) if views.masked else batch, *args, **kwargs)
        features, logits = tap.features, tap.logits
        tap.forget()
        if out is None:
            return None
        if features is None:
            raise MisconfigurationException(
                f"expected the training step of {type(pl_module).__name__} to run the network of SANM "
                f"({type(tap.network).__name__}), got no output of it; set the trained submodule with network="
            )
        whole = logits is not None and len(logits) == len(views.images)
        if views.logits is None and not whole:  # a step that runs submodules of the network, or other images
            with inference_context(tap, images, self.sanm.batch_statistics):
                logits = tap.forward_head(tap.forward_features(images))
            tap.forget()
        clean = views.unmasked(cast(Tensor, logits))
        self.sanm.label_quality.update(clean, targets, index, views.features)
        term = self.sanm.reconstruction(features, images, views)
        return {**out, "loss": out["loss"] + term} if isinstance(out, Mapping) else out + term

    def _batch_of(self, views: Views, batch: Any) -> Any:
        """Return the batch with the images of the views, and their labels if they are regularized."""
        images, labels = images_and_labels(batch)
        rows = torch.arange(len(views.images), device=images.device) % len(images)  # of the batch for each view
        return rebuilt(batch, views.images, views.targets if self.sanm.softens_labels else labels[rows], rows)

    def _say_maps(self, pl_module: L.LightningModule) -> None:
        """Log the activation maps that were chosen, once for networks of the same kind."""
        for text in dict.fromkeys(part.maps.choice for part in self._sanms(pl_module) if part.enabled and part.mask):
            if text is not None:
                rank_zero_info(f"SANM: {text}")

    # Fits once per epoch, and metrics

    def _sanms(self, pl_module: L.LightningModule) -> list[SANM]:
        """Return all SANMs of the module, including that of this callback."""
        return list(dict.fromkeys([self.sanm, *(part for part in pl_module.modules() if isinstance(part, SANM))]))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the SANMs whose metrics are logged, delete the metrics of an interrupted epoch, and warn of too few steps."""
        self._logged = self._sanms(pl_module)
        self._means.reset()
        if self.sanm.enabled:
            warn_of_few_steps(trainer, self._first_masked_epoch(pl_module))

    def begin_epoch(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fit label quality once per epoch; the epoch is saved, because resumed epochs do not call the start hook."""
        if self.sanm.enabled and self._fitted != trainer.current_epoch:
            for sanm in self._sanms(pl_module):
                sanm.fit_quality(pl_module)
            self._fitted = trainer.current_epoch

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the epoch, unless the loader has started it."""
        self.begin_epoch(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the metrics of the step to the means of the epoch."""
        if not self.sanm.enabled:
            return
        worked = [sanm for sanm in self._logged if sanm.last]
        figures = {}
        for name in ("quality", "masked_fraction", "reconstruction_loss"):
            values = [sanm.last[name] for sanm in worked if name in sanm.last]
            if values:
                figures[name] = torch.stack(values).mean()
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):  # Lightning has divided it by the number of accumulated batches
            terms = [
                sanm.beta * sanm.last["reconstruction_loss"] for sanm in worked if "reconstruction_loss" in sanm.last
            ]
            figures["classification_loss"] = loss.detach() * trainer.accumulate_grad_batches - sum(terms)
        for name, value in figures.items():
            self._means.update(f"train/{name}", value)
        self._means.log_if_last(trainer, pl_module)
        if "masked_fraction" in figures:
            hidden = (figures["masked_fraction"] > 0).long()
            before = 0 if self._masked_steps is None else self._masked_steps.to(hidden.device)
            self._masked_steps = before + hidden

    @property
    def masked_steps(self) -> int:
        """Number of training steps so far with at least one masked image in this process."""
        return 0 if self._masked_steps is None else int(self._masked_steps)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the labels, and synchronize per-sample state, unless another callback does. A collective operation."""
        self._means.log(pl_module)
        self._label_check.report(trainer.current_epoch)
        if self._states is not None:
            self._states.on_train_epoch_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the per-sample state of all processes, unless another callback does. A collective operation.

        The optimizer states of the decoder are moved to the state of this callback, so that training can be continued
        without SANM.
        """
        if self._states is not None:
            self._states.on_save_checkpoint(trainer, pl_module, checkpoint)
        # also after an exception, when the module is restored and the decoder is still among the optimizer's parameters
        if self.wrap and self.state_key in checkpoint.get("callbacks", {}):
            states = checkpoint.get("optimizer_states", [])
            removed = split_from_optimizer_states(states, trainer.optimizers, self.sanm)
            checkpoint["callbacks"][self.state_key]["optimizer_states"] = removed

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the optimizer states until the optimizers exist, and restore the state of SANM saved by the mixin."""
        self._resumed = checkpoint
        self._add_to_states(trainer, checkpoint)  # a finder restores a checkpoint when the optimizers exist
        if self._joined and "sanm" in checkpoint:
            self.sanm.load_state_dict(checkpoint["sanm"]["state_dict"])

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fit label quality to the evidence of the last epoch.

        It is not in ``on_train_end``, which is not called in a run resumed from its last checkpoint.
        """
        if self.sanm.enabled:
            for sanm in self._sanms(pl_module):
                sanm.fit_quality(pl_module)

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch of the last fit and, for modules that do not contain SANM, the state of SANM."""
        state: dict[str, Any] = {"refreshed": self._fitted, "masked_steps": self.masked_steps}
        if self._joined:
            state["sanm"] = self.sanm.state_dict()
            write_synced_states(self.sanm, state["sanm"])
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state."""
        self._fitted = state_dict["refreshed"]
        self._masked_steps = torch.tensor(int(state_dict.get("masked_steps", 0)))
        if "sanm" in state_dict:
            self.sanm.load_state_dict(state_dict["sanm"])
