"""Passes over a training set of which every epoch samples another part."""

import csv

import lightning as L
import numpy as np
import pytest
import torch

from sanm_lightning import SANM
from sanm_lightning.audit import LabelAudit
from sanm_lightning.data import Toy
from sanm_lightning.methods import SSR, DivideMix
from sanm_lightning.sanm import FeatureQuality
from tests.methods.test_every_method import SMALL, empty_sets_allowed
from tests.methods.toy import method, trainer


class Thirds(Toy):
    """Every third sample, from a start that moves with the epoch and the network."""

    def epoch_pool(self, epoch: int, peer: int = 0) -> torch.Tensor:
        return torch.arange((epoch + peer) % 3, self.num_samples, 3)


class Passes(L.Callback):
    """Make the passes of a callback at the end of each epoch."""

    def __init__(self, *quantities: str, **options) -> None:
        self.quantities, self.options, self.found = quantities, options, []

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.found.append(pl_module.predict_train(*self.quantities, **self.options))


def outside(source: Toy, epoch: int, networks: int) -> torch.Tensor:
    mask = torch.ones(source.num_samples, dtype=torch.bool)
    for peer in range(networks):
        mask[source.epoch_pool(epoch, peer)] = False
    return mask


class TestPredictTrain:
    def test_covers_all_samples(self):
        module, source, passes = method(), Thirds(seed=3), Passes("logits", "loss", "labels", network=None)
        trainer(1, callbacks=[passes]).fit(module, source)
        (found,) = passes.found
        images = torch.stack([source.source_images("train")[i] for i in source.table("train").origin.tolist()]) / 255
        with torch.no_grad():
            torch.testing.assert_close(found["logits"][0], module.eval().network(images))
        assert torch.equal(found["labels"], source.labels)

    @pytest.mark.parametrize("networks", [1, 2])
    def test_returns_the_rows_of_the_pools_of_all_networks_with_their_positions_if_asked(self, networks):
        module = method() if networks == 1 else DivideMix(**SMALL, warmup_epochs=1)
        source, passes = Thirds(seed=3), Passes("logits", "loss", "labels", "predictions", network=None, pool_only=True)
        with empty_sets_allowed():
            trainer(2, callbacks=[passes]).fit(module, source)
        for epoch, found in enumerate(passes.found):
            index = (~outside(source, epoch, networks)).nonzero().squeeze(1)
            assert torch.equal(found["index"], index)
            assert torch.equal(found["labels"], source.labels[index])
            assert found["logits"].shape == (networks, len(index), 4)
            assert torch.equal(found["predictions"], found["logits"].argmax(2))
            expected = [
                torch.nn.functional.cross_entropy(rows, found["labels"], reduction="none") for rows in found["logits"]
            ]
            torch.testing.assert_close(found["loss"], torch.stack(expected))


def test_the_files_after_a_fit_are_those_of_all_samples():
    module, source = method(), Thirds(seed=3)
    trainer(1, callbacks=[LabelAudit()], default_root_dir="here", logger=False).fit(module, source)
    probs = np.load("here/pred_probs.npy")
    images = torch.stack([source.source_images("train")[i] for i in source.table("train").origin.tolist()]) / 255
    with torch.no_grad():
        np.testing.assert_allclose(probs, module.eval().network(images).softmax(1), rtol=1e-4, atol=1e-6)
    with open("here/label_issues.csv", newline="") as file:
        rows = {int(row["index"]): float(row["p_given"]) for row in csv.DictReader(file)}
    given = probs[np.arange(len(probs)), source.labels]
    assert rows == pytest.approx(dict(enumerate(given.tolist())), abs=1e-4)


class Notes(L.Callback):
    """Note a table after each epoch."""

    def __init__(self, read) -> None:
        self.read, self.tables = read, []

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.tables.append(self.read(pl_module).clone())


def test_dividemix_divides_the_pools_of_an_epoch_and_keeps_the_rest():
    notes, source = Notes(lambda module: module.division.count), Thirds(seed=3)
    with empty_sets_allowed():
        trainer(3, callbacks=[notes]).fit(DivideMix(**SMALL, warmup_epochs=1, loss_history=3), source)
    expected = torch.zeros(source.num_samples, dtype=torch.int64)
    assert torch.equal(notes.tables[0], expected)
    for epoch in (1, 2):
        expected += ~outside(source, epoch, 2)
        assert torch.equal(notes.tables[epoch], expected)


def test_ssr_relabels_the_pool_of_an_epoch_and_keeps_the_rest():
    notes, source = Notes(lambda module: module.selection.given_quality), Thirds(seed=3)
    trainer(2, callbacks=[notes]).fit(SSR(**SMALL, warmup_epochs=0, k=3), source)
    first, second = notes.tables
    assert bool((first[outside(source, 0, 1)] == 1).all())
    assert bool((first[~outside(source, 0, 1)] < 1).any())
    assert torch.equal(first[outside(source, 1, 1)], second[outside(source, 1, 1)])
    assert not torch.equal(first, second)


def test_quality_from_features_is_that_of_the_pool_and_keeps_the_rest():
    notes, source = Notes(lambda module: module.sanm.label_quality.table.quality), Thirds(seed=3)
    trainer(3, callbacks=[notes]).fit(method(SANM(seed=0, quality=FeatureQuality())), source)
    changed = [(before != after) for before, after in zip(notes.tables[:-1], notes.tables[1:], strict=True)]
    assert all(bool(rows.any()) for rows in changed)
    for rows, epoch in zip(changed, (1, 2), strict=True):
        assert not bool((rows & outside(source, epoch, 1)).any())
