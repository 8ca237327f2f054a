"""What the methods that train two networks share: the second network, its SANM, and clipping network by network."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.models import create_network
from sanm_lightning.random_streams import derived_seed
from sanm_lightning.sanm.module import SANM, Quality

__all__ = ["TwoNetworks", "draw_anew"]


class TwoNetworks(NoisyLabelModule):
    """Base of methods with two networks of one kind and different first weights.

    Both learn in one step, from the sum of their losses, under one optimizer: the losses share no parameters, so each network
    takes the steps that an optimizer of its own would. Each has its own decoder and its own estimate of label quality, and
    masks with the other network's estimate. Predictions are the mean of both networks' logits, unless the method says
    otherwise. Gradients are clipped network by network.

    Arguments are those of :class:`NoisyLabelModule`. A network that is given as a module is copied, and the copy's weights
    are drawn anew.
    """

    def __init__(
        self,
        num_classes: int,
        image_size: tuple[int, int] | None = (32, 32),
        network: str | nn.Module = "preact_resnet18",
        network_args: dict[str, Any] | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        sanm: SANM | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, image_size, network, network_args, mean, std, sanm, **kwargs)
        if isinstance(network, str):
            self.network2: Any = create_network(network, num_classes, mean, std, **(network_args or {}))
        else:
            self.network2 = copy.deepcopy(network).apply(draw_anew)
        self.sanm2 = SANM(**{**self.sanm.options, "place": self.sanm.place, "seed": derived_seed(self.sanm.seed, 2)})
        self.sanm2.build(self.network2, self.image_size)

    @property
    def networks(self) -> list[Any]:
        """Both networks."""
        return [self.network, self.network2]

    @property
    def pairs(self) -> list[tuple[Any, SANM, SANM]]:
        """Each network, its SANM, and the SANM of the other network."""
        return [(self.network, self.sanm, self.sanm2), (self.network2, self.sanm2, self.sanm)]

    def peer_quality(self, batch: NoisyBatch, targets: Tensor, peer: SANM, estimate: Tensor | None = None) -> Quality:
        """Return label quality by the other network's estimate, as SANM takes it; see :meth:`NoisyLabelModule.quality`."""
        return self.quality(batch, targets, estimate, source=peer)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> mean of both networks' logits (B, C)."""
        logits: Tensor = (self.network(images) + self.network2(images)) / 2
        return logits

    # The second SANM gets what the callback gives to the first one.

    def setup(self, stage: str) -> None:
        """Make room for the second network's estimate of label quality."""
        num_samples = getattr(getattr(self.trainer, "datamodule", None), "num_samples", None)
        if stage == "fit" and self.sanm2.enabled and isinstance(num_samples, int):
            self.sanm2.label_quality.resize(num_samples)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Refresh the second network's estimate once per epoch."""
        if self.sanm2.enabled and 0 <= self._begun != self.current_epoch:
            self.sanm2.label_quality.refresh()
        super().on_train_batch_start(batch, batch_idx)

    def on_fit_end(self) -> None:
        """Take the last epoch's evidence in."""
        super().on_train_end()
        if self.sanm2.enabled:
            self.sanm2.label_quality.refresh()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the evidence of all processes."""
        super().on_save_checkpoint(checkpoint)
        key = "sanm2.label_quality.bank._extra_state"
        if key in checkpoint.get("state_dict", {}):
            checkpoint["state_dict"][key] = self.sanm2.label_quality.bank.complete_state()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each network's gradients, and its decoder's with them, by themselves: the published methods clip per network."""
        if not gradient_clip_val:
            return
        for parts in ((self.network, self.sanm), (self.network2, self.sanm2)):
            parameters = [parameter for part in parts for parameter in part.parameters()]
            if gradient_clip_algorithm == "value":
                nn.utils.clip_grad_value_(parameters, gradient_clip_val)
            else:
                nn.utils.clip_grad_norm_(parameters, gradient_clip_val)


def draw_anew(module: nn.Module) -> None:
    """Give a module fresh weights, where it knows how; for ``Module.apply``."""
    if hasattr(module, "reset_parameters") and callable(module.reset_parameters):
        module.reset_parameters()
