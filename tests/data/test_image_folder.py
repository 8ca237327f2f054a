"""Folders of images: every mode and format, and a sentence for everything that can be missing."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageFile

from sanm_lightning.data import ImageFolder, Noise
from sanm_lightning.data.image_folder import read_image

SIDE = 8


def flat(mode: str, colour: object, size: tuple[int, int] = (12, 10)) -> Image.Image:
    return Image.new(mode, size, colour)  # type: ignore[arg-type]


def numbers(values: float, dtype: str) -> Image.Image:
    return Image.fromarray(np.full((10, 12), values, dtype=dtype))


def palette() -> Image.Image:
    image = Image.new("P", (12, 10), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    return image


def palette_with_transparency() -> Image.Image:
    image = palette()
    image.info["transparency"] = 1
    return image


def keyed(mode: str, colour: object) -> Image.Image:
    image = flat(mode, colour)
    image.info["transparency"] = colour
    return image


def folder(root: Path, classes: dict[str, int], part: str = "train") -> Path:
    for name, count in classes.items():
        (root / part / name).mkdir(parents=True)
        for i in range(count):
            flat("RGB", (i, 10, 20)).save(root / part / name / f"{i}.png")
    return root


class TestReadImage:
    @pytest.mark.parametrize(
        ("image", "ending", "colour"),
        [
            (flat("RGB", (250, 128, 3)), "png", (250, 128, 3)),
            (flat("RGB", (250, 128, 3)), "bmp", (250, 128, 3)),
            (flat("RGB", (100, 100, 100)), "jpg", (100, 100, 100)),
            (flat("1", 1), "png", (255, 255, 255)),
            (flat("1", 0), "bmp", (0, 0, 0)),
            (flat("L", 77), "png", (77, 77, 77)),
            (flat("L", 77), "jpg", (77, 77, 77)),
            (flat("LA", (77, 255)), "png", (77, 77, 77)),
            (flat("LA", (77, 0)), "png", (255, 255, 255)),
            (flat("RGBA", (0, 0, 0, 0)), "png", (255, 255, 255)),
            (flat("RGBA", (0, 0, 0, 0)), "webp", (255, 255, 255)),
            (flat("RGBA", (250, 0, 0, 255)), "png", (250, 0, 0)),
            (flat("RGBA", (0, 0, 0, 128)), "png", (127, 127, 127)),
            (palette(), "gif", (0, 0, 255)),
            (palette(), "png", (0, 0, 255)),
            (palette_with_transparency(), "png", (255, 255, 255)),
            (palette_with_transparency(), "gif", (255, 255, 255)),
            (keyed("RGB", (5, 6, 7)), "png", (255, 255, 255)),
            (keyed("L", 5), "png", (255, 255, 255)),
            (flat("CMYK", (0, 255, 255, 0)), "jpg", (255, 0, 0)),
            (flat("CMYK", (0, 0, 0, 255)), "tiff", (0, 0, 0)),
            (flat("YCbCr", (128, 128, 128)), "jpg", (128, 128, 128)),
            (numbers(65535 // 5, "uint16"), "png", (51, 51, 51)),
            (numbers(65535, "uint16"), "tiff", (255, 255, 255)),
            (numbers(65535 // 5, "int32"), "tiff", (51, 51, 51)),
            (numbers(2**20, "int32"), "tiff", (255, 255, 255)),
            (numbers(0.2, "float32"), "tiff", (51, 51, 51)),
            (numbers(51.0, "float32"), "tiff", (51, 51, 51)),
            (numbers(13107.0, "float32"), "tiff", (51, 51, 51)),
            (numbers(-1.0, "float32"), "tiff", (0, 0, 0)),
            (numbers(float("nan"), "float32"), "tiff", (0, 0, 0)),
        ],
        ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value),
    )
    def test_every_mode_becomes_rgb_bytes(
        self, tmp_path: Path, image: Image.Image, ending: str, colour: tuple[int, int, int]
    ) -> None:
        image.save(tmp_path / f"a.{ending}")
        read = read_image(tmp_path / f"a.{ending}", SIDE)
        assert read.dtype == torch.uint8 and read.shape == (3, SIDE, SIDE)
        tolerance = 3 if ending in ("jpg", "webp") else 1
        expected = torch.tensor(colour).view(3, 1, 1)
        assert (read.int() - expected).abs().max() <= tolerance

    def test_resizes_the_short_side_and_takes_the_middle(self, tmp_path: Path) -> None:
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 47, 3), dtype=np.uint8))
        image.save(tmp_path / "a.png")
        expected = TF.pil_to_tensor(TF.center_crop(TF.resize(image, [SIDE]), [SIDE]))
        assert torch.equal(read_image(tmp_path / "a.png", SIDE), expected)

    @pytest.mark.parametrize("size", [(300, 2), (2, 300), (1, 1)])
    def test_any_shape_becomes_a_square(self, tmp_path: Path, size: tuple[int, int]) -> None:
        flat("RGB", (9, 9, 9), size).save(tmp_path / "a.png")
        assert (read_image(tmp_path / "a.png", SIDE) == 9).all()

    def test_is_turned_upright(self, tmp_path: Path) -> None:
        image = Image.fromarray(np.repeat(np.array([[0, 255]], dtype=np.uint8), 2, axis=0)).resize((16, 16), 0)
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was held sideways: turn clockwise
        image.save(tmp_path / "a.png", exif=exif)
        read = read_image(tmp_path / "a.png", SIDE)
        assert (read[:, 0] == 0).all() and (read[:, -1] == 255).all()

    @pytest.mark.parametrize("damage", ["empty", "text", "cut"])
    def test_names_the_file_that_cannot_be_decoded(self, tmp_path: Path, damage: str) -> None:
        path = tmp_path / "broken.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 47, 3), dtype=np.uint8)).save(path)
        content = {"empty": b"", "text": b"not an image", "cut": path.read_bytes()[:2000]}
        path.write_bytes(content[damage])
        assert not ImageFile.LOAD_TRUNCATED_IMAGES
        with pytest.raises(ValueError, match=r"broken\.png.*cannot be decoded") as error:
            read_image(path, SIDE)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("side", [8200, 12_000, 30_000])  # Pillow says nothing, warns, refuses
    def test_refuses_a_small_file_that_claims_a_huge_image(self, tmp_path: Path, side: int) -> None:
        path = tmp_path / "bomb.png"
        header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
        row = b"\0" * (side // 8 + 1)
        with path.open("wb") as file:
            file.write(b"\x89PNG\r\n\x1a\n")
            packed = zlib.compress(row * (side if side < 10_000 else 1), 9)
            for kind, content in ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")):
                check = zlib.crc32(kind + content)
                file.write(struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check))
        assert path.stat().st_size < 200_000
        with pytest.raises(ValueError, match=r"bomb\.png.*cannot be decoded .*pixels") as error:
            read_image(path, SIDE)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("size", [(2, 300), (300, 3), (1, 17), (40, 641)])
    def test_the_ends_of_a_thin_image_are_cropped_before_it_is_resized(self, tmp_path: Path, monkeypatch, size) -> None:  # type: ignore[no-untyped-def]
        """The square is that of the whole image to the pixel of the source, and the size of the resized image is bounded."""
        values = np.random.default_rng(0).integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3), dtype=np.uint8)
        Image.fromarray(values).resize(size, Image.Resampling.BILINEAR).save(tmp_path / "a.png")
        sides: list[int] = []
        resize = TF.resize

        def watched(image: Image.Image, *arguments: object, **options: object) -> Image.Image:
            out = resize(image, *arguments, **options)
            sides.append(max(out.size))
            return out

        monkeypatch.setattr(TF, "resize", watched)
        found = read_image(tmp_path / "a.png", SIDE)
        assert sides[-1] <= 16 * SIDE
        whole = TF.center_crop(resize(Image.open(tmp_path / "a.png"), [SIDE], antialias=True), [SIDE, SIDE])
        expected = torch.from_numpy(np.array(whole)).permute(2, 0, 1)
        assert float((found.float() - expected.float()).abs().mean()) < 12, "at most half a pixel of the source away"

    def test_decodes_up_to_that_size(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sanm_lightning.data.decode.MAX_PIXELS", 16 * 16)
        flat("RGB", (9, 9, 9), (16, 16)).save(tmp_path / "a.png")
        assert (read_image(tmp_path / "a.png", SIDE) == 9).all()
        flat("RGB", (9, 9, 9), (16, 17)).save(tmp_path / "a.png")
        with pytest.raises(ValueError, match="16 x 17 pixels, more than 256"):
            read_image(tmp_path / "a.png", SIDE)


class TestImageFolder:
    def test_reads_classes_in_the_order_of_their_names(self, tmp_path: Path) -> None:
        root = folder(folder(tmp_path, {"b": 2, "a": 3, ".hidden": 1}), {"a": 1, "b": 1}, "test")
        (root / "train" / "a" / "notes.txt").write_text("not an image")
        data = ImageFolder(str(root), image_size=SIDE, crop_padding=0, flip=False)
        assert (data.num_classes, data.image_size, data.class_names) == (2, (SIDE, SIDE), ["a", "b"])
        data.setup()
        assert data.labels.tolist() == [0, 0, 0, 1, 1] and data.true_labels is None
        batch = data.batch("train", torch.arange(5))
        assert (batch.images[:, 0, 0, 0] * 255).round().tolist() == [0, 1, 2, 0, 1]
        assert data.batch("test", torch.arange(2)).labels.tolist() == [0, 1]

    def test_training_alone_needs_no_test_folder(self, tmp_path: Path) -> None:
        data = ImageFolder(str(folder(tmp_path, {"a": 2, "b": 2})), image_size=SIDE, holdout_fraction=0)
        data.setup("fit")
        assert data.num_samples == 4 and data.eval_names == [] and data.test_names == []
        with pytest.raises(ValueError, match="expected a test or a validation split, got neither"):
            data.test_dataloader()

    def test_injected_noise_makes_the_folders_the_true_labels(self, tmp_path: Path) -> None:
        data = ImageFolder(str(folder(tmp_path, {"a": 2, "b": 2})), noise=Noise("pair", 0.5), holdout_fraction=0)
        assert data.true_labels is not None and data.measured_noise_rate == 0.5

    def test_workers_decode_the_same(self, tmp_path: Path) -> None:
        root = str(folder(tmp_path, {"a": 3, "b": 2}))
        one, other = (ImageFolder(root, image_size=SIDE, num_workers=workers, seed=0) for workers in (0, 1))
        index = torch.arange(4)
        assert torch.equal(one.batch("train", index).images, other.batch("train", index).images)

    def test_a_test_set_alone_has_the_classes_of_its_folders_and_cannot_be_trained_on(self, tmp_path: Path) -> None:
        for name in ("b", "a"):
            (tmp_path / "test" / name).mkdir(parents=True)
            flat("RGB", (1, 2, 3)).save(tmp_path / "test" / name / "0.png")
        (tmp_path / "notes.txt").touch()
        data = ImageFolder(str(tmp_path), image_size=SIDE, seed=0)
        data.setup("test")
        assert data.class_names == ["a", "b"] and data.test_names == ["test"]
        assert data.sample_paths("test") == ["test/a/0.png", "test/b/0.png"]
        assert data.listing("test").passed_over == {"extension .txt unknown to Pillow": [tmp_path / "notes.txt"]}
        with pytest.raises(FileNotFoundError, match=r"expected a folder 'train' in .*, got only test; use the layout"):
            data.setup("fit")

    def test_says_what_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(
            FileNotFoundError, match=r"expected a folder of class folders in .*nowhere', got no such folder"
        ):
            ImageFolder(str(tmp_path / "nowhere")).setup()
        (tmp_path / "images.csv").touch()
        with pytest.raises(
            NotADirectoryError, match=r"got a file; use a folder, or --data CSVImages --data\.file FILE"
        ):
            ImageFolder(str(tmp_path / "images.csv")).setup()
        with pytest.raises(ValueError, match="expected class folders in"):
            ImageFolder(str(tmp_path)).setup()
        (tmp_path / "test").mkdir()
        with pytest.raises(FileNotFoundError, match="expected a folder 'train'"):
            ImageFolder(str(tmp_path)).setup()
        (tmp_path / "train").mkdir()
        with pytest.raises(ValueError, match=r"expected class folders in .*train', got none"):
            ImageFolder(str(tmp_path)).setup()
        (tmp_path / "train" / "a").mkdir()
        with pytest.raises(ValueError, match=r"expected images in .*train/a', got none \(empty folder\)"):
            ImageFolder(str(tmp_path)).setup()
        (tmp_path / "train" / "a" / "1.heic").touch()
        with pytest.raises(ValueError, match=r"got none \(1 file skipped \(1 extension \.heic unknown to Pillow\)\)"):
            ImageFolder(str(tmp_path)).setup()
        flat("RGB", (1, 2, 3)).save(tmp_path / "train" / "a" / "0.png")
        with pytest.raises(ValueError, match="expected two or more classes in the training set, got 1; add images"):
            ImageFolder(str(tmp_path)).setup()
        folder(tmp_path, {"b": 2})
        folder(tmp_path, {"z": 1}, "test")
        with pytest.raises(ValueError, match="expected test classes among the 2 training classes, got 'z'; rename or"):
            ImageFolder(str(tmp_path)).setup()
        with pytest.raises(ValueError, match="1 pixel or more"):
            ImageFolder(image_size=0)

    def test_a_line_per_split_counts_images_and_files_passed_over(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        root = folder(folder(tmp_path, {"b": 2, "a": 3}), {"a": 1, "b": 1}, "test")
        (root / "train" / "a" / "notes.txt").write_text("not an image")
        (root / "train" / "a" / "deep").mkdir()
        (root / "train" / "a" / "1.png").rename(root / "train" / "a" / "deep" / "1.png")
        (root / "train" / "b" / "1.png").rename(root / "train" / "b" / "1")
        (root / "labels.csv").touch()
        data = ImageFolder(str(root), image_size=SIDE)
        with caplog.at_level("INFO", "lightning.pytorch"):
            data.setup(), data.setup()
            data._restart_from_seed(3)
        assert [record.message for record in caplog.records] == [
            "train: 4 images of 2 classes, 3 files skipped (1 extension .csv unknown to Pillow, "
            "1 extension .txt unknown to Pillow, 1 no extension)",
            "train: skipped labels.csv, train/a/notes.txt, train/b/1",
            "test: 2 images of 2 classes",
        ]
        assert data.sample_paths() == ["train/a/0.png", "train/a/2.png", "train/a/deep/1.png", "train/b/0.png"]
        assert data.sample_paths("test") == ["test/a/0.png", "test/b/0.png"]

    def test_a_validation_folder_is_the_validation_split(self, tmp_path: Path) -> None:
        root = folder(folder(folder(tmp_path, {"a": 3, "b": 2}), {"a": 1, "b": 2}, "val"), {"a": 1, "b": 1}, "test")
        data = ImageFolder(str(root), image_size=SIDE, noise=Noise("pair", 1.0))
        data.setup()
        assert (data.num_samples, data.eval_names, data.test_names) == (5, ["val", "test"], ["test"])
        assert data.batch("val", torch.arange(3)).labels.tolist() == [0, 1, 1]  # as they are in the folders
        assert data.sample_paths("val") == ["val/a/0.png", "val/b/0.png", "val/b/1.png"]
        with pytest.raises(ValueError, match="expected val_fraction 0 for data with a validation split"):
            ImageFolder(str(root), val_fraction=0.5).setup("fit")

    def test_a_validation_folder_stands_for_a_test_folder(self, tmp_path: Path) -> None:
        root = folder(folder(tmp_path, {"a": 3, "b": 2}), {"a": 1, "b": 2}, "validation")
        data = ImageFolder(str(root), image_size=SIDE)
        data.setup()
        assert (data.num_samples, data.eval_names, data.test_names) == (5, ["val"], ["val"])

    def test_class_folders_alone_are_a_training_set(self, tmp_path: Path) -> None:
        data = ImageFolder(str(folder(tmp_path, {"a": 20, "b": 10}, ".")), image_size=SIDE)
        data.setup()
        assert data.class_names == ["a", "b"] and data.num_samples == 27
        assert data.table("val").labels.tolist() == [0, 0, 1]

    def test_a_test_folder_without_classes_is_no_test_split(self, tmp_path: Path) -> None:
        root = folder(tmp_path, {"a": 5, "b": 5})
        (root / "test").mkdir()
        flat("RGB", (1, 2, 3)).save(root / "test" / "0.png")
        assert ImageFolder(str(root), image_size=SIDE).test_names == ["val"]
