"""Show samples to a network as SANM does in training, without a trace."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.pictures.masks import SampleBlock
from sanm_lightning.pictures.style import short
from sanm_lightning.random_streams import named_generator
from sanm_lightning.sanm.foreign_batch import probabilities
from sanm_lightning.sanm.inference import inference_context
from sanm_lightning.sanm.module import SANM

__all__ = ["Look", "choose"]

NAME = 11
"""Characters of a class name that fit beside a sample."""


def choose(quality: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Choose samples of the highest and of the lowest quality.

    Quality is compared to two decimals, as it is displayed. Beyond them it ranks images by how typical they are of the easiest
    class: on digits, the highest five were all of one class.

    Args:
        quality: shape (M,).
        count: number of samples, half of them of each kind.
        seed: names the random order of samples of the same quality.

    Returns:
        Positions of the highest quality, best first, and of the lowest quality, worst first.
    """
    shuffled = torch.randperm(len(quality), generator=named_generator("pictures", seed))
    order = shuffled[quality[shuffled].mul(100).round().argsort(descending=True, stable=True)]
    count = min(count, len(order))
    return order[: count - count // 2], order[len(order) - count // 2 :].flip(0)


class Look(NamedTuple):
    """Network and SANM for drawing, without changes of state and without communication.

    The networks are run in evaluation mode with running batch statistics, independent of ``SANM.batch_statistics``, so that a
    picture does not depend on the other samples of its batch.
    """

    network: Any
    sanm: SANM
    num_classes: int
    names: list[str]

    def placed(self, batch: NoisyBatch) -> NoisyBatch:
        """Return a batch on the device of the network, with images of its type."""
        like = next(self.network.parameters())
        index, true_labels = (
            None if part is None else part.to(like.device) for part in (batch.index, batch.true_labels)
        )
        return NoisyBatch(batch.images.to(like.device, like.dtype), batch.labels.to(like.device), index, true_labels)

    def quality(self, batch: NoisyBatch) -> Tensor:
        """Return the estimated quality of the labels, (B,), on the CPU."""
        batch = self.placed(batch)
        with inference_context(self.network, batch.images):
            logits = self.network.forward_head(self.network.forward_features(batch.images))
            known: Tensor = self.sanm.label_quality(logits, self._targets(batch), batch.index)
        return known.float().cpu()

    def block(self, heading: str, batch: NoisyBatch, quality: Tensor) -> SampleBlock:
        """Return samples for a picture, masked by their quality (B,); or by the oracle if SANM uses it."""
        batch = self.placed(batch)
        images, targets, sanm = batch.images, self._targets(batch), copy.copy(self.sanm)
        sanm.batch_statistics = False
        known = quality.to(images.device)
        if sanm.quality == "oracle" and batch.true_labels is not None:
            known = cast(Tensor, sanm.source_of_quality(targets, batch.index, batch.true_labels))
        generator = named_generator("look", sanm.seed, device=images.device)
        views = sanm(self.network, images, targets, known, generator=generator)
        rebuilt = None
        if sanm.decoder is not None:
            copies = 1 if views.box is None else len(views.box) // len(images)
            masked = views.images[-copies * len(images) :][: len(images)]
            with inference_context(self.network, masked):
                features = self.network.forward_features(masked)
                rebuilt = sanm.rebuild(features, masked.shape[2:])
        texts = self._texts(targets.argmax(1), batch.true_labels, views.logits.argmax(1), known, views.ratio)
        views = views._replace(images=sanm.in_unit_range(views.images))
        return SampleBlock(heading, sanm.in_unit_range(images), views, rebuilt, texts)

    def _targets(self, batch: NoisyBatch) -> Tensor:
        return probabilities(batch.labels, self.num_classes)

    def _texts(
        self, given: Tensor, true: Tensor | None, predicted: Tensor, quality: Tensor, ratio: Tensor
    ) -> list[str]:
        lines = [[f"given {short(self.names[label], NAME)}"] for label in given.tolist()]
        for word, classes in (("true", true), ("pred.", predicted)):
            if classes is not None:
                for text, label in zip(lines, classes.tolist(), strict=True):
                    text.append(f"{word} {short(self.names[label], NAME)}")
        for text, believed, part in zip(lines, quality.tolist(), ratio.tolist(), strict=True):
            text.append(f"G {believed:.2f}, mask {part:.2f}")
        return ["\n".join(text) for text in lines]
