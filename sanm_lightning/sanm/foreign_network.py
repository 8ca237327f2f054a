"""Find the classifier in a LightningModule."""

from collections.abc import Sequence

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from sanm_lightning.sanm.checks import require_parameters
from sanm_lightning.sanm.feature_extractor import FeatureExtractor
from sanm_lightning.sanm.module import SANM
from sanm_lightning.sanm.saliency import cam

__all__ = ["find_network"]

USUAL_NAMES = ("network", "model", "net", "backbone", "encoder", "classifier")


def find_network(
    pl_module: L.LightningModule, sanm: SANM, name: str | None, layer: str | None, image_size: Sequence[int]
) -> FeatureExtractor:
    """Return the feature extractor of a submodule, or of the first one with a common name that is a classifier.

    Args:
        pl_module: module with a classifier.
        sanm: SANM with its options, which determine whether a classifier and a feature map are required.
        name: name of the submodule; None tries the common names, then the module itself.
        layer: name of the submodule of the network whose output is the last feature map; None detects it.
        image_size: H, W of the images in pixels.

    Raises:
        MisconfigurationException: if there is no such submodule, or no classifier, or if the module itself has another number
            of outputs than the submodule with a common name.
    """
    owner = type(pl_module).__name__
    require_parameters(pl_module)
    parts = [child for child, part in pl_module.named_children() if not isinstance(part, SANM)]
    children = ", ".join(parts) or "none"
    if name is None:
        usual = [getattr(pl_module, usual_name, None) for usual_name in USUAL_NAMES]
        candidates = [*(module for module in usual if isinstance(module, nn.Module)), pl_module]
    else:
        try:
            candidates = [pl_module.get_submodule(name)]
        except AttributeError:
            raise MisconfigurationException(
                f"expected a submodule {name!r} of {owner} for SANM, got none; choose one of {children}"
            ) from None
    need_classifier = name is None or (sanm.mask and sanm.saliency is cam)
    errors = []
    for candidate in candidates:
        try:
            found = FeatureExtractor(candidate, image_size, layer, need_classifier, sanm.needs_map)
        except ValueError as error:
            errors.append(str(error))
            continue
        if name is None and candidate is not pl_module:
            _require_same_outputs(pl_module, found, image_size)
        return found
    hint = "" if name else f"; set another submodule with network= (available: {children})"
    raise MisconfigurationException(f"{errors[0]} (in {owner}){hint}")


def _require_same_outputs(pl_module: L.LightningModule, found: FeatureExtractor, image_size: Sequence[int]) -> None:
    """Refuse a submodule followed by a further layer, such as a backbone with 1,000 outputs before a head."""
    try:
        whole = FeatureExtractor(pl_module, image_size, need_classifier=False, need_map=False)
    except Exception:  # no forward, or one of other arguments
        return
    whole.remove()
    if whole.num_classes != found.num_classes:
        found.remove()
        name, owner = type(found.network).__name__, type(pl_module).__name__
        raise MisconfigurationException(
            f"expected the outputs of {name} to be the logits of {owner} for SANM, got {found.num_classes} of {name} and "
            f"{whole.num_classes} of {owner}; set network= to the submodule that returns the logits, or to '' for {owner}"
        )
