"""Linear projection of the features of a network to normalized embeddings, and their reconstruction."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from sanm_lightning.models.pooled import pooled_features, pooled_width

__all__ = ["Expansion", "Projection"]


class Projection(nn.Linear):
    """Linear layer whose outputs are normalized, for the pooled features of any network with timm's interface.

    Args:
        network: network whose features are projected.
        dim: P, width of the embeddings.
    """

    def __init__(self, network: Any, dim: int) -> None:
        super().__init__(pooled_width(network), dim)

    def forward(self, features: Tensor) -> Tensor:
        """Return the normalized embeddings (B, P), in the dtype of the weights, of pooled features (B, D)."""
        return F.normalize(super().forward(features.to(self.weight.dtype)).to(self.weight.dtype), dim=1)

    def of_maps(self, network: Any, maps: Tensor) -> Tensor:
        """Return the normalized embeddings (B, P) of feature maps (B, D, h, w) of ``network``."""
        embeddings: Tensor = self(pooled_features(network, maps))
        return embeddings


class Expansion(nn.Linear):
    """Linear layer with ReLU that reconstructs features from their projection before the normalization (RRL).

    Args:
        projection: the projection.
    """

    def __init__(self, projection: Projection) -> None:
        super().__init__(projection.out_features, projection.in_features)

    def error(self, features: Tensor, projection: Projection) -> Tensor:
        """Return the mean squared error of the reconstruction of pooled features (B, D), a scalar."""
        projected = F.linear(features, projection.weight, projection.bias)
        return (F.relu(self(projected)) - features).square().mean()
