"""The loader of indices: every sample once, the same order everywhere, resumable."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sanm_lightning.data.image_store import ImageStore
from sanm_lightning.data.loader import IndexLoader

quick = settings(max_examples=60, deadline=None)
samples = st.integers(1, 60)
batch_sizes = st.integers(1, 20)
worlds = st.integers(1, 5)


def epoch(loader: IndexLoader, number: int = 0) -> list[list[int]]:
    loader.set_epoch(number)
    return [batch.tolist() for batch in loader]


class TestTraining:
    @quick
    @given(samples, batch_sizes, worlds, st.integers(0, 9))
    def test_all_processes_have_as_many_batches_and_the_wrapped_permutation(
        self, n: int, size: int, world: int, number: int
    ) -> None:
        ranks = [
            epoch(IndexLoader(n, size, shuffle=True, seed=1, rank=r, world_size=world), number) for r in range(world)
        ]
        lengths = {tuple(len(batch) for batch in rank) for rank in ranks}
        assert len(lengths) == 1
        counts = Counter(i for rank in ranks for batch in rank for i in batch)
        share = -(-n // world)
        dropped = world if size > 1 and share > size and share % size == 1 else 0
        assert counts.total() == share * world - dropped
        # padded by wrapping: nothing is seen twice before all has been seen once, or as often as the wrapping asks
        assert max(counts.values()) <= -(-share * world // n)
        assert len(counts) >= n - dropped

    @quick
    @given(samples, batch_sizes)
    def test_one_process_sees_every_sample_once_and_len_is_the_number_of_batches(self, n: int, size: int) -> None:
        loader = IndexLoader(n, size, shuffle=True, seed=1)
        batches = epoch(loader)
        assert len(batches) == len(loader) > 0
        seen = [i for batch in batches for i in batch]
        assert len(set(seen)) == len(seen)
        assert n - len(seen) == (1 if 1 < size < n and n % size == 1 else 0)

    def test_the_order_is_a_function_of_seed_and_epoch(self) -> None:
        first = IndexLoader(50, 8, shuffle=True, seed=1)
        second = IndexLoader(50, 8, shuffle=True, seed=1)
        torch.rand(3)
        assert epoch(first, 3) == epoch(second, 3) != epoch(first, 4)
        assert epoch(first, 3) != epoch(IndexLoader(50, 8, shuffle=True, seed=2), 3)

    def test_a_fixed_order_stays(self) -> None:
        loader = IndexLoader(50, 8, shuffle=True, seed=1, fixed_order=True)
        assert epoch(loader, 0) == epoch(loader, 1)

    def test_drop_last_leaves_out_the_partial_batch_but_never_the_only_one(self) -> None:
        assert [len(b) for b in epoch(IndexLoader(11, 4, shuffle=True, seed=0, drop_last=True))] == [4, 4]
        assert [len(b) for b in epoch(IndexLoader(3, 4, shuffle=True, seed=0, drop_last=True))] == [3]

    def test_a_single_sample_left_over_is_left_out(self) -> None:
        assert [len(b) for b in epoch(IndexLoader(9, 4, shuffle=True, seed=0))] == [4, 4]
        assert [len(b) for b in epoch(IndexLoader(1, 4, shuffle=True, seed=0))] == [1]
        assert [len(b) for b in epoch(IndexLoader(3, 1, shuffle=True, seed=0))] == [1, 1, 1]

    def test_draws_nothing_from_the_global_stream(self) -> None:
        state = torch.get_rng_state()
        epoch(IndexLoader(9, 4, shuffle=True, seed=0))
        list(IndexLoader(4, 2, shuffle=True, seed=0, store=stored(torch.zeros(4, 3, 2, 2, dtype=torch.uint8))))
        assert torch.equal(state, torch.get_rng_state())


class TestEvaluation:
    @quick
    @given(samples, batch_sizes, worlds)
    def test_every_sample_once_over_all_processes_and_as_many_batches_in_each(
        self, n: int, size: int, world: int
    ) -> None:
        world = min(n, world)
        loaders = [IndexLoader(n, size, shuffle=False, seed=0, rank=r, world_size=world) for r in range(world)]
        ranks = [epoch(loader) for loader in loaders]
        assert sorted(i for rank in ranks for batch in rank for i in batch) == list(range(n))
        assert len({len(rank) for rank in ranks}) == 1 and len(ranks[0]) == len(loaders[0])
        assert all(0 < len(batch) <= max(size, 2) for rank in ranks for batch in rank)

    def test_one_process_serves_in_order(self) -> None:
        assert epoch(IndexLoader(5, 2, shuffle=False, seed=0)) == [[0, 1], [2, 3], [4]]


class TestResume:
    @quick
    @given(samples, batch_sizes, st.integers(0, 5), st.data())
    def test_serves_the_rest_of_the_epoch_and_then_whole_epochs(
        self, n: int, size: int, at: int, data: st.DataObject
    ) -> None:
        whole = IndexLoader(n, size, shuffle=True, seed=7)
        stop = data.draw(st.integers(0, len(whole)))
        whole.set_epoch(at)
        iterator = iter(whole)
        begun = [next(iterator).tolist() for _ in range(stop)]  # type: ignore[union-attr]
        resumed = IndexLoader(n, size, shuffle=True, seed=7)
        resumed.load_state_dict(whole.state_dict())
        unused = iter(resumed)  # Lightning creates iterators that it never uses, before it sets the epoch
        rest = epoch(resumed, at)
        assert len(resumed) == len(whole)
        assert begun + rest == epoch(whole, at)
        assert epoch(resumed, at + 1) == epoch(whole, at + 1)
        del unused

    def test_a_state_of_another_epoch_is_forgotten(self) -> None:
        loader = IndexLoader(10, 2, shuffle=True, seed=7)
        loader.load_state_dict({"epoch": 0, "batches": 5})
        assert len(epoch(loader, 1)) == 5

    def test_only_the_first_iteration_after_a_resume_is_short(self) -> None:
        loader = IndexLoader(10, 2, shuffle=True, seed=7)
        loader.load_state_dict({"epoch": 0, "batches": 2})
        assert [len(list(loader)) for _ in range(3)] == [3, 5, 5]

    def test_a_state_that_was_loaded_and_not_yet_used_is_kept(self) -> None:
        loader = IndexLoader(10, 2, shuffle=True, seed=7)
        loader.load_state_dict({"epoch": 3, "batches": 2})
        assert loader.state_dict().items() >= {"epoch": 3, "batches": 2}.items()

    def test_the_position_counts_the_batches_of_the_epoch(self) -> None:
        loader = IndexLoader(10, 2, shuffle=True, seed=7)
        loader.load_state_dict({"epoch": 3, "batches": 2})
        assert [loader.position for _ in loader] == [(3, 2), (3, 3), (3, 4)]

    def test_refuses_a_stranger(self) -> None:
        with pytest.raises(ValueError, match="'epoch' and 'batches', got"):
            IndexLoader(10, 2, shuffle=True, seed=7).load_state_dict({"sampler": 1})


def stored(images, workers: int = 0) -> ImageStore:
    """Images that are decoded when a loader asks for them."""
    return ImageStore(images, torch.arange(len(images)), (2, 2), resident_bytes=0, num_workers=workers)


class _Coded:
    """Image i is full of the number i."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((3, 2, 2), index, dtype=torch.uint8)


@pytest.mark.parametrize("other", [{"batch_size": 3}, {"world_size": 2}, {"num_samples": 8}])
def test_the_middle_of_an_epoch_is_refused_to_other_batches_and_its_end_is_not(other: dict[str, int]) -> None:
    loader = IndexLoader(12, 2, shuffle=True, seed=7)
    changed = IndexLoader(**{"num_samples": 12, "batch_size": 2, **other}, shuffle=True, seed=7)
    for served, _ in enumerate(loader, 1):
        if served < len(loader):
            with pytest.raises(
                ValueError, match=r"middle of an epoch, a batch size of 2 on 1 processes and 12 samples"
            ):
                changed.load_state_dict(loader.state_dict())
    changed.load_state_dict(loader.state_dict())


class TestStreaming:
    @pytest.mark.parametrize("workers", [0, 1])
    def test_serves_the_same_indices_with_their_images(self, workers: int) -> None:
        streaming = IndexLoader(10, 4, shuffle=True, seed=3, store=stored(_Coded(), workers))
        streaming.load_state_dict({"epoch": 0, "batches": 1})
        plain = epoch(IndexLoader(10, 4, shuffle=True, seed=3))[1:]
        for expected, (index, images, place, _) in zip(plain, streaming, strict=True):
            assert index.tolist() == expected
            assert images.dtype == torch.uint8 and images.shape == (len(index), 3, 2, 2)
            assert torch.equal(images[place][:, 0, 0, 0].long(), index)
        assert streaming.state_dict().items() >= {"epoch": 0, "batches": 3}.items()


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"num_samples": 0}, "num_samples of 1 or more"),
            ({"batch_size": 0}, "batch_size of 1 or more"),
            ({"rank": 1}, "0 to 0, got 1"),
            ({"seed": -1}, "0 or more"),
            ({"shuffle": False, "world_size": 6}, "at least one sample for each of 6 processes, got 5"),
        ],
    )
    def test_refuses(self, arguments, match) -> None:  # type: ignore[no-untyped-def]
        with pytest.raises(ValueError, match=match):
            IndexLoader(**({"num_samples": 5, "batch_size": 2, "shuffle": True, "seed": 0} | arguments))
