"""Compute pooled features of a frozen network, with a cache by image content."""

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

from sanm_lightning.data.image_folder import read_image, unreadable_reason
from sanm_lightning.models import Normalized
from sanm_lightning.safe_files import atomic_write, require_folder

__all__ = ["FeatureCache", "FeatureTable", "FrozenFeatures", "compute_features", "default_image_size"]

CACHE_VERSION = 3
"""Version of decoding and features; part of the fingerprint."""
DIGEST = 16
"""Size of the hash of the image content in bytes."""
THUMB = 16
"""Side of the thumbnails used to compare duplicates, in pixels."""


class FeatureTable(NamedTuple):
    """Features, hashes and thumbnails of N images, in the order of the set.

    Attributes:
        features: shape (N, D), float32; zero for unreadable images.
        digests: hash of the content, shape (N, 16), uint8.
        thumbs: thumbnails, shape (N, 16, 16, 3), uint8.
        unreadable: reasons by position.
    """

    features: np.ndarray[Any, Any]
    digests: np.ndarray[Any, Any]
    thumbs: np.ndarray[Any, Any]
    unreadable: dict[int, str]


def default_image_size(network: Normalized, sides: Sequence[int]) -> int:
    """Return the default input size of a frozen network in pixels.

    Small images are enlarged by a factor of at most three, and at most to the size that the network was trained on:
    networks for 224 pixels yield poor features of 32 pixels. Up to 160 pixels, larger inputs yielded better lists of
    CIFAR-10, and took longer (results/audit_image_size.json). Networks of a fixed input size, such as most transformers,
    use that size.

    Args:
        network: network from :func:`~sanm_lightning.models.load_pretrained`.
        sides: short sides of some of the images in pixels.
    """
    native = max(network.input_size or (224, 224))
    if (getattr(network.network, "pretrained_cfg", None) or {}).get("fixed_input_size"):
        return native
    wanted = 3 * sorted(sides)[len(sides) // 2] if sides else native
    return min(native, max(32, -(-wanted // 32) * 32))


class FrozenFeatures:
    """Pooled features of a frozen network.

    Args:
        network: network that takes images in [0, 1] and follows the conventions of timm.
        image_size: S, side of the images in pixels.

    Raises:
        ValueError: if the network does not return pooled features (B, D).
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
        """Compute features (B, D), float32, of images (B, 3, S, S), uint8, on the device of the network."""
        scaled = images.to(self.network.mean.device).float().div_(255)
        maps = self.network.forward_features(scaled)
        return self.network.forward_head(maps, pre_logits=True).float()

    def fingerprint(self) -> str:
        """Return a hash of the weights, the architecture and the image size."""
        content = hashlib.blake2b(
            f"{CACHE_VERSION} {self.image_size} {self.network.network}".encode(), digest_size=DIGEST
        )
        for name, tensor in self.network.state_dict().items():
            content.update(name.encode())
            content.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return content.hexdigest()


def _no_features(network: Normalized, image_size: int, got: str) -> str:
    return (
        f"expected pooled features (B, D) from forward_head(..., pre_logits=True) of {type(network.network).__name__} on "
        f"images of {image_size} pixels, got {got}; use a network with global pooling, or another image_size"
    )


class FeatureCache:
    """Cache of features by content, in a folder of files that are written atomically.

    Args:
        folder: folder of this network and image size.
        num_features: D, number of features.
        say: function called with one line for each damaged part, which is ignored and computed again.

    Raises:
        ValueError: if the folder contains other files.
        OSError: if the folder is not writable.
    """

    def __init__(self, folder: Path, num_features: int, say: Callable[[str], None] = lambda line: None) -> None:
        self.folder = folder
        require_folder(folder)
        self.parts = sorted(folder.glob("part-*.npz")) if folder.is_dir() else []
        found = folder.iterdir() if folder.is_dir() else ()
        others = [path.name for path in found if not path.name.startswith("part-")]
        if others:
            raise ValueError(
                f"expected a folder of cached features in {str(folder)!r}, got other files such as {others[0]!r}; use another "
                "cache folder"
            )
        self.place: dict[bytes, tuple[int, int]] = {}
        for number, path in enumerate(self.parts):
            digests = _digests_of(path, num_features)
            if digests is None:
                say(f"cache: {path} is damaged and ignored")
            else:
                self.place.update({row.tobytes(): (number, i) for i, row in enumerate(digests)})

    def __len__(self) -> int:
        return len(self.place)

    def fill(self, digests: np.ndarray[Any, Any], features: Any, thumbs: Any) -> None:
        """Copy cached rows into ``features`` (N, D) and ``thumbs`` (N, 16, 16, 3)."""
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
        """Save new rows as one file."""
        if not len(digests):
            return
        name = hashlib.blake2b(digests.tobytes(), digest_size=8).hexdigest()
        path = self.folder / f"part-{name}.npz"
        with atomic_write(path) as file:
            np.savez(file, digests=digests, features=features, thumbs=thumbs)
        self.place.update({row.tobytes(): (len(self.parts), i) for i, row in enumerate(digests)})
        self.parts.append(path)


def _digests_of(path: Path, num_features: int) -> np.ndarray[Any, Any] | None:
    """Return the digests of a cache file; None if it is damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as part:  # np.load leaves damaged files open
            digests: np.ndarray[Any, Any] = part["digests"]
            shapes = part["features"].shape, part["thumbs"].shape  # reads both arrays, and with them their checksums
    except Exception:  # the exception depends on the position of the damage
        return None
    size = len(digests)
    whole = digests.shape == (size, DIGEST) and shapes == ((size, num_features), (size, THUMB, THUMB, 3))
    return digests if whole else None


class _Item(NamedTuple):
    """Result of a worker for one image."""

    row: int
    digest: bytes
    image: Tensor | None
    thumb: Tensor | None
    reason: str | None


class _Decoded(Dataset[_Item]):
    """Data set that hashes images, and decodes those not in the cache; runs in the workers."""

    def __init__(self, images: Any, image_size: int, known: Any) -> None:
        self.images, self.image_size, self.known = images, image_size, known

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> _Item:
        try:
            source = self.images[row]
        except ValueError as error:  # raised by data modules that decode files
            return _Item(row, _digest(row, b""), None, None, unreadable_reason(error))
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
            return _Item(row, digest, None, None, unreadable_reason(error))
        thumb = torch.nn.functional.adaptive_avg_pool2d(image.float(), THUMB).round().to(torch.uint8)
        return _Item(row, digest, image, thumb, None)

    def _square(self, content: Any) -> Tensor:
        if not isinstance(content, Tensor):
            return read_image(content, self.image_size, InterpolationMode.BICUBIC)
        resized = TF.resize(content, [self.image_size], InterpolationMode.BICUBIC, antialias=True)
        square: Tensor = TF.center_crop(resized, [self.image_size, self.image_size])
        return square


def _digest(kind: Any, content: bytes) -> bytes:
    return hashlib.blake2b(str(kind).encode("utf-8", "surrogateescape") + content, digest_size=DIGEST).digest()


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
    """Compute the features of a set that are not in the cache; completed work is saved on interruption.

    Args:
        images: N paths, or a map-style data set of uint8 tensors (3, H, W).
        network: the frozen network.
        cache: folder of all caches, with a subfolder for each network and image size.
        into: output array (N, D), float32, such as a memory map.
        batch_size: number of images per forward pass.
        num_workers: number of worker processes that read, hash and decode.
        progress: function called with the number of processed images and the number of images passed to the network.
        say: function called with one line for each damaged part of the cache.

    Raises:
        ValueError: if the cache folder contains other files.
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
