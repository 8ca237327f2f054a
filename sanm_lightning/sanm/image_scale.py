"""Scale of the images of a batch, and of SANM's fill and reconstruction."""

from torch import Tensor, nn

from sanm_lightning.sanm.normalization import Normalization

__all__ = ["ImageScale"]


class ImageScale(nn.Module):
    """Base class of SANM with the conversions of images between [0, 1], batches and the input of the network."""

    scale: str
    """Scale of fill and reconstruction: ``"unit"``, images in [0, 1], or ``"normalized"``, the input of the network."""
    normalization: Normalization | None
    """Normalization of the images of a batch; None for [0, 1]."""
    network_normalization: Normalization | None
    """Normalization in the network, for images in [0, 1] and the scale "normalized"; None for others."""

    def in_unit_range(self, images: Tensor) -> Tensor:
        """Convert images of a batch (B, C, H, W) to [0, 1], if they are normalized."""
        return images if self.normalization is None else self.normalization.denormalize(images)

    def scaled_fill(self, noise: Tensor) -> Tensor:
        """Convert the fill U(0, 1) to the scale of the images of a batch."""
        if self.scale == "unit":
            return noise if self.normalization is None else self.normalization.normalize(noise)
        return noise if self.network_normalization is None else self.network_normalization.denormalize(noise)

    def reconstruction_target(self, images: Tensor) -> Tensor:
        """Return the images of a batch (B, C, H, W) in the scale of the reconstruction."""
        if self.scale == "unit":
            return self.in_unit_range(images)
        return images if self.network_normalization is None else self.network_normalization.normalize(images)

    def displayed(self, painted: Tensor) -> Tensor:
        """Convert reconstructions (B, C, H, W) to [0, 1]."""
        normalized = self.network_normalization or self.normalization if self.scale == "normalized" else None
        return painted if normalized is None else normalized.denormalize(painted)
