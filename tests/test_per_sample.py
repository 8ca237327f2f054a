"""One number for each training sample: means, epochs, ranks, and what is saved."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sanm_lightning import per_sample
from sanm_lightning.per_sample import SampleBank, TargetBank

quick = settings(max_examples=30, deadline=None)
batches = st.lists(st.lists(st.tuples(st.integers(0, 4), st.integers(-8, 8)), max_size=6), max_size=4)
epochs = st.lists(batches, max_size=4)


def observe(bank: SampleBank, *pairs: tuple[int, float]) -> None:
    bank.observe(torch.tensor([i for i, _ in pairs], dtype=torch.long), torch.tensor([float(v) for _, v in pairs]))


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


class TestSampleBank:
    @pytest.mark.parametrize("momentum", [0.0, 0.7, None])
    @quick
    @given(seen=epochs)
    def test_matches_the_loop_over_samples_and_epochs(
        self, momentum: float | None, seen: list[list[list[tuple[int, int]]]]
    ) -> None:
        bank = SampleBank(5, momentum or 0.0, running_mean=momentum is None)
        for epoch in seen:
            for batch in epoch:
                observe(bank, *batch)
            bank.fold()
        torch.testing.assert_close(bank.value, torch.tensor(slow_values(5, seen, momentum)), rtol=1e-5, atol=1e-5)

    def test_holds_zeros_before_anything_was_seen(self) -> None:
        bank = SampleBank(3)
        bank.fold()
        assert torch.equal(bank.value, torch.zeros(3))
        assert torch.equal(bank.epochs, torch.zeros(3))

    def test_a_sample_that_came_twice_in_a_batch_counts_by_its_mean(self) -> None:
        bank = SampleBank(2)
        observe(bank, (0, 1), (0, 3), (1, 5))
        bank.fold()
        assert torch.equal(bank.value, torch.tensor([2.0, 5.0]))

    def test_a_sample_that_was_not_seen_keeps_its_value(self) -> None:
        bank = SampleBank(2)
        observe(bank, (0, 4), (1, 5))
        bank.fold()
        observe(bank, (1, 7))
        bank.fold()
        assert torch.equal(bank.value, torch.tensor([4.0, 7.0]))
        assert torch.equal(bank.epochs, torch.tensor([1.0, 2.0]))

    def test_the_values_stand_still_between_folds(self) -> None:
        bank = SampleBank(1)
        observe(bank, (0, 4))
        assert bank.value.item() == 0
        bank.fold()
        observe(bank, (0, 8))
        assert bank.value.item() == 4

    def test_keeps_no_graph_and_leaves_its_inputs_alone(self) -> None:
        bank, value = SampleBank(2), torch.ones(2, requires_grad=True)
        bank.observe(torch.tensor([0, 1]), value)
        bank.fold()
        assert not bank.value.requires_grad
        assert torch.equal(value, torch.ones(2))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_takes_values_of_any_precision(self, dtype: torch.dtype) -> None:
        bank = SampleBank(1)
        bank.observe(torch.tensor([0]), torch.tensor([0.5], dtype=dtype))
        bank.fold()
        assert bank.value.dtype == torch.float32
        assert bank.value.item() == 0.5

    def test_a_change_of_precision_of_the_model_is_not_for_it(self) -> None:
        bank = SampleBank(1)
        observe(bank, (0, 1 / 3))
        bank.fold()
        bank.to(torch.float16).half()
        assert bank.value.dtype == bank.sum.dtype == torch.float32
        assert bank.value.item() == torch.tensor(1 / 3).item()

    def test_a_change_of_device_is(self) -> None:
        bank = SampleBank(2).to("meta")
        assert {bank.value.device.type, bank.sum.device.type, bank.count.device.type} == {"meta"}

    def test_is_neither_a_parameter_nor_a_buffer(self) -> None:
        assert not [*SampleBank(3).parameters(), *SampleBank(3).buffers()]

    def test_resize_forgets(self) -> None:
        bank = SampleBank(1)
        observe(bank, (0, 4))
        bank.resize(3)
        bank.fold()
        assert len(bank) == 3
        assert torch.equal(bank.value, torch.zeros(3))

    @pytest.mark.parametrize("wrong", [-1, 3])
    def test_refuses_a_sample_that_does_not_exist(self, wrong: int) -> None:
        with pytest.raises(
            ValueError, match=rf"expected sample indices in \[0, 3\), got {min(wrong, 0)} to {max(wrong, 0)}"
        ):
            observe(SampleBank(3), (0, 1), (wrong, 1))

    @pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
    def test_refuses_a_momentum_that_never_learns(self, momentum: float) -> None:
        with pytest.raises(ValueError, match=rf"expected a momentum in \[0, 1\), got {momentum}"):
            SampleBank(3, momentum)


class TestStateOfASampleBank:
    def test_in_the_middle_of_an_epoch_loses_nothing(self) -> None:
        bank, resumed = SampleBank(3, momentum=0.5), SampleBank(0, momentum=0.5)
        observe(bank, (0, 1), (1, 2))
        bank.fold()
        observe(bank, (0, 3))
        resumed.load_state_dict(saved_and_loaded(bank.state_dict()))  # type: ignore[arg-type]
        for each in (bank, resumed):
            observe(each, (0, 5), (2, 9))
            each.fold()
        assert torch.equal(bank.value, torch.tensor([2.5, 2.0, 9.0]))
        assert torch.equal(resumed.value, bank.value)
        assert torch.equal(resumed.epochs, bank.epochs)

    def test_is_a_copy(self) -> None:
        bank = SampleBank(1)
        state = bank.state_dict()
        observe(bank, (0, 1))
        assert state["_extra_state"]["sum"].item() == 0
        loaded = SampleBank(1)
        loaded.load_state_dict(state)
        observe(loaded, (0, 1))
        assert state["_extra_state"]["sum"].item() == 0


class TestSampleBankOnTwoRanks:
    @pytest.fixture
    def ranks(self, monkeypatch: pytest.MonkeyPatch) -> list[SampleBank]:
        """Two banks whose sums are added as two processes would add them."""
        banks = [SampleBank(3), SampleBank(3)]

        def added(tensor: Tensor) -> Tensor:
            name = next(name for bank in banks for name in ("sum", "count") if getattr(bank, name) is tensor)
            return frozen[name].clone()

        frozen: dict[str, Tensor] = {}

        def freeze() -> None:
            frozen.update({name: getattr(banks[0], name) + getattr(banks[1], name) for name in ("sum", "count")})

        monkeypatch.setattr(per_sample, "_sum_over_ranks", added)
        banks[0].freeze = freeze  # type: ignore[assignment]
        return banks

    def test_both_know_what_one_would(self, ranks: list[SampleBank]) -> None:
        observe(ranks[0], (0, 1), (1, 5), (1, 6))
        observe(ranks[1], (0, 3), (2, 7))  # sample 0 was served to both
        ranks[0].freeze()  # type: ignore[operator]
        for bank in ranks:
            bank.fold()
            assert torch.equal(bank.value, torch.tensor([2.0, 5.5, 7.0]))

    def test_a_complete_state_holds_the_partial_sums_of_both_once(
        self, ranks: list[SampleBank], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        observe(ranks[0], (0, 1))
        observe(ranks[1], (0, 3))
        ranks[0].freeze()  # type: ignore[operator]
        state = ranks[1].complete_state()
        for rank, bank in enumerate(ranks):
            monkeypatch.setattr(per_sample, "process_rank", lambda rank=rank: rank)
            bank.set_extra_state(state)
        assert ranks[0].sum[0] + ranks[1].sum[0] == 4
        assert ranks[0].count[0] + ranks[1].count[0] == 2


class TestTargetBank:
    def test_follows_the_running_mean_of_each_row(self) -> None:
        bank = TargetBank(3, 2, 0.75)
        rows = bank.update(torch.tensor([2, 0]), torch.tensor([[0.2, 0.8], [1.0, 0.0]]))
        assert rows.tolist() == [pytest.approx([0.05, 0.2]), pytest.approx([0.25, 0.0])]
        bank.update(torch.tensor([2]), torch.tensor([[1.0, 0.0]]))
        assert bank.value[2].tolist() == pytest.approx([0.75 * 0.05 + 0.25, 0.15])
        assert bank.value[1].tolist() == [0, 0]

    def test_a_sample_that_came_twice_keeps_one_of_its_rows(self) -> None:
        bank = TargetBank(2, 2, 0.5)
        bank.update(torch.tensor([1, 1]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        assert bank.value[1].tolist() in ([0.5, 0.0], [0.0, 0.5])

    def test_merging_in_one_process_changes_nothing(self) -> None:
        bank = TargetBank(4, 3, 0.5)
        bank.update(torch.tensor([0, 3]), torch.rand(2, 3))
        before = bank.value.clone()
        assert torch.equal(bank.complete_state()["value"], before)
        bank.merge()
        assert torch.equal(bank.value, before)
        assert not bank.touched.any()

    def test_rows_of_two_processes_meet(self, monkeypatch: pytest.MonkeyPatch) -> None:
        mine, theirs = TargetBank(3, 2, 0.0), TargetBank(3, 2, 0.0)
        mine.update(torch.tensor([0, 1]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        theirs.update(torch.tensor([1, 2]), torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
        sums = iter([mine.touched + theirs.touched, mine.value * 1 + theirs.value * 1])  # untouched rows are zero here
        monkeypatch.setattr("sanm_lightning.per_sample._sum_over_ranks", lambda tensor: next(sums))
        mine.merge()
        assert mine.value.tolist() == [[1, 0], [0.5, 0.5], [0, 1]]

    def test_a_process_that_resumes_goes_on_from_the_rows_it_had(self, monkeypatch: pytest.MonkeyPatch) -> None:
        bank = TargetBank(2, 2, 0.5)
        bank.update(torch.tensor([0, 1]), torch.rand(2, 2))
        bank.merge()
        merged = bank.value.clone()
        bank.update(torch.tensor([1]), torch.rand(1, 2))  # by rank 0, say
        first, second = TargetBank(0, 2, 0.5), TargetBank(0, 2, 0.5)
        first.set_extra_state(bank.complete_state())
        monkeypatch.setattr("sanm_lightning.per_sample.process_rank", lambda: 1)
        second.set_extra_state(bank.complete_state())
        assert torch.equal(first.value, bank.value)
        assert first.touched.tolist() == [0, 1]
        assert torch.equal(second.value, merged)
        assert second.touched.tolist() == [0, 0]

    def test_is_saved_whatever_size_it_is_loaded_into(self) -> None:
        bank = TargetBank(4, 3, 0.5)
        bank.update(torch.tensor([0, 3]), torch.rand(2, 3))
        other = TargetBank(0, 3, 0.5)
        other.load_state_dict(bank.state_dict())
        assert torch.equal(other.value, bank.value)
        assert torch.equal(other.touched, bank.touched)
        assert not list(bank.parameters())
        assert not list(bank.buffers())
        assert bank.half().value.dtype == torch.float32

    def test_refuses_a_momentum_that_never_learns(self) -> None:
        with pytest.raises(ValueError, match=r"momentum in \[0, 1\), got 1"):
            TargetBank(1, 2, 1.0)
