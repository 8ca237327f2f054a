"""SANM for a custom LightningModule and a DataLoader of (x, y), with one additional base class."""

import lightning as L
import timm
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sanm_lightning import Digits, Noise, SANMMixin


class Mine(SANMMixin, L.LightningModule):
    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = timm.create_model("preact_resnet18", num_classes=10, width=6)
        self.lr = lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val/acc", (self.net(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=self.lr, momentum=0.9)


def main(epochs: int = 3, samples: int = 300) -> float:
    L.seed_everything(0, verbose=False)
    train, test = Digits().load_train(), Digits().load_test()
    noisy = Noise("symmetric", 0.4).apply(train.labels[:samples], num_classes=10, seed=0)
    train_set = TensorDataset(train.images[:samples].float() / 255, noisy)
    test_set = TensorDataset(test.images.float() / 255, test.labels)

    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0)  # fmt: skip
    trainer.fit(Mine(), DataLoader(train_set, 25, shuffle=True), DataLoader(test_set, 250))
    figures = trainer.callback_metrics
    accuracy, quality = float(figures["val/acc"]), float(figures.get("train/quality", 1))
    print(f"mixin: {accuracy:.1%} right on the test digits after {epochs} epochs, mean label quality {quality:.2f}")
    return accuracy


if __name__ == "__main__":
    main()
