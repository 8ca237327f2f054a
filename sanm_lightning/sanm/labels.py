"""Label regularization by the masked fraction of the image (SANM, Eq. 7)."""

import torch
from torch import Tensor

__all__ = ["regularize_labels"]


def regularize_labels(targets: Tensor, ratio: Tensor, *, spread: str = "all") -> Tensor:
    """Subtract ``ratio`` from the probability of each target's top class and distribute it evenly.

    Source: SANM (Tu et al., CVPR 2023), Eq. 7.
    Departure: the subtracted probability is limited to that of the top class, so that flat targets (guesses over 100
    classes) remain distributions. One-hot targets are not affected.

    Eq. 7 changes the order of the classes of a flat target: the top class of [.28, .08, ..., .08] is the last one after .276
    of it is distributed. Methods that learn targets from predictions can lose correct labels; ``"smoothing"`` keeps
    the order, and equals Eq. 7 for one-hot targets.

    Args:
        targets: class probabilities, shape (B, C), rows sum to 1. Not modified.
        ratio: masked fraction of the image area, shape (B,), in [0, 1].
        spread: classes that receive the probability: ``"all"``, including the top class (Eq. 7), or ``"others"``
            (released code); or ``"smoothing"``, label smoothing by the ratio r: (1 - r) target + r / C (not in the paper).

    Returns:
        Regularized probabilities, shape (B, C), rows sum to 1.

    Raises:
        ValueError: if ``targets`` is not floating (B, C) with C >= 2, ``ratio`` is not (B,), ``spread`` is unknown, or
            (on CPU) a ratio is outside [0, 1].

    Example:
        >>> regularize_labels(torch.tensor([[0.8, 0.1, 0.1]]), torch.tensor([0.3]))
        tensor([[0.6000, 0.2000, 0.2000]])
    """
    if targets.ndim != 2 or targets.shape[1] < 2 or not targets.is_floating_point() or ratio.shape != targets.shape[:1]:
        raise ValueError(
            f"expected floating targets (B, C) with C >= 2 and ratio (B,), got {tuple(targets.shape)} of "
            f"{targets.dtype} and {tuple(ratio.shape)}"
        )
    if ratio.device.type == "cpu" and not bool(((ratio >= 0) & (ratio <= 1)).all()):
        raise ValueError(f"expected ratio in [0, 1], got {float(ratio.min())} to {float(ratio.max())}")
    if spread not in ("all", "others", "smoothing"):
        raise ValueError(f"expected spread 'all', 'others' or 'smoothing', got {spread!r}; choose one of them")
    if spread == "smoothing":
        return torch.lerp(targets, torch.full_like(targets, 1 / targets.shape[1]), ratio.to(targets.dtype).unsqueeze(1))
    mass, top = targets.max(dim=1, keepdim=True)  # (B, 1) each, the first of equal classes
    moved = torch.minimum(ratio.to(targets.dtype).unsqueeze(1), mass)  # (B, 1)
    if spread == "others":
        part = moved / (targets.shape[1] - 1)
        return (targets + part).scatter_add(1, top, -moved - part)
    return (targets + moved / targets.shape[1]).scatter_add(1, top, -moved)
