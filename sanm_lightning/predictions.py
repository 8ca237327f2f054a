"""Write predictions as CSV files with the predicted class and the probabilities of all classes of each image."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from sanm_lightning.class_names import named_classes
from sanm_lightning.csv_tables import write_csv
from sanm_lightning.data import NoisyDataModule
from sanm_lightning.random_streams import several_processes

__all__ = ["PredictionRecord", "write_predictions"]

Array = np.ndarray[Any, Any]


def write_predictions(
    path: str | Path,
    keys: Mapping[str, Sequence[str]],
    probabilities: Array,
    class_names: Sequence[str],
    errors: Mapping[int, str] | None = None,
) -> None:
    """Write a CSV file atomically, with the columns of ``keys``, predicted_label, confidence and ``p_<class name>``.

    Args:
        path: output file; an existing file is replaced.
        keys: columns that identify the samples, N strings each, by header.
        probabilities: shape (N, C), in [0, 1].
        class_names: C names.
        errors: reasons for missing predictions by row, which are written to a last column ``error``; None omits this
            column.

    Raises:
        OSError: if the file cannot be written.
    """
    header = [*keys, "predicted_label", "confidence", *(f"p_{name}" for name in class_names)]
    failed = errors or {}

    def rows() -> Any:
        for number, row in enumerate(probabilities):
            key = [column[number] for column in keys.values()]
            if number in failed:
                yield [*key, *[""] * (2 + len(class_names)), failed[number]]
                continue
            cells = [f"{value:.6f}" for value in row.tolist()]
            found = [class_names[int(row.argmax())], f"{row.max():.6f}", *cells]
            yield [*key, *found, *([] if errors is None else [""])]

    write_csv(path, header if errors is None else [*header, "error"], rows())


class PredictionRecord(L.Callback):
    """Write ``predictions.csv`` with the predictions of all processes to the run directory after ``predict``.

    Rows are identified by ``path`` if the data module has files, otherwise by ``index``, the position in the original set or
    in the order of the loader. With several loaders, a column ``set`` contains the name of the loader. An existing file is
    kept, and the new file is ``predictions_1.csv``. Requires a module whose ``predict_step`` returns a mapping with
    ``probabilities`` (B, C), as do all methods of this package; has no effect with ``fast_dev_run``.
    """

    def __init__(self) -> None:
        self._parts: dict[int, list[tuple[Array, Array]]] = {}
        self._splits: dict[int, str | None] = {}

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Clear the predictions."""
        self._parts = {}

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Collect the predictions of a batch."""
        found = outputs.get("probabilities") if isinstance(outputs, Mapping) else None
        if not isinstance(found, Tensor) or found.ndim != 2:
            return
        parts = self._parts.setdefault(dataloader_idx, [])
        index = outputs.get("index")
        if index is None:  # samples are distributed over the processes in turn
            served = sum(len(rows) for rows, _ in parts)
            index = (served + torch.arange(len(found))) * trainer.world_size + trainer.global_rank
        parts.append((index.cpu().numpy(), found.float().cpu().numpy()))
        self._splits[dataloader_idx] = getattr(trainer.datamodule, "served_split", None)  # type: ignore[attr-defined]

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the file. Collective operation."""
        mine = {loader: tuple(map(np.concatenate, zip(*parts, strict=True))) for loader, parts in self._parts.items()}
        self._parts = {}
        shares: list[Any] = [mine]
        if several_processes():
            shares = [None] * trainer.world_size
            torch.distributed.all_gather_object(shares, mine)
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # a broadcast, which every rank must call
        loaders = sorted({loader for share in shares for loader in share})
        if not trainer.is_global_zero or trainer.fast_dev_run or not loaders:
            return
        if not getattr(pl_module, "trains_classifier", True):
            rank_zero_info(f"{type(pl_module).__name__} trains no classifier; predictions.csv is not written")
            return
        data = trainer.datamodule
        keys: dict[str, list[str]] = {}
        tables: list[Any] = []
        for loader in loaders:
            index, rows = (
                np.concatenate(parts) for parts in zip(*(s[loader] for s in shares if loader in s), strict=True)
            )
            index, first = np.unique(index, return_index=True)  # sorted, without duplicates added by a sampler
            split = self._splits.get(loader)
            heading, names = _sample_names(data, split, index)
            columns = {heading: names} | ({"set": [split or str(loader)] * len(names)} if len(loaders) > 1 else {})
            done = sum(map(len, tables))
            for name in {**keys, **columns}:  # empty where the samples of a loader have no such name
                keys.setdefault(name, [""] * done).extend(columns.get(name, [""] * len(names)))
            tables.append(rows[first])
        probabilities = np.concatenate(tables)
        names = named_classes(data) or getattr(pl_module, "class_names", None) or []
        if len(names) != probabilities.shape[1]:
            names = [str(label) for label in range(probabilities.shape[1])]
        path = _free(folder / "predictions.csv")
        write_predictions(path, keys, probabilities, names)
        rank_zero_info(f"predictions of {len(probabilities)} samples: {path}")


def _sample_names(data: Any, split: str | None, index: Array) -> tuple[str, list[str]]:
    """Return header and values of the column that identifies samples at positions of a split, or of another loader."""
    if split is None or not isinstance(data, NoisyDataModule):
        return "index", [str(number) for number in index.tolist()]
    paths = data.sample_paths(split)
    if paths is not None:
        return "path", [paths[number] for number in index.tolist()]
    return "index", [str(number) for number in data.table(split).origin[torch.from_numpy(index)].tolist()]


def _free(path: Path) -> Path:
    """Return the path of a new file: the given path, or one with a number."""
    number, free = 0, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}_{number}{path.suffix}")
    return free
