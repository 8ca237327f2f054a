"""What is done once per epoch: the mixture, the neighbours."""

import torch

from benchmarks.measure import DEVICE, medians, seconds
from sanm_lightning.functional import fit_mixture, knn_vote, mixture_posterior


def run(repeats: int, samples: int) -> dict[str, float]:
    """Return seconds of the mixture at 50 thousand and a million losses, and of 200 neighbours among ``samples`` x 512."""
    generator = torch.Generator().manual_seed(0)
    rows = {}
    for count in (50_000, 1_000_000):
        right = torch.rand(count, generator=generator) < 0.5
        noise = torch.randn(count, generator=generator)
        losses = torch.where(right, 0.3 + 0.1 * noise, 2 + 0.5 * noise).to(DEVICE)

        def mixture(losses: torch.Tensor = losses) -> None:
            mixture_posterior(fit_mixture(losses), losses)

        rows[f"mixture_{count}_s"] = medians({"mixture": mixture}, min(repeats, 5))["mixture"]
    features = torch.randn(samples, 512, generator=generator).to(DEVICE)
    labels = torch.randint(10, (samples,), generator=generator).to(DEVICE)
    rows[f"neighbours_{samples}_s"] = seconds(lambda: knn_vote(features, labels, 200, 10))
    return rows
