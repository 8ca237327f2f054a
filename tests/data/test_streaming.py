"""Streamed sets: each distinct sample of a row and each sample of a pass is decoded once, and views are those asked for."""

from collections import Counter
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torchvision.transforms import v2

from sanm_lightning import CrossEntropy, ImageFolder, methods
from sanm_lightning.data import Toy
from sanm_lightning.data.datamodule import Source
from sanm_lightning.data.policies import POLICIES
from tests.methods.test_every_method import METHODS, SMALL, AtStep, empty_sets_allowed, encoder  # noqa: F401
from tests.methods.toy import same, trainer

N = 40
PASSING = (
    *("DivideMix", "C2D", "ForwardCorrection", "MCorrection", "RRL", "MOIT", "SelCL", "SMP", "INCV", "REED", "CREMA"),
)
"""Methods with one pass over the training set in the first two epochs."""


class Counted:
    """Images that write down which of them was decoded, in whatever process."""

    def __init__(self, images, log: Path) -> None:
        self.images, self.log = images, log

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        with self.log.open("a") as file:
            file.write(f"{index}\n")
        return self.images[index]


class Streamed(Toy):
    """A toy set that is decoded by workers, and counts its passes."""

    def __init__(self, log: Path, **options) -> None:
        super().__init__(num_samples=N, resident_bytes=0, track_test=False, seed=3, batch_size=8, **options)
        self.log, self.passes = log, 0

    def load_train(self):
        labels, images, *_ = super().load_train()
        return Source(labels, Counted(images, self.log))

    def pass_dataloader(self, split="train", positions=None):
        self.passes += 1
        return super().pass_dataloader(split, positions)

    def decoded(self) -> list[int]:
        return [int(line) for line in self.log.read_text().splitlines()]


class Rows(L.Callback):
    """Note the samples and views of every step."""

    def __init__(self) -> None:
        self.index, self.views = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.index.append(batch.index.tolist())
        self.views.append([view.clone() for view in batch.views])


def made(name, encoder, **options):  # noqa: F811
    torch.manual_seed(0)
    arguments = {**SMALL, **METHODS[name], **options}
    if "pretrained" in arguments:
        arguments["pretrained"] = encoder
    return getattr(methods, name)(**arguments)


@pytest.mark.parametrize(
    ("name", "workers"), [*((name, 0) for name in [*METHODS, "SimCLR"]), ("DivideMix", 2), ("SSR", 2)]
)
def test_each_distinct_sample_of_a_row_and_each_sample_of_a_pass_is_decoded_once(name, workers, encoder, tmp_path):  # noqa: F811
    module = methods.SimCLR(**SMALL) if name == "SimCLR" else made(name, encoder)
    source, rows = Streamed(tmp_path / "log", num_workers=workers), Rows()
    with empty_sets_allowed():
        trainer(2, callbacks=[rows]).fit(module, source)
    assert len(rows.index) == 10
    expected = Counter(sample for row in rows.index for sample in set(row))
    expected.update({sample: source.passes for sample in range(N) if source.passes})
    assert Counter(source.decoded()) == expected
    assert source.passes == {"SSR": 2, **dict.fromkeys(PASSING, 1)}.get(name, 0)
    paired = ("SimCLR", "SSR", "DivideMix", "C2D", "REED", "RRL", "SelCL", "IEG")
    views = {"MOIT": 3, **dict.fromkeys(paired, 2)}.get(name, 1)
    assert len(rows.views[-1]) == views
    assert all(len(view) == len(row) for row, made in zip(rows.index, rows.views, strict=True) for view in made)


@pytest.mark.parametrize("name", METHODS)
def test_a_streamed_set_trains_every_method_as_a_resident_one(name, encoder, tmp_path):  # noqa: F811
    streamed, resident = made(name, encoder), made(name, encoder)
    options = {"num_samples": N, "track_test": False, "seed": 3, "batch_size": 8}
    with empty_sets_allowed():
        trainer(2).fit(streamed, Streamed(tmp_path / "log"))
        trainer(2).fit(resident, Toy(**options))
    for one, other in zip(streamed.networks, resident.networks, strict=True):
        assert same(one, other)


class Chooses(CrossEntropy):
    """Rows with duplicates, and views by blocks."""

    def views(self):
        return (("none", "mine"), "weak")

    def epoch_batches(self, plan):
        row = torch.tensor([3, 3, 1, 3, 0, 1])
        return torch.stack([(row + step) % plan.num_samples for step in range(plan.steps)])


def jitter(image):
    """A transform of one image in torchvision's way."""
    return v2.functional.adjust_brightness(image, float(torch.empty(1).uniform_(0.2, 0.8)))


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_transform_of_one_image_is_drawn_for_each_place_of_its_block(workers, resident, tmp_path):
    source = Streamed(tmp_path / "log", num_workers=workers, policies={"mine": jitter})
    source.resident_bytes = 2**31 if resident else 0
    rows, state = Rows(), torch.get_rng_state()
    module = Chooses(**SMALL)
    trainer(1, callbacks=[rows]).fit(module, source)
    for row, (first, second) in zip(rows.index, rows.views, strict=True):
        plain = source.batch("train", torch.tensor(row)).images
        assert torch.equal(first[:3], plain[:3])  # the block that asks for the image itself
        assert not torch.equal(first[3:], plain[3:])
        factors = first[3:].flatten(1).sum(1) / plain[3:].flatten(1).sum(1)
        assert len({round(float(factor), 4) for factor in factors}) == 3
        assert second.shape == plain.shape
    assert len({tuple(row) for row in rows.index}) == len(rows.index)
    assert state.shape == torch.get_rng_state().shape


class Views(CrossEntropy):
    """Rows with duplicates, and every view of this package, in blocks and alone."""

    def views(self):
        return (("rand_augment", "weak"), ("none", "auto_augment_ssr"), *POLICIES)

    def epoch_batches(self, plan):
        row = torch.tensor([3, 3, 1, 3, 0, 1, 7, 9])
        return torch.stack([(row + step) % plan.num_samples for step in range(plan.steps)])


class Watched(Streamed):
    """Note the policies that are applied in this process, outside of the requests for rows."""

    augmented: tuple[str, ...] = ()

    def _augmented(self, images, name, generator):
        self.augmented += (name,)
        return super()._augmented(images, name, generator)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("decode_size", [16, 24])
def test_workers_make_the_views_of_a_streamed_set_on_the_cpu_equal_to_those_of_a_resident_one(
    workers, decode_size, tmp_path, monkeypatch
):
    monkeypatch.setattr(Streamed, "decode_size", (decode_size, decode_size))
    monkeypatch.setattr(Streamed, "image_size", (16, 16))
    found = {}
    for resident in (False, True):
        source, rows = Watched(tmp_path / "log", num_workers=workers, image_size=decode_size), Rows()
        source.resident_bytes = 2**31 if resident else 0
        trainer(1, callbacks=[rows], limit_train_batches=2).fit(Views(**SMALL), source)
        found[resident] = rows
        assert bool(source.augmented) == resident
    assert found[False].index == found[True].index
    for ours, theirs in zip(found[False].views, found[True].views, strict=True):
        assert len(ours) == 2 + len(POLICIES)
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def brighter(images, *, generator):
    """A policy of batches that draws."""
    return (images * torch.rand((len(images), 1, 1, 1), generator=generator)).to(torch.uint8)


class Mixed(Views):
    """Views with policies of the user in some of their blocks."""

    def views(self):
        return (("weak", "batch", "rand_augment", "mine"), "batch", ("mine", "rand_augment"))


def test_views_with_policies_of_the_user_are_equal_for_streamed_and_resident_sets(tmp_path):
    found = {}
    for resident in (False, True):
        source = Watched(tmp_path / "log", num_workers=2, policies={"batch": brighter, "mine": jitter})
        source.resident_bytes, rows = 2**31 if resident else 0, Rows()
        trainer(1, callbacks=[rows], limit_train_batches=2).fit(Mixed(**SMALL), source)
        found[resident] = rows.views
        applied = ("weak", "batch", "rand_augment", "batch", *(("rand_augment",) if resident else ()))
        assert source.augmented == applied * 2
    for ours, theirs in zip(found[False], found[True], strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_transforms_are_the_same_with_and_without_workers_and_after_a_resume(tmp_path):
    def run(workers, ckpt_path=None, **options):
        torch.manual_seed(0)
        rows, module = Rows(), CrossEntropy(**SMALL)
        source = Streamed(tmp_path / f"log{workers}", num_workers=workers, policies={"weak": jitter})
        trainer(2, callbacks=[rows, *options.get("callbacks", [])]).fit(module, source, ckpt_path=ckpt_path)
        return rows

    path = str(tmp_path / "a.ckpt")
    whole, other = run(0, callbacks=[AtStep(3, path)]), run(2)
    resumed = run(2, ckpt_path=path)
    for one, two in zip(whole.views, other.views, strict=True):
        assert torch.equal(one[0], two[0])
    for one, two in zip(whole.views[3:], resumed.views, strict=True):
        assert torch.equal(one[0], two[0])
    assert not torch.equal(whole.views[0][0], whole.views[5][0])


class Wrong(nn.Module):
    """Ends with floating values, as training pipelines usually do."""

    def forward(self, image):
        return image.float() / 255


def test_a_transform_that_yields_floats_is_refused_in_a_sentence(tmp_path):
    source = Streamed(tmp_path / "log", policies={"weak": Wrong()})
    with pytest.raises(
        ValueError, match=r"expected a uint8 tensor \(C, H, W\) from the transform Wrong, got .*float32"
    ):
        trainer(1).fit(CrossEntropy(**SMALL), source)


def test_an_unknown_view_is_refused_in_a_sentence(tmp_path):
    class Asks(CrossEntropy):
        def views(self):
            return ("strong",)

    with pytest.raises(ValueError, match=r"expected a view among none, weak, .* got 'strong'; choose one"):
        trainer(1).fit(Asks(**SMALL), Toy(seed=0))


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            lambda plan: torch.zeros(plan.steps + 1, 2, dtype=torch.int64),
            r"expected batches \(4, B\) of int64 positions",
        ),
        (lambda plan: torch.zeros(plan.steps, 2), "of torch.float32"),
        (lambda plan: torch.zeros(plan.steps, dtype=torch.int64), r"got \(4,\)"),
        (lambda plan: torch.full((plan.steps, 2), 64), r"expected positions in \[0, 64\)"),
        (lambda plan: torch.full((plan.steps, 2), -1), "expected positions of 0 or more"),
    ],
)
def test_rows_that_cannot_be_served_are_refused_in_a_sentence(rows, sentence):
    class Asks(CrossEntropy):
        def epoch_batches(self, plan):
            return rows(plan)

    with pytest.raises(ValueError, match=sentence):
        trainer(1).fit(Asks(**SMALL), Toy(seed=0))


class Balanced(Toy):
    """Draws half of the samples anew for each epoch."""

    def epoch_pool(self, epoch, peer=0):
        return (torch.arange(self.num_samples // 2) * 2 + epoch) % self.num_samples


@pytest.mark.parametrize("name", ["CrossEntropy", "DivideMix", "SSR"])
def test_a_pool_that_the_data_redraw_is_what_an_epoch_draws_from(name, encoder):  # noqa: F811
    module, source, rows = made(name, encoder, **({"k": 3} if name == "SSR" else {})), Balanced(seed=3), Rows()
    with empty_sets_allowed():
        trainer(2, callbacks=[rows]).fit(module, source)
    assert len(rows.index) == 2 * 2
    for epoch in (0, 1):
        seen = {sample for row in rows.index[2 * epoch : 2 * epoch + 2] for sample in row}
        assert seen <= set(source.epoch_pool(epoch).tolist())


class Stranger(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.batches = nn.Linear(3 * 16 * 16, 4), []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return nn.functional.cross_entropy(self.layer(batch.images.flatten(1)), batch.labels)

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_module_that_asks_for_nothing_gets_shuffled_batches_of_one_view():
    module = Stranger()
    trainer(1).fit(module, Toy(seed=0, track_test=False))
    assert sorted(i for batch in module.batches for i in batch.index.tolist()) == list(range(64))
    assert all(len(batch.views) == 1 and batch.views[0] is batch.images for batch in module.batches)


def test_larger_decoded_images_are_cropped_at_random_in_training_and_in_the_middle_elsewhere(tmp_path):
    from PIL import Image

    for part in ("train", "test"):
        for number, name in enumerate(("a", "b")):
            folder = tmp_path / "root" / part / name
            folder.mkdir(parents=True)
            for copy in range(4):
                ramp = torch.arange(40).repeat(40, 1) * 6 + copy + 3 * number
                image = torch.stack([ramp, ramp.T, torch.zeros_like(ramp)], 2).clamp(max=255).to(torch.uint8)
                Image.fromarray(image.numpy()).save(folder / f"{copy}.png")
    options = {"root": str(tmp_path / "root"), "image_size": 24, "decode_size": 40, "seed": 0, "flip": False}
    source = ImageFolder(**options, crop_padding=0, batch_size=8)
    middle = source.batch("test", torch.arange(8)).images
    whole = ImageFolder(**{**options, "image_size": 40}).batch("test", torch.arange(8)).images
    assert torch.equal(middle, whole[:, :, 8:32, 8:32])
    module, rows = CrossEntropy(**{**SMALL, "num_classes": 2, "image_size": (24, 24)}), Rows()
    trainer(6, callbacks=[rows]).fit(module, source)
    train = ImageFolder(**{**options, "image_size": 40}).batch("train", torch.arange(8)).images
    corners = set()
    for row, (view,) in zip(rows.index, rows.views, strict=True):
        assert view.shape[2:] == (24, 24)
        for sample, image in zip(row, view, strict=True):
            places = [
                (top, left)
                for top in range(17)
                for left in range(17)
                if torch.equal(train[sample][:, top : top + 24, left : left + 24], image)
            ]
            assert places, "no crop of the decoded image"
            corners.add(places[0])
    assert len(corners) > 10
    with pytest.raises(ValueError, match="expected decode_size of 24, the image_size, or more, got 20"):
        ImageFolder(**{**options, "decode_size": 20})
