"""SimCLR (Chen et al., ICML 2020): pre-training without labels, the first stage of C2D."""

from typing import Any

import torch
from torch import Tensor, nn

from sanm_lightning.batch import NoisyBatch, View
from sanm_lightning.functional import nt_xent
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.checks import check_range
from sanm_lightning.models import pooled_width

__all__ = ["SimCLR"]


class SimCLR(NoisyLabelModule):
    """Contrastive pre-training without labels.

    Source: Chen et al., ICML 2020. C2D loads the checkpoint with ``--model.pretrained FILE``. The views are those of the
    data module's policy ``simclr``: resized crop, flip, color jitter, grayscale, no blur. With several processes, every
    view is compared with the views of all processes. The classifier is not trained, so its accuracy is meaningless.

    Args:
        num_classes: C, number of classes of the classifier, which is trained later.
        temperature: temperature of the loss, positive.
        projection: P, width of the projection.
        released_scale: whether to multiply the loss by temperature / .07, as in the implementation that C2D refers to.

    All other arguments are those of :class:`NoisyLabelModule`, except ``sanm``.

    Raises:
        ValueError: if an argument is out of its range, or SANM is enabled.
    """

    needs_data_module = True
    trains_classifier = False

    def __init__(
        self,
        num_classes: int,
        temperature: float = 0.5,
        projection: int = 128,
        released_scale: bool = False,
        **kwargs: Any,
    ) -> None:
        check_range("> 0", temperature=temperature)
        check_range(">= 1", projection=projection)
        super().__init__(num_classes, **kwargs)
        if self.sanm.enabled:
            raise ValueError("expected SimCLR without SANM, since it uses no labels, got SANM; omit model.sanm")
        self.temperature, self.released_scale = temperature, released_scale
        width = pooled_width(self.network)
        self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, projection))
        for parameter in self.network.get_classifier().parameters():
            parameter.requires_grad_(False)  # unused in the loss; DDP requires a gradient of every trainable parameter

    def views(self) -> tuple[View, ...]:
        """Return two views of the policy ``simclr``."""
        return ("simclr", "simclr")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of two views of a batch."""
        batch = NoisyBatch.from_any(batch)
        features = self.network.forward_features(torch.cat(batch.views))
        projected = self.projection(self.network.forward_head(features, pre_logits=True))
        one, other = projected.chunk(2)
        if self.trainer.world_size > 1:  # gradients are propagated to the process of the view
            gathered: list[Any] = [self.all_gather(part, sync_grads=True) for part in (one, other)]
            one, other = (part.flatten(0, 1) for part in gathered)
        loss = nt_xent(one, other, self.temperature)
        return loss * (self.temperature / 0.07) if self.released_scale else loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Do nothing: the classifier is not trained."""
