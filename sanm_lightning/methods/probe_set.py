"""Base class of methods that use known labels of some training samples."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sanm_lightning.batch import EpochPlan, NoisyBatch
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.batches import permuted_batches
from sanm_lightning.per_sample import LabelStore

__all__ = ["WithProbeSet"]


class WithProbeSet(NoisyLabelModule):
    """Base class of methods that use known labels of some training samples, the probe set.

    A batch has samples outside of the probe set, followed by as many probe samples; see :meth:`given_and_probe`. The table
    ``samples`` has the labels, those of probe samples being the known ones, and the quality of the given labels.

    Args:
        num_classes: C, number of classes.
        probe: ``.csv`` or ``.npz`` file with the known labels: columns ``index`` (position in the original training set) or
            ``path``, and ``label``. Required.

    All other arguments are those of :class:`NoisyLabelModule`.

    Raises:
        ValueError: if ``probe`` is missing or has no training sample, or no training sample remains beside it.
        FileNotFoundError: if the probe file does not exist.
    """

    needs_data_module = True
    estimates_quality = True

    def __init__(self, num_classes: int, probe: str | None = None, **kwargs: Any) -> None:
        if not probe:
            raise ValueError(
                f"expected probe, a file with known labels of some training samples, got {probe!r}; write a .csv file with "
                "the columns index (or path) and label"
            )
        super().__init__(num_classes, **kwargs)
        self.probe = probe
        self.samples = LabelStore()

    @cached_property
    def probe_positions(self) -> Tensor:
        """(P,), positions of the probe samples in the training set; read here in trials of Lightning's finders only."""
        return self.known_labels(self.probe)[0]

    def check_training_set(self, num_samples: int, batch_size: int, world_size: int) -> None:
        """Read the probe set, and require training samples beside it."""
        self.probe_positions, known = self.known_labels(self.probe)
        if len(self.probe_positions) >= num_samples:
            raise ValueError(
                f"expected training samples beside the probe set of {type(self).__name__}, got {num_samples}, all of which are "
                f"in {self.probe!r}; remove some rows, or use a larger training set"
            )
        correct = (known == self.given_labels.cpu()[self.probe_positions]).float()
        self.samples.update(self.probe_positions, labels=known, given_quality=correct)

    def epoch_batches(self, plan: EpochPlan) -> Tensor | None:
        """Select the samples of each step, each followed by as many probe samples, both in repeated random permutations."""
        pool, probe = plan.pool(0), self.probe_positions
        pool = pool[~torch.isin(pool, probe)]
        if not len(pool):
            raise ValueError(
                f"expected samples beside the probe set in the pool of an epoch, got none in epoch {plan.epoch}; raise "
                "data.samples_per_epoch"
            )
        size = plan.step_size(pool)
        drawn = permuted_batches(plan, pool, size, self.epoch_stream(plan, "draw"))
        return torch.cat([drawn, permuted_batches(plan, probe, size, self.epoch_stream(plan, "probe set"))], 1)

    def given_and_probe(self, batch: Any) -> tuple[NoisyBatch, Tensor, NoisyBatch]:
        """Split a batch into samples with given labels, their positions (B,), and probe samples with their known labels.

        Raises:
            ValueError: if the batch has no index.
        """
        joined, index = self.indexed(batch)
        given, probe = joined.chunk(2)
        return given, index[: len(given.labels)], probe._replace(labels=self.samples.labels[probe.index])
