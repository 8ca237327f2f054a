"""M-correction (Arazo et al., ICML 2019): bootstrapping weighted by a Beta mixture of the losses, with mixup."""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.callbacks import Stage
from sanm_lightning.functional import bootstrapped, guided_mixup, mixup, prior_kl, soft_cross_entropy, temperature_ramp
from sanm_lightning.functional.beta_mixture import BetaMixture, beta_mixture_posterior, fit_beta_mixture
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.checks import check_choice, check_range
from sanm_lightning.per_sample import LabelStore
from sanm_lightning.sanm.inference import infer

__all__ = ["MCorrection"]


class MCorrection(NoisyLabelModule):
    """Mixup with targets between the given label and the prediction, by the probability that the label is wrong.

    Source: Arazo et al., ICML 2019, Eq. 9 to 13, and the authors' code. The first stage is mixup. Then, before every epoch, a
    Beta mixture is fitted to the losses of all samples; the prediction is that for the unmixed image.

    As in the code, batch norm uses batch statistics for the predictions, and running statistics for the losses, in a pass of
    their own, as for the fit of the mixture.

    Departures: without two components, no label counts as wrong, where the code may count all as wrong; dropout, which the
    networks of the paper do not have, is off in predictions.

    Under SANM, masked views are mixed; label quality is the posterior probability that the given label is correct.

    Args:
        num_classes: C, number of classes.
        bootstrap: ``"hard"`` (M-DYR-H): mixup, and the predicted class. ``"soft_to_hard"`` (MD-DYR-SH): images are mixed in
            proportion to their label quality, and predictions are sharpened, after a stage with the given labels.
        alpha: parameter of mixup's Beta distribution, >= 0; published: 32.
        regularization: weight of the divergence of the mean prediction from the uniform prior, >= 0; published: 1.
        guided_epochs: with ``soft_to_hard``, length of the second stage; published: 5.
        temperature_epochs: with ``soft_to_hard``, epochs over which the temperature falls from 1 to 0.001; published: 89.
        tracking_view: policy of the images whose losses are fitted: ``"none"``; ``"weak"`` in the code.
        mixture_iterations: number of iterations of the fit.
        batch_statistics: whether a further pass predicts with batch statistics, which update the running statistics, as in
            the code; otherwise, the predictions are those of the pass that computes the losses.
        warmup_epochs: length of the first stage; published: 105.

    All other arguments are those of :class:`NoisyLabelModule`.

    Raises:
        ValueError: if an argument is out of its range.
    """

    needs_data_module = True
    estimates_quality = True
    mixture: BetaMixture
    """Mixture of the losses, fitted at the start of the epoch."""

    def __init__(
        self,
        num_classes: int,
        bootstrap: Literal["hard", "soft_to_hard"] = "hard",
        alpha: float = 32.0,
        regularization: float = 1.0,
        guided_epochs: int = 5,
        temperature_epochs: int = 89,
        tracking_view: str = "none",
        mixture_iterations: int = 10,
        batch_statistics: bool = True,
        warmup_epochs: int = 105,
        **kwargs: Any,
    ) -> None:
        check_choice(("hard", "soft_to_hard"), bootstrap=bootstrap)
        check_range(">= 0", alpha=alpha, regularization=regularization, guided_epochs=guided_epochs)
        check_range(">= 1", temperature_epochs=temperature_epochs, mixture_iterations=mixture_iterations)
        super().__init__(num_classes, warmup_epochs=warmup_epochs, **kwargs)
        self.bootstrap, self.alpha, self.regularization = bootstrap, alpha, regularization
        self.guided_epochs, self.temperature_epochs = guided_epochs, temperature_epochs
        self.tracking_view, self.mixture_iterations = tracking_view, mixture_iterations
        self.batch_statistics = batch_statistics
        self.judged = LabelStore(dist_reduce_fx=None)
        self.register_state("mixture", fit_beta_mixture(torch.zeros(0)), cast=False)

    def stages(self) -> list[Stage]:
        """Return the stages of mixup, of guided mixup if there is one, and of bootstrapping."""
        guided = [Stage("guided", self.guided_epochs)] if self.bootstrap == "soft_to_hard" else []
        return [Stage("warmup", self.warmup_epochs), *guided, Stage("bootstrap")]

    def begin_epoch(self) -> None:
        """Fit the mixture to the losses of the epoch's samples, after the first stage."""
        if self.stage.name == "warmup":
            return
        found = self.predict_train("loss", view=self.tracking_view, pool_only=True)
        self.mixture = fit_beta_mixture(found["loss"], max_iter=self.mixture_iterations)
        self.judged.update(found["index"], given_quality=1 - beta_mixture_posterior(self.mixture, found["loss"]))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        batch = NoisyBatch.from_any(batch)
        labels = self.one_hot(batch.labels)
        mix: Any = partial(mixup, generator=self.stream("mixup"), alpha=self.alpha, larger_half=False)
        if self.stage.name == "warmup":
            return self.learn(batch, labels, mix=mix).cross_entropy()
        apart = self.batch_statistics and self.stage.name == "bootstrap"  # the guided stage needs losses only
        maps, logits = infer(self.network, batch.images, batch_statistics=apart, update_statistics=apart)
        judged = infer(self.network, batch.images)[1] if apart else logits
        quality = 1 - beta_mixture_posterior(self.mixture, soft_cross_entropy(judged, labels)).clamp(1e-4, 1 - 1e-4)
        guided = partial(guided_mixup, quality=quality, generator=self.stream("mixup", 1))
        if self.stage.name == "guided":
            mix = partial(guided, lam=mix(logits[:0], logits[:0]).lam)  # the weight of the targets is that of mixup
            return self.learn(batch, labels, quality=quality, features=maps, mix=mix).cross_entropy()
        temperature = None
        if self.bootstrap == "soft_to_hard":
            mix, temperature = guided, temperature_ramp(self.stage_epoch, self.temperature_epochs)
        targets = bootstrapped(labels, logits, quality, temperature)
        out = self.learn(batch, targets, quality=quality, features=maps, mix=mix)
        return out.cross_entropy() + self.regularization * prior_kl(out.logits)
