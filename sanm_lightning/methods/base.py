"""What every method shares: one or two networks, SANM, the step that learns from a batch, metrics, an optimizer."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.callbacks import CompileNetworks, EpochStart, ExactResume, FiniteLoss, Stages
from sanm_lightning.callbacks.exact_resume import require_same_method
from sanm_lightning.callbacks.stages import reset_parameters
from sanm_lightning.compat import batch_number
from sanm_lightning.functional import Mixed
from sanm_lightning.methods.checks import check_arguments
from sanm_lightning.methods.evaluation import EvaluationSteps
from sanm_lightning.methods.learned import Learned
from sanm_lightning.methods.optimization import Optimization, sgd
from sanm_lightning.methods.passes import Quantity, predict_split
from sanm_lightning.methods.reset import reset_networks
from sanm_lightning.models import create_network
from sanm_lightning.random_streams import named_generator, named_seed, process_rank
from sanm_lightning.sanm.inference import inference_context
from sanm_lightning.sanm.mixin import SANMMixin
from sanm_lightning.sanm.module import SANM
from sanm_lightning.sanm.views import Quality

__all__ = ["NoisyLabelModule", "sgd"]


class NoisyLabelModule(SANMMixin, Optimization, EvaluationSteps):
    """Base class of the methods. A method is one file with one class and one ``training_step``, which calls :meth:`learn`.

    Batches are :class:`NoisyBatch`, or any usual form that :meth:`NoisyBatch.from_any` reads.

    Args:
        num_classes: C; taken from the data module on the command line.
        image_size: H, W of the images in pixels; likewise.
        network: timm model name, or a network by timm's conventions that takes images in [0, 1].
        network_args: options of that timm model, as ``{width: 16}`` or ``{pretrained: true}``.
        mean: channel means that the network normalizes with; None takes the pre-trained ones, those of the data, or .5.
        std: channel standard deviations, likewise, or .25.
        sanm: SANM laid over the method; None is the plain published method.
        warmup_epochs: length of the method's first stage, where it has a warm-up, and epochs before SANM's first mask.
        optimizer: makes the optimizer from the parameters.
        scheduler: makes the learning-rate schedule; one that takes ``total_steps`` gets them from the trainer and is stepped
            per batch, any other is stepped per epoch. None keeps the rate constant.
        compile_network: run the networks through ``torch.compile`` while a trainer uses the module: true, or the name of a
            backend. Weights, checkpoints and exports are those of the plain network.

    A checkpoint holds all of these but a network given as a module, the optimizer and the scheduler (those of the command line
    are saved): ``load_from_checkpoint`` needs them only to go on training. With two networks, both learn in one step from the
    sum of their losses, under one optimizer, which takes the steps that two would. A network that is given as a module is
    copied for the second one, and its parameters are drawn anew.

    Raises:
        ValueError: if an argument is out of its range, or the network cannot serve SANM.
    """

    wraps_training_step = False

    def __init__(
        self,
        num_classes: int,
        image_size: tuple[int, int] | None = (32, 32),
        network: str | nn.Module = "preact_resnet18",
        network_args: dict[str, Any] | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        sanm: SANM | None = None,
        warmup_epochs: int = 10,
        optimizer: OptimizerCallable = sgd,
        scheduler: LRSchedulerCallable | None = None,
        compile_network: bool | str = False,
    ) -> None:
        backend = "inductor" if compile_network is True else compile_network or None
        check_arguments(num_classes, image_size, network, warmup_epochs, backend)
        super().__init__(sanm=SANM.off() if sanm is None else sanm)
        live = ["optimizer", "scheduler", *([] if isinstance(network, str) else ["network"])]
        self.save_hyperparameters(ignore=live)  # what is left is plain Python, so that a checkpoint opens safely
        assert image_size is not None
        self.num_classes, self.image_size = num_classes, (int(image_size[0]), int(image_size[1]))
        self.warmup_epochs, self.optimizer, self.scheduler = warmup_epochs, optimizer, scheduler
        self.compile_backend: str | None = backend
        self._create: Callable[[], Any] | None = None
        if isinstance(network, str):
            options = network_args or {}
            self._create = lambda: create_network(network, num_classes, mean, std, **options)
            self.network: Any = self._create()
            if options.get(
                "pretrained"
            ):  # a checkpoint holds the weights: loading it must not fetch the first ones again
                used = {name: tuple(getattr(self.network, name).flatten().tolist()) for name in ("mean", "std")}
                self.hparams.update(network_args={**options, "pretrained": False}, **used)
        else:
            self.network = network
        if self.num_networks == 2:
            self.sanm2 = self.sanm.peer_copy(named_seed("peer", self.sanm.seed))
        self.sanm.build(self.network, self.image_size)
        if self.num_networks == 2:
            given: Any = network
            self.network2: Any = self._create() if self._create else copy.deepcopy(given).apply(reset_parameters)
            self.sanm2.build(self.network2, self.image_size)
        self.accuracy = nn.ModuleDict()

    def stream(self, kind: str, *parts: int, device: torch.device | str = "cpu") -> torch.Generator:
        """Return a generator for the present step: a function of seed, process, epoch and step, so that resume is exact."""
        step = -1 if self._trainer is None else batch_number(self.trainer)
        return named_generator(kind, self.sanm.seed, process_rank(), self.current_epoch, step, *parts, device=device)

    def learn(
        self,
        batch: NoisyBatch,
        targets: Tensor,
        network: int = 0,
        quality: Tensor | None = None,
        features: Tensor | None = None,
        mix: Callable[[Tensor, Tensor], Mixed] | None = None,
        extra: tuple[Tensor, Tensor] | None = None,
    ) -> Learned:
        """Run a network on the batch: masked and with regularized targets under SANM, mixed if asked for.

        Source: Algorithm 1 of SANM, steps 3 to 10. Evidence of the unmasked images is recorded for SANM's label quality.

        Args:
            batch: B samples, whose ``images`` are learned from.
            targets: class probabilities, shape (B, C).
            network: number of the network.
            quality: the method's own estimate of label quality, shape (B,), in [0, 1]; one that the user chose counts instead.
            features: of the unmasked images, shape (B, D, h, w), where the method has them.
            mix: mixes (images, targets), such as :func:`~sanm_lightning.functional.mixup`. The decoder then gets a forward of
                its own on the unmixed views.
            extra: further images (k B, 3, H, W) and targets that are never masked; they come first.
        """
        net, sanm, judge = self.networks[network], self.sanms[network], self.sanms[network - 1]
        known = self._quality(judge, batch, targets, quality)
        generator = self.stream("mask", network, device=batch.images.device)
        views = sanm(net, batch.images, targets, known, features, generator)
        images, wanted, clean = views.images, views.targets, views.logits
        evidence = sanm.enabled and (not self.estimates_quality or sanm.quality == "given")
        unmixed = mix is None and extra is None
        if evidence and clean is None and not unmixed and sanm.label_quality.needs_evidence:
            with inference_context(net, batch.images, sanm.batch_statistics):
                clean = net(batch.images)
        if extra is not None:
            images, wanted = torch.cat([extra[0], images]), torch.cat([extra[1], wanted])
        mixed = Mixed(images, wanted, 1.0, torch.arange(0)) if mix is None else mix(images, wanted)
        maps = net.forward_features(mixed.images)
        logits = net.forward_head(maps)
        clean = views.unmasked(logits) if unmixed else clean
        if evidence and clean is not None:
            sanm.label_quality.update(clean, targets, batch.index, views.features)
        if not unmixed and views.masked and sanm.reconstruct:  # the decoder sees the masked views alone, unmixed
            maps = net.forward_features(views.images)
        return Learned(logits, mixed.targets, clean, maps, sanm.reconstruction(maps, batch.images, views), mixed)

    def _quality(self, judge: SANM, batch: NoisyBatch, targets: Tensor, estimate: Tensor | None) -> Quality:
        """Return label quality as SANM takes it; None before the first mask."""
        if not self.sanm.masking(self.current_epoch, self.warmup_epochs):
            return None
        if self.estimates_quality and (estimate is None or judge.prefers_method_quality):
            return estimate  # None in the method's own warm-up, where nothing is masked
        return judge.source_of_quality(targets, batch.index, batch.true_labels)

    def predict_train(self, *quantities: Quantity, network: int | None = 0, view: str = "none") -> dict[str, Tensor]:
        """Pass over the training set once; see :func:`~sanm_lightning.methods.passes.predict_split`. A collective."""
        return predict_split(self, "train", quantities, network, view)

    def predict_val(self, *quantities: Quantity, network: int | None = 0, view: str = "none") -> dict[str, Tensor]:
        """Pass over the validation split, likewise."""
        return predict_split(self, "val", quantities, network, view)

    def reset(self, head_only: bool = False) -> list[nn.Parameter]:
        """Draw the networks anew in place, or their classifiers; with decoders and averaged copies. Return what was drawn."""
        return reset_networks(self, self._create, head_only)

    def prepare_epoch(self) -> None:
        """Begin the present epoch, unless it has begun; the loader calls it before its first batch. A collective."""
        trainer: Any = self.trainer
        for callback in trainer.callbacks:
            if isinstance(callback, EpochStart):
                callback.prepare(trainer, self)

    def _own_callbacks(self) -> list[Any]:
        stages = Stages()
        compiled = [CompileNetworks(self.compile_backend)] if self.compile_backend else []
        return [EpochStart(stages), *super()._own_callbacks(), stages, ExactResume(), FiniteLoss(), *compiled]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another method or other classes, in a sentence; take over the names of the classes."""
        require_same_method(self, checkpoint)
        self.class_names = checkpoint.get("class_names")

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take over weights and per-sample state.

        Raises:
            ValueError: if they are not those of such a method and network.
        """
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except RuntimeError as error:
            reasons = [line.strip() for line in str(error).splitlines()[1:] if line.strip()] or [str(error)]
            more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
            raise ValueError(
                f"expected the weights of {type(self).__name__} as it is built here, got others: {reasons[0][:200]}{more}; "
                "give the method, the network and SANM that the checkpoint was made with"
            ) from error
