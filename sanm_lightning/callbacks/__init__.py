"""Training logic shared by all methods, one concern per callback, independent of ``super()`` calls in subclasses."""

from sanm_lightning.callbacks.compiled import CompileNetworks
from sanm_lightning.callbacks.epoch_start import EpochStart
from sanm_lightning.callbacks.exact_resume import ExactResume
from sanm_lightning.callbacks.finders import Finders
from sanm_lightning.callbacks.finite_loss import FiniteLoss
from sanm_lightning.callbacks.optimizer_steps import OptimizerSteps
from sanm_lightning.callbacks.stages import Stage, Stages, locate, repeated_stages
from sanm_lightning.callbacks.unaveraged import Unaveraged, UnaveragedState

__all__ = [
    "CompileNetworks",
    "EpochStart",
    "ExactResume",
    "Finders",
    "FiniteLoss",
    "OptimizerSteps",
    "Stage",
    "Stages",
    "Unaveraged",
    "UnaveragedState",
    "locate",
    "repeated_stages",
]
