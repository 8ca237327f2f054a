"""SANM over a step of cross-entropy: what it costs, where the time goes, and the mask against a loop over images."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import DEVICE, medians
from sanm_lightning import SANM
from sanm_lightning.models import create_network
from sanm_lightning.sanm.inference import inference_context

CLASSES = 10


def batch_of(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (B, 3, 32, 32), targets (B, 10), quality (B,)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(size, 3, 32, 32, generator=generator).to(DEVICE)
    labels = torch.randint(CLASSES, (size,), generator=generator).to(DEVICE)
    quality = torch.rand(size, generator=generator).to(DEVICE)
    return images, F.one_hot(labels, CLASSES).float(), quality


def network_of(width: int) -> Any:
    """PreAct ResNet-18."""
    torch.manual_seed(0)
    return create_network("preact_resnet18", CLASSES, width=width).to(DEVICE).train()


def masks_one_by_one(features: np.ndarray, weight: np.ndarray, images: np.ndarray, **given: Any) -> tuple[Any, Any]:
    """Masked images and targets by a loop over the images, in NumPy: what SANM's forward does for the whole batch.

    Args:
        features: (B, D, h, w).
        weight: of the classifier, (C, D).
        images: (B, 3, H, W).
        given: targets (B, C), quality (B,), the predicted classes (B,), mu and delta.
    """
    height, width = images.shape[2:]
    spread_rows, spread_columns = (
        _bilinear(size, part) for size, part in zip(images.shape[2:], features.shape[2:], strict=True)
    )
    masked, softened = images.copy(), given["targets"].copy()
    for number in range(len(images)):
        activation = np.tensordot(weight[given["classes"][number]], features[number], 1)
        enlarged = spread_rows @ activation @ spread_columns.T
        row, column = np.unravel_index(enlarged.argmax(), enlarged.shape)
        ratio = given["mu"] * (1 - given["quality"][number])
        aspect = np.random.uniform(given["delta"], 1 / given["delta"])
        half_height = np.sqrt(height * width * ratio * aspect) / 2
        half_width = np.sqrt(height * width * ratio / aspect) / 2
        up, down = int(np.ceil(max(row - half_height, 0))), int(min(row + half_height, height))
        left, right = int(np.ceil(max(column - half_width, 0))), int(min(column + half_width, width))
        shape = masked[number, :, up : down + 1, left : right + 1].shape
        masked[number, :, up : down + 1, left : right + 1] = np.random.rand(*shape)
        target = softened[number]
        top = target.argmax()
        move = min(ratio, target[top])
        target += move / len(target)
        target[top] -= move
    return masked, softened


def _bilinear(size: int, cells: int) -> np.ndarray:
    """Matrix (size, cells) of bilinear enlargement with half-pixel centres."""
    place = np.clip((np.arange(size) + 0.5) * cells / size - 0.5, 0, cells - 1)
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(cells)))


def run(repeats: int, width: int, batch_size: int) -> dict[str, Any]:
    """Return seconds of the steps and of their parts, and ratios."""
    images, targets, quality = batch_of(batch_size)
    network = network_of(width)
    sanm = SANM(seed=0)
    sanm.build(network, (32, 32))
    sanm.to(DEVICE)
    assert sanm.decoder is not None
    optimizer = torch.optim.SGD([*network.parameters(), *sanm.decoder.parameters()], lr=1e-4, momentum=0.9)

    def plain() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), targets).backward()
        optimizer.step()

    def masked() -> None:
        optimizer.zero_grad()
        views = sanm(network, images, targets, lambda logits: quality)
        features = network.forward_features(views.images)
        loss = F.cross_entropy(network.forward_head(features), views.targets)
        (loss + sanm.reconstruction(features, images)).backward()
        optimizer.step()

    def first_pass() -> None:
        with inference_context(network, images, batch_statistics=True):
            network.forward_head(network.forward_features(images))

    def masked_pass() -> None:
        F.cross_entropy(network(images), targets).backward()

    with torch.no_grad():
        known = network.forward_features(images)
        logits = network.forward_head(known)

    def mask() -> None:
        sanm(network, images, targets, quality, known)

    def decoder() -> None:
        features = known.clone().requires_grad_()
        sanm.reconstruction(features, images).backward()

    given = {
        "targets": targets.cpu().numpy(), "quality": quality.cpu().numpy(), "classes": logits.argmax(1).cpu().numpy(),
        "mu": sanm.mu, "delta": sanm.delta,
    }  # fmt: skip
    arrays = [part.detach().cpu().numpy() for part in (known, network.get_classifier().weight, images)]

    def loop() -> None:
        for part in masks_one_by_one(*arrays, **given):
            torch.from_numpy(part).to(DEVICE)

    steps = medians({"cross_entropy": plain, "sanm": masked}, repeats)
    parts = medians(
        {"first_pass": first_pass, "masked_pass": masked_pass, "decoder": decoder, "optimizer": optimizer.step}, repeats
    )
    masks = medians({"mask": mask, "loop": loop}, 5 * repeats, warm=5)
    return {
        "network": f"preact_resnet18, width {width}",
        "batch_size": batch_size,
        "cross_entropy_s": steps["cross_entropy"],
        "sanm_s": steps["sanm"],
        "sanm_over_cross_entropy": steps["sanm"] / steps["cross_entropy"],
        "parts_s": {**parts, "mask": masks["mask"]},
        "mask_loop_s": masks["loop"],
        "loop_over_mask": masks["loop"] / masks["mask"],
        "mask_share_of_sanm_step": masks["mask"] / steps["sanm"],
    }
