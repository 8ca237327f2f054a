"""Collect label quality, losses with their mixture, and true labels of a run."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sanm_lightning.class_names import real_names
from sanm_lightning.data.serving import ServedBatches
from sanm_lightning.functional import Mixture, fit_mixture, mixture_posterior
from sanm_lightning.methods import NoisyLabelModule
from sanm_lightning.sanm.callback import SANMCallback
from sanm_lightning.sanm.estimate import estimated_quality, own_estimate
from sanm_lightning.sanm.module import SANM
from sanm_lightning.sanm.quality import LabelQuality

__all__ = [
    "Losses",
    "Pass",
    "class_names",
    "known_quality",
    "losses",
    "own_data",
    "pass_over",
    "recent_quality",
    "sanms",
    "wrong_labels",
]

AXES = {
    "loss": "cross-entropy of the given label",
    "margin": "best other logit minus the label's logit",
}


class Losses(NamedTuple):
    """The evidence of one network on the training labels, and the mixture of two Gaussians fitted to it."""

    title: str
    axis: str
    values: Tensor
    """(M,), on the CPU."""
    mixture: Mixture
    wrong: Tensor | None
    """(M,), bool; None if the true labels are unknown."""


class Pass(NamedTuple):
    """Losses and predictions of K networks for the training samples at the end of training, on the CPU."""

    positions: Tensor
    """(M,), positions of the samples in the training set."""
    loss: Tensor
    """(K, M), cross-entropy of the given labels."""
    predictions: Tensor
    """(K, M), predicted classes."""


def sanms(trainer: Any, pl_module: Any) -> list[SANM]:
    """Return the active SANM of each network; empty where SANM is off."""
    if isinstance(pl_module, NoisyLabelModule):
        found = pl_module.sanms
    else:
        found = [part.sanm for part in trainer.callbacks if isinstance(part, SANMCallback)]
    return [sanm for sanm in found if sanm.enabled]


def own_data(trainer: Any) -> ServedBatches | None:
    """Return the data module, where it is one of this package and can serve any of its samples."""
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, ServedBatches) else None


def class_names(trainer: Any, pl_module: Any, num_classes: int) -> list[str]:
    """Return names of at least ``num_classes`` classes: those of the data or of the module, else the numbers."""
    data = getattr(trainer, "datamodule", None)
    for owner in (data, pl_module):
        names = real_names(getattr(owner, "class_names", None))
        if names is not None and len(names) >= num_classes:
            return names
    return [str(number) for number in range(num_classes)]


def wrong_labels(trainer: Any) -> Tensor | None:
    """Return which given labels are wrong, (N,), bool, on the CPU; None if the true labels are unknown."""
    data = getattr(trainer, "datamodule", None)
    given, true = getattr(data, "labels", None), getattr(data, "true_labels", None)
    if not isinstance(given, Tensor) or not isinstance(true, Tensor) or given.shape != true.shape:
        return None
    return (given != true).cpu()


def known_quality(pl_module: Any, parts: list[SANM]) -> tuple[Tensor | None, Tensor | None]:
    """Return the estimated quality of the training labels, and which samples it is based on.

    See :func:`~sanm_lightning.sanm.estimate.estimated_quality`; the quality of the oracle is not used.

    Args:
        pl_module: the module in training.
        parts: its active SANMs.

    Returns:
        Quality (N,) in [0, 1] and a mask (N,), on the CPU; None, None if the quality is not known by index.
    """
    quality = estimated_quality(pl_module, parts)
    if quality is None:
        return None, None
    banks = [part.label_quality.bank for part in parts if isinstance(part.label_quality, LabelQuality)]
    if not banks or own_estimate(pl_module, parts) is not None or len(banks) < len(parts):
        return quality, torch.ones_like(quality, dtype=torch.bool)
    return quality, torch.stack([bank.epochs.cpu() for bank in banks if len(bank) == len(quality)]).sum(0) > 0


def recent_quality(parts: list[SANM]) -> Tensor | None:
    """Return the quality of recent samples without positions; None if there are none."""
    found = [part.label_quality.fitted() for part in parts if isinstance(part.label_quality, LabelQuality)]
    values = [mixture_posterior(fit.mixture, fit.evidence) for fit in found if fit is not None]
    return torch.cat(values).cpu() if values else None


def pass_over(trainer: Any, pl_module: Any) -> Pass | None:
    """Run the networks over the training set once, for losses and predicted classes. Collective operation.

    Returns:
        None for modules and data modules of other packages, and for networks whose classifier is not trained.
    """
    data = own_data(trainer)
    if data is None or not isinstance(pl_module, NoisyLabelModule):
        return None
    classifiers = [network.get_classifier() for network in pl_module.networks]
    if not all(any(p.requires_grad for p in classifier.parameters()) for classifier in classifiers):
        return None
    found = pl_module.predict_train("loss", "predictions", network=None, pool_only=True)
    return Pass(found["index"].cpu(), found["loss"].cpu(), found["predictions"].cpu())


def losses(parts: list[SANM], last_pass: Pass | None, wrong: Tensor | None) -> list[Losses]:
    """Return the losses of each network: those that SANM's estimate is fitted to, else those of the last pass.

    Args:
        parts: the active SANMs.
        last_pass: of :func:`pass_over`.
        wrong: of :func:`wrong_labels`.
    """
    found = []
    for number, part in enumerate(parts):
        fit = part.label_quality.fitted() if isinstance(part.label_quality, LabelQuality) else None
        if fit is None or not isinstance(part.label_quality, LabelQuality):
            continue
        known = wrong[fit.positions] if wrong is not None and fit.positions is not None else None
        title = "Evidence of SANM's label quality" + (f", network {number + 1}" if len(parts) > 1 else "")
        axis = AXES[part.label_quality.evidence] + (
            "" if part.label_quality.history == "last" else "\n(mean over epochs)"
        )
        found.append(Losses(title, axis, fit.evidence.cpu(), Mixture(*(p.cpu() for p in fit.mixture)), known))
    if found or last_pass is None:
        return found
    for number, values in enumerate(last_pass.loss):
        title = "Loss after training (in-sample)" + (f", network {number + 1}" if len(last_pass.loss) > 1 else "")
        known = None if wrong is None else wrong[last_pass.positions]
        found.append(Losses(title, AXES["loss"], values, fit_mixture(values), known))
    return found
