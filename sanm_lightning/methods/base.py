"""What every method for learning with noisy labels shares: a network, targets, label quality, metrics, an optimizer."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.methods.schedules import takes_total_steps
from sanm_lightning.models import create_network
from sanm_lightning.random_streams import derived_generator, derived_seed, process_rank, several_processes
from sanm_lightning.sanm.mixin import SANMMixin
from sanm_lightning.sanm.module import SANM, Quality

__all__ = ["NoisyLabelModule", "sgd"]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Return the field's usual optimizer: SGD, learning rate .02, momentum .9, weight decay 5e-4."""
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=5e-4)


class NoisyLabelModule(SANMMixin, L.LightningModule):
    """Base class of the methods. A method is one file with one class and one ``training_step``.

    Batches are :class:`NoisyBatch`, or any ``(images, labels)`` pair.

    Args:
        num_classes: C; flows from the data module on the command line.
        image_size: H, W of the images in pixels; likewise.
        network: timm model name, or a network by timm's conventions that takes images in [0, 1].
        network_args: options of that timm model, as ``{width: 16}`` or ``{pretrained: true}``.
        mean: channel means that the network normalises with; None takes the pre-trained ones, or .5.
        std: channel standard deviations, likewise, or .25.
        sanm: SANM laid over the method; None is the plain published method.
        warmup_epochs: epochs before the method, and SANM over it, does more than plain training.
        optimizer: makes the optimizer from the parameters.
        scheduler: makes the learning-rate schedule; one that takes ``total_steps`` gets them from the trainer and is stepped
            per batch, any other is stepped per epoch. None keeps the rate constant.
        compile_network: run the networks through ``torch.compile`` while a trainer uses the module: true, or the name of a
            backend. Weights, checkpoints and exports are those of the plain network.

    A checkpoint holds all of these but a network given as a module, the optimizer and the scheduler (those of the command line
    it does hold): ``load_from_checkpoint`` needs them only to go on training.

    Raises:
        ValueError: if an argument is out of its range, or the network cannot serve SANM.
    """

    wraps_training_step = False
    needs_data_module = False
    """True in a method that asks for several views of a sample, or for the whole training set."""

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
        backend = "inductor" if compile_network is True else compile_network
        if backend and backend not in torch.compiler.list_backends(exclude_tags=()):
            raise ValueError(
                f"expected compile_network true, false or one of {', '.join(torch.compiler.list_backends())}, got {backend!r}"
            )
        super().__init__(sanm=SANM.off() if sanm is None else sanm)
        live = ["optimizer", "scheduler", *([] if isinstance(network, str) else ["network"])]
        self.save_hyperparameters(ignore=live)  # what is left is plain Python, so that a checkpoint opens safely
        self.num_classes = num_classes
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.warmup_epochs = warmup_epochs
        self.optimizer, self.scheduler = optimizer, scheduler
        self.compile_backend: str | None = backend or None
        if isinstance(network, str):
            options = network_args or {}
            self.network: Any = create_network(network, num_classes, mean, std, **options)
            if options.get("pretrained"):
                # a checkpoint holds the weights: loading it must not fetch the first ones again
                mean, std = (tuple(part.flatten().tolist()) for part in (self.network.mean, self.network.std))
                self.hparams.update(network_args={**options, "pretrained": False}, mean=mean, std=std)
        else:
            self.network = network
        self.sanm.build(self.network, self.image_size)
        self.accuracy = nn.ModuleDict()  # one per evaluation set, made when it is first seen
        self._begun = -1  # the epoch that begin_epoch was called for last
        self._bad_step: Tensor | None = None  # step of the first loss that was not finite, or -1; stays on the device
        self._resumed_stream: Tensor | None = None
        self._schedule_steps: int | None = None  # length of a schedule that follows the trainer's
        self._resumed_steps: int | None = None  # the same, in the checkpoint that training is resumed from

    # What a method calls

    def one_hot(self, labels: Tensor) -> Tensor:
        """Labels (B,) -> targets (B, C), float32."""
        return F.one_hot(labels, self.num_classes).float()

    def quality(
        self, batch: NoisyBatch, targets: Tensor, estimate: Tensor | None = None, source: SANM | None = None
    ) -> Quality:
        """Return the label quality of a batch, as SANM takes it; None in the warm-up and without SANM.

        Args:
            batch: whose labels are judged.
            targets: the given labels as class probabilities, shape (B, C).
            estimate: what the method itself makes of the labels, shape (B,), in [0, 1]; it takes the place of SANM's own
                estimate, never that of the oracle.
            source: the SANM whose estimate counts, where there are several; None for ``self.sanm``.
        """
        if not self.sanm.masking(self.current_epoch, self.warmup_epochs):
            return None
        if estimate is not None and self.sanm.quality == "estimated":
            return estimate
        return (source or self.sanm).source_of_quality(targets, batch.index, batch.true_labels)

    def observe(self, batch: NoisyBatch, logits: Tensor, targets: Tensor) -> None:
        """Remember what the network says of the unmasked images: logits (B, C), targets (B, C)."""
        if self.sanm.enabled:
            self.sanm.label_quality.observe(logits, targets, batch.index)

    def random_stream(self, batch_idx: int) -> torch.Generator:
        """Return the CPU generator of one step: a function of seed, process, epoch and step, so that resume is exact."""
        return derived_generator(torch.device("cpu"), self.sanm.seed, process_rank(), self.current_epoch, batch_idx)

    def views(self, index: Tensor, generator: torch.Generator, *policies: str) -> list[Tensor]:
        """Make one view (B, 3, H, W) of the training images ``index`` (B,) for each policy of the data module."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return [data.batch("train", index, generator=generator, policy=policy).images for policy in policies]

    def training_set(self) -> Iterator[NoisyBatch]:
        """Walk through the training set, not augmented: each sample once over all processes. No gradient, evaluation mode."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        share = torch.arange(data.num_samples)[self.trainer.global_rank :: self.trainer.world_size]
        with torch.no_grad(), self.trainer.precision_plugin.forward_context(), evaluating(self):
            for index in share.split(data.eval_batch_size):
                yield data.batch("train", index.to(self.device))

    def begin_epoch(self) -> None:
        """Do what the method does once per epoch, before its first step; not done again in an epoch that is resumed."""

    def clean_probability(self) -> Tensor | None:
        """Return what the method makes of each training label, (N,) in [0, 1], 1 = right; None where SANM's estimate counts."""
        return None

    @property
    def networks(self) -> list[Any]:
        """All networks in training."""
        return [self.network]

    # What Lightning calls

    def configure_model(self) -> None:
        """Compile both halves of each network, where that was asked for.

        The methods call the halves, so a compiled ``forward`` would serve no training step. The compiled ones lie over the
        plain ones until :meth:`teardown`; the module is the same before and after, for copies, checkpoints and exports.
        """
        if self.compile_backend is None:
            return
        for network in self.networks:
            for half in ("forward_features", "forward_head"):
                if half not in network.__dict__:
                    setattr(network, half, torch.compile(getattr(network, half), backend=self.compile_backend))

    def teardown(self, stage: str) -> None:
        """Take the compiled halves off."""
        for network in self.networks if self.compile_backend else []:
            for half in ("forward_features", "forward_head"):
                network.__dict__.pop(half, None)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> logits (B, C), as the method predicts."""
        logits: Tensor = self.network(images)
        return logits

    def on_train_start(self) -> None:
        """Refuse data that the method cannot learn from, before the first step."""
        data = getattr(self.trainer, "datamodule", None)
        if self.needs_data_module and not (hasattr(data, "batch") and hasattr(data, "num_samples")):
            raise ValueError(
                f"{type(self).__name__} looks samples up by itself and needs a data module of this package (CIFAR10, "
                f"ImageFolder, ... or a subclass of NoisyDataModule), got {type(data).__name__}"
            )
        labels = getattr(data, "labels", None)
        if isinstance(labels, Tensor) and len(labels) and int(labels.max()) >= self.num_classes:
            raise ValueError(f"expected labels in [0, {self.num_classes}), got {int(labels.max())}")
        if self._resumed_stream is not None:  # dropout of the steps that follow draws what it would have drawn
            torch.set_rng_state(self._resumed_stream)
            self._resumed_stream = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Call :meth:`begin_epoch` once; here, since an epoch that is resumed has no start hook."""
        if self._begun != self.current_epoch:
            self._share_statistics()  # whole-set passes are made by all processes together
            if several_processes():  # seeded alike, they would drop out the same places of different images
                torch.manual_seed(derived_seed(self.sanm.seed, process_rank(), self.current_epoch, 11))
            self.begin_epoch()
            self._begun = self.current_epoch

    def on_before_backward(self, loss: Tensor) -> None:
        """Note on the device whether the loss is finite: before anything that the step leads to can be saved."""
        if self._bad_step is None or self._bad_step.device != loss.device:
            self._bad_step = torch.full((), -1, device=loss.device)
        first = (self._bad_step < 0) & ~torch.isfinite(loss.detach())
        self._bad_step = self._bad_step.masked_fill(first, self.trainer.global_step + 1)

    def on_train_batch_end(self, outputs: Any, batch: NoisyBatch, batch_idx: int) -> None:
        """Log the loss of the step; Lightning hands it over divided by the number of batches that are accumulated.

        Raises:
            ValueError: at the next logging interval, if a loss was NaN or infinite.
        """
        loss = outputs["loss"] * self.trainer.accumulate_grad_batches
        self.log(
            "train/loss", loss, on_step=False, on_epoch=True, batch_size=len(batch[1]), prog_bar=True, sync_dist=True
        )
        interval = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if interval and (batch_idx + 1) % interval == 0:
            self._require_finite()

    def _share_statistics(self) -> None:
        """Give all processes the batch statistics of rank 0, those that a checkpoint holds. A collective.

        DDP does so before each forward, and not after the last one: what runs outside of it would see as many networks as there
        are processes, and a resumed run would score with others than the run that went on.
        """
        if not several_processes():
            return
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for buffer in self.buffers():
            kinds.setdefault(buffer.dtype, []).append(buffer)
        for buffers in kinds.values():  # one message for all of a kind
            flat = torch.cat([buffer.flatten() for buffer in buffers])
            torch.distributed.broadcast(flat, 0)
            for buffer, part in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
                buffer.copy_(part.view_as(buffer))

    def on_train_end(self) -> None:
        """Leave all processes with one and the same network."""
        self._share_statistics()

    def _require_finite(self) -> None:
        """Raise, in every process, if a loss was not finite in any. Reads the device; the steps themselves do not."""
        never = torch.iinfo(torch.int64).max
        bad = torch.full((), -1) if self._bad_step is None else self._bad_step
        first = torch.where(bad < 0, never, bad).to(self.device)
        if several_processes():  # or one process would stop, and the others wait for it
            torch.distributed.all_reduce(first, torch.distributed.ReduceOp.MIN)
        step = int(first)
        if step < never:
            raise ValueError(
                f"the loss of {type(self).__name__} was NaN or infinite, first at step {step} (epoch {self.current_epoch} or "
                "before); lower the learning rate, clip gradients, or look at the images"
            )

    def on_train_epoch_end(self) -> None:
        """Look whether the losses of the epoch were finite."""
        self._require_finite()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the epoch that has begun and each process's global random stream (dropout); never write after a bad loss."""
        self._require_finite()
        pending = self._resumed_stream  # of a run that is resumed after its last step, and draws nothing
        streams = [torch.get_rng_state() if pending is None else pending]
        if several_processes():
            gathered: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(gathered, streams[0])
            streams = gathered
        checkpoint["method"] = {
            "begun": self._begun,
            "stream": torch.stack(streams),
            "name": type(self).__name__,
            "num_classes": self.num_classes,
            "schedule_steps": self._schedule_steps,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over what :meth:`on_save_checkpoint` added.

        Raises:
            ValueError: training is resumed from a checkpoint of another method, or the number of classes is another one.
        """
        state = checkpoint.get("method", {})
        name, classes = state.get("name", type(self).__name__), state.get("num_classes", self.num_classes)
        fitting = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        if classes != self.num_classes or (fitting and name != type(self).__name__):
            raise ValueError(
                f"expected a checkpoint of {type(self).__name__} with {self.num_classes} classes, got one of {name} with "
                f"{classes}; give the method and the data that it was made with"
            )
        if fitting:
            owe_evaluation(checkpoint["loops"]["fit_loop"])
        streams = state.get("stream")
        self._begun = state.get("begun", -1)
        # On more processes than before a stream is lacking, until the next epoch draws anew. Cloned: torch 2.14 ends with a
        # segmentation fault when the state is a view.
        self._resumed_stream = None if streams is None else streams[process_rank() % len(streams)].clone()
        self._resumed_steps = state.get("schedule_steps") if fitting else None

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take over weights and banks.

        Raises:
            ValueError: they are not those of such a method and network; torch lists every name, this says it in a sentence.
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

    def _evaluation_name(self, dataloader_idx: int) -> str:
        names = getattr(getattr(self.trainer, "datamodule", None), "eval_names", None) or ["val"]
        return str(names[dataloader_idx]) if dataloader_idx < len(names) else f"val{dataloader_idx}"

    def _evaluate(self, batch: NoisyBatch, name: str) -> None:
        self._count(name, f"{name}/acc", self(batch[0]), batch[1])

    def _count(self, name: str, figure: str, logits: Tensor, labels: Tensor) -> None:
        """Count right predictions in the metric ``name``, and log it as ``figure``."""
        if name not in self.accuracy:
            self.accuracy[name] = MulticlassAccuracy(self.num_classes, average="micro").to(self.device)
        metric = self.accuracy[name]
        metric.update(logits, labels)  # type: ignore[operator]
        options = {
            "on_epoch": True,
            "add_dataloader_idx": False,
            "prog_bar": True,
            "metric_attribute": f"accuracy.{name}",
        }
        self.log(figure, metric, **options)  # type: ignore[arg-type]

    def validation_step(self, batch: NoisyBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count right predictions of each evaluation set of the data module."""
        self._evaluate(batch, self._evaluation_name(dataloader_idx))

    def test_step(self, batch: NoisyBatch, batch_idx: int) -> None:
        """Count right predictions of the test set."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: NoisyBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return index (B,) where the batch has one, and probabilities (B, C)."""
        index = getattr(batch, "index", None)
        out = {} if index is None else {"index": index}
        return {**out, "probabilities": self(batch[0]).float().softmax(1)}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make one optimizer over everything that learns, and its schedule."""
        optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        if self.scheduler is None:
            return optimizer
        if takes_total_steps(self.scheduler):
            steps = int(self.trainer.estimated_stepping_batches)
            if self._resumed_steps not in (None, steps):
                raise ValueError(
                    f"expected a training of {self._resumed_steps} steps, the length of the checkpoint's learning-rate "
                    f"schedule, got {steps}; give max_epochs, max_steps, batches and processes as they were, or begin a new run"
                )
            self._schedule_steps, self._resumed_steps = steps, None
            schedule = self.scheduler(optimizer, total_steps=steps)  # type: ignore[call-arg]
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}  # type: ignore[typeddict-item]
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer)}  # type: ignore[typeddict-item]


def owe_evaluation(loops: dict[str, Any]) -> None:
    """Let a run that is resumed from the last step of an epoch begin with the evaluation that this epoch still has before it.

    Lightning leaves out the rest of such an epoch, and a figure is missing. What is written here is the state that it saves
    in the evaluation itself, before its first batch.

    Args:
        loops: the state of the fit loop in a checkpoint; changed where the checkpoint was written by ``on_train_batch_end`` of
            the last batch of an epoch, and left alone otherwise.
    """
    train, evaluation = loops["epoch_loop.batch_progress"], loops["epoch_loop.val_loop.batch_progress"]
    total = train["total"]
    at_its_end = total["completed"] + 1 == total["processed"] == total["started"] == total["ready"]
    if not (train["is_last_batch"] and at_its_end):
        return
    for counts in (total, train["current"]):
        counts["completed"] += 1
    evaluation["total"].update(ready=1, started=1, processed=0, completed=0)
    evaluation["current"].update(ready=0, started=0, processed=0, completed=0)
    evaluation["is_last_batch"] = False


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode for a while, and every part of it back into the mode it was in."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
