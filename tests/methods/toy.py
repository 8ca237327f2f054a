"""A fit small enough for a test."""

from typing import Any

import lightning as L
import torch

from sanm_lightning import SANM, CrossEntropy, Noise
from sanm_lightning.data import Toy


def data(seed: int = 3, **options: Any) -> Toy:
    return Toy(seed=seed, noise=Noise("symmetric_exclusive", 0.5), **options)


def method(sanm: SANM | None = None, seed: int = 0, **options: Any) -> CrossEntropy:
    torch.manual_seed(seed)
    options = {"network": "small_cnn", "network_args": {"width": 4}, "warmup_epochs": 1, **options}
    return CrossEntropy(num_classes=4, image_size=(16, 16), sanm=sanm, **options)


def trainer(epochs: int = 3, **options: Any) -> L.Trainer:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(max_epochs=epochs, **{**quiet, **options})


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether weights and buffers are equal bit for bit."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
