"""What users of the field report: each method runs through it, or says in a sentence why it cannot."""

import functools

import pytest
import torch

from sanm_lightning import SANM, Noise, methods
from sanm_lightning.data import Toy
from sanm_lightning.data.datamodule import Source
from tests.full import FULL
from tests.methods.test_every_method import METHODS, SMALL, empty_sets_allowed, encoder  # noqa: F401  (a fixture)
from tests.methods.toy import trainer


class OneClass(Toy):
    """Every label says the same class: all others have vanished."""

    def load_train(self):
        labels, images, *_ = super().load_train()
        return Source(torch.full_like(labels, 2), images)


class Alike(Toy):
    """One image again and again, with one label: all losses are equal, and there is one mode."""

    def load_train(self):
        labels, images, *_ = super().load_train()
        return Source(torch.zeros_like(labels), images[:1].expand(len(images), -1, -1, -1).contiguous())


SETS = {
    "all labels wrong": lambda: Toy(num_samples=24, seed=3, noise=Noise("symmetric_exclusive", 1.0)),
    "one class": lambda: OneClass(num_samples=24, seed=3),
    "equal losses": lambda: Alike(num_samples=24, seed=3, crop_padding=0, flip=False),
    "fewer samples than a batch": lambda: Toy(num_samples=6, seed=3),
    "a last batch of one": lambda: Toy(num_samples=17, seed=3),
}


@pytest.fixture(params=METHODS)
def make(request, encoder):  # noqa: F811
    """Return a factory of modules of one method, under SANM."""
    name = request.param

    def build(**options):
        torch.manual_seed(0)
        arguments = {**SMALL, **METHODS[name], "warmup_epochs": 0 if name == "SSR" else 1, **options}
        if "pretrained" in arguments:
            arguments["pretrained"] = encoder
        return getattr(methods, name)(**arguments, sanm=SANM(mu=0.5, seed=0))

    return build


def fit(module, source, **options):
    with empty_sets_allowed():
        run = trainer(2, limit_val_batches=0, **options)
        run.fit(module, source)
    return run


@pytest.mark.parametrize("degenerate", SETS if FULL else ("one class", "equal losses", "a last batch of one"))
def test_it_learns_through(make, degenerate):
    module, source = make(), SETS[degenerate]()
    run = fit(module, source)
    assert run.current_epoch == 2
    assert all(bool(torch.isfinite(weight).all()) for weight in module.parameters())
    quality = module.label_quality()
    if quality is not None:
        assert len(quality) == source.num_samples
        assert bool(((quality >= 0) & (quality <= 1)).all())


@pytest.mark.parametrize("name", ["CrossEntropy", "CoTeaching", "CDR"])
def test_nan_images_end_with_a_sentence_that_names_them(name):
    """Those of a user's own loader: the data modules here hold bytes."""
    images = torch.rand(8, 3, 16, 16)
    images[5, 0, 3] = float("nan")
    loader = torch.utils.data.DataLoader(list(zip(images, torch.arange(8) % 4, strict=True)), 4)
    module = getattr(methods, name)(**SMALL, **METHODS[name])
    with pytest.raises(ValueError, match=r"NaN or infinity .*first at step 2 .*check the images"):
        trainer(2).fit(module, loader)


def test_a_learning_rate_that_diverges_ends_with_a_sentence(make):
    sgd = functools.partial(torch.optim.SGD, lr=1e25)
    with pytest.raises(ValueError, match=r"expected finite"):
        fit(make(optimizer=sgd), Toy(num_samples=24, seed=3))
