"""Write the labels and the results of a run to its directory."""

import json
import math
import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torchmetrics.functional.classification import binary_auroc

from sanm_lightning.audit import LabelAudit
from sanm_lightning.callbacks.stages import stage_epochs
from sanm_lightning.methods import NoisyLabelModule
from sanm_lightning.run.summary import selected_on, summary_lines
from sanm_lightning.run.timing import Timing, device_name
from sanm_lightning.safe_files import atomic_write, require_folder
from sanm_lightning.sanm.callback import SANMCallback
from sanm_lightning.sanm.estimate import estimated_quality, own_estimate

__all__ = ["RunRecord", "label_quality_auc"]


def label_quality_auc(trainer: L.Trainer, pl_module: L.LightningModule) -> float | None:
    """Return the area under the ROC curve of label quality as a score for correct labels; 0.5 is chance, 1 is perfect.

    The quality is that used in training, averaged over the networks; with the oracle, the oracle's. None where it is undefined:
    no estimate, true labels unknown, or no (or all) labels wrong. True labels are used
    for this metric only.
    """
    data = getattr(trainer, "datamodule", None)
    true, given = getattr(data, "true_labels", None), getattr(data, "labels", None)
    if true is None or given is None:
        return None
    right = true == given
    single = _sanm_of(trainer, pl_module)
    sanms = [sanm for sanm in getattr(pl_module, "sanms", None) or [single] if sanm is not None and sanm.enabled]
    quality = estimated_quality(pl_module, sanms)
    if sanms and sanms[0].quality == "oracle" and own_estimate(pl_module, sanms) is None:
        quality = right.float()
    if quality is None or len(quality) != len(right) or bool(right.all()) or not bool(right.any()):
        return None
    return float(binary_auroc(quality, right.long()))


def _sanm_of(trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
    """Return the SANM of a module, or of the callback that wraps it; None if there is none."""
    wrapping = (part.sanm for part in trainer.callbacks if isinstance(part, SANMCallback))  # type: ignore[attr-defined]
    return getattr(pl_module, "sanm", None) or next(wrapping, None)


class RunRecord(L.Callback):
    """Write ``labels.npz`` at the start of a fit and ``results.json`` after every evaluation, in the run directory.

    The keys of the results: method, sanm (whether enabled), seed, epochs (finished), seconds (of fitting, over all
    resumes), noise_kind, noise_rate (requested), measured_noise_rate, test_accuracy_best (the highest of all
    evaluations: selected on the test set, as in published protocols), test_accuracy_last (final epoch),
    test_accuracy_last10 (mean over the evaluations of the last ten epochs), val_accuracy_best, val_accuracy_last (on
    the split ``val``, given or held out, whose labels may be wrong), the same three keys with the name of each further
    test set, such as imagenet_accuracy_best, and, where it is logged, top-k accuracy, such as test_accuracy_top5_best;
    selected_on (the split whose accuracy selected the best checkpoint: ``val`` or ``test``, see
    :func:`~sanm_lightning.run.summary.selected_on`), quality_auc (see
    :func:`label_quality_auc`), stages (epochs of each stage), label_issues (see
    :func:`sanm_lightning.audit.callback.detection_metrics`), masked_steps (training steps with at least one masked
    image), timing (see :meth:`~sanm_lightning.run.timing.Timing.summary`). Null where unknown.
    """

    def __init__(self) -> None:
        self.accuracies: dict[int, float] = {}
        self.val_accuracies: dict[int, float] = {}
        self.further: dict[str, dict[int, float]] = {}
        """Accuracies of further test sets and top-k accuracies, by logged name, such as ``imagenet/acc``, and epoch."""
        self.highest: dict[str, float] = {}
        """Highest accuracy of all evaluations, also in the middle of an epoch, by logged name."""
        self.timing = Timing()

    def setup(self, trainer: Any, pl_module: L.LightningModule, stage: str) -> None:
        """Check, before training, that the run directory and the checkpoint directories are writable.

        Raises:
            OSError: if a directory cannot be written.
        """
        places = [self._directory(trainer)]  # a collective: log_dir is broadcast
        if stage == "fit" and trainer.is_global_zero and not trainer.fast_dev_run:
            places += [
                Path(place) for saver in trainer.checkpoint_callbacks if (place := getattr(saver, "dirpath", None))
            ]
            for place in places:
                if "://" not in str(place):
                    require_folder(place)

    def on_fit_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Start the clock, save the labels, and log the fraction of wrong labels."""
        self.timing.start(device_name(trainer.strategy.root_device, trainer.world_size))
        directory = self._directory(trainer)
        data: Any = getattr(trainer, "datamodule", None)
        rehearsal = trainer.fast_dev_run
        if hasattr(data, "save_labels") and trainer.is_global_zero and not rehearsal:
            data.save_labels(directory / "labels.npz")
        kind, measured = getattr(data, "noise_kind", "none"), getattr(data, "measured_noise_rate", None)
        if kind not in ("none", "file") or (kind == "file" and measured is not None):
            requested = "" if data.noise_rate is None else f", requested rate {data.noise_rate:.3f}"
            measured = "unknown" if measured is None else f"{measured:.4f}"
            rank_zero_info(
                f"label noise: {data.noise_kind}{requested}, measured rate {measured} of {data.num_samples} labels"
            )

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock of training, on a GPU after the steps that are queued there."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.timing.pause()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the accuracies of this epoch and the training time until it."""
        recorded = trainer.state.fn == "fit" and not trainer.sanity_checking
        self.timing.proceed(trainer.current_epoch if recorded else None)
        if not recorded:
            return
        data: Any = getattr(trainer, "datamodule", None)
        for split in {"val", "test", *(getattr(data, "eval_names", None) or [])}:
            for name in (f"{split}/acc", f"{split}/acc_top{getattr(data, 'top_k', None)}"):
                accuracy = trainer.callback_metrics.get(name)
                if accuracy is not None:
                    own = {"test/acc": self.accuracies, "val/acc": self.val_accuracies}
                    series = own[name] if name in own else self.further.setdefault(name, {})
                    series[trainer.current_epoch] = float(accuracy)
                    self.highest[name] = max(self.highest.get(name, 0.0), float(accuracy))
        self._write(trainer, pl_module, trainer.current_epoch + 1)

    def teardown(self, trainer: Any, pl_module: L.LightningModule, stage: str) -> None:
        """Write the final results, after all callbacks have processed the last epoch, and log a summary."""
        if stage != "fit":
            return
        folder, results = self._write(trainer, pl_module, trainer.current_epoch)
        if trainer.is_global_zero and not trainer.fast_dev_run:
            rank_zero_info("\n".join(summary_lines(trainer, pl_module, folder, results)))

    def results(self, trainer: Any, pl_module: L.LightningModule, epochs: int) -> dict[str, Any]:
        """Return the results so far, as built-in Python types."""
        data: Any = getattr(trainer, "datamodule", None)
        sanm = _sanm_of(trainer, pl_module)
        seed = os.environ.get("PL_GLOBAL_SEED")
        val = self._summary("val/acc", self.val_accuracies, epochs)
        further = [self._summary(name, self.further[name], epochs) for name in sorted(self.further)]
        return {
            "method": type(pl_module).__name__,
            "sanm": bool(sanm is not None and sanm.enabled),
            "seed": int(seed) if seed is not None else None,
            "epochs": epochs,
            "seconds": round(self.timing.seconds(), 3),
            "noise_kind": getattr(data, "noise_kind", None),
            "noise_rate": getattr(data, "noise_rate", None),
            "measured_noise_rate": getattr(data, "measured_noise_rate", None),
            **self._summary("test/acc", self.accuracies, epochs),
            **{key: val[key] for key in ("val_accuracy_best", "val_accuracy_last")},
            **dict(pair for summary in further for pair in summary.items()),
            "selected_on": selected_on(trainer),
            "quality_auc": label_quality_auc(trainer, pl_module),
            "stages": stage_epochs(pl_module.stages(), epochs) if isinstance(pl_module, NoisyLabelModule) else None,
            "label_issues": next((part.metrics for part in trainer.callbacks if isinstance(part, LabelAudit)), None),
            "masked_steps": next(
                (part.masked_steps for part in trainer.callbacks if isinstance(part, SANMCallback)),
                None,
            ),
            "timing": self.timing.summary(test_accuracy=self.accuracies, val_accuracy=self.val_accuracies),
        }

    def _summary(self, name: str, series: dict[int, float], epochs: int) -> dict[str, float | None]:
        return accuracy_summary(name, series, epochs, self.highest.get(name))

    def _write(self, trainer: Any, pl_module: L.LightningModule, epochs: int) -> tuple[Path, dict[str, Any]]:
        directory, results = self._directory(trainer), self.results(trainer, pl_module, epochs)
        if not trainer.fast_dev_run:
            write_json(directory / "results.json", results)
        return directory, results

    @staticmethod
    def _directory(trainer: L.Trainer) -> Path:
        return Path(trainer.log_dir or trainer.default_root_dir)  # a collective: log_dir is broadcast

    def state_dict(self) -> dict[str, Any]:
        """Return accuracies and seconds so far, so that a resumed run reports the entire training."""
        return {
            "accuracies": dict(self.accuracies),
            "val_accuracies": dict(self.val_accuracies),
            "further": {name: dict(series) for name, series in self.further.items()},
            "highest": dict(self.highest),
            "seconds": self.timing.seconds(),
            "timing": self.timing.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore accuracies and seconds."""
        self.accuracies = dict(state_dict["accuracies"])
        self.timing.load_state_dict(state_dict["seconds"], state_dict.get("timing"))
        self.val_accuracies = dict(state_dict.get("val_accuracies", {}))
        self.further = {name: dict(series) for name, series in state_dict.get("further", {}).items()}
        self.highest = dict(state_dict.get("highest", {}))


def accuracy_summary(
    name: str, series: dict[int, float], epochs: int, highest: float | None = None
) -> dict[str, float | None]:
    """Return the best and last accuracy and the mean of the last ten epochs, None where unknown.

    Args:
        name: logged name, such as ``imagenet/acc`` or ``test/acc_top5``, which gives the keys.
        series: accuracy by epoch, of the last evaluation of each.
        epochs: number of finished epochs.
        highest: highest accuracy of all evaluations, if it is known.
    """
    split, _, kind = name.rpartition("/")
    key = f"{split}_{kind.replace('acc', 'accuracy', 1)}"
    tail = [value for epoch, value in series.items() if epoch >= epochs - 10]
    return {
        f"{key}_best": max([*series.values(), *([] if highest is None else [highest])], default=None),
        f"{key}_last": series.get(epochs - 1),
        f"{key}_last10": math.fsum(tail) / len(tail) if tail else None,
    }


@rank_zero_only
def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` atomically: after a crash, the file holds either the old or the new content."""
    text = json.dumps(content, indent=2) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode())
