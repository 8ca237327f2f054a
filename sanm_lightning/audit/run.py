"""Audit images and labels: features, neighbors, probe, noise model."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sanm_lightning.audit.duplicates import Duplicates, find_duplicates
from sanm_lightning.audit.features import FeatureTable, FrozenFeatures, compute_features, default_image_size
from sanm_lightning.audit.label_issues import LabelIssues
from sanm_lightning.audit.sets import AuditSet, fitted_rows
from sanm_lightning.audit.summary import describe_unreadable, summarize
from sanm_lightning.functional import nearest_neighbors
from sanm_lightning.functional.linear_probe import assign_folds, linear_probe, log_loss, neighbor_probs, standardize
from sanm_lightning.functional.noise_model import NoiseModel, deconvolve, fit_noise_model, judge_labels
from sanm_lightning.models import load_pretrained
from sanm_lightning.processing import find_device

__all__ = ["AuditResult", "audit_features", "audit_set", "default_cache"]

DEFAULT_NETWORK = "tf_efficientnet_lite0"
NUM_NEIGHBORS, NUM_FOLDS = 20, 5
SHOWN_NEIGHBORS = 10
"""Number of neighbors in the table."""

Array = np.ndarray[Any, Any]


class AuditResult(NamedTuple):
    """Results of an audit; row i of every attribute is image i of the set.

    Attributes:
        issues: the table of label issues.
        probs: out-of-fold probabilities of the given labels, shape (N, C), float32; uniform for unreadable images.
        features: pooled features, shape (N, D), float32; 0 for unreadable images.
        noise: the noise model of the readable images used to fit the probe.
        duplicates: copies among the readable images, as positions in the set.
        summary: content of ``audit.json``.
    """

    issues: LabelIssues
    probs: Array
    features: Array
    noise: NoiseModel
    duplicates: Duplicates
    summary: dict[str, Any]


def default_cache() -> Path:
    """Return the default feature cache, ``sanm_lightning/features`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sanm_lightning" / "features"


def audit_set(
    data: AuditSet,
    features_file: str | Path | None = None,
    network: str | None = None,
    checkpoint: str | Path | None = None,
    image_size: int | None = None,
    cache: str | Path | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str = "auto",
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] | None = None,
) -> AuditResult:
    """Find samples with likely wrong labels, without training a network.

    A frozen network computes features. A linear probe, fitted to other folds, predicts the class probabilities of each
    sample; its weight decay, and the weight of a nearest-neighbor vote, minimize the log-loss on the given labels. A
    noise model is fitted to these probabilities; the quality of a label is its probability of being correct under this
    model. If there is a split ``train``, probe, vote and noise model are fitted to this split only, and applied to the
    labels of other splits. The quality of labels of classes that are missing in this split is near 0.

    Args:
        data: the images.
        features_file: ``.npy`` file that the features are written to as a memory map; None keeps them in memory.
        network: timm model name; None uses ``tf_efficientnet_lite0``, or the network of the checkpoint.
        checkpoint: see :func:`~sanm_lightning.models.load_pretrained`.
        image_size: input size of the network in pixels; None selects it from the size of the images.
        cache: folder of cached features; None uses :func:`default_cache`.
        batch_size: number of images per forward pass.
        num_workers: number of worker processes that decode images.
        device: ``auto``, ``cpu``, ``cuda``, ...
        seed: random seed of the folds and of the subset used to select the weight decay.
        say: function called with one line at the start of each step.
        progress: function called with the number of processed images and the number of images passed to the network.

    Raises:
        ValueError: if there are fewer than two classes or ten readable images, the device does not exist, or the network
            returns no pooled features.
        OSError: if a file cannot be written.
    """
    started = time.monotonic()
    num_labels = len(np.unique(data.labels))
    if num_labels < 2:
        raise ValueError(f"expected images of two classes or more, got {num_labels}; add classes")
    target = find_device(device)
    frozen = load_pretrained(network or (None if checkpoint else DEFAULT_NETWORK), checkpoint)
    size = image_size or default_image_size(frozen, _some_sides(data.images))
    model = FrozenFeatures(frozen.to(target), size)
    say(f"features: {type(frozen.network).__name__} at {size} pixels on {target}, {len(data.images)} images")
    shape = (len(data.images), model.num_features)
    into: Array = np.zeros(shape, np.float32) if features_file is None else _new_memmap(features_file, shape)
    folder = Path(cache) if cache is not None else default_cache()
    table = compute_features(data.images, model, folder, into, batch_size, num_workers, progress, say)
    seconds = time.monotonic() - started
    result = audit_features(data, table, target, seed, say)
    result.summary["seconds"] = {"features": round(seconds, 1), **result.summary["seconds"]}
    result.summary["network"] = network or (str(checkpoint) if checkpoint else DEFAULT_NETWORK)
    result.summary["image_size"] = size
    return result


def audit_features(
    data: AuditSet,
    table: FeatureTable,
    device: torch.device | str = "cpu",
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> AuditResult:
    """Find samples with likely wrong labels from computed features, see :func:`audit_set`.

    Besides the features of the table, it takes one array of their size, and blocks of 512 rows of similarities.

    Args:
        data: the images and labels; the images are not read.
        table: features, from :func:`~sanm_lightning.audit.features.compute_features`.
        device: device of neighbor search and probe.
        seed: random seed of the folds.
        say: function called with one line at the start of each step.

    Raises:
        ValueError: if there are fewer than two classes or ten readable images.
    """
    labels, num_classes = np.asarray(data.labels, np.int64), len(data.class_names)
    features, seconds = table.features, {}
    readable = np.ones(len(labels), bool)
    readable[list(table.unreadable)] = False
    rows = np.flatnonzero(readable)
    given, splits = labels[rows], [data.splits[row] for row in rows]
    learn = fitted_rows(data.splits)[rows]
    if learn.sum() < 2 * NUM_FOLDS or len(np.unique(given[learn])) < 2:
        raise ValueError(
            f"expected ten readable images to learn from, of two classes or more, got {learn.sum()} of "
            f"{len(np.unique(given[learn]))}; {describe_unreadable(data, table.unreadable) or 'add images'}"
        )

    begun = time.monotonic()
    standard = standardize(features if len(rows) == len(labels) else features[rows], np.flatnonzero(learn))
    neighbors = _neighbors(torch.from_numpy(standard).to(device), say)
    copies = find_duplicates(table.digests[rows], table.thumbs[rows], standard, neighbors, given, splits)
    seconds["neighbors"], begun = time.monotonic() - begun, time.monotonic()

    say("linear probe: five folds, weight decay by the log-loss on the given labels")
    folds = assign_folds(
        np.where(learn, given, num_classes), copies.group, NUM_FOLDS, seed
    )  # independent of labels outside the training split
    probe = linear_probe(standard, given, folds, num_classes, learn, seed=seed, device=device, overwrite_features=True)
    copied = copies.group[neighbors] == copies.group[:, None]  # a copy would repeat its own label, also a wrong one
    voters = np.where(learn[neighbors] & ~copied, neighbors, -1)
    prior = np.bincount(given[learn], minlength=num_classes) / learn.sum()
    votes = neighbor_probs(voters, np.ones(voters.shape, np.float32), given, num_classes, prior)
    weights = np.linspace(0, 1, 11, dtype=np.float32)
    losses = [log_loss(weight * probe.probs[learn] + (1 - weight) * votes[learn], given[learn]) for weight in weights]
    weight = weights[int(np.argmin(losses))]
    probs = weight * probe.probs + (1 - weight) * votes
    noise = fit_noise_model(probs[learn], given[learn])
    posterior = _posterior(probs, given, splits, learn, noise)
    unknown = ~np.isin(given, given[learn])  # classes that are missing in the training split
    posterior[unknown] = deconvolve(probs[unknown].astype(np.float64), noise.transition)
    seconds["probe"] = time.monotonic() - begun

    place = np.arange(len(rows))
    suggested = posterior.argmax(1)
    full = _scatter(rows, len(labels))
    whole = np.full((len(labels), num_classes), 1 / num_classes, np.float32)
    whole[rows] = probs
    issues = LabelIssues(
        paths=data.paths,
        splits=list(data.splits),
        given=labels,
        suggested=full(suggested),
        quality=full(posterior[place, given].clip(0, 1)),
        p_given=full(probs[place, given].clip(0, 1)),
        p_suggested=full(probs[place, suggested].clip(0, 1)),
        class_names=list(data.class_names),
        neighbor_labels=full(given[neighbors[:, :SHOWN_NEIGHBORS]], fill=-1),
        unreadable=table.unreadable,
        index=data.index,
    )
    copies = Duplicates(copies.group, *([[int(rows[i]) for i in part] for part in parts] for parts in copies[1:]))
    summary = summarize(data, issues, noise.joint, noise.interval, copies)
    summary |= {
        "weight_decay": probe.weight_decay,
        "log_losses": {str(decay): loss for decay, loss in probe.log_losses.items()},
        "probe_weight": round(float(weight), 1),
        "log_loss": min(losses),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    return AuditResult(issues, whole, features, noise, copies, summary)


def _new_memmap(path: str | Path, shape: tuple[int, int]) -> Array:
    """Create a ``.npy`` file of zeros and map it; its disk space is reserved, because a full disk would kill the process."""
    mapped: Array = np.lib.format.open_memmap(path, "w+", np.float32, shape)  # type: ignore[no-untyped-call]
    if hasattr(os, "posix_fallocate"):  # not on macOS and Windows
        try:
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
        except OSError as error:
            raise OSError(
                f"expected {os.path.getsize(path) / 1e6:,.1f} MB of disk space for the features in {str(path)!r}, got an "
                f"error ({error.strerror}); free disk space, or choose another folder"
            ) from error
    return mapped


def _some_sides(images: Any) -> list[int]:
    """Return the short sides of up to 100 images in pixels."""
    sides = []
    for row in range(0, len(images), max(1, len(images) // 100)):
        try:
            source = images[row]
            if isinstance(source, Tensor):
                sides.append(min(source.shape[1:]))
                continue
            with Image.open(source) as image:  # reads only the header of the file
                sides.append(min(image.size))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
    return sides


def _neighbors(features: Tensor, say: Callable[[str], None]) -> Array:
    """Find the nearest neighbors, and log the expected time in advance."""
    k = min(NUM_NEIGHBORS, len(features) - 1)
    begun = time.monotonic()
    sample = features[:512]
    (sample @ features.T).topk(k)
    expected = (time.monotonic() - begun) * len(features) / len(sample)
    say(f"nearest neighbors: exact, among {len(features)} images, about {max(1, round(expected))} s")
    return nearest_neighbors(features, k, chunk=512).cpu().numpy()


def _posterior(probs: Array, given: Array, splits: list[str], learn: Array, noise: NoiseModel) -> Array:
    """Return the posterior of all samples; every other split has its own transition matrix."""
    posterior = np.empty(probs.shape, np.float32)
    posterior[learn] = noise.posterior
    for split in dict.fromkeys(splits):
        rows = np.array([name == split for name in splits]) & ~learn
        if rows.any():
            posterior[rows] = judge_labels(probs[rows], given[rows], noise.transition)
    return posterior


def _scatter(rows: Array, size: int) -> Callable[..., Array]:
    """Return a function that expands values of the readable rows to an array over all rows."""

    def full(values: Array, fill: Any = 0) -> Array:
        out = np.full((size, *values.shape[1:]), fill, values.dtype)
        out[rows] = values
        return out

    return full
