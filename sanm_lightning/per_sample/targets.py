"""Averaged, corrected and learned labels and targets of each sample."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sanm_lightning.per_sample.state import Reduction, SampleState

__all__ = [
    "Candidates",
    "EMATargets",
    "LabelStore",
    "LearnableTargets",
    "NoiseRateStore",
    "Refurbished",
    "WeightedLabels",
]


class EMATargets(SampleState):
    """Running mean of the class probabilities of each sample, updated in every step (ELR, Liu et al., NeurIPS 2020).

    Args:
        num_classes: C, number of classes.
        decay: weight of the old row in an update, in [0, 1).

    Raises:
        ValueError: if ``decay`` is out of its range.
    """

    value: Tensor
    """(N, C) float32; zeros for samples without updates."""

    def __init__(self, num_classes: int, decay: float) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"expected decay in [0, 1), got {decay}")
        self.decay = decay
        self.add_state("value", (num_classes,))

    @torch.no_grad()
    def update(self, index: Tensor, probs: Tensor) -> Tensor:
        """Update the rows ``index`` (B,) with ``probs`` (B, C), without communication; return the new rows (B, C)."""
        self.check(index)
        rows = self.decay * self.value[index] + (1 - self.decay) * probs.float()
        self.write("value", index, rows)
        return rows

    def upgrade_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Convert the three tables of an earlier version."""
        return {
            "tables": {"value": state["value"]},
            "written": {"value": state["touched"]},
            "start": {"value": state["start"]},
        }


class LabelStore(SampleState):
    """Current label of each sample, and quality of the current and of the given label.

    Args:
        num_classes: C, number of classes of the table of soft targets; None creates no such table.
        dist_reduce_fx: as for :meth:`SampleState.add_state`; None if every process writes the same values.
    """

    labels: Tensor
    """(N,) int64: given or corrected labels."""
    selected: Tensor
    """(N,) bool: whether the sample is selected for training."""
    quality: Tensor
    """(N,) float32 in [0, 1]: quality of ``labels``."""
    given_quality: Tensor
    """(N,) float32 in [0, 1]: quality of the given labels."""
    targets: Tensor
    """(N, C) float32: soft labels, with ``num_classes`` only."""

    def __init__(self, num_classes: int | None = None, dist_reduce_fx: Reduction = "mean") -> None:
        super().__init__()
        self.filled = False
        self.num_classes = num_classes
        self.add_state("labels", dtype=torch.int64, dist_reduce_fx=dist_reduce_fx)
        self.add_state("selected", dtype=torch.bool, default=1, dist_reduce_fx=dist_reduce_fx)
        self.add_state("quality", default=1.0, dist_reduce_fx=dist_reduce_fx)
        self.add_state("given_quality", default=1.0, dist_reduce_fx=dist_reduce_fx)
        if num_classes is not None:
            self.add_state("targets", (num_classes,), dist_reduce_fx=dist_reduce_fx)

    def reset(self, num_samples: int, labels: Tensor | None = None) -> None:
        """Reset to the given labels, all selected and with quality 1."""
        super().reset(num_samples)
        self.filled = False
        if labels is not None:
            self.labels = labels.to(self.labels).clone()
            if self.num_classes is not None:
                self.targets = F.one_hot(self.labels, self.num_classes).float()

    def update(self, index: Tensor | None = None, **tables: Tensor) -> None:
        """Replace the rows ``index`` (B,) of tables, or whole tables, with rows that are the same in all processes."""
        for name, rows in tables.items():
            old = getattr(self, name)
            new = rows.to(old.device, old.dtype)
            setattr(self, name, new.clone() if index is None else old.index_copy(0, index.to(old.device), new))
        self.filled = True

    def write(self, name: str, index: Tensor, rows: Tensor) -> None:
        """Set rows of a table, see :meth:`SampleState.write`."""
        super().write(name, index, rows)
        self.filled = True

    def get_extra_state(self) -> dict[str, Any]:
        """Return the tables, and whether they were written."""
        return {**super().get_extra_state(), "filled": self.filled}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore a state; states of an earlier version count as filled if they have rows."""
        super().set_extra_state(state)
        self.filled = bool(state.get("filled", len(state.get("labels", ())) > 0))


class NoiseRateStore(LabelStore):
    """A :class:`LabelStore` of a method that changes the noise rate in training.

    Args:
        noise_rate: initial fraction of wrong labels, in [0, 1].
        dist_reduce_fx: as for :class:`LabelStore`.
    """

    def __init__(self, noise_rate: float, dist_reduce_fx: Reduction = "mean") -> None:
        super().__init__(dist_reduce_fx=dist_reduce_fx)
        self.noise_rate = noise_rate

    def get_extra_state(self) -> dict[str, Any]:
        """Return the tables and the noise rate."""
        return {**super().get_extra_state(), "noise_rate": self.noise_rate}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        super().set_extra_state(state)
        self.noise_rate = float(state.get("noise_rate", self.noise_rate))


class Candidates(NoiseRateStore):
    """Which samples are candidates, selected or discarded (INCV, Chen et al., ICML 2019); the same in all processes.

    Args:
        noise_rate: fraction of wrong labels; 0 before it is estimated.
    """

    CANDIDATE, SELECTED, DISCARDED = 0, 1, 2
    status: Tensor
    """(N,) int64: one of the three."""

    def __init__(self, noise_rate: float) -> None:
        super().__init__(noise_rate, dist_reduce_fx=None)
        self.add_state("status", dtype=torch.int64, dist_reduce_fx=None)

    def divide(self, index: Tensor, selected: Tensor, discarded: Tensor, judged: Tensor, quality: Tensor) -> None:
        """Select and discard samples after a round.

        Args:
            index: positions of the samples, shape (M,), the same in all processes.
            selected: samples that are selected from now on, shape (M,), bool; others are kept as they are.
            discarded: samples that are discarded, shape (M,), bool, unless they are in ``selected``.
            judged: samples with a new quality of their given label, shape (M,), bool.
            quality: the new qualities, in order, in [0, 1]; selected samples have 1.
        """
        status = torch.where(discarded, self.DISCARDED, self.status[index])
        status = torch.where(selected, self.SELECTED, status)
        given_quality = self.given_quality[index].index_put((judged,), quality)
        self.update(index, status=status, given_quality=torch.where(status == self.SELECTED, 1.0, given_quality))


class Refurbished(NoiseRateStore):
    """Labels that were replaced, and the noise rate of the current run (SELFIE, Song et al., ICML 2019).

    Args:
        noise_rate: fraction of each batch that is not selected by its loss.
    """

    replaced: Tensor
    """(N,) bool: whether the given label was replaced."""

    def __init__(self, noise_rate: float) -> None:
        super().__init__(noise_rate)
        self.add_state("replaced", dtype=torch.bool)

    def restart(self) -> None:
        """Lower the noise rate to the fraction of labels that were not replaced, for a run that starts from these labels."""
        self.noise_rate = min(self.noise_rate, 1 - float(self.replaced.float().mean()))

    def record(self, index: Tensor, given: Tensor, labels: Tensor, replaced: Tensor, quality: Tensor) -> None:
        """Record the labels of a step and their quality, (B,) each; the quality of given labels that were replaced is 0."""
        self.write("labels", index, labels)
        self.write("replaced", index, replaced)
        self.write("quality", index, quality)
        self.write("given_quality", index, torch.where(labels == given, quality, 0.0))


class WeightedLabels(LabelStore):
    """Current labels with their weights in the loss (CREMA, Zhang et al., ECCV Workshops 2022); the same in all processes."""

    weight: Tensor
    """(N,) float32 in [0, 1]."""

    def __init__(self) -> None:
        super().__init__(dist_reduce_fx=None)
        self.add_state("weight", default=1.0, dist_reduce_fx=None)


class LearnableTargets(SampleState):
    """Label logits of each sample that are trained with the network, by gradient descent (PENCIL).

    Args:
        num_classes: C, number of classes.
        scale: initial logit of the given label; the others are 0.
    """

    logits: Tensor
    """(N, C) float32."""

    def __init__(self, num_classes: int, scale: float = 10.0) -> None:
        super().__init__()
        self.num_classes, self.scale = num_classes, scale
        self.add_state("logits", (num_classes,))
        self._leaf: Tensor | None = None

    def reset(self, num_samples: int, labels: Tensor | None = None) -> None:
        """Reset to the given labels: ``scale`` times their one-hot rows."""
        super().reset(num_samples)
        if labels is not None:
            self.logits = self.scale * F.one_hot(labels, self.num_classes).to(self.logits)

    def forward(self, index: Tensor) -> Tensor:
        """Return the logits (B, C) of samples ``index`` (B,), as a leaf tensor with gradient."""
        self._leaf = self.logits[index].clone().requires_grad_()
        return self._leaf

    def sgd_step(self, index: Tensor, lr: float) -> None:
        """Apply a gradient step to the rows of the last :meth:`forward`, once the gradient of its result is known.

        Args:
            index: positions in the training set, shape (B,), as in the last :meth:`forward`.
            lr: learning rate.
        """
        if self._leaf is not None and self._leaf.grad is not None:
            self.write("logits", index, self._leaf.detach() - lr * self._leaf.grad)
        self._leaf = None
