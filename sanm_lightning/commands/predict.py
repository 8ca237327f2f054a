"""``sanm predict --images``: predict the classes of image files with the settings of a checkpoint."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sanm_lightning.command_line.parsing import CommandParser
from sanm_lightning.data.decode import ImageFileList, unreadable_reason
from sanm_lightning.data.image_files import count_passed_over, list_class_folder, name_passed_over
from sanm_lightning.data.policies import center_crop
from sanm_lightning.methods import NoisyLabelModule
from sanm_lightning.predictions import write_predictions
from sanm_lightning.predictor import Predictor, load_method
from sanm_lightning.processing import default_num_workers, find_device
from sanm_lightning.safe_files import require_folder

__all__ = ["main", "predict"]

SHOWN = 10
"""Maximum number of unreadable files that are printed."""


def predict(
    ckpt_path: str,
    images: list[str],
    out: str = "predictions.csv",
    overwrite: bool = False,
    batch_size: int = 64,
    num_workers: int | None = None,
    device: str = "auto",
    method: type[NoisyLabelModule] | None = None,
) -> int:
    """Write the predicted classes and class probabilities of images to a CSV file.

    Args:
        ckpt_path: checkpoint of a method of this package.
        images: folders, which are searched recursively, and image files.
        out: output CSV file.
        overwrite: whether an existing CSV file is replaced.
        batch_size: number of images per forward pass, 1 or more.
        num_workers: number of worker processes that decode images. Default: one per CPU, up to four, none for one CPU.
        device: ``auto``, ``cpu``, ``cuda``, ...
        method: class of a custom method, such as ``my_module.MyMethod``, for its checkpoints.

    Returns:
        Exit status, 0.

    Raises:
        ValueError: if there are no images, the file is not a checkpoint of a method, or an argument is out of range.
        OSError: if a file is missing, already exists, or cannot be written.
    """
    if batch_size < 1 or (num_workers is not None and num_workers < 0):
        raise ValueError(
            f"expected batch_size of 1 or more and num_workers of 0 or more, got {batch_size} and {num_workers}; choose larger "
            "numbers"
        )
    require_new_file(out, overwrite)
    trained = load_method(ckpt_path, method)
    predictor = Predictor(trained.module)
    target = find_device(device)
    console = Console(highlight=False, soft_wrap=True)
    files, names = _list(images, console)
    workers = default_num_workers() if num_workers is None else num_workers
    decoded = _Decoded(
        ImageFileList(files, trained.decode_size, trained.channels, trained.resize), predictor.image_size
    )
    loader: Any = DataLoader(decoded, batch_size, num_workers=workers, collate_fn=list)
    probabilities = np.zeros((len(files), len(trained.class_names)), np.float32)
    errors: dict[int, str] = {}
    columns = (TextColumn("predict"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("predict", total=len(files))
        for rows, found, failed in _predicted(predictor.to(target), loader, target):
            if found is not None:
                probabilities[rows] = found
            errors.update(failed)
            bar.advance(task, len(rows) + len(failed))
    write_predictions(out, {"path": names}, probabilities, trained.class_names, errors)
    for row in list(errors)[:SHOWN]:
        console.print(f"unreadable: {names[row]} ({errors[row]})", markup=False)
    more = f", {len(errors)} unreadable (column error)" if errors else ""
    console.print(f"{len(files) - len(errors)} images predicted{more}: {out}", markup=False)
    return 0


def require_new_file(path: str | Path, overwrite: bool) -> None:
    """Check that a file can be written.

    Raises:
        OSError: if the file exists and ``overwrite`` is False, or cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"expected a file name in {str(path)!r}, got a folder; use a file in it")
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"expected a new file in {str(path)!r}, got an existing file; use another --out, or --overwrite true"
        )
    require_folder(path.absolute().parent)


def _list(given: Sequence[str], console: Console) -> tuple[list[Path], list[str]]:
    """Return the image files and their names in the table, which are relative to the folder if there is only one."""
    files: dict[str, Path] = {}
    for place in map(Path, given):
        if place.is_dir():
            folder = list_class_folder(place)
            if folder.passed_over:
                console.print(f"{place}: {count_passed_over(folder.passed_over)}", markup=False)
                console.print(f"{place}: {name_passed_over(folder.passed_over, place)}", markup=False)
            for path in folder.files:
                files[(path.relative_to(place) if len(given) == 1 else path).as_posix()] = path
        elif place.is_file():
            files[place.as_posix()] = place
        else:
            raise FileNotFoundError(f"expected a folder or an image in {str(place)!r}, got none; check --images")
    if not files:
        raise ValueError(f"expected images in {', '.join(map(repr, given))}, got none; check --images")
    return list(files.values()), list(files)


class _Item(NamedTuple):
    """Result of a worker: an image (C, H, W), uint8, or the reason why it is unreadable."""

    row: int
    image: Tensor | None
    reason: str


class _Decoded(Dataset[_Item]):
    """Data set of images decoded as in evaluation."""

    def __init__(self, files: ImageFileList, image_size: tuple[int, int]) -> None:
        self.files, self.image_size = files, image_size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> _Item:
        try:
            image = self.files[row]
        except ValueError as error:
            return _Item(row, None, unreadable_reason(error))
        return _Item(row, center_crop(image[None], self.image_size)[0], "")


def _predicted(
    predictor: Predictor, loader: Any, device: torch.device
) -> Iterator[tuple[list[int], np.ndarray[Any, Any] | None, dict[int, str]]]:
    """Yield the readable rows of each batch, their probabilities if there are any, and the reasons of unreadable rows."""
    for items in loader:
        read = [item for item in items if item.image is not None]
        found = None
        if read:
            with torch.inference_mode():
                found = predictor(torch.stack([item.image for item in read]).to(device)).cpu().numpy()
        yield [item.row for item in read], found, {item.row: item.reason for item in items if item.image is None}


def main(words: list[str]) -> int:
    """Parse the arguments of ``sanm predict --images``, run it and return the exit status."""
    parser = CommandParser(
        prog="sanm predict --images", description="Write the predicted classes of images to a CSV file."
    )
    parser.add_argument("--images", nargs="+", required=True, type=str, help="folders and image files")
    parser.add_function_arguments(predict, skip={"images"}, as_group=False)
    return predict(**parser.instantiate_classes(parser.parse_args(words)).as_dict())
