"""Pictures of a run: samples with their masks, losses, label quality, ROC curve and transition matrix, as PNG files."""

from sanm_lightning.pictures.callback import SANMPictures
from sanm_lightning.pictures.charts import (
    histogram_figure,
    quality_figure,
    roc_figure,
    transition_figure,
)
from sanm_lightning.pictures.masks import SampleBlock, draw_views, samples_figure

__all__ = [
    "SANMPictures",
    "SampleBlock",
    "draw_views",
    "histogram_figure",
    "quality_figure",
    "roc_figure",
    "samples_figure",
    "transition_figure",
]
