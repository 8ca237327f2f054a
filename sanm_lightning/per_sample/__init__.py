"""State with one row per training sample, declared like the metric states of torchmetrics."""

from sanm_lightning.per_sample.features import Embeddings, NeighborGraph
from sanm_lightning.per_sample.state import SampleState
from sanm_lightning.per_sample.statistics import EpochMean, History, RunningVariance
from sanm_lightning.per_sample.targets import (
    Candidates,
    EMATargets,
    LabelStore,
    LearnableTargets,
    NoiseRateStore,
    Refurbished,
    WeightedLabels,
)

__all__ = [
    "Candidates",
    "EMATargets",
    "Embeddings",
    "EpochMean",
    "History",
    "LabelStore",
    "LearnableTargets",
    "NeighborGraph",
    "NoiseRateStore",
    "Refurbished",
    "RunningVariance",
    "SampleState",
    "WeightedLabels",
]
