"""Commands of ``sanm`` in addition to those of LightningCLI.

Each module defines ``main(words)``, which returns an exit status.
"""

import importlib

__all__ = ["COMMANDS", "run"]

COMMANDS = {"audit": "sanm_lightning.commands.audit"}
"""Modules by command name, the first argument of the command line."""


def run(words: list[str]) -> int | None:
    """Run the command named by the first argument and return its exit status; return None for other arguments."""
    if not words or words[0] not in COMMANDS:
        return None
    status: int = importlib.import_module(COMMANDS[words[0]]).main(words[1:])
    return status
