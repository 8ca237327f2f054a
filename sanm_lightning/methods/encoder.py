"""Start the networks of a method from an encoder that was pre-trained without labels."""

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from sanm_lightning.models.checkpoints import load_weights

__all__ = ["load_encoder"]


def load_encoder(module: Any, pretrained: str | None) -> None:
    """Load a pre-trained encoder into all networks of a method, unless its run is resumed; for ``setup("fit")``.

    Args:
        module: method with ``networks`` and a trainer.
        pretrained: file of the encoder, see :func:`sanm_lightning.models.load_weights`.

    Raises:
        ValueError: if there is no file, or it does not contain all tensors of the networks except their classifiers.
    """
    if getattr(module.trainer, "ckpt_path", None) is not None:
        return
    name = type(module).__name__
    if pretrained is None:
        raise ValueError(
            f"expected a pre-trained encoder for {name}, got pretrained: null; run first 'sanm fit --config "
            "configs/method/simclr.yaml --config configs/data/cifar10.yaml', then set --model.pretrained to its "
            "checkpoint"
        )
    for network in module.networks:
        report = load_weights(network, pretrained)
    rank_zero_info(
        f"{name}: {len(report.matched)} tensors of {Path(pretrained).name} loaded into each network "
        f"({', '.join(report.matched[:3])}, ...); the classifier is initialized randomly: "
        f"{', '.join(report.classifier)}"
    )
