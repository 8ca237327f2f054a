"""Save the settings of a run in its checkpoints, and compare them when the run is resumed."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

__all__ = ["RunSettings", "refuse_other_settings"]

# Data settings that affect neither the samples nor their order and may differ between machines.
FREE = {"data.root", "data.file", "data.num_workers", "data.resident_bytes", "data.eval_batch_size", "data.track_test"}
# Trainer settings that are taken from the command line of the resumed run; a change affects the result, so it is
# reported.
TOLD = (
    "accumulate_grad_batches", "deterministic", "gradient_clip_algorithm", "gradient_clip_val", "limit_train_batches",
    "overfit_batches", "precision", "sync_batchnorm",
)  # fmt: skip


def plain(value: Any) -> Any:
    """Convert parsed settings to dicts, lists and scalars, which can be saved in a checkpoint and compared."""
    if hasattr(value, "as_dict"):
        value = value.as_dict()
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    if isinstance(value, os.PathLike):
        return str(value)
    named = value if hasattr(value, "__qualname__") else type(value)  # the repr of a function contains its address
    return f"{named.__module__}.{named.__qualname__}"


def named(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the settings of an object by option name: ``model``, ``model.optimizer``, ``model.optimizer.lr``."""
    if not isinstance(value, dict) or "class_path" not in value:
        yield name, value
        return
    yield name, value["class_path"]
    for part in ("init_args", "dict_kwargs"):
        for key, inner in (value.get(part) or {}).items():
            yield from named(inner, f"{name}.{key}")


def refuse_other_settings(now: Mapping[str, Any], then: Mapping[str, Any]) -> None:
    """Compare settings of model, data and seed with those saved in a checkpoint.

    Args:
        now: ``{"model": ..., "data": ..., "seed_everything": ...}``, or a subset; complete, or only the given settings.
        then: the same from the checkpoint. Settings missing from either are not compared.

    Raises:
        ValueError: if settings differ that cannot change in a resumed run; the message lists all of them.
    """
    found = []
    for part in ("model", "data", "seed_everything"):
        before = dict(named(then.get(part), part))
        for name, value in named(now[part], part) if now.get(part) is not None else ():
            if name not in FREE and name in before and before[name] != value:
                found.append(f"{name} {value!r} (the checkpoint: {before[name]!r})")
    if found:
        raise ValueError(
            f"expected the settings of the checkpoint, got {', '.join(found)}; use the values of the checkpoint, or "
            "start a new run without --ckpt_path"
        )


class RunSettings(L.Callback):
    """Save the settings of a run in its checkpoints, and compare them when a run is resumed.

    Settings of the trainer are taken from the resumed run; a change that affects the result raises a warning.

    Args:
        settings: ``{"model": ..., "data": ..., "seed_everything": ..., "trainer": ...}``, built-in Python types.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = plain(settings)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the settings, under ``settings``, the number of processes, and the name of the run directory."""
        run = getattr(trainer.logger, "version", None)
        name = f"version_{run}" if isinstance(run, int) else run
        checkpoint["settings"] = {**self.settings, "processes": trainer.world_size, "run": name}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare the settings; an evaluation compares those of the model only.

        Raises:
            ValueError: if model, data or seed differ.
        """
        then, now = checkpoint.get("settings"), self.settings
        if then is None:
            return
        fitting = trainer.state.fn == TrainerFn.FITTING
        refuse_other_settings(now if fitting else {"model": now["model"]}, then)
        before, after = ({**(part.get("trainer") or {})} for part in (then, now))
        before["processes"], after["processes"] = then.get("processes"), trainer.world_size
        other = [
            f"{name} {before[name]} -> {after.get(name)}"
            for name in (*TOLD, "processes")
            if before.get(name) != after.get(name)
        ]
        if fitting and other:
            rank_zero_warn(
                f"expected the trainer settings of the checkpoint, got {', '.join(other)}; the resumed run uses the "
                "new values"
            )


def settings_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings saved in a checkpoint; a subset, if it was not written by the command line."""
    if "settings" in checkpoint:
        return dict(checkpoint["settings"])
    # Saved hyper-parameters of a pre-trained network differ from the given ones, to avoid a second download.
    unsure = ("network_args", "mean", "std", "num_classes", "image_size")
    known = {
        key: plain(value)
        for key, value in (checkpoint.get("hyper_parameters") or {}).items()
        if key[0] != "_" and key not in unsure and isinstance(value, (bool, int, float, str, list, dict, tuple, Path))
    }
    return {"model": {"class_path": None, "init_args": known}}
