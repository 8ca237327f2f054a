"""Any folder of images, one sub-folder per class."""

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from sanm_lightning.data.datamodule import NoisyDataModule, Source

__all__ = ["ImageFolder", "read_image"]

MAX_PIXELS = 2**26
"""Pixels of the largest image that is decoded: a file of a few bytes can claim any size, and each takes 3 bytes or more."""

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError, Image.DecompressionBombWarning)
"""What Pillow raises; the last one where warnings are errors."""


class ImageFolder(NoisyDataModule):
    """Images in ``root/train/<class>/`` and ``root/test/<class>/``, in any format and mode that Pillow reads.

    Classes are the sub-folders of ``root/train``, sorted by name; files whose ending Pillow does not know are passed
    over. An image is turned upright (EXIF), put on white where it is transparent, resized until its short side is
    ``decode_size``, and cropped to the square in its middle. Views are crops of that square of ``image_size``: at random places
    in training, in the middle in evaluation. The labels are what somebody sorted: nothing is known about
    the true ones, unless noise is injected here.

    Args:
        root: folder that holds ``train`` and ``test``.
        image_size: side of the square images in pixels.
        decode_size: side of the squares that are decoded, such as 256 for an image size of 224; None takes the image size.
        **kwargs: as for `NoisyDataModule`.

    Raises:
        ValueError: image_size is smaller than 1; later, if there are no classes, or a class has no images, or a test
            class is not a training class, or a file cannot be decoded.
        FileNotFoundError: later, if one of the folders does not exist.
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
        """The number of sub-folders of ``root/train``."""
        return len(self.class_names)

    @property
    def image_size(self) -> tuple[int, int]:
        """(side, side) in pixels."""
        return self._side, self._side

    @property
    def decode_size(self) -> tuple[int, int]:
        """(side, side) of the squares that are decoded, in pixels."""
        return self._decoded, self._decoded

    @property
    def class_names(self) -> list[str]:
        """The sub-folders of ``root/train``, sorted."""
        if self._class_names is None:
            self._class_names = self._folders("train")
        return list(self._class_names)

    @property
    def curated(self) -> bool:
        """False: folders hold real labels, right or wrong."""
        return False

    def load_train(self) -> Source:
        """The files of ``root/train``."""
        return self._list("train")

    def load_test(self) -> Source:
        """The files of ``root/test``."""
        return self._list("test")

    def _folders(self, part: str) -> list[str]:
        root = Path(self.root)
        layout = "images are expected in root/train/<class>/ and root/test/<class>/, check --data.root."
        if not root.is_dir():
            raise FileNotFoundError(f"The image folder {str(root)!r} does not exist: {layout}")
        if not (root / part).is_dir():
            raise FileNotFoundError(f"The image folder {str(root)!r} has no folder {part!r}: {layout}")
        names = sorted(path.name for path in (root / part).iterdir() if path.is_dir() and not path.name.startswith("."))
        if not names:
            raise ValueError(f"The folder {str(root / part)!r} has no class folders in it: {layout}")
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
                    f"The {part} class {name!r} is not among the {len(label_of)} training classes: rename or remove "
                    f"{str(folder)!r}."
                )
            files = sorted(p for p in folder.iterdir() if p.suffix.lower() in endings and not p.name.startswith("."))
            if not files:
                raise ValueError(f"The class folder {str(folder)!r} has no images in it: add some, or remove it.")
            paths.extend(files)
            labels.extend([label_of[name]] * len(files))
        return Source(torch.tensor(labels), _Files(paths, self._decoded))


class _Files:
    """Decodes file i when it is asked for."""

    def __init__(self, paths: list[Path], side: int) -> None:
        self.paths = paths
        self.side = side

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return read_image(self.paths[index], self.side)


def read_image(
    path: str | Path | BinaryIO, side: int, interpolation: TF.InterpolationMode = TF.InterpolationMode.BILINEAR
) -> Tensor:
    """Decodes an image file to a square RGB image; of an animation the first frame.

    Grey values of more than 8 bits are brought to 8: integers are taken to count to 65,535, or to their maximum if it
    is larger; floating values to count to 1, 255 or 65,535, the smallest that is not exceeded, or to their maximum.
    Negative values and NaN become black.

    Args:
        path: the file, or its content as a binary file object.
        side: S, pixels of the result.
        interpolation: of torchvision, for the resize.

    Returns:
        Shape (3, S, S), uint8.

    Raises:
        ValueError: the file cannot be decoded, or has more than ``MAX_PIXELS`` pixels; its name is given.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
            image.load()  # an orientation may stand behind the pixels
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1  # exif_transpose copies upright images too
            rgb = _to_rgb(ImageOps.exif_transpose(image) if turned else image)
    except UNREADABLE as error:
        raise ValueError(
            f"The image {str(path)!r} cannot be decoded ({str(error).rstrip('.')}): replace or remove the file."
        ) from error
    resized = TF.resize(rgb, [side], interpolation=interpolation, antialias=True)
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
    """Pillow itself would cut values off at 255."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64)).clip(min=0)
    largest = float(values.max())
    scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    scale = next((scale for scale in scales if largest <= scale), largest)
    return Image.fromarray((values * (255 / scale)).round().astype(np.uint8))
