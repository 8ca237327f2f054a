"""INCV (Chen et al., ICML 2019): iterative cross-validation selects clean samples for Co-teaching."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from sanm_lightning.batch import EpochPlan, NoisyBatch
from sanm_lightning.callbacks import Stage
from sanm_lightning.callbacks.stages import locate
from sanm_lightning.functional import (
    clean_probability,
    cross_validated_noise_rate,
    discarded_fraction,
    largest_losses,
    linear_ramp,
    random_halves,
    remaining_noise_rate,
    repeated_draw,
    small_loss,
    soft_cross_entropy,
    step_fractions,
)
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.checks import check_ranges, require_index
from sanm_lightning.per_sample import LabelStore
from sanm_lightning.random_streams import named_generator

__all__ = ["INCV", "Candidates"]

CANDIDATE, SELECTED, DISCARDED = 0, 1, 2


class Candidates(LabelStore):
    """Which samples are candidates, selected or discarded, the quality of their labels, and the noise rate.

    Args:
        noise_rate: fraction of wrong labels; 0 before it is estimated.
    """

    status: Tensor
    """(N,) int64: 0 candidate, 1 selected, 2 discarded."""

    def __init__(self, noise_rate: float) -> None:
        super().__init__(dist_reduce_fx=None)
        self.noise_rate = noise_rate
        self.add_state("status", dtype=torch.int64, dist_reduce_fx=None)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the tables and the noise rate."""
        return {**super().get_extra_state(), "noise_rate": self.noise_rate}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        super().set_extra_state(state)
        self.noise_rate = float(state.get("noise_rate", self.noise_rate))


class INCV(NoisyLabelModule):
    """Select the samples whose held-out prediction is their label, in rounds of twofold cross-validation; then co-teach.

    Source: Chen et al., ICML 2019, Algorithms 1 and 2, and the authors' code. In each round, the candidates are divided into
    two halves, and network 1 is trained on the selected samples and the first half, network 2 on the selected samples and
    the second half. Held-out candidates that are predicted as labeled are selected; under symmetric noise, those of largest
    loss are discarded. The main stage is Co-teaching of two new networks on the selected samples; later, a step also has
    candidates, and keeps as many samples of the union as without them.

    Departures. Both halves are trained at the same time, by two networks, where the code trains them one after another with
    the same initial weights. Steps of a round have a full batch per network, and an epoch has as many steps as the loader:
    25 epochs are about 50 of the code on half of the data. The noise rate is estimated on both halves, by solving the
    equation of the paper; the code searches on a grid, on one half, up to a rate of 1. The last weights are used, where the
    code keeps the ones of the best accuracy on the held-out labels in the first rounds. Nothing is discarded if the fraction
    is 0; in the code, it is then all of a half. Samples are ranked in the training pass, in training mode.

    Prediction: the mean of both networks' logits; the code evaluates each.

    Under SANM, masks are drawn in the main stage, with an estimator that is handed in from the second round on. Label
    quality is 1 for selected samples, and for the others the mixture on the losses of the last round in which they were held
    out.

    Args:
        num_classes: C, number of classes.
        rounds: number of cross-validations; published: 4.
        noise_rate: fraction of wrong labels, in [0, 1); None estimates it from the first cross-validation, as published.
            The estimate is that of symmetric noise.
        symmetric: whether samples are discarded, and labels are wrong in all C - 1 ways; False is the published setting for
            noise between pairs of classes.
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
        check_ranges(
            ("rounds >= 1", rounds, rounds >= 1),
            ("noise_rate in [0, 1)", noise_rate, noise_rate is None or 0 <= noise_rate < 1),
            ("num_gradual >= 0", num_gradual, num_gradual >= 0),
            ("candidates_after >= 0", candidates_after, candidates_after is None or candidates_after >= 0),
        )
        super().__init__(num_classes, warmup_epochs=warmup_epochs, **kwargs)
        self.rounds, self.noise_rate, self.symmetric = rounds, noise_rate, symmetric
        self.num_gradual, self.candidates_after = num_gradual, candidates_after
        self.selection = Candidates(noise_rate or 0.0)
        self.selected_rows = 0  # of a step of the main stage, set with the batches of an epoch

    def stages(self) -> list[Stage]:
        """Return the rounds of cross-validation and the main stage, each with new networks."""
        factor = partial(step_fractions, fractions=(0.4, 0.6, 0.8), factors=(0.5, 0.25, 0.1))
        later = [
            Stage(f"round_{number}", self.warmup_epochs, reset="network", factor=factor)
            for number in range(2, self.rounds + 1)
        ]
        factor_main = partial(step_fractions, fractions=(0.4, 0.6, 0.8, 0.9), factors=(0.1, 0.01, 0.001, 0.0005))
        return [
            Stage("warmup", self.warmup_epochs, factor=factor),
            *later,
            Stage("main", reset="network", factor=factor_main),
        ]

    # Between stages: select

    def halves(self, number: int) -> Tensor:
        """Return the half of each candidate in round ``number``, from 0: (N,) int64, 0 or 1; -1 for other samples."""
        return random_halves(self.selection.status == CANDIDATE, named_generator("halves", self.sanm.seed, number))

    def begin_stage(self) -> None:
        """Select and discard candidates by the predictions of the network that was not trained on them."""
        number = locate(self.stages(), self.current_epoch)[0] - 1
        found = self.predict_train("loss", "predictions", "labels", network=None, pool_only=True)
        index, store = found["index"], self.selection
        half = self.halves(number)[index]
        candidate, judge = half >= 0, ((1 - half).clamp(max=1), torch.arange(len(index), device=index.device))
        losses, agreed = found["loss"][judge], candidate & (found["predictions"][judge] == found["labels"])
        if not store.filled and self.noise_rate is None:
            accuracy = float(agreed.sum() / candidate.sum().clamp(min=1))
            store.noise_rate = cross_validated_noise_rate(accuracy, self.num_classes)
        status = torch.where(agreed, SELECTED, store.status[index])
        if self.symmetric:
            status[largest_losses(losses, agreed, half, discarded_fraction(store.noise_rate))] = DISCARDED
        quality = store.given_quality[index].index_put((candidate,), clean_probability(losses[candidate]))
        store.update(index, status=status, given_quality=torch.where(status == SELECTED, 1.0, quality))
        rank_zero_info(
            f"INCV: {int((store.status == SELECTED).sum())} of {len(store)} samples are selected after round {number + 1}, "
            f"noise rate {store.noise_rate:.3f}"
        )

    def label_quality(self) -> Tensor | None:
        """Return 1 for selected samples and the mixture on held-out losses for others, (N,); None before the selection."""
        return self.selection.given_quality if self.selection.filled else None

    def epoch_batches(self, plan: EpochPlan) -> Tensor:
        """Sample a batch for each network from its training set; in the main stage, selected samples and candidates."""
        number, stage, first = locate(self.stages(), plan.epoch)
        self.selected_rows = plan.batch_size
        pool = plan.pool(0)
        status = self.selection.status.cpu()[pool]
        selected, candidates = pool[status == SELECTED], pool[status == CANDIDATE]
        if stage.name != "main":
            half = self.halves(number).cpu()[pool]
            parts = [pool[(status == SELECTED) | (half == side)] for side in (0, 1)]
            sets = [(part if len(part) else pool, plan.batch_size) for part in parts]
        else:
            if not len(selected):
                rank_zero_warn(
                    f"expected selected samples in the main stage of INCV, got an empty set in epoch {plan.epoch}; training on "
                    "all samples; raise warmup_epochs"
                )
                selected, candidates = pool, pool[:0]
            joined = min(len(candidates) * plan.batch_size // len(selected), plan.batch_size // 2)
            late = plan.epoch - first > self.last_epoch_without_candidates
            sets = [(selected, plan.batch_size), *([(candidates, joined)] if late and joined else [])]
        blocks = []
        for block, (members, size) in enumerate(sets):
            generator = named_generator("draw", self.sanm.seed, plan.epoch, block)
            order = repeated_draw(members, plan.world_size * plan.steps * size, generator)
            blocks.append(order[plan.rank :: plan.world_size].view(plan.steps, size))
        return torch.cat(blocks, 1)

    @property
    def last_epoch_without_candidates(self) -> int:
        """Last epoch of the main stage whose steps have selected samples only, from 0."""
        if self.candidates_after is not None:
            return self.candidates_after
        epochs = None if self._trainer is None else self._trainer.max_epochs
        main = 200 if epochs is None or epochs < 0 else max(0, epochs - self.rounds * self.warmup_epochs)
        return main * (80 if not self.symmetric or self.selection.noise_rate > 0.6 else 40) // 200

    # Each step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the sum of both networks' losses."""
        batch = NoisyBatch.from_any(batch)
        index = require_index(batch, type(self).__name__)
        _, stage, first = locate(self.stages(), self.current_epoch)
        if stage.name != "main":
            learned = [
                self.learn(block, self.one_hot(block.labels), number) for number, block in enumerate(batch.chunk(2))
            ]
            return torch.stack([out.cross_entropy() for out in learned]).sum()
        targets, quality = self.one_hot(batch.labels), self.selection.given_quality[index]
        kept = self.kept(self.current_epoch - first, min(len(index), self.selected_rows)) / len(index)
        seen = [self.learn(batch, targets, number, quality=quality) for number in (0, 1)]
        chosen = []
        for out in seen:
            assert out.clean_logits is not None
            chosen.append(small_loss(soft_cross_entropy(out.clean_logits.detach(), targets), kept))
        losses = [out.cross_entropy(choice) for out, choice in zip(seen, reversed(chosen), strict=True)]
        return torch.stack(losses).sum()

    def kept(self, epoch: int, rows: int) -> int:
        """Return the number of samples that each network selects in a step of the main stage.

        Args:
            epoch: epoch of the main stage, from 0.
            rows: number of selected samples of the step.
        """
        wrong = remaining_noise_rate(self.selection.noise_rate, self.num_classes - 1 if self.symmetric else 1)
        return max(1, round(rows * (1 - wrong * linear_ramp(epoch, self.num_gradual))))
