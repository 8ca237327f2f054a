"""Random streams of our own, so that masks and views never disturb the global one, and resume exactly.

A stream is named by numbers (seed, rank, step, ...); the same name gives the same numbers on every run. Nothing has to
be saved but the step counter, and ranks that share a seed still draw differently.
"""

import hashlib

import torch

__all__ = ["derived_generator", "derived_seed", "process_rank", "several_processes"]


def derived_seed(*parts: int) -> int:
    """Mix integers into one seed in [0, 2**32): neighbours in any part give unrelated seeds.

    32 bits, because the CPU generator of torch reads no more of a seed than that.
    """
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def derived_generator(device: torch.device, *parts: int) -> torch.Generator:
    """Return a generator on ``device`` seeded by :func:`derived_seed` of ``parts``."""
    return torch.Generator(device).manual_seed(derived_seed(*parts))


def process_rank() -> int:
    """Return this process's rank: 0 unless torch.distributed runs."""
    return torch.distributed.get_rank() if several_processes() else 0


def several_processes() -> bool:
    """Say whether torch.distributed runs, so that this process has others to agree with."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
