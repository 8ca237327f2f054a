"""Rows and views that a module asks for, on resident and streamed sets: what is decoded, drawn, and refused."""

import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sanm_lightning import NoisyBatch, methods
from sanm_lightning.batch import EpochPlan
from sanm_lightning.cli import main
from sanm_lightning.data import ImageFolder, Toy
from sanm_lightning.data.datamodule import Source
from sanm_lightning.data.policies import POLICIES, augment, center_crop
from sanm_lightning.random_streams import named_generator
from tests.methods.test_every_method import METHODS, SMALL
from tests.methods.toy import method, trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*")  # Lightning's own
WORKERS = pytest.mark.parametrize("workers", [0, 2])


class Counted:
    """Images that note each decoding in a file, so that decodings in worker processes are counted as well."""

    def __init__(self, images: Tensor, path: Path) -> None:
        self.images, self.path = images, path

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, f"{index}\n".encode())
        os.close(file)
        return self.images[index]


class Streamed(Toy):
    """Count decodings of training images."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(**{"seed": 3, "resident_bytes": 0, **options})
        self.path = folder / "decoded.txt"

    def load_train(self) -> Source:
        labels, images, *_ = super().load_train()
        assert isinstance(images, Tensor)
        return Source(labels, Counted(images, self.path))

    @property
    def decoded(self) -> Counter[int]:
        return Counter(map(int, self.path.read_text().split())) if self.path.exists() else Counter()


class Asking(L.LightningModule):
    """A module that chooses its rows and views, and keeps the batches it is given."""

    def __init__(
        self,
        views: tuple[Any, ...] = ("weak",),
        rows: Callable[[EpochPlan], Tensor | None] = lambda plan: None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.asked, self.rows = views, rows
        self.batches: list[NoisyBatch] = []
        self.order: list[str] = []

    def views(self) -> tuple[Any, ...]:
        self.order.append("views")
        return self.asked

    def prepare_epoch(self) -> None:
        self.order.append("prepare_epoch")

    def epoch_batches(self, plan: EpochPlan) -> Tensor | None:
        self.order.append("epoch_batches")
        return self.rows(plan)

    def training_step(self, batch: NoisyBatch, batch_idx: int) -> Tensor:
        self.batches.append(batch)
        return self.weight.sum() * 0

    def validation_step(self, batch: NoisyBatch, batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(module: L.LightningModule, data: Any, epochs: int = 1, **options: Any) -> None:
    trainer(epochs, limit_val_batches=0, **options).fit(module, data)


def twice_the_same(plan: EpochPlan) -> Tensor:
    """Each row holds the same samples in both of its halves, the first of them once more."""
    rows = torch.arange(plan.steps * 4).view(plan.steps, 4) % plan.num_samples
    return torch.cat((rows, rows.flip(1), rows[:, :1], rows[:, :1]), 1)


class TestDecodings:
    @WORKERS
    def test_duplicates_and_further_views_of_a_row_cost_none(self, tmp_path: Path, workers: int) -> None:
        data = Streamed(tmp_path, num_workers=workers)
        module = Asking(("weak", ("none", "rand_augment"), "simclr"), twice_the_same)
        run(module, data, epochs=2)
        assert data.decoded == Counter(dict.fromkeys(range(16), 2))
        assert all(len(batch.images) == 10 and len(batch.views) == 3 for batch in module.batches)

    @WORKERS
    def test_a_pass_decodes_each_sample_once(self, tmp_path: Path, workers: int) -> None:
        data = Streamed(tmp_path, num_workers=workers, num_samples=21, eval_batch_size=8)
        data.setup("fit")
        served = [data.pass_batch(item, "train") for item in data.pass_dataloader("train")]
        assert torch.cat([batch.index for batch in served if batch.index is not None]).tolist() == list(range(21))
        assert data.decoded == Counter(range(21))
        resident = Toy(seed=3, num_samples=21).batch("train", torch.arange(21))
        assert torch.equal(torch.cat([batch.images for batch in served]), resident.images)


class TestViews:
    @WORKERS
    def test_a_row_of_a_streamed_set_is_that_of_a_resident_one(self, tmp_path: Path, workers: int) -> None:
        views = ("weak", ("none", "rand_augment"), "simclr")
        streamed, resident = Asking(views, twice_the_same), Asking(views, twice_the_same)
        run(streamed, Streamed(tmp_path, num_workers=workers))
        run(resident, Toy(seed=3))
        for one, other in zip(streamed.batches, resident.batches, strict=True):
            assert one.index is not None and other.index is not None and torch.equal(one.index, other.index)
            assert torch.equal(one.labels, other.labels)
            assert len(one.views) == len(other.views) == 3
            assert all(torch.equal(a, b) for a, b in zip(one.views, other.views, strict=True))

    @pytest.mark.parametrize("resident_bytes", [0, 2**31])
    def test_blocks_of_a_view_follow_their_policies(self, resident_bytes: int) -> None:
        module = Asking((("none", "weak"), "none"), twice_the_same)
        run(module, Toy(seed=3, crop_padding=4, resident_bytes=resident_bytes))
        for batch in module.batches:
            mixed, plain = batch.views
            assert batch.images is mixed
            assert torch.equal(mixed[:5], plain[:5])
            assert not torch.equal(mixed[5:], plain[5:])

    def test_the_module_prepares_then_chooses_then_names_its_views(self) -> None:
        module = Asking()
        run(module, Toy(seed=3), epochs=2)
        assert module.order[:2] == ["prepare_epoch", "epoch_batches"]
        assert [step for step in module.order if step != "views"] == ["prepare_epoch", "epoch_batches"] * 2


class TestTransforms:
    """A transform of one image, in torchvision's way, is drawn for each sample, in the workers."""

    @staticmethod
    def made(workers: int, resident_bytes: int = 0, **options: Any) -> Toy:
        policies = {"crop": T.RandomResizedCrop(16, (0.2, 0.5)), "own": Drawing()}
        return Toy(seed=3, num_workers=workers, resident_bytes=resident_bytes, policies=policies, **options)

    @WORKERS
    @pytest.mark.parametrize("resident_bytes", [0, 2**31])
    def test_it_draws_anew_for_each_sample_view_and_step(self, workers: int, resident_bytes: int) -> None:
        module = Asking(("own", "own"), lambda plan: torch.zeros(plan.steps, 4, dtype=torch.int64))
        before = torch.get_rng_state()
        run(module, self.made(workers, resident_bytes), epochs=2)
        assert torch.equal(before, torch.get_rng_state())
        drawn = [
            tuple(view[row].flatten()[:6].tolist()) for b in module.batches for view in b.views for row in range(4)
        ]
        assert len(set(drawn)) == len(drawn) == 2 * 4 * 2 * 4

    def test_workers_change_no_pixel(self) -> None:
        modules = [Asking(("crop", ("weak", "own"))) for _ in range(3)]
        for module, workers, size in zip(modules, (0, 2, 2), (0, 0, 2**31), strict=True):
            run(module, self.made(workers, size))
        for batches in zip(*(module.batches for module in modules), strict=True):
            for views in zip(*(batch.views for batch in batches), strict=True):
                assert torch.equal(views[0], views[1]) and torch.equal(views[0], views[2])

    @WORKERS
    def test_a_run_that_is_resumed_in_mid_epoch_draws_the_same(self, tmp_path: Path, workers: int) -> None:
        class Save(L.Callback):
            def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
                if trainer.global_step == 6:
                    trainer.save_checkpoint(tmp_path / "middle.ckpt")

        views = ("crop", ("own", "weak"))
        whole, rest = Asking(views), Asking(views)
        run(whole, self.made(workers), epochs=2, callbacks=[Save()])
        trainer(2, limit_val_batches=0).fit(rest, self.made(workers), ckpt_path=tmp_path / "middle.ckpt")
        assert len(whole.batches) == 8 and len(rest.batches) == 2
        for one, other in zip(whole.batches[6:], rest.batches, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one.views, other.views, strict=True))

    @pytest.mark.parametrize(
        ("transform", "got"),
        [(T.ToPILImage(), "got Image"), (T.RandomCrop(4), None)],
    )
    def test_what_it_returns_is_checked(self, transform: Any, got: str | None) -> None:
        if got is None:  # any size, as long as it is one
            module = Asking(("odd",))
            run(module, Toy(seed=3, policies={"odd": transform}))
            assert module.batches[0].images.shape[2:] == (4, 4)
            return
        with pytest.raises(ValueError, match=f"expected a uint8 tensor .*{got}"):
            run(Asking(("odd",)), Toy(seed=3, resident_bytes=0, policies={"odd": transform}))

    @pytest.mark.parametrize("resident_bytes", [0, 2**30])
    def test_what_a_policy_of_batches_returns_is_checked(self, resident_bytes: int) -> None:
        def unit(images: Tensor, generator: torch.Generator) -> Tensor:
            return images.float() / 255

        sentence = r"expected 16 uint8 images .* from the policy unit, got \(16, 3, 16, 16\) of torch.float32"
        with pytest.raises(ValueError, match=sentence):
            run(Asking(("unit",)), Toy(seed=3, resident_bytes=resident_bytes, policies={"unit": unit}))

    def test_its_errors_name_it(self) -> None:
        mix = T.MixUp(num_classes=4)  # of a batch and its labels
        with pytest.raises(
            ValueError, match=r"of one image, uint8 \(C, H, W\), got MixUp, which raises ValueError \(.+\) for"
        ):
            run(Asking(("mix",)), Toy(seed=3, policies={"mix": mix}))

    def test_one_without_a_view_is_named(self, caplog: pytest.LogCaptureFixture) -> None:
        policies = {"week": Drawing(), "own": Drawing()}
        with caplog.at_level("INFO", "lightning.pytorch"):
            run(Asking(("weak", ("own", "weak"))), Toy(seed=3, policies=policies), epochs=2)
        said = [record.message for record in caplog.records if "policies" in record.message]
        assert said == ["views of Asking in epoch 0: weak, own; policies without a view: week"]

    def test_it_is_named_on_the_command_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "argv", ["sanm"])
        words = ["fit", "--model", "CrossEntropy", "--model.network", "small_cnn", "--data", "Toy", "--data.policies"]
        policies = '{"weak": {"class_path": "torchvision.transforms.v2.RandAugment", "init_args": {"num_ops": 1}}}'
        trained = [
            "--trainer.max_epochs",
            "1",
            "--trainer.accelerator",
            "cpu",
            "--trainer.default_root_dir",
            str(tmp_path),
        ]
        cli = main(
            [
                *words,
                policies,
                *trained,
                "--trainer.logger",
                "false",
                "--trainer.enable_checkpointing",
                "false",
                "--trainer.enable_progress_bar",
                "false",
                "--trainer.enable_model_summary",
                "false",
            ]
        )
        assert isinstance(cli.datamodule.policies["weak"], T.RandAugment)
        assert cli.datamodule.policies["weak"].num_ops == 1


class Drawing:
    """Fill an image with numbers from the global streams of torch, numpy and random, two of each."""

    def __call__(self, image: Tensor) -> Tensor:
        drawn = [*torch.randint(256, (2,)).tolist(), *np.random.randint(256, size=2), random.randrange(256)]
        return torch.tensor([*drawn, random.randrange(256)] * 128, dtype=torch.uint8).view(3, 16, 16)


class TestBatchPolicies:
    def test_a_callable_with_a_generator_gets_the_whole_row_and_its_stream(self) -> None:
        seen: list[tuple[Any, ...]] = []

        def invert(images: Tensor, generator: torch.Generator) -> Tensor:
            seen.append((images.shape, images.dtype, torch.rand(1, generator=generator).item()))
            return 255 - images

        module = Asking(("invert", "none"))
        run(module, Toy(seed=3, policies={"invert": invert}))
        expected = named_generator("augment", 3, 0, 0, 0, 0)
        assert seen[0] == ((16, 3, 16, 16), torch.uint8, torch.rand(1, generator=expected).item())
        for batch in module.batches:
            torch.testing.assert_close(batch.views[0], 1 - batch.views[1])


class TestRows:
    def test_another_number_of_steps_in_a_later_epoch_is_refused(self) -> None:
        module = Asking(rows=lambda plan: torch.zeros(plan.steps + plan.epoch, 4).long())
        with pytest.raises(ValueError, match="the number of steps is the same in every epoch"):
            run(module, Toy(seed=3), epochs=2)
        assert len(module.batches) == 4

    def test_their_length_may_change_from_epoch_to_epoch(self) -> None:
        module = Asking(rows=lambda plan: torch.zeros(plan.steps, 2 + plan.epoch).long())
        run(module, Toy(seed=3), epochs=2)
        assert [len(batch.images) for batch in module.batches] == [2] * 4 + [3] * 4


class Pooled(Streamed):
    """Every third sample, from a start that moves with the epoch and the network."""

    def epoch_pool(self, epoch: int, peer: int = 0) -> Tensor:
        return torch.arange((epoch + peer) % 3, 63, 3)


class TestPool:
    @WORKERS
    def test_an_epoch_draws_from_its_pool_in_steps_of_constant_number(self, tmp_path: Path, workers: int) -> None:
        module, data = Asking(), Pooled(tmp_path, batch_size=7, num_workers=workers)
        run(module, data, epochs=3)
        index = [batch.index.tolist() for batch in module.batches if batch.index is not None]
        assert [len(row) for row in index] == [7] * 9
        for epoch in range(3):
            drawn = [sample for row in index[3 * epoch : 3 * epoch + 3] for sample in row]
            assert sorted(drawn) == list(range(epoch, 63, 3)) and drawn != sorted(drawn)
        assert data.decoded == Counter(range(63))

    def test_the_module_sees_the_pool_of_each_network(self, tmp_path: Path) -> None:
        seen: list[list[list[int]]] = []
        module = Asking(rows=lambda plan: seen.append([plan.pool(peer).tolist() for peer in (0, 1)]))
        run(module, Pooled(tmp_path), epochs=2)
        assert seen == [[list(range(start, 63, 3)) for start in (epoch, epoch + 1)] for epoch in (0, 1)]

    def test_a_pass_walks_the_pool_of_the_epoch(self, tmp_path: Path) -> None:
        data, walked = Pooled(tmp_path), []

        class Walk(L.Callback):
            def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
                walked.append(torch.cat([item.indices for item in data.pass_dataloader()]).tolist())

        run(Asking(), data, epochs=2, callbacks=[Walk()])
        assert walked == [list(range(0, 63, 3)), list(range(1, 63, 3))]


class TestLoaderRequests:
    """A loader that a callback requests, for instance for its length, does not affect the loader in training."""

    def test_a_further_loader_changes_no_batch(self) -> None:
        class Request(L.Callback):
            def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
                next(iter(trainer.datamodule.train_dataloader()))

        plain, other = Asking(("weak", "none")), Asking(("weak", "none"))
        run(plain, Toy(seed=3), epochs=2)
        run(other, Toy(seed=3), epochs=2, callbacks=[Request()])
        for one, two in zip(plain.batches, other.batches, strict=True):
            assert one.index is not None and two.index is not None and torch.equal(one.index, two.index)
            assert all(torch.equal(a, b) for a, b in zip(one.views, two.views, strict=True))


PAIRS = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 4


class OtherLoaders(Toy):
    """Loaders of pairs for training and as a second one for validation, and loaders of images for prediction."""

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*PAIRS), batch_size=3)

    def val_dataloader(self) -> Any:
        return [*super().val_dataloader(), DataLoader(TensorDataset(*PAIRS), batch_size=3)]

    def predict_dataloader(self) -> Any:
        return [DataLoader(TensorDataset(PAIRS[0]), batch_size=3), DataLoader(list(PAIRS[0]), batch_size=3)]


class Training(Toy):
    """The training split, without augmentation, for validation and prediction."""

    def val_dataloader(self) -> Any:
        return [self.pass_dataloader("train")]

    def predict_dataloader(self) -> Any:
        return self.pass_dataloader("train")


class TestLoadersOfASubclass:
    def test_batches_of_other_loaders_reach_the_model_unchanged(self) -> None:
        module, data, fit = method(), OtherLoaders(seed=3), trainer(1)
        fit.fit(module, data)
        assert fit.global_step == 2
        with torch.no_grad():
            correct = (module.eval()(PAIRS[0]).argmax(1) == PAIRS[1]).float().mean().item()
            expected = module(PAIRS[0]).softmax(1)
        assert fit.callback_metrics["val1/acc"] == pytest.approx(correct)
        assert "test/acc" in fit.callback_metrics
        for found in trainer().predict(module, datamodule=data):
            torch.testing.assert_close(torch.cat([part["probabilities"] for part in found]), expected)

    def test_loaders_passed_to_the_trainer_of_an_earlier_fit_are_not_named_after_its_splits(self) -> None:
        module, twice = method(), trainer(1)
        twice.fit(module, Toy(seed=3))
        assert list(twice.validate(module, DataLoader(TensorDataset(*PAIRS), 3), verbose=False)[0]) == ["val/acc"]

    @pytest.mark.parametrize("resident_bytes", [0, 2**31])
    def test_a_pass_over_the_training_split_is_evaluated_and_predicted_as_that_split(self, resident_bytes: int) -> None:
        module, data = method(), Training(seed=3, num_samples=20, resident_bytes=resident_bytes)
        found = trainer().predict(module, datamodule=data)
        batch = data.batch("train", torch.arange(20))
        with torch.no_grad():
            probabilities = module.eval()(batch.images).softmax(1)
        assert torch.cat([part["index"] for part in found]).tolist() == list(range(20))
        torch.testing.assert_close(torch.cat([part["probabilities"] for part in found]), probabilities)
        accuracy = (probabilities.argmax(1) == batch.labels).float().mean().item()
        assert trainer().validate(module, data, verbose=False) == [{"train/acc": pytest.approx(accuracy)}]


class Noted(L.Callback):
    """Record the samples of each step."""

    def __init__(self) -> None:
        self.index: list[list[int]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.index.append(batch.index.tolist())


@pytest.mark.filterwarnings("ignore:You requested to overfit")
class TestOverfitting:
    @pytest.mark.parametrize("name", ["CrossEntropy", "IEG", "MetaCleaner"])
    @pytest.mark.parametrize("samples_per_epoch", [None, 24])
    def test_every_epoch_has_the_same_samples(self, name: str, samples_per_epoch: int | None) -> None:
        torch.manual_seed(0)
        module, noted = getattr(methods, name)(**SMALL, **METHODS[name]), Noted()
        data = Toy(seed=3, batch_size=8, samples_per_epoch=samples_per_epoch)
        trainer(3, overfit_batches=2, limit_val_batches=0, callbacks=[noted]).fit(module, data)
        first, second = noted.index[:2]
        assert noted.index == [first, second] * 3 and sorted(first) != sorted(second)

    def test_draws_and_pools_are_those_of_epoch_0(self, tmp_path: Path) -> None:
        seen: list[tuple[int, int, list[int]]] = []
        for options in ({"overfit_batches": 1}, {}):
            module = Asking(rows=lambda plan: seen.append((plan.epoch, plan.draw_epoch, plan.pool(0).tolist())))
            run(module, Pooled(tmp_path), epochs=2, **options)
        pools = [list(range(start, 63, 3)) for start in (0, 1)]
        assert seen == [(0, 0, pools[0]), (1, 0, pools[0]), (0, 0, pools[0]), (1, 1, pools[1])]

    def test_a_pass_covers_the_pool_of_epoch_0(self, tmp_path: Path) -> None:
        data, covered = Pooled(tmp_path), []

        class Cover(L.Callback):
            def on_train_epoch_start(self, *_: Any) -> None:
                covered.append(data.pass_pool().tolist())

        run(Asking(), data, epochs=2, overfit_batches=1, callbacks=[Cover()])
        assert covered == [list(range(0, 63, 3))] * 2


class TestDecodeSize:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        generator = torch.Generator().manual_seed(0)
        for part, count in (("train", 3), ("test", 2)):
            for name in ("cat", "dog"):
                (tmp_path / part / name).mkdir(parents=True)
                for number in range(count):
                    pixels = torch.randint(256, (300, 260, 3), dtype=torch.uint8, generator=generator).numpy()
                    Image.fromarray(pixels).save(tmp_path / part / name / f"{number}.png")
        return tmp_path

    @pytest.mark.parametrize("resident_bytes", [0, 2**31])
    def test_training_crops_at_random_and_evaluation_in_the_middle(self, folder: Path, resident_bytes: int) -> None:
        options = {"crop_padding": 0, "flip": False, "resident_bytes": resident_bytes, "batch_size": 3, "seed": 3}
        data = ImageFolder(str(folder), image_size=224, decode_size=256, **options)
        assert data.image_size == (224, 224) and data.decode_size == (256, 256)
        module = Asking(("weak", "weak", "none"))
        run(module, data)
        whole = ImageFolder(str(folder), image_size=256, seed=3)
        places = set()
        for batch in module.batches:
            assert batch.index is not None
            images = whole.batch("train", batch.index).images
            assert torch.equal(batch.views[2], images[:, :, 16:240, 16:240])
            for view in batch.views[:2]:
                for one, image in zip(view, images, strict=True):
                    found = [
                        (top, left)
                        for top in range(33)
                        for left in range(33)
                        if torch.equal(image[:, top, left : left + 224], one[:, 0])
                    ]
                    assert len(found) == 1
                    (top, left) = found[0]
                    assert torch.equal(image[:, top : top + 224, left : left + 224], one)
                    places.add((top, left))
        assert len(places) > 6  # of 12
        evaluated = [data.pass_batch(item, "test").images for item in data.pass_dataloader("test")]
        expected = whole.batch("test", torch.arange(4)).images
        assert torch.equal(torch.cat(evaluated), center_crop(expected, (224, 224)))

    @pytest.mark.parametrize("policy", POLICIES)
    def test_every_policy_returns_the_image_size(self, policy: str) -> None:
        images = torch.randint(256, (4, 3, 40, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        viewed = augment(images, policy, torch.Generator().manual_seed(0), 2, True, (32, 24))
        assert viewed.shape == (4, 3, 32, 24) and viewed.dtype == torch.uint8
