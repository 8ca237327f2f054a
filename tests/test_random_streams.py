"""Named random streams, independent of the global one."""

import ast
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sanm_lightning
from sanm_lightning.random_streams import named_generator, named_seed, process_rank

KINDS = ("mask", "mixup", "draw", "dropout", "order", "augment", "transform", "noise", "subset", "split", "reset")
names = st.lists(st.integers(-(2**63), 2**64), max_size=4)


class TestNamedSeed:
    @settings(max_examples=50, deadline=None)
    @given(names)
    def test_is_a_fixed_number_of_32_bits(self, parts: list[int]) -> None:
        assert 0 <= named_seed("a", *parts) < 2**32
        assert named_seed("a", *parts) == named_seed("a", *parts)

    @settings(max_examples=50, deadline=None)
    @given(names, names)
    def test_tells_names_apart(self, one: list[int], other: list[int]) -> None:
        assert (named_seed("a", *one) == named_seed("a", *other)) == (one == other)

    @settings(max_examples=20, deadline=None)
    @given(names)
    def test_tells_kinds_apart(self, parts: list[int]) -> None:
        assert len({named_seed(kind, *parts) for kind in KINDS}) == len(KINDS)

    def test_is_the_same_on_every_machine(self) -> None:
        assert named_seed("mask", 0) == 86423704
        assert named_seed("order", 7, 1, 2) == 3724615072

    def test_neighbors_have_no_seed_in_common(self) -> None:
        seeds = {named_seed("a", seed, rank, step) for seed in range(10) for rank in range(10) for step in range(10)}
        assert len(seeds) == 1000


class TestNamedGenerator:
    def test_the_same_name_gives_the_same_numbers(self) -> None:
        draws = [torch.rand(5, generator=named_generator("a", *parts)) for parts in ((1, 2), (1, 2), (2, 1))]
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])

    def test_leaves_the_global_stream_alone(self) -> None:
        before = torch.get_rng_state()
        torch.rand(5, generator=named_generator("a", 1))
        assert torch.equal(torch.get_rng_state(), before)


class TestProcessRank:
    def test_is_zero_where_nothing_is_distributed(self) -> None:
        assert process_rank() == 0

    def test_is_the_rank_where_something_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
        assert process_rank() == 3


def test_every_stream_is_drawn_by_name_and_no_two_purposes_share_a_kind():
    """One call per kind in the whole package; ``stream`` and ``epoch_stream`` pass their caller's kind on."""
    found: dict[str, list[str]] = {}
    for path in sorted(Path(sanm_lightning.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(getattr(node, "func", None), "id", getattr(getattr(node, "func", None), "attr", ""))
            if name not in ("named_generator", "named_seed", "stream", "epoch_stream") or path.stem == "random_streams":
                continue
            kind = node.args[1 if name == "epoch_stream" else 0]
            if isinstance(kind, ast.Constant):
                found.setdefault(kind.value, []).append(path.stem)
            else:
                assert path.stem == "learned", f"{path}: a stream without a literal kind"
    assert {"mask", "mixup", "draw", "dropout", "order", "augment"} <= found.keys()
    shared = {kind: rooms for kind, rooms in found.items() if len(set(rooms)) > 1}
    # one purpose in several places: SANM over a plain loop and over a method; mixup and draws of different methods
    assert shared.keys() <= {"mask", "mixup", "draw"}, shared


def test_the_global_generators_are_seeded_nowhere_else():
    for path in sorted(Path(sanm_lightning.__file__).parent.rglob("*.py")):
        text = path.read_text()
        assert "SeedSequence" not in text, path
        if ".manual_seed(" in text:
            assert path.stem in (
                "digits",
                "random_streams",
                "rows",
                "stages",
                "epoch_start",
                "reconstruction",
            ), path
