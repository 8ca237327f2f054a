"""Batches of any usual form, and any number of loaders, in fit, validate, test and predict."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sanm_lightning import SANM, NoisyBatch
from sanm_lightning.methods import CoTeaching, CrossEntropy
from sanm_lightning.sanm.foreign_batch import SampleIndex
from tests.methods.toy import trainer

SMALL = {"network": "small_cnn", "network_args": {"width": 4}, "num_classes": 4, "image_size": (16, 16)}
N = 12
IMAGES, LABELS = torch.rand(N, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(N) % 4


class Pair(NamedTuple):
    image: Tensor
    label: Tensor


class Renamed(NamedTuple):
    x: Tensor
    y: Tensor
    index: Tensor


FORMS = {
    "list": lambda i: [IMAGES[i], LABELS[i]],
    "tuple with a name": lambda i: (IMAGES[i], LABELS[i], f"file{i}.jpg"),
    "tuple with an index and more": lambda i: (IMAGES[i], LABELS[i], i, torch.rand(3)),
    "mapping": lambda i: {"image": IMAGES[i], "label": LABELS[i], "name": "a"},
    "named tuple": lambda i: Pair(IMAGES[i], LABELS[i]),
    "named tuple with an index": lambda i: Renamed(IMAGES[i], LABELS[i], torch.tensor(i)),
    "NoisyBatch": lambda i: NoisyBatch(IMAGES[i], LABELS[i], torch.tensor(i), LABELS[i], (IMAGES[i],)),
}
ALONE = {
    "a tensor": lambda i: IMAGES[i],
    "a list of one": lambda i: [IMAGES[i]],
    "a mapping": lambda i: {"pixel_values": IMAGES[i]},
}
INDEXED = {"named tuple with an index", "NoisyBatch"}


class Served(Dataset):
    def __init__(self, form):
        self.form = form

    def __len__(self):
        return N

    def __getitem__(self, i):
        return self.form(i)


def loader(form) -> DataLoader:
    return DataLoader(Served(form), 6)


def module(kind=CrossEntropy, **options):
    torch.manual_seed(0)
    given = {"noise_rate": 0.2} if kind is CoTeaching else {}
    return kind(**SMALL, **given, warmup_epochs=1, sanm=SANM(seed=0), **options)


def accuracy(made) -> float:
    with torch.no_grad():
        return (made.eval()(IMAGES).argmax(1) == LABELS).float().mean().item()


@pytest.mark.parametrize("kind", [CrossEntropy, CoTeaching])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_trained_on_validated_tested_and_predicted(kind, form):
    made, same = module(kind), module(kind)
    run = trainer(2)
    run.fit(made, loader(FORMS[form]), loader(FORMS[form]))
    trainer(2).fit(same, loader(FORMS["list"]))
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), same.parameters(), strict=True))
    expected = accuracy(made)
    assert run.callback_metrics["val/acc"] == pytest.approx(expected)
    assert trainer().validate(made, loader(FORMS[form]), verbose=False)[0]["val/acc"] == pytest.approx(expected)
    assert trainer().test(made, loader(FORMS[form]), verbose=False)[0]["test/acc"] == pytest.approx(expected)
    found = trainer().predict(made, loader(FORMS[form]))
    probabilities = torch.cat([part["probabilities"] for part in found])
    torch.testing.assert_close(probabilities, made.eval()(IMAGES).softmax(1))
    if form in INDEXED:
        assert torch.cat([part["index"] for part in found]).tolist() == list(range(N))
    else:
        assert all("index" not in part for part in found)


@pytest.mark.parametrize("form", ALONE)
def test_images_alone_are_predicted_and_refused_in_a_sentence_elsewhere(form):
    made = module()
    found = trainer().predict(made, loader(ALONE[form]))
    assert torch.cat([part["probabilities"] for part in found]).shape == (N, 4)
    for ask in (trainer(1).fit, trainer().validate, trainer().test):
        with pytest.raises(
            ValueError, match=r"expected a batch with labels, got .*; return NoisyBatch or \(images, labels\)"
        ):
            ask(made, loader(ALONE[form]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_positions_of_any_integer_dtype_are_those_of_int64(dtype):
    index = torch.arange(4).flip(0)
    batches = Renamed(IMAGES[:4], LABELS[:4], index.to(dtype)), NoisyBatch(IMAGES[:4], LABELS[:4], index.to(dtype))
    found = [NoisyBatch.from_any(batch).index for batch in batches]
    run = SimpleNamespace(datamodule=SimpleNamespace(num_samples=N))
    found += [SampleIndex()(batch, run) for batch in (batches[0], (IMAGES[:4], LABELS[:4], index.to(dtype)))]
    assert [part.dtype for part in found] == [torch.int64] * 4
    assert all(torch.equal(part, index) for part in found)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int32, torch.bool])
def test_images_of_another_dtype_are_refused_before_the_first_update(dtype):
    served = loader(lambda i: (torch.ones(3, 16, 16, dtype=dtype), LABELS[i]))
    with pytest.raises(
        MisconfigurationException, match=rf"expected images in uint8 or floating point .*, got {dtype}; convert"
    ):
        trainer(1).fit(module(), served)


def test_a_label_without_a_class_is_refused_in_its_batch():
    served = loader(lambda i: (IMAGES[i], LABELS[i] + 2 * (i > 6)))
    with pytest.raises(
        ValueError, match=r"expected class indices in \[0, 4\), the num_classes of CrossEntropy, got 2 to 5; set"
    ):
        trainer(1).fit(module(), served)


def test_a_batch_without_images_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r"expected a batch NoisyBatch.* got a mapping with 'audio'"):
        NoisyBatch.from_any({"audio": IMAGES})


@pytest.mark.parametrize("kind", [CrossEntropy, CoTeaching])
def test_any_number_of_loaders_is_evaluated_and_predicted(kind):
    made = module(kind)
    several = [loader(FORMS["list"]), loader(FORMS["mapping"]), loader(FORMS["named tuple"])]
    expected = accuracy(made)
    validated = trainer().validate(made, several, verbose=False)
    tested = trainer().test(made, several, verbose=False)
    for found, names in ((validated, ["val", "val1", "val2"]), (tested, ["test", "test1", "test2"])):
        for result, name in zip(found, names, strict=True):
            assert result[f"{name}/acc"] == pytest.approx(expected)
            assert (f"{name}/acc_network2" in result) is (kind is CoTeaching)
    parts = trainer().predict(made, several)
    assert [len(part) for part in parts] == [2, 2, 2]


def test_rows_and_blocks_of_a_batch_keep_all_that_belongs_to_a_sample():
    whole = NoisyBatch(IMAGES, LABELS, torch.arange(N), LABELS.flip(0), (IMAGES, IMAGES.flip(3)))
    for number, block in enumerate(whole.chunk(3)):
        rows = slice(4 * number, 4 * number + 4)
        assert torch.equal(block.index, torch.arange(N)[rows])
        assert torch.equal(block.true_labels, LABELS.flip(0)[rows])
        assert torch.equal(block.views[1], IMAGES.flip(3)[rows])
    twice = whole.with_images(torch.cat([IMAGES, IMAGES]))
    assert torch.equal(twice.index, torch.arange(N).repeat(2))
    assert torch.equal(twice.true_labels, LABELS.flip(0).repeat(2))
