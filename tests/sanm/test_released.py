"""The switches of SANM's released code: corner boxes, two copies, half the area, another spread. Defaults are the paper's."""

import math
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sanm_lightning.models import create_network
from sanm_lightning.sanm import SANM, apply_mask, mask_box, reconstruction_loss, regularize_labels
from sanm_lightning.sanm.activation import quantize
from sanm_lightning.sanm.masking import inside_box, masked_fraction
from sanm_lightning.sanm.normalization import Normalization
from tests.methods.toy import data, method, trainer
from tests.sanm.test_module import batch, built

RELEASED = {
    "mu": 0.03, "beta": 0.04, "place": "energy", "ratio": "affine", "ratio_range": (0.02, 0.07), "fill": "channel",
    "anchor": "corner", "regions": "peak_and_trough", "area": 0.5, "spread": "others", "map_levels": 256,
}  # fmt: skip


class TestCornerBox:
    @given(
        st.integers(2, 12),
        st.integers(2, 12),
        st.floats(0, 1, width=32),
        st.floats(0.5, 2, width=32),
        st.integers(0, 99),
    )
    def test_against_a_loop(self, height, width, ratio, aspect, seed):
        activation = torch.rand(1, height, width, generator=torch.Generator().manual_seed(seed))
        box = mask_box(activation, torch.tensor([ratio]), torch.tensor([aspect]), anchor="corner")
        row, column = divmod(int(activation.flatten().argmax()), width)
        sides = (math.sqrt(height * width * ratio * aspect), math.sqrt(height * width * ratio / aspect))
        if min(abs(side % 1 - 0.5) for side in sides) < 1e-3:
            return  # rounding to either side is right
        rows, columns = min(height, round(sides[0])), min(width, round(sides[1]))
        top, left = min(row, height - rows), min(column, width - columns)
        expected = torch.zeros(height, width, dtype=torch.bool)
        if rows and columns:
            expected[top : top + rows, left : left + columns] = True
        assert torch.equal(inside_box(box, (height, width))[0, 0], expected)
        up, down, across, right = box[0].tolist()
        assert up >= 0
        assert across >= 0
        assert down <= height
        assert right <= width

    def test_the_area_is_kept_at_the_border(self):
        activation = torch.zeros(1, 16, 16)
        activation[0, 15, 15] = 1
        box = mask_box(activation, torch.tensor([0.25]), torch.ones(1), anchor="corner")
        assert float(masked_fraction(box, (16, 16))) == 0.25
        assert float(masked_fraction(mask_box(activation, torch.tensor([0.25]), torch.ones(1)), (16, 16))) < 0.25

    def test_another_word_is_refused(self):
        with pytest.raises(ValueError, match="anchor 'center', 'corner' or 'inside', got 'middle'"):
            mask_box(torch.rand(1, 4, 4), torch.ones(1), torch.ones(1), anchor="middle")


class TestSpread:
    @given(st.lists(st.floats(0.0625, 1, width=32), min_size=2, max_size=6), st.floats(0, 1, width=32))
    def test_to_the_others_against_a_loop(self, weights, ratio):
        p = [weight / sum(weights) for weight in weights]
        top = max(range(len(p)), key=lambda j: (p[j], -j))
        moved = min(ratio, p[top])
        expected = [q - moved if j == top else q + moved / (len(p) - 1) for j, q in enumerate(p)]
        got = regularize_labels(torch.tensor([p]), torch.tensor([ratio]), spread="others")[0]
        if sorted(p)[-1] - sorted(p)[-2] > 1e-6:
            assert got.tolist() == pytest.approx(expected, abs=1e-5)
        assert float(got.sum()) == pytest.approx(1, abs=1e-5)
        assert float(got.min()) >= -1e-6

    def test_is_the_papers_with_another_ratio(self):
        targets = F.one_hot(torch.tensor([1, 3]), 5).float()
        ratio = torch.tensor([0.1, 0.4])
        (
            torch.testing.assert_close(
                regularize_labels(targets, ratio * 0.8, spread="others"), regularize_labels(targets, ratio)
            ),
            "r (C - 1) / C",
        )

    def test_another_word_is_refused(self):
        with pytest.raises(ValueError, match="spread 'all', 'others' or 'smoothing'"):
            regularize_labels(torch.rand(1, 3), torch.ones(1), spread="few")


class TestTwoCopies:
    def test_one_at_the_maximum_and_one_at_the_minimum_with_the_same_targets(self):
        sanm, net = built(**RELEASED, seed=0)
        images, targets, quality = batch()
        views = sanm(net, images, targets, quality)
        assert views.images.shape == (12, *images.shape[1:])
        assert torch.equal(views.targets[:6], views.targets[6:])
        assert views.box.shape == (12, 4)
        maps = views.activation
        area = views.ratio * 0.5 * images.shape[2] * images.shape[3]
        for number, extreme in enumerate((maps, -maps)):
            for i in range(6):
                hidden = inside_box(views.box[6 * number + i][None], tuple(images.shape[2:]))[0, 0]
                row, column = divmod(int(extreme[i].flatten().argmax()), images.shape[3])
                if hidden.any():
                    assert hidden[row, column], "the extreme is in the box"
                assert int(hidden.sum()) <= float(area[i]) + 2 * float(area[i]) ** 0.5 + 1
                changed = (views.images[6 * number + i] != images[i]).any(0)
                assert torch.equal(changed, hidden)

    def test_fills_are_drawn_for_each_copy(self):
        sanm, net = built(**{**RELEASED, "ratio": "fixed", "mu": 0.5, "area": 1.0, "ratio_range": None}, seed=0)
        images, targets, quality = batch()
        views = sanm(net, images, targets, quality)
        fills = [
            view[:, inside_box(box[None], tuple(images.shape[2:]))[0, 0]][:, 0]
            for view, box in zip(views.images, views.box, strict=True)
        ]
        assert len({tuple(fill.tolist()) for fill in fills}) == 12

    def test_the_reconstruction_is_the_mean_over_copies(self):
        sanm, net = built(**RELEASED, seed=0)
        images, targets, quality = batch()
        views = sanm(net, images, targets, quality)
        features = net.forward_features(views.images)
        painted = sanm.decoder(features)
        parts = [reconstruction_loss(painted[:6], images), reconstruction_loss(painted[6:], images)]
        torch.testing.assert_close(sanm.reconstruction(features, images), 0.04 * (parts[0] + parts[1]) / 2)

    def test_beside_the_unmasked_images(self):
        sanm, net = built(**RELEASED, keep_unmasked=True, seed=0)
        images, targets, quality = batch()
        views = sanm(net, images, targets, quality)
        assert len(views.images) == len(views.targets) == 18
        assert torch.equal(views.images[:6], images)
        assert torch.equal(views.targets[:6], targets)
        assert views.rows(torch.tensor([1, 4]), 6).tolist() == [1, 4, 7, 10, 13, 16]
        features = net.forward_features(views.images)
        painted = sanm.decoder(features[6:])
        expected = 0.04 * reconstruction_loss(painted, images.repeat(2, 1, 1, 1))
        torch.testing.assert_close(sanm.reconstruction(features, images), expected)

    def test_a_training_under_the_whole_preset(self):
        module = method(SANM(**RELEASED, seed=0), warmup_epochs=0)
        run = trainer(2)
        run.fit(module, data())
        assert 0 < run.callback_metrics["train/masked_fraction"] < 0.1


class TestNormalizedScale:
    """Fill and reconstruction are made in the scale of the images that the network receives."""

    MEAN, STD = (0.3, 0.5, 0.6), (0.2, 0.25, 0.1)

    def views(self, fill: str = "pixel") -> tuple[SANM, Any, Tensor, Any]:
        torch.manual_seed(0)
        network = create_network("small_cnn", 4, self.MEAN, self.STD, width=4).eval()
        sanm = SANM(mu=0.6, ratio="fixed", beta=0.5, fill=fill, scale="normalized", seed=0)
        images = torch.rand(8, 3, 32, 32)
        sanm.build(network, (32, 32))
        return sanm, network, images, sanm(network, images, torch.eye(4).repeat(2, 1), torch.zeros(8))

    def test_the_fill_is_uniform_in_normalized_units(self):
        """As if U(0, 1) were written into the normalized images: its mean is mean + std / 2 for images in [0, 1]."""
        _, _, images, views = self.views()
        hidden = inside_box(views.box, (32, 32)).expand_as(images)
        for channel, (mean, std) in enumerate(zip(self.MEAN, self.STD, strict=True)):
            inside = (views.images[:, channel][hidden[:, channel]] - mean) / std
            assert float(inside.min()) >= 0
            assert float(inside.max()) <= 1
            assert float(inside.mean()) == pytest.approx(0.5, abs=0.02)
        assert torch.equal(views.images[~hidden], images[~hidden])

    def test_the_reconstruction_is_that_of_normalized_images(self):
        sanm, network, images, views = self.views()
        features = network.forward_features(views.images)
        mean, std = (torch.tensor(part).view(3, 1, 1) for part in (self.MEAN, self.STD))
        expected = 0.5 * (sanm.decoder(features) - (images - mean) / std).square().mean()
        torch.testing.assert_close(sanm.reconstruction(features, images, views), expected)
        torch.testing.assert_close(sanm.rebuild(features, (32, 32)), sanm.decoder(features) * std + mean)

    def test_of_images_that_the_data_normalize_nothing_is_converted(self):
        """A module with normalized images: U(0, 1) is written into them, and they are the target as they are."""
        net = built(seed=0)[1]
        images, targets, quality = batch()
        sanm = SANM(mu=0.6, ratio="fixed", scale="normalized", seed=0)
        sanm.normalization = Normalization(self.MEAN, self.STD)
        sanm.build(net, tuple(images.shape[2:]))
        images = sanm.normalization.normalize(images)
        views = sanm(net, images, targets, quality)
        hidden = inside_box(views.box, tuple(images.shape[2:])).expand_as(images)
        assert 0 <= float(views.images[hidden].min()) <= float(views.images[hidden].max()) <= 1
        features = net.forward_features(views.images)
        expected = sanm.beta * reconstruction_loss(sanm.decoder(features), images)
        torch.testing.assert_close(sanm.reconstruction(features, images, views), expected)

    def test_a_network_without_statistics_is_refused(self):
        network = timm.create_model("small_cnn", num_classes=4, width=4)
        with pytest.raises(
            ValueError, match="network with mean and std for scale: normalized, got SmallCNN without them"
        ):
            SANM(scale="normalized").build(network, (32, 32))


class TestMapLevels:
    @given(st.integers(0, 2**32), st.sampled_from([2, 16, 256]))
    def test_against_a_loop(self, seed, levels):
        maps = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(seed)).double()
        for one, found in zip(maps, quantize(maps, levels), strict=True):
            low, high = float(one.min()), float(one.max())
            for value, level in zip(one.flatten().tolist(), found.flatten().tolist(), strict=True):
                assert level == math.floor((value - low) / (high - low) * (levels - 1))

    def test_a_constant_map_is_the_lowest_level(self):
        assert torch.equal(quantize(torch.full((2, 3, 3), 7.0), 256), torch.zeros(2, 3, 3))

    def test_the_first_of_the_tied_extremes_is_masked(self):
        """With two levels nearly all pixels are tied at the minimum: its box has its corner at the first one."""
        sanm, net = built(**{**RELEASED, "map_levels": 2, "ratio": "fixed", "mu": 0.2, "ratio_range": None}, seed=0)
        images, targets, quality = batch()
        views = sanm(net, images, targets, quality)
        fine, _ = built(**{**RELEASED, "map_levels": None, "ratio": "fixed", "mu": 0.2, "ratio_range": None}, seed=0)
        whole = fine(net, images, targets, quality).activation
        for i in range(6):
            levels = quantize(whole[i][None], 2)[0].flatten().tolist()
            height, width = images.shape[2:]
            for number, value in ((0, 1.0), (1, 0.0)):
                row, column = divmod(levels.index(value), width)
                up, down, left, right = views.box[6 * number + i].tolist()
                assert abs(up - min(row, height - (down - up))) <= 0.5, "moved inside at the border"
                assert abs(left - min(column, width - (right - left))) <= 0.5


def test_the_defaults_are_the_papers():
    sanm, net = built(seed=0)
    other, _ = built(seed=0, anchor="center", regions="peak", area=1.0, spread="all", scale="unit", map_levels=None)
    images, targets, quality = batch()
    for one, two in zip(sanm(net, images, targets, quality), other(net, images, targets, quality), strict=True):
        assert torch.equal(one, two)
    assert apply_mask(images, torch.zeros(6, 4)).shape == images.shape


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"anchor": "middle"}, "anchor 'center', 'corner' or 'inside'"),
        ({"regions": "all"}, "regions 'peak' or 'peak_and_trough'"),
        ({"area": 0.0}, r"area in \(0, 1\], got 0.0"),
        ({"spread": "none"}, "spread 'all', 'others' or 'smoothing'"),
        ({"scale": "bytes"}, "scale 'unit' or 'normalized', got 'bytes'"),
        ({"map_levels": 1}, "map_levels >= 2 or null, got 1"),
    ],
)
def test_wrong_arguments(option, message):
    with pytest.raises(ValueError, match=message):
        SANM(**option)
