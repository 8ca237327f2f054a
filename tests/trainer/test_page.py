"""docs/lightning.md names everything that is tested, and quotes the sentences of the code."""

import inspect
import re
import typing
from pathlib import Path

import lightning as L
import pytest
from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT_STR
from lightning.pytorch import callbacks
from torch.optim import lr_scheduler

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "lightning.md").read_text()
SCHEDULERS = [
    name
    for name, found in vars(lr_scheduler).items()
    if inspect.isclass(found) and issubclass(found, lr_scheduler.LRScheduler)
]
SENTENCES = [match.rstrip(" |") for match in re.findall(r"\| (expected .*)", PAGE)] + [
    " ".join(match.replace("\n> ", " ").split()) for match in re.findall(r"^> (expected (?:.|\n> )*)", PAGE, re.M)
]


@pytest.mark.parametrize(
    "names",
    [
        callbacks.__all__,
        list(inspect.signature(L.Trainer).parameters),
        typing.get_args(_PRECISION_INPUT_STR),
        SCHEDULERS,
    ],
    ids=["callbacks", "flags", "precisions", "schedulers"],
)
def test_it_names_all(names):
    named = {word.split(".")[-1] for word in re.findall(r"`([\w.-]+)`", PAGE)}
    assert set(names) <= named


def test_its_sentences_are_in_the_code():
    code = "".join(path.read_text() for path in (ROOT / "sanm_lightning").rglob("*.py"))
    literal = re.sub(r'"\s*\n\s*f?"', "", code)  # adjacent strings, joined
    assert len(SENTENCES) == 12
    for sentence in SENTENCES:
        start, rest = sentence.split(", got ")
        assert re.search(wildcards(start), literal), sentence
        assert re.search(wildcards(rest.partition("; ")[2]), literal), sentence


def wildcards(text: str) -> str:
    """Return a pattern of a text whose words may come from values."""
    return r"\s".join(rf"(?:{re.escape(word)}|\S*\{{.+?\}}\S*)" for word in text.split())
