"""Random streams of our own: named by numbers, apart from the global one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sanm_lightning.random_streams import derived_generator, derived_seed, process_rank

names = st.lists(st.integers(-(2**63), 2**64), max_size=4)


class TestDerivedSeed:
    @settings(max_examples=50, deadline=None)
    @given(names)
    def test_is_a_fixed_number_of_32_bits(self, parts: list[int]) -> None:
        assert 0 <= derived_seed(*parts) < 2**32
        assert derived_seed(*parts) == derived_seed(*parts)

    @settings(max_examples=50, deadline=None)
    @given(names, names)
    def test_tells_names_apart(self, one: list[int], other: list[int]) -> None:
        assert (derived_seed(*one) == derived_seed(*other)) == (one == other)

    def test_is_the_same_on_every_machine(self) -> None:
        assert derived_seed(0) == 613549620
        assert derived_seed(7, 1, 2) == 529566163

    def test_neighbours_have_no_seed_in_common(self) -> None:
        seeds = {derived_seed(seed, rank, step) for seed in range(10) for rank in range(10) for step in range(10)}
        assert len(seeds) == 1000


class TestDerivedGenerator:
    def test_the_same_name_gives_the_same_numbers(self) -> None:
        draws = [
            torch.rand(5, generator=derived_generator(torch.device("cpu"), *parts))
            for parts in ((1, 2), (1, 2), (2, 1))
        ]
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])

    def test_leaves_the_global_stream_alone(self) -> None:
        before = torch.get_rng_state()
        torch.rand(5, generator=derived_generator(torch.device("cpu"), 1))
        assert torch.equal(torch.get_rng_state(), before)


class TestProcessRank:
    def test_is_zero_where_nothing_is_distributed(self) -> None:
        assert process_rank() == 0

    def test_is_the_rank_where_something_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
        assert process_rank() == 3
