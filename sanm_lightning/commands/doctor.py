"""``sanm doctor``: versions, devices, optional packages, and the data sets of a folder, as the package sees them."""

import os
import platform
import re
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

import torch
from packaging.requirements import Requirement

from sanm_lightning._version import __version__
from sanm_lightning.command_line.parsing import CommandParser
from sanm_lightning.data import ImageFolder

__all__ = ["Finding", "doctor", "find_data", "main"]

SHARED_MEMORY = Path("/dev/shm")
SMALL_SHARED_MEMORY = 2**30
"""Bytes below which workers that exchange batches may end with a bus error, as in a container with Docker's default."""

LAYOUTS = {  # files and folders of the official layouts, see docs/data-sets.md
    "CIFAR10": ("cifar-10-batches-py",),
    "CIFAR100": ("cifar-100-python",),
    "CIFAR10N": ("CIFAR-10_human.pt",),
    "CIFAR100N": ("CIFAR-100_human.pt",),
    "Animal10N": ("training", "testing"),
    "Clothing1M": ("noisy_train_key_list.txt", "images"),
    "WebVision": ("info/train_filelist_google.txt", "google"),
    "Food101N": ("Food-101N_release",),
}
"""Paths below the root of each data set that show its presence."""


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        part: what the line is about, such as ``torch``.
        text: what was found.
        fault: whether it prevents a training.
    """

    part: str
    text: str
    fault: bool = False


def doctor(data: str | None = None) -> int:
    """Print versions, devices, optional packages and, of a folder, the data sets; name what prevents a training.

    Args:
        data: folder that is searched for data sets: official layouts, or class folders. Nothing is decoded or downloaded;
            'sanm check-data' decodes every image.

    Returns:
        Exit status: 0 if nothing is faulty, 1 if a package is missing or too old, or the folder has no data set.

    Raises:
        NotADirectoryError: if the folder does not exist.
    """
    if data is not None and not Path(data).is_dir():
        raise NotADirectoryError(f"expected an existing folder for --data, got {data!r}; choose the folder of the data")
    found = [*_versions(), *_devices(), *_extras(), *(find_data(data) if data is not None else [])]
    width = max(len(finding.part) for finding in found)
    for finding in found:
        print(f"{finding.part.ljust(width)}  {'FAULT: ' if finding.fault else ''}{finding.text}")
    faults = sum(finding.fault for finding in found)
    print(f"{faults} {'fault' if faults == 1 else 'faults'}" if faults else "no faults")
    return int(faults > 0)


def _versions() -> Iterator[Finding]:
    """Compare the installed packages with the requirements of this package."""
    yield Finding("sanm-lightning", __version__)
    yield Finding("python", f"{platform.python_version()} on {platform.platform(terse=True)}")
    for needed in _requirements():
        if needed.marker is None:
            yield _package(needed)


def _requirements() -> list[Requirement]:
    """Return the requirements of this package, those of its extras with a marker; none where it is not installed."""
    try:
        return [Requirement(line) for line in requires("sanm-lightning") or []]
    except PackageNotFoundError:
        return []


def _package(needed: Requirement) -> Finding:
    try:
        installed = version(needed.name)
    except PackageNotFoundError:
        return Finding(needed.name, f"expected {needed.name}{needed.specifier}, got none; pip install '{needed}'", True)
    if not needed.specifier.contains(installed, prereleases=True):
        return Finding(
            needed.name,
            f"expected {needed.name}{needed.specifier}, got {installed}; pip install --upgrade '{needed}'",
            True,
        )
    return Finding(needed.name, installed)


def _devices() -> Iterator[Finding]:
    """Describe processors, accelerators and the memory that workers share."""
    yield Finding("processors", f"{os.cpu_count()}, {torch.get_num_threads()} threads of torch")
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            yield Finding(f"cuda:{number}", f"{card.name}, {card.total_memory / 2**30:.0f} GiB")
    elif torch.version.cuda is not None:
        yield Finding("cuda", f"none available to this build of torch for CUDA {torch.version.cuda}")
    if torch.backends.mps.is_available():
        yield Finding("mps", "available")
    if SHARED_MEMORY.is_dir():
        free = shutil.disk_usage(SHARED_MEMORY).free
        small = (
            "; small for --data.num_workers above 0, in a container set --shm-size"
            if free < SMALL_SHARED_MEMORY
            else ""
        )
        yield Finding("shared memory", f"{free / 2**30:.1f} GiB free in {SHARED_MEMORY}{small}")


def _extras() -> Iterator[Finding]:
    """List the optional packages; a missing one is no fault."""
    extras: dict[str, list[Requirement]] = {}
    for needed in _requirements():
        if named := re.search(r"extra == ['\"]([^'\"]+)", str(needed.marker or "")):
            extras.setdefault(named[1], []).append(needed)
    for extra, packages in extras.items():
        lacking = [needed.name for needed in packages if _package(needed).fault]
        text = (
            f"not installed ({', '.join(lacking)}); pip install 'sanm-lightning[{extra}]'" if lacking else "installed"
        )
        yield Finding(f"[{extra}]", text)


def find_data(root: str | Path) -> list[Finding]:
    """Find the data sets in a folder, and in the folders that it contains.

    Args:
        root: existing folder.

    Returns:
        One finding for each data set, or one fault.
    """
    folder = Path(root)
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    official = {place: list(_official(place)) for place in (folder, *inside)}
    found = [finding for findings in official.values() for finding in findings]
    # Folders with train/ are data sets of their own; otherwise, the folders inside may be classes.
    split = [place for place in inside if (place / "train").is_dir() and not official[place]]
    for place in split or ([] if found else [folder]):
        found += _image_folder(place)
    if found:
        return found
    return [
        Finding(
            "data",
            f"expected class folders of images or the layout of a known data set in {str(root)!r}, got neither; see "
            "docs/own-data.md and docs/data-sets.md",
            True,
        )
    ]


def _official(place: Path) -> Iterator[Finding]:
    for name, paths in LAYOUTS.items():
        if all((place / path).exists() for path in paths):
            yield Finding("data", f"{name} in {place}: --config configs/data/{name.lower()}.yaml --data.root {place}")


def _image_folder(place: Path) -> Iterator[Finding]:
    """Describe a folder of class folders, by its numbers of images."""
    data = ImageFolder(str(place), image_size=1)
    try:
        data.prepare_data()
        splits = {name: data.listing(name) for name in ("train", *data.own_splits)}
    except (OSError, ValueError):
        return
    if not splits["train"].files:
        return
    counts = ", ".join(f"{name} {len(listing.files)}" for name, listing in splits.items())
    classes = len(splits["train"].class_names)
    faults = [fault for listing in splits.values() for fault in listing.faults]
    text = f"ImageFolder in {place}: {classes} classes, images: {counts}"
    if classes < 2:
        yield Finding("data", f"expected two or more classes in {str(place)!r}, got one; add a class folder", True)
    elif faults:
        yield Finding("data", f"{text}; faults: {len(faults)}, see 'sanm check-data {place}'", True)
    else:
        yield Finding("data", f"{text}: --config configs/data/image_folder.yaml --data.root {place}")


def main(words: list[str]) -> int:
    """Parse the arguments of ``sanm doctor``, run it and return the exit status."""
    parser = CommandParser(prog="sanm doctor", description="Print versions, devices, optional packages and data sets.")
    parser.add_function_arguments(doctor, as_group=False, sub_configs=False)
    return doctor(**vars(parser.parse_args(words)))
