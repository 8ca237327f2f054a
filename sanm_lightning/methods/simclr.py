"""SimCLR (Chen et al., ICML 2020): pre-training without labels, the first stage of C2D."""

from typing import Any

import torch
from torch import Tensor, nn

from sanm_lightning.batch import NoisyBatch, View
from sanm_lightning.functional import nt_xent
from sanm_lightning.methods.base import NoisyLabelModule

__all__ = ["SimCLR"]


class SimCLR(NoisyLabelModule):
    """Pre-train the network so that two views of an image are alike. No label is read.

    Source: Chen et al., ICML 2020. The checkpoint goes to C2D with ``--model.pretrained FILE``. The views are those of the data
    module's policy ``simclr``: resized crop, flip, color jitter, gray, no blur. Under several processes every view is compared
    with the views of all of them. The classifier is not trained, so accuracies in the log mean nothing.

    Args:
        num_classes: C, of the classifier that a later stage trains.
        temperature: of the loss, positive.
        projection: P, width of the projection.
        released_scale: multiply the loss by temperature / .07, as the implementation does that C2D names.

    All other arguments are those of :class:`NoisyLabelModule`, but ``sanm``.

    Raises:
        ValueError: if an argument is out of its range, or SANM is laid over it.
    """

    needs_data_module = True
    reads_labels = False

    def __init__(
        self,
        num_classes: int,
        temperature: float = 0.5,
        projection: int = 128,
        released_scale: bool = False,
        **kwargs: Any,
    ) -> None:
        if temperature <= 0 or projection < 1:
            raise ValueError(f"expected temperature > 0 and projection >= 1, got {temperature} and {projection}")
        super().__init__(num_classes, **kwargs)
        if self.sanm.enabled:
            raise ValueError("expected SimCLR without SANM, since it reads no labels; leave model.sanm out")
        self.temperature, self.released_scale = temperature, released_scale
        width = int(self.network.num_features)
        self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, projection))
        for parameter in self.network.get_classifier().parameters():
            parameter.requires_grad_(False)  # it takes no part; DDP would wait for its gradient

    def views(self) -> tuple[View, ...]:
        """Return two views of the policy ``simclr``."""
        return ("simclr", "simclr")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of two views of a batch."""
        batch = NoisyBatch.from_any(batch)
        features = self.network.forward_features(torch.cat(batch.views))
        projected = self.projection(self.network.forward_head(features, pre_logits=True))
        one, other = projected.chunk(2)
        if self.trainer.world_size > 1:  # gradients flow back to the process that made the view
            gathered: list[Any] = [self.all_gather(part, sync_grads=True) for part in (one, other)]
            one, other = (part.flatten(0, 1) for part in gathered)
        loss = nt_xent(one, other, self.temperature)
        return loss * (self.temperature / 0.07) if self.released_scale else loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Do nothing: there is no classifier to evaluate."""
