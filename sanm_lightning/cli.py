"""Command-line interface: ``sanm fit|validate|test|predict``. No other module parses arguments."""

import functools
import io
import os
import select
import sys
from pathlib import Path
from typing import Any, TextIO

import lightning as L
from jsonargparse import Namespace
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import sanm_lightning.data
import sanm_lightning.methods
import sanm_lightning.models
import sanm_lightning.pictures
import sanm_lightning.sanm  # noqa: F401  (imported classes can be named without their module path)
from sanm_lightning import commands
from sanm_lightning.audit import LabelAudit, read_noise_rate
from sanm_lightning.class_names import named_classes
from sanm_lightning.command_line import config_paths
from sanm_lightning.command_line.parsing import TrainingParser, plain_strings
from sanm_lightning.command_line.sentences import INTERRUPTED, REPORTED, sentence
from sanm_lightning.predictions import PredictionRecord
from sanm_lightning.run.checkpoint import RunCheckpoint
from sanm_lightning.run.record import RunRecord
from sanm_lightning.run.relaunch import resolve_ckpt_path
from sanm_lightning.run.settings import RunSettings, plain, refuse_other_settings, settings_of
from sanm_lightning.run.start_weights import start_from
from sanm_lightning.safe_files import AtomicCheckpointIO, read_checkpoint

__all__ = ["SANMCLI", "FitParser", "main"]

CLASSES: dict[str, Any] = {
    "model_class": L.LightningModule, "datamodule_class": L.LightningDataModule, "subclass_mode_model": True,
    "subclass_mode_data": True, "auto_configure_optimizers": False, "parser_class": TrainingParser,
}  # fmt: skip
"""Arguments of LightningCLI that determine the options of the command line."""


class SaveConfig(SaveConfigCallback):
    """Save ``config.yaml`` when a fit begins, after a checkpoint is accepted: a refused relaunch modifies no file."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Save the config of an evaluation."""
        if stage != "fit":
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the config of a fit."""
        super().setup(trainer, pl_module, "fit")


class SANMCLI(LightningCLI):
    """LightningCLI that links number of classes, image size and channel statistics from the data to the method."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._parsers: list[LightningArgumentParser] = []  # one per subcommand
        self._statistics: dict[str, list[float]] = {}  # statistics filled in from the data module
        words = sys.argv[1:] if kwargs.get("args") is None else kwargs["args"]
        self._first_word = str(words[0]) if isinstance(words, list) and words else ""
        super().__init__(*args, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the subcommand that the command line begins with, because no other parser is needed; otherwise, all."""
        every: dict[str, set[str]] = super().subcommands()
        return {self._first_word: every[self._first_word]} if self._first_word in every else every

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link properties of the data module to arguments of the method; classes without these names are unaffected."""
        self._parsers.append(parser)
        parser.add_argument(
            "--audit",
            type=bool,
            default=True,
            help="after a fit, write label_issues.csv and report.html to the run directory",
        )
        parser.add_argument(
            "--weights",
            type=str | None,
            default=None,
            help="start a new fit from the weights in this checkpoint, weight file or exported folder",
        )
        for name in ("num_classes", "image_size"):
            # None for data modules without the property; models that require it raise an error, others ignore it.
            read = functools.partial(_read, name=name)
            parser.link_arguments("data", f"model.init_args.{name}", compute_fn=read, apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments and keep a parser without defaults, to distinguish given values from defaults."""
        super().parse_arguments(parser, args)
        plain_strings(self.config)
        self._given = functools.partial(parser.parse_args, args, defaults=False)

    def _parse_ckpt_path(self) -> None:
        """Take settings that were not given from the checkpoint; Lightning would also override given settings."""
        part = self.config.get(self.config.get("subcommand") or "") or {}
        self._settings = {name: plain(part.get(name)) for name in ("model", "data", "seed_everything", "trainer")}
        path = part.get("ckpt_path")
        if not path or not Path(path).exists():
            return  # a keyword such as "last": resolved by the trainer and checked later by RunSettings
        checkpoint = read_checkpoint(path)
        then, given = settings_of(checkpoint), plain(self._given()).get(self.config.subcommand) or {}
        fitting = self.config.subcommand == "fit"
        now = {"model": given.get("model")}
        if fitting:  # a trained model may be evaluated on any data
            now |= {"data": self._settings["data"], "seed_everything": given.get("seed_everything")}
        refuse_other_settings(now, then)
        if fitting and "settings" not in checkpoint and given.get("model"):
            rank_zero_warn(
                f"expected a checkpoint with the settings of its run, got {str(path)!r} without them; learning rate, "
                "momentum and schedule state are restored from the checkpoint and override the command line"
            )
        if fitting and then.get("seed_everything") is not None:
            part["seed_everything"] = then["seed_everything"]
        self._settings.update({name: then[name] for name in ("model", "seed_everything") if then.get(name) is not None})
        super()._parse_ckpt_path()

    def instantiate_classes(self) -> None:
        """Instantiate data, model and trainer; convert unexpected exceptions to one-sentence errors."""
        part = self.config.get(self.subcommand) if self.subcommand else self.config
        for name in ("trainer", "model", "data"):
            if isinstance(part.get(name), (list, str, int, float)):
                raise ValueError(f"expected options under {name!r}, got {part.get(name)!r}; see 'sanm fit --help'")
        self._take_channels_from_data(part)
        self._take_statistics_from_data(part)
        try:
            super().instantiate_classes()
        except (ValueError, OSError, MisconfigurationException):
            raise
        except Exception as error:
            raise ValueError(
                f"expected valid settings of model, data and trainer, got {type(error).__name__}: {error}"
            ) from error

    def _take_channels_from_data(self, part: Any) -> None:
        """Fill in ``in_chans`` of a network by name from ``channels`` of the data, unless it is configured."""
        model, data = ((part.get(name) or {}).get("init_args") or {} for name in ("model", "data"))
        channels, options = data.get("channels", 3), model.get("network_args") or {}
        if channels != 3 and isinstance(model.get("network"), str) and "in_chans" not in options:
            model["network_args"] = {**options, "in_chans": channels}

    def _take_statistics_from_data(self, part: Any) -> None:
        """Fill in ``mean`` and ``std`` of a model from the data, unless configured or defined by pre-trained weights.

        A link added before parsing would overwrite given values; these links are added after parsing and only for null
        values. The values are saved in the model's hyper-parameters, as with any link.
        """
        options = (part.get("model") or {}).get("init_args") or {}
        pretrained = (options.get("network_args") or {}).get("pretrained")
        if pretrained or not isinstance(options.get("network"), str):
            return
        for name in ("mean", "std"):
            if name in options and options[name] is None:
                read = functools.partial(self._statistic, name=name)
                for parser in self._parsers:
                    parser.link_arguments("data", f"model.init_args.{name}", compute_fn=read, apply_on="instantiate")

    def _statistic(self, data: L.LightningDataModule, name: str) -> list[float] | None:
        value: Any = getattr(data, name, None)
        try:
            self._statistics[name] = [float(channel) for channel in value]
        except TypeError:  # None, or an unrelated attribute of the same name
            return None
        return self._statistics[name]

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Instantiate the trainer, with checkpoints that contain the settings and are written atomically."""
        options = (self._settings.get("model") or {}).get("init_args") or {}
        options.update(self._statistics)
        for name in self._statistics if self.subcommand != "fit" else ():  # a model may be evaluated on other data
            del options[name]
        audits = [LabelAudit()] if self.subcommand == "fit" and self.config[self.subcommand].get("audit") else []
        configured = self._get(self.config_init, "trainer", default={})
        given = configured.get("callbacks") or []
        saved = any(isinstance(part, Checkpoint) for part in (given if isinstance(given, list) else [given]))
        saving = [] if saved or configured.get("enable_checkpointing") is False else [RunCheckpoint()]
        callbacks = [*self.trainer_defaults.get("callbacks", []), *audits, *saving, RunSettings(self._settings)]
        self.trainer_defaults = {**self.trainer_defaults, "callbacks": callbacks}
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # not configured by the user
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def before_fit(self) -> None:
        """Resolve ``--ckpt_path last`` and ``auto``, or load ``--weights``."""
        options, fitting = self.config_init[self.subcommand], self.subcommand == "fit"
        asked = options["ckpt_path"]
        options["ckpt_path"] = resolve_ckpt_path(self.trainer, asked, fitting)
        if fitting and options["ckpt_path"] not in (None, asked):  # a file is compared when it is parsed
            refuse_other_settings(self._settings, settings_of(read_checkpoint(options["ckpt_path"])))
        weights = options["weights"]
        if weights and not fitting:
            raise ValueError(
                f"expected --ckpt_path FILE for {self.subcommand}, got --weights {weights}; use --ckpt_path"
            )
        if weights and options["ckpt_path"] is None:  # a resumed run has its own weights
            start_from(self.model, weights, named_classes(self.datamodule))

    before_validate = before_test = before_predict = before_fit


class FitParser(SANMCLI):
    """The parser of ``sanm fit``, which runs nothing. Abbreviated options are refused."""

    def __init__(self) -> None:
        super().__init__(**CLASSES, run=False, args=[], parser_kwargs={"prog": "sanm fit", "allow_abbrev": False})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse nothing, and leave the random streams as they are."""
        self.config = Namespace(seed_everything=False)

    def instantiate_classes(self) -> None:
        """Instantiate nothing."""

    def check(self, words: list[str]) -> None:
        """Parse arguments of ``sanm fit``.

        Args:
            words: the arguments, without ``fit``.

        Raises:
            ValueError: if an option is unknown or has a value of another type.
            OSError: if a config or the file of a noise rate does not exist.
        """
        self.parser.parse_args(_read_noise_rate(config_paths.resolve(words)))


def _read(data: L.LightningDataModule, name: str) -> Any:
    return getattr(data, name, None)


def _read_noise_rate(words: list[str]) -> list[str]:
    """Replace the audit file given for ``--model.noise_rate`` by its estimated noise rate."""
    names = ("--model.noise_rate", "--model.init_args.noise_rate")
    found = list(words)
    for place, word in enumerate(words):
        name, given, value = word.partition("=")
        if name not in names or not (given or place + 1 < len(words)):
            continue
        value = value if given else words[place + 1]
        if value == "null" or _is_number(value):
            continue
        rate = str(read_noise_rate(value))
        rank_zero_info(f"noise rate {rate}, estimated in {value!r}")
        if given:
            found[place] = f"{name}={rate}"
        else:
            found[place + 1] = rate
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def main(args: list[str] | None = None) -> SANMCLI:
    """Run the command line.

    Args:
        args: arguments as a list; None reads ``sys.argv``.

    Returns:
        The LightningCLI, with ``trainer``, ``model`` and ``datamodule``, after the command has run.
    """
    sys.path.insert(0, os.getcwd())  # a console script cannot import modules of the working directory otherwise
    words = _read_noise_rate(config_paths.resolve(sys.argv[1:] if args is None else args))
    config_paths.check_keys(words)
    config_paths.check_order(words)
    config_paths.check_scheduler(words)
    setting = config_paths.unused_setting(words) if "fit" in words else None
    if setting:
        rank_zero_info(f"{setting} has published values for this method and data, but is not among the given configs")
    if args is None:
        sys.argv[1:] = words
    else:
        args = words
    return SANMCLI(
        **CLASSES,
        seed_everything_default=0,  # runs without a given seed are reproducible
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"callbacks": [RunRecord(), PredictionRecord()]},
        parser_kwargs={"description": f"Further commands: {', '.join(f'sanm {name}' for name in commands.COMMANDS)}."},
        args=args,
    )


def entry_point() -> None:
    """Run the command line; invalid input prints a one-sentence error and exits with status 2.

    The first argument may be one of :data:`sanm_lightning.commands.COMMANDS`. ``SANM_TRACEBACK=1`` shows the traceback
    instead. If the reader of the output ends first, as in ``sanm list | head``, the exit status is 1, without an error.
    After Ctrl-C, it is 130. Bytes of file names that are not text are printed escaped.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = commands.run(sys.argv[1:])
        if status is None:
            main()
        sys.stdout.flush()
        if status:
            sys.exit(status)
    except REPORTED as error:
        if isinstance(error, BrokenPipeError) and _has_no_reader(sys.stdout):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's last flush
            sys.exit(1)
        said = sentence(error)
        if said is None or os.environ.get("SANM_TRACEBACK"):
            raise
        print(f"sanm: {said}\n(SANM_TRACEBACK=1 shows where)", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("sanm: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _has_no_reader(stream: TextIO) -> bool:
    try:
        stream.flush()  # raises again if the text that could not be written is still there
    except BrokenPipeError:
        return True
    if not hasattr(select, "poll"):  # on Windows
        return False
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
