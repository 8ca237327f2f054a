"""Select the device and the number of worker processes of a command."""

import os

import torch

__all__ = ["default_num_workers", "find_device"]


def find_device(name: str) -> torch.device:
    """Return the device of a name; ``auto`` selects a GPU if available, otherwise the CPU.

    Raises:
        ValueError: if the device does not exist.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"expected a device such as cpu or cuda, got {name!r} ({(str(error).splitlines() or [''])[0]}); use auto"
        ) from error
    return device


def default_num_workers() -> int:
    """Return the default number of worker processes: one per CPU, up to four, and none with a single CPU."""
    cpus = os.cpu_count() or 1
    return 0 if cpus == 1 else min(4, cpus)
