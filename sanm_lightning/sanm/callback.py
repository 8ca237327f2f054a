"""SANM over a module that nobody has to edit: the step is wrapped, its mathematics stays in :class:`SANM`."""

import copy
import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F

from sanm_lightning.sanm.module import SANM

__all__ = ["FeatureTap", "SANMCallback"]

USUAL_NAMES = ("network", "model", "net", "backbone", "encoder", "classifier")
KEY = "_sanm"


class FeatureTap:
    """Any convolutional classifier, seen by timm's conventions, that remembers the features of its last forward.

    A timm model is used as it is. Of another network (torchvision's, one's own) the map that enters the global pooling is
    taken, or the output of a named layer; then ``forward_features`` runs the whole network and keeps the logits for
    ``forward_head``.

    Args:
        network: the classifier, images (B, 3, H, W) -> logits (B, C).
        layer: name of the submodule whose output is the last feature map; None finds it.

    Raises:
        ValueError: if no feature map or no linear classifier can be found.
    """

    def __init__(self, network: nn.Module, layer: str | None = None) -> None:
        self.network = network
        self.features: Tensor | None = None
        self.logits: Tensor | None = None
        self._undo: list[Callable[[], None]] = []
        self._timm = layer is None and all(
            hasattr(network, name) for name in ("forward_features", "forward_head", "get_classifier", "num_features")
        )
        if not self._timm:
            self._classifier = self._last_linear(network)
            self.num_features = self._classifier.in_features
        else:
            self.num_features = int(network.num_features)  # type: ignore[arg-type]
        self._hook(layer)

    @staticmethod
    def _last_linear(network: nn.Module) -> nn.Linear:
        linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise ValueError(
                f"{type(network).__name__} has no linear classifier for a class activation map; name the right submodule "
                "with network="
            )
        return linear[-1]

    def _hook(self, layer: str | None) -> None:
        network = self.network
        if self._timm:
            plain = network.forward_features
            had = "forward_features" in network.__dict__

            @functools.wraps(plain)  # type: ignore[arg-type]
            def forward_features(*args: Any, **kwargs: Any) -> Tensor:
                self.features = plain(*args, **kwargs)  # type: ignore[operator]
                assert self.features is not None
                return self.features

            network.forward_features = forward_features  # type: ignore[assignment]
            self._undo.append(
                lambda: setattr(network, "forward_features", plain) if had else delattr(network, "forward_features")
            )
        elif layer is not None:
            self._undo.append(network.get_submodule(layer).register_forward_hook(self._see_output).remove)
        else:
            pools = [m for m in network.modules() if isinstance(m, (nn.AdaptiveAvgPool2d, nn.AvgPool2d))]
            if not pools:
                raise ValueError(
                    f"{type(network).__name__} has no average pooling to take a feature map from; name the layer whose "
                    "output is the last feature map with layer="
                )
            self._undo.append(pools[-1].register_forward_pre_hook(self._see_input).remove)
        self._undo.append(network.register_forward_hook(self._see_logits).remove)

    def _see_output(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.features = output

    def _see_input(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.features = inputs[0]

    def _see_logits(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.logits = output

    def modules(self) -> Any:
        """Modules of the network, so that a pass over it can leave no trace."""
        return self.network.modules()

    def parameters(self) -> Any:
        """Parameters of the network."""
        return self.network.parameters()

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> feature map (B, D, h, w)."""
        if self._timm:
            features: Tensor = self.network.forward_features(images)  # type: ignore[operator]
            return features
        self.network(images)
        assert self.features is not None
        return self.features

    def forward_head(self, features: Tensor) -> Tensor:
        """Feature map (B, D, h, w) -> logits (B, C)."""
        if self._timm:
            logits: Tensor = self.network.forward_head(features)  # type: ignore[operator]
            return logits
        assert self.logits is not None
        return self.logits

    def get_classifier(self) -> nn.Module:
        """Return the linear classifier."""
        if self._timm:
            classifier: nn.Module = self.network.get_classifier()  # type: ignore[operator]
            return classifier
        return self._classifier

    def remove(self) -> None:
        """Take every hook off again."""
        while self._undo:
            self._undo.pop()()


class SANMCallback(L.Callback):
    """Lay SANM over a module with an ordinary ``training_step`` on ``(x, y)`` batches, without editing it.

    The step receives masked images and regularised labels as class probabilities (B, C), and its loss gets the
    reconstruction term. The loss must accept probabilities, as ``F.cross_entropy`` does; a step that reads ``y`` as class
    indices is found before the first update, and ``SANM(labels=False)`` leaves ``y`` as it is. Label quality comes from
    the sample's index where the batch has one (``batch.index``), else from a window of recent losses.

    Works with modules of ``lightning`` and of ``pytorch_lightning``, with any optimizer and scheduler: the decoder joins the
    first parameter group. The decoder is kept in the callback's own state, so the module's state dict stays the user's.

    Args:
        sanm: hyper-parameters and parts; None means ``SANM()``.
        network: name of the submodule that classifies; None tries the usual names (network, model, net, backbone, encoder,
            classifier), then the module itself.
        layer: name of that network's submodule whose output is the last feature map; None finds it.
        image_size: H, W of the training images; None asks the data module, then looks at a batch.
        warmup_epochs: epochs before the first mask, unless ``sanm`` has a number of its own.
        wrap: False leaves the step alone (for methods that call SANM themselves) and keeps the rest: label quality is
            refreshed once per epoch, figures are logged.

    Raises:
        MisconfigurationException: before training, if the module cannot be served; the sentence says why.
    """

    def __init__(
        self,
        sanm: SANM | None = None,
        network: str | None = None,
        layer: str | None = None,
        image_size: tuple[int, int] | None = None,
        warmup_epochs: int = 1,
        wrap: bool = True,
    ) -> None:
        self.sanm = SANM() if sanm is None else sanm
        self.network, self.layer, self.image_size = network, layer, image_size
        self.warmup_epochs, self.wrap = warmup_epochs, wrap
        self.tap: FeatureTap | None = None
        self._refreshed = -1
        self._joined = False
        self._undo: list[Callable[[], None]] = []

    # Set-up and clean-up

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Wrap the step and size the decoder, before DDP and the optimizers are made."""
        if stage != "fit":
            return
        data = getattr(trainer, "datamodule", None)
        num_samples = getattr(data, "num_samples", None)
        if isinstance(num_samples, int):
            self.sanm.label_quality.resize(num_samples)
        if not self.wrap or not self.sanm.enabled:
            return
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"SANM wraps training steps of automatic optimization, and {type(pl_module).__name__} optimizes by hand; call "
                "SANM in the step yourself (see SANM's two calls)"
            )
        self.tap = FeatureTap(self._find_network(pl_module), self.layer)
        self._undo.append(self.tap.remove)
        if not any(module is self.sanm for module in pl_module.modules()):
            self._join(pl_module)
        size = self.image_size or getattr(data, "image_size", None) or self._size_of_a_batch(trainer)
        self.sanm.to(next(pl_module.parameters()).device)
        self.sanm.build(self.tap, (int(size[0]), int(size[1])))
        self._wrap_step(pl_module)

    def _find_network(self, pl_module: L.LightningModule) -> nn.Module:
        if self.network is not None:
            try:
                return pl_module.get_submodule(self.network)
            except AttributeError:
                names = ", ".join(name for name, _ in pl_module.named_children()) or "none"
                raise MisconfigurationException(
                    f"{type(pl_module).__name__} has no submodule {self.network!r}; it has: {names}"
                ) from None
        for name in USUAL_NAMES:
            found = getattr(pl_module, name, None)
            if isinstance(found, nn.Module):
                return found
        return pl_module

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
            lambda: pl_module._modules.pop(KEY) and None,
            pl_module.register_state_dict_post_hook(hide).remove,
            pl_module.register_load_state_dict_post_hook(forgive).remove,
        ]

    def _size_of_a_batch(self, trainer: L.Trainer) -> Sequence[int]:
        with torch.random.fork_rng(devices=[]):  # a shuffled loader draws its seed from the global stream
            batch = next(iter(trainer.fit_loop._data_source.dataloader()))
        return tuple(_images_and_labels(batch)[0].shape[-2:])

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the optimizer train the decoder too, before its state is restored.

        The first group is extended: a group of its own would break schedulers that counted the groups already.
        """
        if not self.sanm.enabled:
            return
        known = {id(p) for opt in trainer.optimizers for group in opt.param_groups for p in group["params"]}
        missing = [p for p in self.sanm.parameters() if p.requires_grad and id(p) not in known]
        if missing and trainer.optimizers:
            trainer.optimizers[0].param_groups[0]["params"].extend(missing)

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

    def _wrap_step(self, pl_module: L.LightningModule) -> None:
        step = pl_module.training_step
        had = "training_step" in pl_module.__dict__
        probed = False

        @functools.wraps(step)  # Lightning inspects the signature
        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal probed
            if not probed and self.sanm.labels:
                self._refuse_index_labels(pl_module, step, batch, args, kwargs)
            probed = True
            return self._masked_step(pl_module, step, batch, args, kwargs)

        training_step.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]
        pl_module.training_step = training_step  # type: ignore[method-assign]
        self._undo.append(
            lambda: setattr(pl_module, "training_step", step) if had else pl_module.__dict__.pop("training_step") and None
        )

    def _masked_step(
        self, pl_module: L.LightningModule, step: Callable[..., Any], batch: Any, args: Any, kwargs: Any
    ) -> Any:
        assert self.tap is not None
        images, labels = _images_and_labels(batch)
        index = getattr(batch, "index", None)
        targets = self._probabilities(labels)
        masking = self.sanm.masking(pl_module.current_epoch, self.warmup_epochs)
        true_labels = getattr(batch, "true_labels", None)
        quality = self.sanm.source_of_quality(targets, index, true_labels) if masking else None
        views = self.sanm(self.tap, images, targets, quality)
        self.tap.features = self.tap.logits = None
        given = labels if not self.sanm.labels else views.targets
        if not self.sanm.labels and self.sanm.keep_unmasked and masking:
            given = torch.cat([labels, labels])
        out = step(_replace(batch, views.images, given), *args, **kwargs)
        if out is None:
            return None
        features, logits = self.tap.features, self.tap.logits
        if features is None:
            raise MisconfigurationException(
                f"the training step of {type(pl_module).__name__} did not run the network that SANM looks at "
                f"({type(self.tap.network).__name__}); name the right submodule with network="
            )
        if views.logits is None and logits is None:
            with torch.no_grad():
                logits = self.tap.forward_head(features)
        self.sanm.label_quality.observe(views.unmasked(logits), targets, index)  # type: ignore[arg-type]
        term = self.sanm.reconstruction(features, images)
        if isinstance(out, Mapping):
            return {**out, "loss": out["loss"] + term}
        return out + term

    def _probabilities(self, labels: Tensor) -> Tensor:
        if labels.ndim == 2 and labels.is_floating_point():
            return labels
        if labels.ndim != 1 or labels.is_floating_point():
            raise MisconfigurationException(
                f"SANM expected labels (B,) of class indices or (B, C) of probabilities, got {tuple(labels.shape)} of "
                f"{labels.dtype}"
            )
        assert self.tap is not None
        classes = len(self.tap.get_classifier().weight)  # type: ignore[arg-type]
        return F.one_hot(labels, classes).float()

    def _refuse_index_labels(
        self, pl_module: L.LightningModule, step: Callable[..., Any], batch: Any, args: Any, kwargs: Any
    ) -> None:
        """Run the step on a few samples with labels as indices and as one-hot rows: what it returns and logs must agree.

        On a copy of the module, so nothing remains. The labels are the ones that the network predicts, so that an accuracy
        is not zero by chance; their number differs from that of the classes, so that a broadcast fails aloud.
        """
        assert self.tap is not None
        images, labels = _images_and_labels(batch)
        if labels.ndim != 1 or not inspect.ismethod(step):
            return
        classes = len(self.tap.get_classifier().weight)  # type: ignore[arg-type]
        rows = torch.arange(3 if classes == 2 else 2, device=images.device) % len(images)
        few = images[rows]
        with torch.no_grad():
            features = self.tap.forward_features(few)
            predicted = self.tap.forward_head(features).argmax(1)
        self.tap.features = self.tap.logits = None
        wrong = [name for name in _disagreement(pl_module, step, batch, few, predicted, classes, args, kwargs)]
        if wrong:
            raise MisconfigurationException(
                f"the training step of {type(pl_module).__name__} reads its labels as class indices ({wrong[0]} with labels as "
                "probabilities), and SANM hands it class probabilities (B, C); use y.argmax(1) for such figures, or "
                "SANM(labels=False), which leaves the labels as they are"
            )

    # Once per epoch, and figures

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Refresh label quality once per epoch; lazily, since an epoch that is resumed has no start hook."""
        if self.sanm.enabled and self._refreshed != trainer.current_epoch:
            if self._refreshed >= 0:
                self.sanm.label_quality.refresh()
            self._refreshed = trainer.current_epoch

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log mean quality, hidden share, L_c and L_r of the step."""
        figures = {f"train/{name}": value for name, value in self.sanm.last.items()}
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and self.sanm.enabled:
            term = self.sanm.last.get("reconstruction_loss", torch.zeros((), device=loss.device))
            figures["train/classification_loss"] = loss.detach() * trainer.accumulate_grad_batches - self.sanm.beta * term
        for name, value in figures.items():
            pl_module.log(name, value, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the last epoch's evidence in, so that the final quality speaks of the final network."""
        if self.sanm.enabled:
            self.sanm.label_quality.refresh()

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch of the last refresh and, for a module that does not hold SANM itself, SANM's state."""
        state: dict[str, Any] = {"refreshed": self._refreshed}
        if self._joined:
            state["sanm"] = self.sanm.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state."""
        self._refreshed = state_dict["refreshed"]
        if "sanm" in state_dict:
            self.sanm.load_state_dict(state_dict["sanm"])


def _images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, Sequence) and len(batch) >= 2 and all(isinstance(part, Tensor) for part in batch[:2]):
        return batch[0], batch[1]
    raise MisconfigurationException(
        f"SANM expected batches (images, labels, ...) of tensors, got {type(batch).__name__}; call SANM in the step yourself "
        "for batches of another shape"
    )


def _replace(batch: Any, images: Tensor, labels: Tensor) -> Any:
    """Return a new batch of the same kind with other images and labels."""
    if hasattr(batch, "_replace"):  # a named tuple
        fields = batch._fields
        return batch._replace(**{fields[0]: images, fields[1]: labels})
    return type(batch)([images, labels, *batch[2:]])


def _disagreement(
    pl_module: L.LightningModule,
    step: Any,
    batch: Any,
    images: Tensor,
    labels: Tensor,
    classes: int,
    args: Any,
    kwargs: Any,
) -> list[str]:
    """Names of what differs between index labels and one-hot labels; empty if nothing does or nothing can be said."""
    results: list[dict[str, float]] = []
    for given in (labels, F.one_hot(labels, classes).float()):
        trainer = pl_module._trainer
        clone = copy.deepcopy(pl_module, {id(trainer): trainer})
        seen: dict[str, float] = {}

        def note(name: str, value: Any, *_: Any, seen: dict[str, float] = seen, **__: Any) -> None:
            value = value.compute() if hasattr(value, "compute") else value
            seen[str(name)] = float(value)

        def note_all(values: Mapping[str, Any], *_: Any, note: Any = note, **__: Any) -> None:
            for name, value in values.items():
                note(name, value)

        clone.log, clone.log_dict = note, note_all  # type: ignore[method-assign,assignment]
        generator_state = torch.get_rng_state()
        try:
            with torch.no_grad(), torch.random.fork_rng([images.device] if images.device.type == "cuda" else []):
                torch.set_rng_state(generator_state)
                out = types.MethodType(step.__func__, clone)(_replace(batch, images, given), *args, **kwargs)
        except Exception as error:  # whatever the user's step raises is the finding
            if not results:
                return []  # it fails with plain labels too: not our business, training will say so
            return [f"{type(error).__name__}: {error}"]
        loss = out.get("loss") if isinstance(out, Mapping) else out
        if loss is not None:
            seen["loss"] = float(loss)
        results.append(seen)
    plain, soft = results
    return [
        f"{name} is {soft.get(name, float('nan')):.4g} in place of {value:.4g}"
        for name, value in plain.items()
        if not abs(soft.get(name, float("nan")) - value) <= 1e-3 * max(1.0, abs(value))
    ]
