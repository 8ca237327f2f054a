"""SANM for an unmodified module with a torchvision network, as a callback.

Most networks need no ``layer``; this one pools with a function, so its last feature map is named.
"""

from typing import Any

import lightning as L
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from sanm_lightning import SANM, Digits, Noise, SANMCallback


class Theirs(L.LightningModule):
    """LightningModule without SANM."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torchvision.models.DenseNet(12, (3, 3, 3), num_init_features=24, num_classes=10)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        right = (self.model(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val/acc", right, batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main(epochs: int = 3, samples: int = 400) -> float:
    L.seed_everything(0, verbose=False)
    data = Digits(max_train_samples=samples, noise=Noise("symmetric", 0.4), batch_size=50)
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
                        callbacks=[SANMCallback(SANM(mu=0.3), layer="features")])  # fmt: skip
    trainer.fit(Theirs(), data)
    figures = trainer.callback_metrics
    accuracy, hidden = float(figures["val/acc"]), float(figures.get("train/masked_fraction", 0))
    print(f"callback: {accuracy:.1%} right on the test digits after {epochs} epochs, {hidden:.1%} of the pixels hidden")
    return accuracy


if __name__ == "__main__":
    main()
