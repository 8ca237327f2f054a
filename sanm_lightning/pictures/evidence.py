"""What a run knows about its labels: quality, losses with their mixture, true labels."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sanm_lightning.class_names import real_names
from sanm_lightning.data.serving import ServedBatches
from sanm_lightning.functional import Mixture, fit_mixture, mixture_posterior
from sanm_lightning.methods import NoisyLabelModule
from sanm_lightning.sanm.callback import SANMCallback
from sanm_lightning.sanm.module import SANM
from sanm_lightning.sanm.quality import LabelQuality

__all__ = [
    "Losses",
    "Pass",
    "class_names",
    "known_quality",
    "losses",
    "own_data",
    "own_estimate",
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
    """(M,) bool, where it is known which labels are wrong."""


class Pass(NamedTuple):
    """What the K networks say of the training samples at the end of the training, on the CPU."""

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
    """Return which given labels are known to be wrong, (N,) bool on the CPU; None where that is not known."""
    data = getattr(trainer, "datamodule", None)
    given, true = getattr(data, "labels", None), getattr(data, "true_labels", None)
    if not isinstance(given, Tensor) or not isinstance(true, Tensor) or given.shape != true.shape:
        return None
    return (given != true).cpu()


def known_quality(pl_module: Any, parts: list[SANM]) -> tuple[Tensor | None, Tensor | None]:
    """Return the estimated quality of the training labels, and which samples it is based on.

    It is the estimate that the method uses: that of an estimator which was handed in, else the method's own, else the mean
    over the networks' estimates. The oracle's answer is not used.

    Args:
        pl_module: the module in training.
        parts: its active SANMs.

    Returns:
        Quality (N,) in [0, 1] and a mask (N,), on the CPU; None, None where quality is not known by index.
    """
    own = own_estimate(pl_module, parts)
    if own is not None:
        own = own.detach().float().cpu()
        return own, torch.ones_like(own, dtype=torch.bool)
    estimates, seen = [], []
    for part in parts:
        values = part.label_quality.values
        if values is None:
            continue
        bank = part.label_quality.bank if isinstance(part.label_quality, LabelQuality) else None
        estimates.append(values.detach().float().cpu())
        seen.append(torch.ones_like(estimates[-1]) if bank is None else bank.epochs.float().cpu())
    if not estimates:
        return None, None
    return torch.stack(estimates).mean(0), torch.stack(seen).sum(0) > 0


def own_estimate(pl_module: Any, parts: list[SANM]) -> Tensor | None:
    """Return the method's own estimate (N,), made at the beginning of an epoch; None where it has none or another counts."""
    if not isinstance(pl_module, NoisyLabelModule) or (parts and parts[0].quality == "given"):
        return None
    return pl_module.label_quality()


def recent_quality(parts: list[SANM]) -> Tensor | None:
    """Return the quality of the recent samples, whose positions are not known; None where there are none."""
    found = [part.label_quality.fitted() for part in parts if isinstance(part.label_quality, LabelQuality)]
    values = [mixture_posterior(fit.mixture, fit.evidence) for fit in found if fit is not None]
    return torch.cat(values).cpu() if values else None


def pass_over(trainer: Any, pl_module: Any) -> Pass | None:
    """Run the networks over the training set once, for losses and predicted classes. A collective.

    Returns:
        None for modules and data modules of other packages, and for networks whose classifier is not trained.
    """
    data = own_data(trainer)
    if data is None or not isinstance(pl_module, NoisyLabelModule):
        return None
    classifiers = [network.get_classifier() for network in pl_module.networks]
    if not all(any(p.requires_grad for p in classifier.parameters()) for classifier in classifiers):
        return None
    found = pl_module.predict_train("loss", "predictions", network=None)
    positions = data.epoch_pool(trainer.current_epoch).cpu().unique()
    return Pass(positions, found["loss"].cpu()[:, positions], found["predictions"].cpu()[:, positions])


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
