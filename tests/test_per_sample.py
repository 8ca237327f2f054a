"""State of each training sample: means, targets, histories, merged over ranks, saved and resumed."""

import io
import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sanm_lightning.per_sample import (
    Candidates,
    EMATargets,
    EpochMean,
    History,
    LabelStore,
    LearnableTargets,
    NeighborGraph,
    RunningVariance,
    SampleState,
)
from sanm_lightning.per_sample import state as per_sample

quick = settings(max_examples=30, deadline=None)
batches = st.lists(st.lists(st.tuples(st.integers(0, 4), st.integers(-8, 8)), max_size=6), max_size=4)
epochs = st.lists(batches, max_size=4)


def note(bank: EpochMean, *pairs: tuple[int, float]) -> None:
    bank.update(torch.tensor([i for i, _ in pairs], dtype=torch.long), torch.tensor([float(v) for _, v in pairs]))


def slow_values(size: int, seen: list[list[list[tuple[int, int]]]], momentum: float | None) -> list[float]:
    """One sample, one epoch at a time; a momentum of None weighs all epochs alike."""
    values = []
    for sample in range(size):
        value, count = 0.0, 0
        for epoch in seen:
            observed = [v for batch in epoch for i, v in batch if i == sample]
            if not observed:
                continue
            mean = sum(observed) / len(observed)
            if count == 0:
                value = mean
            elif momentum is None:
                value = (count * value + mean) / (count + 1)
            else:
                value = momentum * value + (1 - momentum) * mean
            count += 1
        values.append(value)
    return values


def saved_and_loaded(state: object) -> object:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def sized(state: SampleState, num_samples: int) -> SampleState:
    state.reset(num_samples)
    return state


class World:
    """Two ranks as two threads: what one reduces, the other has to reduce as well."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.here = threading.local()
        self.barrier, self.given = threading.Barrier(2, timeout=20), [None, None]
        monkeypatch.setattr(per_sample, "several_processes", lambda: True)
        monkeypatch.setattr(per_sample, "process_rank", lambda: getattr(self.here, "rank", 0))
        monkeypatch.setattr(per_sample, "_reduced", self.reduced)

    def reduced(self, tensor: Tensor, operation: object = None) -> Tensor:
        self.given[self.here.rank] = tensor.clone()
        self.barrier.wait()
        one, other = self.given
        self.barrier.wait()
        return one + other if operation is None else torch.minimum(one, other)

    def run(self, *work: Callable[[], object]) -> list[object]:
        """Do one thing on each rank, at the same time."""
        done: list[object] = [None, None]

        def rank(number: int) -> None:
            self.here.rank = number
            done[number] = work[number]()

        threads = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        return done


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_a_row_that_is_not_finite_is_replaced_by_the_next_value_of_another_process(world: World) -> None:
    states = [LabelStore(), LabelStore()]
    for state in states:
        sized(state, 3)
    for value in (torch.nan, 0.25):
        states[0].write("given_quality", torch.tensor([0]), torch.tensor([value]))
        world.run(states[0].sync, states[1].sync)
    assert [float(state.given_quality[0]) for state in states] == [0.25, 0.25]


class TestEpochMean:
    @pytest.mark.parametrize("momentum", [0.0, 0.7, None])
    @quick
    @given(seen=epochs)
    def test_matches_the_loop_over_samples_and_epochs(
        self, momentum: float | None, seen: list[list[list[tuple[int, int]]]]
    ) -> None:
        bank = sized(EpochMean(momentum or 0.0, running_mean=momentum is None), 5)
        for epoch in seen:
            for batch in epoch:
                note(bank, *batch)
            bank.compute()
        torch.testing.assert_close(bank.value, torch.tensor(slow_values(5, seen, momentum)), rtol=1e-5, atol=1e-5)

    def test_holds_zeros_before_anything_was_seen(self) -> None:
        bank = sized(EpochMean(), 3)
        bank.compute()
        assert torch.equal(bank.value, torch.zeros(3))
        assert torch.equal(bank.epochs, torch.zeros(3))

    def test_a_sample_that_came_twice_in_a_batch_counts_by_its_mean(self) -> None:
        bank = sized(EpochMean(), 2)
        note(bank, (0, 1), (0, 3), (1, 5))
        bank.compute()
        assert torch.equal(bank.value, torch.tensor([2.0, 5.0]))

    def test_a_sample_that_was_not_seen_keeps_its_value(self) -> None:
        bank = sized(EpochMean(), 2)
        note(bank, (0, 4), (1, 5))
        bank.compute()
        note(bank, (1, 7))
        bank.compute()
        assert torch.equal(bank.value, torch.tensor([4.0, 7.0]))
        assert torch.equal(bank.epochs, torch.tensor([1.0, 2.0]))

    def test_the_values_stand_still_between_folds(self) -> None:
        bank = sized(EpochMean(), 1)
        note(bank, (0, 4))
        assert bank.value.item() == 0
        bank.compute()
        note(bank, (0, 8))
        assert bank.value.item() == 4

    def test_keeps_no_graph_and_leaves_its_inputs_alone(self) -> None:
        bank, value = sized(EpochMean(), 2), torch.ones(2, requires_grad=True)
        bank.update(torch.tensor([0, 1]), value)
        bank.compute()
        assert not bank.value.requires_grad
        assert torch.equal(value, torch.ones(2))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_takes_values_of_any_precision(self, dtype: torch.dtype) -> None:
        bank = sized(EpochMean(), 1)
        bank.update(torch.tensor([0]), torch.tensor([0.5], dtype=dtype))
        bank.compute()
        assert bank.value.dtype == torch.float32
        assert bank.value.item() == 0.5

    def test_a_change_of_precision_of_the_model_is_not_for_it(self) -> None:
        bank = sized(EpochMean(), 1)
        note(bank, (0, 1 / 3))
        bank.compute()
        bank.to(torch.float16).half()
        assert bank.value.dtype == bank.sum.dtype == torch.float32
        assert bank.value.item() == torch.tensor(1 / 3).item()

    def test_a_change_of_device_is(self) -> None:
        bank = sized(EpochMean(), 2).to("meta")
        assert {bank.value.device.type, bank.sum.device.type, bank.count.device.type} == {"meta"}

    def test_is_neither_a_parameter_nor_a_buffer(self) -> None:
        assert not [*sized(EpochMean(), 3).parameters(), *sized(EpochMean(), 3).buffers()]

    def test_reset_forgets(self) -> None:
        bank = sized(EpochMean(), 1)
        note(bank, (0, 4))
        bank.reset(3)
        bank.compute()
        assert len(bank) == 3
        assert torch.equal(bank.value, torch.zeros(3))

    @pytest.mark.parametrize("wrong", [-1, 3])
    def test_refuses_a_sample_that_does_not_exist(self, wrong: int) -> None:
        with pytest.raises(
            ValueError, match=rf"expected sample indices in \[0, 3\), got {min(wrong, 0)} to {max(wrong, 0)}"
        ):
            note(sized(EpochMean(), 3), (0, 1), (wrong, 1))

    @pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
    def test_refuses_a_decay_that_never_learns(self, momentum: float) -> None:
        with pytest.raises(ValueError, match=rf"expected decay in \[0, 1\), got {momentum}"):
            sized(EpochMean(momentum), 3)


class TestStateOfAnEpochMean:
    def test_in_the_middle_of_an_epoch_loses_nothing(self) -> None:
        bank, resumed = sized(EpochMean(0.5), 3), EpochMean(0.5)
        note(bank, (0, 1), (1, 2))
        bank.compute()
        note(bank, (0, 3))
        resumed.load_state_dict(saved_and_loaded(bank.state_dict()))  # type: ignore[arg-type]
        for each in (bank, resumed):
            note(each, (0, 5), (2, 9))
            each.compute()
        assert torch.equal(bank.value, torch.tensor([2.5, 2.0, 9.0]))
        assert torch.equal(resumed.value, bank.value)
        assert torch.equal(resumed.epochs, bank.epochs)

    def test_is_a_copy(self) -> None:
        bank = sized(EpochMean(), 1)
        state = bank.state_dict()
        note(bank, (0, 1))
        assert state["_extra_state"]["tables"]["sum"].item() == 0
        loaded = EpochMean()
        loaded.load_state_dict(state)
        note(loaded, (0, 1))
        assert state["_extra_state"]["tables"]["sum"].item() == 0

    def test_of_the_earlier_version_is_read(self) -> None:
        old = {"value": [1.0, 0.0], "epochs": [2.0, 0.0], "sum": [3.0, 4.0], "count": [1.0, 2.0]}
        bank = EpochMean()
        bank.set_extra_state({name: torch.tensor(rows) for name, rows in old.items()})
        assert bank.compute().tolist() == [3.0, 2.0]
        assert bank.epochs.tolist() == [3.0, 1.0]


class TestEpochMeanOnTwoRanks:
    def test_both_know_what_one_would(self, world: World) -> None:
        ranks = [sized(EpochMean(), 3), sized(EpochMean(), 3)]
        note(ranks[0], (0, 1), (1, 5), (1, 6))
        note(ranks[1], (0, 3), (2, 7))  # sample 0 was served to both
        world.run(ranks[0].compute, ranks[1].compute)
        for bank in ranks:
            assert torch.equal(bank.value, torch.tensor([2.0, 5.5, 7.0]))

    def test_a_synced_state_holds_the_sums_of_both_once(self, world: World) -> None:
        ranks = [sized(EpochMean(), 3), sized(EpochMean(), 3)]
        note(ranks[0], (0, 1))
        note(ranks[1], (0, 3))
        states = world.run(ranks[0].synced_state, ranks[1].synced_state)
        again = [EpochMean(), EpochMean()]
        world.run(*(lambda b=bank, s=state: b.set_extra_state(s) for bank, state in zip(again, states, strict=True)))
        world.run(again[0].compute, again[1].compute)
        assert [bank.value.tolist() for bank in again] == [[2.0, 0.0, 0.0]] * 2

    def test_a_state_of_one_process_counts_once_on_two(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as alone:
            alone.setattr(per_sample, "several_processes", lambda: False)
            bank = sized(EpochMean(), 2)
            note(bank, (0, 4), (0, 8))
            state = bank.synced_state()
        again = [EpochMean(), EpochMean()]
        world.run(*(lambda b=bank: b.set_extra_state(state) for bank in again))
        note(again[1], (1, 3))
        world.run(again[0].compute, again[1].compute)
        assert [bank.value.tolist() for bank in again] == [[6.0, 3.0]] * 2


class Everything(SampleState):
    """One table of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("mean", (2,))
        self.add_state("number", dtype=torch.int64, default=-1)
        self.add_state("flag", dtype=torch.bool)
        self.add_state("total", dist_reduce_fx="sum", default=1.0)
        self.add_state("own", dist_reduce_fx=None)


class TestSampleState:
    def test_a_row_becomes_the_mean_of_the_ranks_that_wrote_it(self, world: World) -> None:
        ranks = [sized(Everything(), 4), sized(Everything(), 4)]

        def write(rank: int) -> None:
            index = torch.tensor([0, 1]) if rank == 0 else torch.tensor([1, 2])
            ranks[rank].write("mean", index, torch.full((2, 2), 1.0 + 2 * rank))
            ranks[rank].write("number", index, torch.tensor([5, 6]) + rank)
            ranks[rank].write("flag", index, torch.tensor([True, rank == 1]))
            ranks[rank].add("total", torch.tensor([3, 3]), torch.tensor([1.0, 2.0 + rank]))

        world.run(lambda: write(0), lambda: write(1))
        world.run(ranks[0].sync, ranks[1].sync)
        for rank in ranks:
            assert rank.mean.tolist() == [[1, 1], [2, 2], [3, 3], [0, 0]]
            assert rank.number.tolist() == [5, 6, 7, -1]  # sample 1: of the lowest rank
            assert rank.flag.tolist() == [True, False, True, False]
            assert rank.total.tolist() == [1, 1, 1, 8]

    def test_a_second_sync_changes_nothing(self, world: World) -> None:
        ranks = [sized(Everything(), 2), sized(Everything(), 2)]
        world.run(*(lambda r=rank: r.add("total", torch.tensor([0]), torch.tensor([1.5])) for rank in ranks))
        for _ in range(2):
            world.run(ranks[0].sync, ranks[1].sync)
        assert [rank.total.tolist() for rank in ranks] == [[4.0, 1.0]] * 2

    def test_saving_leaves_the_live_rows_alone(self, world: World) -> None:
        ranks = [sized(Everything(), 2), sized(Everything(), 2)]
        world.run(*(lambda r=rank: r.write("mean", torch.tensor([0]), torch.ones(1, 2)) for rank in ranks[:1] * 2))
        state = world.run(ranks[0].synced_state, ranks[1].synced_state)[1]
        assert state["tables"]["mean"].tolist() == [[1, 1], [0, 0]]
        assert ranks[1].mean.tolist() == [[0, 0], [0, 0]]

    def test_a_run_that_resumes_on_two_ranks_ends_as_the_one_that_went_on(self, world: World) -> None:
        def rows(rank: int, step: int) -> Tensor:
            return torch.full((1, 2), 1.0 + rank + 10 * step)

        served = [[0, 1], [2, 0]]  # by step and rank: the last rank serves the first sample again, as the loader does

        def write(ranks: list[Everything], step: int) -> None:
            index = [torch.tensor([sample]) for sample in served[step]]
            world.run(*(lambda r=r: ranks[r].write("mean", index[r], rows(r, step)) for r in (0, 1)))

        whole = [sized(Everything(), 4), sized(Everything(), 4)]
        write(whole, 0)
        states = world.run(whole[0].synced_state, whole[1].synced_state)
        resumed = [Everything(), Everything()]
        world.run(*(lambda r=r: resumed[r].set_extra_state(saved_and_loaded(states[0])) for r in (0, 1)))
        for ranks in (whole, resumed):
            write(ranks, 1)
            world.run(ranks[0].sync, ranks[1].sync)
        for rank in (0, 1):
            assert torch.equal(whole[rank].mean, resumed[rank].mean)

    def test_tables_follow_the_device_and_never_the_precision_of_the_module(self) -> None:
        state = sized(Everything(), 3).half()
        assert {name: getattr(state, name).dtype for name in ("mean", "number", "flag")} == {
            "mean": torch.float32, "number": torch.int64, "flag": torch.bool,
        }  # fmt: skip
        assert sized(Everything(), 3).to("meta").mean.device.type == "meta"
        assert not list(state.parameters())
        assert not list(state.buffers())

    def test_is_loaded_into_any_size_and_an_empty_one_changes_nothing(self) -> None:
        state, other = sized(Everything(), 3), sized(Everything(), 7)
        state.write("mean", torch.tensor([2]), torch.ones(1, 2))
        other.load_state_dict(state.state_dict())
        assert len(other) == 3
        assert torch.equal(other.mean, state.mean)
        other.load_state_dict(Everything().state_dict())
        assert len(other) == 3

    def test_a_missing_table_is_named(self) -> None:
        state = sized(Everything(), 3).state_dict()
        del state["_extra_state"]["tables"]["flag"]
        with pytest.raises(RuntimeError, match="expected the tables flag of Everything"):
            Everything().load_state_dict(state)

    @pytest.mark.parametrize("wrong", [-1, 3])
    def test_an_index_out_of_range_is_refused(self, wrong: int) -> None:
        with pytest.raises(ValueError, match=r"indices in \[0, 3\), got"):
            sized(Everything(), 3).write("mean", torch.tensor([0, wrong]), torch.zeros(2, 2))


class TestEMATargets:
    def test_follows_the_running_mean_of_each_row(self) -> None:
        bank = sized(EMATargets(2, 0.75), 3)
        rows = bank.update(torch.tensor([2, 0]), torch.tensor([[0.2, 0.8], [1.0, 0.0]]))
        assert rows.tolist() == [pytest.approx([0.05, 0.2]), pytest.approx([0.25, 0.0])]
        bank.update(torch.tensor([2]), torch.tensor([[1.0, 0.0]]))
        assert bank.value[2].tolist() == pytest.approx([0.75 * 0.05 + 0.25, 0.15])
        assert bank.value[1].tolist() == [0, 0]

    def test_a_sample_that_came_twice_keeps_one_of_its_rows(self) -> None:
        bank = sized(EMATargets(2, 0.5), 2)
        bank.update(torch.tensor([1, 1]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        assert bank.value[1].tolist() in ([0.5, 0.0], [0.0, 0.5])

    def test_a_state_of_the_earlier_version_is_read(self) -> None:
        bank = EMATargets(2, 0.5)
        value, start = torch.rand(3, 2), torch.rand(3, 2)
        bank.set_extra_state({"value": value, "touched": torch.tensor([1.0, 0.0, 1.0]), "start": start})
        assert torch.equal(bank.value, value)

    def test_refuses_a_decay_that_never_learns(self) -> None:
        with pytest.raises(ValueError, match=r"decay in \[0, 1\), got 1"):
            EMATargets(2, 1.0)


class TestHistory:
    @quick
    @given(appends=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True), max_size=7))
    def test_matches_a_list_per_sample(self, appends: list[list[int]]) -> None:
        history, slow = sized(History(3, dtype=torch.int64), 4), [[] for _ in range(4)]
        for number, samples in enumerate(appends):
            history.append(torch.tensor(samples), torch.tensor([(number + s) % 5 for s in samples]))
            for sample in samples:
                slow[sample] = [*slow[sample], (number + sample) % 5][-3:]
        everything = torch.arange(4)
        means = [sum(kept) / len(kept) if kept else 0.0 for kept in slow]
        assert history.mean().tolist() == pytest.approx(means)
        assert history.mean(everything).tolist() == pytest.approx(means)
        assert history.votes(everything, 5).tolist() == [[kept.count(c) for c in range(5)] for kept in slow]

    def test_refuses_to_keep_nothing(self) -> None:
        with pytest.raises(ValueError, match="length of 1 or more, got 0"):
            History(0)


class TestRunningVariance:
    @quick
    @given(values=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=9))
    def test_matches_the_variance_of_all_values(self, values: list[float]) -> None:
        state = sized(RunningVariance(), 2)
        for value in values:
            state.update(torch.tensor([1]), torch.tensor([value]))
        expected = torch.tensor(values, dtype=torch.float64)
        both = torch.tensor([0, 1])
        assert state.var(both)[0] == 0
        assert float(state.var(both)[1]) == pytest.approx(float(expected.var(correction=0)), rel=1e-3, abs=1e-3)
        assert float(state.average[1]) == pytest.approx(float(expected.mean()), rel=1e-4, abs=1e-4)


class TestLabelStore:
    def test_starts_from_the_given_labels_all_selected_and_trusted(self) -> None:
        store = LabelStore(3)
        store.reset(2, torch.tensor([2, 0]))
        assert store.labels.tolist() == [2, 0]
        assert store.targets.tolist() == [[0, 0, 1], [1, 0, 0]]
        assert bool(store.selected.all())
        assert store.quality.tolist() == [1, 1]
        assert not store.filled

    def test_knows_after_a_load_that_it_was_filled(self) -> None:
        store, other = LabelStore(), LabelStore()
        store.reset(2, torch.tensor([1, 0]))
        store.update(selected=torch.tensor([True, False]))
        other.load_state_dict(saved_and_loaded(store.state_dict()))  # type: ignore[arg-type]
        assert other.filled
        assert other.selected.tolist() == [True, False]


class TestCandidates:
    def test_a_round_selects_before_it_discards_and_leaves_the_others(self):
        store = Candidates(0.0)
        store.reset(7)
        store.update(status=torch.tensor([1, 2, 0, 0, 0, 0, 0]), given_quality=torch.tensor([1.0, 0.2, 1, 1, 1, 1, 1]))
        selected = torch.tensor([False, False, True, True, False, False])
        discarded = torch.tensor([False, False, False, True, True, False])
        judged = torch.tensor([False, False, True, True, True, True])
        store.divide(torch.arange(6), selected, discarded, judged, torch.tensor([0.3, 0.4, 0.5, 0.6]))
        assert store.status.tolist() == [1, 2, 1, 1, 2, 0, 0]
        assert store.given_quality.tolist() == pytest.approx([1.0, 0.2, 1.0, 1.0, 0.5, 0.6, 1.0])


class TestNeighborGraph:
    def test_the_neighbors_of_a_pool_are_positions_in_the_training_set(self):
        graph = NeighborGraph(3, k=2)
        graph.reset(6)
        graph.update(probs=torch.rand(6, 3))
        pool = torch.tensor([1, 2, 5])
        graph.connect(pool, torch.tensor([[1, 2], [0, 2], [0, 1]]))
        assert graph.neighbors.tolist() == [[-1, -1], [2, 5], [1, 5], [-1, -1], [-1, -1], [1, 2]]
        for sample, near in {0: [0], 1: [2, 5], 2: [1, 5], 5: [1, 2]}.items():
            mean = torch.stack([graph.probs[j] for j in near]).mean(0)
            torch.testing.assert_close(graph.neighbor_mean(torch.tensor([sample]))[0], mean)

    def test_fewer_neighbors_than_k_are_averaged_alone(self):
        graph = NeighborGraph(3, k=4)
        graph.reset(2)
        graph.update(probs=torch.rand(2, 3))
        graph.connect(torch.arange(2), torch.tensor([[1], [0]]))
        torch.testing.assert_close(graph.neighbor_mean(torch.arange(2)), graph.probs.flip(0))


class TestLearnableTargets:
    def test_a_step_moves_the_rows_of_the_batch_against_their_gradient(self) -> None:
        targets = LearnableTargets(3, scale=2.0)
        targets.reset(4, torch.tensor([0, 1, 2, 0]))
        before, index = targets.logits.clone(), torch.tensor([3, 1])
        weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
        (targets(index) * weight).sum().backward()
        targets.sgd_step(index, lr=0.5)
        expected = before.clone()
        expected[index] -= 0.5 * weight
        assert torch.equal(targets.logits, expected)
        assert before[3].tolist() == [2, 0, 0]
