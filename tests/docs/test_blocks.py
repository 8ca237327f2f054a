"""Every code block of README.md and docs/: commands are parsed by their parsers, Python is run on small data.

The commands of docs/own-data.md are run in tests/test_own_data_page.py, those of other pages in test_commands.py.
"""

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from sanm_lightning import commands as further
from sanm_lightning.cli import main
from sanm_lightning.command_line.parsing import CommandParser
from sanm_lightning.study.cells import cells_of
from sanm_lightning.study.schema import read_study
from tests.docs.pages import ROOT, blocks, commands, is_shell
from tests.full import FULL

BLOCKS = blocks()
ELSEWHERE = "docs/own-data.md"
STUDIES = ("docs/studies.md", "docs/cost.md")  # whose YAML is study files
COST = "docs/cost.md"  # run by tests/test_forward_passes.py
EARLIER = "configs/cifar10/cross_entropy_small.yaml"  # as it was run: refused, with the present configs
LISTINGS = ("root/", "path,", "$ sanm ")  # layouts of folders, tables, and a command with its output
ANY = ["--config", "configs/method/cross_entropy.yaml", "--config", "configs/data/cifar10.yaml"]


class ParsedError(Exception):
    """Raised instead of running a command whose arguments were accepted."""


def typed() -> list[list[str]]:
    """Return the arguments of ``sanm`` in the blocks, each once; ``...`` stands for a method and data.

    Commands that only combine configs, which tests/test_configs.py parses, are left to the full tests.
    """
    found: dict[tuple[str, ...], None] = {}
    skipped = {ELSEWHERE} if FULL else {ELSEWHERE, "docs/methods.md", "docs/data-sets.md"}
    for block in BLOCKS:
        if is_shell(block) and EARLIER not in block.text and block.page not in skipped:
            for words in commands(block):
                if words[0] == "torchrun":
                    words = ["sanm", *words[words.index("sanm_lightning") + 1 :]]
                if words[0] == "sanm":
                    found[tuple(part for word in words[1:] for part in (ANY if word == "..." else [word]))] = None
    return [list(words) for words in found]


def run(words: list[str]) -> None:
    if further.run(words) is None:
        main(words)


def shorter(words: list[str]) -> str:
    return " ".join(word.removeprefix("configs/").removesuffix(".yaml") for word in words if word != "--config")[:90]


def test_every_block_is_of_a_kind_that_is_tested():
    for block in BLOCKS:
        assert block.kind in ("python", "yaml") or is_shell(block) or block.text.startswith(LISTINGS), block
    assert {block.page for block in BLOCKS if block.kind == "python"} == {*PREPARED, ELSEWHERE, COST}


@pytest.fixture
def parse_only(monkeypatch):
    """Let the parser of a command raise when it has accepted the arguments; parsers of nested classes return."""
    whole, depth = CommandParser.parse_args, [0]

    def parse_args(self: CommandParser, *args: Any, **kwargs: Any) -> Any:
        depth[0] += 1
        try:
            parsed = whole(self, *args, **kwargs)
        finally:
            depth[0] -= 1
        if not depth[0]:
            raise ParsedError
        return parsed

    monkeypatch.setattr(CommandParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", ["sanm"])


@pytest.mark.parametrize("words", typed(), ids=shorter)
def test_a_command_is_accepted_by_its_parser(words, parse_only):
    with pytest.raises(ParsedError):
        run(words)


def test_a_command_with_a_wrong_option_is_not_accepted(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sanm"])
    with pytest.raises(ValueError, match="expected an option"):
        main(["fit", *ANY, "--model.sanm.muu", "0.3"])


def test_the_command_of_an_earlier_version_is_refused_with_its_present_form():
    (block,) = [block for block in BLOCKS if EARLIER in block.text]
    with pytest.raises(ValueError, match=r"use --config configs/method/cross_entropy\.yaml .*cifar10-small\.yaml"):
        main(commands(block)[0][1:])


def test_other_programs_are_given_files_and_targets_that_exist():
    makefile = (ROOT / "Makefile").read_text()
    extras = (ROOT / "setup.cfg").read_text().partition("[options.extras_require]")[2]
    for block in filter(is_shell, BLOCKS):
        for program, *words in commands(block):
            if program == "make":
                assert re.search(rf"^{words[0]}:", makefile, re.MULTILINE), words
            elif program == "python":
                script = ROOT / words[0] if words[0] != "-m" else ROOT / f"{words[1].replace('.', '/')}.py"
                assert script.is_file(), words
            elif program == "sbatch":
                assert (ROOT / words[0]).is_file(), words
            elif program == "pip":
                assert words[0] == "install" and all(
                    f"\n{extra} =\n" in extras for extra in re.findall(r"\[(\w+)\]", words[1])
                ), words


def test_yaml_is_accepted_where_the_page_puts_it(parse_only):
    found = [block for block in BLOCKS if block.kind == "yaml" and block.page not in (ELSEWHERE, *STUDIES)]
    assert found
    for block in found:
        content = yaml.safe_load(block.text)
        Path("page.yaml").write_text(
            yaml.safe_dump({"model": {"init_args": content}} if "scheduler" in content else content)
        )
        with pytest.raises(ParsedError):
            run(["fit", *ANY, "--config", "page.yaml"])


def test_a_study_of_the_page_is_a_study(tmp_path):
    found = [block for block in BLOCKS if block.kind == "yaml" and block.page in STUDIES]
    assert {block.page for block in found} == {*STUDIES}
    for block in found:
        path = tmp_path / "page.yaml"
        path.write_text(block.text)
        assert cells_of(read_study(path))


def of_a_network() -> dict[str, Any]:
    """Return SANM, a network, a batch and what a training step has."""
    import torch

    from sanm_lightning import SANM
    from sanm_lightning.functional import soft_cross_entropy
    from sanm_lightning.models import create_network

    network, sanm = create_network("small_cnn", 3, width=4), SANM(mu=0.5, seed=0)
    sanm.build(network, (16, 16))
    images, targets = torch.rand(4, 3, 16, 16), torch.eye(3)[torch.tensor([0, 1, 2, 0])]
    return {
        "self": SimpleNamespace(sanm=sanm), "sanm": sanm, "network": network, "images": images, "targets": targets,
        "quality": torch.rand(4), "features": network.forward_features(images), "loss": torch.zeros(()),
        "soft_cross_entropy": soft_cross_entropy,
    }  # fmt: skip


def of_a_module() -> dict[str, Any]:
    """Return a module with a network ``model``, and its data."""
    import lightning as L
    import torch

    import sanm_lightning.safe_files

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = of_a_network()["network"]

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.01)

    pairs = torch.utils.data.TensorDataset(torch.rand(8, 3, 16, 16), torch.arange(8) % 3)
    from sanm_lightning import SANM, SANMCallback, SANMMixin

    return {
        "L": quiet_lightning(), "module": Module(), "train_loader": torch.utils.data.DataLoader(pairs, 4), "SANM": SANM,
        "SANMCallback": SANMCallback, "SANMMixin": SANMMixin, "sanm_lightning": sanm_lightning,
    }  # fmt: skip


def quiet_lightning() -> Any:
    """Return Lightning with a trainer of two epochs that writes nothing."""
    import lightning as L

    real = L.Trainer

    def trainer(**options: Any) -> L.Trainer:
        silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        return real(**{**options, **silent, "max_epochs": 2, "accelerator": "cpu"})

    return SimpleNamespace(Trainer=trainer, LightningModule=L.LightningModule, seed_everything=L.seed_everything)


def of_a_checkpoint() -> dict[str, Any]:
    """Return what the page of exported weights has: a trained ResNet-18 in ``last.ckpt`` and its folder."""
    import timm
    import torch
    from torchvision.datasets import FakeData

    from sanm_lightning import CrossEntropy, FromDataset

    data = FromDataset(FakeData(6, (3, 32, 32), 3), batch_size=4)
    run = quiet_lightning().Trainer(limit_train_batches=1, limit_val_batches=0)
    run.fit(CrossEntropy(3, network="resnet18", image_size=(32, 32)), data)
    run.save_checkpoint("last.ckpt")
    (export,) = [
        words
        for block in BLOCKS
        if block.page == "docs/predict-and-export.md" and is_shell(block)
        for words in commands(block)
        if words[-1] == "safetensors"
    ]
    assert further.run(export[1:]) == 0
    return {"timm": timm, "images": torch.rand(2, 3, 32, 32)}


def of_names() -> dict[str, Any]:
    """Return names that a page has imported before."""
    import torch
    import torchvision
    from torch.nn import functional

    from sanm_lightning import CIFAR10, SANM, SSR
    from sanm_lightning.functional import generalized_cross_entropy

    names = {
        "torch": torch,
        "torchvision": torchvision,
        "F": functional,
        "sanm": SANM(),
        "CIFAR10": CIFAR10,
        "SSR": SSR,
    }
    return {**names, "generalized_cross_entropy": generalized_cross_entropy}


PREPARED = {
    "README.md": of_a_module,
    "docs/adding-a-method.md": of_names,
    "docs/equations.md": of_a_network,
    "docs/many-gpus.md": of_a_module,
    "docs/methods.md": of_a_network,
    "docs/networks.md": of_names,
    "docs/options.md": of_names,
    "docs/own-modules.md": of_a_module,
    "docs/predict-and-export.md": of_a_checkpoint,
    "docs/quickstart.md": dict,
    "docs/audit.md": dict,
}
"""What the code of a page has before its first block."""

SMALLER = {
    "docs/networks.md": ("(224, 224)", "(64, 64)"),
    "docs/quickstart.md": ("image_size=16, noise", "image_size=16, max_train_samples=64, noise"),
}
"""Text of a page that is replaced, and by what."""


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.parametrize("page", sorted(set(PREPARED) - {"docs/audit.md"}))  # docs/audit.md: test_commands.py
def test_the_python_of_a_page_runs(page, monkeypatch):
    scope, (large, small) = PREPARED[page](), SMALLER.get(page, ("", ""))
    if page == "docs/quickstart.md":
        monkeypatch.setattr("lightning.Trainer", quiet_lightning().Trainer)
    for block in BLOCKS:
        if block.page == page and block.kind == "python":
            assert large in block.text
            exec(block.text.replace(large, small) if large else block.text, scope)
    for name in [name for name in scope if name.startswith("test_")]:
        scope[name]()
