"""Every shipped config fits the others, states what differs, and is found by the paths that are documented."""

import configparser
import functools
import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml

import sanm_lightning
from sanm_lightning import Noise
from sanm_lightning.cli import FitParser, main
from sanm_lightning.command_line import config_paths
from sanm_lightning.models import create_network
from sanm_lightning.sanm import FeatureQuality
from tests.full import FULL

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
EVERY = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "studies")
METHODS = sorted(CONFIGS.glob("method/*.yaml"))
DATA = sorted(CONFIGS.glob("data/*.yaml"))
SETTINGS = sorted(CONFIGS.glob("setting/*/*.yaml"))
NOISE = sorted(CONFIGS.glob("noise/*.yaml"))
SANMS = [CONFIGS / "sanm.yaml", *sorted(CONFIGS.glob("sanm/**/*.yaml"))]
PAPER = CONFIGS / "sanm" / "paper.yaml"
JOBS = [CONFIGS / "quickstart.yaml", CONFIGS / "image_folder.yaml"]
CIFAR10 = CONFIGS / "data" / "cifar10.yaml"

# The layout of the first versions: configs/cifar10/<method>.yaml, configs/cifar10/<method>/<noise>.yaml, and cifar100/.
BASES = ["c2d", "cdr", "co_teaching", "cross_entropy", "dividemix", "elr", "elr_plus", "simclr", "ssr"]
RATES = ["asym20", "asym40", "sym20", "sym50", "sym80", "sym90"]
OVERLAYS = {
    "cifar10/cdr": RATES, "cifar10/co_teaching": RATES, "cifar10/dividemix": RATES, "cifar10/elr": RATES[:2],
    "cifar10/elr_plus": RATES[:2], "cifar100/cdr": RATES, "cifar100/co_teaching": RATES, "cifar100/dividemix": RATES[1:],
    "cifar100/ssr": RATES[3:],
}  # fmt: skip
OLD_PATHS = [
    *(f"configs/{data}/{method}.yaml" for data in ("cifar10", "cifar100") for method in BASES),
    "configs/cifar10/cross_entropy_small.yaml",
    *(f"configs/{base}/{noise}.yaml" for base, noises in OVERLAYS.items() for noise in noises),
]


def name(path: Path) -> str:
    return str(path.relative_to(CONFIGS).with_suffix("")) if isinstance(path, Path) else str(path)


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def class_of(path: str) -> type:
    """The class of a class path; the classes of this package have short ones."""
    if "." not in path:
        rooms = (sanm_lightning, sanm_lightning.methods, sanm_lightning.data, sanm_lightning.sanm)
        return next(getattr(room, path) for room in rooms if hasattr(room, path))
    module, _, last = path.rpartition(".")
    return getattr(importlib.import_module(module), last)


def stated(node: dict[str, Any], path: str = "", owner: type | None = None) -> Iterator[tuple[str, Any, type | None]]:
    """What a file states: dotted name, value, and the class that takes it, where the file names it."""
    for key, value in node.items():
        inner = f"{path}.{key}" if path else key
        if key == "init_args":
            yield from stated(value, inner, class_of(node["class_path"]) if "class_path" in node else None)
        elif key == "trainer":
            yield from stated(value, inner, L.Trainer)
        elif isinstance(value, dict) and ({"class_path", "init_args"} & value.keys() or key == "noise"):
            yield from stated(value, inner, Noise if key == "noise" else None)
        else:
            yield inner, tuple(value) if isinstance(value, list) else value, owner


def class_defaults(owner: type) -> dict[str, Any]:
    """Default values of a class and of those to which it hands its keyword arguments."""
    found: dict[str, Any] = {}
    for base in reversed(owner.__mro__):
        if "__init__" in vars(base):
            found |= {
                name: parameter.default for name, parameter in inspect.signature(base.__init__).parameters.items()
            }
    return found


def parts(setting: Path) -> tuple[Path, Path, list[Path]]:
    """The method and the data of a setting, and the noise, where it is for one."""
    data, _, rest = setting.stem.partition("-")
    noise = CONFIGS / "noise" / f"{rest}.yaml"
    assert noise.exists() or rest in ("", "small", "released", "truncated"), "named neither <set> nor <set>-<noise>"
    return (
        CONFIGS / "method" / f"{setting.parent.name}.yaml",
        CONFIGS / "data" / f"{data}.yaml",
        [noise] * noise.exists(),
    )


def told(*configs: Path) -> list[str]:
    """The noise rate and the known labels, where the method wants to be told and no setting says it: they have no default."""
    models = [read(config).get("model", {}) for config in configs]
    words = {"noise_rate": "0.5", "probe": str(Path(__file__).parent / "methods" / "probe.csv")}
    said = {name for model in models for name in words.keys() & model.get("init_args", {}).keys()}
    paths = [model.get("class_path") for model in models]
    taken = {name for path in paths if path for name in words.keys() & class_defaults(class_of(path)).keys()}
    return [word for name in sorted(taken - said) for word in (f"--model.{name}", words[name])]


@pytest.fixture(scope="session")
def parse():
    """Return a function from configs, and more words of the command line, to the settings of ``fit`` by dotted name."""
    parser = FitParser().parser
    parser.exit_on_error = False

    def settings(*configs: Path, words: list[str] | None = None) -> dict[str, Any]:
        line = [word for config in configs for word in ("--config", str(config))]
        return parsed(*line, *(told(*configs) if words is None else words))

    @functools.cache
    def parsed(*line: str) -> dict[str, Any]:
        found = parser.parse_args(list(line)).as_dict()
        return {key: value for key, value in flat(found) if key != "config"}

    return settings


def flat(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from flat(value, f"{path}.{key}" if path else key)
    else:
        yield path, tuple(node) if isinstance(node, list) else node


def value_of(settings: dict[str, Any], path: str, default: Any = None) -> Any:
    """One of the settings, or all that lie below a dotted name."""
    below = {key[len(path) + 1 :]: value for key, value in settings.items() if key.startswith(f"{path}.")}
    return settings.get(path, below or default)


def same(stated: Any, parsed: Any) -> bool:
    """Whether a value of a file is a parsed one; class paths may be short, and classes in lists have further defaults."""
    if isinstance(stated, dict) and isinstance(parsed, dict):
        return all(same(value, parsed.get(key)) for key, value in stated.items())
    if isinstance(stated, (list, tuple)) and isinstance(parsed, (list, tuple)):
        return len(stated) == len(parsed) and all(map(same, stated, parsed))
    return stated == parsed or (isinstance(stated, str) and str(parsed).endswith(f".{stated}"))


class TestStudies:
    """The command lines of the studies in ``examples`` are those of ``sanm fit``."""

    @pytest.fixture
    def study(self, request, monkeypatch):
        monkeypatch.syspath_prepend(str(ROOT / "examples"))
        monkeypatch.chdir(ROOT)
        yield importlib.import_module(request.param)
        for module in (request.param, "_runs"):
            sys.modules.pop(module, None)

    @pytest.mark.parametrize("study", ["digits_methods"], indirect=True)
    def test_the_methods_on_digits(self, parse, study):
        for number, (method, options) in list(enumerate(study.METHODS.items()))[:: 1 if FULL else 3]:
            noise = list(study.NOISES)[number % len(study.NOISES)]
            settings = parse(CONFIGS / "quickstart.yaml", words=study.words_of(method, noise, masked=bool(number % 2)))
            assert settings["model.class_path"].endswith(f".{study.CLASSES.get(method, method.split()[0])}")
            said = [word.removeprefix("--").partition(".") for word in options[::2]]
            assert all(value_of(settings, f"{part}.init_args.{key}") is not None for part, _, key in said)
            assert settings["data.init_args.noise.kind"] in study.NOISES[noise][2]
            assert bool(number % 2) == (value_of(settings, "model.init_args.sanm") is not None)

    @pytest.mark.parametrize("study", ["cifar10_small"], indirect=True)
    def test_the_rows_of_the_small_cifar10(self, parse, study, tmp_path):
        runs = study.Study("images", tmp_path, "sym50")
        for number, (method, (_, options)) in list(enumerate(study.METHODS.items()))[:: 1 if FULL else 2]:
            arm = f"{method}{['', '_sanm', '_features'][number % 3]}"
            settings = parse(words=runs.words_of(arm, seed=1)[1:])
            assert settings["model.class_path"].endswith(f".{options[1]}")
            assert settings["model.init_args.network"] == "preact_resnet18_dividemix"
            quality = value_of(settings, "model.init_args.sanm.init_args.quality.class_path", "")
            assert quality.endswith("FeatureQuality" if number % 3 == 2 else "")
            assert all(value_of(settings, f"model.init_args.{word[8:]}") is not None for word in options[2::2])


class TestComposition:
    @pytest.mark.parametrize("method", METHODS, ids=name)
    def test_a_method_goes_with_every_data_set(self, parse, method):
        """In ``make test``, with CIFAR-10 and one of the others in turn."""
        for data in DATA if FULL else {CIFAR10, DATA[METHODS.index(method) % len(DATA)]}:
            settings = parse(method, data)
            for path, value, _ in [*stated(read(method)), *stated(read(data))]:
                assert same(value, value_of(settings, path)), (data.stem, path)

    @pytest.mark.parametrize("setting", SETTINGS, ids=name)
    def test_a_setting_fits_its_method_data_and_noise(self, parse, setting):
        method, data, noise = parts(setting)
        settings = parse(method, data, setting, *noise)
        for path, value, _ in stated(read(setting)):
            assert same(value, value_of(settings, path)), path

    @pytest.mark.parametrize("setting", [path for path in SETTINGS if parts(path)[2]], ids=name)
    def test_a_setting_for_one_noise_is_complete(self, parse, setting):
        """The setting for all noises of the set, given as well, changes nothing."""
        method, data, _ = parts(setting)
        general = setting.with_name(f"{data.stem}.yaml")
        if general.exists():
            assert parse(method, data, setting) == parse(method, data, general, setting)

    @pytest.mark.parametrize("noise", NOISE, ids=name)
    def test_a_noise_is_the_one_of_its_name(self, parse, noise):
        settings = parse(CONFIGS / "method" / "elr.yaml", CIFAR10, noise)
        options = {path.rpartition(".")[2]: settings[path] for path, _, _ in stated(read(noise))}
        start, _, rest = noise.stem.partition("_")
        kind = {"sym": "symmetric", "asym": "asymmetric"}[start.rstrip("0123456789")]
        assert options["kind"] == (f"{kind}_{rest}" if rest else kind)
        assert options["rate"] == int(re.sub(r"\D", "", noise.stem)) / 100
        Noise(**options)

    def test_the_commands_in_the_files_are_commands(self, parse):
        """What a comment says to type exists and is parsed; optional parts included."""
        found = 0
        for path in EVERY if FULL else [*SETTINGS[::3], *(path for path in EVERY if path not in SETTINGS)]:
            comment = "\n".join(line[1:] for line in path.read_text().splitlines() if line.startswith("#"))
            for command in re.findall(r"^ sanm fit (.*(?:\n   .*)*)", comment, re.MULTILINE):
                words = config_paths.resolve(re.sub(r"[\[\]]", "", command).split())
                config_paths.check_order(words)
                configs = [Path(words[i + 1]) for i, word in enumerate(words) if word == "--config"]
                others = [word for word in words if word != "--config" and Path(word) not in configs]
                assert path in configs
                told_already = {"--model.noise_rate", "--model.probe"} & set(others)
                parse(*configs, words=None if told_already else others)
                found += 1
        assert found >= len(METHODS) + len(JOBS)


def restated(config: Path, under: dict[str, Any] | None = None) -> list[str]:
    """Names in a file whose values are the defaults of their classes; without a class, those of the settings under it."""
    found, unknown = [], inspect.Parameter.empty
    for path, value, owner in stated(read(config)):
        if owner is not None:
            default = class_defaults(owner).get(path.rpartition(".")[2], unknown)
        else:
            default = value_of(under or {}, path, unknown)
        if not path.endswith(".class_path") and same(value, default):
            found.append(path)
    return found


class TestContent:
    """What a file may state."""

    @pytest.mark.parametrize(
        "config", sorted({*METHODS, *DATA, *JOBS, *NOISE, *SANMS, CONFIGS / "quickstart_sanm.yaml"} - {PAPER}), ids=name
    )
    def test_no_class_default_is_restated(self, config):
        """But in the paper's form of SANM, which remains if a default changes."""
        assert not restated(config)

    @pytest.mark.parametrize("views", sorted(CONFIGS.glob("views/*.yaml")), ids=name)
    def test_views_state_what_the_method_does_not(self, parse, views):
        assert not restated(views, parse(CONFIGS / "method" / "dividemix.yaml", CIFAR10))

    @pytest.mark.parametrize("setting", SETTINGS, ids=name)
    def test_a_setting_states_what_its_method_and_data_do_not(self, parse, setting):
        """Or, for one noise, what the setting for all noises of the set says otherwise."""
        method, data, noise = parts(setting)
        general = setting.with_name(f"{data.stem}.yaml")
        found = restated(setting, parse(method, data))
        if noise and general.exists():
            found = [path for path in found if path in restated(setting, parse(method, data, general))]
        assert not found

    @pytest.mark.parametrize(
        ("text", "found"),
        [
            ("model: {class_path: ELR, init_args: {momentum: 0.7, weight: 2.0}}", ["model.init_args.momentum"]),
            ("model: {class_path: ELR, init_args: {network: preact_resnet18}}", ["model.init_args.network"]),
            ("model: {class_path: CoTeaching, init_args: {network: preact_resnet18}}", []),
            ("data: {class_path: ImageFolder, init_args: {image_size: 224}}", ["data.init_args.image_size"]),
            (
                "data: {class_path: Toy, init_args: {noise: {kind: symmetric, rate: 0.0}}}",
                ["data.init_args.noise.rate"],
            ),
            ("trainer: {accumulate_grad_batches: 1, max_epochs: 3}", ["trainer.accumulate_grad_batches"]),
            (
                "model: {init_args: {scheduler: {class_path: torch.optim.lr_scheduler.MultiStepLR, "
                "init_args: {milestones: [3], gamma: 0.1}}}}",
                ["model.init_args.scheduler.init_args.gamma"],
            ),
        ],
    )
    def test_a_restated_default_would_be_found(self, tmp_path, text, found):
        (tmp_path / "file.yaml").write_text(text)
        assert restated(tmp_path / "file.yaml") == found

    def test_a_restated_setting_would_be_found(self, parse, tmp_path):
        (tmp_path / "file.yaml").write_text(
            "{trainer: {max_epochs: 9}, model: {init_args: {momentum: 0.7, mean: [0, 1, 2]}}}"
        )
        assert restated(tmp_path / "file.yaml", parse(CONFIGS / "method" / "elr.yaml", CIFAR10)) == [
            "model.init_args.momentum"
        ]

    @pytest.mark.parametrize("config", EVERY, ids=name)
    def test_a_file_states_its_own_part_only(self, config):
        own = {
            "method": {"trainer", "model"}, "data": {"data"}, "setting": {"trainer", "model", "data"}, "noise": {"data"},
            "sanm": {"model"}, "views": {"model"}, "quickstart_sanm": {"model"},
        }  # fmt: skip
        folder = config.relative_to(CONFIGS).with_suffix("").parts[0]
        assert read(config).keys() <= own.get(folder, {"seed_everything", "trainer", "model", "data"})
        if folder in ("setting", "noise", "views"):
            assert not {"model.class_path", "data.class_path"} & {path for path, _, _ in stated(read(config))}

    @pytest.mark.parametrize("config", [*METHODS, *DATA, *NOISE, *SANMS], ids=name)
    def test_a_noise_rate_is_told_in_a_setting_or_on_the_command_line_only(self, config):
        assert not re.search(r"^[^#]*(noise_rate|forget_rate):", config.read_text(), re.MULTILINE)

    @pytest.mark.parametrize("config", [*METHODS, *SETTINGS], ids=name)
    def test_a_file_names_its_source(self, config):
        comment = "".join(line for line in config.read_text().splitlines() if line.startswith("#"))
        assert re.search(r"et al\.| and \w+, |Not a published setting|C2D", comment)


def test_the_published_channel_statistics_are_those_of_the_data_classes():
    """DivideMix's; methods that normalize otherwise say so in their own configs and settings."""
    data = sanm_lightning.data
    assert tuple(data.CIFAR10().mean) == (0.4914, 0.4822, 0.4465)
    assert tuple(data.CIFAR10().std) == (0.2023, 0.1994, 0.2010)
    assert tuple(data.CIFAR100().mean) == (0.507, 0.487, 0.441)
    assert tuple(data.CIFAR100().std) == (0.267, 0.256, 0.276)


class TestOldPaths:
    @pytest.mark.parametrize("path", OLD_PATHS)
    def test_an_old_path_ends_in_the_words_that_take_its_place(self, path):
        with pytest.raises(ValueError, match=f"got '{path}'; use --config configs/method/") as refused:
            config_paths.resolve(["fit", "--config", path])
        named = re.findall(r"--config (\S+)", str(refused.value))
        assert all((ROOT / new).is_file() for new in named)
        assert [Path(new).parts[1] for new in named] in (["method", "data"], ["method", "data", "setting"])
        assert Path(named[1]).stem == Path(path).parts[1]

    @pytest.mark.parametrize(
        ("old", "use"),
        [
            (["cifar10/dividemix"], "method/dividemix data/cifar10"),
            (["cifar100/dividemix"], "method/dividemix data/cifar100 setting/dividemix/cifar100"),
            (["cifar100/dividemix", "cifar100/dividemix/sym80"], "method/dividemix data/cifar100 setting/dividemix/cifar100"),
            (["cifar10/dividemix/sym90"], "method/dividemix data/cifar10 setting/dividemix/cifar10-sym90"),
            (["cifar100/c2d", "cifar100/dividemix/sym20"], "method/c2d data/cifar100 setting/c2d/cifar100-sym20"),
            (["cifar10/cdr", "cifar10/cdr/sym80"], "method/cdr data/cifar10 setting/cdr/cifar10 --model.noise_rate 0.8"),
            (["cifar10/cross_entropy_small"], "method/cross_entropy data/cifar10 setting/cross_entropy/cifar10-small"),
            (["cifar10/elr/asym40"], "method/elr data/cifar10 setting/elr/cifar10-asym40"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )  # fmt: skip
    def test_the_old_paths_of_a_command_are_answered_together(self, old, use):
        words = [word for path in old for word in (f"--config=configs/{path}.yaml", "--config", str(NOISE[0]))]
        with pytest.raises(ValueError) as refused:
            config_paths.resolve(["fit", *words])
        wanted = re.sub(r"((?:method|data|setting)/\S+)", r"--config configs/\1.yaml", use)
        assert str(refused.value).endswith(f"; use {wanted}")
        assert all(f"'configs/{path}.yaml'" in str(refused.value) for path in old)

    def test_a_file_of_the_users_own_at_an_old_path_is_taken(self, tmp_path):
        own = tmp_path / "configs" / "cifar10" / "elr.yaml"
        own.parent.mkdir(parents=True)
        own.write_text("{}")
        assert config_paths.resolve(["--config", "configs/cifar10/elr.yaml"]) == [
            "--config",
            "configs/cifar10/elr.yaml",
        ]


class TestPackage:
    def test_every_room_and_every_config_is_packaged(self):
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        listed = set(setup["options"]["packages"].split())
        rooms = {
            str(path.parent.relative_to(ROOT)).replace("/", ".") for path in ROOT.glob("sanm_lightning/**/__init__.py")
        }
        assert listed == rooms | {"sanm_lightning.configs"}
        assert setup["options"]["package_dir"].split() == ["sanm_lightning.configs", "=", "configs"]
        assert setup["options.package_data"]["sanm_lightning.configs"] == "**/*.yaml"
        assert not [path for path in CONFIGS.rglob("*") if path.is_file() and path.suffix != ".yaml"]


# One step of each method, alone and under what is laid on top of it.


@pytest.fixture
def encoder(tmp_path) -> str:
    """Random weights in a file, as if they were pre-trained."""
    path = tmp_path / "encoder.pt"
    torch.save(create_network("resnet18_cifar", 10, channels=(4, 4, 8, 8)).state_dict(), path)
    return str(path)


def one_step(monkeypatch, *configs: Path, words: list[str] | None = None):
    """Run a step on toy data."""
    monkeypatch.setattr(sys, "argv", ["sanm"])
    line = [word for config in configs for word in ("--config", str(config))]
    toy = {"num_classes": 10, "image_size": 32, "num_samples": 24, "num_test_samples": 8, "batch_size": 8}
    line += ["--data", "Toy", *(word for key, value in toy.items() for word in (f"--data.{key}", str(value)))]
    line += ["--data.max_train_samples", "null", "--data.crop_padding", "2"]
    quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    line += [f"--trainer.{key}=false" for key in quiet]
    line += ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
    line += ["--trainer.limit_val_batches=0", "--model.warmup_epochs=0", *told(*configs), *(words or [])]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*empty.*")  # a labelled set, on 24 samples
        return main(["fit", *line])


def slim(monkeypatch):
    """Shrink what the configs ask for, so that a step takes no second: the config is the test, not the arithmetic."""
    from sanm_lightning.models import preact_resnet, resnet_cifar

    monkeypatch.setattr(sys.modules["sanm_lightning.models.cnn9"], "WIDTHS", ((4, 4, 4), (4, 4, 4), (8, 8, 8)))
    monkeypatch.setattr(resnet_cifar, "CHANNELS", (4, 4, 8, 8))
    plain = preact_resnet.PreActResNet.__init__
    monkeypatch.setattr(
        preact_resnet.PreActResNet, "__init__", lambda self, *a, **k: plain(self, *a, **{**k, "width": 4})
    )


def words_for(config: Path, encoder: str) -> list[str]:
    """What a method or a job needs on 24 small images."""
    return {
        "c2d": ["--model.pretrained", encoder],
        "reed": ["--model.pretrained", encoder],
        "image_folder": [
            "--model.network",
            "small_cnn",
        ],  # the map of a network for large images has one place on these
        "simclr": ["--data.track_test", "false"],  # it evaluates nothing
        "ssr": ["--model.k", "5"],
        "rrl": ["--model.k", "5", "--model.given_epochs", "0"],
        "moit": ["--model.k", "5", "--model.select_epochs", "null"],
        "sel_cl": ["--model.k", "5", "--model.select_epochs", "null"],
    }.get(config.stem, [])


def with_data(config: Path) -> list[Path]:
    return [config, CIFAR10] if config in METHODS else [config]


ALONE = [*METHODS, *JOBS] if FULL else [CONFIGS / "method" / "simclr.yaml", CONFIGS / "method" / "elr.yaml", *JOBS]
"""The others run under SANM in ``make test``."""


@pytest.mark.parametrize("config", ALONE, ids=name)
def test_a_method_runs_a_step(monkeypatch, encoder, config):
    slim(monkeypatch)
    cli = one_step(monkeypatch, *with_data(config), words=words_for(config, encoder))
    assert cli.trainer.global_step == 1
    assert not cli.model.sanm.enabled
    assert cli.datamodule.noise_kind == ("symmetric_exclusive" if config.stem == "quickstart" else "none")


FEATURES = CONFIGS / "sanm" / "features.yaml"
THIRD = [*METHODS[::3], *JOBS]
IN_BOTH = [CONFIGS / "method" / f"{stem}.yaml" for stem in ("cross_entropy", "co_teaching", "ssr")]
UNDER_SANM = [
    (config, overlay)
    for overlay, configs in ((CONFIGS / "sanm.yaml", [*THIRD, *IN_BOTH]), (FEATURES, IN_BOTH))
    for config in [*METHODS, *JOBS]
    if config.stem != "simclr" and (FULL or config in configs)
]
"""Every method in ``make test-all``; in ``make test`` a third of them, and quality from features over three of them."""


@pytest.mark.parametrize(("config", "overlay"), UNDER_SANM, ids=name)
def test_a_method_runs_a_step_under_sanm(monkeypatch, encoder, config, overlay):
    slim(monkeypatch)
    cli = one_step(monkeypatch, *with_data(config), overlay, words=words_for(config, encoder))
    assert cli.trainer.global_step == 1
    assert isinstance(cli.model.sanm.label_quality, FeatureQuality) == (overlay.stem == "features")
    assert cli.model.sanm.enabled
    assert 0 <= float(cli.model.sanm.last["masked_fraction"]) <= 1


def test_simclr_under_sanm_is_refused_in_a_sentence(monkeypatch):
    slim(monkeypatch)
    with pytest.raises(ValueError, match="expected SimCLR without SANM"):
        one_step(monkeypatch, CONFIGS / "method" / "simclr.yaml", CIFAR10, CONFIGS / "sanm.yaml")


IN_TEST = ("amg", "features", "frozen", "joint", "oracle", "random", "shuffled_random")
VARIANTS = [path for path in SANMS[1:] if FULL or path.stem in IN_TEST]


@pytest.mark.parametrize("overlay", VARIANTS, ids=name)
def test_a_variant_of_sanm_goes_on_top_of_a_method(monkeypatch, overlay):
    slim(monkeypatch)
    frozen = ["--model.sanm.place.name", "resnet18", "--model.sanm.place.pretrained", "false"]  # no download
    cli = one_step(
        monkeypatch, CONFIGS / "method" / "cross_entropy.yaml", CIFAR10, CONFIGS / "noise" / "sym50.yaml", overlay,
        words=frozen if overlay.stem == "frozen" else [],
    )  # fmt: skip
    assert 0 <= float(cli.model.sanm.last["masked_fraction"]) <= 1


@pytest.mark.parametrize("method", ["dividemix", "c2d"])
@pytest.mark.parametrize("views", [("sanm/released", "views/released"), ("views/control",)], ids=" ".join)
def test_the_released_views_and_their_control(monkeypatch, encoder, method, views):
    slim(monkeypatch)
    config = CONFIGS / "method" / f"{method}.yaml"
    overlays = [CONFIGS / f"{view}.yaml" for view in views]
    words = words_for(config, encoder)
    cli = one_step(monkeypatch, config, CIFAR10, CONFIGS / "noise" / "sym50.yaml", *overlays, words=words)
    assert cli.model.sanm.enabled == (len(views) == 2)


def test_the_quickstart_runs_a_step_under_its_own_sanm(monkeypatch):
    cli = one_step(monkeypatch, CONFIGS / "quickstart.yaml", CONFIGS / "quickstart_sanm.yaml")
    assert 0 <= float(cli.model.sanm.last["masked_fraction"]) <= 1
