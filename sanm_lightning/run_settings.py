"""Save the settings of a run in its checkpoints, and compare them when the run is resumed."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

__all__ = ["RunSettings", "refuse_other_settings"]

# Data settings that change neither the samples nor their order: another machine may want others.
FREE = {"data.root", "data.file", "data.num_workers", "data.resident_bytes", "data.eval_batch_size", "data.track_test"}
# Trainer settings that a resumed run takes as they are given now, and whose change makes it another run.
TOLD = (
    "accumulate_grad_batches", "deterministic", "gradient_clip_algorithm", "gradient_clip_val", "limit_train_batches",
    "overfit_batches", "precision", "sync_batchnorm",
)  # fmt: skip


def plain(value: Any) -> Any:
    """Bring parsed settings to dicts, lists and scalars: what a checkpoint may hold, and what compares."""
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
    named = value if hasattr(value, "__qualname__") else type(value)  # a function's own text holds its address
    return f"{named.__module__}.{named.__qualname__}"


def named(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Walk through the settings of an object as a user types them: ``model``, ``model.optimizer``, ``model.optimizer.lr``."""
    if not isinstance(value, dict) or "class_path" not in value:
        yield name, value
        return
    yield name, value["class_path"]
    for part in ("init_args", "dict_kwargs"):
        for key, inner in (value.get(part) or {}).items():
            yield from named(inner, f"{name}.{key}")


def refuse_other_settings(now: Mapping[str, Any], then: Mapping[str, Any]) -> None:
    """Compare settings of model, data and seed with those that a checkpoint was made with.

    Args:
        now: ``{"model": ..., "data": ..., "seed_everything": ...}``, any of them, all their keys or those that were given.
        then: the same of the checkpoint. What one of them does not say is not compared.

    Raises:
        ValueError: a setting differs that a resumed run could not honour; names all of them.
    """
    found = []
    for part in ("model", "data", "seed_everything"):
        before = dict(named(then.get(part), part))
        for name, value in named(now[part], part) if now.get(part) is not None else ():
            if name not in FREE and name in before and before[name] != value:
                found.append(f"{name} {value!r} (the checkpoint: {before[name]!r})")
    if found:
        raise ValueError(
            f"expected the settings that the checkpoint was made with, got {', '.join(found)}; a run goes on with what it was "
            "begun with, so give these as the checkpoint has them, or begin a new run without --ckpt_path"
        )


class RunSettings(L.Callback):
    """Put the settings of a run into its checkpoints, and refuse to go on from one that was made with others.

    Settings of the trainer are taken as they are given now; a change that makes it another run is told in a warning.

    Args:
        settings: ``{"model": ..., "data": ..., "seed_everything": ..., "trainer": ...}``, plain Python.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = plain(settings)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the settings, under ``settings``, and how many processes ``devices`` came to."""
        checkpoint["settings"] = {**self.settings, "processes": trainer.world_size}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare; a trained model may be evaluated on whatever data.

        Raises:
            ValueError: model, data or seed differ.
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
                f"the resumed run goes on with other trainer settings than it was begun with: {', '.join(other)}"
            )


def settings_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a checkpoint holds; few, unless the command line wrote it."""
    if "settings" in checkpoint:
        return dict(checkpoint["settings"])
    # Hyper-parameters of a pre-trained network differ from what was asked for: weights are not fetched a second time.
    unsure = ("network_args", "mean", "std", "num_classes", "image_size")
    known = {
        key: plain(value)
        for key, value in (checkpoint.get("hyper_parameters") or {}).items()
        if key[0] != "_" and key not in unsure and isinstance(value, (bool, int, float, str, list, dict, tuple, Path))
    }
    return {"model": {"class_path": None, "init_args": known}}
