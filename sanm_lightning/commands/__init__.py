"""Commands of ``sanm`` in addition to those of LightningCLI.

Each is a module with ``main(words)``, which returns an exit status.
"""

import importlib
import os
import sys
from collections.abc import Sequence

__all__ = ["COMMANDS", "run"]

COMMANDS = {
    "audit": "sanm_lightning.commands.audit",
    "check-data": "sanm_lightning.commands.check_data",
    "doctor": "sanm_lightning.commands.doctor",
    "export": "sanm_lightning.commands.export",
    "list": "sanm_lightning.commands.catalog",
    "noise": "sanm_lightning.commands.noise",
    "predict --images": "sanm_lightning.commands.predict",
    "relabel": "sanm_lightning.commands.relabel",
    "study": "sanm_lightning.commands.study",
    "table": "sanm_lightning.commands.table",
}
"""Modules by command name; ``predict`` without ``--images`` is a command of LightningCLI."""


def run(words: Sequence[str]) -> int | None:
    """Run the command named by the first argument.

    Args:
        words: the arguments of the command line.

    Returns:
        The exit status of the command; None if the arguments name none of :data:`COMMANDS`.
    """
    name = words[0] if words else ""
    if name == "predict" and any(word.split("=")[0] == "--images" for word in words):
        name = "predict --images"
    if name not in COMMANDS:
        return None
    sys.path.insert(0, os.getcwd())  # a console script cannot import modules of the working directory otherwise
    status: int = importlib.import_module(COMMANDS[name]).main(list(words[1:]))
    return status
