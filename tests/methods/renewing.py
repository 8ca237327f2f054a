"""Methods of several stages, as tests need them."""

from sanm_lightning.callbacks import Stage
from sanm_lightning.methods import CrossEntropy


def falling(step: int, steps: int) -> float:
    return 1 - step / steps


class Renewing(CrossEntropy):
    """Cross-entropy that begins again with fresh networks after its first epoch, at rates of its own."""

    def stages(self):
        return [
            Stage("first", 1),
            Stage("second", None, reset="network", lr=0.05, weight_decay=0.0, factor=falling),
        ]
