"""Commands beside those of Lightning: each a module with ``main(words)``, imported when it is asked for."""

import importlib
from collections.abc import Sequence

__all__ = ["COMMANDS", "run"]

COMMANDS = {
    "relabel": "sanm_lightning.commands.relabel",
}


def run(words: Sequence[str]) -> bool:
    """Run the command that the first word names.

    Args:
        words: the arguments of the command line.

    Returns:
        Whether there is such a command; False leaves the words to Lightning's.
    """
    if not words or words[0] not in COMMANDS:
        return False
    importlib.import_module(COMMANDS[words[0]]).main(list(words[1:]))
    return True
