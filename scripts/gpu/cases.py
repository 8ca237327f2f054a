"""Every method, alone and under SANM, at a size that suits a check."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch

from sanm_lightning import SANM, Noise, methods
from sanm_lightning.data import Toy
from sanm_lightning.methods import NoisyLabelModule

OPTIONS: dict[str, dict[str, Any]] = {
    "CoTeaching": {"noise_rate": 0.5, "num_gradual": 2},
    "CoTeachingPlus": {"noise_rate": 0.5, "num_gradual": 2},
    "CDR": {"noise_rate": 0.5},
    "SELFIE": {"noise_rate": 0.5},
    "SSR": {"warmup_epochs": 0, "k": 5},
    "C2D": {"pretrained": "FILE"},
    "NestedCoTeaching": {"noise_rate": 0.5},
    "INCV": {"rounds": 1},
    "REED": {"pretrained": "FILE"},
    "RRL": {"k": 5, "given_epochs": 0},
    "MOIT": {"k": 5},
    "SelCL": {"k": 5, "negatives": 40},
    "MLNT": {"num_lookaheads": 2, "neighbors": 3},
    "MetaCleaner": {"set_size": 4},
    "IEG": {"probe": "FILE"},
}
"""What methods need beside one warm-up epoch."""
BASES = ("NoisyLabelModule", "TwoNetworks")


class Size(NamedTuple):
    """Size of networks and data."""

    network: str
    width: int
    num_classes: int
    image_size: int
    samples: int
    batch_size: int


TINY = Size("small_cnn", 4, 4, 16, 32, 16)
SMALL = Size("preact_resnet18", 32, 10, 32, 128, 32)
"""For comparisons with the CPU."""
FULL = Size("preact_resnet18", 64, 10, 32, 2560, 128)
"""For speed: network and batch of CIFAR-10."""


class Case(NamedTuple):
    """A method, alone or under SANM."""

    method: str
    under_sanm: bool

    @property
    def label(self) -> str:
        """Name in results."""
        return f"SANM({self.method})" if self.under_sanm else self.method

    def build(self, size: Size, folder: Path, **options: Any) -> Any:
        """Create the method with the same initial weights in every call.

        Args:
            size: size of the network.
            folder: folder for the encoder, or the file of known labels, of a method that needs one.
            options: further arguments of the method.
        """
        network: dict[str, Any] = {
            "network": size.network, "network_args": {"width": size.width}, "num_classes": size.num_classes,
            "image_size": (size.image_size, size.image_size),
        }  # fmt: skip
        words = {**network, "warmup_epochs": 1, **OPTIONS.get(self.method, {}), **options}
        torch.manual_seed(0)
        if "pretrained" in words:
            words["pretrained"] = str(folder / "encoder.pt")
            torch.save({"state_dict": methods.CrossEntropy(**network).state_dict()}, words["pretrained"])
        if "probe" in words:
            known = folder / "known.csv"
            known.write_text("\n".join(["index,label", *(f"{row},{row}" for row in range(size.num_classes))]) + "\n")
            words["probe"] = str(known)
        made = getattr(methods, self.method)(**words, sanm=SANM(seed=0) if self.under_sanm else None)
        made.sanm.seed = 0
        return made


def cases(names: Sequence[str] | None = None) -> Iterator[Case]:
    """Return every method alone and, if it supports SANM, under SANM; cross-entropy first.

    Args:
        names: names of methods; None means all.

    Raises:
        ValueError: if a name is not that of a method.
    """
    known = [
        name for name, found in vars(methods).items()
        if isinstance(found, type) and issubclass(found, NoisyLabelModule) and name not in BASES
    ]  # fmt: skip
    unknown = set(names or ()) - set(known)
    if unknown:
        raise ValueError(
            f"expected methods among {', '.join(sorted(known))}, got {', '.join(unknown)}; correct --methods"
        )
    for name in sorted(known, key=lambda name: (name != "CrossEntropy", name)):
        if names is None or name in names:
            yield Case(name, False)
            if name != "SimCLR":  # uses no labels
                yield Case(name, True)


def data(size: Size) -> Toy:
    """Return synthetic images of which half of the labels are wrong."""
    return Toy(
        num_samples=size.samples, num_classes=size.num_classes, image_size=size.image_size, batch_size=size.batch_size,
        crop_padding=4, seed=0, track_test=False, noise=Noise("symmetric_exclusive", 0.5),
    )  # fmt: skip


def trainer(device: str, epochs: int, **options: Any) -> L.Trainer:
    """Return a trainer on one device that prints and saves nothing."""
    quiet: dict[str, Any] = {
        "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "num_sanity_val_steps": 0, "log_every_n_steps": 10**6,
    }  # fmt: skip
    accelerator = "gpu" if device == "cuda" else "cpu"
    return L.Trainer(max_epochs=epochs, accelerator=accelerator, devices=1, **quiet, **options)
