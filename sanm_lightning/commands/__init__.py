"""Commands of ``sanm`` beside those of LightningCLI. Each module has ``main(words)``, which returns an exit status."""

import importlib

__all__ = ["COMMANDS", "run"]

COMMANDS = {"audit": "sanm_lightning.commands.audit"}
"""Modules by the first word of the command line."""


def run(words: list[str]) -> int | None:
    """Run the command that the first word names, and return its exit status; None where it names none of these."""
    if not words or words[0] not in COMMANDS:
        return None
    status: int = importlib.import_module(COMMANDS[words[0]]).main(words[1:])
    return status
