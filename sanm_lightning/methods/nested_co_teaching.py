"""Nested with Co-teaching (Chen et al., CVPR Workshops 2021): two networks with ordered dropout of features."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sanm_lightning.callbacks import Stage
from sanm_lightning.functional import soft_cross_entropy, step_fractions
from sanm_lightning.methods.checks import check_range, require_noise_rate
from sanm_lightning.methods.nested import Nested
from sanm_lightning.per_sample import LabelStore
from sanm_lightning.sanm.inference import inference_context

__all__ = ["NestedCoTeaching"]


class NestedCoTeaching(Nested):
    """Two networks with nested dropout, then Co-teaching between them on half a batch each.

    Source: Chen et al., CVPR Workshops 2021, and the authors' code. In the second stage, batch norm is frozen. Each network
    ranks its half of the batch by its losses with K features, in evaluation mode, and the other network is trained on
    the fraction 1 - noise rate of smallest losses, with the same random number of features for both. Networks predict
    together, and K is that of the mean logits.

    Departures: those of :class:`Nested`; in the first stage, both networks are trained on the same batches, where the code
    trains them in separate runs, on Clothing1M with different subsets. The last weights are used, where the code uses those
    of the best accuracy on clean validation labels.

    Under SANM, masks are drawn in the second stage. Label quality decreases with the rank of the loss in the half batch, from
    1 to 0, of the last visit.

    Args:
        num_classes: C, number of classes.
        noise_rate: fraction of a half batch that is excluded, in [0, 1). Required, and never read from the data.
        finetune_lr: learning rate of the second stage; published: .001 on CIFAR, .002 on Clothing1M, .004 on Animal-10N.
        finetune_drop: fraction of the second stage after which its learning rate is divided by 10, in [0, 1]; published: 1/2
            on CIFAR, 1/6 on Clothing1M.
        warmup_epochs: length of the first stage.

    All other arguments are those of :class:`Nested`.

    Raises:
        ValueError: if an argument is out of its range, ``noise_rate`` is missing, or batches have no index.
    """

    num_networks = 2
    needs_data_module = True
    estimates_quality = True

    def __init__(
        self,
        num_classes: int,
        noise_rate: float | None = None,
        finetune_lr: float = 0.001,
        finetune_drop: float = 0.5,
        warmup_epochs: int = 100,
        **kwargs: Any,
    ) -> None:
        noise_rate = require_noise_rate(noise_rate)
        check_range("> 0", finetune_lr=finetune_lr)
        check_range("in [0, 1]", finetune_drop=finetune_drop)
        super().__init__(num_classes, warmup_epochs=warmup_epochs, **kwargs)
        self.noise_rate, self.finetune_lr, self.finetune_drop = noise_rate, finetune_lr, finetune_drop
        self.ranked = LabelStore()

    def stages(self) -> list[Stage]:
        """Return the stage of nested dropout and that of Co-teaching."""
        factor = partial(step_fractions, fractions=(self.finetune_drop,), factors=(0.1,))
        finetune = Stage("finetune", lr=self.finetune_lr, factor=factor, frozen=tuple(self.norms))
        (warmup,) = super().stages()
        return [replace(warmup, name="warmup", epochs=self.warmup_epochs), finetune]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the sum of the losses of both networks."""
        if self.stage.name == "warmup":
            return super().training_step(batch, batch_idx)
        batch, index = self.indexed(batch)
        self.prepare_step(common=True)
        halves = batch.chunk(2) if len(index) > 1 else [batch, batch]
        losses = []
        for number, half in enumerate(halves):
            with inference_context(self.networks[number], half.images):
                ranked = soft_cross_entropy(self.networks[number](half.images), self.one_hot(half.labels)).argsort()
            count = len(ranked)
            half = half.take(ranked[: max(1, int((1 - self.noise_rate) * count + 1e-6))])
            quality = 1 - torch.arange(count, device=index.device) / max(1, count - 1)
            self.ranked.write("given_quality", halves[number].index[ranked], quality)
            out = self.learn(half, self.one_hot(half.labels), 1 - number, quality=quality[: len(half.labels)])
            losses.append(out.cross_entropy())
        return torch.stack(losses).sum()
