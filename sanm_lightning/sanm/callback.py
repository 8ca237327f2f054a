"""SANM over a module that nobody has to edit: the step is wrapped, its mathematics stays in :class:`SANM`."""

import contextlib
import copy
import functools
import inspect
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from sanm_lightning.sanm.activation import classifier_weight
from sanm_lightning.sanm.module import SANM, without_trace

__all__ = ["FeatureTap", "SANMCallback"]

USUAL_NAMES = ("network", "model", "net", "backbone", "encoder", "classifier")
KEY = "_sanm"
WARMUP_EPOCHS = 1
SHARING = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}
"""Strategies that share out weights, by name: lightning and pytorch_lightning have classes of their own."""


class FeatureTap(nn.Module):
    """Any convolutional classifier, seen by timm's conventions, that remembers the features of its last forward.

    Of a timm model ``forward_features`` is listened to. Of another network (torchvision's, one's own) the map that enters
    the last average pooling is taken, or the output of a named layer; then ``forward_features`` runs the whole network and
    keeps the logits for ``forward_head``. The network is run once here, on two black images.

    Args:
        network: the classifier, images (B, 3, H, W) -> logits (B, C).
        image_size: H, W of the images in pixels.
        layer: name of the submodule whose output is the last feature map; None finds it.
        need_classifier: insist on a linear classifier on the pooled features.

    Raises:
        ValueError: if no feature map or no linear classifier can be found, or the network does not run.
    """

    features: Tensor | None = None
    logits: Tensor | None = None

    def __init__(
        self, network: nn.Module, image_size: Sequence[int], layer: str | None = None, need_classifier: bool = True
    ) -> None:
        super().__init__()
        self.network: Any = network
        self._undo: list[Callable[[], None]] = []
        timm_names = ("forward_features", "forward_head", "get_classifier", "num_features")
        self._timm = layer is None and all(hasattr(network, name) for name in timm_names)
        like = next(network.parameters(), torch.zeros(()))
        images = torch.zeros(2, 3, *image_size, device=like.device, dtype=like.dtype)
        try:
            self._listen(layer)
            with without_trace(self, images):
                features = self.forward_features(images)
                logits = self.forward_head(features)
            if not (isinstance(logits, Tensor) and logits.ndim == 2):
                raise ValueError(f"{type(network).__name__} does not yield logits (B, C)")
            self.num_classes: int = logits.shape[1]
            self.num_features: int = network.num_features if self._timm else features.shape[1]  # type: ignore[assignment]
            if need_classifier:
                classifier_weight(self if not self._timm else network, self.num_features)  # type: ignore[arg-type]
        except Exception as error:
            self.remove()
            if isinstance(error, ValueError):
                raise
            name, shape = type(network).__name__, tuple(images.shape)
            raise ValueError(f"{name} does not run on images {shape} ({type(error).__name__}: {error})") from error
        self.forget()

    def _listen(self, layer: str | None) -> None:
        network = self.network
        if self._timm:
            inner = getattr(network, "_orig_mod", network)  # of a compiled one
            self._plain_features = inner.forward_features
            self._undo.append(_shadow(inner, "forward_features", self._features_of))
        elif layer is not None:
            try:
                self._undo.append(network.get_submodule(layer).register_forward_hook(self._see_output).remove)
            except AttributeError:
                raise ValueError(f"{type(network).__name__} has no layer {layer!r}") from None
        else:
            pools = [m for m in network.modules() if isinstance(m, (nn.AdaptiveAvgPool2d, nn.AvgPool2d))]
            if not pools:
                raise ValueError(
                    f"{type(network).__name__} has no average pooling to take a feature map from, so the layer whose output "
                    "is the last feature map must be named with layer="
                )
            self._undo.append(pools[-1].register_forward_pre_hook(self._see_input).remove)
        self._undo.append(network.register_forward_hook(self._see_logits).remove)

    # Bound methods, not closures: in a deep copy of the network they belong to the copy.

    def _features_of(self, *args: Any, **kwargs: Any) -> Tensor:
        features: Tensor = self._plain_features(*args, **kwargs)
        self.features = features
        return features

    def _see_output(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.features = output

    def _see_input(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.features = inputs[0]

    def _see_logits(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.logits = output

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> feature map (B, D, h, w)."""
        if self._timm:
            features: Tensor = self.network.forward_features(images)
            return features
        self.forget()
        self.network(images)
        if self.features is None:
            raise ValueError(f"{type(self.network).__name__} does not run the layer that yields its last feature map")
        return self.features

    def forward_head(self, features: Tensor) -> Tensor:
        """Feature map (B, D, h, w) -> logits (B, C); of a network that is not timm's, the last feature map only."""
        logits = self.network.forward_head(features) if self._timm else self.logits
        assert logits is not None
        return logits

    def get_classifier(self) -> nn.Module:
        """Return the linear classifier."""
        if self._timm:
            classifier: nn.Module = self.network.get_classifier()
            return classifier
        shape = (self.num_classes, self.num_features)
        linear = [m for m in self.network.modules() if isinstance(m, nn.Linear) and tuple(m.weight.shape) == shape]
        if not linear:
            raise ValueError(
                f"{type(self.network).__name__} has no linear classifier from the {shape[1]} channels of its last feature "
                f"map to {shape[0]} classes, as a class activation map needs it (SANM(place='energy') does not)"
            )
        return linear[-1]

    def forget(self) -> None:
        """Let go of the last forward, and of its graph."""
        self.features = self.logits = None

    def remove(self) -> None:
        """Take every hook off again."""
        while self._undo:
            self._undo.pop()()
        self.forget()


class SANMCallback(L.Callback):
    """Lay SANM over a module with an ordinary ``training_step`` on ``(x, y)`` batches, without editing it.

    The step receives masked images and regularised labels as class probabilities (B, C), and its loss gets the
    reconstruction term, made from the features of the last forward that the step ran. The loss must accept probabilities, as
    ``F.cross_entropy`` does; a step that reads ``y`` as class indices is looked for before the first update, rehearsed on a
    copy of the module, and ``SANM(labels=False)`` leaves ``y`` as it is. Images should be in [0, 1] where the step gets them.
    Label quality comes from the sample's index where the batch has one (``batch.index``) and the data module says
    ``num_samples``, else from a window of recent losses. What lies in a batch behind images and labels is passed on.

    Works with modules of ``lightning`` and of ``pytorch_lightning``, with any optimizer and scheduler: a decoder that the
    optimizer does not know joins its first parameter group. The decoder is kept in the callback's own state, so the module's
    state dict stays the user's. The first mask comes after ``SANM(warmup_epochs=)`` epochs, by default 1.

    Logs the means over an epoch's steps of ``train/quality``, ``train/hidden_share``, ``train/reconstruction_loss`` (L_r) and
    ``train/classification_loss`` (the loss without beta L_r).

    Args:
        sanm: hyper-parameters and parts; None means ``SANM()``.
        network: name of the submodule that classifies; None tries the usual names (network, model, net, backbone, encoder,
            classifier), then the module itself.
        layer: name of that network's submodule whose output is the last feature map; None finds it.
        image_size: H, W of the training images; None asks the data module, then looks at a batch.
        wrap: False leaves the step alone (for methods that call SANM themselves) and keeps the rest: label quality is
            refreshed once per epoch, figures are logged.

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
    ) -> None:
        self.sanm = SANM() if sanm is None else sanm
        self.network, self.layer, self.image_size, self.wrap = network, layer, image_size, wrap
        self.tap: FeatureTap | None = None
        self._refreshed = -1  # the epoch whose beginning saw the last refresh
        self._joined = False
        self._undo: list[Callable[[], Any]] = []

    # Set-up and clean-up

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Wrap the step and size the decoder, before DDP and the optimizers are made."""
        if stage != "fit":
            return
        _require_whole_weights(trainer, pl_module)
        self._unwrap()
        parts = dict.fromkeys([self.sanm, *(part for part in pl_module.modules() if isinstance(part, SANM))])
        for part in parts:  # without seed_everything every process has drawn a seed of its own
            part.seed = trainer.strategy.broadcast(part.seed)
        data = getattr(trainer, "datamodule", None)
        num_samples = getattr(data, "num_samples", None)
        if self.sanm.enabled and isinstance(num_samples, int):
            self.sanm.label_quality.resize(num_samples)
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

    def _find_network(self, pl_module: L.LightningModule, image_size: Sequence[int]) -> FeatureTap:
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
        need_classifier = self.network is None or (self.sanm.mask and self.sanm.place == "cam")
        errors = []
        for candidate in candidates:
            try:
                return FeatureTap(candidate, image_size, self.layer, need_classifier)
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

    def _wrap_step(self, pl_module: L.LightningModule, tap: FeatureTap) -> None:
        step = pl_module.training_step
        probed = not self.sanm.labels

        @functools.wraps(step)
        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal probed
            if not probed:
                probed = True
                misread = _misread_labels(pl_module, tap, step, batch, args, kwargs)
                if misread:
                    raise MisconfigurationException(
                        f"the training step of {type(pl_module).__name__} reads its labels as class indices ({misread}), and "
                        "SANM hands it class probabilities (B, C); use y.argmax(1) for such figures, or SANM(labels=False), "
                        "which leaves the labels as they are"
                    )
            return self._masked_step(pl_module, tap, step, batch, args, kwargs)

        training_step.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]  # Lightning looks at it
        self._undo.append(_shadow(pl_module, "training_step", training_step))

    def _masked_step(
        self,
        pl_module: L.LightningModule,
        tap: FeatureTap,
        step: Callable[..., Any],
        batch: Any,
        args: Any,
        kwargs: Any,
    ) -> Any:
        images, labels = _images_and_labels(batch)
        index, true_labels = (_tensor_or_none(batch, name) for name in ("index", "true_labels"))
        targets = _probabilities(labels, tap.num_classes)
        quality = None
        if self.sanm.masking(pl_module.current_epoch, WARMUP_EPOCHS):
            quality = self.sanm.source_of_quality(targets, index, true_labels)
        views = self.sanm(tap, images, targets, quality)
        # Every row once, or twice where the unmasked images are kept.
        rows = torch.arange(len(views.images), device=images.device) % len(images)
        given = views.targets if self.sanm.labels else labels[rows]
        tap.forget()
        out = step(_rebuilt(batch, views.images, given, rows), *args, **kwargs)
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
            with without_trace(tap, images):
                logits = tap.forward_head(tap.forward_features(images))
            tap.forget()
        self.sanm.label_quality.observe(views.unmasked(logits), targets, index)  # type: ignore[arg-type]
        term = self.sanm.reconstruction(features, images)
        return {**out, "loss": out["loss"] + term} if isinstance(out, Mapping) else out + term

    # Once per epoch, and figures

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Refresh label quality once per epoch; lazily, since an epoch that is resumed has no start hook."""
        if self.sanm.enabled and self._refreshed != trainer.current_epoch:
            if self._refreshed >= 0:
                self.sanm.label_quality.refresh()
            self._refreshed = trainer.current_epoch

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log mean quality, hidden share, L_c and L_r of the step."""
        if not self.sanm.enabled:
            return
        figures = dict(self.sanm.last)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):  # Lightning has divided it by the number of accumulated batches
            loss = loss.detach() * trainer.accumulate_grad_batches
            figures["classification_loss"] = loss - self.sanm.beta * figures.get("reconstruction_loss", 0.0)
        for name, value in figures.items():
            pl_module.log(f"train/{name}", value, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the last epoch's evidence in, so that the final quality speaks of the final network.

        Here and not at the end of training, which a run that is resumed from its last checkpoint does not have.
        """
        if self.sanm.enabled:
            self.sanm.label_quality.refresh()

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch of the last refresh and, for a module that does not hold SANM itself, SANM's state."""
        state: dict[str, Any] = {"refreshed": self._refreshed}
        if self._joined:
            state["sanm"] = self.sanm.state_dict()
            self._complete(state["sanm"], "")
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state."""
        self._refreshed = state_dict["refreshed"]
        if "sanm" in state_dict:
            self.sanm.load_state_dict(state_dict["sanm"])

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the evidence of all ranks into the state dict of a module that holds SANM itself. Every rank calls it."""
        for name, module in pl_module.named_modules():
            if module is self.sanm:
                self._complete(checkpoint["state_dict"], name + ".")

    def _complete(self, state: dict[str, Any], prefix: str) -> None:
        key = prefix + "label_quality.bank._extra_state"
        if key in state:
            state[key] = self.sanm.label_quality.bank.complete_state()


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


# Batches


def _images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, Sequence) and len(batch) >= 2 and all(isinstance(part, Tensor) for part in batch[:2]):
        return batch[0], batch[1]
    raise MisconfigurationException(
        f"SANM expected batches (images, labels, ...) of tensors, got {type(batch).__name__}; call SANM in the step yourself "
        "for batches of another shape"
    )


def _tensor_or_none(batch: Any, name: str) -> Tensor | None:
    part = getattr(batch, name, None)  # every list and tuple has a method called index
    return part if isinstance(part, Tensor) else None


def _probabilities(labels: Tensor, num_classes: int) -> Tensor:
    """Labels (B,) of indices or (B, C) of probabilities -> (B, C), floating."""
    if labels.ndim == 2 and labels.is_floating_point():
        return labels
    if labels.ndim == 1 and not labels.is_floating_point():
        return F.one_hot(labels.long(), num_classes).float()
    raise MisconfigurationException(
        "SANM expected labels (B,) of class indices or (B, C) of class probabilities, got "
        f"{tuple(labels.shape)} of {labels.dtype}"
    )


def _rebuilt(batch: Any, images: Tensor, labels: Tensor, rows: Tensor) -> Any:
    """Return a new batch of the same kind with other images and labels, and the asked rows of what else is per sample."""
    size = len(batch[0])
    rest = [part[rows] if isinstance(part, Tensor) and part.ndim and len(part) == size else part for part in batch[2:]]
    parts = [images, labels, *rest]
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)


def _size_of_a_batch(trainer: L.Trainer) -> Sequence[int]:
    try:
        with _own_streams():  # a shuffled loader draws its seed from the global stream, and a data set may draw, too
            batch = next(iter(trainer.fit_loop._data_source.dataloader()))
    except Exception as error:
        raise MisconfigurationException(
            f"SANM must know the size of the images before training, and no batch can be had yet ({type(error).__name__}: "
            f"{error}); pass image_size="
        ) from error
    size: Sequence[int] = _images_and_labels(batch)[0].shape[-2:]
    return size


def _shadow(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Put ``value`` before a method of one object; the answer takes it away again."""
    before = owner.__dict__.get(name)
    setattr(owner, name, value)
    return lambda: owner.__dict__.pop(name) and None if before is None else setattr(owner, name, before)


@contextlib.contextmanager
def _own_streams() -> Iterator[None]:
    streams = isolate_rng()
    streams.__enter__()
    try:
        yield
    finally:  # which isolate_rng lacks
        streams.__exit__(None, None, None)


# Does a step read its labels as indices?


class _QuietTrainer:
    """A trainer for a rehearsal: it answers as the real one, and what is written to it or its loggers is lost."""

    def __init__(self, trainer: Any) -> None:
        self._real = trainer
        self.logger = DummyLogger()
        self.loggers = [self.logger]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _misread_labels(
    pl_module: L.LightningModule, tap: FeatureTap, step: Any, batch: Any, args: Any, kwargs: Any
) -> str | None:
    """Say what goes wrong in a step that gets one-hot rows in place of class indices; None if nothing is seen to.

    The step is rehearsed on copies of the module, with the labels that the network predicts (so that no accuracy is zero by
    chance) and a batch size that is neither 1 nor the number of classes (so that a broadcast fails aloud). What it logs, and
    what its metrics count, must be the same with indices and with rows. Figures that change with the loss (cross-entropy with
    class weights normalises rows in another way), or from one rehearsal to the next (times), say nothing.
    """
    images, labels = _images_and_labels(batch)
    if labels.ndim != 1 or getattr(step, "__self__", None) is not pl_module:
        return None
    size = max(2, len(images))
    rows = torch.arange(size + (size == tap.num_classes), device=images.device) % len(images)

    def rehearse(given: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        twin, twin_tap = copy.deepcopy((pl_module, tap))  # without a trainer: a module's copy has none
        twin._trainer = _QuietTrainer(pl_module._trainer)
        twin_tap.forget()
        figures = _listen_to(twin)
        out = types.MethodType(step.__func__, twin)(_rebuilt(batch, images[rows], given, rows), *args, **kwargs)
        for name, metric in _metrics(twin):
            if metric.update_called:
                _note(figures, name, metric.compute())
        _note(figures, "loss", out.get("loss") if isinstance(out, Mapping) else out)
        return figures, twin_tap.logits

    def quietly(given: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        device = images.device.type
        autocast = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False
        )
        with _own_streams(), warnings.catch_warnings(), torch.no_grad(), autocast:
            warnings.simplefilter("ignore")
            return rehearse(given)

    try:
        _, logits = quietly(labels[rows])
        predicted = logits.argmax(1) if logits is not None and logits.shape[:1] == rows.shape else labels[rows]
        plain, again = quietly(predicted)[0], quietly(predicted)[0]
    except Exception:  # plain labels fail as well, or the module cannot be copied: training itself will say
        return None
    try:
        soft = quietly(F.one_hot(predicted, tap.num_classes).float())[0]
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    loss_change = soft["loss"] / plain["loss"] if {"loss"} <= plain.keys() & soft.keys() else torch.ones(1)
    for name in plain.keys() & again.keys() & soft.keys():
        before, after = plain[name], soft[name]
        if _close(before, again[name]) and not _close(before, after) and not _close(before * loss_change, after):
            return f"{name} is {_shown(after)} in place of {_shown(before)}"
    return None


def _listen_to(twin: Any) -> dict[str, Tensor]:
    """Make a copied module forget its metrics, and write what it logs to a dictionary."""
    figures: dict[str, Tensor] = {}

    def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        _note(figures, name, value)

    def log_dict(dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        for name, value in dictionary.items():
            _note(figures, name, value)

    twin.log, twin.log_dict = log, log_dict
    for _, metric in _metrics(twin):
        metric.sync_on_compute = metric._to_sync = metric.dist_sync_on_step = False
        metric.reset()
    return figures


def _metrics(module: nn.Module) -> list[tuple[str, Metric]]:
    return [(name, child) for name, child in module.named_modules() if isinstance(child, Metric)]


def _note(figures: dict[str, Tensor], name: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, part in value.items():
            _note(figures, f"{name}.{key}", part)
    elif isinstance(value, (Tensor, int, float)):
        figures[name] = torch.as_tensor(value).detach().to("cpu", torch.float64).flatten()


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=5e-3, atol=1e-4, equal_nan=True)


def _shown(value: Tensor) -> str:
    return f"{float(value):.4g}" if value.numel() == 1 else str([round(float(part), 4) for part in value[:4]])
