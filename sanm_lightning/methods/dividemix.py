"""DivideMix (Li, Socher and Hoi, ICLR 2020): two networks divide the data for each other, with MixMatch."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from sanm_lightning.batch import EpochPlan, NoisyBatch, View
from sanm_lightning.callbacks import Stage
from sanm_lightning.functional import (
    Mixed,
    clean_probability,
    co_refine,
    linear_ramp,
    mixmatch_loss,
    mixup,
    negative_entropy,
    prior_kl,
    sharpen,
    threshold_split,
)
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.batches import permuted_batches
from sanm_lightning.methods.checks import check_choice, check_range, require, require_divisible
from sanm_lightning.per_sample import History
from sanm_lightning.sanm.inference import infer

__all__ = ["DivideMix", "Division"]


class Division(History):
    """Min-max normalized losses of both networks in the last epochs, and the resulting clean probabilities.

    Args:
        length: number of epochs whose losses are averaged.
    """

    clean: Tensor
    """(N, 2): probability that each given label is correct, from the losses of each network."""

    def __init__(self, length: int = 1) -> None:
        super().__init__(length, (2,), dist_reduce_fx=None)
        self.add_state("clean", (2,), default=1.0, dist_reduce_fx=None)

    @property
    def done(self) -> bool:
        """Whether the data have been divided."""
        return len(self) > 0 and bool((self.count > 0).any())

    def divide(self, losses: Tensor, max_iter: int, index: Tensor | None = None) -> None:
        """Add the losses (2, M) of an epoch, and fit a mixture to each network's mean over the epochs.

        Args:
            losses: loss of each sample under each network.
            max_iter: maximum number of iterations of the fit.
            index: positions of the samples, (M,); None for all samples. The probabilities of others are unchanged.
        """
        index = torch.arange(len(self), device=losses.device) if index is None else index
        low, high = losses.amin(1, keepdim=True), losses.amax(1, keepdim=True)
        scaled = (losses - low) / torch.where(high > low, high - low, 1)
        self.append(index, scaled.T)
        means = self.mean(index).T  # not normalized again, as in the code
        found = [clean_probability(mean, max_iter=max_iter, normalize=False) for mean in means]
        fitted = torch.stack(found, 1)
        self.clean = self.clean.to(fitted).index_copy(0, index, fitted)

    def upgrade_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Convert history (E, 2, N) and clean probabilities (2, N) of an earlier version."""
        history = state["history"].permute(2, 0, 1)[:, -self.length :]
        rows = torch.zeros(len(history), self.length, 2)
        rows[:, : history.shape[1]] = history
        count = torch.full((len(history),), history.shape[1])
        return super().upgrade_state({"rows": rows, "count": count, "clean": state["clean"].T})


class DivideMix(NoisyLabelModule):
    """Warm up, divide the data with a mixture model of the losses, refine and guess labels, and train with MixMatch.

    Source: Li et al., ICLR 2020, Algorithm 1, and the authors' code.

    Departures. Both networks are trained in every step, each on the division of the other, where the code trains
    network 1 for an epoch and then network 2 (``alternate`` trains one network per epoch). An epoch has as many steps
    as the training loader, each with half a batch of labeled and half a batch of unlabeled samples per network; the
    code's epoch is as long as the labeled set (the same with half of the labels wrong). The passes that refine and
    guess labels do not update batch norm. Samples of each set are served in random rounds, so small sets are repeated.

    Predictions: the mean of both networks' logits (the code's sum gives the same classes).

    Under SANM, the views that MixMatch mixes are masked and their refined or guessed targets regularized; label quality
    is the other network's clean probability; the reconstruction uses a separate forward pass on the masked, unmixed
    views.

    Args:
        num_classes: C, number of classes.
        lambda_u: weight of the squared error of the unlabeled samples. Published: CIFAR-10 0 / 25 / 25 / 50 at 20 / 50
            / 80 / 90 % symmetric noise, 0 at 40 % asymmetric noise.
        p_threshold: clean probability above which a sample is labeled, in [0, 1].
        temperature: temperature of the sharpening, positive.
        alpha: parameter of mixup's Beta distribution, >= 0.
        ramp_epochs: epochs over which ``lambda_u`` increases from 0 after the warm-up.
        loss_history: number of epochs whose losses are averaged for the mixture (published: 5 at 90 % noise).
        confidence_penalty: whether to add the negative entropy in the warm-up (published: for asymmetric noise).
        clip_threshold: whether to clip the threshold to the range of the probabilities in every epoch, as C2D does;
            otherwise only if a set would be empty, with a warning.
        mixture_iterations: maximum number of iterations of the mixture fit.
        target_views: data-module policies of the views for refined and guessed labels.
        train_views: policies of the mixed views; None uses the target views.
        sanm_views: ``"all"``: SANM masks all mixed views (Algorithm 1 of SANM); ``"first"``: it masks the first target
            view, and the masked copies are added to the mixed views (released code).
        unlabelled_quality: quality of unlabeled samples for SANM: ``"given"``, the clean probability of the given label
            (as in the released code); ``"guess"``, the largest probability of the guessed target that replaces the
            label. On digits with 80 % of the labels wrong (last accuracy, means of three seeds), SANM reduced C2D from
            .733 to .595 with the former and to .708 with the latter; DivideMix, whose guesses are worse there, rose
            from .501 to .591 with the former and fell to .385 with the latter.
        warmup_view: policy of the warm-up's view.
        warmup_clip: gradient norm for clipping of each network in the warm-up; None uses the trainer's setting.
        alternate: whether to train network 1 in even and network 2 in odd epochs after the warm-up, which requires
            twice the epochs for the same budget. Under DDP, it requires a strategy that finds unused parameters.
        skip_unlabelled: with ``lambda_u`` 0, whether to run the network on the mixed labeled views only, as the code of C2D
            does. Otherwise the unlabeled views affect batch norm and the prior term.
        guess_together: whether the labeled and the unlabeled half share batch statistics in the pass that refines and
            guesses targets; False separates them, as in the code.

    All other arguments are those of :class:`NoisyLabelModule`; ``warmup_epochs`` is the length of the warm-up.

    Raises:
        ValueError: if an argument is out of its range, or there are fewer than 2 training samples.
    """

    num_networks = 2
    needs_data_module = True
    estimates_quality = True

    def __init__(
        self,
        num_classes: int,
        lambda_u: float = 25.0,
        p_threshold: float = 0.5,
        temperature: float = 0.5,
        alpha: float = 4.0,
        ramp_epochs: float = 16.0,
        loss_history: int = 1,
        confidence_penalty: bool = False,
        clip_threshold: bool = False,
        mixture_iterations: int = 10,
        target_views: list[str] = ["weak", "weak"],  # noqa: B006  # never changed; a checkpoint holds plain lists
        train_views: list[str] | None = None,
        sanm_views: Literal["all", "first"] = "all",
        unlabelled_quality: Literal["given", "guess"] = "given",
        warmup_view: str = "weak",
        warmup_clip: float | None = None,
        alternate: bool = False,
        skip_unlabelled: bool = False,
        guess_together: bool = False,
        **kwargs: Any,
    ) -> None:
        check_range(">= 0", lambda_u=lambda_u, alpha=alpha, ramp_epochs=ramp_epochs)
        check_range("in [0, 1]", p_threshold=p_threshold)
        check_range("> 0", temperature=temperature)
        check_range(">= 1", loss_history=loss_history, mixture_iterations=mixture_iterations)
        require(len(target_views) > 0, "at least one of target_views", target_views, "use the default")
        check_choice(("all", "first"), sanm_views=sanm_views)
        check_choice(("given", "guess"), unlabelled_quality=unlabelled_quality)
        super().__init__(num_classes, **kwargs)
        self.lambda_u, self.p_threshold, self.temperature, self.alpha = lambda_u, p_threshold, temperature, alpha
        self.ramp_epochs, self.mixture_iterations = ramp_epochs, mixture_iterations
        self.confidence_penalty, self.clip_threshold = confidence_penalty, clip_threshold
        self.target_views, self.train_views, self.sanm_views = target_views, train_views, sanm_views
        self.unlabelled_quality = unlabelled_quality
        self.warmup_view, self.warmup_clip, self.alternate = warmup_view, warmup_clip, alternate
        self.skip_unlabelled, self.guess_together = skip_unlabelled, guess_together
        self.division = Division(loss_history)

    def stages(self) -> list[Stage]:
        """Return the warm-up and MixMatch."""
        return [Stage("warmup", self.warmup_epochs, gradient_clip_val=self.warmup_clip), Stage("mixmatch")]

    def views(self) -> tuple[View, ...]:
        """Return the warm-up's view, or the target views followed by the mixed views."""
        if self.stage.name == "warmup":
            return (self.warmup_view,)
        return (*self.target_views, *(self.train_views or ()))

    def check_training_set(self, num_samples: int, batch_size: int, world_size: int) -> None:
        """Require at least 2 training samples."""
        require_divisible(num_samples, type(self).__name__)

    # Once per epoch: divide

    def begin_epoch(self) -> None:
        """Compute the losses of the epoch's samples with both networks, and fit the mixtures, after the warm-up."""
        if self.stage.name != "warmup":
            found = self.predict_train("loss", network=None, pool_only=True)
            self.division.divide(found["loss"], self.mixture_iterations, found["index"])

    def label_quality(self) -> Tensor | None:
        """Return the mean of both networks' clean probabilities, (N,); None before the first division."""
        return self.division.clean.mean(1) if self.division.done else None

    def learning(self) -> list[int]:
        """Return the numbers of the networks that are trained in this epoch."""
        if self.alternate and self.stage.name != "warmup":
            return [(self.current_epoch - self.warmup_epochs) % 2]
        return [0, 1]

    def epoch_batches(self, plan: EpochPlan) -> Tensor | None:
        """Sample half a batch of labeled and half a batch of unlabeled samples per step for each trained network."""
        if self.stage.name == "warmup":
            return None
        half = max(1, plan.batch_size // 2)
        blocks = []
        for number in self.learning():
            pool = plan.pool(number)
            clean = self.division.clean[:, 1 - number].cpu()[pool]  # by the other network
            labelled, empty = threshold_split(clean, self.p_threshold, self.clip_threshold)
            if empty and not self.clip_threshold:
                rank_zero_warn(
                    f"expected labeled and unlabeled samples for network {number + 1} of {type(self).__name__} in "
                    f"epoch {plan.epoch}, got an empty set with p_threshold {self.p_threshold}; the threshold was "
                    f"clipped to the range of the probabilities ({int(labelled.sum())} of {len(labelled)} samples are "
                    "labeled)"
                )
            generator = self.epoch_stream(plan, "draw", number)
            for part in (pool[labelled], pool[~labelled]):
                blocks.append(permuted_batches(plan, part, half, generator))
        return torch.cat(blocks, 1)

    # Each step: refine, guess, mix

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the sum of the losses of the trained networks."""
        batch = NoisyBatch.from_any(batch)
        if self.stage.name == "warmup":
            return torch.stack([self.warm_up(batch, number) for number in self.learning()]).sum()
        mix = partial(mixup, generator=self.stream("mixup"), alpha=self.alpha)
        lambda_u = self.lambda_u * linear_ramp(self.elapsed_epochs(batch_idx), self.ramp_epochs)
        learning = self.learning()
        blocks = batch.chunk(len(learning))
        losses = [self.mixmatch(block, number, mix, lambda_u) for block, number in zip(blocks, learning, strict=True)]
        return torch.stack(losses).sum()

    def warm_up(self, batch: NoisyBatch, number: int) -> Tensor:
        """Return the cross-entropy of one network, plus the negative entropy with ``confidence_penalty``."""
        out = self.learn(batch, self.one_hot(batch.labels), number)
        return out.cross_entropy() + negative_entropy(out.logits) if self.confidence_penalty else out.cross_entropy()

    def mixmatch(self, batch: NoisyBatch, number: int, mix: Any, lambda_u: float) -> Tensor:
        """Return the loss of one network (Algorithm 1, lines 10 to 26) on labeled, then as many unlabeled samples."""
        half = len(batch.labels) // 2
        clean = self.division.clean[:, 1 - number][batch.index]
        target_views = list(batch.views[: len(self.target_views)])
        train_views = list(batch.views[len(self.target_views) :]) or target_views
        targets, maps = self.guess(number, target_views, self.one_hot(batch.labels), clean, half)

        masked_first = self.sanm_views == "first" and self.sanm.enabled
        learned = target_views[:1] if masked_first else train_views  # views that SANM masks
        copies = len(learned)
        known = torch.cat(maps[:copies]) if learned[0] is target_views[0] else None  # saves SANM a pass
        guessed = self.unlabelled_quality == "guess"
        quality = torch.cat([clean[:half], targets[half:].amax(1)]) if guessed else clean
        extra = (torch.cat(train_views), targets.repeat(len(train_views), 1)) if masked_first else None
        skip = self.skip_unlabelled and self.lambda_u == 0
        out = self.learn(
            batch.with_images(torch.cat(learned)), targets.repeat(copies, 1), number, quality=quality.repeat(copies),
            features=known, mix=partial(_mix_labelled, mix, half) if skip else mix, extra=extra,
        )  # fmt: skip
        if skip:
            return out.classification() + prior_kl(out.logits) + out.reconstruction
        labelled = out.per_view(torch.arange(2 * half, device=targets.device) < half)
        supervised, unsupervised = mixmatch_loss(out.logits, out.targets, labelled)
        return supervised + lambda_u * unsupervised + prior_kl(out.logits) + out.reconstruction

    @torch.no_grad()
    def guess(
        self, number: int, views: list[Tensor], labels: Tensor, clean: Tensor, half: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Refine the given labels of the labeled half, guess those of the unlabeled half, and sharpen both.

        The trained network uses batch statistics, as in training; the other network uses running statistics.

        Returns:
            Targets (2 half, C), and the network's feature maps of each view.
        """
        network, other = self.networks[number], self.networks[1 - number]
        own, others, maps = [], [], []
        for view in views:
            halves = [view] if self.guess_together else [view[:half], view[half:]]
            parts = [infer(network, part, batch_statistics=True) for part in halves]
            own.append(torch.cat([logits.softmax(1) for _, logits in parts]))
            maps.append(torch.cat([part for part, _ in parts]))
            others.append(infer(other, view[half:])[1].softmax(1))
        mean, guessed = torch.stack(own).mean(0), torch.stack([p[half:] for p in own] + others).mean(0)
        refined = co_refine(labels[:half], clean[:half], mean[:half])
        return sharpen(torch.cat([refined, guessed]), self.temperature), maps


def _mix_labelled(mix: Callable[[Tensor, Tensor], Mixed], half: int, images: Tensor, targets: Tensor) -> Mixed:
    """Mix all views, and return the rows of the labeled halves; each view has ``half`` labeled, then unlabeled rows."""
    mixed = mix(images, targets)
    rows = torch.arange(len(images), device=images.device).view(-1, 2 * half)[:, :half].flatten()
    return Mixed(mixed.images[rows], mixed.targets[rows], mixed.lam, mixed.partners[rows.to(mixed.partners.device)])
