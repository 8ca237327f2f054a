"""SSR (Feng, Tzimiropoulos and Patras, BMVC 2022): select by a vote of neighbours, relabel by confidence."""

from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.mixup import mixup
from sanm_lightning.sanm.quality import fit_mixture, label_loss, mixture_posterior

__all__ = [
    "SSR",
    "Selection",
    "balanced_votes",
    "class_balanced_draw",
    "feature_consistency",
    "knn_vote",
    "members_by_class",
    "relabel",
]


def relabel(labels: Tensor, probabilities: Tensor, threshold: float) -> Tensor:
    """Replace given labels (N,) by the predicted class wherever its probability (N, C) is above ``threshold``: (N,) int64."""
    confidence, predicted = probabilities.max(1)
    return torch.where(confidence > threshold, predicted, labels)


def knn_vote(features: Tensor, labels: Tensor, k: int, num_classes: int, chunk: int = 1024) -> Tensor:
    """Let the k nearest samples vote on each sample's class, itself among them.

    Exact search by cosine similarity, chunk by chunk: no (N, N) matrix is held.

    Args:
        features: shape (N, D), any length.
        labels: the votes, shape (N,).
        k: neighbours, 1 to N.
        num_classes: C.
        chunk: rows searched at once.

    Returns:
        Shares of the votes, shape (N, C), each row sums to 1.

    Raises:
        ValueError: if k is not in 1 to N.
    """
    if not 1 <= k <= len(features):
        raise ValueError(f"expected k in 1 to {len(features)}, the number of samples, got {k} neighbours")
    features = F.normalize(features.float(), dim=1)
    votes = F.one_hot(labels, num_classes).float()
    shares = []
    for rows in features.split(chunk):
        neighbours = (rows @ features.T).topk(k, dim=1).indices
        shares.append(torch.stack([votes[column] for column in neighbours.T]).mean(0))
    return torch.cat(shares)


def balanced_votes(shares: Tensor, labels: Tensor) -> Tensor:
    """Divide votes (N, C) by how often each class is voted for at all, labels (N,), and normalise the rows again."""
    prior = F.one_hot(labels, shares.shape[1]).float().mean(0)
    weighed = shares / (prior + 1e-10)
    return weighed / weighed.sum(1, keepdim=True).clamp(min=1e-10)


def members_by_class(pool: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Sort the members of ``pool`` (n,) by their labels (n,): members (n,), and how many of each class, (C,)."""
    return pool[labels.argsort(stable=True)], labels.bincount(minlength=num_classes)


def class_balanced_draw(members: Tensor, sizes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` members with replacement: first a class that has any, then one of its members.

    Args:
        members: from :func:`members_by_class`, shape (n,), n >= 1, on the CPU.
        sizes: of the classes, likewise, shape (C,).
        count: how many.
        generator: source of all randomness, on the CPU.

    Returns:
        Positions, shape (count,).
    """
    present = sizes.nonzero()[:, 0]
    classes = present[torch.randint(len(present), (count,), generator=generator)]
    place = (torch.rand(count, generator=generator, dtype=torch.float64) * sizes[classes]).long()
    return members[(sizes.cumsum(0) - sizes)[classes] + place]


def feature_consistency(predicted: Tensor, target: Tensor) -> Tensor:
    """Negative mean cosine similarity of (B, P) predictions with (B, P) targets that get no gradient: a scalar in [-1, 1]."""
    return -F.cosine_similarity(predicted.float(), target.detach().float(), dim=1).mean()


class Selection(nn.Module):
    """What the last vote said of each training sample; saved as tensors (``get_extra_state``), the same on all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.labels = torch.zeros(0, dtype=torch.int64)
        """(N,): given labels, or predicted ones where the network was sure."""
        self.selected = torch.zeros(0, dtype=torch.bool)
        """(N,): whether the vote agrees with the label."""
        self.quality = torch.zeros(0)
        """(N,): what SANM takes for the quality of the label."""
        self.given_quality = torch.zeros(0)
        """(N,): the same of the given label."""

    _names = ("labels", "selected", "quality", "given_quality")

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return all tensors, on the CPU."""
        return {name: getattr(self, name).cpu().clone() for name in self._names}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Take over a state, whatever the number of samples was before.

        Raises:
            RuntimeError: it lacks a tensor, as those of other versions do; the module that is loaded says so in a sentence.
        """
        lacking = [name for name in self._names if name not in state]
        if lacking:
            raise RuntimeError(f"the selection has no {', '.join(lacking)}, as one of another version")
        for name in self._names:
            setattr(self, name, state[name].clone())


class SSR(NoisyLabelModule):
    """Once per epoch relabel and select; learn from the selected samples, and from the consistency of two views of all.

    Source: Feng et al., BMVC 2022, and the authors' code. One network, no warm-up.

    Departures. Features and predictions of the whole set come from unaugmented images, where the code takes weak views. Each
    step draws a class and then one of its selected members, as many samples as the loader's batch; the code goes through
    the selected samples in rounds with every class repeated to the size of the largest. An empty selection falls back on all
    samples, and the log says so.

    Under SANM both strong views of the selected samples are masked and their labels regularised, then mixed. Label quality
    comes from the votes for the label; the score that selects is 1 for every selected sample and would hide nothing. A share
    of the votes ranks labels but is no probability: where neighbours disagree, right labels win with .4 of the votes, wrong
    ones with .3, and SANM would hide and soften almost as much of both. A mixture of two Gaussians over all shares, as
    DivideMix has it over losses, makes a probability of it.

    Args:
        num_classes: C.
        theta_s: score from which a sample is selected, in [0, 1]; 1: its label wins the vote.
        theta_r: confidence above which the predicted class replaces the given label, in [0, 1].
        k: neighbours that vote, itself among them.
        alpha: of mixup's Beta distribution, >= 0.
        lambda_fc: weight of the feature consistency, >= 0: 1 is the authors' SSR+, 0 their SSR.
        hidden: width inside the two heads of the feature consistency.
        strong_view: data-module policy of the strong views.
        vote_quality: what SANM takes for the quality of a label: ``"mixture"``, the probability that its share of the votes
            belongs to the larger shares of the training set; or the ``"share"`` itself.
        warmup_epochs: epochs of plain cross-entropy at first; published: none.
        chunk: samples whose neighbours are searched at once.

    All other arguments are those of :class:`NoisyLabelModule`.

    Raises:
        ValueError: if an argument is out of its range, there are fewer training samples than neighbours, or (with
            ``lambda_fc``) a batch has one sample only.
    """

    needs_data_module = True

    def __init__(
        self,
        num_classes: int,
        theta_s: float = 1.0,
        theta_r: float = 0.9,
        k: int = 200,
        alpha: float = 4.0,
        lambda_fc: float = 1.0,
        hidden: int = 256,
        strong_view: str = "auto_augment",
        vote_quality: Literal["mixture", "share"] = "mixture",
        warmup_epochs: int = 0,
        chunk: int = 1024,
        **kwargs: Any,
    ) -> None:
        for name, value, good in (
            ("theta_s in [0, 1]", theta_s, 0 <= theta_s <= 1),
            ("theta_r in [0, 1]", theta_r, 0 <= theta_r <= 1),
            ("k >= 1", k, k >= 1),
            ("alpha >= 0", alpha, alpha >= 0),
            ("lambda_fc >= 0", lambda_fc, lambda_fc >= 0),
            ("hidden >= 1", hidden, hidden >= 1),
            ("vote_quality 'mixture' or 'share'", vote_quality, vote_quality in ("mixture", "share")),
            ("chunk >= 1", chunk, chunk >= 1),
        ):
            if not good:
                raise ValueError(f"expected {name}, got {value!r}")
        super().__init__(num_classes, warmup_epochs=warmup_epochs, **kwargs)
        self.theta_s, self.theta_r, self.k, self.chunk = theta_s, theta_r, k, chunk
        self.alpha, self.lambda_fc, self.strong_view, self.vote_quality = alpha, lambda_fc, strong_view, vote_quality
        self.selection = Selection()
        self._members: tuple[Tensor, Tensor] | None = None  # the selected samples by class, sorted once per epoch
        if lambda_fc > 0:
            self.projection = _head(int(self.network.num_features), hidden)
            self.predictor = _head(128, hidden)

    def on_train_start(self) -> None:
        """Refuse a training set that is smaller than the number of neighbours, and batches of one for the heads."""
        super().on_train_start()
        samples = int(self.trainer.datamodule.num_samples)  # type: ignore[attr-defined]
        if samples < self.k:
            raise ValueError(
                f"expected at least k = {self.k} training samples, one per neighbour, got {samples}; lower k"
            )
        batch = min(self.trainer.datamodule.batch_size, -(-samples // self.trainer.world_size))  # type: ignore[attr-defined]
        if self.lambda_fc > 0 and batch == 1:
            raise ValueError(
                "expected at least 2 samples per step and process for the batch norm in the heads of the feature consistency, "
                "got 1; raise data.batch_size, use fewer processes, or set lambda_fc: 0"
            )

    # Once per epoch: relabel, vote, select

    def begin_epoch(self) -> None:
        """Relabel and select, after the warm-up."""
        if self.current_epoch < self.warmup_epochs:
            return
        given, features, probabilities = self._everything()
        labels = relabel(given, probabilities, self.theta_r)
        votes = balanced_votes(knn_vote(features, labels, self.k, self.num_classes, self.chunk), labels)
        share, given_share = (votes.gather(1, judged[:, None])[:, 0] for judged in (labels, given))
        selected = share / votes.max(1).values >= self.theta_s
        if not bool(selected.any()):
            rank_zero_warn(f"SSR, epoch {self.current_epoch}: the selection is empty, so all samples are learned from")
            selected = torch.ones_like(selected)
        found, self._members = self.selection, None
        found.labels, found.selected = labels.cpu(), selected.cpu()
        found.quality, found.given_quality = (part.cpu() for part in self._judge(share, given_share))

    def _everything(self) -> tuple[Tensor, Tensor, Tensor]:
        """Given labels (N,), features (N, D) and probabilities (N, C) of the training set, the same on all ranks."""
        count = int(self.trainer.datamodule.num_samples)  # type: ignore[attr-defined]
        features = torch.zeros(count, self.network.num_features, device=self.device)
        probabilities = torch.zeros(count, self.num_classes, device=self.device)
        labels = torch.zeros(count, dtype=torch.int64, device=self.device)
        for batch in self.training_set():
            maps = self.network.forward_features(batch.images)
            features[batch.index] = F.normalize(self.network.forward_head(maps, pre_logits=True).float(), dim=1)
            probabilities[batch.index] = self.network.forward_head(maps).float().softmax(1)
            labels[batch.index] = batch.labels
        parts = [self.trainer.strategy.reduce(part, reduce_op="sum") for part in (labels, features, probabilities)]
        return parts[0], parts[1], parts[2]  # type: ignore[return-value]

    def _judge(self, share: Tensor, given_share: Tensor) -> tuple[Tensor, Tensor]:
        """Quality of the labels and of the given ones, from their shares of the votes: all (N,), in [0, 1]."""
        if self.vote_quality == "share":
            return share, given_share
        mixture = fit_mixture(1 - share)  # the component of lower mean is that of the larger shares
        return mixture_posterior(mixture, 1 - share), mixture_posterior(mixture, 1 - given_share)

    def clean_probability(self) -> Tensor | None:
        """Return the quality of each given label, (N,), as the votes have it; None before the first vote."""
        return self.selection.given_quality if len(self.selection.given_quality) else None

    # Each step

    def training_step(self, batch: NoisyBatch, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        batch = NoisyBatch(*batch)
        assert batch.index is not None
        generator = self.random_stream(batch_idx)
        warming_up = self.current_epoch < self.warmup_epochs
        loss = self._plain(batch) if warming_up else self.learn(len(batch.index), generator)
        if self.lambda_fc > 0:
            weak, strong = self.views(batch.index, generator, "weak", self.strong_view)
            with torch.no_grad():
                target = self.projection(self._pooled(weak))
            loss = loss + self.lambda_fc * feature_consistency(
                self.predictor(self.projection(self._pooled(strong))), target
            )
        return loss

    def learn(self, count: int, generator: torch.Generator) -> Tensor:
        """Return the cross-entropy of mixed strong views of ``count`` selected samples."""
        found = self.selection
        if self._members is None:  # on the CPU, as the draw
            pool = found.selected.nonzero()[:, 0]
            self._members = members_by_class(pool, found.labels[pool], self.num_classes)
        drawn = class_balanced_draw(*self._members, count, generator)
        index = drawn.to(self.device, non_blocking=True).repeat(2)
        labels, quality = (
            part[drawn].to(self.device, non_blocking=True).repeat(2) for part in (found.labels, found.quality)
        )
        images = torch.cat(self.views(index[:count], generator, self.strong_view, self.strong_view))
        true_labels = self.trainer.datamodule.batch("train", index).true_labels  # type: ignore[attr-defined]  # for the oracle
        batch, targets = NoisyBatch(images, labels, index, true_labels), self.one_hot(labels)
        views = self.sanm(self.network, images, targets, self.quality(batch, targets, quality))
        mixed = mixup(views.images, views.targets, generator, self.alpha)
        features = self.network.forward_features(mixed.images)
        loss = label_loss(self.network.forward_head(features), mixed.targets).mean()
        if views.box is not None and self.sanm.reconstruct:  # what was mixed cannot be painted
            features = self.network.forward_features(views.images)
        return loss + self.sanm.reconstruction(features, images)

    def _plain(self, batch: NoisyBatch) -> Tensor:
        targets = self.one_hot(batch.labels)
        views = self.sanm(self.network, batch.images, targets, None)
        features = self.network.forward_features(views.images)
        loss = label_loss(self.network.forward_head(features), views.targets).mean()
        return loss + self.sanm.reconstruction(features, batch.images)

    def _pooled(self, images: Tensor) -> Tensor:
        pooled: Tensor = self.network.forward_head(self.network.forward_features(images), pre_logits=True)
        return pooled


def _head(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 128))
