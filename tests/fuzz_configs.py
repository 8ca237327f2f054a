"""Random edits of the shipped configurations: each ends in objects that can run, or in an error that names the key.

    python tests/fuzz_configs.py [--edits 500] [--seed 0] [--show]

Not collected as a test; ``test_fuzzed_configs.py`` runs some. All in one process, on toy data sets in the place of those that
would have to be downloaded. The size of the process is limited, so that a number too large is an error and no catastrophe.
"""

import argparse
import collections
import contextlib
import copy
import io
import os
import random
import re
import resource
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"

import yaml

CONFIGS = Path(__file__).parents[1] / "configs"
VALUES = [
    None, True, False, -1, 0, 1, 2, 3.5, -0.5, 1.5, 10**9, 10**18, -(10**18), 1e308, float("inf"), float("nan"), "", "abc",
    "1e-3", "nowhere/none.yaml", [], [1], [1, 2, 3], ["a"], [None], {}, {"a": 1}, {"class_path": "NoSuchClass"},
    {"class_path": "torch.nn.Linear", "init_args": {"in_features": 1, "out_features": 1}}, {"init_args": {"lr": 1}}, "None",
]  # fmt: skip

WHOLE = [-(10**18), -7, -1, 0, 1, 2, 3, 17, 10**4, 10**9, 10**18, 10**30]
FRACTIONS = [-1e308, -0.5, 1e-30, 0.5, 1.5, 1e30, 1e308, float("inf"), float("-inf"), float("nan")]


OWN_FILES = {"animal10n": "Animal10N", "clothing1m": "Clothing1M", "webvision": "WebVision"}
"""Data sets that are made without their files: their classes are fuzzed, the others are replaced by toy data."""


def recipes() -> list[list[Path]]:
    """Each job and method alone, with each setting for CIFAR, and with each overlay that is made for it."""
    cifar10 = CONFIGS / "data" / "cifar10.yaml"
    methods = {path.stem: [path, cifar10] for path in sorted(CONFIGS.glob("method/*.yaml"))}
    jobs = [[CONFIGS / "quickstart.yaml"], [CONFIGS / "image_folder.yaml"], *methods.values()]
    files = [
        path for path in sorted(CONFIGS.glob("setting/*/*.yaml")) if path.stem.split("-")[0] in ("cifar10", "cifar100")
    ]
    settings = [[*methods[path.parent.name], path] for path in files]
    sanms = [CONFIGS / "sanm.yaml", *sorted(CONFIGS.glob("sanm/*.yaml"))]
    noises = sorted(CONFIGS.glob("noise/*.yaml"))
    labelled = [job for job in jobs if job[0].stem != "simclr"]
    mixing = [methods["dividemix"], methods["c2d"]]
    views = [[*job, CONFIGS / "views" / "control.yaml"] for job in mixing]
    released = [[*job, CONFIGS / "sanm" / "released.yaml", CONFIGS / "views" / "released.yaml"] for job in mixing]
    over = [[*job, sanm] for job in labelled for sanm in sanms] + [[*job, noise] for job in jobs for noise in noises]
    return jobs + settings + over + views + released


def field_recipes() -> list[list[Path]]:
    """Each setting for a data set with real noise, on the class of the data set."""
    return [
        [CONFIGS / "method" / f"{path.parent.name}.yaml", CONFIGS / "data" / f"{name}.yaml", path]
        for name in OWN_FILES
        for path in sorted(CONFIGS.glob(f"setting/*/{name}*.yaml"))
    ]


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a file: its keys, and the entries of its lists."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def edit(content: dict[str, Any], draw: random.Random) -> str:
    """Change one thing; return what."""
    path = draw.choice(list(places(content)))
    holder: Any = content
    for key in path[:-1]:
        holder = holder[key]
    name, key = ".".join(map(str, path)), path[-1]
    kind = draw.choice(["value", "value", "value", "remove", "rename", "add", "number", "number", "number", "wrap"])
    if kind == "remove":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif kind == "add" and isinstance(holder, dict):
        holder["unknown"] = draw.choice(VALUES)
    elif kind == "number" and type(holder[key]) in (int, float):  # of the same type: the parser has nothing to say
        whole = type(holder[key]) is int
        holder[key] = draw.choice(WHOLE) if whole else draw.choice([*WHOLE, *FRACTIONS])
    elif kind == "wrap":
        holder[key] = draw.choice([[holder[key]], {"inner": holder[key]}, str(holder[key]) + "x"])
    else:
        kind, holder[key] = "value", draw.choice(VALUES)
    return f"{kind} {name}" + (f" = {holder[key]!r}" if isinstance(holder, dict) and key in holder else "")


def merged(configs: list[Path]) -> dict[str, Any]:
    """The files laid over one another, on toy data where the data would be downloaded or are a user's own."""
    whole: dict[str, Any] = {}

    def lay(under: dict[str, Any], over: dict[str, Any]) -> None:
        for key, value in over.items():
            if isinstance(value, dict) and isinstance(under.get(key), dict):
                if value.get("class_path", under[key].get("class_path")) != under[key].get("class_path"):
                    under[key].pop("init_args", None)  # those of another class
                lay(under[key], value)
            else:
                under[key] = copy.deepcopy(value)

    for path in configs:
        lay(whole, yaml.safe_load(path.read_text()))
    if whole["model"].get("class_path") in (
        "CDR",
        "CoTeaching",
        "CoTeachingPlus",
        "NestedCoTeaching",
        "SELFIE",
    ):  # required
        whole["model"]["init_args"].setdefault("noise_rate", 0.5)
    if whole["model"].get("class_path") == "IEG":
        whole["model"]["init_args"].setdefault("probe", "probe.csv")
    place = (((whole["model"].get("init_args") or {}).get("sanm") or {}).get("init_args") or {}).get("place")
    if isinstance(place, dict):  # its weights would be downloaded
        place["init_args"] = {**(place.get("init_args") or {}), "name": "resnet18", "pretrained": False}
    data = whole.get("data") or {}
    arguments = {k: v for k, v in (data.get("init_args") or {}).items() if k not in ("root", "image_size")}
    side = 96 if configs[0].stem == "image_folder" else 32  # its network makes the map small
    size = {"num_classes": 10, "num_samples": 24, "num_test_samples": 8, "image_size": side}
    if data.get("class_path") in OWN_FILES.values():
        whole["model"]["init_args"].pop("network_args", None)  # its weights would be downloaded
        whole["model"]["init_args"]["network"] = "resnet18"
    else:
        whole["data"] = {"class_path": "Toy", "init_args": {**arguments, **size}}
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    whole["trainer"] = {**(whole.get("trainer") or {}), **quiet}
    return whole


def attempt(content: dict[str, Any], name: str) -> tuple[str, str]:
    """Parse and instantiate; return how it ended and what was said: "made", "refused", or the exception's name."""
    from sanm_lightning.cli import entry_point

    file = Path(tempfile.gettempdir()) / name
    file.write_text(yaml.safe_dump(content))
    told = io.StringIO()
    before = list(sys.argv)
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sys.argv = ["sanm", "fit", "--config", str(file)]
            entry_point()
        return "made", ""
    except SystemExit as end:
        return ("refused" if end.code == 2 else f"exit {end.code}"), told.getvalue()
    except BaseException as error:
        return type(error).__name__, traceback.format_exc()
    finally:
        sys.argv = before
        file.unlink()


def names_the_key(what: str, said: str) -> bool:
    """Whether a sentence has the edited key in it, or the one above it, or what was written there."""
    path, _, _ = what.split(" ", 1)[1].partition(" = ")
    words = [
        word
        for word in path.split(".")
        if word not in ("init_args", "class_path", "dict_kwargs") and not word.isdigit()
    ]
    wanted = words[-2:] + (["unknown"] if what.startswith("add") else [])
    wanted += [f"{words[-1]}x"] if what.startswith("rename") and words else []
    sentence = said.split("error: ")[-1] if "error: " in said else said
    sentence = "\n".join(line for line in sentence.splitlines() if "Given value" not in line)  # repeats everything
    sentence = sentence.removeprefix("sanm: ").split("(SANM_TRACEBACK")[0]
    return any(re.search(rf"\b{re.escape(word)}\b", sentence) for word in wanted)


def without_running() -> None:
    """Let ``fit`` stop before its first step: what is tested is everything before."""
    import lightning as L

    L.Trainer._fit_impl = lambda *args, **options: None  # fit itself has the arguments of the command line


@contextlib.contextmanager
def limited_memory(allowance: int = 2 * 2**30) -> Iterator[None]:
    """Limit the address space to what the process has and ``allowance`` bytes, so that a number too large is an error."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + allowance
    resource.setrlimit(
        resource.RLIMIT_AS, (limit if limits[1] == resource.RLIM_INFINITY else min(limit, limits[1]), limits[1])
    )
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def fuzz(
    edits: int, seed: int, show: bool = False, every: list[list[Path]] | None = None
) -> tuple[collections.Counter[str], list[str]]:
    """Return how many ended how, and a description of each that should not have ended so."""
    draw = random.Random(seed)
    every = recipes() if every is None else every
    ends: collections.Counter[str] = collections.Counter()
    wrong = []
    for number in range(edits):
        configs = draw.choice(every)
        content = merged(configs)
        changes = [edit(content, draw) for _ in range(draw.choice([1, 1, 1, 2]))]
        with limited_memory():
            end, said = attempt(content, f"fuzz{os.getpid()}.yaml")
        ends[end] += 1
        told = f"{number}: {'+'.join(p.stem for p in configs)}; {'; '.join(changes)} -> {end}: {said.strip()[-600:]}"
        named = end == "made" or any(names_the_key(change, said) for change in changes)
        if end not in ("made", "refused") or "Traceback" in said or not named:
            wrong.append(told)
        if show:
            print(told, flush=True)
    return ends, wrong


def main() -> None:
    """Parse arguments, run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args()
    import logging

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    without_running()
    os.chdir(tempfile.mkdtemp())
    ends, wrong = fuzz(options.edits, options.seed, options.show, [*recipes(), *field_recipes()])
    print("\n\n".join(wrong))
    print(f"{options.edits} edits: {dict(ends)}; {len(wrong)} ended wrongly")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
