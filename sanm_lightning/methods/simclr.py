"""SimCLR (Chen et al., ICML 2020): pre-training without labels, the first stage of C2D."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.methods.base import NoisyLabelModule

__all__ = ["SimCLR", "nt_xent"]


def nt_xent(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy of two views: each finds its partner among all 2 B - 1 others.

    Source: Chen et al., ICML 2020, Eq. 1.

    Args:
        one: projections of the first views, shape (B, P).
        other: of the second views of the same images, shape (B, P).
        temperature: positive.

    Returns:
        A scalar, the mean over all 2 B views.
    """
    views = F.normalize(torch.cat([one, other]).float(), dim=1)
    similarity = views @ views.T / temperature
    similarity = similarity.masked_fill(torch.eye(len(views), dtype=torch.bool, device=views.device), float("-inf"))
    partner = torch.arange(len(views), device=views.device).roll(len(one))
    return F.cross_entropy(similarity, partner)


class SimCLR(NoisyLabelModule):
    """Pre-train the network so that two views of an image are alike. No label is read.

    Source: Chen et al., ICML 2020. The checkpoint goes to C2D with ``--model.pretrained FILE``. The views are those of the data
    module's policy ``simclr``: resized crop, flip, colour jitter, grey, no blur. Under several processes every view looks for
    its partner among the views of all of them. The classifier is not trained, so accuracies in the log mean nothing.

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
            raise ValueError(
                "SimCLR reads no labels, so SANM has none to doubt; leave model.sanm out of the pre-training"
            )
        self.temperature, self.released_scale = temperature, released_scale
        width = int(self.network.num_features)
        self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, projection))
        for parameter in self.network.get_classifier().parameters():
            parameter.requires_grad_(False)  # it takes no part; DDP would wait for its gradient

    def training_step(self, batch: NoisyBatch, batch_idx: int) -> Tensor:
        """Return the loss of two views of a batch."""
        batch = NoisyBatch(*batch)
        assert batch.index is not None
        views = self.views(batch.index, self.random_stream(batch_idx), "simclr", "simclr")
        features = self.network.forward_features(torch.cat(views))
        projected = self.projection(self.network.forward_head(features, pre_logits=True))
        one, other = projected.chunk(2)
        if self.trainer.world_size > 1:  # gradients flow back to the process that made the view
            one, other = (self.all_gather(part, sync_grads=True).flatten(0, 1) for part in (one, other))  # type: ignore[union-attr]
        loss = nt_xent(one, other, self.temperature)
        return loss * (self.temperature / 0.07) if self.released_scale else loss

    def validation_step(self, batch: NoisyBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Do nothing: there is no classifier to evaluate."""
