"""Estimate the noise rate, and the probability that each given label is correct, from out-of-fold probabilities."""

import math
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import nnls
from scipy.special import gammaln

__all__ = [
    "NoiseModel",
    "anchor_transition",
    "confident_joint",
    "deconvolve",
    "fit_noise_model",
    "judge_labels",
    "label_posterior",
    "predicts_labels",
    "smooth_transition",
    "transition_of",
]

ITERATIONS = 10
"""Number of iterations of the deconvolution; more iterations amplify noise of the probabilities."""
ANCHORS = 0.4
"""Number of anchor points of a class, as a fraction of its given labels.

With fewer, image-dependent noise is underestimated; with more, errors of the probe are counted.
"""
REFINED = 20_000
"""Maximum number of samples of the re-estimates of the low estimate."""
CHUNK = 65_536
Array = np.ndarray[Any, Any]


class NoiseModel(NamedTuple):
    """Estimated noise of the given labels of N samples.

    Attributes:
        posterior: probability that each class is the true class, given image and label, shape (N, C), float32.
        joint: joint distribution of given (rows) and true labels (columns), shape (C, C), sums to 1.
        transition: probability of each given label (columns) for each true label (rows), shape (C, C), rows sum to 1.
        noise_rate: estimated fraction of wrong labels, in [0, 1].
        interval: lowest and highest estimate of that fraction.
    """

    posterior: Array
    joint: Array
    transition: Array
    noise_rate: float
    interval: tuple[float, float]


def predicts_labels(probs: Array, labels: Array, errors: float = 0.0) -> bool:
    """Return whether given labels are more probable than labels drawn from their frequencies.

    Args:
        probs: out-of-fold probabilities of the given labels, shape (N, C).
        labels: given labels, shape (N,).
        errors: smallest difference of the mean probabilities in standard errors, >= 0.
    """
    frequencies = np.bincount(labels, minlength=probs.shape[1]) / len(labels)
    gain = probs[np.arange(len(labels)), labels] - probs @ frequencies
    return float(gain.mean()) > errors * float(gain.std()) / math.sqrt(len(labels))


def anchor_transition(probs: Array, labels: Array, fraction: float = ANCHORS) -> Array:
    """Estimate the transition matrix from the images that most certainly belong to each class.

    Source: anchor points (Liu and Tao, TPAMI 2016). The paper and F-correction (Patrini et al., CVPR 2017) read the
    probabilities of one image per class; here the given labels of many are counted, and :func:`smooth_transition` takes
    account of how few they are. Images that the probe confuses are far from the top of their class, so that its own
    errors are not counted as label noise, as they are in the confident joint. Where difficult images have more wrong
    labels than easy ones, the noise is underestimated.

    Args:
        probs: out-of-fold probabilities of the given labels, shape (N, C).
        labels: given labels, shape (N,).
        fraction: number of anchor points of a class, as a fraction of its given labels, in (0, 1].

    Returns:
        Probability of each given label (columns) for each true label (rows), shape (C, C), rows sum to 1. Rows and columns of
        classes without given labels are those of the identity matrix, as are all if the probabilities do not predict the
        labels (:func:`predicts_labels`).
    """
    num_classes = probs.shape[1]
    sizes = np.bincount(labels, minlength=num_classes)
    given = np.flatnonzero(sizes)
    counts = np.zeros((len(given), len(given)))
    for row, label in enumerate(given):
        chosen = max(1, round(fraction * sizes[label]))
        anchors = np.argpartition(-probs[:, label], chosen - 1)[:chosen]
        counts[row] = np.bincount(labels[anchors], minlength=num_classes)[given]
    transition = np.eye(num_classes)
    if not predicts_labels(probs, labels):
        return transition
    transition[np.ix_(given, given)] = smooth_transition(counts)
    return transition


def smooth_transition(counts: Array) -> Array:
    """Estimate a transition matrix from few counts, by shrinkage to symmetric noise.

    The rows are draws of multinomial distributions with a common Dirichlet prior, whose mean is symmetric noise of the
    rate of all counts, and whose concentration has the highest marginal likelihood: rows that differ no more than their
    sizes explain become equal, and rows that do differ remain as counted.

    Args:
        counts: number of samples of each given label (columns) for each true label (rows), shape (C, C), C >= 2.

    Returns:
        Shape (C, C), rows sum to 1, all entries above 0.
    """
    num_classes, sizes = len(counts), counts.sum(1, keepdims=True)
    wrong = counts.sum() - np.trace(counts)
    rate = (wrong + 0.5) / (counts.sum() + 1)  # Jeffreys' estimate, in (0, 1)
    prior = np.full(counts.shape, rate / (num_classes - 1))
    np.fill_diagonal(prior, 1 - rate)
    seen = counts > 0
    strengths = np.logspace(-1, 5, 61)

    def log_likelihood(strength: float) -> float:
        rows = gammaln(strength) - gammaln(strength + sizes)
        cells = gammaln(strength * prior[seen] + counts[seen]) - gammaln(strength * prior[seen])
        return float(rows.sum() + cells.sum())

    strength = strengths[int(np.argmax([log_likelihood(value) for value in strengths]))]
    smoothed: Array = (counts + strength * prior) / (sizes + strength)
    return smoothed


def confident_joint(probs: Array, labels: Array) -> Array:
    """Estimate the joint distribution of given and true labels.

    Source: confident learning (Northcutt et al., JAIR 2021), Eq. 1: a sample is counted for a class if its probability
    reaches the mean probability of that class among the samples with this label; if several classes qualify, for the
    most probable one. Departure: the paper scales the counts of each given label to its frequency (Eq. 3), which
    assumes that the fraction of counted samples is the same for all true classes. It is not if only some classes are
    noisy. Here the counts of each true class are first divided by its fraction of counted samples, at most 1, which is
    estimated by least squares from the frequencies of the given labels.

    Args:
        probs: out-of-fold probabilities, shape (N, C).
        labels: given labels, shape (N,).

    Returns:
        Shape (C, C), given labels in rows, sums to 1.
    """
    num_classes = probs.shape[1]
    counts = np.bincount(labels, minlength=num_classes)
    own = np.bincount(labels, weights=probs[np.arange(len(labels)), labels], minlength=num_classes)
    thresholds = np.where(counts > 0, own / np.maximum(counts, 1), np.inf)
    joint = np.zeros((num_classes, num_classes))
    for start in range(0, len(labels), CHUNK):
        part = probs[start : start + CHUNK]
        confident = part >= thresholds
        likeliest = np.where(confident, part, -1.0).argmax(1)
        counted = confident.any(1)
        np.add.at(joint, (labels[start : start + CHUNK][counted], likeliest[counted]), 1)
    empty = joint.sum(1) == 0
    joint[empty, empty] = 1  # without a confident sample, assume that all labels of the class are correct
    joint *= 1 + nnls(joint, counts - joint.sum(1))[0]  # inverse of the counted fraction of each true class
    joint *= (counts / joint.sum(1))[:, None]
    normalized: Array = joint / joint.sum()
    return normalized


def deconvolve(probs: Array, transition: Array, iterations: int = ITERATIONS) -> Array:
    """Estimate the probabilities of true labels from the probabilities of noisy labels.

    Richardson-Lucy iteration, starting from the uniform distribution, which keeps probabilities non-negative: the
    maximum-likelihood step for the weights of a mixture of known components, the rows of the transition matrix.

    Args:
        probs: probabilities of given labels, shape (N, C).
        transition: probability of each given label (columns) for each true label (rows), shape (C, C).
        iterations: number of iterations.

    Returns:
        Shape (N, C), rows sum to 1.
    """
    found = np.full_like(probs, 1 / probs.shape[1])
    for _ in range(iterations):
        found *= (probs / np.maximum(found @ transition, 1e-12)) @ transition.T
        found /= np.maximum(found.sum(1, keepdims=True), 1e-12)
    return found


def label_posterior(probs: Array, labels: Array, transition: Array, iterations: int = ITERATIONS) -> Array:
    """Compute the probability that each class is the true class, given image and label, shape (N, C), float32.

    Bayes' rule with :func:`deconvolve` as the prior of each image and the transition matrix as the likelihood of the
    given label.
    """
    out = np.empty(probs.shape, np.float32)
    for start in range(0, len(probs), CHUNK):
        part = slice(start, start + CHUNK)
        prior = deconvolve(probs[part].astype(np.float64), transition, iterations)
        weighted = prior * transition[:, labels[part]].T
        out[part] = weighted / np.maximum(weighted.sum(1, keepdims=True), 1e-12)
    return out


def judge_labels(probs: Array, labels: Array, transition: Array, iterations: int = 5) -> Array:
    """Compute the probability that each class is the true class, for samples not used to fit the probabilities.

    The labels of another split, such as a test set, have their own transition matrix. It is estimated from these labels
    and the deconvolved probabilities of the images by expectation maximization, initialized with the transition matrix
    of the training labels.

    Args:
        probs: probabilities of the training labels, shape (N, C).
        labels: given labels of the other split, shape (N,).
        transition: transition matrix of the training labels, given labels (columns) for each true label (rows), shape
            (C, C).
        iterations: number of iterations of the estimate.

    Returns:
        Shape (N, C), float32, rows sum to 1.
    """
    prior = np.concatenate(
        [deconvolve(probs[i : i + CHUNK].astype(np.float64), transition) for i in range(0, len(probs), CHUNK)]
    )
    own = transition
    for _ in range(iterations + 1):
        weighted = prior * own[:, labels].T
        posterior: Array = weighted / np.maximum(weighted.sum(1, keepdims=True), 1e-12)
        own = transition_of(_joint_of(posterior, labels))
    return posterior.astype(np.float32)


def fit_noise_model(probs: Array, labels: Array, refinements: int = 10) -> NoiseModel:
    """Estimate the wrong labels, their fraction, and the transition matrix.

    The fraction of wrong labels is not identifiable from probabilities alone: an ambiguous image may be a hard image
    with a correct label. The interval therefore spans a high and a low estimate. The high estimate is that of the
    confident joint, which counts each confident disagreement as a wrong label. The low estimate is that of a transition
    matrix re-estimated from its own posterior ``refinements`` times, on at most 20,000 random samples, which increases the
    fraction of labels considered correct. The interval is extended by two standard errors of a fraction of the samples. It
    is (0, 1) if the probabilities do not predict the labels by two standard errors (:func:`predicts_labels`).

    Args:
        probs: out-of-fold probabilities of the given labels, shape (N, C).
        labels: given labels, shape (N,).
        refinements: number of re-estimates for the low estimate.
    """

    def wrong(posterior: Array, labels: Array) -> float:
        return 1 - float(posterior[np.arange(len(labels)), labels].mean(dtype=np.float64))

    posterior = label_posterior(probs, labels, anchor_transition(probs, labels))
    rows = np.arange(len(labels))
    if len(rows) > REFINED:
        rows = np.random.default_rng(0).permutation(rows)[:REFINED]
    some_probs, some_labels, refined = probs[rows], labels[rows], posterior[rows]
    for _ in range(refinements):
        refined = label_posterior(some_probs, some_labels, transition_of(_joint_of(refined, some_labels)))
    ends = [wrong(posterior, labels), wrong(refined, some_labels), 1 - float(np.trace(confident_joint(probs, labels)))]
    ends = [min(max(end, 0.0), 1.0) for end in ends]  # rounding, without wrong labels
    sizes = (len(labels), len(rows), len(labels))
    error = [2 * math.sqrt(end * (1 - end) / size) for end, size in zip(ends, sizes, strict=True)]
    low = min(end - margin for end, margin in zip(ends, error, strict=True))
    high = max(end + margin for end, margin in zip(ends, error, strict=True))
    if not predicts_labels(probs, labels, errors=2):
        low, high = 0.0, 1.0
    joint = _joint_of(posterior, labels)
    return NoiseModel(posterior, joint, transition_of(joint), ends[0], (max(0.0, low), min(1.0, high)))


def _joint_of(posterior: Array, labels: Array) -> Array:
    joint = np.zeros((posterior.shape[1],) * 2)
    np.add.at(joint, labels, posterior)
    normalized: Array = joint / len(labels)
    return normalized


def transition_of(joint: Array) -> Array:
    """Return the probability of each given label (columns) for each true label (rows), shape (C, C).

    Args:
        joint: joint distribution of given (rows) and true labels (columns), shape (C, C). Rows of classes with
            probability 0 become those of the identity matrix.
    """
    matrix = joint.T
    total = matrix.sum(1, keepdims=True)
    normalized: Array = np.where(total > 0, matrix / np.maximum(total, 1e-300), np.eye(len(matrix)))
    return normalized
