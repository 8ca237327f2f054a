"""The label quality that SANM uses: a method's estimate, an estimator, or the true labels."""

from typing import Any

from torch import Tensor, nn

from sanm_lightning.sanm.quality import QualityEstimator
from sanm_lightning.sanm.views import Quality

__all__ = ["QualitySource"]


class QualitySource(nn.Module):
    """Base class of SANM with its label quality."""

    quality: str
    """``"estimated"``, ``"oracle"``, or ``"given"`` for an estimator configured by the user."""
    label_quality: QualityEstimator
    _out_of_range: Tensor | None = None  # whether a quality outside [0, 1] was used since the last fit

    @property
    def prefers_method_quality(self) -> bool:
        """Whether a method's estimate of label quality replaces that of SANM."""
        return self.quality == "estimated"

    def source_of_quality(
        self, targets: Tensor, index: Tensor | None = None, true_labels: Tensor | None = None
    ) -> Quality:
        """Return the ``quality`` argument of :meth:`forward`: the estimate, or the oracle quality if configured.

        Args:
            targets: given labels as class probabilities, shape (B, C).
            index: positions in the training set, shape (B,), or None.
            true_labels: true class indices, shape (B,), or None; used by the oracle only.

        Returns:
            Quality, shape (B,), or a function of the logits.

        Raises:
            ValueError: if the oracle is configured and the batch has no true labels.
        """
        if self.quality == "oracle":
            if true_labels is None:
                raise ValueError(
                    "expected batches with true_labels for quality: oracle, got none; use quality: estimated, or data "
                    "with known true labels"
                )
            return (targets.argmax(1) == true_labels).float()
        return lambda logits: self.label_quality(logits, targets, index)

    def fit_quality(self, module: Any = None) -> None:
        """Fit the estimator of label quality; call it once per epoch, in every process.

        Raises:
            ValueError: if a quality outside [0, 1] was used since the last call.
        """
        wrong, self._out_of_range = self._out_of_range, None
        if wrong is not None and bool(wrong):
            raise ValueError(
                "expected label quality in [0, 1], got values outside of it (or NaN) in the last epoch; return the "
                "probability that the given label is correct"
            )
        self.label_quality.fit(module)

    def _check_later(self, quality: Tensor) -> None:
        """Record on the device whether a quality (B,) is outside [0, 1]; on the CPU, its users raise immediately."""
        if quality.device.type != "cpu":
            bad = ~((quality >= 0) & (quality <= 1)).all()
            self._out_of_range = bad if self._out_of_range is None else self._out_of_range | bad
