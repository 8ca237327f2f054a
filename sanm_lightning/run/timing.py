"""Wall-clock seconds of a fit, of its evaluations, and of its training until each evaluation."""

import platform
import time
from pathlib import Path
from typing import Any

import torch

__all__ = ["Timing", "device_name"]


def device_name(device: torch.device, processes: int) -> str:
    """Return what a fit runs on, such as ``NVIDIA H200`` or ``AMD EPYC 9B14, 2 threads``.

    Args:
        device: device of a process.
        processes: number of processes, which is part of the name if it is above 1.
    """
    threads = torch.get_num_threads()
    part = f"{threads} thread{'s' if threads > 1 else ''}" if device.type == "cpu" else device.type
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_processor()}, {part}"
    return f"{processes} x {name}" if processes > 1 else name


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()


class Timing:
    """Clock of a fit that is stopped during evaluations and continues over resumes.

    Seconds between the last checkpoint and an interruption are not counted, as the steps that are repeated.
    """

    def __init__(self) -> None:
        self.machines: list[str] = []
        """What the fit ran on, see :func:`device_name`; several if it was resumed elsewhere."""
        self.known = True
        """Whether all evaluations were timed; not if the run was resumed from a checkpoint of an earlier version."""
        self.until: dict[int, float] = {}
        """Seconds of training, without evaluations, until the evaluation of each epoch."""
        self._before = self._evaluating = 0.0
        self._restored = False
        self._started: float | None = None
        self._paused: float | None = None

    def start(self, machine: str) -> None:
        """Start the clock of a fit, or of the rest of one whose state was loaded."""
        if not self._restored:
            self.machines, self.until, self.known = [], {}, True
            self._before = self._evaluating = 0.0
        self._started, self._paused, self._restored = time.monotonic(), None, False
        self.machines += [] if machine in self.machines else [machine]

    def seconds(self) -> float:
        """Return the seconds of the fit so far, with evaluations."""
        return self._before + (0.0 if self._started is None else time.monotonic() - self._started)

    def pause(self) -> None:
        """Begin an evaluation."""
        self._paused = time.monotonic()

    def proceed(self, epoch: int | None) -> None:
        """End an evaluation.

        Args:
            epoch: index of the evaluated epoch; None if its accuracy is not recorded.
        """
        if self._paused is not None:
            self._evaluating += time.monotonic() - self._paused
            self._paused = None
        if epoch is not None:
            self.until[epoch] = self.seconds() - self._evaluating

    def summary(self, **accuracies: dict[int, float]) -> dict[str, Any] | None:
        """Return machines, seconds of all evaluations, and epoch, training seconds and accuracies of each evaluation.

        Args:
            accuracies: accuracies by epoch index; series without values are left out.

        Returns:
            Lists of equal length by name, and ``evaluation_seconds`` and ``machines``; None if not all evaluations were timed.
        """
        if not self.known:
            return None
        epochs = sorted(self.until)
        series = {name: [values.get(epoch) for epoch in epochs] for name, values in accuracies.items() if values}
        return {
            "machines": list(self.machines),
            "evaluation_seconds": round(self._evaluating, 3),
            "epoch": [epoch + 1 for epoch in epochs],
            "training_seconds": [round(self.until[epoch], 3) for epoch in epochs],
            **{
                name: [None if value is None else round(value, 6) for value in values]
                for name, values in series.items()
            },
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the times so far, for a checkpoint."""
        return {
            "machines": list(self.machines),
            "known": self.known,
            "until": dict(self.until),
            "evaluating": self._evaluating + (0.0 if self._paused is None else time.monotonic() - self._paused),
        }

    def load_state_dict(self, seconds: float, state: dict[str, Any] | None) -> None:
        """Restore the times.

        Args:
            seconds: seconds of the fit so far.
            state: state of a checkpoint; None if an earlier version wrote it.
        """
        self._before, self.known, self._restored = seconds, state is not None, True
        self._started = self._paused = None
        if state is not None:
            self.machines, self.until = list(state["machines"]), dict(state["until"])
            self._evaluating, self.known = state["evaluating"], state["known"]
