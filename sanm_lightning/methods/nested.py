"""Nested (Chen et al., CVPR Workshops 2021): ordered dropout of features."""

from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.callbacks import Stage, Unaveraged
from sanm_lightning.callbacks.broadcast import share_state
from sanm_lightning.functional import nested_probabilities, step_ramp, truncated_accuracy
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.checks import check_range, require
from sanm_lightning.models import pooled_width

__all__ = ["Nested", "NestedDropout"]


class NestedDropout(Unaveraged):
    """Zero all but the first features of a classifier's input; a pre-hook of the classifier.

    Args:
        width: D, number of features.
        sigma: width of the distribution of the number of features in training; None keeps all.
        kept: number of features outside of training.
    """

    kept: Tensor
    """Number of features outside of training, a scalar, int64."""
    drawn: Tensor
    """Number of features of the current training step, a scalar, int64."""

    def __init__(self, width: int, sigma: float | None, kept: int) -> None:
        super().__init__()
        self.probabilities = None if sigma is None else nested_probabilities(width, sigma)
        self.register_state("kept", torch.tensor(kept))
        self.register_buffer("drawn", torch.tensor(width), persistent=False)

    def draw(self, generator: torch.Generator) -> None:
        """Sample the number of features of a training step, with a generator on the CPU."""
        if self.probabilities is not None:
            self.drawn.fill_(1 + int(torch.multinomial(self.probabilities, 1, generator=generator)))

    def forward(self, classifier: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        """Return the truncated input of the classifier, (B, D)."""
        (features,) = inputs
        count = self.drawn if classifier.training else self.kept
        used = torch.arange(features.shape[1], device=features.device) < count
        return features * used.to(features.dtype).view(1, -1, *[1] * (features.ndim - 2))


class ChooseFeatures(L.Callback):
    """Choose K at every validation of a fit, by the best accuracy on the validation split, less 1e-5 per feature."""

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Predict the validation split and choose K. A collective operation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and pl_module.has_val_split:
            pl_module.choose_num_features()


class Nested(NoisyLabelModule):
    """Cross-entropy with nested dropout: in each step, the classifier sees the first k features only, with a random k.

    Source: Chen et al., CVPR Workshops 2021, and the authors' code. k is sampled with probabilities proportional to
    exp(-(k / sigma)^2). Predictions use the first K features, where K has the best accuracy on the validation split, chosen
    at every validation; with ``WeightAveraging``, for the weights of the current step.

    Departures: the validation split has noisy labels, where the code uses clean ones (for Animal-10N, the test set). Without
    a validation split, K is sigma. The classifier keeps its bias.

    Under SANM, images are masked before, features after the pooling. Label quality is the mixture on the losses of the
    predictions with K features, before the first mask on those with k features, and the activation map is that of these
    predictions.

    Args:
        num_classes: C, number of classes.
        sigma: width of the distribution of k in features, positive; published: 10 on CIFAR-10, 100 on CIFAR-100, Clothing1M
            and Animal-10N. None keeps all features, which is the plain network.
        num_features: K; None chooses it.
        lr_warmup_steps: steps over which the learning rate increases from 0; published: 6000.
        freeze_batch_norm: whether batch norm uses running statistics and is not trained; published: for Clothing1M.

    All other arguments are those of :class:`NoisyLabelModule`; ``warmup_epochs`` affects SANM only.

    Raises:
        ValueError: if an argument is out of its range, or the network has no linear classifier.
    """

    def __init__(
        self,
        num_classes: int,
        sigma: float | None = 10.0,
        num_features: int | None = None,
        lr_warmup_steps: int = 0,
        freeze_batch_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        check_range("> 0 or null", sigma=sigma)
        check_range(">= 0", lr_warmup_steps=lr_warmup_steps)
        super().__init__(num_classes, **kwargs)
        width = pooled_width(self.network)
        possible = num_features is None or 1 <= num_features <= width
        require(possible, f"num_features in 1 to {width}", num_features, "use null to choose it")
        self.lr_warmup_steps, self.freeze_batch_norm = lr_warmup_steps, freeze_batch_norm
        kept = num_features or (width if sigma is None else max(1, round(min(sigma, width))))
        self.choose_features = num_features is None and sigma is not None
        self.norms = [name for name, part in self.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        self.dropouts: Any = nn.ModuleList([NestedDropout(width, sigma, kept) for _ in self.networks])
        for network, sanm, dropout in zip(self.networks, self.sanms, self.dropouts, strict=True):
            classifier = network.get_classifier()
            if not isinstance(classifier, nn.Linear) or classifier.in_features != width:
                raise ValueError(
                    f"expected a network with a linear classifier on {width} features for {type(self).__name__}, got "
                    f"{type(classifier).__name__}; use another network, such as resnet18"
                )
            classifier.register_forward_pre_hook(dropout)
            sanm.build(network, self.image_size)  # the map of the truncated logits

    def standalone_networks(self) -> list[Any]:
        """Return copies of the networks whose classifiers have weight 0 for all but the first K features."""
        copies = super().standalone_networks()
        for network, dropout in zip(copies, self.dropouts, strict=True):
            network.get_classifier().weight.data[:, int(dropout.kept) :] = 0
        return copies

    def stages(self) -> list[Stage]:
        """Return the stage of nested dropout on all samples."""
        length = self.lr_warmup_steps
        ramp = partial(step_ramp, steps=length, length=length) if length else None
        return [Stage("train", ramp=ramp, frozen=tuple(self.norms) if self.freeze_batch_norm else ())]

    def _own_callbacks(self) -> list[Any]:
        return [*super()._own_callbacks(), *([ChooseFeatures()] if self.choose_features else [])]

    def choose_num_features(self) -> None:
        """Set K to the number of features with the best accuracy on the validation split, less 1e-5 per feature."""
        found = self.predict_val("features", "labels", network=None)
        classifiers = [network.get_classifier() for network in self.networks]
        weight = torch.stack([part.weight for part in classifiers]).detach()
        bias = sum(0.0 if part.bias is None else part.bias.detach() for part in classifiers)
        accuracy = truncated_accuracy(found["features"], weight, bias, found["labels"])
        best = (accuracy - 1e-5 * torch.arange(len(accuracy), device=accuracy.device)).argmax() + 1
        for dropout in self.dropouts:
            dropout.kept.copy_(best)
        share_state(self)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the sum of the losses of all networks."""
        batch = NoisyBatch.from_any(batch)
        self.prepare_step()
        outs = [self.learn(batch, self.one_hot(batch.labels), number) for number in range(self.num_networks)]
        return torch.stack([out.cross_entropy() for out in outs]).sum()

    def prepare_step(self, common: bool = False) -> None:
        """Sample a number of features for each network, or a ``common`` one, and set frozen batch norm to evaluation mode."""
        for number, dropout in enumerate(self.dropouts):
            dropout.draw(self.stream("nested", 0 if common else number))
        if self.stage.frozen:
            for name in self.norms:
                self.get_submodule(name).eval()
