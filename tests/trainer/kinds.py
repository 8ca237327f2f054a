"""A small fit in each of the ways to use SANM: callback listed before or after the others, mixin, built-in method."""

import contextlib
import io
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sanm_lightning import SANM, CrossEntropy, SANMCallback, SANMMixin
from sanm_lightning.data import Toy
from tests.methods.toy import trainer

CLASSES, SIZE, SAMPLES, BATCH, EPOCHS = 4, 8, 24, 6, 3
STEPS = SAMPLES // BATCH  # per epoch
KINDS = ("callback-before", "callback-after", "mixin", "method")
RATE = 0.05


class Net(nn.Module):
    """A network by timm's conventions."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1)
        )
        self.fc = nn.Linear(8, CLASSES)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward_head(self, features: Tensor) -> Tensor:
        return self.fc(features.mean((2, 3)))

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class User(L.LightningModule):
    """A module of a user."""

    def __init__(self, lr: float = RATE) -> None:
        super().__init__()
        self.lr = lr
        self.network = Net()

    @property
    def backbone(self) -> nn.Module:
        return self.network.body

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).softmax(1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=self.lr, momentum=0.9)


class Mixed(SANMMixin, User):
    pass


class Loaders(L.LightningDataModule):
    """Loaders of a user."""

    num_samples, image_size = SAMPLES, (SIZE, SIZE)

    def __init__(self, batch_size: int = BATCH) -> None:
        super().__init__()
        self.batch_size = batch_size
        labels = torch.arange(SAMPLES) % CLASSES
        images = torch.rand(SAMPLES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        self.samples = TensorDataset((images + labels.view(-1, 1, 1, 1)) / CLASSES, labels, torch.arange(SAMPLES))

    def train_dataloader(self) -> Any:
        return DataLoader(self.samples, batch_size=self.batch_size)

    val_dataloader = predict_dataloader = train_dataloader


def make(kind: str, batch_size: int = BATCH, lr: float = RATE, **options: Any) -> tuple[Any, Any, list[L.Callback]]:
    """Return module, data module and SANM's own callbacks; ``options`` are those of a built-in method."""
    torch.manual_seed(0)
    sanm = SANM(mu=0.5, beta=0.02, seed=0)
    if kind == "method":
        options = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9), **options}
        create = options.pop("method", CrossEntropy)
        module = create(
            num_classes=CLASSES, image_size=(SIZE, SIZE), network="small_cnn", network_args={"width": 4}, sanm=sanm,
            warmup_epochs=1, **options,
        )  # fmt: skip
        toy = Toy(num_samples=SAMPLES, num_test_samples=8, image_size=SIZE, batch_size=batch_size, seed=0)
        return module, toy, []
    if kind == "mixin":
        return Mixed(lr=lr, sanm=sanm), Loaders(batch_size), []
    return User(lr), Loaders(batch_size), [SANMCallback(sanm)]


def fit(
    kind: str,
    *callbacks: L.Callback,
    epochs: int = EPOCHS,
    ckpt_path: Any = None,
    made: dict[str, Any] | None = None,
    **flags: Any,
) -> L.Trainer:
    """Fit; the module is the trainer's ``lightning_module``. ``made`` are options of :func:`make`."""
    module, data, own = make(kind, **(made or {}))
    order = [*own, *callbacks] if kind == "callback-before" else [*callbacks, *own]
    run = trainer(epochs, **{"log_every_n_steps": 1, "callbacks": order, **flags})
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # bars and tables
        run.fit(module, data, ckpt_path=ckpt_path)
    return run


def weights(run: L.Trainer) -> dict[str, Tensor]:
    """Return a copy of weights and buffers of the module, and of the decoder that a callback has added."""
    module: Any = run.lightning_module
    own = [part.sanm for part in run.callbacks if isinstance(part, SANMCallback)]
    found = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    decoder = {f"decoder.{name}": value for name, value in own[0].named_parameters()}
    return {name: value.detach().clone() for name, value in {**found, **decoder}.items()}


def trained(run: L.Trainer) -> dict[str, Tensor]:
    """Return the parameters after a fit under the names that they had in it, which a callback's decoder loses."""
    added = [part.sanm for part in run.callbacks if isinstance(part, SANMCallback) and part.wrap]
    decoder = {f"_sanm.{name}": value for sanm in added for name, value in sanm.named_parameters()}
    return {**parameters(run.lightning_module), **({} if hasattr(run.lightning_module, "sanm") else decoder)}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether all values are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Recorder(L.Callback):
    """Parameters at the start of each epoch and after each batch, the rate of each batch, the metrics of each epoch."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, Tensor]] = []
        self.batches: list[dict[str, Tensor]] = []
        self.rates: list[float] = []
        self.metrics: list[dict[str, Tensor]] = []
        self.monitors: list[str | None] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.epochs.append(parameters(pl_module))

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.batches.append(parameters(pl_module))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.metrics.append({name: value.clone() for name, value in trainer.callback_metrics.items()})


def parameters(module: L.LightningModule) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def mean(copies: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    listed = list(copies)
    return {name: torch.stack([copy[name] for copy in listed]).mean(0) for name in listed[0]}
