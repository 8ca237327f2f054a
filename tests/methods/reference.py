"""What the slow references share: a method at an epoch without a fit, softmax and logits one sample at a time."""

import math
from typing import Any

import torch
from torch import Tensor

from sanm_lightning import NoisyBatch
from tests.methods.recorded import Data, N
from tests.methods.toy import trainer

C = 4
SMALL = {"network": "small_cnn", "network_args": {"width": 4}, "num_classes": C, "image_size": (16, 16)}


def ready(module: Any, epoch: int = 0, max_epochs: int = 10) -> Any:
    """Attach a trainer at an epoch, in evaluation mode: a sample's logits are its own; size the state of the samples."""
    module.eval()
    run = trainer(max_epochs)
    run.datamodule = Data()
    module.trainer = run
    run.fit_loop.epoch_progress.current.completed = epoch
    for part in module.modules():
        if hasattr(part, "synced_state"):
            part.reset(N, torch.arange(N) % C)
    return module


def batch(size: int = 6, labels: Tensor | None = None) -> NoisyBatch:
    """Samples 4 to 4 + size of the training set."""
    images = torch.rand(size, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    index = torch.arange(size) + 4
    return NoisyBatch(images, index % C if labels is None else labels, index, None, (images,))


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


def predictions(network: Any, images: Tensor) -> list[list[float]]:
    """Class probabilities of each image, by a pass of its own."""
    with torch.no_grad():
        return [softmax(network(image[None])[0].double().tolist()) for image in images]
