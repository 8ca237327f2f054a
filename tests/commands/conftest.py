"""Small trained methods, as their checkpoints and beside them."""

import lightning as L
import pytest
import torch

from sanm_lightning import SANM, methods
from sanm_lightning.data import Toy
from tests.methods.test_every_method import METHODS, SMALL, empty_sets_allowed
from tests.methods.toy import trainer

OPTIONS = {**METHODS, "SimCLR": {}}


class NamedToy(Toy):
    """Classes with names that a table has to escape."""

    @property
    def class_names(self):
        return ["=cat", 'do"g', "a,b", "käse"]

    @property
    def decode_size(self):
        return self.image_size


def fitted(name: str, path, encoder: str | None = None, data: L.LightningDataModule | None = None, **options):
    """Train a method for a moment, save its checkpoint, and return it in evaluation mode."""
    torch.manual_seed(0)
    arguments = {**SMALL, **OPTIONS[name], **options}
    if "pretrained" in arguments:
        arguments["pretrained"] = encoder
    module = getattr(methods, name)(**arguments)
    run = trainer(2, limit_val_batches=0)
    with empty_sets_allowed():
        run.fit(module, NamedToy(seed=3, num_samples=32, track_test=False) if data is None else data)
    run.save_checkpoint(path)
    return module.eval()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Return a function that gives a method by its name and the path of its checkpoint; each is trained once."""
    folder, made = tmp_path_factory.mktemp("trained"), {}

    def give(name: str, **options):
        key = name + "".join(f"-{key}-{value}" for key, value in sorted(options.items())).replace("/", "_")
        if key not in made:
            encoder = folder / "encoder.pt"
            if not encoder.exists():
                torch.save({"state_dict": methods.CrossEntropy(**SMALL).state_dict()}, encoder)
            path = folder / f"{len(made)}.ckpt"
            sanm = {} if name == "SimCLR" or "network" in options else {"sanm": SANM(mu=0.5, seed=0)}
            made[key] = fitted(name, path, str(encoder), **sanm, **options), path
        return made[key]

    return give
