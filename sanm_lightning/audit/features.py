"""Pooled features of a frozen network for a set of images, computed once per content and kept in a cache."""

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision.transforms.functional as TF
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode

from sanm_lightning.data.image_folder import read_image
from sanm_lightning.models import Normalized
from sanm_lightning.safe_files import atomic_write, require_folder

__all__ = ["FeatureCache", "FeatureTable", "FrozenFeatures", "compute_features", "default_image_size"]

DIGEST = 16
"""Bytes of the hash of an image's content."""
THUMB = 16
"""Side in pixels of the small copies that duplicates are compared on."""


class FeatureTable(NamedTuple):
    """What is known of N images, in the order of the set.

    Attributes:
        features: shape (N, D), float32; zero where an image could not be read.
        digests: hash of the content, shape (N, 16), uint8.
        thumbs: small copies, shape (N, 16, 16, 3), uint8.
        unreadable: reasons by position.
    """

    features: np.ndarray[Any, Any]
    digests: np.ndarray[Any, Any]
    thumbs: np.ndarray[Any, Any]
    unreadable: dict[int, str]


def default_image_size(network: Normalized, sides: Sequence[int]) -> int:
    """Return the side in pixels at which images are shown to a frozen network.

    Small images are enlarged, at most three times and to the size that the network was trained on: a network for 224 pixels
    sees nothing in 32, and pixels beyond the content cost time only. Networks of one size, as most transformers, get that.

    Args:
        network: from :func:`~sanm_lightning.models.load_pretrained`.
        sides: shorter sides of some of the images in pixels.
    """
    native = max(network.input_size or (224, 224))
    if (getattr(network.network, "pretrained_cfg", None) or {}).get("fixed_input_size"):
        return native
    wanted = 3 * sorted(sides)[len(sides) // 2] if sides else native
    return min(native, max(32, -(-wanted // 32) * 32))


class FrozenFeatures:
    """Pooled features of a network that is not trained.

    Args:
        network: takes images in [0, 1]; by timm's conventions.
        image_size: S, side of the images in pixels.

    Raises:
        ValueError: if the network yields no pooled features (B, D).
    """

    def __init__(self, network: Normalized, image_size: int) -> None:
        self.network = network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.image_size = image_size
        try:
            found = self(torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8))
        except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
            what = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            raise ValueError(_no_features(network, image_size, what)) from error
        if found.ndim != 2:
            raise ValueError(_no_features(network, image_size, f"a tensor of shape {tuple(found.shape)}"))
        self.num_features = found.shape[1]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S), uint8 -> features (B, D), float32, on the device of the network."""
        scaled = images.to(self.network.mean.device).float().div_(255)
        maps = self.network.forward_features(scaled)
        return self.network.forward_head(maps, pre_logits=True).float()

    def fingerprint(self) -> str:
        """Return a hash of the weights, the architecture and the image size."""
        content = hashlib.blake2b(f"2 {self.image_size} {self.network.network}".encode(), digest_size=DIGEST)
        for name, tensor in self.network.state_dict().items():
            content.update(name.encode())
            content.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return content.hexdigest()


def _no_features(network: Normalized, image_size: int, got: str) -> str:
    return (
        f"expected pooled features (B, D) from forward_head(..., pre_logits=True) of {type(network.network).__name__} on "
        f"images of {image_size} pixels, got {got}; choose a network with global pooling, or another image_size"
    )


class FeatureCache:
    """Features by content, in a folder; each part is a file that is written completely or not at all.

    Args:
        folder: of this network and image size.
        num_features: D.
        say: called with one line for each damaged part, which is passed over; what it held is computed again.

    Raises:
        ValueError: if the folder holds other files.
        OSError: if the folder cannot be written to.
    """

    def __init__(self, folder: Path, num_features: int, say: Callable[[str], None] = lambda line: None) -> None:
        self.folder = folder
        require_folder(folder)
        self.parts = sorted(folder.glob("part-*.npz")) if folder.is_dir() else []
        found = folder.iterdir() if folder.is_dir() else ()
        others = [path.name for path in found if not path.name.startswith("part-")]
        if others:
            raise ValueError(
                f"expected a folder of cached features in {str(folder)!r}, got other files such as {others[0]!r}; name another "
                "cache folder"
            )
        self.place: dict[bytes, tuple[int, int]] = {}
        for number, path in enumerate(self.parts):
            digests = _digests_of(path, num_features)
            if digests is None:
                say(f"cache: {path} is damaged and passed over")
            else:
                self.place.update({row.tobytes(): (number, i) for i, row in enumerate(digests)})

    def __len__(self) -> int:
        return len(self.place)

    def fill(self, digests: np.ndarray[Any, Any], features: Any, thumbs: Any) -> None:
        """Write the rows that are known into ``features`` (N, D) and ``thumbs`` (N, 16, 16, 3), part by part."""
        by_part: dict[int, list[tuple[int, int]]] = {}
        for row, digest in enumerate(digests):
            found = self.place.get(digest.tobytes())
            if found is not None:
                by_part.setdefault(found[0], []).append((row, found[1]))
        for number, pairs in by_part.items():
            rows, places = (list(column) for column in zip(*pairs, strict=True))
            with np.load(self.parts[number], allow_pickle=False) as part:
                features[rows] = part["features"][places]
                thumbs[rows] = part["thumbs"][places]

    def add(self, digests: np.ndarray[Any, Any], features: np.ndarray[Any, Any], thumbs: np.ndarray[Any, Any]) -> None:
        """Save new rows as one part."""
        if not len(digests):
            return
        name = hashlib.blake2b(digests.tobytes(), digest_size=8).hexdigest()
        path = self.folder / f"part-{name}.npz"
        with atomic_write(path) as file:
            np.savez(file, digests=digests, features=features, thumbs=thumbs)
        self.place.update({row.tobytes(): (len(self.parts), i) for i, row in enumerate(digests)})
        self.parts.append(path)


def _digests_of(path: Path, num_features: int) -> np.ndarray[Any, Any] | None:
    """Return the digests of a part of the cache; None where it is damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as part:  # np.load leaves damaged files open
            digests: np.ndarray[Any, Any] = part["digests"]
            shapes = part["features"].shape, part["thumbs"].shape  # reads them: a checksum stands at the end of each
    except Exception:  # of the file system, zip, or the format of arrays: by the place of the damage
        return None
    size = len(digests)
    whole = digests.shape == (size, DIGEST) and shapes == ((size, num_features), (size, THUMB, THUMB, 3))
    return digests if whole else None


class _Item(NamedTuple):
    """What a worker returns for an image."""

    row: int
    digest: bytes
    image: Tensor | None
    thumb: Tensor | None
    reason: str | None


class _Decoded(Dataset[_Item]):
    """Hash images, and decode those that are not known; runs in the workers."""

    def __init__(self, images: Any, image_size: int, known: Any) -> None:
        self.images, self.image_size, self.known = images, image_size, known

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> _Item:
        try:
            source = self.images[row]
        except ValueError as error:  # of a data module that decodes files
            return _Item(row, _digest(row, b""), None, None, _reason(error))
        if isinstance(source, Tensor):
            digest = _digest(source.shape, source.contiguous().numpy().tobytes())
            content: Any = source
        else:
            try:
                data = Path(source).read_bytes()
            except OSError as error:
                return _Item(row, _digest(str(source), b""), None, None, error.strerror or str(error))
            digest, content = _digest("", data), io.BytesIO(data)
        if digest in self.known:
            return _Item(row, digest, None, None, None)
        try:
            image = self._square(content)
        except ValueError as error:
            return _Item(row, digest, None, None, _reason(error))
        thumb = torch.nn.functional.adaptive_avg_pool2d(image.float(), THUMB).round().to(torch.uint8)
        return _Item(row, digest, image, thumb, None)

    def _square(self, content: Any) -> Tensor:
        if not isinstance(content, Tensor):
            return read_image(content, self.image_size, InterpolationMode.BICUBIC)
        resized = TF.resize(content, [self.image_size], InterpolationMode.BICUBIC, antialias=True)
        square: Tensor = TF.center_crop(resized, [self.image_size, self.image_size])
        return square


def _reason(error: ValueError) -> str:
    return str(error.__cause__ or error).rstrip(".")


def _digest(kind: Any, content: bytes) -> bytes:
    return hashlib.blake2b(str(kind).encode() + content, digest_size=DIGEST).digest()


def compute_features(
    images: Any,
    network: FrozenFeatures,
    cache: Path,
    into: np.ndarray[Any, Any],
    batch_size: int = 64,
    num_workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> FeatureTable:
    """Compute the features of a set, those in the cache excepted; what is done is kept when the work is interrupted.

    Args:
        images: N paths, or a map-style data set of uint8 tensors (3, H, W).
        network: the frozen network.
        cache: folder of all caches; each network and image size has its own within.
        into: array (N, D), float32, that is filled, such as a memory map.
        batch_size: images per forward.
        num_workers: processes that read, hash and decode.
        progress: called with (images done, images that the network was run on).
        say: called with one line for each damaged part of the cache.

    Raises:
        ValueError: if the cache folder holds other files.
        OSError: if the cache cannot be written.
    """
    held = FeatureCache(cache / network.fingerprint(), network.num_features, say)
    size = len(images)
    digests = np.zeros((size, DIGEST), np.uint8)
    thumbs = np.zeros((size, THUMB, THUMB, 3), np.uint8)
    unreadable: dict[int, str] = {}
    known = frozenset(held.place)
    loader: Any = DataLoader(
        _Decoded(images, network.image_size, known), batch_size, num_workers=num_workers, collate_fn=list
    )
    fresh: list[int] = []
    run = done = 0
    try:
        for items in loader:
            for item in items:
                digests[item.row] = np.frombuffer(item.digest, np.uint8)
                if item.reason is not None:
                    unreadable[item.row] = item.reason
            new = [item for item in items if item.image is not None]
            if new:
                rows = [item.row for item in new]
                into[rows] = network(torch.stack([item.image for item in new])).cpu().numpy()
                thumbs[rows] = torch.stack([item.thumb for item in new]).permute(0, 2, 3, 1).numpy()
                fresh += rows
            if len(fresh) >= 1024:
                held.add(digests[fresh], into[fresh], thumbs[fresh])
                fresh = []
            done, run = done + len(items), run + len(new)
            if progress is not None:
                progress(done, run)
    finally:
        held.add(digests[fresh], into[fresh], thumbs[fresh])
    held.fill(digests, into, thumbs)
    return FeatureTable(into, digests, thumbs, unreadable)
