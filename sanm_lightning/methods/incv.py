"""INCV (Chen et al., ICML 2019): iterative cross-validation selects clean samples for Co-teaching."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from sanm_lightning.batch import EpochPlan
from sanm_lightning.callbacks import Stage
from sanm_lightning.callbacks.stages import locate
from sanm_lightning.functional import (
    clean_probability,
    cross_validated_noise_rate,
    discarded_fraction,
    held_out,
    largest_losses,
    linear_ramp,
    random_halves,
    remaining_noise_rate,
    small_loss,
    soft_cross_entropy,
    step_fractions,
)
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.batches import permuted_batches
from sanm_lightning.methods.checks import check_range
from sanm_lightning.per_sample import Candidates
from sanm_lightning.random_streams import named_generator

__all__ = ["INCV", "Candidates"]


class INCV(NoisyLabelModule):
    """Select the samples whose held-out prediction is their label, in rounds of twofold cross-validation; then co-teach.

    Source: Chen et al., ICML 2019, Algorithms 1 and 2, and the authors' code. Each network is trained on the selected samples
    and on one half of the candidates. In the main stage, with new networks, later steps also have candidates, and keep as
    many samples of the union as without them.

    Departures. Both halves are trained at the same time, by two networks, where the code trains them one after another with
    the same initial weights. Steps of a round have a full batch per network, and an epoch has as many steps as the loader:
    25 epochs are about 50 of the code on half of the data. The noise rate is estimated on both halves, by solving the
    equation of the paper; the code searches on a grid, on one half, up to a rate of 1. The last weights are used, where the
    code keeps the ones of the best accuracy on the held-out labels in the first rounds. Nothing is discarded if the fraction
    is 0; in the code, it is then all of a half. Samples are ranked in the training pass, in training mode. The prediction is
    the mean of both networks' logits; the code evaluates each.

    Under SANM, masks are drawn in the main stage, with an estimator that is handed in from the second round on. Label
    quality is 1 for selected samples, and for the others the mixture on the losses of the last round in which they were held
    out.

    Args:
        num_classes: C, number of classes.
        rounds: number of cross-validations; published: 4.
        noise_rate: fraction of wrong labels, in [0, 1); None estimates it from the first cross-validation, as published.
            The estimate is that of symmetric noise.
        symmetric: whether the candidates of largest loss are discarded, and labels are wrong in all C - 1 ways; False is the
            published setting for noise between pairs of classes.
        num_gradual: epochs of the main stage over which the excluded fraction increases from 0; published: 10.
        candidates_after: last epoch of the main stage without candidates, from 0; None is 40 of 200 epochs, or 80 with
            ``symmetric: false`` or a noise rate above 0.6, as published. None depends on ``max_epochs``: give a number if a
            run is to be extended.
        warmup_epochs: length of each round.

    All other arguments are those of :class:`NoisyLabelModule`. The learning rate is multiplied by .5, .25 and .1 after 40, 60
    and 80 % of each round, and divided by 10 after 40, 60 and 80 % of the main stage, and by 2 after 90 %, as published.

    Raises:
        ValueError: if an argument is out of its range, or batches have no index.
    """

    num_networks = 2
    needs_data_module = True
    estimates_quality = True

    def __init__(
        self,
        num_classes: int,
        rounds: int = 4,
        noise_rate: float | None = None,
        symmetric: bool = True,
        num_gradual: int = 10,
        candidates_after: int | None = None,
        warmup_epochs: int = 25,
        **kwargs: Any,
    ) -> None:
        check_range(">= 1", rounds=rounds)
        check_range("in [0, 1) or null", noise_rate=noise_rate)
        check_range(">= 0", num_gradual=num_gradual)
        check_range(">= 0 or null", candidates_after=candidates_after)
        super().__init__(num_classes, warmup_epochs=warmup_epochs, **kwargs)
        self.rounds, self.noise_rate, self.symmetric = rounds, noise_rate, symmetric
        self.num_gradual, self.candidates_after = num_gradual, candidates_after
        self.selection = Candidates(noise_rate or 0.0)
        self.selected_rows = 0  # of a step of the main stage, set with the batches of an epoch

    def stages(self) -> list[Stage]:
        """Return the rounds of cross-validation and the main stage, each with new networks."""
        factor = partial(step_fractions, fractions=(0.4, 0.6, 0.8), factors=(0.5, 0.25, 0.1))
        found = [Stage("warmup", self.warmup_epochs, factor=factor)]
        for number in range(2, self.rounds + 1):
            found.append(Stage(f"round_{number}", self.warmup_epochs, reset="network", factor=factor))
        factor = partial(step_fractions, fractions=(0.4, 0.6, 0.8, 0.9), factors=(0.1, 0.01, 0.001, 0.0005))
        return [*found, Stage("main", reset="network", factor=factor)]

    def halves(self, number: int) -> Tensor:
        """Return the half of each candidate in round ``number``, from 0: (N,) int64, 0 or 1; -1 for other samples."""
        candidate = self.selection.status == Candidates.CANDIDATE
        return random_halves(candidate, named_generator("halves", self.sanm.seed, number))

    def begin_stage(self) -> None:
        """Select and discard candidates by the predictions of the network that was not trained on them."""
        number = locate(self.stages(), self.current_epoch)[0] - 1
        found = self.predict_train("loss", "predictions", "labels", network=None, pool_only=True)
        index, store = found["index"], self.selection
        half = self.halves(number)[index]
        candidate, losses = half >= 0, held_out(found["loss"], half)
        agreed = candidate & (held_out(found["predictions"], half) == found["labels"])
        if not store.filled and self.noise_rate is None:
            accuracy = float(agreed.sum() / candidate.sum().clamp(min=1))
            store.noise_rate = cross_validated_noise_rate(accuracy, self.num_classes)
        status = torch.where(agreed, store.SELECTED, store.status[index])
        if self.symmetric:
            status[largest_losses(losses, agreed, half, discarded_fraction(store.noise_rate))] = store.DISCARDED
        quality = store.given_quality[index].index_put((candidate,), clean_probability(losses[candidate]))
        store.update(index, status=status, given_quality=torch.where(status == store.SELECTED, 1.0, quality))
        rank_zero_info(
            f"INCV: {int((store.status == store.SELECTED).sum())} of {len(store)} samples are selected after round "
            f"{number + 1}, noise rate {store.noise_rate:.3f}"
        )

    def epoch_batches(self, plan: EpochPlan) -> Tensor:
        """Sample a batch for each network from its training set; in the main stage, selected samples and candidates."""
        number, stage, first = locate(self.stages(), plan.epoch)
        self.selected_rows = size = plan.batch_size
        pool = plan.pool(0)
        status = self.selection.status.cpu()[pool]
        selected, candidates = pool[status == Candidates.SELECTED], pool[status == Candidates.CANDIDATE]
        if stage.name != "main":
            half = self.halves(number).cpu()[pool]
            parts = [pool[(status == Candidates.SELECTED) | (half == side)] for side in (0, 1)]
            sets = [(part if len(part) else pool, size) for part in parts]
        else:
            if not len(selected):
                rank_zero_warn(
                    f"expected selected samples in the main stage of INCV, got an empty set in epoch {plan.epoch}; training on "
                    "all samples; raise warmup_epochs"
                )
                selected, candidates = pool, pool[:0]
            late = plan.epoch - first > self.last_epoch_without_candidates
            joined = min(len(candidates) * size // len(selected), size // 2) if late else 0
            sets = [(selected, size), *([(candidates, joined)] if joined else [])]
        draw = partial(named_generator, "draw", self.sanm.seed, plan.draw_epoch)
        return torch.cat([permuted_batches(plan, *part, draw(block)) for block, part in enumerate(sets)], 1)

    @property
    def last_epoch_without_candidates(self) -> int:
        """Last epoch of the main stage whose steps have selected samples only, from 0."""
        if self.candidates_after is not None:
            return self.candidates_after
        published = 80 if not self.symmetric or self.selection.noise_rate > 0.6 else 40
        return self.fraction_of_run(published, 200, after=self.rounds * self.warmup_epochs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the sum of both networks' losses."""
        batch, index = self.indexed(batch)
        if self.stage.name != "main":
            blocks = enumerate(batch.chunk(2))
            losses = [self.learn(part, self.one_hot(part.labels), number).cross_entropy() for number, part in blocks]
            return torch.stack(losses).sum()
        targets, quality = self.one_hot(batch.labels), self.selection.given_quality[index]
        wrong = remaining_noise_rate(self.selection.noise_rate, self.num_classes - 1 if self.symmetric else 1)
        selected = min(len(index), self.selected_rows)
        kept = max(1, round(selected * (1 - wrong * linear_ramp(self.stage_epoch, self.num_gradual)))) / len(index)
        seen = [self.learn(batch, targets, number, quality=quality) for number in (0, 1)]
        chosen = [small_loss(soft_cross_entropy(out.unmasked_logits(), targets), kept) for out in seen]
        losses = [out.cross_entropy(choice) for out, choice in zip(seen, reversed(chosen), strict=True)]
        return torch.stack(losses).sum()
