"""Nested (Chen et al., CVPR Workshops 2021): ordered dropout of features, alone and with Co-teaching."""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.callbacks import Stage
from sanm_lightning.functional import (
    nested_probabilities,
    soft_cross_entropy,
    step_fractions,
    step_ramp,
    truncated_accuracy,
)
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.checks import require_index
from sanm_lightning.models import pooled_width
from sanm_lightning.per_sample import LabelStore
from sanm_lightning.sanm.inference import inference_context

__all__ = ["Nested", "NestedCoTeaching", "NestedDropout"]


class NestedDropout(nn.Module):
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
        self.register_buffer("kept", torch.tensor(kept))
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


class Nested(NoisyLabelModule):
    """Cross-entropy with nested dropout: in each step, the classifier sees the first k features only, with a random k.

    Source: Chen et al., CVPR Workshops 2021, and the authors' code. k is sampled with probabilities proportional to
    exp(-(k / sigma)^2). Predictions use the first K features, where K has the best accuracy on the validation split, chosen
    at every validation.

    Departures: the validation split has noisy labels, where the code uses clean ones (for Animal-10N, the test set). Without
    a validation split, K is sigma. The classifier keeps its bias.

    Under SANM, images are masked before, features after the pooling. Label quality is the mixture on the losses of the
    predictions with K features, and the activation map is that of these predictions.

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
        if sigma is not None and not sigma > 0:
            raise ValueError(f"expected sigma > 0, got {sigma}; use 10, or null to keep all features")
        if lr_warmup_steps < 0:
            raise ValueError(f"expected lr_warmup_steps >= 0, got {lr_warmup_steps}; use 0 for a constant rate")
        super().__init__(num_classes, **kwargs)
        width = pooled_width(self.network)
        if num_features is not None and not 1 <= num_features <= width:
            raise ValueError(f"expected num_features in 1 to {width}, got {num_features}; lower it")
        self.num_features, self.lr_warmup_steps, self.freeze_batch_norm = (
            num_features,
            lr_warmup_steps,
            freeze_batch_norm,
        )
        kept = num_features or (width if sigma is None else max(1, round(min(sigma, width))))
        self.choose_features = num_features is None and sigma is not None
        self.norms = [name for name, part in self.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        self.dropouts = nn.ModuleList([NestedDropout(width, sigma, kept) for _ in self.networks])
        for network, sanm, dropout in zip(self.networks, self.sanms, self._dropouts, strict=True):
            classifier = network.get_classifier()
            if not isinstance(classifier, nn.Linear) or classifier.in_features != width:
                raise ValueError(
                    f"expected a network with a linear classifier on {width} features for {type(self).__name__}, got "
                    f"{type(classifier).__name__}; use another network, such as resnet18"
                )
            classifier.register_forward_pre_hook(dropout)
            sanm.build(network, self.image_size)  # the map of the truncated logits

    @property
    def _dropouts(self) -> list[NestedDropout]:
        return cast(list[NestedDropout], list(self.dropouts))

    def stages(self) -> list[Stage]:
        """Return the only stage."""
        return [self.first_stage("train", None)]

    def first_stage(self, name: str, epochs: int | None) -> Stage:
        """Return the stage of nested dropout on all samples."""
        factor = partial(step_ramp, length=self.lr_warmup_steps) if self.lr_warmup_steps else None
        return Stage(name, epochs, factor=factor, frozen=tuple(self.norms) if self.freeze_batch_norm else ())

    def on_validation_start(self) -> None:
        """Choose K by the accuracy on the validation split, of the smallest K for differences of 1e-5 per feature."""
        trainer: Any = self.trainer
        data = trainer.datamodule
        split = hasattr(data, "pass_dataloader") and "val" in data.eval_names
        if not (split and self.choose_features and trainer.state.fn == "fit" and not trainer.sanity_checking):
            return
        found = self.predict_val("features", "labels", network=None)
        classifiers = [network.get_classifier() for network in self.networks]
        weight = torch.stack([part.weight for part in classifiers]).detach()
        bias = sum(0.0 if part.bias is None else part.bias.detach() for part in classifiers)
        accuracy = truncated_accuracy(found["features"], weight, bias, found["labels"])
        best = (accuracy - 1e-5 * torch.arange(len(accuracy), device=accuracy.device)).argmax() + 1
        for dropout in self._dropouts:
            dropout.kept.copy_(best)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the sum of the losses of all networks."""
        batch = NoisyBatch.from_any(batch)
        self.prepare_step()
        outs = [self.learn(batch, self.one_hot(batch.labels), number) for number in range(self.num_networks)]
        return torch.stack([out.cross_entropy() for out in outs]).sum()

    def prepare_step(self) -> None:
        """Sample the numbers of features, and set frozen batch norm to evaluation mode."""
        for number, dropout in enumerate(self._dropouts):
            dropout.draw(self.stream("nested", number))
        if self.stage.frozen:
            for name in self.norms:
                self.get_submodule(name).eval()


class NestedCoTeaching(Nested):
    """Two networks with nested dropout, then Co-teaching between them on half a batch each.

    Source: Chen et al., CVPR Workshops 2021, and the authors' code. In the second stage, batch norm is frozen. Each network
    ranks its half of the batch by its losses with K features, in evaluation mode, and the other network is trained on
    the fraction 1 - noise rate of smallest losses, with nested dropout. Networks predict together, and K is that of the mean
    logits.

    Departures: those of :class:`Nested`; in the first stage, both networks are trained on the same batches, where the code
    trains them in separate runs, on Clothing1M with different subsets. The last weights are used, where the code uses those
    of the best accuracy on clean validation labels.

    Under SANM, masks are drawn in the second stage. Label quality decreases with the rank of the loss in the half batch, from
    1 to 0, of the last visit.

    Args:
        num_classes: C, number of classes.
        noise_rate: fraction of a half batch that is excluded, in [0, 1). Required, and never read from the data.
        finetune_lr: learning rate of the second stage; published: .001 on CIFAR, .002 on Clothing1M, .004 on Animal-10N.
        finetune_drop: fraction of the second stage after which its learning rate is divided by 10, in [0, 1]; published: 1/2
            on CIFAR, 1/6 on Clothing1M.
        warmup_epochs: length of the first stage.

    All other arguments are those of :class:`Nested`.

    Raises:
        ValueError: if an argument is out of its range, ``noise_rate`` is missing, or batches have no index.
    """

    num_networks = 2
    needs_data_module = True
    estimates_quality = True

    def __init__(
        self,
        num_classes: int,
        noise_rate: float | None = None,
        finetune_lr: float = 0.001,
        finetune_drop: float = 0.5,
        warmup_epochs: int = 100,
        **kwargs: Any,
    ) -> None:
        if noise_rate is None or not 0 <= noise_rate < 1:
            raise ValueError(
                f"expected noise_rate in [0, 1), got {noise_rate}; set it to the known or estimated fraction of wrong labels"
            )
        if finetune_lr <= 0 or not 0 <= finetune_drop <= 1:
            raise ValueError(
                f"expected finetune_lr > 0 and finetune_drop in [0, 1], got {finetune_lr} and {finetune_drop}; use .001 and .5"
            )
        super().__init__(num_classes, warmup_epochs=warmup_epochs, **kwargs)
        self.noise_rate, self.finetune_lr, self.finetune_drop = noise_rate, finetune_lr, finetune_drop
        self.ranked = LabelStore()

    def stages(self) -> list[Stage]:
        """Return the stage of nested dropout and that of Co-teaching."""
        factor = partial(step_fractions, fractions=(self.finetune_drop,), factors=(0.1,))
        finetune = Stage("finetune", lr=self.finetune_lr, factor=factor, frozen=tuple(self.norms))
        return [self.first_stage("warmup", self.warmup_epochs), finetune]

    def label_quality(self) -> Tensor | None:
        """Return 1 minus the relative rank of the loss of each sample, (N,); None before the second stage."""
        return self.ranked.given_quality if self.ranked.filled else None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the sum of the losses of both networks."""
        if self.stage.name == "warmup":
            return super().training_step(batch, batch_idx)
        batch = NoisyBatch.from_any(batch)
        index = require_index(batch, type(self).__name__)
        self.prepare_step()
        halves = batch.chunk(2) if len(index) > 1 else [batch, batch]
        losses = []
        for number, half in enumerate(halves):
            with inference_context(self.networks[number], half.images):
                ranked = soft_cross_entropy(self.networks[number](half.images), self.one_hot(half.labels)).argsort()
            count = len(ranked)
            half = half.take(ranked[: max(1, int((1 - self.noise_rate) * count + 1e-6))])
            quality = 1 - torch.arange(count, device=index.device) / max(1, count - 1)
            self.ranked.write("given_quality", halves[number].index[ranked], quality)
            out = self.learn(half, self.one_hot(half.labels), 1 - number, quality=quality[: len(half.labels)])
            losses.append(out.cross_entropy())
        return torch.stack(losses).sum()
