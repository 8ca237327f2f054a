"""INCV (Chen et al., ICML 2019): iterative cross-validation selects clean samples for Co-teaching."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from sanm_lightning.batch import EpochPlan
from sanm_lightning.callbacks import Stage, locate
from sanm_lightning.functional import clean_probability, linear_ramp, small_loss, soft_cross_entropy, step_fractions
from sanm_lightning.functional.cross_validation import (
    cross_validated,
    cross_validated_noise_rate,
    discarded_fraction,
    largest_losses,
    random_halves,
    remaining_noise_rate,
)
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.batches import permuted_batches
from sanm_lightning.methods.checks import check_range, nonempty_selection
from sanm_lightning.per_sample import Candidates
from sanm_lightning.random_streams import named_generator

__all__ = ["INCV", "Candidates"]


class INCV(NoisyLabelModule):
    """Select the samples whose held-out prediction is their label, in rounds of twofold cross-validation; then co-teach.

    Source: Chen et al., ICML 2019, Algorithms 1 and 2, and the authors' code. In the main stage, with new networks, later steps
    also have candidates, and keep as many samples of the union as without them.

    Departures. Two networks are trained on both halves at the same time (code: one after another, with the same initial
    weights). Steps of a round have a full batch per network, so 25 epochs are about 50 of the code on half of the data. The
    noise rate solves the equation of the paper on both halves (code: a grid up to 1, on one half). The last weights are used,
    where the code keeps the best ones by the held-out labels in the first rounds. Nothing is discarded if the fraction is 0
    (code: all of a half). Samples are ranked in the training pass, in training mode. The mean logits predict (code: each).

    Under SANM, masks are drawn in the main stage, with an estimator that is handed in from the second round on. Label quality
    is 1 for selected samples, and that of the mixture on their last held-out losses for the others.

    Args:
        num_classes: C, number of classes.
        rounds: number of cross-validations; published: 4.
        noise_rate: fraction of wrong labels, in [0, 1); None estimates that of symmetric noise in the first round.
        symmetric: whether the candidates of largest loss are discarded, and labels are wrong in all C - 1 ways; False is the
            published setting for noise between pairs of classes.
        num_gradual: epochs of the main stage over which the excluded fraction increases from 0; published: 10.
        candidates_after: last epoch of the main stage without candidates, from 0; None is 40 of 200 epochs, or 80 with
            ``symmetric: false`` or a noise rate above 0.6, as published; set it if a run is to be extended.
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
        store, half = self.selection, self.halves(number)[found["index"]]
        agreed, losses, accuracy = cross_validated(found["predictions"], found["loss"], found["labels"], half)
        if not store.filled and self.noise_rate is None:
            store.noise_rate = cross_validated_noise_rate(accuracy, self.num_classes)
        fraction = discarded_fraction(store.noise_rate) if self.symmetric else 0.0
        discarded = largest_losses(losses, agreed, half, fraction)
        store.divide(found["index"], agreed, discarded, half >= 0, clean_probability(losses[half >= 0]))
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
        selected = status == Candidates.SELECTED
        if stage.name != "main":
            half = self.halves(number).cpu()[pool]
            parts = [pool[selected | (half == side)] for side in (0, 1)]
            sets = [(part if len(part) else pool, size) for part in parts]
        else:
            selected = nonempty_selection(selected, plan.epoch, type(self).__name__)
            candidates = pool[~selected & (status == Candidates.CANDIDATE)]
            late = plan.epoch - first > self.last_epoch_without_candidates
            joined = min(len(candidates) * size // int(selected.sum()), size // 2) if late else 0
            sets = [(pool[selected], size), *([(candidates, joined)] if joined else [])]
        drawn = [permuted_batches(plan, *part, self.epoch_stream(plan, "draw", n)) for n, part in enumerate(sets)]
        return torch.cat(drawn, 1)

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
