"""The forward pass of a training step, with SANM, and its output for the loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sanm_lightning.batch import EpochPlan, NoisyBatch
from sanm_lightning.compat import batch_number
from sanm_lightning.functional import Mixed, masked_mean, soft_cross_entropy
from sanm_lightning.methods.checks import require_index
from sanm_lightning.methods.hooks import MethodHooks
from sanm_lightning.random_streams import named_generator, process_rank
from sanm_lightning.sanm.inference import inference_context
from sanm_lightning.sanm.module import SANM
from sanm_lightning.sanm.views import Quality

__all__ = ["Learned", "TrainingPass"]


class Learned(NamedTuple):
    """Output of :meth:`NoisyLabelModule.learn`. V is the number of views of B samples, one or several per sample."""

    logits: Tensor
    """(V, C), with gradient."""
    targets: Tensor
    """(V, C), class probabilities, mixed like the views."""
    clean_logits: Tensor | None
    """(B, C), of the unmasked, unmixed images, without gradient if masks were sampled; None if not computed."""
    features: Tensor
    """(V, D, h, w), of the views for the decoder."""
    reconstruction: Tensor
    """beta times the reconstruction loss, a scalar; 0 without SANM."""
    mixed: Mixed
    """How the views were mixed."""
    unmasked: Tensor | None = None
    """(B, D, h, w), with gradient: features of the unmasked images, mixed as the first B views; None if not requested."""

    def per_view(self, rows: Tensor) -> Tensor:
        """Repeat rows (B, ...) of the samples for all their views, (V, ...)."""
        copies = len(self.logits) // len(rows)
        return rows if copies == 1 else rows.repeat(copies, *[1] * (rows.ndim - 1))

    def unmasked_logits(self) -> Tensor:
        """Return :attr:`clean_logits` (B, C), without gradient.

        Raises:
            ValueError: if the pass mixed its images or had ``extra`` images.
        """
        if self.clean_logits is None:
            raise ValueError(
                "expected a pass without mixup and without extra images, got one without unmasked logits; call learn() without "
                "mix and extra"
            )
        return self.clean_logits.detach()

    def unmasked_maps(self) -> Tensor:
        """Return :attr:`unmasked` (B, D, h, w).

        Raises:
            ValueError: if the pass did not compute them.
        """
        if self.unmasked is None:
            raise ValueError(
                "expected a pass with features of unmasked images, got one without; call learn() with unmasked=True"
            )
        return self.unmasked

    def classification(self, weight: Tensor | None = None) -> Tensor:
        """Return the mean cross-entropy over views, weighted by ``weight`` (B,), a scalar; 0 if all weights are 0."""
        losses = soft_cross_entropy(self.logits, self.targets)
        return masked_mean(losses, None if weight is None else self.per_view(weight))

    def cross_entropy(self, weight: Tensor | None = None) -> Tensor:
        """Return :meth:`classification` plus the reconstruction term."""
        return self.classification(weight) + self.reconstruction


class TrainingPass(MethodHooks):
    """Mixin for ``training_step``: conversion of batches, random streams, and the forward pass, :meth:`learn`."""

    def indexed(self, batch: Any) -> tuple[NoisyBatch, Tensor]:
        """Convert a batch, and return the positions (B,) of its samples in the training set as well.

        Raises:
            ValueError: if the batch has no images, no labels or no index.
        """
        read = NoisyBatch.from_any(batch)
        return read, require_index(read, type(self).__name__)

    def stream(self, kind: str, *parts: int, device: torch.device | str = "cpu") -> torch.Generator:
        """Return a generator for the current step, a function of seed, process, epoch and step for exact resume."""
        step = -1 if self._trainer is None else batch_number(self.trainer)
        return named_generator(
            kind, self.sanms[0].seed, process_rank(), self.current_epoch, step, *parts, device=device
        )

    def epoch_stream(self, plan: EpochPlan, kind: str, *parts: int) -> torch.Generator:
        """Return a generator for the samples of an epoch, a function of seed and epoch; ``parts`` may add the process."""
        return named_generator(kind, self.sanms[0].seed, plan.draw_epoch, *parts)

    def learn(
        self,
        batch: NoisyBatch,
        targets: Tensor,
        network: int = 0,
        quality: Tensor | None = None,
        features: Tensor | None = None,
        mix: Callable[[Tensor, Tensor], Mixed] | None = None,
        extra: tuple[Tensor, Tensor] | None = None,
        unmasked: bool = False,
    ) -> Learned:
        """Run a network on the batch, with masked images and regularized targets under SANM, and optional mixing.

        Source: Algorithm 1 of SANM, steps 3 to 10. Evidence of the unmasked images is recorded for SANM's label quality.

        Args:
            batch: B samples with the training ``images``.
            targets: class probabilities, shape (B, C).
            network: number of the network.
            quality: the method's estimate of label quality, shape (B,), in [0, 1]; an estimator configured by the user
                overrides it.
            features: features of the unmasked images, shape (B, D, h, w), if the method has computed them.
            mix: function that mixes (images, targets), such as :func:`~sanm_lightning.functional.mixup`. The decoder
                then uses a separate forward pass on the unmixed views.
            extra: additional images (k B, C, H, W) and targets that are not masked; they precede the views.
            unmasked: whether to return features of the unmasked images, for losses that do not use masks; without masks,
                these are the features of the pass, otherwise they require another one. Not with ``extra``.

        Returns:
            Logits, targets, features and reconstruction term of the pass.
        """
        net, sanm, judge = self.networks[network], self.sanms[network], self.sanms[network - 1]
        known = self._quality(judge, batch, targets, quality)
        generator = self.stream("mask", network, device=batch.images.device)
        views = sanm(net, batch.images, targets, known, features, generator)
        images, wanted, clean = views.images, views.targets, views.logits
        evidence = sanm.enabled and (not self.estimates_quality or sanm.quality == "given")
        unmixed = mix is None and extra is None
        if evidence and clean is None and not unmixed and sanm.label_quality.needs_evidence:
            with inference_context(net, batch.images, sanm.batch_statistics):
                clean = net(batch.images)
        if extra is not None:
            images, wanted = torch.cat([extra[0], images]), torch.cat([extra[1], wanted])
        mixed = Mixed(images, wanted, 1.0, torch.arange(0)) if mix is None else mix(images, wanted)
        maps = net.forward_features(mixed.images)
        logits = net.forward_head(maps)
        plain = None
        if unmasked:
            seen = len(views.images) == len(batch.images) and (views.box is None or not sanm.hides_images)
            again = mixed.of_samples(len(batch.images))
            plain = maps if seen else net.forward_features(again.mix(batch.images) if again.lam < 1 else batch.images)
        clean = views.unmasked(logits) if unmixed else clean
        if evidence and clean is not None:
            sanm.label_quality.update(clean, targets, batch.index, views.features)
        if not unmixed and views.masked and sanm.reconstruct:  # the decoder uses unmixed, masked views only
            maps = net.forward_features(views.images)
        reconstruction = sanm.reconstruction(maps, batch.images, views)
        return Learned(logits, mixed.targets, clean, maps, reconstruction, mixed, plain)

    def _quality(self, judge: SANM, batch: NoisyBatch, targets: Tensor, estimate: Tensor | None) -> Quality:
        """Return the ``quality`` argument of SANM; None before the first mask."""
        if not self.sanms[0].masking(self.current_epoch, self.warmup_epochs):
            return None
        if self.estimates_quality and (estimate is None or judge.prefers_method_quality):
            return estimate  # None in the method's warm-up, when nothing is masked
        return judge.source_of_quality(targets, batch.index, batch.true_labels)
