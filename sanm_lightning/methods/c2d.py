"""C2D (Zheltonozhskii et al., WACV 2022): DivideMix with self-supervised pre-training."""

from typing import Any

from sanm_lightning.methods.dividemix import DivideMix
from sanm_lightning.methods.encoder import load_encoder

__all__ = ["C2D"]


class C2D(DivideMix):
    """DivideMix after self-supervised pre-training: both networks have the same initial weights and different heads.

    Source: Zheltonozhskii et al., "Contrast to Divide", WACV 2022, and its code. It differs from DivideMix in a short
    warm-up (5 epochs) with gradients clipped to norm 1, a mixture of up to 200 iterations, and a threshold clipped to
    the range of the probabilities. Departures: as for :class:`DivideMix`; and losses are kept from the end of the
    warm-up on, where the code also keeps those of the warm-up.

    Args:
        num_classes: C, number of classes.
        pretrained: file of the pre-trained encoder: a checkpoint of ``SimCLR``, or a third-party checkpoint (see
            :func:`sanm_lightning.models.load_weights`). Required to start training, but not to resume a run or to load
            a checkpoint.
        warmup_epochs: epochs of cross-entropy.
        clip_threshold: as for DivideMix.
        mixture_iterations: as for DivideMix.
        warmup_clip: as for DivideMix.
        skip_unlabelled: as for DivideMix.

    All other arguments are those of :class:`DivideMix`.

    Raises:
        ValueError: if training starts without ``pretrained``, or the file does not contain all tensors of the network
            except its classifier.
    """

    def __init__(
        self,
        num_classes: int,
        pretrained: str | None = None,
        warmup_epochs: int = 5,
        clip_threshold: bool = True,
        mixture_iterations: int = 200,
        warmup_clip: float | None = 1.0,
        skip_unlabelled: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_classes,
            warmup_epochs=warmup_epochs,
            clip_threshold=clip_threshold,
            mixture_iterations=mixture_iterations,
            warmup_clip=warmup_clip,
            skip_unlabelled=skip_unlabelled,
            **kwargs,
        )
        self.pretrained = pretrained

    def setup(self, stage: str) -> None:
        """Load the pre-trained encoder into both networks, unless the run is resumed."""
        if stage == "fit":
            load_encoder(self, self.pretrained)
