"""Named random streams, independent of the global stream and reproducible.

A stream is identified by its kind and by numbers (seed, rank, epoch, step, ...). The kind is part of the name, so
streams of different kinds never coincide. An exact resume requires only these numbers. Ranks with the same seed have
different streams if the rank is one of the numbers.
"""

import hashlib

import torch

__all__ = ["named_generator", "named_seed", "process_rank", "several_processes"]


def named_seed(kind: str, *parts: int) -> int:
    """Return a seed in [0, 2**32) for the stream of this name.

    The seed has 32 bits because torch's CPU generator uses no more.

    Args:
        kind: purpose of the stream, such as ``"mixup"``; without commas.
        parts: numbers that identify the stream within its kind. Neighboring numbers give unrelated seeds.

    Returns:
        The seed.
    """
    name = ",".join([kind, *map(str, parts)])
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


def named_generator(kind: str, *parts: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator on ``device``, seeded by :func:`named_seed`."""
    return torch.Generator(device).manual_seed(named_seed(kind, *parts))


def process_rank() -> int:
    """Return the rank of this process; 0 unless torch.distributed is initialized."""
    return torch.distributed.get_rank() if several_processes() else 0


def several_processes() -> bool:
    """Return whether torch.distributed is initialized."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
