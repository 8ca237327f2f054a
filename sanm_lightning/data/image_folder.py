"""Image folders with one subfolder per class."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from sanm_lightning.data.datamodule import NoisyDataModule, Source

__all__ = ["ImageFolder", "read_image"]

MAX_PIXELS = 2**26
"""Largest number of pixels of a decoded image, because a small file can declare any size (decompression bombs)."""

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError, Image.DecompressionBombWarning)
"""Exceptions raised by Pillow; the last one if warnings are errors."""


class ImageFolder(NoisyDataModule):
    """Images in ``root/train/<class>/`` and ``root/test/<class>/``, in any format and mode supported by Pillow.

    Classes are the subfolders of ``root/train``, sorted by name; files with extensions unknown to Pillow are ignored.
    Images are rotated according to EXIF, composited on white if transparent, resized to a short side of
    ``decode_size``, and center-cropped to a square. Views of ``image_size`` are random crops of that square in training
    and center crops in evaluation. The labels are those of the folders; the true labels are unknown, unless this data
    module injects noise.

    Args:
        root: folder that contains ``train`` and ``test``.
        image_size: side of the square images in pixels.
        decode_size: side of the decoded squares, such as 256 for an image size of 224; None uses the image size.
        **kwargs: as for `NoisyDataModule`.

    Raises:
        ValueError: if image_size is smaller than 1; on access, if there are no classes, a class has no images, a test
            class is not a training class, or a file cannot be decoded.
        FileNotFoundError: on access, if one of the folders does not exist.
    """

    def __init__(
        self, root: str = "data", image_size: int = 224, decode_size: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(root=root, **kwargs)
        if image_size < 1:
            raise ValueError(
                f"expected image_size of 1 pixel or more, got {image_size}; choose a larger one, such as 224"
            )
        if decode_size is not None and decode_size < image_size:
            raise ValueError(
                f"expected decode_size of {image_size}, the image_size, or more, got {decode_size}; choose a larger one"
            )
        self._side = image_size
        self._decoded = image_size if decode_size is None else decode_size
        self._class_names: list[str] | None = None

    @property
    def num_classes(self) -> int:
        """The number of subfolders of ``root/train``."""
        return len(self.class_names)

    @property
    def image_size(self) -> tuple[int, int]:
        """(side, side) in pixels."""
        return self._side, self._side

    @property
    def decode_size(self) -> tuple[int, int]:
        """(side, side) of the decoded squares in pixels."""
        return self._decoded, self._decoded

    @property
    def class_names(self) -> list[str]:
        """The subfolders of ``root/train``, sorted."""
        if self._class_names is None:
            self._class_names = self._folders("train")
        return list(self._class_names)

    @property
    def curated(self) -> bool:
        """False: the labels of the folders may be wrong."""
        return False

    def load_train(self) -> Source:
        """Return the files of ``root/train``."""
        return self._list("train")

    def load_test(self) -> Source:
        """Return the files of ``root/test``."""
        return self._list("test")

    def _folders(self, part: str) -> list[str]:
        root = Path(self.root)
        layout = "use the layout root/train/<class>/ and root/test/<class>/, and check --data.root"
        if not root.is_dir():
            raise FileNotFoundError(f"expected an image folder in {str(root)!r}, got no such folder; {layout}")
        if not (root / part).is_dir():
            raise FileNotFoundError(f"expected a folder {part!r} in {str(root)!r}, got none; {layout}")
        names = sorted(path.name for path in (root / part).iterdir() if path.is_dir() and not path.name.startswith("."))
        if not names:
            raise ValueError(f"expected class folders in {str(root / part)!r}, got none; {layout}")
        return names

    def _list(self, part: str) -> Source:
        label_of = {name: label for label, name in enumerate(self.class_names)}
        endings = set(Image.registered_extensions())
        paths: list[Path] = []
        labels: list[int] = []
        for name in self._folders(part):
            folder = Path(self.root) / part / name
            if name not in label_of:
                raise ValueError(
                    f"expected {part} classes among the {len(label_of)} training classes, got {name!r}; rename or "
                    f"remove {str(folder)!r}"
                )
            files = sorted(p for p in folder.iterdir() if p.suffix.lower() in endings and not p.name.startswith("."))
            if not files:
                raise ValueError(f"expected images in {str(folder)!r}, got none; add images, or remove the folder")
            paths.extend(files)
            labels.extend([label_of[name]] * len(files))
        return Source(torch.tensor(labels), _Files(paths, self._decoded))


class _Files:
    """Map-style data set that decodes file i on access."""

    def __init__(self, paths: list[Path], side: int) -> None:
        self.paths = paths
        self.side = side

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return read_image(self.paths[index], self.side)


def read_image(path: str | Path, side: int) -> Tensor:
    """Decode an image file, or the first frame of an animation, to a square RGB image.

    Gray values of more than 8 bits are scaled to 8 bits. The assumed range of integers is 65,535, or their maximum if
    it is larger; that of floating-point values is the smallest of 1, 255 and 65,535 that is not exceeded, or their
    maximum. Negative values and NaN become black.

    Args:
        path: path of the file.
        side: S, side of the result in pixels.

    Returns:
        The image, shape (3, S, S), uint8.

    Raises:
        ValueError: if the file cannot be decoded, or has more than ``MAX_PIXELS`` pixels; the message contains the
            path.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
            image.load()  # orientation metadata may follow the pixel data
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1  # exif_transpose also copies upright images
            rgb = _to_rgb(ImageOps.exif_transpose(image) if turned else image)
    except UNREADABLE as error:
        raise ValueError(
            f"expected a valid image, got {str(path)!r}, which cannot be decoded ({str(error).rstrip('.')}); replace "
            "or remove the file"
        ) from error
    resized = TF.resize(rgb, [side], interpolation=TF.InterpolationMode.BILINEAR, antialias=True)
    square = resized if resized.size == (side, side) else TF.center_crop(resized, [side, side])
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _to_8_bits(image).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(ground, layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale gray values to 8 bits; Pillow's own conversion clips at 255."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64)).clip(min=0)
    largest = float(values.max())
    scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    scale = next((scale for scale in scales if largest <= scale), largest)
    return Image.fromarray((values * (255 / scale)).round().astype(np.uint8))
