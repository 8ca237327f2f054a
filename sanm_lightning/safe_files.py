"""Files that are there whole or not at all, and checkpoints that open without running anybody's code."""

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

__all__ = ["AtomicCheckpointIO", "atomic_write", "read_checkpoint", "require_folder"]


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name when it is complete and on the disk, and not before.

    What is written goes to ``<name>.tmp`` in the same folder: the name changes hands within one file system, in one step. A
    failed write takes its draft away and leaves what was there before; a killed one leaves the draft, which the next write
    of the same name replaces. Only one process may write a name at a time.

    Args:
        path: the file; missing folders are made.

    Raises:
        OSError: it cannot be written: the folder is a file, the disk is full, and the like. One sentence.
    """
    path = Path(path)
    draft = path.with_name(path.name + ".tmp")
    begun = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            begun = True
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        raise OSError(
            f"{str(path)!r} cannot be written ({error.strerror or error}); what was there before is untouched; make room, or "
            "name another folder"
        ) from error
    finally:
        if begun:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)


def require_folder(path: str | Path) -> None:
    """Refuse a folder that could not be written to, before hours of training are to be saved in it.

    Raises:
        OSError: it, or what it would be made in, is a file or must not be written.
    """
    here = Path(path).absolute()
    there = next(part for part in (here, *here.parents) if part.exists())
    if not there.is_dir():
        raise NotADirectoryError(
            f"expected a folder for the run in {str(path)!r}, but {str(there)!r} is a file; name another"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(
            f"expected a folder that may be written in {str(path)!r}, but {str(there)!r} is not; name one"
        )


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint that holds tensors and plain Python only; whatever else it may hold is not executed.

    Args:
        path: a file that a ``Trainer`` wrote.
        map_location: as for ``torch.load``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, holds other things than tensors and plain Python, or is not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint in {str(path)!r}, where there is no file; check --ckpt_path")
    try:
        held = torch.load(path, map_location=map_location, weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"expected a checkpoint of tensors and plain Python in {str(path)!r}, got a file that is damaged or holds other "
            "objects, none of which was loaded; resume from another checkpoint"
        ) from error
    except Exception as error:  # torch.load's own: RuntimeError, EOFError, KeyError, ... by the place of the damage
        raise ValueError(
            f"expected a checkpoint in {str(path)!r}, which cannot be read ({_first_line(error)}): it is damaged or no "
            "checkpoint; resume from another one"
        ) from error
    missing = [key for key in ("state_dict", "epoch", "global_step") if not isinstance(held, dict) or key not in held]
    if missing:
        raise ValueError(
            f"expected a checkpoint that a Trainer wrote in {str(path)!r}, got a file without {', '.join(missing)}; weights "
            "alone cannot be resumed from, sanm_lightning.models.load_weights reads them"
        )
    return held  # type: ignore[no-any-return]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are written whole or not at all, and read without unpickling code.

    Lightning's own writing goes through the system's folder of temporary files, and from there, where that is another file
    system, by copying over the checkpoint that was there before: a full disk or a crash in the middle costs both. The command
    line uses this one; give ``Trainer(plugins=[AtomicCheckpointIO()])`` for the same elsewhere. Paths that are URLs
    (``s3://``) are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: it cannot be written; a checkpoint of that name that was there before still is.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = io.BytesIO()  # torch would turn the reason of a failed write into "unexpected pos"
        torch.save(checkpoint, content)
        with atomic_write(path) as file:
            file.write(content.getbuffer())

    def load_checkpoint(
        self, path: Any, map_location: Callable | None = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, see :func:`read_checkpoint`; ``weights_only=False`` trusts the file, as Lightning does.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, holds more than tensors and plain Python, or is no checkpoint.
        """
        if "://" in str(path) or weights_only is False:
            return super().load_checkpoint(path, map_location, weights_only)
        return read_checkpoint(path, map_location)
