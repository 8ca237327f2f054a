"""Images of any mode as one to four channels, cropped or stretched to squares."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image

from sanm_lightning.data import ImageFolder, decode
from sanm_lightning.data.decode import read_image, square_image
from sanm_lightning.data.operations import OPERATIONS, TABLES
from sanm_lightning.data.policies import POLICIES, augment

SIDE = 8


def flat(mode: str, color: Any) -> Image.Image:
    return Image.new(mode, (12, 10), color)


def sixteen_bits() -> Image.Image:
    return Image.fromarray(np.full((10, 12), 65535 // 5, np.uint16))


def transparent_palette() -> Image.Image:
    image = flat("P", 0)
    image.putpalette([255, 0, 0])
    image.info["transparency"] = 0
    return image


class TestChannels:
    @pytest.mark.parametrize(
        ("image", "channels", "values"),
        [
            (flat("L", 77), 1, (77,)),
            (flat("1", 1), 1, (255,)),
            (sixteen_bits(), 1, (51,)),
            (flat("F", 0.2), 1, (51,)),
            (flat("RGB", (255, 0, 0)), 1, (76,)),
            (flat("CMYK", (0, 255, 255, 0)), 1, (76,)),
            (flat("YCbCr", (90, 128, 128)), 1, (90,)),
            (flat("LA", (77, 0)), 1, (255,)),
            (transparent_palette(), 1, (255,)),
            (flat("LA", (77, 30)), 2, (77, 30)),
            (flat("L", 77), 2, (77, 255)),
            (sixteen_bits(), 2, (51, 255)),
            (flat("RGBA", (255, 0, 0, 40)), 2, (76, 40)),
            (flat("RGBA", (200, 100, 50, 255)), 4, (200, 100, 50, 255)),
            (flat("RGB", (1, 2, 3)), 4, (1, 2, 3, 255)),
            (flat("L", 77), 4, (77, 77, 77, 255)),
            (transparent_palette(), 4, (0, 0, 0, 0)),
            (flat("CMYK", (0, 255, 255, 0)), 4, (255, 0, 0, 255)),
        ],
        ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value),
    )
    def test_of_every_mode(self, image: Image.Image, channels: int, values: tuple[int, ...]) -> None:
        found = square_image(image, SIDE, channels=channels)
        assert found.dtype == torch.uint8 and found.shape == (channels, SIDE, SIDE)
        assert (found.int() - torch.tensor(values).view(-1, 1, 1)).abs().max() <= 1

    @pytest.mark.parametrize("channels", [1, 3])
    def test_a_file_is_turned_upright(self, tmp_path: Path, channels: int) -> None:
        image = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 2, axis=0)).resize((16, 16), 0)
        exif = Image.Exif()
        exif[0x0112] = 6  # turn clockwise
        image.save(tmp_path / "a.png", exif=exif)
        found = read_image(tmp_path / "a.png", SIDE, channels=channels)
        assert (found[:, 0] == 0).all() and (found[:, -1] == 255).all()

    @pytest.mark.parametrize("ending", ["gif", "webp", "png"])
    def test_the_first_frame_of_an_animation(self, tmp_path: Path, ending: str) -> None:
        frames = [flat("RGB", color) for color in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
        frames[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:], duration=50)
        with Image.open(tmp_path / f"a.{ending}") as image:
            assert image.n_frames == 3
        found = read_image(tmp_path / f"a.{ending}", SIDE).int()
        assert (found - torch.tensor([200, 0, 0]).view(3, 1, 1)).abs().max() <= 6

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"channels": 5}, r"expected channels of 1 \(gray\), .* got 5; choose"),
            ({"resize": "squash"}, "expected resize 'crop' or 'stretch', got 'squash'; choose"),
            ({"on_error": "ignore"}, "expected on_error 'raise' or 'skip', got 'ignore'; choose"),
        ],
    )
    def test_other_arguments_are_refused(self, options: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            ImageFolder("nowhere", **options)


class TestResize:
    def test_stretch_keeps_the_borders_that_crop_removes(self) -> None:
        values = np.zeros((10, 40), np.uint8)
        values[:, :10], values[:, 30:] = 255, 128
        image = Image.fromarray(values)
        cropped, stretched = (square_image(image, 10, channels=1, resize=resize) for resize in ("crop", "stretch"))
        assert (cropped == 0).all()
        assert (stretched[:, :, 0] == 255).all() and (stretched[:, :, -1] == 128).all()

    def test_stretch_equals_torchvision(self) -> None:
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 47, 3), np.uint8))
        expected = TF.pil_to_tensor(TF.resize(image, [SIDE, SIDE]))
        assert torch.equal(square_image(image, SIDE, resize="stretch"), expected)


class TestDraft:
    """JPEG files that are decoded at a fraction of their size."""

    @staticmethod
    def save(path: Path, size: tuple[int, int], **options: Any) -> Path:
        """Save a smooth random image."""
        coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, **options)
        return path

    @pytest.mark.parametrize("resize", ["crop", "stretch"])
    @pytest.mark.parametrize(
        ("size", "fraction"), [((640, 512), 8), ((640, 511), 4), ((640, 255), 2), ((130, 128), 2), ((640, 127), 1)]
    )
    def test_no_side_falls_below_twice_the_side_of_the_result(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resize: Any, size: tuple[int, int], fraction: int
    ) -> None:
        path, decoded = self.save(tmp_path / "a.jpg", size, quality=95), []
        monkeypatch.setattr(
            decode, "square_image", lambda image, *rest: decoded.append(image.size) or square_image(image, *rest)
        )
        found = read_image(path, 32, resize=resize)
        assert decoded == [tuple(-(-length // fraction) for length in size)]
        monkeypatch.setattr(decode, "DRAFT", 10**6)
        whole = read_image(path, 32, resize=resize)
        assert (found.float() - whole.float()).abs().mean() < 2
        assert torch.equal(found, whole) == (fraction == 1)

    def test_other_formats_and_the_orientation_stay(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # turn clockwise
        upright = read_image(self.save(tmp_path / "a.jpg", (640, 480)), 32).float()
        turned = read_image(self.save(tmp_path / "b.jpg", (640, 480), exif=exif), 32).float()
        assert (turned - upright.rot90(-1, (1, 2))).abs().max() <= 2
        path = self.save(tmp_path / "c.png", (640, 480))
        with Image.open(path) as image:
            assert torch.equal(read_image(path, 32), square_image(image, 32))


class TestGrayImages:
    """Operations and policies of one channel, which are those of torchvision for gray images."""

    images = torch.randint(0, 256, (6, 1, 12, 10), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    amount = torch.tensor([0.3, 0.5, 0.9, 1.1, 1.5, 1.9])

    @pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("contrast", "saturation")])
    def test_every_operation_is_that_of_the_same_image_in_color(self, name: str) -> None:
        found = OPERATIONS[name](self.images, self.amount)
        color = OPERATIONS[name](self.images.expand(-1, 3, -1, -1).contiguous(), self.amount)
        # the luma of three equal channels is rounded down, because its weights sum to .9999
        tolerance = {"grey": 1, "hue": 1}.get(name, 0)
        assert found.shape == self.images.shape
        assert (found.int() - color[:, :1].int()).abs().max() <= tolerance

    @pytest.mark.parametrize("name", ["contrast", "saturation", "hue"])
    def test_color_operations_equal_torchvision(self, name: str) -> None:
        amount = self.amount / 4 if name == "hue" else self.amount
        found = OPERATIONS[name](self.images, amount)
        adjust = getattr(TF, f"adjust_{name}")
        for image, value, expected in zip(self.images, amount.tolist(), found, strict=True):
            assert torch.equal(adjust(image, value), expected)

    @pytest.mark.parametrize("policy", POLICIES)
    def test_every_policy(self, policy: str) -> None:
        found = augment(self.images, policy, torch.Generator().manual_seed(1), padding=2, size=(8, 8))
        assert found.shape == (6, 1, 8, 8) and found.dtype == torch.uint8

    def test_tables_have_one_row(self) -> None:
        assert {tuple(table(self.images, self.amount).shape) for table in TABLES.values()} == {(6, 1, 256)}

    @pytest.mark.parametrize("channels", [2, 4])
    def test_colors_of_other_numbers_of_channels_are_refused(self, channels: int) -> None:
        images = self.images.expand(-1, channels, -1, -1)
        assert augment(images, "weak", torch.Generator(), padding=2).shape == images.shape
        with pytest.raises(
            ValueError, match=f"expected RGB or gray images for the view 'simclr', got {channels} channels; use 'weak'"
        ):
            augment(images, "simclr", torch.Generator())


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "avif", "gif", "tiff"])
def test_damaged_files_of_every_format_are_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    try:
        Image.fromarray(noise).save(path)
    except (KeyError, ValueError, OSError):
        pytest.skip(f"this Pillow does not write {suffix}")
    content = path.read_bytes()
    draw, refused = np.random.default_rng(1), 0
    for _ in range(60):
        damaged = bytearray(content)
        for place in draw.integers(len(damaged) // 8, len(damaged), 20):
            damaged[place] = int(draw.integers(256))
        path.write_bytes(bytes(damaged[: draw.integers(len(damaged) // 2, len(damaged) + 1)]))
        try:
            read_image(path, SIDE)
        except ValueError as error:
            refused += str(path) in str(error)
    assert refused


def test_an_error_of_a_decoder_at_run_time_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of AVIF for some damaged files."""
    flat("RGB", (1, 2, 3)).save(tmp_path / "a.png")

    def load(image: Image.Image) -> None:
        raise RuntimeError("Failed to decode frame 0")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(ValueError, match=r"got '.*a\.png', which cannot be decoded \(Failed to decode frame 0\)"):
        read_image(tmp_path / "a.png", SIDE)
