"""Commands of ``sanm`` beside those of LightningCLI. Each is a module with ``main(words)``, which returns an exit status."""

import importlib
from collections.abc import Sequence

__all__ = ["COMMANDS", "run"]

COMMANDS = {
    "audit": "sanm_lightning.commands.audit",
    "relabel": "sanm_lightning.commands.relabel",
}
"""Modules by the first word of the command line."""


def run(words: Sequence[str]) -> int | None:
    """Run the command that the first word names.

    Args:
        words: the arguments of the command line.

    Returns:
        The exit status of the command; None where the first word names none of :data:`COMMANDS`.
    """
    if not words or words[0] not in COMMANDS:
        return None
    status: int = importlib.import_module(COMMANDS[words[0]]).main(list(words[1:]))
    return status
