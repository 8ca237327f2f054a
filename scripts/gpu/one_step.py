"""One training step from a checkpoint, on any device, with the same random numbers and the same batch."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import lightning as L
import torch
from torch import Tensor

from sanm_lightning.methods import learned
from sanm_lightning.random_streams import named_generator
from sanm_lightning.sanm import masking
from sanm_lightning.sanm import module as sanm_module
from scripts.gpu.cases import Case, Size, data, trainer

EPOCHS = 4


class Step(NamedTuple):
    """What a training step computed, on the CPU."""

    loss: Tensor
    """Scalar."""
    gradients: dict[str, Tensor]
    """Gradient of each trained parameter by name."""
    batch: list[Tensor]
    """Tensors of the batch that the data module made."""
    boxes: list[Tensor]
    """Boxes of SANM's masks, (V, 4), of each call."""


class Save(L.Callback):
    """Save a checkpoint after the first step of the second epoch, and stop."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save and stop."""
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


class Capture(L.Callback):
    """Record the first step, on a given batch, and stop."""

    def __init__(self, batch: list[Tensor] | None) -> None:
        self.given = batch
        self.made: list[Tensor] = []
        self.loss: Tensor | None = None
        self.gradients: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Record the batch, and overwrite it by the given one."""
        tensors = list(leaves(batch))
        self.made = [part.detach().cpu().clone() for part in tensors]
        for part, value in zip(tensors, self.given or [], strict=self.given is not None):
            part.copy_(value)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Record the gradients."""
        named = ((name, part.grad) for name, part in pl_module.named_parameters())
        self.gradients = {name: grad.detach().cpu().clone() for name, grad in named if grad is not None}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Record the loss and stop."""
        self.loss = outputs["loss"].detach().cpu()
        trainer.should_stop = True


def leaves(batch: Any) -> Iterator[Tensor]:
    """Return the tensors of a batch in their order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (tuple, list)):
        for part in batch:
            yield from leaves(part)


@contextlib.contextmanager
def draws_on_cpu() -> Iterator[None]:
    """Draw all random numbers of SANM on the CPU, because generators of other devices have other streams."""
    rand = torch.rand

    def rand_on_cpu(*size: Any, generator: Any = None, device: Any = None, **options: Any) -> Tensor:
        if generator is None or generator.device.type != "cpu":
            return rand(*size, generator=generator, device=device, **options)
        drawn = rand(*size, generator=generator, **options)
        return drawn if device is None else drawn.to(device)

    def generator_on_cpu(kind: str, *parts: int, device: Any = "cpu") -> torch.Generator:
        return named_generator(kind, *parts)

    def uniform(shape: tuple[int, ...], device: Any, generator: Any) -> Tensor:
        return rand_on_cpu(shape, generator=generator, device=device)

    with (
        mock.patch.object(torch, "rand", rand_on_cpu),
        mock.patch.object(learned, "named_generator", generator_on_cpu),
        mock.patch.object(sanm_module, "named_generator", generator_on_cpu),
        mock.patch.object(masking, "_uniform", uniform),
    ):
        yield


def start(case: Case, size: Size, folder: Path) -> Path:
    """Train on the CPU until images are masked, and return a checkpoint."""
    path = folder / "start.ckpt"
    trainer("cpu", EPOCHS, callbacks=[Save(path)]).fit(case.build(size, folder), data(size))
    return path


def step(
    case: Case,
    size: Size,
    path: Path,
    device: str,
    batch: list[Tensor] | None = None,
    strategy: Any = "auto",
    **options: Any,
) -> Step:
    """Take the step that follows a checkpoint.

    Args:
        case: method of the checkpoint.
        size: size of network and data.
        path: checkpoint of :func:`start`.
        device: ``cpu`` or ``cuda``.
        batch: tensors of the batch; None uses those that the data module makes.
        strategy: strategy of the trainer.
        options: further arguments of the method.

    Returns:
        Loss, gradients and batch.
    """
    capture, boxes = Capture(batch), list[Tensor]()
    module = case.build(size, path.parent, **options)
    for sanm in module.sanms:
        sanm.register_forward_hook(lambda _, given, views: boxes.append(views.box) if views.masked else None)
    with draws_on_cpu():
        trainer(device, EPOCHS, callbacks=[capture], strategy=strategy).fit(module, data(size), ckpt_path=path)
    assert capture.loss is not None
    return Step(capture.loss, capture.gradients, capture.made, [box.cpu() for box in boxes])


def difference(expected: Step, found: Step) -> dict[str, float]:
    """Return the relative errors of the loss and of all gradients together, and differences of masks and images.

    Raises:
        ValueError: if other parameters have a gradient.
    """
    if expected.gradients.keys() != found.gradients.keys():
        other = sorted(expected.gradients.keys() ^ found.gradients.keys())
        raise ValueError(
            f"expected gradients of the same parameters, got a difference in {', '.join(other)}; compare them"
        )
    square = sum(float(value.double().square().sum()) for value in expected.gradients.values())
    missed = sum(
        float((value.double() - found.gradients[name].double()).square().sum())
        for name, value in expected.gradients.items()
    )
    images = (
        float((one - other).abs().max())
        for one, other in zip(expected.batch, found.batch, strict=True)
        if one.is_floating_point()
    )
    moved = [(one - other).abs().amax(1) > 0.5 for one, other in zip(expected.boxes, found.boxes, strict=True)]
    return {
        "loss": float(expected.loss),
        "loss_error": float((expected.loss - found.loss).abs() / expected.loss.abs().clamp(min=1e-6)),
        "gradient_error": (missed / max(square, 1e-30)) ** 0.5,
        "moved_boxes": float(torch.cat(moved).float().mean()) if moved else 0.0,
        "views_error": max(images),
    }
