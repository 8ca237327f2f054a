"""Visualize SANM: images, activation maps, masked views and reconstructions."""

from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from sanm_lightning.sanm.activation import feature_map
from sanm_lightning.sanm.inference import inference_context
from sanm_lightning.sanm.module import Views

__all__ = ["SANMPictures", "draw_views"]


def draw_views(path: Path, images: Tensor, views: Views, reconstruction: Tensor | None, titles: list[str]) -> None:
    """Write a PNG with one column per image and rows of image, activation map, masked view and optional reconstruction.

    Args:
        path: output file; its folder is created.
        images: images, shape (B, 3, H, W), in [0, 1].
        views: masked views of the images, with activation maps.
        reconstruction: reconstructed images, shape (B, 3, H, W), or None.
        titles: B column titles.

    Raises:
        ValueError: if nothing was masked.
    """
    import matplotlib  # slow to import and used here only

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if views.activation is None:
        raise ValueError("expected masked views, got views without activation maps; draw them after the warm-up")
    rows = {"image": images, "activation": views.activation, "masked": views.images[-len(images) :]}
    if reconstruction is not None:
        rows["reconstruction"] = reconstruction
    figure, axes = pyplot.subplots(
        len(rows), len(images), figsize=(1.3 * len(images), 1.4 * len(rows) + 0.5), squeeze=False, layout="constrained"
    )
    for row, (name, pictures) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(name)
        for axis, picture in zip(row, pictures.detach().float().cpu().numpy(), strict=True):
            axis.set(xticks=[], yticks=[])
            if picture.ndim == 3:
                axis.imshow(picture.transpose(1, 2, 0).clip(0, 1))
            else:
                axis.imshow(picture, cmap="magma")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


class SANMPictures(L.Callback):
    """Write ``pictures.png`` to the run directory at the end of a fit, with SANM's views of the first training batch.

    Requires a method of this package, with ``network`` and ``sanm``.

    Args:
        num_images: number of images, one per column.
    """

    def __init__(self, num_images: int = 10) -> None:
        self.num_images = num_images
        self._batch: tuple[Tensor, ...] | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Store ``num_images`` samples of the first batch of each epoch."""
        if batch_idx == 0 and isinstance(batch, tuple):
            self._batch = tuple(part[: self.num_images] if isinstance(part, Tensor) else part for part in batch)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the stored samples with the final network."""
        directory = Path(trainer.log_dir or trainer.default_root_dir)
        sanm = getattr(pl_module, "sanm", None)
        if sanm is None or not sanm.mask or self._batch is None or not trainer.is_global_zero:
            return
        images, labels, index, true = (*self._batch, None, None)[:4]
        assert images is not None and labels is not None
        network = pl_module.network
        targets = torch.nn.functional.one_hot(labels, pl_module.num_classes).float()  # type: ignore[arg-type]
        state = sanm.get_extra_state()
        views = sanm(network, images, targets, sanm.source_of_quality(targets, index, true))
        sanm.set_extra_state(state)  # drawing does not count as a step
        masked = views.images[-len(images) :]
        with inference_context(network, masked, sanm.batch_statistics):
            features = network.forward_features(masked)  # type: ignore[operator, union-attr]
            painted = None if sanm.decoder is None else sanm.decoder(feature_map(features, sanm.decoder.shape[0]))
        quality = sanm.label_quality(views.unmasked(views.logits), targets, index)  # type: ignore[arg-type]
        titles = [
            f"label {label}" + ("" if true is None else f", true {right}") + f"\nG {trust:.2f}"
            for label, right, trust in zip(
                labels.tolist(), (labels if true is None else true).tolist(), quality.tolist(), strict=True
            )
        ]
        draw_views(directory / "pictures.png", images, views, painted, titles)
