"""Labels and targets of each sample: averaged, corrected, learned."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sanm_lightning.per_sample.state import Reduction, SampleState

__all__ = ["EMATargets", "LabelStore", "LearnableTargets"]


class EMATargets(SampleState):
    """A running mean of the class probabilities of each sample, updated at once (ELR, Liu et al., NeurIPS 2020).

    Args:
        num_classes: C.
        decay: fraction of the old row that stays at an update, in [0, 1).

    Raises:
        ValueError: if ``decay`` is out of its range.
    """

    value: Tensor
    """(N, C) float32; zeros where a sample was never seen."""

    def __init__(self, num_classes: int, decay: float) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"expected a decay in [0, 1), got {decay}")
        self.decay = decay
        self.add_state("value", (num_classes,))

    @torch.no_grad()
    def update(self, index: Tensor, probs: Tensor) -> Tensor:
        """Move the rows ``index`` (B,) towards ``probs`` (B, C) and return the new rows (B, C). Local, no communication."""
        self.check(index)
        rows = self.decay * self.value[index] + (1 - self.decay) * probs.float()
        self.write("value", index, rows)
        return rows

    def upgrade_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Read the three tables of the earlier version."""
        return {
            "tables": {"value": state["value"]},
            "written": {"value": state["touched"]},
            "start": {"value": state["start"]},
        }


class LabelStore(SampleState):
    """The label that a method believes of each sample, and what it thinks of the given one.

    Args:
        num_classes: C, for tables of soft targets; None keeps no such table.
        dist_reduce_fx: as for :meth:`SampleState.add_state`; None where every process writes the same.
    """

    labels: Tensor
    """(N,) int64: given labels, or corrected ones."""
    selected: Tensor
    """(N,) bool: whether the method learns from the label."""
    quality: Tensor
    """(N,) float32 in [0, 1]: quality of ``labels``."""
    given_quality: Tensor
    """(N,) float32 in [0, 1]: quality of the given labels."""
    targets: Tensor
    """(N, C) float32: soft labels, where the store has them."""

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
        """Start from the given labels, all of them selected and trusted."""
        super().reset(num_samples)
        self.filled = False
        if labels is not None:
            self.labels = labels.to(self.labels).clone()
            if self.num_classes is not None:
                self.targets = F.one_hot(self.labels, self.num_classes).float()

    def update(self, **tables: Tensor) -> None:
        """Replace whole tables, each of N rows, which must be the same in all processes."""
        for name, rows in tables.items():
            old = getattr(self, name)
            setattr(self, name, rows.to(old.device, old.dtype).clone())
        self.filled = True

    def get_extra_state(self) -> dict[str, Any]:
        """Return the tables, and whether a method has filled them."""
        return {**super().get_extra_state(), "filled": self.filled}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over a state; one of the earlier version was filled where it has rows."""
        super().set_extra_state(state)
        self.filled = bool(state.get("filled", len(state.get("labels", ())) > 0))


class LearnableTargets(SampleState):
    """Label logits of each sample that are learned with the network, by plain gradient descent (PENCIL).

    Args:
        num_classes: C.
        scale: logit of the given label at the start; the others are 0.
    """

    logits: Tensor
    """(N, C) float32."""

    def __init__(self, num_classes: int, scale: float = 10.0) -> None:
        super().__init__()
        self.num_classes, self.scale = num_classes, scale
        self.add_state("logits", (num_classes,))
        self._leaf: Tensor | None = None

    def reset(self, num_samples: int, labels: Tensor | None = None) -> None:
        """Start from the given labels: ``scale`` times their one-hot rows."""
        super().reset(num_samples)
        if labels is not None:
            self.logits = self.scale * F.one_hot(labels, self.num_classes).to(self.logits)

    def forward(self, index: Tensor) -> Tensor:
        """Return the logits of a batch, index (B,) -> (B, C), as a leaf that takes a gradient."""
        self._leaf = self.logits[index].clone().requires_grad_()
        return self._leaf

    def sgd_step(self, index: Tensor, lr: float) -> None:
        """Move the rows of the last :meth:`forward` against the gradient that they got; after the backward pass.

        Args:
            index: positions in the training set, shape (B,), as in that forward.
            lr: learning rate.
        """
        if self._leaf is not None and self._leaf.grad is not None:
            self.write("logits", index, self._leaf.detach() - lr * self._leaf.grad)
        self._leaf = None
