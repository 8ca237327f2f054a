"""Label quality from features: from an audit, from the network in training, or combined with other estimates."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sanm_lightning.functional import nearest_neighbors
from sanm_lightning.functional.linear_probe import assign_folds, linear_probe, neighbor_probs, standardize
from sanm_lightning.functional.noise_model import anchor_transition, label_posterior
from sanm_lightning.per_sample import SampleState
from sanm_lightning.sanm.options import created_from
from sanm_lightning.sanm.quality import QualityEstimator, TableQuality

__all__ = ["AuditQuality", "CombinedQuality", "FeatureQuality"]


class AuditQuality(TableQuality):
    """Label quality from an audit (``sanm audit``), constant during training.

    Samples are matched by path if the data have paths, otherwise by position in the original set. An audit of other
    given labels raises an error. The file is read at the start of training; checkpoints contain the values.

    Args:
        path: run folder of the audit, or its ``samples.npz``.
    """

    needs_evidence = False

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.table.add_state("label", dtype=torch.int64, default=-1, dist_reduce_fx=None)  # compared during training
        self._mismatches: Tensor | None = None

    def fit(self, module: Any = None) -> None:
        """Read the audit, unless the values are already known.

        Raises:
            FileNotFoundError: if the audit does not exist.
            ValueError: if the audit lacks training samples, or has other labels for them.
        """
        wrong, self._mismatches = self._mismatches, None
        if wrong is not None and int(wrong):
            raise ValueError(
                f"expected the given labels of the audit {self.path!r}, got different labels for {int(wrong)} samples of "
                "the previous epoch; audit the labels used for training, in the order of their index"
            )
        if bool(self.table.known.any()):
            return
        held = self._read()
        trainer = getattr(module, "_trainer", None) or getattr(module, "trainer", None)
        data = getattr(trainer, "datamodule", None)
        rows = self._rows(held, data)
        given = getattr(data, "labels", None)
        names = [str(name) for name in held["class_names"]]
        if given is not None:
            own = list(getattr(data, "class_names", names))
            place = {name: number for number, name in enumerate(own)}
            theirs = np.array([place.get(name, -1) for name in names])[held["labels"][rows]]
            differ = int((theirs != given.cpu().numpy()).sum())
            if differ:
                raise ValueError(
                    f"expected the given labels of the audit {self.path!r}, got different labels for {differ} of "
                    f"{len(rows)} training samples; audit the labels used for training (same data, noise and seed)"
                )
        self._set(torch.from_numpy(held["quality"][rows]))
        if given is None:
            self.table.label = torch.from_numpy(held["labels"][rows].astype(np.int64)).to(self.table.device)

    def _read(self) -> dict[str, Any]:
        path = Path(self.path)
        path = path / "samples.npz" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(
                f"expected the files of an audit in {self.path!r}, got no samples.npz; run sanm audit first"
            )
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                held = {name: arrays[name] for name in arrays.files}
            missing = {"labels", "class_names", "splits", "quality", "readable"} - set(held)
        except Exception as error:  # of the file system, zip, or the format of arrays
            raise ValueError(
                f"expected samples.npz of an audit in {str(path)!r}, got another file ({type(error).__name__}: {error}); run "
                "sanm audit again"
            ) from error
        if not {"paths", "index"} & set(held):
            missing.add("paths")
        if missing:
            raise ValueError(
                f"expected samples.npz of an audit in {str(path)!r}, got a file without {', '.join(sorted(missing))}; "
                "run sanm audit again"
            )
        held["quality"] = np.where(held["readable"], held["quality"], 0).astype(np.float32)
        return held

    def _rows(self, held: dict[str, Any], data: Any) -> Any:
        """Return the row of the audit of each training sample, (N,)."""
        paths = data.sample_paths("train") if hasattr(data, "sample_paths") else None
        if paths is not None and "paths" in held:
            place = {str(path): row for row, path in enumerate(held["paths"])}
            return self._found([place.get(path, -1) for path in paths], paths)
        train = np.flatnonzero(np.isin(held["splits"], ["train", "all"]))
        if hasattr(data, "table"):
            position = held["index"][train] if "index" in held else np.arange(len(train))
            by_position = {int(number): int(row) for number, row in zip(position, train, strict=True)}
            origin = data.table("train").origin.tolist()
            return self._found([by_position.get(number, -1) for number in origin], [f"index {n}" for n in origin])
        expected = getattr(data, "num_samples", None)
        if isinstance(expected, int) and expected != len(train):
            raise ValueError(
                f"expected an audit of {expected} training samples in {self.path!r}, got {len(train)}; audit this "
                "training set"
            )
        return train

    def _found(self, rows: list[int], names: Sequence[str]) -> Any:
        missing = [name for row, name in zip(rows, names, strict=True) if row < 0]
        if missing:
            raise ValueError(
                f"expected all {len(rows)} training samples in the audit {self.path!r}, got {len(missing)} samples without a "
                f"row (first: {missing[0]!r}); use the root that was audited, or audit this training set"
            )
        return np.array(rows)

    def forward(self, logits: Tensor, targets: Tensor, index: Tensor | None = None) -> Tensor:
        """Return the quality of the samples, shape (B,)."""
        quality = super().forward(logits, targets, index)
        if len(self.table) and index is not None:
            label = self.table.label[index]
            wrong = ((label >= 0) & (label != targets.argmax(1))).sum()  # synchronized with the CPU once per epoch
            self._mismatches = wrong if self._mismatches is None else self._mismatches + wrong
        return quality


class FeatureQuality(TableQuality):
    """Label quality from the features of the network in training, updated once per epoch.

    The features are classified by an out-of-fold linear probe on the given labels, with the weight decay of the lowest
    log-loss on these labels, or by a vote of the nearest neighbors. The quality follows from the noise model of an
    audit (:mod:`sanm_lightning.functional.noise_model`).

    Args:
        classifier: ``"probe"`` or ``"neighbors"``.
        source: ``"pass"`` computes features in a pass over the training set, for methods of this package; ``"recorded"``
            uses those of the unmasked images in the steps of the epoch, for any module with sample indices. Each of two
            networks uses its own features.
        every: number of epochs between updates.
        k: number of neighbors.
        momentum: weight of the previous quality in the new quality, in [0, 1).

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        classifier: Literal["probe", "neighbors"] = "probe",
        source: Literal["pass", "recorded"] = "pass",
        every: int = 1,
        k: int = 20,
        momentum: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("classifier", classifier, ("probe", "neighbors")),
            ("source", source, ("pass", "recorded")),
        ):
            if value not in known:
                raise ValueError(f"expected {name} '{known[0]}' or '{known[1]}', got {value!r}; choose one")
        if every < 1 or k < 1 or not 0 <= momentum < 1:
            raise ValueError(
                f"expected every and k of 1 or more and momentum in [0, 1), got {every}, {k} and {momentum}; change them"
            )
        self.classifier, self.source, self.every, self.k, self.momentum = classifier, source, every, k, momentum
        self.needs_evidence = source == "recorded"
        self.recorded = _RecordedFeatures()
        self.fits = 0

    def update(
        self, logits: Tensor, targets: Tensor, index: Tensor | None = None, features: Tensor | None = None
    ) -> None:
        """Record pooled features of unmasked images, see :meth:`QualityEstimator.update`."""
        if self.source == "recorded" and index is not None and features is not None:
            self.recorded.record(index, features, targets)

    def fit(self, module: Any = None) -> None:
        """Update the quality of all samples. Collective operation.

        Raises:
            ValueError: if ``source`` is ``"pass"`` and the module cannot make a pass over the training set.
        """
        if self.source == "pass":
            if not hasattr(module, "predict_train"):
                raise ValueError(
                    f"expected a module with predict_train for features of a pass, got {type(module).__name__}; set "
                    "source to 'recorded'"
                )
            if module.current_epoch == 0:
                return  # the network is untrained
            if (self.fits + 1) % self.every == 0:
                found = module.predict_train("features", "labels", network=_network_of(self, module), pool_only=True)
                seen = torch.zeros(int(module.trainer.datamodule.num_samples), dtype=torch.bool)
                seen[found["index"].cpu()] = True
                self._renew(found["features"], found["labels"], seen)
            self.fits += 1
        elif bool(self.recorded.seen.any()):
            if (self.fits + 1) % self.every == 0:
                seen = self.recorded.seen
                self._renew(self.recorded.features[seen], self.recorded.label[seen], seen)
            self.fits += 1

    def _renew(self, features: Tensor, labels: Tensor, seen: Tensor) -> None:
        """Update the quality of the samples that are ``seen`` (N,), from their features (M, D) and labels (M,)."""
        quality = self.table.quality.cpu().clone() if len(self.table) == len(seen) else torch.ones(len(seen))
        given = labels.cpu().numpy()
        if len(np.unique(given)) < 2 or len(given) < 10:
            return
        quality[seen.cpu()] = torch.from_numpy(self._quality(features.detach().cpu().float().numpy(), given))
        if self.momentum and bool(self.table.known.any()):
            quality = self.momentum * self.table.quality.cpu() + (1 - self.momentum) * quality
        self._set(quality.clamp(0, 1))

    def _quality(self, features: Any, labels: Any) -> Any:
        num_classes, place = int(labels.max()) + 1, np.arange(len(labels))
        table = standardize(features, place)
        if self.classifier == "neighbors":
            near = nearest_neighbors(torch.from_numpy(table), min(self.k, len(labels) - 1)).numpy()
            probs = neighbor_probs(near, np.ones(near.shape, np.float32), labels, num_classes)
        else:
            probs = linear_probe(table, labels, assign_folds(labels, place, 5, 0), num_classes).probs
        return label_posterior(probs, labels, anchor_transition(probs, labels))[place, labels]

    def get_extra_state(self) -> dict[str, Any]:
        """Return the number of calls to `fit`."""
        return {"fits": self.fits}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the number of calls to `fit`."""
        self.fits = state["fits"]


def _network_of(estimator: nn.Module, module: Any) -> int:
    """Return the number of the network whose SANM holds the estimator."""
    owners = [i for i, sanm in enumerate(getattr(module, "sanms", [])) if estimator in set(sanm.modules())]
    return owners[0] if owners else 0


class _RecordedFeatures(SampleState):
    """Pooled features and given labels of the samples, recorded in the training steps of the epoch."""

    required = False
    features: Tensor
    label: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("label", dtype=torch.int64)
        self.add_state("seen", dtype=torch.bool)

    def record(self, index: Tensor, maps: Tensor, targets: Tensor) -> None:
        """Write rows from maps (B, D, h, w) or features (B, D), and targets (B, C)."""
        if not len(self):
            raise ValueError(
                "expected a data module with num_samples for recorded features, got none; define num_samples"
            )
        pooled = maps.detach().float().flatten(2).mean(2) if maps.ndim > 2 else maps.detach().float()
        if "features" not in self._states:
            self._declare(pooled.shape[1], pooled.device)
        self.write("features", index, pooled)
        self.write("label", index, targets.argmax(1))
        self.write("seen", index, torch.ones_like(index, dtype=torch.bool))

    def _declare(self, size: int, device: Any) -> None:
        self.add_state("features", (size,))
        self.features = self.features.to(device)
        self._written["features"] = self._written["features"].to(device)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the state; features are declared first if the state contains them."""
        if "features" in state.get("tables", {}) and "features" not in self._states:
            self._declare(state["tables"]["features"].shape[1], self.device)
        super().set_extra_state(state)


class CombinedQuality(QualityEstimator):
    """Mean quality of several estimators, such as features and the loss mixture.

    Args:
        parts: the estimators, or their class paths and arguments.
        weights: positive weights of the mean; None uses equal weights.

    Raises:
        ValueError: if there are no estimators, or another number of weights.
    """

    def __init__(
        self, parts: Sequence[QualityEstimator | dict[str, Any]], weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        made = [_estimator(part) for part in parts]
        weights = [1.0] * len(made) if weights is None else list(weights)
        if not made or len(weights) != len(made) or min(weights) <= 0:
            raise ValueError(
                f"expected one or more estimators and a positive weight for each, got {len(made)} and {weights}; change them"
            )
        self.parts: Any = nn.ModuleList(made)
        self.weights = [weight / sum(weights) for weight in weights]
        self.init_args = {"parts": [part.options for part in made], "weights": list(weights)}
        self.needs_evidence = any(part.needs_evidence for part in made)

    def update(
        self, logits: Tensor, targets: Tensor, index: Tensor | None = None, features: Tensor | None = None
    ) -> None:
        """Update all estimators."""
        for part in self.parts:
            part.update(logits, targets, index, features)

    def fit(self, module: Any = None) -> None:
        """Fit all estimators. Collective operation if that of any estimator is one."""
        for part in self.parts:
            part.fit(module)

    def forward(self, logits: Tensor, targets: Tensor, index: Tensor | None = None) -> Tensor:
        """Return the mean quality, shape (B,)."""
        return torch.stack(
            [weight * part(logits, targets, index) for part, weight in zip(self.parts, self.weights, strict=True)]
        ).sum(0)

    @property
    def values(self) -> Tensor | None:
        """Quality of each training sample, (N,); None if unknown to any estimator."""
        values = [part.values for part in self.parts]
        if any(value is None for value in values):
            return None
        total = zip(values, self.weights, strict=True)
        return torch.stack([weight * value for value, weight in total]).sum(0)


def _estimator(part: Any) -> QualityEstimator:
    if isinstance(part, dict) and "class_path" in part:
        part = created_from(QualityEstimator, part)
    if not isinstance(part, QualityEstimator):
        raise ValueError(
            f"expected a QualityEstimator or its class path, got {part!r}; derive it from QualityEstimator"
        )
    return part
