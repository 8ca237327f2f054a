"""The slow sides of the benchmarks do what the fast ones do."""

import numpy as np
import pytest
import torch

from benchmarks import step
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
