"""The slow sides of the benchmarks do what the fast ones do."""

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import loaders, step, streamed
from benchmarks.views import PIPELINES, POOL
from sanm_lightning.data.policies import POLICIES
from sanm_lightning.data.policies import POOL as OURS
from sanm_lightning.sanm import class_activation_map, mask_box, mask_ratio, regularize_labels
from sanm_lightning.sanm.activation import upsample
from sanm_lightning.sanm.masking import inside_box


def test_the_loop_over_images_makes_the_masks_of_the_equations(monkeypatch):
    _, targets, quality = (part.cpu() for part in step.batch_of(16))
    images = torch.rand(16, 3, 12, 12)
    features, weight = torch.rand(16, 8, 4, 4), torch.rand(10, 8)
    features[:, :, 1, 2] += (
        1  # inside, and enlarged threefold: a single pixel is the maximum, however the sums are rounded
    )
    classes = torch.randint(10, (16,))
    monkeypatch.setattr(np.random, "uniform", lambda low, high: 1.1)
    given = {
        "targets": targets.numpy(),
        "quality": quality.numpy(),
        "classes": classes.numpy(),
        "mu": 0.3,
        "delta": 0.8,
    }
    masked, softened = step.masks_one_by_one(features.numpy(), weight.numpy(), images.numpy(), **given)
    ratio = mask_ratio(quality, 0.3)
    activation = upsample(class_activation_map(features, weight, classes), (12, 12))
    box = mask_box(activation, ratio, torch.full((16,), 1.1))
    inside = inside_box(box, (12, 12)).expand_as(images).numpy()
    assert np.array_equal(masked != images.numpy(), inside)
    torch.testing.assert_close(torch.from_numpy(softened), regularize_labels(targets, ratio), rtol=1e-5, atol=1e-6)


def test_each_pipeline_on_single_images_has_a_policy_of_its_name():
    assert PIPELINES.keys() <= POLICIES.keys()
    assert list(POOL) == [name for name, _ in OURS]


@pytest.mark.filterwarnings("ignore:Detected kernel version")
def test_a_step_is_taken_apart():
    found = step.run(repeats=1, width=4, batch_size=8)
    assert set(found["parts_s"]) == {"first_pass", "masked_pass", "decoder", "optimizer", "mask"}
    assert all(value > 0 for value in found["parts_s"].values())


@pytest.mark.parametrize(
    ("package", "files"), [("albumentations", "AlbumentationsFiles"), ("kornia_rs", "KorniaFiles")]
)
def test_another_loader_reads_the_same_pixels(package, files, tmp_path, monkeypatch):
    pytest.importorskip(package)
    monkeypatch.setattr(loaders, "CROP", streamed.SIDE)  # the crop is the whole image
    streamed.draw_files(tmp_path, 4)
    paths = sorted((tmp_path / "train").rglob("*.jpg"))
    read = getattr(loaders, files)(tmp_path)
    for number, path in enumerate(paths):
        image, label = read[number]
        pixels = torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1).float()
        found = image.float() * (255 if image.is_floating_point() else 1)
        assert label == number // 2
        assert (
            min(float((pixels - one).abs().mean()) for one in (found, found.flip(2))) < 1.5
        )  # decoders round differently


def test_the_loaders_are_compared(monkeypatch):
    monkeypatch.setattr(loaders, "OTHERS", {})
    for module in (loaders, streamed):
        monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(loaders, "draw_files", lambda folder, count: streamed.draw_files(folder, 8))
    found = loaders.run(repeats=1, count=8)
    assert found["sanm_lightning"]["images_per_s"] > 0
    assert found["torchvision"].keys() == {"images_per_s", "ratio"}
