"""What every method needs of training, one concern per callback: no subclass breaks them by a missing ``super()``."""

from sanm_lightning.callbacks.compiled import CompileNetworks
from sanm_lightning.callbacks.epoch_start import EpochStart
from sanm_lightning.callbacks.exact_resume import ExactResume
from sanm_lightning.callbacks.finite_loss import FiniteLoss
from sanm_lightning.callbacks.stages import Stage, Stages

__all__ = ["CompileNetworks", "EpochStart", "ExactResume", "FiniteLoss", "Stage", "Stages"]
