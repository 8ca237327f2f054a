"""Forward and backward passes are counted where they happen."""

import pytest
import torch

from sanm_lightning import SANM, methods
from sanm_lightning.cost import EpochPasses, PassCounter, count_passes
from sanm_lightning.sanm import FeatureQuality
from tests.methods.test_every_method import METHODS, SMALL
from tests.methods.toy import data, trainer

EXPECTED = {  # forward and backward passes in steps, forward passes between steps, of an epoch after the warm-up
    ("CrossEntropy", None): (1, 1, 0),
    ("CrossEntropy", "sanm"): (2, 1, 0),  # + unmasked images
    ("ELRPlus", None): (4, 2, 0),  # two networks and two teachers
    ("MCorrection", None): (3, 1, 1),  # losses of the set; predictions and losses of the batch, mixed images
    ("DivideMix", None): (
        10,
        4,
        2,
    ),  # losses by two networks; each guesses for 2 views, half of them with its peer, and mixes both
    ("DivideMix", "sanm"): (14, 8, 2),  # + unmixed views for the decoder
}


def build(name, sanm=None, **options):
    torch.manual_seed(0)
    return getattr(methods, name)(**{**SMALL, **METHODS[name], **options}, sanm=None if sanm is None else SANM(seed=0))


@pytest.mark.parametrize(("name", "sanm"), EXPECTED)
def test_the_passes_of_a_method_are_those_of_its_algorithm(name, sanm):
    first, second = count_passes(build(name, sanm), data(track_test=False), 2)
    assert second[2:] == EXPECTED[name, sanm]
    assert (first.masked, second.masked) == (False, sanm is not None)
    assert (first.stage, second.stage) == {
        "MCorrection": ("warmup", "bootstrap"),
        "DivideMix": ("warmup", "mixmatch"),
    }.get(name, ("train", "train"))


def test_without_a_decoder_a_method_that_mixes_needs_no_further_pass():
    module = methods.Mixup(**SMALL, warmup_epochs=1, sanm=SANM(reconstruct=False, seed=0))
    assert count_passes(module, data(track_test=False), 2)[1][2:] == (2, 1, 0)


def test_quality_from_features_needs_one_pass_over_the_set_per_epoch():
    module = methods.CrossEntropy(**SMALL, warmup_epochs=1, sanm=SANM(quality=FeatureQuality(), seed=0))
    assert [epoch.between_steps for epoch in count_passes(module, data(track_test=False), 3)[1:]] == [1, 1]


def test_the_cost_counts_a_backward_pass_as_two_forward_passes():
    assert EpochPasses("train", False, 2.0, 1.0, 0.5).cost == 4.5


def test_passes_of_validation_and_test_are_not_counted():
    found = count_passes(build("CrossEntropy"), data(val_fraction=0.25), 1)
    assert found[0][2:] == (1, 1, 0)


def test_the_networks_are_as_before_after_the_fit():
    module, counter = build("ELRPlus"), PassCounter()
    trainer(1, callbacks=[counter]).fit(module, data(track_test=False))
    assert len(counter.epochs) == 1
    assert all("forward_features" not in vars(part) for part in module.modules())
