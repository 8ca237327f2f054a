"""What every method shares: one or two networks, SANM, the step that learns from a batch, metrics, an optimizer."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from sanm_lightning.batch import EpochPlan, NoisyBatch, View
from sanm_lightning.callbacks import CompileNetworks, EpochStart, ExactResume, FiniteLoss, Stage, Stages
from sanm_lightning.callbacks.exact_resume import require_same_method
from sanm_lightning.callbacks.stages import locate, reset_parameters
from sanm_lightning.compat import batch_number
from sanm_lightning.functional import Mixed
from sanm_lightning.methods.evaluation import EvaluationSteps
from sanm_lightning.methods.learned import Learned
from sanm_lightning.methods.passes import Quantity, predict_split
from sanm_lightning.methods.schedules import takes_total_steps
from sanm_lightning.models import create_network
from sanm_lightning.random_streams import named_generator, named_seed, process_rank
from sanm_lightning.sanm.inference import inference_context
from sanm_lightning.sanm.mixin import SANMMixin
from sanm_lightning.sanm.module import SANM, Quality

__all__ = ["NoisyLabelModule", "sgd"]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Return the field's usual optimizer: SGD, learning rate .02, momentum .9, weight decay 5e-4."""
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=5e-4)


class NoisyLabelModule(SANMMixin, EvaluationSteps):
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
    num_networks = 1
    """1 or 2. Two networks mask with each other's estimate of label quality."""
    needs_data_module = False
    """True in a method that chooses its samples or views, or passes over the training set."""
    estimates_quality = False
    """True in a method that judges labels itself, by :meth:`label_quality`."""

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
        _check_arguments(num_classes, image_size, network, warmup_epochs, backend)
        super().__init__(sanm=SANM.off() if sanm is None else sanm)
        live = ["optimizer", "scheduler", *([] if isinstance(network, str) else ["network"])]
        self.save_hyperparameters(ignore=live)  # what is left is plain Python, so that a checkpoint opens safely
        assert image_size is not None
        self.num_classes, self.image_size = num_classes, (int(image_size[0]), int(image_size[1]))
        self.warmup_epochs, self.optimizer, self.scheduler = warmup_epochs, optimizer, scheduler
        self.compile_backend: str | None = backend
        self.schedule_steps: int | None = None
        """Length of a learning-rate schedule that follows the trainer's, in steps."""
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

    @property
    def networks(self) -> list[Any]:
        """All networks in training."""
        return [getattr(self, name) for name in ("network", "network2")[: self.num_networks]]

    @property
    def sanms(self) -> list[SANM]:
        """The SANM of each network."""
        return [getattr(self, name) for name in ("sanm", "sanm2")[: self.num_networks]]

    # What a method says of itself

    def stages(self) -> list[Stage]:
        """Return the stages of the training, in order."""
        return [Stage("train")]

    def views(self) -> tuple[View, ...]:
        """Return the policies of the views of the present stage; ``batch.views`` holds the views in this order."""
        return ("weak",)

    def epoch_batches(self, plan: EpochPlan) -> Tensor | None:
        """Choose the samples of every step of this process in the present epoch.

        Returns:
            Positions in the training set, shape (S, B), with S = ``plan.steps``; duplicates are allowed. None takes the
            loader's own batches. A function of the epoch, the seed and what is saved: a run that is resumed in mid-epoch
            asks again.
        """
        return None

    def begin_epoch(self) -> None:
        """Do what the method does once per epoch, before its first batch is fetched; not again in a resumed epoch."""

    def check_training_set(self, num_samples: int, batch_size: int, world_size: int) -> None:
        """Raise ValueError for a training set that the method cannot learn from."""

    def label_quality(self) -> Tensor | None:
        """Return the method's own estimate for each given label, (N,) in [0, 1], 1 = right; None where it has none."""
        return None

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> logits (B, C); of two networks the mean."""
        logits: list[Tensor] = [network(images) for network in self.networks]
        return logits[0] if len(logits) == 1 else (logits[0] + logits[1]) / 2

    # What a method calls

    @property
    def stage(self) -> Stage:
        """The stage of the present epoch."""
        return locate(self.stages(), self.current_epoch)[1]

    def one_hot(self, labels: Tensor) -> Tensor:
        """Labels (B,) -> targets (B, C), float32."""
        return F.one_hot(labels, self.num_classes).float()

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
        evidence = sanm.enabled and not (self.estimates_quality and sanm.prefers_method_quality)
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
        if mix is not None and views.masked and sanm.reconstruct:  # what was mixed cannot be reconstructed
            maps = net.forward_features(views.images)
        return Learned(logits, mixed.targets, clean, maps, sanm.reconstruction(maps, batch.images, views), mixed)

    def _quality(self, judge: SANM, batch: NoisyBatch, targets: Tensor, estimate: Tensor | None) -> Quality:
        """Return label quality as SANM takes it; None before the first mask."""
        if not self.sanm.masking(self.current_epoch, self.warmup_epochs):
            return None
        if self.estimates_quality and judge.prefers_method_quality:
            return estimate
        return judge.source_of_quality(targets, batch.index, batch.true_labels)

    def predict_train(self, *quantities: Quantity, network: int | None = 0, view: str = "none") -> dict[str, Tensor]:
        """Pass over the training set once; see :func:`~sanm_lightning.methods.passes.predict_split`. A collective."""
        return predict_split(self, "train", quantities, network, view)

    def predict_val(self, *quantities: Quantity, network: int | None = 0, view: str = "none") -> dict[str, Tensor]:
        """Pass over the validation split, likewise."""
        return predict_split(self, "val", quantities, network, view)

    # What the callbacks and the trainer call

    def reset(self, head_only: bool = False) -> list[nn.Parameter]:
        """Draw the networks anew in place, or their classifiers; with decoders and averaged copies. Return what was drawn."""
        from sanm_lightning.methods.reset import reset_networks

        return reset_networks(self, self._create, head_only)

    def prepare_epoch(self) -> None:
        """Begin the present epoch, unless it has begun; the loader calls it before its first batch. A collective."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EpochStart):
                callback.prepare(self.trainer, self)

    def _own_callbacks(self) -> list[Any]:
        stages = Stages()
        compiled = [CompileNetworks(self.compile_backend)] if self.compile_backend else []
        return [EpochStart(stages), *super()._own_callbacks(), stages, ExactResume(), FiniteLoss(), *compiled]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another method, in a sentence."""
        require_same_method(self, checkpoint)

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

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each network's gradients, with its decoder's, by themselves; a stage may set a value of its own."""
        if self.stage.gradient_clip_val is not None:
            gradient_clip_val, gradient_clip_algorithm = self.stage.gradient_clip_val, "norm"
        if not gradient_clip_val:
            return
        if self.num_networks == 1:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        clip = nn.utils.clip_grad_value_ if gradient_clip_algorithm == "value" else nn.utils.clip_grad_norm_
        for parts in zip(self.networks, self.sanms, strict=True):
            clip([parameter for part in parts for parameter in part.parameters()], gradient_clip_val)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make one optimizer over everything that learns, and its schedule."""
        optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        if self.scheduler is None:
            return optimizer
        if not takes_total_steps(self.scheduler):
            return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer)}  # type: ignore[typeddict-item]
        self.schedule_steps = int(self.trainer.estimated_stepping_batches)
        schedule = self.scheduler(optimizer, total_steps=self.schedule_steps)  # type: ignore[call-arg]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}  # type: ignore[typeddict-item]


def _check_arguments(num_classes: Any, image_size: Any, network: Any, warmup_epochs: int, backend: Any) -> None:
    if not isinstance(num_classes, int) or num_classes < 2:
        raise ValueError(
            f"expected num_classes >= 2, got {num_classes}; the data module gives it, from what it has read"
        )
    if image_size is None:
        raise ValueError("expected image_size (H, W) in pixels, got None; a data module gives it as a property")
    if not isinstance(network, (str, nn.Module)):
        raise ValueError(f"expected a network: the name of a timm model, or a module, got {network!r}")
    if warmup_epochs < 0:
        raise ValueError(f"expected warmup_epochs >= 0, got {warmup_epochs}")
    if backend and backend not in torch.compiler.list_backends(exclude_tags=()):
        raise ValueError(
            f"expected compile_network true, false or one of {', '.join(torch.compiler.list_backends())}, got {backend!r}"
        )
