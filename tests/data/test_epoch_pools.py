"""Subsets of an epoch: sizes, balance, and what is drawn anew."""

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sanm_lightning import DivideMix
from sanm_lightning.data import Toy
from sanm_lightning.data.datamodule import Source
from sanm_lightning.data.epoch_pools import balanced_pool, random_pool
from sanm_lightning.methods import SSR
from tests.methods.test_every_method import SMALL, empty_sets_allowed
from tests.methods.toy import trainer

quick = settings(max_examples=40, deadline=None)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestBalancedPool:
    @quick
    @given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(1, 80), st.integers(0, 99))
    def test_has_the_asked_size_and_equal_classes(self, labels: list[int], count: int, seed: int) -> None:
        given_labels = torch.tensor(labels)
        pool = balanced_pool(given_labels, 12, count, generator(seed))
        assert len(pool) == count
        sizes = given_labels[pool].bincount(minlength=12)[given_labels.unique()]
        assert int(sizes.max() - sizes.min()) <= 1

    @quick
    @given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 80))
    def test_a_sample_is_repeated_only_where_its_class_is_too_small(self, labels: list[int], count: int) -> None:
        given_labels = torch.tensor(labels)
        pool = balanced_pool(given_labels, 4, count, generator())
        for label in given_labels.unique().tolist():
            own = pool[given_labels[pool] == label]
            assert len(own.unique()) == min(len(own), labels.count(label))

    def test_without_a_size_is_as_large_as_the_smallest_class_allows(self) -> None:
        labels = torch.tensor([0] * 7 + [2] * 3)
        pool = balanced_pool(labels, 3, None, generator())
        assert labels[pool].tolist() == [0, 0, 0, 2, 2, 2]

    def test_reaches_every_sample_in_time(self) -> None:
        labels = torch.tensor([0] * 9 + [1] * 3)
        seen = torch.cat([balanced_pool(labels, 2, None, generator(seed)) for seed in range(60)])
        assert seen.unique().tolist() == list(range(12))


def test_a_random_pool_repeats_nothing_before_all_were_drawn() -> None:
    assert sorted(random_pool(9, 5, generator()).unique().tolist()) == sorted(random_pool(9, 5, generator()).tolist())
    assert random_pool(4, 10, generator()).bincount().tolist() in [
        [3, 3, 2, 2][i:] + [3, 3, 2, 2][:i] for i in range(4)
    ] or (sorted(random_pool(4, 10, generator()).bincount().tolist()) == [2, 2, 3, 3])


class Rare(Toy):
    """48 training samples, of which class 3 has three."""

    def load_train(self) -> Source:
        labels, images, *_ = super().load_train()
        kept = torch.cat([(labels == c).nonzero()[:, 0][: 3 if c == 3 else 15] for c in range(4)])
        assert isinstance(images, Tensor)
        return Source(labels[kept], images[kept])


class Steps(L.Callback):
    def __init__(self) -> None:
        self.index: list[list[int]] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        self.index.append(batch.index.tolist())  # type: ignore[attr-defined]


class TestDataModule:
    def test_by_default_every_sample_is_used_in_its_order(self) -> None:
        assert torch.equal(Toy(seed=3).epoch_pool(2, 1), torch.arange(64))

    def test_options_change_with_epoch_and_network_and_with_nothing_else(self) -> None:
        data, twin = (Rare(seed=3, balanced=True, samples_per_epoch=24) for _ in range(2))
        assert data.labels[data.epoch_pool(0)].bincount().tolist() == [6] * 4
        assert torch.equal(data.epoch_pool(1, 1), twin.epoch_pool(1, 1))
        assert len({tuple(data.epoch_pool(e, p).tolist()) for e in range(3) for p in (0, 1)}) == 6
        assert Rare(seed=3, balanced=True).epoch_pool(0).shape == (12,)
        assert Toy(seed=3, samples_per_epoch=20).epoch_pool(0).unique().shape == (20,)

    def test_a_size_given_by_the_smallest_class_is_logged_once(self, caplog: pytest.LogCaptureFixture) -> None:
        data = Rare(seed=3, balanced=True)
        with caplog.at_level("INFO", "lightning.pytorch"):
            for epoch in (0, 1):
                data.epoch_pool(epoch)
        assert [record.message for record in caplog.records] == [
            "balanced: an epoch has 12 of 48 training samples, as many of each class as the smallest one has; set "
            "samples_per_epoch to repeat these"
        ]

    def test_steps_and_samples_of_an_epoch_are_those_of_the_pool(self) -> None:
        data, steps = Rare(seed=3, balanced=True, samples_per_epoch=24, batch_size=8), Steps()
        module = SSR(**SMALL, k=3, warmup_epochs=1, lambda_fc=0)
        with empty_sets_allowed():
            trainer(2, callbacks=[steps]).fit(module, data)
        assert len(steps.index) == 6
        assert sorted(sample for row in steps.index[:3] for sample in row) == sorted(data.epoch_pool(0).tolist())
        assert {sample for row in steps.index[3:] for sample in row} <= set(data.epoch_pool(1).tolist())

    def test_refuses_no_samples(self) -> None:
        with pytest.raises(ValueError, match="expected samples_per_epoch of 1 or more, got 0; choose a larger one"):
            Toy(samples_per_epoch=0)


class TestDivision:
    """What DivideMix and SSR judge are the samples of the pools, and no others."""

    def test_each_network_trains_on_its_own_pool_which_both_have_judged(self) -> None:
        data, steps = Rare(seed=3, balanced=True, samples_per_epoch=12, batch_size=4), Steps()
        torch.manual_seed(0)
        module = DivideMix(**SMALL, warmup_epochs=0, ramp_epochs=1.0)
        with empty_sets_allowed():
            trainer(1, callbacks=[steps]).fit(module, data)
        pools = [set(data.epoch_pool(0, peer).tolist()) for peer in (0, 1)]
        assert pools[0] != pools[1]
        rows = torch.tensor(steps.index)  # half a batch labeled, half unlabeled, for each network
        assert set(rows[:, :4].flatten().tolist()) <= pools[0] and set(rows[:, 4:].flatten().tolist()) <= pools[1]
        judged = module.division.count > 0
        assert judged.nonzero()[:, 0].tolist() == sorted(pools[0] | pools[1])
        assert bool((module.division.clean[~judged] == 1).all()) and bool((module.division.clean[judged] != 1).any())

    def test_losses_of_a_part_are_divided_as_if_it_were_the_whole_set(self) -> None:
        losses = torch.cat([torch.rand(2, 30, generator=generator()), 3 + torch.rand(2, 10, generator=generator(1))], 1)
        index = torch.randperm(100, generator=generator(2))[:40].sort().values
        part, whole = (DivideMix(**SMALL).division for _ in range(2))
        part.reset(100), whole.reset(40)
        part.divide(losses, 10, index), whole.divide(losses, 10)
        assert torch.equal(part.clean[index], whole.clean) and part.done
        rest = torch.ones(100, dtype=torch.bool).index_fill_(0, index, False)
        assert bool((part.clean[rest] == 1).all())

    def test_ssr_votes_among_the_samples_of_the_pool(self) -> None:
        data = Rare(seed=3, balanced=True, samples_per_epoch=12, batch_size=4)
        torch.manual_seed(0)
        module = SSR(**SMALL, k=3, lambda_fc=0)
        with empty_sets_allowed():
            trainer(1).fit(module, data)
        outside = torch.ones(48, dtype=torch.bool).index_fill_(0, data.epoch_pool(0), False)
        assert torch.equal(module.selection.labels[outside], data.labels[outside])
        assert bool((module.selection.quality[outside] == 1).all())
        assert bool((module.selection.quality[~outside] != 1).any())

    def test_ssr_refuses_a_pool_with_fewer_samples_than_neighbors(self) -> None:
        with pytest.raises(
            ValueError, match=r"expected at least k = 20 samples in the pool of an epoch, .* got 12; raise data"
        ):
            trainer(1).fit(SSR(**SMALL, k=20), Rare(seed=3, balanced=True, samples_per_epoch=12, batch_size=4))
