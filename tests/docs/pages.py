"""The pages of the documentation and their code blocks."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fenced block: path of its page, language, text."""

    page: str
    kind: str
    text: str


def blocks() -> list[Block]:
    found = ((path, match) for path in PAGES for match in FENCE.finditer(path.read_text(encoding="utf-8")))
    return [Block(str(path.relative_to(ROOT)), match["kind"], match["text"]) for path, match in found]


def commands(block: Block) -> list[list[str]]:
    """Return the words of the command lines of a block, without comments and the brackets of optional parts."""
    lines = block.text.replace("\\\n", " ").splitlines()
    words = (shlex.split(re.sub(r"\[(--[^\]]+)\]", r"\1", line), comments=True) for line in lines)
    return [line for line in words if line]


def is_shell(block: Block) -> bool:
    return block.kind == "" and bool(commands_or_none(block)) and commands(block)[0][0] in PROGRAMS


def commands_or_none(block: Block) -> list[list[str]] | None:
    try:
        return commands(block)
    except ValueError:  # no shell: a quotation mark in a table, for example
        return None


PROGRAMS = {"sanm", "python", "make", "pip", "torchrun", "sbatch", "xdg-open"}
