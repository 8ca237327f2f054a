"""Base class of all methods: one or two networks with SANM, their callbacks, predictions and checkpoints."""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from sanm_lightning.callbacks import (
    CompileNetworks,
    EpochStart,
    ExactResume,
    Finders,
    FiniteLoss,
    OptimizerSteps,
    Stages,
    UnaveragedState,
)
from sanm_lightning.callbacks.exact_resume import require_same_method
from sanm_lightning.methods import checks
from sanm_lightning.methods.evaluation import EvaluationSteps
from sanm_lightning.methods.first_batch import FirstBatch
from sanm_lightning.methods.hyper_parameters import module_arguments
from sanm_lightning.methods.learned import TrainingPass
from sanm_lightning.methods.optimization import Optimization, sgd
from sanm_lightning.methods.passes import Quantity, predict_split
from sanm_lightning.methods.reset import check_reset, copy_reinitialized, reset_networks
from sanm_lightning.models import create_network, with_image_size
from sanm_lightning.random_streams import named_seed
from sanm_lightning.sanm.feature_extractor import with_feature_map
from sanm_lightning.sanm.mixin import SANMMixin
from sanm_lightning.sanm.module import SANM

__all__ = ["NoisyLabelModule", "sgd"]


class NoisyLabelModule(SANMMixin, Optimization, TrainingPass, EvaluationSteps):
    """Base class of the methods.

    A method is one file with one class and one ``training_step``, which calls :meth:`learn`. Batches are
    :class:`NoisyBatch`, or any form that :meth:`NoisyBatch.from_any` supports.

    Args:
        num_classes: C, number of classes; linked to the data module on the command line.
        image_size: H, W of the images in pixels, or one number; linked to the data module on the command line.
        network: timm model name, or a classifier of images in [0, 1] as a module. A module without timm's interface
            (torchvision) is wrapped in a :class:`~sanm_lightning.sanm.FeatureExtractor`.
        network_args: options of a timm model by name, such as ``{width: 16}`` or ``{pretrained: true}``. Models of a fixed
            input size (ViT, Swin) are created for ``image_size``.
        mean: channel means for input normalization; None uses those of the pre-trained weights, on the command line those
            of the data, or .5. Not with a network given as a module, which normalizes its images itself.
        std: channel standard deviations, as ``mean``; without pre-trained weights and data .25.
        sanm: SANM applied to the method, one for each module; None is the published method without SANM.
        warmup_epochs: length of the method's warm-up stage, if it has one, and epochs before SANM's first mask.
        optimizer: function that creates the optimizer from the parameters.
        scheduler: function that creates the learning-rate schedule. A schedule with an argument ``total_steps``
            receives the number of steps from the trainer and is stepped per batch, as is ``CyclicLR``; others are
            stepped per epoch. ``ReduceLROnPlateau`` monitors its ``monitor``, if it has one, or ``train/loss``. None
            keeps the rate constant.
        compile_network: compile the networks with ``torch.compile`` while a trainer uses the module: true, or the name
            of a backend. Weights, checkpoints and exports are those of the uncompiled network.

    A checkpoint contains all of these except modules, also as arguments of a subclass, the optimizer and the
    scheduler (those of the command line are saved): ``load_from_checkpoint`` requires them only to continue training. With two
    networks, both are trained in one step with the sum of their losses and one optimizer, which is equivalent to two
    optimizers. A network given as a module is copied for the second network, and the copy is reinitialized.

    Raises:
        ValueError: if an argument is out of its range, or the network does not support SANM.
    """

    wraps_training_step = False

    def __init__(
        self,
        num_classes: int,
        image_size: int | tuple[int, int] | None = (32, 32),
        network: str | nn.Module = "preact_resnet18",
        network_args: dict[str, Any] | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        sanm: SANM | None = None,
        warmup_epochs: int = 10,
        optimizer: OptimizerCallable = sgd,
        scheduler: LRSchedulerCallable | None = None,
        compile_network: bool | str = False,
    ) -> None:
        backend = "inductor" if compile_network is True else compile_network or None
        checks.check_arguments(num_classes, network, warmup_epochs, backend)
        checks.check_network_options(network, network_args=network_args, mean=mean, std=std)
        image_size = checks.size_pair(image_size)  # also in the hyper-parameters
        super().__init__(sanm=SANM.off() if sanm is None else sanm)
        live = ["optimizer", "scheduler", *module_arguments(self, inspect.currentframe())]
        self.save_hyperparameters(ignore=live)  # the others are built-in types, which load safely from a checkpoint
        self.num_classes, self.image_size, self.warmup_epochs = num_classes, image_size, warmup_epochs
        self.optimizer, self.scheduler = optimizer, scheduler
        self.compile_backend: str | None = backend
        self._create: partial[Any] | None = None
        if isinstance(network, str):
            options = with_image_size(network, network_args or {}, self.image_size)
            self._create = partial(create_network, network, num_classes, mean, std, **options)
            self.network: Any = self._create()
            if options.get("pretrained"):  # a checkpoint contains the weights: loading it requires no download
                used = {name: tuple(getattr(self.network, name).flatten().tolist()) for name in ("mean", "std")}
                self.hparams.update(network_args={**options, "pretrained": False}, **used)
            elif options:
                self.hparams.update(network_args=dict(options))
        else:
            self.network = with_feature_map(network, self.image_size, self.sanm.needs_map)
            checks.check_num_classes(self.network, num_classes)
        if self.num_networks == 2:
            self.sanm2 = self.sanm.peer_copy(named_seed("peer", self.sanm.seed))
        self.sanm.build(self.network, self.image_size)
        if self.num_networks == 2:
            self.network2: Any = (
                copy_reinitialized(self.network, type(self).__name__) if self._create is None else self._create()
            )
            self.sanm2.build(self.network2, self.image_size)
        self.accuracy = nn.ModuleDict()

    def predict_train(
        self, *quantities: Quantity, network: int | None = 0, view: str = "none", pool_only: bool = False
    ) -> dict[str, Tensor]:
        """Predict the training set, see :func:`~sanm_lightning.methods.passes.predict_split`. Collective."""
        return predict_split(self, "train", quantities, network, view, pool_only)

    def predict_val(self, *quantities: Quantity, network: int | None = 0, view: str = "none") -> dict[str, Tensor]:
        """Predict the validation split, see :meth:`predict_train`. A collective operation."""
        return predict_split(self, "val", quantities, network, view)

    def reset(self, head_only: bool = False) -> list[nn.Parameter]:
        """Reinitialize the networks, decoders and averaged copies, or the classifiers; return the parameters."""
        return reset_networks(self, self._create, head_only)

    def check_reset(self, head_only: bool = False) -> None:
        """Raise ValueError if :meth:`reset` cannot reinitialize a parameter; called before training for stages that reset."""
        check_reset(self, self._create, head_only)

    def prepare_epoch(self) -> None:
        """Start the current epoch, unless it is started; called by the loader. A collective operation."""
        trainer: Any = self.trainer
        starting = [callback for callback in trainer.callbacks if isinstance(callback, EpochStart)]
        for callback in starting:
            callback.prepare(trainer, self)
        if not starting:  # Lightning's finders remove the callbacks in their trials
            self.begin_epoch()

    def _own_callbacks(self) -> list[Any]:
        stages = Stages()
        checks.check_callbacks(self)
        compiled = [CompileNetworks(self.compile_backend)] if self.compile_backend else []
        # ExactResume compares the optimizer before the finders renew it, to which Stages adds hooks
        first = [EpochStart(stages), *super()._own_callbacks(), UnaveragedState(), ExactResume(), Finders()]
        updates = type(self).after_optimizer_step is not NoisyLabelModule.after_optimizer_step
        steps = [OptimizerSteps()] if updates else []
        return [*first, stages, *steps, FiniteLoss(), FirstBatch(), *compiled]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that a checkpoint belongs to this method and these classes, and restore the class names."""
        require_same_method(self, checkpoint)
        self.class_names = checkpoint.get("class_names")
        if checkpoint.get("pretrained") and self._create is not None:
            self._create = partial(self._create, pretrained=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the class names, and whether a reset of the networks restores pre-trained weights."""
        super().on_save_checkpoint(checkpoint)
        if self._create is not None and self._create.keywords.get("pretrained"):
            checkpoint["pretrained"] = True

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights and per-sample state.

        Raises:
            ValueError: if they belong to another method or network.
        """
        with checks.refuse_other_weights(self):
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
