"""Hand pictures to the loggers of a trainer that take pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["log_picture"]


def log_picture(loggers: list[Any], name: str, figure: Figure, path: Path, step: int) -> None:
    """Send a picture to each logger with a known method for images.

    Served are ``logger.log_image`` (Weights & Biases), ``experiment.add_figure`` or ``experiment.add_image``
    (TensorBoard) and ``experiment.log_figure`` (MLflow, Comet). All others are passed over. A logger that fails costs a
    warning, not the run.

    Args:
        loggers: of the trainer.
        name: of the picture, such as ``pictures/masks``.
        figure: the picture.
        path: its PNG file.
        step: training steps so far.
    """
    for logger in loggers:
        try:
            _log(logger, name, figure, path, step)
        except Exception as error:
            rank_zero_warn(f"{type(logger).__name__} did not take the picture {name} ({type(error).__name__}: {error})")


def _log(logger: Any, name: str, figure: Figure, path: Path, step: int) -> None:
    if callable(log_image := getattr(logger, "log_image", None)):
        log_image(key=name, images=[str(path)])
        return
    experiment = getattr(logger, "experiment", None)
    if callable(add_figure := getattr(experiment, "add_figure", None)):
        add_figure(name, figure, global_step=step, close=False)
    elif callable(add_image := getattr(experiment, "add_image", None)):
        import numpy
        from PIL import Image

        with Image.open(path) as picture:
            add_image(name, numpy.asarray(picture.convert("RGB")), global_step=step, dataformats="HWC")
    elif callable(log_figure := getattr(experiment, "log_figure", None)):
        if isinstance(run := getattr(logger, "run_id", None), str):  # MLflow
            log_figure(run, figure, f"{name}.png")
        else:
            log_figure(figure_name=name, figure=figure, step=step)
