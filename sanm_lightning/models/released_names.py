"""Names of tensors in checkpoints of released codes, converted to those of the networks of this package."""

import re
from collections.abc import Mapping

from torch import Tensor

__all__ = ["released_forms"]


def released_forms(weights: Mapping[str, Tensor]) -> list[dict[str, str]]:
    """Return possible names of the tensors of a file, each form as a map from the converted name to the name in the file.

    The forms are: the names as they are; those of the ResNets of SupContrast, used by C2D, whose ``shortcut`` is
    ``downsample`` in timm; and those of the PreAct ResNet of DivideMix, ELR+ and SSR, whose blocks
    ``layer<stage>.<block>`` are numbered across the stages here.

    Args:
        weights: tensors by name.
    """
    resnet = {re.sub(r"(^|\.)shortcut\.", r"\1downsample.", name): name for name in weights}
    depths = _blocks_before(weights)
    preact = {_preact(name, depths): name for name in weights}
    return [{name: name for name in weights}, resnet, preact]


STAGE = re.compile(r"(?P<before>^|.*\.)layer(?P<stage>\d+)\.(?P<block>\d+)\.(?P<rest>.+)")


def _blocks_before(weights: Mapping[str, Tensor]) -> dict[int, int]:
    """Return the number of blocks before each stage."""
    last: dict[int, int] = {}
    for found in filter(None, map(STAGE.fullmatch, weights)):
        stage = int(found["stage"])
        last[stage] = max(last.get(stage, 0), int(found["block"]) + 1)
    return {stage: sum(depth for other, depth in last.items() if other < stage) for stage in last}


def _preact(name: str, before: Mapping[int, int]) -> str:
    found = STAGE.fullmatch(name)
    if found is None:
        stem = {"conv1": "stem.0", "bn1": "stem.1", "linear": "fc"}
        return re.sub(r"(^|\.)(conv1|bn1|linear)\.", lambda part: f"{part[1]}{stem[part[2]]}.", name)
    rest = re.sub(r"^bn(\d)\.", r"norm\1.", found["rest"]).replace("shortcut.0.", "shortcut.")
    return f"{found['before']}stages.{before[int(found['stage'])] + int(found['block'])}.{rest}"
