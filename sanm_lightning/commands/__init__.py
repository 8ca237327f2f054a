"""Commands of ``sanm`` beside those of LightningCLI. Each module has ``main(words)``, which returns an exit status."""

import importlib
import os
import sys

__all__ = ["COMMANDS", "run"]

COMMANDS = {
    "export": "sanm_lightning.commands.export",
    "predict --images": "sanm_lightning.commands.predict",
}
"""Modules by the first word of the command line; ``predict`` is LightningCLI's but for images without a data module."""


def run(words: list[str]) -> int | None:
    """Run the command that the first word names, and return its exit status; None where it names none of these."""
    name = words[0] if words else ""
    if name == "predict" and any(word.split("=")[0] == "--images" for word in words):
        name = "predict --images"
    if name not in COMMANDS:
        return None
    sys.path.insert(0, os.getcwd())  # a console script could not import the user's own modules otherwise
    status: int = importlib.import_module(COMMANDS[name]).main(words[1:])
    return status
