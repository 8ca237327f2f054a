"""Noise rates from the accuracy of cross-validation on noisy labels."""

import math

__all__ = ["cross_validated_noise_rate", "discarded_fraction", "remaining_noise_rate"]


def cross_validated_noise_rate(accuracy: float, num_classes: int) -> float:
    """Return the rate of symmetric noise at which a network trained on such labels has an accuracy on such labels.

    Source: Chen et al., ICML 2019, Proposition 1: accuracy (1 - rate)^2 + rate^2 / (C - 1), solved for the rate.

    Args:
        accuracy: accuracy on held-out noisy labels, in [0, 1].
        num_classes: C, number of classes.

    Returns:
        In [0, (C - 1) / C], where labels are random; also for accuracies below 1 / C.
    """
    a = 1 + 1 / (num_classes - 1)
    return (1 - math.sqrt(max(0.0, 1 - a * (1 - accuracy)))) / a


def discarded_fraction(noise_rate: float) -> float:
    """Return the number of discarded per selected samples: noise rate / (1 - noise rate), at most 2."""
    return min(2.0, noise_rate / max(1 - noise_rate, 1e-12))


def remaining_noise_rate(noise_rate: float, alternatives: int) -> float:
    """Return the noise rate among samples whose held-out prediction agrees with their label.

    Source: Chen et al., ICML 2019, Proposition 1: rate^2 / (rate^2 + alternatives (1 - rate)^2).

    Args:
        noise_rate: in [0, 1].
        alternatives: number of wrong classes that a label may have: C - 1 for symmetric noise, 1 for pairs of classes.
    """
    return noise_rate**2 / (noise_rate**2 + alternatives * (1 - noise_rate) ** 2)
