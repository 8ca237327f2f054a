"""Arguments of a method that a checkpoint does not contain."""

import inspect
from types import FrameType

from torch import nn
from torch.utils._pytree import tree_leaves

__all__ = ["module_arguments"]


def module_arguments(module: nn.Module, frame: FrameType | None) -> list[str]:
    """Return the names of the modules, or containers of modules, among the arguments of a module's constructors.

    Args:
        module: module under construction.
        frame: frame of one of its ``__init__`` methods; those of its subclasses call it.
    """
    names = []
    while frame is not None and frame.f_code.co_name == "__init__" and frame.f_locals.get("self") is module:
        found = inspect.getargvalues(frame)
        values = {name: found.locals.get(name) for name in found.args} | found.locals.get(found.keywords or "", {})
        parts = (
            name for name, value in values.items() if any(isinstance(leaf, nn.Module) for leaf in tree_leaves(value))
        )
        names += [name for name in parts if name not in ("self", "sanm")]  # SANM is saved as its options
        frame = frame.f_back
    return names
