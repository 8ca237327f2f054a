"""How much is hidden, where and with what: Eq. 2 to 5, against loops over single images and pixels."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sanm_lightning.sanm import apply_mask, mask_box, mask_ratio
from sanm_lightning.sanm.masking import (
    affine_ratio,
    fixed_ratio,
    inside_box,
    masked_fraction,
    random_ratio,
    two_level_ratio,
)

quick = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**31)
shares = st.floats(0, 1, width=32)
aspects = st.floats(0.25, 4, width=32)
meta = torch.device("meta")  # any look at a value raises there


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=generator(seed))


def peak(row: int, column: int, size: tuple[int, int]) -> Tensor:
    activation = torch.zeros(1, *size)
    activation[0, row, column] = 1
    return activation


def slow_box(activation: list[list[float]], ratio: float, aspect: float) -> list[float]:
    """Eq. 4 for one image, in Python's own float64."""
    height, width = len(activation), len(activation[0])
    row = column = 0
    for m in range(height):
        for n in range(width):
            if activation[m][n] > activation[row][column]:
                row, column = m, n
    half_height = math.sqrt(height * width * ratio * aspect / 4)
    half_width = math.sqrt(height * width * ratio / (4 * aspect))
    return [
        max(row - half_height, 0),
        min(row + half_height, height),
        max(column - half_width, 0),
        min(column + half_width, width),
    ]


def slow_inside(box: list[float], m: int, n: int) -> bool:
    """Eq. 5: whether the pixel (m, n) is filled; a box without area fills none."""
    up, down, left, right = box
    return up <= m <= down and left <= n <= right and (down - up) * (right - left) > 0


class TestMaskRatio:
    @quick
    @given(st.lists(shares, max_size=8), shares)
    def test_matches_the_loop_over_eq_2(self, quality: list[float], mu: float) -> None:
        out = mask_ratio(torch.tensor(quality), mu)
        torch.testing.assert_close(out, torch.tensor([mu * (1 - g) for g in quality]), rtol=1e-5, atol=1e-6)
        assert ((out >= 0) & (out <= torch.tensor(mu))).all()

    @quick
    @given(shares, shares, shares)
    def test_hides_no_less_the_less_a_label_is_trusted(self, one: float, other: float, mu: float) -> None:
        less, more = mask_ratio(torch.tensor(sorted([one, other])), mu)
        assert less >= more

    def test_hides_nothing_of_a_trusted_image_and_mu_of_a_distrusted_one(self) -> None:
        assert torch.equal(mask_ratio(torch.tensor([1.0, 0.0]), 0.3), torch.tensor([0.0, 0.3]))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_keeps_the_precision_and_the_input(self, dtype: torch.dtype) -> None:
        quality = uniform(5).to(dtype)
        before = quality.clone()
        assert mask_ratio(quality, 0.3).dtype == dtype
        assert torch.equal(quality, before)


class TestTheOtherRatios:
    def test_fixed_hides_mu_of_every_image(self) -> None:
        assert torch.equal(fixed_ratio(uniform(6), 0.3), torch.full((6,), 0.3))

    @quick
    @given(shares, shares, seeds)
    def test_random_lies_in_its_range(self, one: float, other: float, seed: int) -> None:
        low, high = sorted([one, other])
        out = random_ratio(torch.ones(50), low, high, generator(seed))
        assert ((out >= low - 1e-6) & (out <= min(high + 1e-6, 1))).all()

    def test_random_fills_its_range_whatever_the_label(self) -> None:
        out = random_ratio(torch.ones(2_000), 0.2, 0.4, generator())
        assert out.min() < 0.21
        assert out.max() > 0.39
        assert torch.equal(out, random_ratio(torch.zeros(2_000), 0.2, 0.4, generator()))

    def test_two_level_parts_the_labels_at_one_half(self) -> None:
        out = two_level_ratio(torch.tensor([0.0, 0.49, 0.5, 1.0]), clean=0.2, noisy=0.3)
        assert torch.equal(out, torch.tensor([0.3, 0.3, 0.2, 0.2]))

    def test_affine_is_a_drawn_offset_plus_the_papers_ratio(self) -> None:
        quality = uniform(20)
        out = affine_ratio(quality, 0.03, 0.02, 0.07, generator(3))
        assert torch.equal(out, random_ratio(quality, 0.02, 0.07, generator(3)) + mask_ratio(quality, 0.03))

    def test_affine_never_asks_for_more_than_the_image(self) -> None:
        assert torch.equal(affine_ratio(torch.zeros(4), 1.0, 0.5, 0.9), torch.ones(4))

    @pytest.mark.parametrize("draw", [random_ratio, affine_ratio])
    def test_one_seed_gives_one_draw(self, draw: object) -> None:
        options = (0.1, 0.2) if draw is random_ratio else (0.3, 0.1, 0.2)
        one, same, other = (draw(torch.ones(9), *options, generator(s)) for s in (1, 1, 2))  # type: ignore[operator]
        assert torch.equal(one, same)
        assert not torch.equal(one, other)

    def test_the_mask_ratio_is_the_affine_one_without_offset(self) -> None:
        quality = uniform(20)
        assert torch.equal(affine_ratio(quality, 0.3, 0.0, 0.0), mask_ratio(quality, 0.3))


every_ratio = pytest.mark.parametrize(
    ("ratio", "options"),
    [
        (mask_ratio, {"mu": 0.3}),
        (fixed_ratio, {"mu": 0.3}),
        (random_ratio, {"low": 0.1, "high": 0.2}),
        (two_level_ratio, {"clean": 0.1, "noisy": 0.2}),
        (affine_ratio, {"mu": 0.3, "low": 0.1, "high": 0.2}),
    ],
)


@every_ratio
class TestEveryRatio:
    def test_refuses_a_quality_that_is_not_one_number_per_image(self, ratio: object, options: dict[str, float]) -> None:
        for shape in ((), (2, 1), (2, 3)):
            with pytest.raises(ValueError, match=r"expected label quality \(B,\), got shape"):
                ratio(torch.ones(shape), **options)  # type: ignore[operator]

    @pytest.mark.parametrize("wrong", [-0.1, 1.5, float("nan"), float("inf")])
    def test_refuses_a_quality_that_is_no_probability(
        self, ratio: object, options: dict[str, float], wrong: float
    ) -> None:
        with pytest.raises(ValueError, match=r"expected label quality in \[0, 1\], got"):
            ratio(torch.tensor([0.5, wrong]), **options)  # type: ignore[operator]

    @pytest.mark.parametrize("wrong", [-0.1, 1.5, float("nan")])
    def test_refuses_numbers_that_are_no_shares(self, ratio: object, options: dict[str, float], wrong: float) -> None:
        for name in options:
            for device in ("cpu", "meta"):
                with pytest.raises(ValueError, match=rf"expected {name} in \[0, 1\], got {wrong}"):
                    ratio(torch.ones(2, device=device), **{**options, name: wrong})  # type: ignore[operator]

    def test_looks_at_values_on_the_cpu_only(self, ratio: object, options: dict[str, float]) -> None:
        assert ratio(torch.ones(2, device=meta), **options).shape == (2,)  # type: ignore[operator]

    def test_serves_an_empty_batch(self, ratio: object, options: dict[str, float]) -> None:
        assert ratio(torch.ones(0), **options).shape == (0,)  # type: ignore[operator]


class TestMaskBox:
    @quick
    @given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), seeds)
    def test_matches_the_loop_over_eq_4(self, batch: int, height: int, width: int, seed: int) -> None:
        activation, ratio = uniform(batch, height, width, seed=seed) - 0.5, uniform(batch, seed=seed + 1)
        aspect = 0.5 + 1.5 * uniform(batch, seed=seed + 2)
        slow = [slow_box(a.tolist(), float(r), float(d)) for a, r, d in zip(activation, ratio, aspect, strict=True)]
        torch.testing.assert_close(mask_box(activation, ratio, aspect), torch.tensor(slow), rtol=1e-5, atol=1e-4)

    @quick
    @given(st.integers(1, 40), st.integers(1, 40), shares, aspects, seeds)
    def test_never_leaves_the_image(self, height: int, width: int, ratio: float, aspect: float, seed: int) -> None:
        box = mask_box(uniform(1, height, width, seed=seed), torch.tensor([ratio]), torch.tensor([aspect]))
        up, down, left, right = box[0].tolist()
        assert 0 <= up <= down <= height
        assert 0 <= left <= right <= width

    @quick
    @given(st.integers(2, 40), st.integers(2, 40), st.floats(0.01, 0.99), aspects)
    def test_away_from_the_border_has_the_asked_area_and_aspect(
        self, height: int, width: int, share: float, aspect: float
    ) -> None:
        """Ratios up to the box about the centre that just touches the border."""
        touches = min((2 * (height // 2)) ** 2 / aspect, (2 * (width // 2)) ** 2 * aspect)
        ratio = share * min(1.0, touches / (height * width))
        activation = peak(height // 2, width // 2, (height, width))
        up, down, left, right = mask_box(activation, torch.tensor([ratio]), torch.tensor([aspect]))[0].tolist()
        assert (down - up) * (right - left) == pytest.approx(height * width * ratio, rel=1e-3)
        assert (down - up) / (right - left) == pytest.approx(aspect, rel=1e-3)

    def test_is_centred_on_the_maximum(self) -> None:
        box = mask_box(peak(5, 3, (16, 8)), torch.tensor([4 / 128]), torch.tensor([1.0]))
        assert torch.equal(box, torch.tensor([[4.0, 6.0, 2.0, 4.0]]))

    def test_an_aspect_above_one_is_taller_than_wide(self) -> None:
        box = mask_box(peak(8, 8, (16, 16)), torch.tensor([16 / 256]), torch.tensor([4.0]))
        assert torch.equal(box, torch.tensor([[4.0, 12.0, 7.0, 9.0]]))

    def test_of_equal_maxima_takes_the_first_in_reading_order(self) -> None:
        activation = torch.zeros(3, 4, 5)
        activation[1, 2, 3] = activation[1, 2, 4] = activation[1, 3, 0] = 1
        activation[2, 1, 4] = activation[2, 2, 0] = 1
        box = mask_box(activation, torch.full((3,), 0.01), torch.ones(3))
        centres = torch.stack([box[:, :2].mean(1), box[:, 2:].mean(1)], 1)[1:]  # the first touches the border
        torch.testing.assert_close(centres, torch.tensor([[2.0, 3.0], [1.0, 4.0]]))
        assert torch.equal(box[0, [0, 2]], torch.zeros(2))

    def test_is_clipped_on_each_side(self) -> None:
        for row, column, expected in ((0, 0, [0, 2, 0, 2]), (7, 7, [5, 8, 5, 8])):
            box = mask_box(peak(row, column, (8, 8)), torch.tensor([16 / 64]), torch.tensor([1.0]))
            assert box.tolist() == [expected]

    def test_of_the_whole_image_still_has_its_centre_at_the_maximum(self) -> None:
        assert mask_box(peak(4, 4, (8, 8)), torch.ones(1), torch.ones(1)).tolist() == [[0, 8, 0, 8]]

    def test_of_nothing_has_no_area(self) -> None:
        up, down, left, right = mask_box(peak(2, 3, (8, 8)), torch.zeros(1), torch.ones(1))[0].tolist()
        assert (up, left) == (down, right) == (2, 3)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_is_float32_whatever_comes_in(self, dtype: torch.dtype) -> None:
        inputs = (
            peak(300, 301, (400, 402)).to(dtype),
            torch.tensor([0.25], dtype=dtype),
            torch.tensor([1.0], dtype=dtype),
        )
        before = [tensor.clone() for tensor in inputs]
        box = mask_box(*inputs)
        assert box.dtype == torch.float32
        expected = torch.tensor([slow_box(peak(300, 301, (400, 402))[0].tolist(), 0.25, 1.0)])
        torch.testing.assert_close(box, expected)  # bfloat16 would round 301 to 302
        assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))

    @pytest.mark.parametrize(
        ("activation", "ratio", "aspect"),
        [
            ((2, 1, 4, 4), (2,), (2,)),
            ((4, 4), (4,), (4,)),
            ((2, 4, 4), (3,), (3,)),
            ((2, 4, 4), (2,), (3,)),
            ((2, 4, 4), (2, 1), (2, 1)),
            ((2, 4, 4), (), ()),
        ],
    )
    def test_refuses_shapes_that_do_not_fit(
        self, activation: tuple[int, ...], ratio: tuple[int, ...], aspect: tuple[int, ...]
    ) -> None:
        with pytest.raises(
            ValueError, match=r"expected activation \(B, H, W\), ratio \(B,\) and aspect \(B,\), got \("
        ):
            mask_box(torch.ones(activation), torch.ones(ratio), torch.ones(aspect))

    @pytest.mark.parametrize(
        ("ratio", "aspect", "message"),
        [
            (-0.1, 1.0, r"expected ratio in \[0, 1\], got -0.1"),
            (1.5, 1.0, r"expected ratio in \[0, 1\], got 1.5"),
            (float("nan"), 1.0, r"expected ratio in \[0, 1\], got nan"),
            (0.5, 0.0, "expected a positive aspect, got 0.0"),
            (0.5, -1.0, "expected a positive aspect, got -1.0"),
            (0.5, float("nan"), "expected a positive aspect, got nan"),
        ],
    )
    def test_refuses_values_without_meaning(self, ratio: float, aspect: float, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            mask_box(torch.ones(1, 4, 4), torch.tensor([ratio]), torch.tensor([aspect]))

    def test_looks_at_values_on_the_cpu_only(self) -> None:
        assert mask_box(torch.ones(2, 4, 4, device=meta), *torch.ones(2, 2, device=meta)).shape == (2, 4)


class TestInsideBox:
    @quick
    @given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), seeds)
    def test_matches_the_loop_over_eq_5(self, batch: int, height: int, width: int, seed: int) -> None:
        edges = (
            torch.randint(0, 2 * max(height, width) + 1, (batch, 4), generator=generator(seed)) / 2
        )  # halves hit pixels
        rows, columns = edges[:, :2].sort(1).values, edges[:, 2:].sort(1).values
        box = torch.cat([rows.clamp(max=height), columns.clamp(max=width)], 1)
        out = inside_box(box, (height, width))
        assert out.shape == (batch, 1, height, width)
        for i in range(batch):
            for m in range(height):
                for n in range(width):
                    assert bool(out[i, 0, m, n]) == slow_inside(box[i].tolist(), m, n)

    def test_both_edges_belong_to_the_box(self) -> None:
        out = inside_box(torch.tensor([[1.0, 2.0, 0.0, 1.0]]), (4, 4))
        assert out[0, 0].nonzero().tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]

    def test_masked_fraction_counts_the_pixels(self) -> None:
        box = torch.tensor([[0.0, 4.0, 0.0, 4.0], [1.0, 2.0, 0.0, 1.0], [2.0, 2.0, 0.0, 4.0], [0.0, 3.0, 1.0, 1.0]])
        assert torch.equal(masked_fraction(box, (4, 4)), torch.tensor([1.0, 0.25, 0.0, 0.0]))

    @pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 4, 1)])
    def test_refuses_what_is_no_box(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"expected boxes \(B, 4\) of up, down, left, right, got"):
            inside_box(torch.ones(shape), (4, 4))


fills = pytest.mark.parametrize("fill", ["pixel", "channel"])


class TestApplyMask:
    @fills
    def test_fills_the_box_and_nothing_else(self, fill: str) -> None:
        images = uniform(4, 3, 6, 7) + 2  # no fill is above 1
        box = torch.tensor([[1.0, 3.0, 2.0, 4.0], [0.0, 6.0, 0.0, 7.0], [0.5, 2.5, 3.5, 5.0], [2.0, 2.0, 1.0, 4.0]])
        out = apply_mask(images, box, fill=fill, generator=generator())
        for i in range(4):
            for channel in range(3):
                for m in range(6):
                    for n in range(7):
                        value = float(out[i, channel, m, n])
                        if slow_inside(box[i].tolist(), m, n):
                            assert 0 <= value < 1
                        else:
                            assert value == float(images[i, channel, m, n])

    @fills
    @quick
    @given(st.integers(0, 8), st.integers(0, 8), seeds)
    def test_of_a_box_without_area_changes_no_bit(self, fill: str, row: int, column: int, seed: int) -> None:
        images = uniform(2, 3, 8, 8, seed=seed)
        box = torch.tensor([[row, row, 0, 8], [0, 8, column, column]]).float()
        assert torch.equal(apply_mask(images, box, fill=fill), images)

    def test_by_pixel_draws_for_each_pixel_and_channel(self) -> None:
        out = apply_mask(torch.zeros(2, 3, 4, 4), torch.tensor([[0.0, 4.0, 0.0, 4.0]] * 2), generator=generator())
        assert out.unique().numel() == out.numel()

    def test_by_channel_draws_one_colour_for_each_image(self) -> None:
        out = apply_mask(
            torch.zeros(2, 3, 4, 4), torch.tensor([[0.0, 4.0, 0.0, 4.0]] * 2), fill="channel", generator=generator()
        )
        assert torch.equal(out, out[:, :, :1, :1].expand_as(out))
        assert out[:, :, 0, 0].unique().numel() == 6

    @fills
    def test_fills_with_the_whole_of_the_unit_interval(self, fill: str) -> None:
        images, box = torch.zeros(400, 3, 2, 2), torch.tensor([[0.0, 2.0, 0.0, 2.0]] * 400)
        out = apply_mask(images, box, fill=fill, generator=generator())
        assert out.min() < 0.01
        assert out.max() > 0.99
        assert float(out.mean()) == pytest.approx(0.5, abs=0.05)

    @fills
    def test_one_seed_gives_one_fill_and_spares_the_global_stream(self, fill: str) -> None:
        images, box = torch.zeros(2, 3, 4, 4), torch.tensor([[0.0, 4.0, 0.0, 4.0]] * 2)
        before = torch.get_rng_state()
        one, same, other = (apply_mask(images, box, fill=fill, generator=generator(s)) for s in (1, 1, 2))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
        assert torch.equal(torch.get_rng_state(), before)

    @fills
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_keeps_the_precision_and_the_input(self, fill: str, dtype: torch.dtype) -> None:
        images, box = uniform(2, 3, 4, 4).to(dtype), torch.tensor([[1.0, 2.0, 1.0, 2.0]] * 2)
        before = images.clone()
        out = apply_mask(images, box, fill=fill)
        assert out.dtype == dtype
        assert not torch.equal(out, images)
        assert torch.equal(images, before)

    def test_a_broken_pixel_outside_the_box_does_not_spread(self) -> None:
        images = torch.full((1, 3, 4, 4), float("nan"))
        out = apply_mask(images, torch.tensor([[0.0, 1.0, 0.0, 1.0]]))
        assert torch.isfinite(out[0, :, :2, :2]).all()
        assert torch.isnan(out).sum() == 3 * 12

    @pytest.mark.parametrize(
        ("images", "box"),
        [
            (torch.ones(3, 4, 4), torch.ones(3, 4)),
            (torch.ones(2, 3, 4, 4), torch.ones(3, 4)),
            (torch.ones(2, 3, 4, 4), torch.ones(2, 2)),
            (torch.ones(2, 3, 4, 4), torch.ones(4)),
            (torch.ones(2, 3, 4, 4, dtype=torch.uint8), torch.ones(2, 4)),
        ],
    )
    def test_refuses_shapes_that_do_not_fit(self, images: Tensor, box: Tensor) -> None:
        with pytest.raises(ValueError, match=r"expected floating images \(B, C, H, W\) and box \(B, 4\), got \("):
            apply_mask(images, box)

    def test_refuses_another_fill(self) -> None:
        with pytest.raises(ValueError, match="expected fill 'pixel' or 'channel', got 'zero'"):
            apply_mask(torch.ones(1, 3, 4, 4), torch.ones(1, 4), fill="zero")
