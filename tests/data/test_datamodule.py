"""What all data modules share: labels, splits, batches, and a resume that continues exactly."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.data import Digits, Noise, NoisyDataModule, Toy
from sanm_lightning.data.datamodule import Source

# The first is Lightning's own; the second is how it greets the empty list of a run without any evaluation.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*", "ignore:Total length of `list` across ranks is zero")


class Decoding:
    """A map-style data set that remembers which images were decoded; image i is full of the number i."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.decoded: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        self.decoded.append(index)
        return torch.full((3, 2, 2), index, dtype=torch.uint8)


class Own(NoisyDataModule):
    """A user's data set: 60 training images of 3 classes, unevenly many, and 9 test images."""

    def __init__(self, curated: bool = False, **kwargs: Any) -> None:
        super().__init__(**({"batch_size": 8, "crop_padding": 0, "flip": False, "seed": 5} | kwargs))
        self.images = Decoding(60)
        self._curated = curated

    @property
    def num_classes(self) -> int:
        return 3

    @property
    def image_size(self) -> tuple[int, int]:
        return 2, 2

    @property
    def curated(self) -> bool:
        return self._curated

    def load_train(self) -> Source:
        return Source(torch.tensor([0] * 40 + [1] * 16 + [2] * 4), self.images)

    def load_test(self) -> Source:
        return Source(torch.arange(9) % 3, Decoding(9))


class Recorder(L.LightningModule):
    """A tiny model that writes down every batch it gets, and can save itself or stop in mid-epoch."""

    def __init__(self, pixels: int, save_after: int = -1, path: Path | None = None, stop: bool = False) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3 * pixels, 10)
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.evaluated: list[tuple[int, Tensor, Tensor]] = []
        self.save_after, self.path, self.stop = save_after, path, stop

    def training_step(self, batch: NoisyBatch, batch_idx: int) -> Tensor:
        images, labels, index, *_ = batch
        assert index is not None
        self.seen.append((index.clone(), images.clone()))
        return torch.nn.functional.cross_entropy(self.layer(images.flatten(1)), labels)

    def on_train_batch_end(self, *args: Any) -> None:
        if len(self.seen) == self.save_after and self.path is not None:
            self.trainer.save_checkpoint(self.path)
            self.trainer.should_stop = self.stop

    def validation_step(self, batch: NoisyBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        assert batch.index is not None
        self.evaluated.append((dataloader_idx, batch.index, batch.labels))

    def test_step(self, batch: NoisyBatch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trainer(epochs: int = 1, **kwargs: Any) -> L.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(max_epochs=epochs, **(quiet | kwargs))


class TestSubset:
    def test_is_as_balanced_as_the_classes_allow(self) -> None:
        data = Own(curated=True, max_train_samples=25)
        assert data.labels.bincount().tolist() in ([11, 10, 4], [10, 11, 4])

    def test_decodes_nothing_else(self) -> None:
        data = Own(max_train_samples=12)
        data.setup("fit")
        assert sorted(data.images.decoded) == data.table("train").origin.tolist()
        assert len(data.images.decoded) == 12
        data.setup("fit")
        assert len(data.images.decoded) == 12  # and not a second time

    def test_labels_alone_decode_nothing(self) -> None:
        data = Own(noise=Noise("pair", 0.5))
        assert data.num_samples == 60 and data.measured_noise_rate == 0.5
        assert data.images.decoded == []

    def test_images_labels_and_index_belong_together(self) -> None:
        data = Own(curated=True, max_train_samples=12, val_fraction=0.25)
        original = data.load_train().labels
        for split in ("train", "val"):
            index = torch.arange(9 if split == "train" else 3)
            batch = data.batch(split, index)  # type: ignore[arg-type]
            origin = (batch.images[:, 0, 0, 0] * 255).round().long()
            assert torch.equal(batch.labels, original[origin])

    def test_of_a_tensor_is_made_of_its_rows(self) -> None:
        part, whole = Toy(seed=0, max_train_samples=10), Toy(seed=0)
        origin = part.table("train").origin
        assert torch.equal(part.batch("train", torch.arange(10)).images, whole.batch("train", origin).images)

    def test_depends_on_the_seed_only(self) -> None:
        first, same, other = (Own(max_train_samples=12, seed=s).table("train").origin for s in (1, 1, 2))
        assert torch.equal(first, same) and not torch.equal(first, other)


class TestLabels:
    def test_true_labels_are_known_for_curated_sets_and_for_injected_noise(self) -> None:
        assert Own().true_labels is None and Own().measured_noise_rate is None
        assert Own(curated=True).measured_noise_rate == 0.0
        assert Own(noise=Noise("symmetric_exclusive", 0.5)).measured_noise_rate == 0.5

    def test_the_validation_split_is_noisy_too_and_apart_from_training(self) -> None:
        data = Own(noise=Noise("pair", 1.0), val_fraction=0.2)
        train, val = data.table("train"), data.table("val")
        assert len(val.labels) == 12 and data.num_samples == 48
        assert sorted([*train.origin.tolist(), *val.origin.tolist()]) == list(range(60))
        batch = data.batch("val", torch.arange(12))
        assert batch.true_labels is not None
        assert torch.equal(batch.labels, (batch.true_labels + 1) % 3)

    def test_a_file_covers_the_whole_original_set(self, tmp_path: Path) -> None:
        given = torch.arange(60) % 3
        np.save(tmp_path / "labels.npy", given.numpy())
        data = Own(noise=Noise("file", path=str(tmp_path / "labels.npy")), max_train_samples=12, val_fraction=0.25)
        assert torch.equal(data.labels, given[data.table("train").origin])
        assert data.noise_rate is None and data.true_labels is None
        curated = Own(True, noise=data.noise)
        assert curated.measured_noise_rate == (given != curated.load_train().labels).double().mean()

    def test_noise_is_asked_for_and_measured(self) -> None:
        data = Toy(noise=Noise("symmetric", 0.5), seed=0)
        assert (data.noise_kind, data.noise_rate) == ("symmetric", 0.5)
        assert data.measured_noise_rate == (data.labels != data.true_labels).double().mean()
        assert Toy().noise_rate is None

    def test_the_test_set_stays_as_it_is(self) -> None:
        data = Own(noise=Noise("pair", 1.0))
        batch = data.batch("test", torch.arange(9))
        assert torch.equal(batch.labels, torch.arange(9) % 3) and batch.true_labels is None


class TestSaveLabels:
    def test_writes_what_is_known_and_can_be_read_back(self, tmp_path: Path) -> None:
        data = Own(noise=Noise("symmetric_exclusive", 0.5, seed=8))
        path = tmp_path / "new" / "labels.npz"
        data.save_labels(path)
        data.save_labels(path)
        with np.load(path, allow_pickle=False) as saved:
            assert torch.equal(torch.from_numpy(saved["labels"]), data.labels)
            assert torch.equal(torch.from_numpy(saved["true_labels"]), data.load_train().labels)
            assert saved["index"].tolist() == list(range(60)) and saved["class_names"].tolist() == ["0", "1", "2"]
            assert (str(saved["noise_kind"]), float(saved["noise_rate"]), int(saved["seed"])) == (
                "symmetric_exclusive",
                0.5,
                8,
            )
        assert torch.equal(Own(noise=Noise("file", path=str(path), key="labels")).labels, data.labels)
        assert [p.name for p in path.parent.iterdir()] == ["labels.npz"]

    def test_leaves_out_what_is_not_known(self, tmp_path: Path) -> None:
        Own().save_labels(tmp_path / "a.npz")
        with np.load(tmp_path / "a.npz") as saved:
            assert "true_labels" not in saved.files and np.isnan(saved["noise_rate"])

    def test_keeps_the_old_file_when_it_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a.npz").write_bytes(b"old")

        def fail(file: Any, **arrays: Any) -> None:
            file.write(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(np, "savez_compressed", fail)
        with pytest.raises(KeyboardInterrupt):
            Own().save_labels(tmp_path / "a.npz")
        assert (tmp_path / "a.npz").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1

    def test_refuses_another_ending(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"extension \.npz, got"):
            Own().save_labels(tmp_path / "labels.csv")


class TestPartialBatches:
    @pytest.mark.parametrize("drop", [False, True])
    def test_the_last_one_of_a_training_epoch_is_dropped_if_asked_and_no_other(self, drop: bool) -> None:
        data = Toy(seed=0, num_samples=22, num_test_samples=6, batch_size=8, eval_batch_size=4, drop_last=drop)
        assert [len(item.indices) for item in data.train_dataloader()] == ([8, 8] if drop else [8, 8, 6])
        assert [len(item.indices) for loader in data.val_dataloader() for item in loader] == [4, 2]
        assert sum(len(item.indices) for item in data.pass_dataloader()) == 22


class TestBatch:
    def test_images_are_shares_of_one_and_inputs_stay(self) -> None:
        data = Toy(seed=0)
        index = torch.tensor([5, 3, 5])
        batch = data.batch("train", index)
        assert batch.images.dtype == torch.float32 and batch.images.shape == (3, 3, 16, 16)
        assert batch.images.min() >= 0 and batch.images.max() <= 1
        assert torch.equal(batch.images[0], batch.images[2])
        before = data.batch("train", index).images.clone()
        batch.images.zero_(), batch.labels.zero_()
        assert torch.equal(data.batch("train", index).images, before)

    def test_is_augmented_from_the_generator_and_only_then(self) -> None:
        data = Toy(seed=0, crop_padding=3)
        index = torch.arange(8)
        plain = data.batch("train", index)
        first, second = (data.batch("train", index, generator=torch.Generator().manual_seed(s)) for s in (1, 1))
        assert torch.equal(first.images, second.images) and not torch.equal(first.images, plain.images)

    def test_a_streaming_split_gives_the_same_batches(self) -> None:
        resident, streaming = Own(), Own(resident_bytes=0)
        streaming.setup()
        assert streaming.images.decoded == []
        for one, two in zip(resident.train_dataloader(), streaming.train_dataloader(), strict=True):
            ours, theirs = resident.pass_batch(one, "train"), streaming.pass_batch(two, "train")
            assert torch.equal(one.indices, theirs.index)
            for part, other in zip(ours[:4], theirs[:4], strict=True):
                assert part is other is None or torch.equal(part, other)

    def test_a_resident_tensor_may_stream_as_well(self) -> None:
        data = Toy(seed=0, resident_bytes=0, max_train_samples=10)
        row = next(iter(data.train_dataloader()))
        whole = Toy(seed=0).batch("train", data.table("train").origin[row.indices])
        assert torch.equal(data.pass_batch(row, "train").images, whole.images)

    def test_a_streaming_split_decodes_what_no_loader_served(self) -> None:
        index = torch.tensor([2, 0, 2])
        for name in ("images", "labels"):
            resident, streaming = (getattr(Own(resident_bytes=size).batch("train", index), name) for size in (2**31, 0))
            assert torch.equal(resident, streaming)

    def test_an_unknown_policy_is_refused(self) -> None:
        with pytest.raises(ValueError, match="expected a view among none, weak"):
            Toy(seed=0).batch("train", torch.arange(3), generator=torch.Generator(), policy="strong")

    def test_an_unknown_split_is_refused(self) -> None:
        with pytest.raises(ValueError, match="'train', 'val' or 'test', got 'dev'"):
            Own().batch("dev", torch.arange(3))  # type: ignore[arg-type]


@pytest.mark.parametrize("resident_bytes", [0, 2**30])
@pytest.mark.parametrize(
    ("image", "got"),
    [
        (torch.full((3, 2, 2), 0.9), r"\(3, 2, 2\) of torch.float32"),
        (torch.zeros(1, 2, 2, dtype=torch.uint8), r"\(1, 2, 2\)"),
    ],
)
def test_images_of_another_form_are_refused(image: Tensor, got: str, resident_bytes: int) -> None:
    class Other(Own):
        def load_train(self) -> Source:
            return Source(super().load_train().labels, [image] * 60)

    data = Other(resident_bytes=resident_bytes)
    with pytest.raises(ValueError, match=rf"expected uint8 images \(3, 2, 2\) from the data set, got {got}"):
        data.store("train").look_up(torch.arange(2))


class TestUnderTheTrainer:
    @pytest.mark.parametrize("val_fraction", [0.0, 0.25])
    @pytest.mark.parametrize("track_test", [False, True])
    @pytest.mark.parametrize("resident_bytes", [0, 2**20])
    def test_every_loader_reaches_its_own_split(
        self, val_fraction: float, track_test: bool, resident_bytes: int
    ) -> None:
        data = Toy(
            num_samples=20, val_fraction=val_fraction, track_test=track_test, resident_bytes=resident_bytes, seed=0
        )
        model = Recorder(256)
        run = trainer(num_sanity_val_steps=1)
        run.fit(model, data)
        assert sorted(torch.cat([index for index, _ in model.seen]).tolist()) == list(range(data.num_samples))
        names = [data.eval_names[loader] for loader, _, _ in model.evaluated]
        assert set(names) == set(data.eval_names)
        for name, (_, index, labels) in zip(names, model.evaluated, strict=True):
            expected = data.table(name).labels  # type: ignore[arg-type]
            assert torch.equal(labels, expected[index]) and index.tolist() == list(range(len(expected)))
        model.evaluated.clear()
        run.test(model, datamodule=data, verbose=False)
        assert torch.equal(model.evaluated[0][2], data.load_test().labels)

    def test_pure_16_bit_training_gets_images_of_its_type(self) -> None:
        model = Recorder(256)
        trainer(precision="bf16-true").fit(model, Toy(num_samples=8, seed=0))
        assert model.seen[0][1].dtype == torch.bfloat16 and model.seen[0][0].dtype == torch.int64

    def test_over_fitting_sees_the_same_batches_again(self) -> None:
        model = Recorder(256)
        with pytest.warns(UserWarning, match="overfit"):
            trainer(2, overfit_batches=1, limit_val_batches=0).fit(model, Toy(seed=0))
        assert torch.equal(model.seen[0][0], model.seen[1][0])

    @pytest.mark.parametrize(
        ("save_after", "accumulate", "resident_bytes"),  # 4 batches per epoch: middle, end, and middle of the next
        [(1, 1, 2**20), (2, 3, 2**20), (4, 1, 2**20), (6, 1, 0), (6, 3, 2**20), (8, 1, 0)],
    )
    def test_a_resumed_run_sees_exactly_what_an_uninterrupted_one_sees(
        self, tmp_path: Path, save_after: int, accumulate: int, resident_bytes: int
    ) -> None:
        def data(seed: int | None) -> Toy:
            return Toy(num_samples=30, batch_size=8, crop_padding=3, resident_bytes=resident_bytes, seed=seed)

        L.seed_everything(1, verbose=False)
        kwargs: dict[str, Any] = {"accumulate_grad_batches": accumulate}
        whole = Recorder(256, save_after, tmp_path / "a.ckpt")
        trainer(3, **kwargs).fit(whole, data(4))
        assert len(whole.seen) == 12
        assert not torch.equal(whole.seen[0][0], whole.seen[4][0])
        L.seed_everything(2, verbose=False)
        resumed = Recorder(256)
        trainer(3, **kwargs).fit(resumed, data(4), ckpt_path=tmp_path / "a.ckpt", weights_only=False)
        assert len(resumed.seen) == 12 - save_after
        for (index, images), (again, images_again) in zip(whole.seen[save_after:], resumed.seen, strict=True):
            assert torch.equal(index, again) and torch.equal(images, images_again)
        if accumulate == 1:  # gradients that wait for their step are in no checkpoint
            torch.testing.assert_close(resumed.layer.weight, whole.layer.weight, rtol=0, atol=0)

    def test_every_batch_of_every_epoch_is_augmented_differently(self) -> None:
        data = Toy(seed=0)  # 4 batches
        loader = data.train_dataloader()
        views = []
        for epoch in range(3):
            loader.set_epoch(epoch)
            views.extend(
                data._training_batch(item._replace(samples=torch.arange(16))).images.sum((1, 2, 3)) for item in loader
            )
        assert len({tuple(view.tolist()) for view in views}) == 12

    def test_two_processes_see_different_augmentation(self) -> None:
        data, views = Toy(seed=0), []
        loader = data.train_dataloader()
        for rank in (0, 1):
            loader.rank, loader.world_size = rank, 2
            item = next(iter(loader))._replace(samples=torch.arange(16))
            views.append(data._training_batch(item).images)
        assert not torch.equal(*views)

    def test_a_run_without_a_seed_resumes_with_the_labels_it_began_with(self, tmp_path: Path) -> None:
        noise = Noise("symmetric_exclusive", 0.5)
        torch.manual_seed(1)
        first = Toy(noise=noise)
        trainer().fit(Recorder(256, 2, tmp_path / "a.ckpt"), first)
        torch.manual_seed(2)
        second = Toy(noise=noise)
        assert not torch.equal(first.labels, second.labels)
        resumed = Recorder(256)
        trainer().fit(resumed, second, ckpt_path=tmp_path / "a.ckpt", weights_only=False)
        assert torch.equal(first.labels, second.labels)
        assert len(resumed.seen) == 2

    def test_other_labels_than_those_of_the_resumed_run_are_refused(self, tmp_path: Path) -> None:
        trainer().fit(Recorder(256, 2, tmp_path / "a.ckpt"), Toy(seed=0))
        other = Toy(seed=0, noise=Noise("pair", 0.5))
        with pytest.raises(ValueError, match="training labels of the resumed run"):
            trainer().fit(Recorder(256), other, ckpt_path=tmp_path / "a.ckpt", weights_only=False)
        trainer().test(Recorder(256), other, ckpt_path=tmp_path / "a.ckpt", weights_only=False, verbose=False)


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"batch_size": 0}, "expected batch_size of 1 or more"),
            ({"eval_batch_size": 0}, "expected eval_batch_size of 1 or more"),
            ({"crop_padding": -1}, "expected crop_padding of 0 or more"),
            ({"num_workers": -1}, "expected num_workers of 0 or more"),
            ({"val_fraction": 1.0}, r"\[0, 1\), got 1.0"),
            ({"val_fraction": 0.999}, "gives 60 samples for validation and 0 for training"),
            ({"val_fraction": 0.001}, "gives 0 samples for validation"),
            ({"max_train_samples": 61}, "size of the training set, got 61"),
            ({"max_train_samples": 2}, "from 3, the number of classes, to 60"),
            ({"seed": -1}, "seed of 0 or more"),
        ],
    )
    def test_refuses_with_one_sentence(self, arguments: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            Own(**arguments).setup("fit")

    def test_refuses_noise_that_is_a_dictionary(self) -> None:
        with pytest.raises(
            TypeError, match=r"expected noise of type Noise, got {'kind': 'symmetric', 'rate': 0.2}; use"
        ):
            Own(noise={"kind": "symmetric", "rate": 0.2})

    @pytest.mark.parametrize(
        ("source", "match"),
        [
            (Source(torch.tensor([0, 3]), Decoding(2)), "0 to 2 in the training set, got 0 to 3"),
            (Source(torch.tensor([0, -1]), Decoding(2)), "0 to 2 in the training set, got -1"),
            (Source(torch.tensor([0.0, 1.0]), Decoding(2)), "int64 labels"),
            (Source(torch.tensor([0, 1]), Decoding(3)), "one label per image"),
            (Source(torch.tensor([0, 1]), torch.zeros(2, 3, 2, 2)), "expected uint8 images"),
            (Source(torch.tensor([0, 1]), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)), r"\(N, 3, 2, 2\)"),
        ],
    )
    def test_refuses_a_source_that_does_not_fit(
        self, source: Source, match: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = Own()
        monkeypatch.setattr(data, "load_train", lambda: source)
        with pytest.raises(ValueError, match=match):
            data.setup("fit")

    def test_a_validation_split_that_was_not_asked_for(self) -> None:
        with pytest.raises(ValueError, match="val_fraction above 0"):
            Digits(seed=0).batch("val", torch.arange(2))
