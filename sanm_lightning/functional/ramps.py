"""Schedules of loss weights, rates and decays as functions of epoch or step."""

import math

__all__ = [
    "critical_fraction",
    "ema_decay",
    "forget_rate",
    "linear_ramp",
    "sigmoid_ramp",
    "step_fractions",
    "step_ramp",
    "step_thirds",
    "temperature_ramp",
    "weight_ramp",
]


def linear_ramp(epochs: float, length: float) -> float:
    """Return a linear ramp from 0 to 1 over ``length`` epochs, constant 1 afterwards."""
    return min(max(epochs / length, 0.0), 1.0) if length > 0 else 1.0


def sigmoid_ramp(step: int, length: int) -> float:
    """Return a ramp from exp(-5) to 1 over ``length`` steps: exp(-5 (1 - step / length)^2); 1 if the length is 0."""
    return 1.0 if length == 0 else math.exp(-5 * (1 - min(step, length) / length) ** 2)


def ema_decay(step: int, decay: float, ramp_steps: int | None) -> float:
    """Return the weight of a teacher's old parameters in the update after step ``step``, from 0.

    With ``ramp_steps`` S, it is decay exp(-5 (1 - min(step + 2, S) / S)^2); otherwise, min(1 - 1 / (step + 2), decay).
    Source: the code of ELR+ (Liu et al., NeurIPS 2020), which counts the steps from 1 and adds 1.
    """
    if ramp_steps is not None:
        return decay * sigmoid_ramp(step + 2, ramp_steps)
    return min(1 - 1 / (step + 2), decay)


def forget_rate(epoch: int, noise_rate: float, num_gradual: int, exponent: float = 1.0) -> float:
    """Return R(e), the fraction of a batch that Co-teaching excludes in an epoch.

    It increases linearly from 0 to ``noise_rate ** exponent`` over the first ``num_gradual`` epochs, and is
    ``noise_rate`` afterwards. Source: the code of Han et al., NeurIPS 2018.
    """
    if epoch >= num_gradual:
        return noise_rate
    return float(noise_rate**exponent) * epoch / max(1, num_gradual - 1)


def critical_fraction(epoch: int, noise_rate: float, schedule: str, num_gradual: int) -> float:
    """Return the fraction of critical weights in an epoch of CDR, which is also the factor of their gradient.

    ``"constant"`` is 1 - noise rate; ``"gradual"`` decreases linearly from 1 to it over the first ``num_gradual``
    epochs.
    """
    if schedule == "gradual" and epoch < num_gradual:
        return 1 - noise_rate * epoch / max(1, num_gradual - 1)
    return 1 - noise_rate


def step_thirds(step: int, steps: int, factor: float = 0.1) -> float:
    """Return 1, ``factor`` and its square in the first, second and last third of ``steps`` steps."""
    return float(factor ** min(2, 3 * step // max(1, steps)))


def step_fractions(step: int, steps: int, fractions: tuple[float, ...], factors: tuple[float, ...]) -> float:
    """Return 1, then each of ``factors`` from the same position of ``fractions`` of ``steps`` steps on, in order."""
    reached = sum(step >= fraction * steps for fraction in fractions)
    return factors[reached - 1] if reached else 1.0


def step_ramp(step: int, steps: int, length: int) -> float:
    """Return a ramp from 1 / ``length`` to 1 over the first ``length`` of any number of steps."""
    return min(1.0, (step + 1) / max(1, length))


def temperature_ramp(epoch: int, length: int, last: float = 0.001) -> float:
    """Return a temperature that falls linearly from 1 to ``last`` over the first ``length`` epochs, counted from 0."""
    return 1 - (1 - last) * min(epoch, length - 1) / max(1, length - 1)


def weight_ramp(epoch: int, length: int, weight: float) -> float:
    """Return a weight that increases linearly from 1 to ``weight`` over ``length`` epochs, counted from 0; never above it."""
    return min(1 + epoch * (weight - 1) / length, weight) if length else weight
