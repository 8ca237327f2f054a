"""Named random streams, independent of the global one, the same in every run.

A stream is named by its kind and by numbers (seed, rank, epoch, step, ...). The kind is part of the name, so that streams of
different kinds never coincide. Nothing but the numbers has to be saved for an exact resume, and ranks that share a seed still
draw differently where the rank is one of the numbers.
"""

import hashlib

import torch

__all__ = ["named_generator", "named_seed", "process_rank", "several_processes"]


def named_seed(kind: str, *parts: int) -> int:
    """Return a seed in [0, 2**32) for the stream of this name.

    32 bits, because torch's CPU generator reads no more of a seed than that.

    Args:
        kind: what the stream is for, such as ``"mixup"``; without commas.
        parts: numbers that name the stream within its kind. Neighboring numbers give unrelated seeds.
    """
    name = ",".join([kind, *map(str, parts)])
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


def named_generator(kind: str, *parts: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator on ``device``, seeded by :func:`named_seed`."""
    return torch.Generator(device).manual_seed(named_seed(kind, *parts))


def process_rank() -> int:
    """Return the rank of this process; 0 unless torch.distributed runs."""
    return torch.distributed.get_rank() if several_processes() else 0


def several_processes() -> bool:
    """Return whether torch.distributed runs."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
