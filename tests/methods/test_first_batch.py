"""Loaders of the user's own for the built-in methods: what is converted, and what is refused before the first update."""

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sanm_lightning import SANM, NoisyBatch
from sanm_lightning.methods import CoTeaching, CrossEntropy
from sanm_lightning.models import SmallCNN
from tests.methods.toy import trainer

IMAGES = torch.randint(0, 256, (12, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
LABELS = torch.arange(12) % 4
FLOATING = IMAGES / 255
TALL = FLOATING.repeat(1, 1, 2, 1)


def loader(images: Any = FLOATING, labels: Any = LABELS) -> DataLoader:
    return DataLoader(TensorDataset(images, labels), 6)


def module(kind: Any = CrossEntropy, sanm: bool = True, **options: Any) -> Any:
    torch.manual_seed(0)
    given: dict[str, Any] = {"noise_rate": 0.2} if kind is CoTeaching else {}
    given |= {"network": "small_cnn", "network_args": {"width": 4}, "num_classes": 4, "image_size": (16, 16)}
    return kind(**{**given, "warmup_epochs": 1, "sanm": SANM(seed=0) if sanm else None, **options})


def same(one: Any, other: Any) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def fitted(*data: Any, **options: Any) -> Any:
    made = module(**options)
    trainer(2).fit(made, *data)
    return made


class TestConverted:
    @pytest.mark.parametrize("sanm", [True, False])
    def test_images_in_uint8_are_those_in_0_1(self, sanm):
        assert same(fitted(loader(IMAGES), sanm=sanm), fitted(loader(), sanm=sanm))
        given = NoisyBatch(IMAGES, LABELS.int())
        read = NoisyBatch.from_any(given)
        assert torch.equal(read.images, FLOATING)
        assert read.labels.dtype == torch.int64

    def test_so_they_are_in_evaluation_and_prediction(self):
        made = module()
        results = [trainer().validate(made, loader(images), verbose=False) for images in (IMAGES, FLOATING)]
        assert results[0] == results[1]
        one, other = (trainer().predict(made, loader(images)) for images in (IMAGES, FLOATING))
        assert torch.equal(one[0]["probabilities"], other[0]["probabilities"])

    @pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
    def test_in_the_precision_of_the_trainer(self, precision):
        made = module(sanm=False)
        trainer(1, precision=precision).fit(made, loader(IMAGES))

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
    def test_labels_of_any_integer_dtype(self, dtype):
        assert same(fitted(loader(labels=LABELS.to(dtype))), fitted(loader()))

    @pytest.mark.parametrize("kind", [CrossEntropy, CoTeaching])
    def test_one_hot_rows_are_class_indices(self, kind):
        rows = F.one_hot(LABELS, 4).float()
        assert same(fitted(loader(labels=rows), loader(labels=rows), kind=kind), fitted(loader(), loader(), kind=kind))

    def test_accuracy_on_rows_is_that_on_class_indices(self):
        made, rows = module(), F.one_hot(LABELS, 4).float()
        one, other = (trainer().validate(made, loader(labels=y), verbose=False) for y in (rows, LABELS))
        assert one == other
        assert one[0]["val/acc"] == pytest.approx((made.eval()(FLOATING).argmax(1) == LABELS).float().mean().item())

    def test_soft_rows_are_the_targets(self):
        rows = torch.full((12, 4), 0.1) + 0.6 * F.one_hot(LABELS, 4)
        made = module(sanm=False)
        before = made.network(FLOATING).log_softmax(1)
        expected = -(rows * before).sum(1).mean()
        run = trainer(1)
        run.fit(made, DataLoader(TensorDataset(FLOATING, rows), 12))
        torch.testing.assert_close(run.callback_metrics["train/loss"], expected.detach())


class TestNormalizedTwice:
    NORMALIZED = (FLOATING - 0.45) / 0.22
    MATCH = r"expected images in \[0, 1\] in the batches, got -2.05 to 2.5; CrossEntropy normalizes its images: remove"

    @pytest.mark.parametrize("sanm", [True, False])
    def test_a_normalized_loader_is_refused_before_the_first_update(self, sanm):
        made, untouched = module(sanm=sanm), module(sanm=sanm)
        with pytest.raises(MisconfigurationException, match=self.MATCH):
            trainer(1).fit(made, loader(self.NORMALIZED))
        assert same(made, untouched)

    @pytest.mark.parametrize("call", ["validate", "test", "predict"])
    def test_so_it_is_in_evaluation_and_prediction(self, call):
        with pytest.raises(MisconfigurationException, match=self.MATCH):
            getattr(trainer(), call)(module(), loader(self.NORMALIZED))

    def test_a_second_loader_is_checked_too(self):
        with pytest.raises(MisconfigurationException, match=self.MATCH):
            trainer().validate(module(), [loader(), loader(self.NORMALIZED)], verbose=False)

    def test_it_is_accepted_where_neither_network_nor_sanm_relies_on_the_range(self):
        statistics = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
        fitted(loader(self.NORMALIZED), sanm=False, **statistics)
        fitted(loader(self.NORMALIZED), sanm=False, network=SmallCNN(4, width=4), network_args=None)
        with pytest.raises(MisconfigurationException, match=r"expected images in \[0, 1\]"):
            fitted(loader(self.NORMALIZED), **statistics)

    def test_images_that_leave_the_range_by_resampling_are_accepted(self):
        fitted(loader(FLOATING * 1.15 - 0.07))


class TestRefused:
    @pytest.mark.parametrize(
        ("images", "labels", "match"),
        [
            (TALL, LABELS, r"of 16 x 16 pixels, the image_size of .*, got 32 x 16; pass image_size=\(32, 16\)"),
            (FLOATING, LABELS - 1, r"class indices in \[0, 4\), the num_classes of CrossEntropy, got -1 to 2"),
            (FLOATING, LABELS + 1, r"class indices in \[0, 4\), the num_classes of CrossEntropy, got 1 to 4"),
            (FLOATING, LABELS[:, None], r"labels \(B,\) of class indices or \(B, 4\) .*, got \(6, 1\) of torch.int64"),
            (FLOATING, LABELS.float(), r"labels \(B,\) of class indices or \(B, 4\) .*, got \(6,\) of torch.float32"),
            (FLOATING, torch.ones(12, 4), r"rows sum to 1 for CrossEntropy, got sums of 4 to 4"),
        ],
        ids=["size", "no class", "too many classes", "column", "floats", "multi-hot"],
    )  # fmt: skip
    def test_before_the_first_update(self, images, labels, match):
        made, untouched = module(), module()
        with pytest.raises(MisconfigurationException, match=match):
            trainer(2).fit(made, loader(images, labels))
        assert same(made, untouched)

    def test_another_size_is_accepted_without_a_decoder(self):
        fitted(loader(TALL), sanm=False)


class TestLongWarmup:
    def test_a_run_that_masks_nothing_is_warned_of(self):
        with pytest.warns(UserWarning, match=r"expected max_epochs above 10, .*, got 1, in which nothing is masked"):
            trainer(1).fit(module(warmup_epochs=10), loader())

    @pytest.mark.filterwarnings("error:expected max_epochs above")
    def test_no_other_run_is(self):
        trainer(1).fit(module(warmup_epochs=10, sanm=False), loader())
        trainer(2).fit(module(warmup_epochs=1), loader())
        trainer(1).fit(module(warmup_epochs=0), loader())
