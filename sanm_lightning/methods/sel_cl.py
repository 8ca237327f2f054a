"""Sel-CL and Sel-CL+ (Li et al., CVPR 2022): supervised contrast of pairs that are selected without a known noise rate."""

from typing import Any

import torch
from torch import Tensor

from sanm_lightning.batch import EpochPlan, NoisyBatch, View
from sanm_lightning.functional import (
    ContrastKeys,
    Mixed,
    clipped_gradient_term,
    pair_similarity,
    pair_threshold,
    partnered_contrast,
    selected_pairs,
    view_positives,
    zero_term,
)
from sanm_lightning.methods.batches import permuted_batches
from sanm_lightning.methods.checks import check_range, refuse_compiled
from sanm_lightning.methods.feature_queue import Payload
from sanm_lightning.methods.momentum_contrast import MomentumContrast
from sanm_lightning.methods.selected_contrast import SelectedContrast
from sanm_lightning.per_sample import Embeddings
from sanm_lightning.random_streams import named_generator

__all__ = ["SelCL"]


class SelCL(MomentumContrast, SelectedContrast):
    """Contrast without labels, then supervised contrast of selected pairs and cross-entropy on selected samples; fine-tune.

    Source: Li et al., CVPR 2022, Algorithm 1, and the authors' code. The third stage is Sel-CL+, as :class:`MOIT`'s. Values
    published for CIFAR-100 are in ``configs/setting/sel_cl``.

    Departures: similarities are computed for the pairs of a step only, where one version of the code stores those of all
    samples. The quantile is that of 64 random pairs per sample (code: 500). A sample has a partner if there is one in the batch
    or the queue; the code requires two rows. Selected samples come in random rounds, where the code samples with replacement.
    The current batch is contrasted in addition to the queue. The classifier's weight decay is applied in the first stage. The
    third stage differs as in :class:`MOIT`. ``similarity_clip`` is None by default (code: 0.25). The option of the code for a
    supervised first stage (WebVision) is not available.

    With several processes, a batch is contrasted within its process, and with the queues of all processes.

    Under SANM, the first view of the second batch is masked. Label quality is the fraction of the votes for the given label.

    Args:
        num_classes: C, number of classes.
        pair_quantile: quantile of the similarities within the classes of selected samples, from which on other pairs of a
            class are selected, in [0, 1].
        negatives: number of keys in the queue of MoCo.
        decay: weight of the old average in an update of the key encoder, in [0, 1).
        w_similarity: weight of the similarity of predictions, >= 0; 0 omits it.
        similarity_clip: norm to which its gradient is clipped, as in the code (0.25), by one more backward pass; None does not.
        weighted_votes: whether votes of neighbors are weighted by exp(similarity / temperature), as in the version of the code
            for large sets; in the other version, they have equal weights.
        warmup_epochs: length of the first stage; published: 1.

    All other arguments are those of :class:`~sanm_lightning.methods.selected_contrast.SelectedContrast`.

    Raises:
        ValueError: if an argument is out of its range.
    """

    threshold: Tensor
    """Similarity from which on pairs are selected, a scalar."""

    def __init__(
        self,
        num_classes: int,
        pair_quantile: float = 0.25,
        memory_per_class: int = 1000,
        negatives: int = 10000,
        decay: float = 0.999,
        w_similarity: float = 0.01,
        similarity_clip: float | None = None,
        weighted_votes: bool = False,
        warmup_epochs: int = 1,
        **kwargs: Any,
    ) -> None:
        check_range("in [0, 1]", pair_quantile=pair_quantile)
        check_range("in [0, 1)", decay=decay)
        check_range(">= 1", negatives=negatives)
        check_range(">= 0", w_similarity=w_similarity)
        check_range("> 0 or null", similarity_clip=similarity_clip)
        if similarity_clip is not None:
            refuse_compiled("the similarity_clip of SelCL", kwargs.get("compile_network"))
        super().__init__(num_classes, memory_per_class=memory_per_class, warmup_epochs=warmup_epochs, **kwargs)
        self.weighted_votes = weighted_votes
        self.pair_quantile, self.w_similarity, self.similarity_clip = pair_quantile, w_similarity, similarity_clip
        self.add_key_encoder(negatives, decay)
        self.embeddings = Embeddings(self.projection.out_features)
        self.register_state("threshold", torch.tensor(1.0), cast=False)

    def memory_payload(self) -> Payload:
        """Return the class probabilities and the positions."""
        return {"probs": ((self.num_classes,), torch.float32), "index": ((), torch.int64)}

    def views(self) -> tuple[View, ...]:
        """Return two views of each block: in the second stage, all samples and selected samples."""
        found = super().views()
        return tuple((self.view, self.view) for _ in found) if self.stage.name == "select" else found

    def on_selection(self, index: Tensor, embeddings: Tensor, labels: Tensor, selected: Tensor) -> None:
        """Store the embeddings, and compute the threshold of the pairs."""
        self.embeddings.update(index, embeddings)
        generator = named_generator("pairs", self.sanm.seed, self.current_epoch)
        chosen = (embeddings[selected], labels[selected])
        self.threshold = pair_threshold(*chosen, self.num_classes, self.pair_quantile, generator).to(self.threshold)

    def epoch_batches(self, plan: EpochPlan) -> Tensor | None:
        """In the second stage, sample all samples and selected samples, both in random rounds."""
        if self.stage.name != "select":
            return super().epoch_batches(plan)
        pool = plan.pool(0)
        rounds = permuted_batches(plan, pool, plan.step_size(pool), self.epoch_stream(plan, "round"))
        return torch.cat([rounds, self.selected_batches(plan)], 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        batch, _ = self.indexed(batch)
        if self.stage.name == "finetune":
            return self.finetune(batch)
        if self.stage.name == "warmup":
            return self.unsupervised(batch).mean() + zero_term(self.parameters())
        every, drawn = batch.chunk(2)
        targets, quality = self.one_hot(drawn.labels), self.detected.quality[drawn.index]
        loss, _ = self.classified_views(drawn, targets, quality, embed=False)
        supervised, partnered = self.supervised(every)
        return loss + supervised + (self.unsupervised(every) * ~partnered).mean()

    def supervised(self, batch: NoisyBatch) -> tuple[Tensor, Tensor]:
        """Return the contrast and the similarity over selected pairs, a scalar, and which samples have a partner, (B,)."""
        index: Any = batch.index
        labels, queue = self.one_hot(batch.labels), self.queue
        mixed: list[Mixed] = [self.mix(number)(view, labels) for number, view in enumerate(batch.views, 3)]
        maps = [self.network.forward_features(view.images) for view in mixed]
        views = self.embedded(maps, mixed)
        probs = torch.cat([self.network.forward_head(part) for part in maps]).float().softmax(1)
        queued = None if queue is None else self.pairs(index, queue.index) & queue.valid
        near = view_positives(self.pairs(index, index), views.partners, queued)
        compared = [ContrastKeys(views.embeddings, probs, *(part[:, : len(probs)] for part in near))]
        if queue is not None:
            keys, key_probs = (torch.cat(part) for part in zip(*(self.key(view.images) for view in mixed), strict=True))
            others, valid = queue.behind(keys)
            compared.append(ContrastKeys(others, torch.cat([key_probs, queue.probs]), *near, valid))
            queue.enqueue(keys, probs=key_probs, index=index.repeat(2))
        found = [partnered_contrast(views, rows, self.temperature) for rows in compared]
        contrast, partnered = torch.stack([loss for loss, _ in found]).sum(), found[-1][1]
        if not self.w_similarity:
            return contrast, partnered
        pairs = [pair_similarity(probs, r.probs, views.lam, r.major, r.minor, r.valid) for r in compared]
        similarity = self.w_similarity * torch.stack(pairs).sum()
        return contrast + clipped_gradient_term(similarity, self.network.parameters(), self.similarity_clip), partnered

    def pairs(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the selected pairs (B, M) of samples ``rows`` (B,) and ``columns`` (M,); a sample pairs with itself."""
        tables = (self.detected.labels, self.embeddings.features, self.detected.selected)
        labels, embeddings, selected = ((table[rows], table[columns]) for table in tables)
        return selected_pairs(labels, embeddings, selected, self.threshold) | (rows[:, None] == columns)
