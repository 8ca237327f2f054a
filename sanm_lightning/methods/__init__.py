"""Methods for learning with noisy labels, one class per paper."""

from sanm_lightning.callbacks import Stage as Stage
from sanm_lightning.methods.base import NoisyLabelModule as NoisyLabelModule
from sanm_lightning.methods.c2d import C2D as C2D
from sanm_lightning.methods.cdr import CDR as CDR
from sanm_lightning.methods.co_teaching import CoTeaching as CoTeaching
from sanm_lightning.methods.cross_entropy import CrossEntropy as CrossEntropy
from sanm_lightning.methods.dividemix import DivideMix as DivideMix
from sanm_lightning.methods.elr import ELR as ELR
from sanm_lightning.methods.elr_plus import ELRPlus as ELRPlus
from sanm_lightning.methods.gce import GCE as GCE
from sanm_lightning.methods.schedules import Chained as Chained
from sanm_lightning.methods.schedules import Cosine as Cosine
from sanm_lightning.methods.schedules import LinearAfter as LinearAfter
from sanm_lightning.methods.schedules import OneCycle as OneCycle
from sanm_lightning.methods.schedules import Sequential as Sequential
from sanm_lightning.methods.simclr import SimCLR as SimCLR
from sanm_lightning.methods.ssr import SSR as SSR
from sanm_lightning.methods.two_networks import TwoNetworks as TwoNetworks
