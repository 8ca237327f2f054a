"""Atomic file writes, and checkpoints that are loaded without executing pickled code."""

import contextlib
import errno
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

__all__ = ["AtomicCheckpointIO", "atomic_write", "read_checkpoint", "require_folder"]

FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
"""Errors of a write that more disk space solves."""


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for an atomic write: the file is replaced only after its content is complete and flushed to disk.

    The content is written to ``<name>.tmp`` in the same folder, hence in the same file system, and renamed. A failed
    write removes the temporary file and keeps the previous file; a killed process leaves the temporary file, which the
    next write of the same name overwrites. Only one process may write a file at a time.

    Args:
        path: the file; missing folders are created.

    Raises:
        OSError: if the file cannot be written, for example because its folder is a file or the disk is full.
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
        kept = ", whose previous content is unchanged" if path.is_file() else ""
        remedy = "free disk space, or choose another folder" if error.errno in FULL else "choose another folder"
        raise OSError(
            f"expected a writable file, got {str(path)!r} ({error.strerror or error}){kept}; {remedy}"
        ) from error
    finally:
        if begun:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)


def require_folder(path: str | Path) -> None:
    """Check that a folder exists or can be created, and is writable.

    Raises:
        OSError: if the folder, or its nearest existing parent, is a file or is not writable.
    """
    here = Path(path).absolute()
    there = next(part for part in (here, *here.parents) if part.exists())
    if not there.is_dir():
        raise NotADirectoryError(
            f"expected a folder for the run in {str(path)!r}, got the file {str(there)!r}; choose another folder"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(
            f"expected a writable folder in {str(path)!r}, got {str(there)!r} without write permission; choose another "
            "folder"
        )


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint that contains tensors and built-in Python types only, without executing pickled code.

    Args:
        path: a file written by a ``Trainer``.
        map_location: as for ``torch.load``.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: if the file does not exist.
        IsADirectoryError: if it is a folder.
        ValueError: if the file is damaged, contains other objects, or is not a checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        inside = sorted(path.rglob("*.ckpt"), key=lambda file: (file.stem != "last", str(file)))
        advice = f"use {str(inside[0])!r}" if inside else "check --ckpt_path"
        what = "a folder" if inside else "a folder without checkpoints"
        raise IsADirectoryError(f"expected a checkpoint in {str(path)!r}, got {what}; {advice}")
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint in {str(path)!r}, got no such file; check --ckpt_path")
    try:
        held = torch.load(path, map_location=map_location, weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"expected a checkpoint of tensors and built-in types in {str(path)!r}, got a file that is damaged or "
            "contains other objects, none of which was loaded; resume from another checkpoint"
        ) from error
    except Exception as error:  # from torch.load: RuntimeError, EOFError, KeyError, ..., depending on the damage
        raise ValueError(
            f"expected a checkpoint in {str(path)!r}, got a file that is damaged or not a checkpoint "
            f"({_first_line(error)}); resume from another checkpoint"
        ) from error
    missing = [key for key in ("state_dict", "epoch", "global_step") if not isinstance(held, dict) or key not in held]
    if missing:
        raise ValueError(
            f"expected a checkpoint of a Trainer in {str(path)!r}, got a file without {', '.join(missing)}; load "
            "weights without a training state with sanm_lightning.models.load_weights"
        )
    checkpoint: dict[str, Any] = held
    return checkpoint


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint I/O with atomic writes, and reads that execute no pickled code.

    Lightning writes to the system's temporary folder and, if that is another file system, copies the result over the
    previous checkpoint: a full disk or a crash during the copy loses both. The command line uses this plugin;
    elsewhere, use ``Trainer(plugins=[AtomicCheckpointIO()])``. URLs (``s3://``) are handled by Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: if the file cannot be written; a previous checkpoint of the same name is kept.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = io.BytesIO()  # torch replaces the cause of a failed write by "unexpected pos"
        torch.save(checkpoint, content)
        with atomic_write(path) as file:
            file.write(content.getbuffer())

    def load_checkpoint(
        self, path: Any, map_location: Callable | None = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, see :func:`read_checkpoint`; ``weights_only=False`` unpickles everything, as in Lightning.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if the file is damaged, contains other objects, or is not a checkpoint.
        """
        if "://" in str(path) or weights_only is False:
            return super().load_checkpoint(path, map_location, weights_only)
        return read_checkpoint(path, map_location)
