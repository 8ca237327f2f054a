"""Print an exception as the one sentence that its cause says, without the text that libraries wrap around it."""

import re

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.multiprocessing.spawn import ProcessRaisedException

__all__ = ["INTERRUPTED", "REPORTED", "sentence"]

REPORTED = (ValueError, OSError, MisconfigurationException, ModuleNotFoundError, ProcessRaisedException)
"""Exceptions that the command line prints as a sentence; all others are errors of a program, with a traceback."""

INTERRUPTED = 130
"""Exit status of a command that the user interrupted from the keyboard."""

WRAPPED = ("Does not validate", "Problem with given class_path", "Call to compute_fn of link")
LAST_OF_TRACEBACK = re.compile(r"^(?:[\w.]+\.)?(?P<name>\w+): ", re.MULTILINE)


def sentence(error: BaseException) -> str | None:
    """Return the message of the original error, without that of the parser, of a worker or of a process around it.

    Args:
        error: one of :data:`REPORTED`.

    Returns:
        The message; None if the original error, in another process, is none of :data:`REPORTED`.
    """
    part = next((name for name in ("DataModule", "Module") if f"Lightning{name}'" in str(error)[:300]), "")
    while error.__cause__ is not None and str(error).startswith(WRAPPED):
        error = error.__cause__
    if isinstance(error, ProcessRaisedException) or "\nOriginal Traceback " in str(error):
        return _end_of_traceback(str(error))
    if isinstance(error, REPORTED) or not part:
        return str(error)
    part = "data" if part == "DataModule" else "model"
    return f"expected valid settings under {part!r}, got {type(error).__name__}: {error}"


def _end_of_traceback(text: str) -> str | None:
    """Return the message after the last traceback of a text; None if its exception is not one of those reported."""
    frames_end = text.rfind('\n  File "')
    last = LAST_OF_TRACEBACK.search(text, max(frames_end, 0))
    if last is None:
        return None
    reported = {kind.__name__ for base in REPORTED for kind in (base, *_subclasses(base))}
    return text[last.end() :].strip() if last["name"] in reported else None


def _subclasses(base: type) -> list[type]:
    children: list[type] = base.__subclasses__()
    return [kind for child in children for kind in (child, *_subclasses(child))]
