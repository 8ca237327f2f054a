"""DivideMix (Li, Socher and Hoi, ICLR 2020): two networks divide the data for each other, and learn by MixMatch."""

import math
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.methods.mixup import mixup
from sanm_lightning.methods.two_networks import TwoNetworks
from sanm_lightning.random_streams import derived_generator, process_rank
from sanm_lightning.sanm.module import without_trace
from sanm_lightning.sanm.quality import clean_probability, label_loss

__all__ = [
    "DivideMix",
    "Division",
    "co_refine",
    "endless",
    "labelled_set",
    "linear_ramp",
    "mixmatch_loss",
    "negative_entropy",
    "prior_penalty",
    "sharpen",
]


def sharpen(probabilities: Tensor, temperature: float) -> Tensor:
    """Raise (B, C) probabilities to the power 1 / T and normalise again: T below 1 makes them surer."""
    powered = probabilities ** (1 / temperature)
    return powered / powered.sum(1, keepdim=True)


def co_refine(targets: Tensor, clean: Tensor, prediction: Tensor) -> Tensor:
    """Mix given labels (B, C) with the network's prediction (B, C), by the probability (B,) that the label is clean."""
    w = clean.unsqueeze(1)
    return w * targets + (1 - w) * prediction


def negative_entropy(logits: Tensor) -> Tensor:
    """Mean of sum p log p over a batch of logits (B, C): a scalar <= 0, small for unsure predictions."""
    log = logits.float().log_softmax(1)
    return (log.exp() * log).sum(1).mean()


def prior_penalty(logits: Tensor) -> Tensor:
    """KL divergence of the mean prediction of a batch, logits (B, C), from the uniform prior: a scalar >= 0."""
    mean = logits.float().softmax(1).mean(0)
    prior = 1 / logits.shape[1]
    return (prior * (math.log(prior) - mean.clamp(min=1e-12).log())).sum()


def mixmatch_loss(logits: Tensor, targets: Tensor, labelled: Tensor) -> tuple[Tensor, Tensor]:
    """Return DivideMix's Eq. 8 and 9: cross-entropy of the labelled rows, squared error of the others.

    Args:
        logits: of mixed images, shape (V, C).
        targets: mixed targets, shape (V, C).
        labelled: whether a row comes from the labelled set, shape (V,), bool.

    Returns:
        Two scalars: the mean cross-entropy, and the squared error, mean over rows and classes. 0 where there is no row.
    """
    logits, rows = logits.float(), labelled.float()
    cross_entropy = label_loss(logits, targets)
    squares = (logits.softmax(1) - targets).square().mean(1)
    supervised = (cross_entropy * rows).sum() / rows.sum().clamp(min=1)
    unsupervised = (squares * (1 - rows)).sum() / (1 - rows).sum().clamp(min=1)
    return supervised, unsupervised


def linear_ramp(epochs: float, length: float) -> float:
    """Rise linearly from 0 to 1 in ``length`` epochs, then stay: the weight of the unsupervised loss."""
    return min(max(epochs / length, 0.0), 1.0) if length > 0 else 1.0


def labelled_set(clean: Tensor, threshold: float, clip: bool = False) -> tuple[Tensor, bool]:
    """Say which samples count as labelled; neither set is ever empty.

    Args:
        clean: probability that each label is right, shape (N,), N >= 2.
        threshold: labelled are those above it (DivideMix, Section 3.1).
        clip: first move the threshold inside the range of ``clean``, as C2D does.

    Returns:
        Labelled or not, shape (N,), bool; and whether the threshold as it was given left one of the sets empty. Then it is
        moved inside the range; where all probabilities are equal, the first half of the samples is labelled.
    """
    labelled = clean > threshold
    empty = bool(labelled.all()) or not bool(labelled.any())
    if clip or empty:
        low, high = float(clean.min()) + 1e-5, float(clean.max()) - 1e-5
        labelled = clean > max(min(threshold, high), low)
    if bool(labelled.all()) or not bool(labelled.any()):
        order = clean.argsort(descending=True, stable=True)
        labelled = torch.zeros_like(labelled)
        labelled[order[: max(1, len(clean) // 2)]] = True
    return labelled, empty


def endless(pool: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Go through ``pool`` (n,) in random order again and again: the first ``length`` places, (length,)."""
    rounds = max(1, -(-length // len(pool)))
    return torch.cat([pool[torch.randperm(len(pool), generator=generator)] for _ in range(rounds)])[:length]


class Division(nn.Module):
    """What is known of each label: the losses of the last epochs and the clean probabilities, for both networks.

    Saved as tensors (``get_extra_state``); the same on all ranks, since the losses are added up over them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.history = torch.zeros(0, 2, 0)
        """(epochs, 2, N): min-max normalised losses of both networks, oldest first."""
        self.clean = torch.zeros(2, 0)
        """(2, N): probability that each label is right, by each network's losses; no samples before the first division."""

    def remember(self, losses: Tensor, epochs: int) -> None:
        """Add an epoch's losses (2, N), each network's brought to [0, 1], and keep the last ``epochs``."""
        low, high = losses.min(1, keepdim=True).values, losses.max(1, keepdim=True).values
        scaled = (losses - low) / torch.where(high > low, high - low, 1)
        past = self.history if self.history.shape[2] == losses.shape[1] else losses.new_zeros(0, *losses.shape)
        self.history = torch.cat([past.to(losses.device), scaled[None]])[-epochs:]

    def divide(self, max_iter: int) -> None:
        """Fit a mixture to each network's mean of the remembered losses."""
        self.clean = torch.stack([clean_probability(losses, max_iter=max_iter) for losses in self.history.mean(0)])

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return both tensors, on the CPU."""
        return {"history": self.history.cpu().clone(), "clean": self.clean.cpu().clone()}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Take over a state, whatever the number of samples was before."""
        self.history, self.clean = state["history"].clone(), state["clean"].clone()


class DivideMix(TwoNetworks):
    """Warm up, divide the data by a mixture on the losses, refine and guess labels, learn by MixMatch.

    Source: Li et al., ICLR 2020, Algorithm 1, and the authors' code.

    Departures. Both networks learn in every step, each on the division made by the other, where the code trains network 1 for
    an epoch and then network 2 (``alternate`` does that, one network per epoch). An epoch has as many steps as the training
    loader, each of half a batch of labelled and half a batch of unlabelled samples per network; the code's epoch is as long
    as the labelled set (the same at half the labels wrong). The passes that refine and guess labels leave no trace in batch
    norm. Samples are drawn from each set in random rounds, so a small set is repeated.

    Predictions: the mean of both networks' logits (the code's sum gives the same classes).

    Under SANM, the views that MixMatch mixes are masked and their refined or guessed targets regularised; label quality is the
    other network's clean probability; the reconstruction has a forward of its own on the masked, unmixed views.

    Args:
        lambda_u: weight of the squared error of the unlabelled part. Published: CIFAR-10 0 / 25 / 25 / 50 at 20 / 50 / 80 /
            90 % symmetric noise, 0 at 40 % asymmetric.
        p_threshold: clean probability above which a sample is labelled, in [0, 1].
        temperature: of the sharpening, positive.
        alpha: of mixup's Beta distribution, positive.
        ramp_epochs: epochs in which ``lambda_u`` rises from 0 after the warm-up.
        loss_history: epochs whose losses are averaged for the mixture (published: 5 at 90 % noise).
        confidence_penalty: add the negative entropy in the warm-up (published: for asymmetric noise).
        clip_threshold: move the threshold inside the range of the probabilities in every epoch, as C2D does; without, only
            where a set would be empty, and the log says so.
        mixture_iterations: at most, for the mixture.
        target_views: data-module policies of the views that labels are refined and guessed from.
        train_views: policies of the views that are mixed; None takes the target views themselves.
        sanm_views: ``"all"``: SANM masks all views that are mixed (the seed's equations); ``"first"``: it masks the first
            target view, and its copies join the views that are mixed (released code).
        unlabelled_quality: what SANM takes for the quality of an unlabelled sample: ``"given"``, the clean probability of its
            given label (seed and released code); ``"guess"``, the largest probability of the guessed target that takes the
            label's place. On digits with 80 % of the labels wrong (last accuracy, means of three seeds), C2D fell under SANM
            from .733 to .595 with the first and to .708 with the second, but DivideMix, whose guesses are worse there, rose
            from .501 to .591 with the first and fell to .385 with the second.
        warmup_view: policy of the warm-up's view.
        warmup_clip: gradient norm that each network is clipped to in the warm-up; None takes the trainer's setting.
        alternate: train network 1 in even and network 2 in odd epochs after the warm-up; twice the epochs are then the same
            budget. Under DDP it needs a strategy that finds unused parameters.

    All other arguments are those of :class:`NoisyLabelModule`.

    Raises:
        ValueError: if an argument is out of its range, or there are fewer than 2 training samples.
    """

    needs_data_module = True

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
        **kwargs: Any,
    ) -> None:
        for name, value, good in (
            ("lambda_u >= 0", lambda_u, lambda_u >= 0),
            ("p_threshold in [0, 1]", p_threshold, 0 <= p_threshold <= 1),
            ("temperature > 0", temperature, temperature > 0),
            ("alpha >= 0", alpha, alpha >= 0),
            ("ramp_epochs >= 0", ramp_epochs, ramp_epochs >= 0),
            ("loss_history >= 1", loss_history, loss_history >= 1),
            ("mixture_iterations >= 1", mixture_iterations, mixture_iterations >= 1),
            ("at least one of target_views", target_views, len(target_views) > 0),
            ("sanm_views 'all' or 'first'", sanm_views, sanm_views in ("all", "first")),
            ("unlabelled_quality 'given' or 'guess'", unlabelled_quality, unlabelled_quality in ("given", "guess")),
        ):
            if not good:
                raise ValueError(f"expected {name}, got {value!r}")
        super().__init__(num_classes, **kwargs)
        self.lambda_u, self.p_threshold, self.temperature, self.alpha = lambda_u, p_threshold, temperature, alpha
        self.ramp_epochs, self.loss_history, self.mixture_iterations = ramp_epochs, loss_history, mixture_iterations
        self.confidence_penalty, self.clip_threshold = confidence_penalty, clip_threshold
        self.target_views, self.train_views, self.sanm_views = target_views, train_views, sanm_views
        self.unlabelled_quality = unlabelled_quality
        self.warmup_view, self.warmup_clip, self.alternate = warmup_view, warmup_clip, alternate
        self.division = Division()
        # the epoch, and for each network its labelled and unlabelled samples in the order of this epoch
        self._drawn: tuple[int, list[tuple[Tensor, Tensor]]] = (-1, [])

    def on_train_start(self) -> None:
        """Refuse a training set that cannot be divided."""
        super().on_train_start()
        samples = int(self.trainer.datamodule.num_samples)  # type: ignore[attr-defined]
        if samples < 2:
            raise ValueError(
                f"{type(self).__name__} divides the training set in two and needs 2 samples or more, got {samples}"
            )

    # Once per epoch: divide

    def begin_epoch(self) -> None:
        """Score every training sample with both networks and fit the mixtures; from the end of the warm-up on."""
        if self.current_epoch >= self.warmup_epochs:
            self.division.remember(self.score(), self.loss_history)
            self.division.divide(self.mixture_iterations)

    def score(self) -> Tensor:
        """Return the losses (2, N) of both networks on the given labels of the whole, unaugmented training set."""
        losses = torch.zeros(2, self.trainer.datamodule.num_samples, device=self.device)  # type: ignore[attr-defined]
        for batch in self.training_set():
            targets = self.one_hot(batch.labels)
            for row, (network, _, _) in zip(losses, self.pairs, strict=True):
                row[batch.index] = label_loss(network(batch.images), targets)
        return self.trainer.strategy.reduce(losses, reduce_op="sum")  # type: ignore[return-value]

    def clean_probability(self) -> Tensor | None:
        """Return the mean of both networks' clean probabilities, (N,); None before the first division."""
        return self.division.clean.mean(0) if self.division.clean.shape[1] else None

    def _orders(self) -> list[tuple[Tensor, Tensor]]:
        """Return for each network this process's samples of the epoch: labelled and unlabelled, a half batch per step."""
        if self._drawn[0] != self.current_epoch:
            rank, ranks = process_rank(), self.trainer.world_size
            length = ranks * int(self.trainer.num_training_batches) * self._half()
            orders = []
            for number in (0, 1):
                clean = self.division.clean[1 - number].cpu()  # the other network's
                labelled, empty = labelled_set(clean, self.p_threshold, self.clip_threshold)
                if empty and not self.clip_threshold:
                    rank_zero_warn(
                        f"{type(self).__name__}, epoch {self.current_epoch}: p_threshold {self.p_threshold} left the labelled "
                        f"or the unlabelled set of network {number + 1} empty; it was moved inside the range of the "
                        f"probabilities ({int(labelled.sum())} of {len(labelled)} samples are labelled now)"
                    )
                generator = derived_generator(torch.device("cpu"), self.sanm.seed, self.current_epoch, number, 7)
                halves = [endless(pool.nonzero()[:, 0], length, generator) for pool in (labelled, ~labelled)]
                orders.append((halves[0][rank::ranks].to(self.device), halves[1][rank::ranks].to(self.device)))
            self._drawn = (self.current_epoch, orders)
        return self._drawn[1]

    def _half(self) -> int:
        return max(1, int(self.trainer.datamodule.batch_size) // 2)  # type: ignore[attr-defined]

    # Each step: refine, guess, mix

    def training_step(self, batch: NoisyBatch, batch_idx: int) -> Tensor:
        """Return the sum of both networks' losses."""
        batch = NoisyBatch(*batch)
        generator = self.random_stream(batch_idx)
        if self.current_epoch < self.warmup_epochs:
            return self.warm_up(batch, generator)
        learning = [0, 1] if not self.alternate else [(self.current_epoch - self.warmup_epochs) % 2]
        losses = [self.learn(number, batch_idx, generator) for number in learning]
        return torch.stack(losses).sum()

    def warm_up(self, batch: NoisyBatch, generator: torch.Generator) -> Tensor:
        """Plain cross-entropy of both networks, with the negative entropy where that was asked for."""
        assert batch.index is not None
        images, targets = batch.images, self.one_hot(batch.labels)
        if self.warmup_view != "weak":
            (images,) = self.views(batch.index, generator, self.warmup_view)
        total = torch.zeros((), device=images.device)
        for network, sanm, _ in self.pairs:
            views = sanm(network, images, targets, None)
            features = network.forward_features(views.images)
            logits = network.forward_head(features)
            total = total + F.cross_entropy(logits.float(), targets) + sanm.reconstruction(features, images)
            if self.confidence_penalty:
                total = total + negative_entropy(logits)
        return total

    def learn(self, number: int, batch_idx: int, generator: torch.Generator) -> Tensor:
        """Return the loss of one network: Algorithm 1, lines 10 to 26."""
        network, sanm, peer = self.pairs[number]
        other = self.pairs[1 - number][0]
        half = self._half()
        here = slice(batch_idx * half, (batch_idx + 1) * half)
        index = torch.cat([order[here] for order in self._orders()[number]])  # labelled, then unlabelled
        given: NoisyBatch = self.trainer.datamodule.batch("train", index)  # type: ignore[attr-defined]
        clean = self.division.clean[1 - number].to(index.device)[index]
        looks = self.views(index, generator, *self.target_views)
        targets, maps = self.guess(network, other, looks, self.one_hot(given.labels), clean, half)

        fresh = looks if self.train_views is None else self.views(index, generator, *self.train_views)
        first = self.sanm_views == "first" and sanm.enabled
        plain, unmasked = (fresh, looks[:1]) if first else ([], fresh)
        known = torch.cat(maps[: len(unmasked)]) if unmasked[0] is looks[0] else None  # saves SANM a pass
        blocks = len(unmasked)
        base = NoisyBatch(
            torch.cat(unmasked),
            given.labels.repeat(blocks),
            index.repeat(blocks),
            None if given.true_labels is None else given.true_labels.repeat(blocks),
        )
        repeated = targets.repeat(blocks, 1)
        trust = torch.cat([clean[:half], targets[half:].amax(1)]) if self.unlabelled_quality == "guess" else clean
        quality = self.peer_quality(base, repeated, peer, trust.repeat(blocks))
        views = sanm(network, base.images, repeated, quality, known)

        images = torch.cat([*plain, views.images])
        wanted = torch.cat([targets.repeat(len(plain), 1), views.targets])
        labelled = (torch.arange(len(index), device=index.device) < half).repeat(len(images) // len(index))
        mixed = mixup(images, wanted, generator, self.alpha)
        features = network.forward_features(mixed.images)
        logits = network.forward_head(features)
        supervised, unsupervised = mixmatch_loss(logits, mixed.targets, labelled)
        loss = supervised + self.unsupervised_weight(batch_idx) * unsupervised + prior_penalty(logits)
        if views.box is not None and sanm.reconstruct:
            # what was mixed cannot be painted: the decoder sees the masked views themselves
            features = network.forward_features(views.images)
        return loss + sanm.reconstruction(features, base.images)

    @torch.no_grad()
    def guess(
        self, network: Any, other: Any, looks: list[Tensor], labels: Tensor, clean: Tensor, half: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Refine the given labels of the labelled half, guess those of the other, sharpen both.

        The network in training looks with the batch's own statistics, as in training; its peer as in evaluation.

        Returns:
            Targets (2 half, C), and the network's feature maps of each look.
        """
        own, peer, maps = [], [], []
        for look in looks:
            with without_trace(network, look, batch_statistics=True):
                maps.append(network.forward_features(look))
                own.append(network.forward_head(maps[-1]).float().softmax(1))
            with without_trace(other, look):
                peer.append(other(look[half:]).float().softmax(1))
        mean, guessed = torch.stack(own).mean(0), torch.stack([p[half:] for p in own] + peer).mean(0)
        refined = co_refine(labels[:half], clean[:half], mean[:half])
        return sharpen(torch.cat([refined, guessed]), self.temperature), maps

    def unsupervised_weight(self, batch_idx: int) -> float:
        """Return lambda_u, ramped up after the warm-up."""
        passed = self.current_epoch - self.warmup_epochs + batch_idx / max(1, int(self.trainer.num_training_batches))
        return self.lambda_u * linear_ramp(passed, self.ramp_epochs)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip to the warm-up's own value in the warm-up."""
        if self.warmup_clip and self.current_epoch < self.warmup_epochs:
            gradient_clip_val, gradient_clip_algorithm = self.warmup_clip, "norm"
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
