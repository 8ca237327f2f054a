"""SMP, self-learning with multiple prototypes (Han, Luo and Wang, ICCV 2019)."""

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F

from sanm_lightning.callbacks import Stage
from sanm_lightning.functional import class_prototypes
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.checks import check_range
from sanm_lightning.per_sample import LabelStore
from sanm_lightning.random_streams import named_generator

__all__ = ["SMP"]


class SMP(NoisyLabelModule):
    """Cross-entropy with the given label and with the class of the most similar prototypes.

    Source: Han et al., ICCV 2019, Eq. 1 to 7. No code was released. After the first stage, at the start of every epoch,
    prototypes of each class are selected among ``samples`` random members of the class: up to ``prototypes`` of them, of
    highest density, that are less similar than ``max_similarity`` to denser ones. The second label of a sample is the class
    with the largest mean cosine similarity to its prototypes.

    Departures: features are those of unaugmented images. The paper's weighted cross-entropy for imbalanced classes is not
    used; the data module's ``balanced`` draws balanced subsets.

    Under SANM, the target is the mixture of both labels; its quality is 1 - alpha where they differ and 1 elsewhere.

    Args:
        num_classes: C, number of classes.
        alpha: weight of the second label, in [0, 1]; published: 0.5.
        samples: m, members of each class among which prototypes are selected; published: 1280. All members of smaller classes.
        prototypes: p, largest number of prototypes of a class; published: 8.
        density_fraction: fraction of the similarities of a class above the threshold of the density, in (0, 1); published: 0.4.
        max_similarity: bound of the similarity to denser samples; published: 0.95.
        warmup_epochs: length of the first stage, with the given labels only.

    All other arguments are those of :class:`NoisyLabelModule`.

    Raises:
        ValueError: if an argument is out of its range, or batches have no index.
    """

    needs_data_module = True
    estimates_quality = True

    def __init__(
        self,
        num_classes: int,
        alpha: float = 0.5,
        samples: int = 1280,
        prototypes: int = 8,
        density_fraction: float = 0.4,
        max_similarity: float = 0.95,
        warmup_epochs: int = 1,
        **kwargs: Any,
    ) -> None:
        check_range("in [0, 1]", alpha=alpha)
        check_range(">= 1", samples=samples, prototypes=prototypes)
        check_range("in (0, 1)", density_fraction=density_fraction)
        check_range("in [-1, 1]", max_similarity=max_similarity)
        super().__init__(num_classes, warmup_epochs=warmup_epochs, **kwargs)
        self.alpha, self.samples, self.prototypes = alpha, samples, prototypes
        self.density_fraction, self.max_similarity = density_fraction, max_similarity
        self.corrected = LabelStore(dist_reduce_fx=None)

    def stages(self) -> list[Stage]:
        """Return the stage of the given labels and that of both labels."""
        return [Stage("warmup", self.warmup_epochs), Stage("correct")]

    def begin_epoch(self) -> None:
        """Select prototypes and assign second labels, after the first stage."""
        if self.stage.name == "warmup":
            return
        found = self.predict_train("features", "labels", pool_only=True)
        given, features = found["labels"], found["features"]
        self._report_small_classes(given)
        generator = named_generator("prototypes", self.sanm.seed, self.current_epoch)
        means = class_prototypes(
            features, given, self.num_classes, self.samples, self.prototypes, generator, self.density_fraction,
            self.max_similarity,
        )  # fmt: skip
        missing = given.bincount(minlength=self.num_classes) == 0
        labels = torch.cat(
            [(F.normalize(rows, dim=1) @ means.T).masked_fill(missing, -2.0).argmax(1) for rows in features.split(8192)]
        )
        quality = 1 - self.alpha * (labels != given).float()
        self.corrected.update(found["index"], labels=labels, quality=quality, given_quality=quality)

    def _report_small_classes(self, labels: Tensor) -> None:
        smallest = int(labels.bincount().clamp(max=self.samples).min())
        if smallest < self.samples and self.stage_epoch == 0:
            rank_zero_info(
                f"SMP: prototypes of classes with fewer than samples = {self.samples} members are selected among all of them "
                f"(the smallest class has {smallest})"
            )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        batch, index = self.indexed(batch)
        given = self.one_hot(batch.labels)
        if self.stage.name == "warmup":
            return self.learn(batch, given).cross_entropy()
        targets = torch.lerp(given, self.one_hot(self.corrected.labels[index]), self.alpha)
        return self.learn(batch, targets, quality=self.corrected.quality[index]).cross_entropy()
