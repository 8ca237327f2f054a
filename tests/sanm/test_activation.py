"""Where the network looks: Eq. 1, against a loop over single pixels."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sanm_lightning.sanm import class_activation_map, energy_map
from sanm_lightning.sanm.activation import (
    classifier_weight,
    feature_map,
    gradient_activation_map,
    is_pooled_linear,
    upsample,
)

quick = settings(max_examples=25, deadline=None)
sizes = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 6))
seeds = st.integers(0, 2**31)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(size: int, classes: int, seed: int = 0) -> Tensor:
    return torch.randint(classes, (size,), generator=torch.Generator().manual_seed(seed))


def slow_map(features: Tensor, weight: Tensor, label: Tensor) -> Tensor:
    """Eq. 1, one image, one place, one channel at a time: A(m, n) = sum over d of w(class, d) F(d, m, n)."""
    batch, channels, height, width = features.shape
    out = torch.zeros(batch, height, width, dtype=torch.float64)
    for i in range(batch):
        for m in range(height):
            for n in range(width):
                total = 0.0
                for d in range(channels):
                    total += float(weight[int(label[i]), d]) * float(features[i, d, m, n])
                out[i, m, n] = total
    return out


def slow_upsample(activation: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear with half-pixel centres, one pixel at a time; beyond the outermost centres the edge goes on."""
    batch, height, width = activation.shape
    out = torch.zeros(batch, *size, dtype=torch.float64)
    for i in range(batch):
        for m in range(size[0]):
            for n in range(size[1]):
                y = min(max((m + 0.5) * height / size[0] - 0.5, 0.0), height - 1.0)
                x = min(max((n + 0.5) * width / size[1] - 0.5, 0.0), width - 1.0)
                top, left = int(y), int(x)
                below, right = min(top + 1, height - 1), min(left + 1, width - 1)
                dy, dx = y - top, x - left
                out[i, m, n] = (
                    (1 - dy) * (1 - dx) * activation[i, top, left]
                    + (1 - dy) * dx * activation[i, top, right]
                    + dy * (1 - dx) * activation[i, below, left]
                    + dy * dx * activation[i, below, right]
                )
    return out


class TestClassActivationMap:
    @quick
    @given(sizes, seeds)
    def test_matches_the_loop_over_eq_1(self, size: tuple[int, ...], seed: int) -> None:
        batch, channels, height, width, classes = size
        features, weight = random(batch, channels, height, width, seed=seed), random(classes, channels, seed=seed + 1)
        asked = labels(batch, classes, seed)
        out = class_activation_map(features, weight, asked)
        torch.testing.assert_close(out.double(), slow_map(features, weight, asked), rtol=1e-4, atol=1e-5)

    def test_its_mean_is_the_logit_of_the_class_without_the_bias(self) -> None:
        features, head = random(5, 7, 3, 2), nn.Linear(7, 4, bias=False)
        asked = labels(5, 4)
        logits = head(features.mean(dim=(2, 3)))
        out = class_activation_map(features, head.weight, asked)
        torch.testing.assert_close(out.mean(dim=(1, 2)), logits.gather(1, asked[:, None]).squeeze(1))

    def test_may_be_negative(self) -> None:
        assert class_activation_map(torch.ones(1, 2, 1, 1), -torch.ones(1, 2), torch.tensor([0])).item() == -2

    def test_serves_an_empty_batch(self) -> None:
        assert class_activation_map(random(0, 3, 2, 2), random(4, 3), torch.zeros(0, dtype=torch.long)).shape == (
            0,
            2,
            2,
        )

    def test_leaves_its_inputs_alone(self) -> None:
        inputs = random(2, 3, 2, 2), random(4, 3), labels(2, 4)
        before = [tensor.clone() for tensor in inputs]
        class_activation_map(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))

    @pytest.mark.parametrize(
        ("given_dtype", "returned"),
        [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
    )
    def test_returns_at_least_float32(self, given_dtype: torch.dtype, returned: torch.dtype) -> None:
        out = class_activation_map(random(2, 3, 2, 2).to(given_dtype), random(4, 3).to(given_dtype), labels(2, 4))
        assert out.dtype == returned

    def test_takes_features_of_another_precision_than_the_weight(self) -> None:
        features, weight, asked = random(2, 3, 2, 2).bfloat16(), random(4, 3), labels(2, 4)
        torch.testing.assert_close(
            class_activation_map(features, weight, asked), slow_map(features, weight, asked).float()
        )

    def test_is_not_rounded_by_autocast(self) -> None:
        inputs = random(2, 16, 4, 4), random(4, 16), labels(2, 4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = class_activation_map(*inputs)
        assert torch.equal(inside, class_activation_map(*inputs))

    @pytest.mark.parametrize(
        ("features", "weight", "classes"),
        [
            ((2, 3, 4), (5, 3), (2,)),
            ((2, 3, 4, 4), (5, 4), (2,)),
            ((2, 3, 4, 4), (3,), (2,)),
            ((2, 3, 4, 4), (5, 3), (3,)),
            ((2, 3, 4, 4), (5, 3), (2, 1)),
            ((2, 3, 4, 4), (5, 3), ()),
        ],
    )
    def test_refuses_shapes_that_do_not_fit(
        self, features: tuple[int, ...], weight: tuple[int, ...], classes: tuple[int, ...]
    ) -> None:
        with pytest.raises(ValueError, match=r"expected features \(B, D, h, w\), weight \(C, D\).*got"):
            class_activation_map(torch.ones(features), torch.ones(weight), torch.zeros(classes, dtype=torch.long))

    @pytest.mark.parametrize("wrong", [-1, 4])
    def test_refuses_a_class_that_does_not_exist(self, wrong: int) -> None:
        with pytest.raises(ValueError, match=rf"expected classes in \[0, 4\), got {min(wrong, 0)} to {max(wrong, 0)}"):
            class_activation_map(random(2, 3, 2, 2), random(4, 3), torch.tensor([0, wrong]))

    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
    def test_refuses_classes_that_would_not_index(self, dtype: torch.dtype) -> None:
        with pytest.raises(ValueError, match=r"classes.*int64.*got"):
            class_activation_map(random(2, 3, 2, 2), random(2, 3), torch.ones(2, dtype=dtype))


def slow_gradient_map(features: Tensor, gradient: Tensor) -> Tensor:
    """Grad-CAM with a sum over positions, one image, one channel, one place at a time."""
    batch, channels, height, width = features.shape
    out = torch.zeros(batch, height, width, dtype=torch.float64)
    for i in range(batch):
        for d in range(channels):
            weight = sum(float(gradient[i, d, m, n]) for m in range(height) for n in range(width))
            for m in range(height):
                for n in range(width):
                    out[i, m, n] += weight * float(features[i, d, m, n])
    return out


class TestGradientActivationMap:
    @quick
    @given(sizes, seeds)
    def test_matches_the_loop(self, size: tuple[int, ...], seed: int) -> None:
        shape = size[:4]
        features, gradient = random(*shape, seed=seed), random(*shape, seed=seed + 1)
        out = gradient_activation_map(features, gradient)
        torch.testing.assert_close(out.double(), slow_gradient_map(features, gradient), rtol=1e-4, atol=1e-5)

    def test_of_a_linear_classifier_on_the_average_is_the_class_activation_map(self) -> None:
        features, head, asked = random(5, 7, 3, 2).requires_grad_(), nn.Linear(7, 4), labels(5, 4)
        head(features.mean(dim=(2, 3))).gather(1, asked[:, None]).sum().backward()
        assert features.grad is not None
        out = gradient_activation_map(features.detach(), features.grad)
        torch.testing.assert_close(out, class_activation_map(features.detach(), head.weight.detach(), asked))

    def test_returns_at_least_float32_and_is_not_rounded_by_autocast(self) -> None:
        features, gradient = random(2, 16, 4, 4).bfloat16(), random(2, 16, 4, 4, seed=1).bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = gradient_activation_map(features, gradient)
        assert torch.equal(inside, gradient_activation_map(features.float(), gradient.float()))

    @pytest.mark.parametrize(("features", "gradient"), [((2, 3, 4), (2, 3, 4)), ((2, 3, 4, 4), (2, 3, 4, 5))])
    def test_refuses_shapes_that_do_not_fit(self, features: tuple[int, ...], gradient: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"expected features and gradient \(B, D, h, w\), got"):
            gradient_activation_map(torch.ones(features), torch.ones(gradient))


class TestEnergyMap:
    def test_matches_the_loop(self) -> None:
        features = random(2, 3, 2, 4)
        slow = torch.zeros(2, 2, 4)
        for i in range(2):
            for m in range(2):
                for n in range(4):
                    slow[i, m, n] = sum(float(features[i, d, m, n]) ** 2 for d in range(3))
        torch.testing.assert_close(energy_map(features), slow)

    @quick
    @given(seeds)
    def test_knows_no_sign(self, seed: int) -> None:
        features = random(2, 3, 2, 2, seed=seed)
        assert torch.equal(energy_map(features), energy_map(-features))
        assert (energy_map(features) >= 0).all()

    @pytest.mark.parametrize(
        ("given_dtype", "returned"),
        [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
    )
    def test_returns_at_least_float32(self, given_dtype: torch.dtype, returned: torch.dtype) -> None:
        assert energy_map(random(1, 2, 3, 3).to(given_dtype)).dtype == returned

    def test_refuses_tokens(self) -> None:
        with pytest.raises(ValueError, match=r"expected features \(B, D, h, w\), got \(2, 16, 8\)"):
            energy_map(torch.ones(2, 16, 8))


class TestUpsample:
    @pytest.mark.parametrize("size", [(4, 4), (7, 5), (8, 12)])
    def test_matches_the_loop_with_half_pixel_centres(self, size: tuple[int, int]) -> None:
        activation = random(2, 4, 3)
        torch.testing.assert_close(
            upsample(activation, size).double(), slow_upsample(activation, size), rtol=1e-4, atol=1e-5
        )

    def test_to_the_same_size_changes_no_bit(self) -> None:
        activation = random(3, 5, 6)
        assert torch.equal(upsample(activation, (5, 6)), activation)

    def test_of_a_flat_map_is_flat(self) -> None:
        torch.testing.assert_close(upsample(torch.full((1, 2, 2), 3.0), (6, 8)), torch.full((1, 6, 8), 3.0))

    def test_refuses_a_map_with_channels(self) -> None:
        with pytest.raises(ValueError, match=r"expected activation maps \(B, h, w\), got \(2, 1, 4, 4\)"):
            upsample(torch.ones(2, 1, 4, 4), (8, 8))


class TestFeatureMap:
    def test_returns_a_channels_first_map_as_it_is(self) -> None:
        features = random(2, 8, 4, 3)
        assert feature_map(features, 8) is features

    def test_turns_a_channels_last_map(self) -> None:
        features = random(2, 4, 3, 8)
        out = feature_map(features, 8)
        assert out.shape == (2, 8, 4, 3)
        assert out[1, 5, 2, 0] == features[1, 2, 0, 5]

    @pytest.mark.parametrize(
        ("tokens", "image_size", "grid"),
        [
            (16, (32, 32), (4, 4)),
            (17, (32, 32), (4, 4)),
            (20, (32, 32), (4, 4)),
            (12 + 1, (24, 32), (3, 4)),
            (197, (224, 224), (14, 14)),
        ],
    )
    def test_reshapes_patches_row_by_row_and_leaves_out_the_tokens_before_them(
        self, tokens: int, image_size: tuple[int, int], grid: tuple[int, int]
    ) -> None:
        features = random(2, tokens, 8)
        out = feature_map(features, 8, image_size)
        assert out.shape == (2, 8, *grid)
        first = tokens - grid[0] * grid[1]
        for row in range(grid[0]):
            for column in range(grid[1]):
                assert torch.equal(out[:, :, row, column], features[:, first + row * grid[1] + column])

    @pytest.mark.parametrize(
        ("shape", "image_size"),
        [
            ((2, 16, 8), None),
            ((2, 8), (32, 32)),
            ((2, 4, 4, 4), (32, 32)),
            ((2, 16, 4), (32, 32)),
            ((2, 64 - 15, 8), (32, 32)),  # 16 patches and 33 other tokens
        ],
    )
    def test_refuses_what_holds_no_map(self, shape: tuple[int, ...], image_size: Any) -> None:
        with pytest.raises(ValueError, match=r"expected a feature map \(B, 8, h, w\).*got .*layer= \(sanm_layer="):
            feature_map(torch.ones(shape), 8, image_size)


class Ending:
    """The last layer of a network, by timm's convention."""

    def __init__(self, classifier: nn.Module) -> None:
        self.classifier = classifier

    def get_classifier(self) -> nn.Module:
        return self.classifier


class TestClassifierWeight:
    def test_is_the_weight_of_a_linear_layer(self) -> None:
        head = nn.Linear(8, 3)
        assert torch.equal(classifier_weight(Ending(head), 8), head.weight)  # type: ignore[arg-type]

    def test_takes_a_one_by_one_convolution_for_a_linear_layer(self) -> None:
        head = nn.Conv2d(8, 3, 1)
        assert torch.equal(classifier_weight(Ending(head), 8), head.weight[:, :, 0, 0])  # type: ignore[arg-type]

    @pytest.mark.parametrize("head", [nn.Linear(16, 3), nn.Identity(), nn.Sequential(nn.Linear(8, 3))])
    def test_refuses_a_head_that_is_not_one_linear_layer_on_the_map(self, head: nn.Module) -> None:
        with pytest.raises(
            ValueError,
            match=r"(?s)one linear classifier on the 8 pooled features of Ending .*, got .*one linear layer after",
        ):
            classifier_weight(Ending(head), 8)  # type: ignore[arg-type]


class TestIsPooledLinear:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("scale", [1.0, 1e-4])
    def test_of_one_linear_layer_on_the_average(self, dtype: torch.dtype, scale: float) -> None:
        head, features = nn.Linear(64, 3).to(dtype), random(4, 64, 3, 3).to(dtype) * scale
        logits = head(features.mean((2, 3)))
        assert is_pooled_linear(Ending(head), features, logits)  # type: ignore[arg-type]

    @pytest.mark.parametrize(("scale", "dtype"), [(1.0, torch.float32), (1e-4, torch.float32), (1.0, torch.bfloat16)])
    @pytest.mark.parametrize("pool", ["norm", "max", "relu"])
    def test_not_of_another_head_of_the_same_sizes(self, pool: str, scale: float, dtype: torch.dtype) -> None:
        head, features = nn.Linear(64, 3).to(dtype), random(4, 64, 3, 3).to(dtype) * scale
        averaged = features.mean((2, 3))
        pooled = {
            "norm": nn.functional.layer_norm(averaged, (64,)),
            "max": features.amax((2, 3)),
            "relu": features.relu().mean((2, 3)),
        }[pool]
        assert not is_pooled_linear(Ending(head), features, head(pooled))  # type: ignore[arg-type]
