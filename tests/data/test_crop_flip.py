"""Random crops and flips of a batch, against torchvision image by image."""

import pytest
import torch
import torchvision.transforms.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st

from sanm_lightning.data.views import LARGE, CropFlip, crop_flip, draw_crop_flip, select_rows


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestCropFlip:
    @settings(max_examples=40, deadline=None)
    @given(
        st.integers(1, 6),
        st.integers(1, 9),
        st.integers(1, 9),
        st.integers(0, 5),
        st.booleans(),
        st.integers(0, 2**32),
        st.sampled_from([torch.uint8, torch.float32, torch.bfloat16]),
    )
    def test_equals_torchvision_image_by_image(
        self, batch: int, height: int, width: int, padding: int, flip: bool, seed: int, dtype: torch.dtype
    ) -> None:
        images = torch.randint(1, 256, (batch, 3, height, width), generator=generator(seed)).to(dtype)
        before = images.clone()
        drawn = draw_crop_flip(batch, padding, flip, generator(seed))
        views = crop_flip(images, drawn, padding)
        for image, view, top, left, flipped in zip(images, views, *drawn, strict=True):
            expected = TF.crop(TF.pad(image, [padding]), int(top), int(left), height, width)
            assert torch.equal(view, TF.hflip(expected) if flipped else expected)
        assert views.dtype == dtype
        assert torch.equal(images, before)

    @pytest.mark.parametrize("padding", [0, 3])
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
    def test_large_images_and_smaller_windows_as_well(self, padding: int, dtype: torch.dtype) -> None:
        images = torch.randint(1, 256, (8, 3, 80, 72), generator=generator()).to(dtype)
        assert images[0].numel() >= LARGE
        drawn = draw_crop_flip(8, padding, True, generator(), (16, 12))
        assert 0 < drawn.flipped.sum() < 8
        views = crop_flip(images, drawn, padding, (64, 60))
        for image, view, top, left, flipped in zip(images, views, *drawn, strict=True):
            expected = TF.crop(TF.pad(image, [padding]), int(top), int(left), 64, 60)
            assert torch.equal(view, TF.hflip(expected) if flipped else expected)

    def test_the_middle_crop_is_the_image(self) -> None:
        images = torch.rand(3, 3, 8, 8)
        middle = CropFlip(torch.full((3,), 4), torch.full((3,), 4), torch.zeros(3, dtype=torch.bool))
        assert torch.equal(crop_flip(images, middle, 4), images)

    def test_refuses_one_view_too_few(self) -> None:
        with pytest.raises(ValueError, match="one view per image"):
            crop_flip(torch.rand(3, 3, 8, 8), draw_crop_flip(2, 1, True, generator()), 1)

    def test_refuses_negative_padding(self) -> None:
        with pytest.raises(ValueError, match="crop padding of 0 pixels or more, got -1"):
            crop_flip(torch.rand(3, 3, 8, 8), draw_crop_flip(3, 1, True, generator()), -1)


class TestDrawCropFlip:
    def test_covers_every_offset_and_both_sides(self) -> None:
        top, left, flipped = draw_crop_flip(2_000, 2, True, generator())
        assert top.unique().tolist() == left.unique().tolist() == [0, 1, 2, 3, 4]
        assert 800 < flipped.sum() < 1_200

    def test_without_flips_the_crops_are_the_same(self) -> None:
        with_flips, without = draw_crop_flip(9, 4, True, generator()), draw_crop_flip(9, 4, False, generator())
        assert torch.equal(with_flips.top, without.top) and torch.equal(with_flips.left, without.left)
        assert not without.flipped.any()


@pytest.mark.parametrize(("side", "dtype"), [(8, torch.uint8), (80, torch.uint8), (80, torch.float32)])
def test_rows_are_those_of_index_select(side: int, dtype: torch.dtype) -> None:
    images = torch.randint(256, (5, 3, side, side), generator=generator()).to(dtype)
    for source in (images, images[:, :, 4:]):
        index = torch.tensor([4, 0, 0, 3])
        assert torch.equal(select_rows(source, index), source.index_select(0, index))
