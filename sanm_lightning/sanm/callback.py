"""SANM over an unedited module: its step is wrapped, the mathematics is that of :class:`SANM`."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from sanm_lightning.sanm.feature_extractor import FeatureExtractor, FeatureTap, shadow
from sanm_lightning.sanm.foreign_batch import images_and_labels, probabilities, rebuilt, tensor_or_none
from sanm_lightning.sanm.inference import inference_context
from sanm_lightning.sanm.module import SANM
from sanm_lightning.sanm.rehearsal import misread_labels, own_streams
from sanm_lightning.sanm.saliency import cam
from sanm_lightning.state_callback import SampleStateCallback, size_states, write_synced_states

__all__ = ["FeatureTap", "SANMCallback"]

USUAL_NAMES = ("network", "model", "net", "backbone", "encoder", "classifier")
KEY = "_sanm"
WARMUP_EPOCHS = 1
SHARING = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}
"""Strategies that share out weights, by name: lightning and pytorch_lightning have classes of their own."""


class SANMCallback(L.Callback):
    """Lay SANM over a module with an ordinary ``training_step`` on ``(x, y)`` batches, without editing it.

    The step receives masked images and regularised labels as class probabilities (B, C), and its loss gets the
    reconstruction term, made from the features of the last forward that the step ran. The loss must accept probabilities, as
    ``F.cross_entropy`` does; a step that reads ``y`` as class indices is looked for before the first update, rehearsed on a
    copy of the module, and ``SANM(labels=False)`` leaves ``y`` as it is. Images should be in [0, 1] where the step gets them.
    Label quality comes from the sample's index where the batch has one (``batch.index``) and the data module has
    ``num_samples``, else from a window of recent losses. What lies in a batch behind images and labels is passed on.

    Works with modules of ``lightning`` and of ``pytorch_lightning``, with any optimizer and scheduler: a decoder that the
    optimizer does not know joins its first parameter group. The decoder is kept in the callback's own state, so the module's
    state dict stays the user's. The first mask comes after ``SANM(warmup_epochs=)`` epochs, by default 1.

    Logs the means over an epoch's steps of ``train/quality``, ``train/masked_fraction``, ``train/reconstruction_loss`` (L_r),
    each the mean over the SANMs at work, and of ``train/classification_loss`` (the loss without beta L_r of any of them).

    Args:
        sanm: hyper-parameters and parts; None means ``SANM()``.
        network: name of the submodule that classifies; None tries the usual names (network, model, net, backbone, encoder,
            classifier), then the module itself.
        layer: name of that network's submodule whose output is the last feature map; None finds it.
        image_size: H, W of the training images; None takes that of the data module, or else of a batch.
        wrap: False leaves the step alone (for methods that call SANM themselves) and keeps the rest: label quality is
            fitted once per epoch, figures are logged.
        rehearse: run the step on a copy of the module before the first update, to find out whether it reads its labels as
            class indices; False takes it on trust.

    Raises:
        MisconfigurationException: before the first update, if the module cannot be served; the sentence says why. Strategies
            that share out weights (FSDP, DeepSpeed, tensor parallelism) cannot be; DDP can.
    """

    def __init__(
        self,
        sanm: SANM | None = None,
        network: str | None = None,
        layer: str | None = None,
        image_size: tuple[int, int] | None = None,
        wrap: bool = True,
        rehearse: bool = True,
    ) -> None:
        self.sanm = SANM() if sanm is None else sanm
        self.network, self.layer, self.image_size, self.wrap = network, layer, image_size, wrap
        self.tap: FeatureExtractor | None = None
        self.rehearse = rehearse
        self._fitted = -1  # the epoch whose beginning saw the last fit of label quality
        self._masked_steps: Tensor | None = None  # on the device, so that no step waits
        self._joined = False
        self._states: SampleStateCallback | None = None  # where the trainer has none
        self._undo: list[Callable[[], Any]] = []

    # Set-up and clean-up

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Wrap the step and size the decoder, before DDP and the optimizers are made."""
        if stage != "fit":
            return
        _require_whole_weights(trainer, pl_module)
        self._unwrap()
        for part in self._sanms(pl_module):  # without seed_everything every process has drawn a seed of its own
            part.seed = trainer.strategy.broadcast(part.seed)
        data = getattr(trainer, "datamodule", None)
        if not any(module is self.sanm for module in pl_module.modules()):
            size_states(self.sanm, trainer, type(pl_module).__name__)
        others = [part for part in trainer.callbacks if isinstance(part, SampleStateCallback)]  # type: ignore[attr-defined]
        self._states = None if others else SampleStateCallback()
        if self._states is not None:
            self._states.setup(trainer, pl_module, stage)
        if not self.wrap or not self.sanm.enabled:
            return
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"SANM wraps training steps of automatic optimization, and {type(pl_module).__name__} optimizes by hand; call "
                "SANM in the step yourself (see SANM's two calls)"
            )
        height, width = self.image_size or getattr(data, "image_size", None) or _size_of_a_batch(trainer)
        tap = self.tap = self._find_network(pl_module, (height, width))
        self._undo.append(tap.remove)
        if not any(module is self.sanm for module in pl_module.modules()):
            self._join(pl_module)
        self.sanm.to(next(pl_module.parameters()).device)
        try:
            self.sanm.build(tap, (height, width))
        except ValueError as error:
            said = str(error).replace(type(tap).__name__, type(tap.network).__name__)
            raise MisconfigurationException(f"SANM cannot serve {type(pl_module).__name__}: {said}") from error
        self._wrap_step(pl_module, tap)

    def _find_network(self, pl_module: L.LightningModule, image_size: Sequence[int]) -> FeatureExtractor:
        """Return a tap on the named network, or else on the first of the usual names that is a whole classifier."""
        owner = type(pl_module).__name__
        children = ", ".join(name for name, _ in pl_module.named_children() if name != KEY) or "none"
        if self.network is None:
            usual = [getattr(pl_module, name, None) for name in USUAL_NAMES]
            candidates = [*(module for module in usual if isinstance(module, nn.Module)), pl_module]
        else:
            try:
                candidates = [pl_module.get_submodule(self.network)]
            except AttributeError:
                raise MisconfigurationException(
                    f"{owner} has no submodule {self.network!r} for SANM to look at; it has: {children}"
                ) from None
        need_classifier = self.network is None or (self.sanm.mask and self.sanm.saliency is cam)
        errors = []
        for candidate in candidates:
            try:
                return FeatureExtractor(candidate, image_size, self.layer, need_classifier)
            except ValueError as error:
                errors.append(str(error))
        hint = "" if self.network else f"; if that is not the network, name it with network= (there are: {children})"
        raise MisconfigurationException(f"SANM cannot serve {owner}: {errors[0]}{hint}")

    def _join(self, pl_module: L.LightningModule) -> None:
        """Make SANM a submodule, for device moves and DDP, and keep it out of the module's own state dict."""
        prefix = KEY + "."

        def hide(module: nn.Module, state: dict[str, Any], at: str, metadata: Any) -> None:
            for key in [key for key in state if key.startswith(at + prefix)]:
                del state[key]

        def forgive(module: nn.Module, keys: Any) -> None:
            keys.missing_keys[:] = [key for key in keys.missing_keys if not key.startswith(prefix)]

        pl_module.add_module(KEY, self.sanm)
        self._joined = True
        self._undo += [
            lambda: pl_module._modules.pop(KEY),
            pl_module.register_state_dict_post_hook(hide).remove,
            pl_module.register_load_state_dict_post_hook(forgive).remove,
        ]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the optimizer train the decoder too, before its state is restored.

        The first group is extended: a group of its own would break schedulers that counted the groups already.
        """
        known = {id(p) for opt in trainer.optimizers for group in opt.param_groups for p in group["params"]}
        missing = [p for p in self.sanm.parameters() if id(p) not in known]
        if missing and trainer.optimizers:
            group = trainer.optimizers[0].param_groups[0]
            group["params"].extend(missing)
            if "param_names" in group:
                group["param_names"].extend(f"{KEY}.{place}" for place in range(len(missing)))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the module as it was found."""
        self._unwrap()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the module as it was found."""
        self._unwrap()

    def _unwrap(self) -> None:
        while self._undo:
            self._undo.pop()()
        self.tap = None

    # The step

    def _wrap_step(self, pl_module: L.LightningModule, tap: FeatureExtractor) -> None:
        step = pl_module.training_step
        probed = not (self.sanm.labels and self.rehearse)

        @functools.wraps(step)
        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal probed
            if not probed:
                probed = True
                misread = misread_labels(pl_module, tap, step, batch, args, kwargs)
                if misread:
                    raise MisconfigurationException(
                        f"the training step of {type(pl_module).__name__} reads its labels as class indices ({misread}), and "
                        "SANM hands it class probabilities (B, C); use y.argmax(1) for such figures, or SANM(labels=False), "
                        "which leaves the labels as they are"
                    )
            return self._masked_step(pl_module, tap, step, batch, args, kwargs)

        training_step.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]  # Lightning looks at it
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
        index, true_labels = (tensor_or_none(batch, name) for name in ("index", "true_labels"))
        targets = probabilities(labels, tap.num_classes)
        quality = None
        if self.sanm.masking(pl_module.current_epoch, WARMUP_EPOCHS):
            quality = self.sanm.source_of_quality(targets, index, true_labels)
        views = self.sanm(tap, images, targets, quality)
        # Every row once, or twice where the unmasked images are kept.
        rows = torch.arange(len(views.images), device=images.device) % len(images)
        given = views.targets if self.sanm.labels else labels[rows]
        tap.forget()
        out = step(rebuilt(batch, views.images, given, rows), *args, **kwargs)
        features, logits = tap.features, tap.logits
        tap.forget()
        if out is None:
            return None
        if features is None:
            raise MisconfigurationException(
                f"the training step of {type(pl_module).__name__} did not run the network that SANM looks at "
                f"({type(tap.network).__name__}); name the right submodule with network="
            )
        if views.logits is None and logits is None:  # a step that calls the parts of its network one by one
            with inference_context(tap, images):
                logits = tap.forward_head(tap.forward_features(images))
            tap.forget()
        clean = views.unmasked(cast(Tensor, logits))
        self.sanm.label_quality.update(clean, targets, index, views.features)
        term = self.sanm.reconstruction(features, images, views)
        return {**out, "loss": out["loss"] + term} if isinstance(out, Mapping) else out + term

    # Once per epoch, and figures

    def _sanms(self, pl_module: L.LightningModule) -> list[SANM]:
        """Every SANM of the module, this callback's own among them."""
        return list(dict.fromkeys([self.sanm, *(part for part in pl_module.modules() if isinstance(part, SANM))]))

    def begin_epoch(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fit label quality, once per epoch; what has begun is saved, since an epoch that is resumed has no start hook."""
        if self.sanm.enabled and self._fitted != trainer.current_epoch:
            for sanm in self._sanms(pl_module):
                sanm.fit_quality(pl_module)
            self._fitted = trainer.current_epoch

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin the epoch, where the loader has not."""
        self.begin_epoch(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the figures of the step."""
        if not self.sanm.enabled:
            return
        worked = [sanm for sanm in self._sanms(pl_module) if sanm.last]
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
            pl_module.log(f"train/{name}", value, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        if "masked_fraction" in figures:
            hidden = (figures["masked_fraction"] > 0).long()
            before = 0 if self._masked_steps is None else self._masked_steps.to(hidden.device)
            self._masked_steps = before + hidden

    @property
    def masked_steps(self) -> int:
        """Training steps so far in which this process hid something."""
        return 0 if self._masked_steps is None else int(self._masked_steps)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sync per-sample state, where no other callback does. A collective."""
        if self._states is not None:
            self._states.on_train_epoch_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save what all processes know, likewise."""
        if self._states is not None:
            self._states.on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the last epoch's evidence in, so that the final quality is that of the final network.

        Here and not at the end of training, which a run that is resumed from its last checkpoint does not have.
        """
        if self.sanm.enabled:
            for sanm in self._sanms(pl_module):
                sanm.fit_quality(pl_module)

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch of the last fit and, for a module that does not hold SANM itself, SANM's state."""
        state: dict[str, Any] = {"refreshed": self._fitted, "masked_steps": self.masked_steps}
        if self._joined:
            state["sanm"] = self.sanm.state_dict()
            write_synced_states(self.sanm, state["sanm"])
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state."""
        self._fitted = state_dict["refreshed"]
        self._masked_steps = torch.tensor(int(state_dict.get("masked_steps", 0)))
        if "sanm" in state_dict:
            self.sanm.load_state_dict(state_dict["sanm"])


def _require_whole_weights(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Refuse strategies that leave each process a part of the weights.

    Activation maps read the classifier's weights outside of the wrapped forward, parts of a network run by themselves, and
    methods rank or average weights one by one: on parts of them that fails late, or not aloud.
    """
    if SHARING & {kind.__name__ for kind in type(trainer.strategy).__mro__}:
        raise MisconfigurationException(
            f"{type(pl_module).__name__} needs whole weights in every process, and {type(trainer.strategy).__name__} shares "
            "them out; use --trainer.strategy ddp"
        )


def _size_of_a_batch(trainer: L.Trainer) -> Sequence[int]:
    try:
        with own_streams():  # a shuffled loader draws its seed from the global stream, and a data set may draw, too
            batch = next(iter(trainer.fit_loop._data_source.dataloader()))
    except Exception as error:
        raise MisconfigurationException(
            f"SANM must know the size of the images before training, and no batch can be had yet ({type(error).__name__}: "
            f"{error}); pass image_size="
        ) from error
    size: Sequence[int] = images_and_labels(batch)[0].shape[-2:]
    return size
