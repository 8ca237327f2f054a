"""Find exact and near copies of images: contradicting labels, and leaks between splits."""

from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

__all__ = ["Duplicates", "find_duplicates"]

CORRELATION, COSINE, DIFFERENCE = 0.95, 0.8, 25.0
"""Thresholds of near copies: minimum correlation of the pixels of two thumbnails, minimum cosine similarity of the
standardized features, and maximum mean difference of gray levels. Selected visually on CIFAR-10 training images."""

Array = np.ndarray[Any, Any]


class Duplicates(NamedTuple):
    """Groups of images that are copies of each other.

    Attributes:
        group: group number of each sample, shape (N,); samples without copies have their own group.
        exact: groups of samples with identical content, as lists of positions.
        near: groups of samples with different content, and their exact copies, as lists of positions.
        contradicting: groups of samples with different labels; if the content is identical, at least one is wrong.
        leaks: groups of samples from several splits.
    """

    group: Array
    exact: list[list[int]]
    near: list[list[int]]
    contradicting: list[list[int]]
    leaks: list[list[int]]


def find_duplicates(
    digests: Array, thumbs: Array, features: Array, neighbors: Array, labels: Array, splits: list[str]
) -> Duplicates:
    """Find copies by content, and near copies among the nearest neighbors.

    Args:
        digests: hash of the content, shape (N, 16), uint8.
        thumbs: thumbnails, shape (N, h, w, 3), uint8.
        features: standardized features, shape (N, D).
        neighbors: positions of the nearest neighbors by features, shape (N, k); the first five are compared.
        labels: given labels, shape (N,).
        splits: name of the split of each sample.
    """
    size = len(labels)
    content = np.unique(np.ascontiguousarray(digests).view(f"V{digests.shape[1]}").reshape(-1), return_inverse=True)[1]
    content = content.reshape(-1)
    first = np.full(content.max() + 1, -1)
    first[content[::-1]] = np.arange(size)[::-1]
    left, right = [np.arange(size)], [first[content]]  # each sample and the first with identical content
    pixels = thumbs.reshape(size, -1)
    length = np.maximum(np.linalg.norm(features, axis=1), 1e-12)
    for start in range(0, size, 4096):
        rows = np.arange(start, min(start + 4096, size))
        for column in neighbors[rows, :5].T:
            cosine = np.einsum("nd,nd->n", features[rows], features[column]) / (length[rows] * length[column])
            here, there = rows[cosine >= COSINE], column[cosine >= COSINE]
            a, b = pixels[here].astype(np.float32), pixels[there].astype(np.float32)
            alike = (np.abs(a - b).mean(1) <= DIFFERENCE) & (_correlation(a, b) >= CORRELATION)
            left.append(here[alike])
            right.append(there[alike])
    i, j = np.concatenate(left), np.concatenate(right)
    group = connected_components(coo_array((np.ones(len(i)), (i, j)), (size, size)), directed=False)[1]
    members = _groups(group)
    return Duplicates(
        group,
        _groups(content),
        [part for part in members if len({int(content[row]) for row in part}) > 1],
        [part for part in members if len({int(labels[row]) for row in part}) > 1],
        [part for part in members if len({splits[row] for row in part}) > 1],
    )


def _groups(number: Array) -> list[list[int]]:
    """Return the positions of equal numbers, shape (N,), for numbers that occur more than once, in order."""
    order = np.argsort(number, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(number[order])) + 1)
    return sorted(part.tolist() for part in parts if len(part) > 1)


def _correlation(a: Array, b: Array) -> Array:
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    scale = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    out: Array = np.divide((a * b).sum(1), scale, out=np.zeros(len(a), a.dtype), where=scale > 1e-6)
    return out
