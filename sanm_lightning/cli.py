"""The command line: ``sanm fit|validate|test|predict``. The only place that parses arguments."""

import functools
import os
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import sanm_lightning.data
import sanm_lightning.methods
import sanm_lightning.models
import sanm_lightning.pictures
import sanm_lightning.sanm  # noqa: F401  (what is imported can be named without its path)
from sanm_lightning.relaunch import checkpoint_to_go_on_from
from sanm_lightning.run_record import RunRecord

__all__ = ["SANMCLI", "main"]


class SANMCLI(LightningCLI):
    """LightningCLI in which class number and image size flow from the data to the method."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link what the data know and the method needs. Data modules and models without these names are left alone."""
        for name in ("num_classes", "image_size"):
            # Data without the property give None, which a model that needs it refuses and any other never sees.
            read = functools.partial(_read, name=name)
            parser.link_arguments("data", f"model.init_args.{name}", compute_fn=read, apply_on="instantiate")

    def before_fit(self) -> None:
        """Find the checkpoint of ``--ckpt_path last``, or refuse: Lightning would begin anew with a warning."""
        asked = self.config_init[self.subcommand]
        fitting = self.subcommand == "fit"
        asked["ckpt_path"] = checkpoint_to_go_on_from(self.trainer, asked["ckpt_path"], fitting)

    before_validate = before_test = before_predict = before_fit


def _read(data: L.LightningDataModule, name: str) -> Any:
    return getattr(data, name, None)


def _with_packaged_configs(args: list[str]) -> list[str]:
    """Let ``--config configs/...`` name the recipes that come with the package, where no such file lies here."""
    out = []
    for position, argument in enumerate(args):
        flag, equals, value = argument.partition("=")
        if equals and flag in ("--config", "-c"):
            out.append(f"{flag}={_packaged(value)}")
        elif position and args[position - 1] in ("--config", "-c"):
            out.append(_packaged(argument))
        else:
            out.append(argument)
    return out


def _packaged(name: str) -> str:
    parts = Path(name).parts
    if Path(name).exists() or not parts or parts[0] != "configs":
        return name
    package = Path(str(files("sanm_lightning")))
    candidates = (package.joinpath(*parts), package.parent.joinpath(*parts))  # installed; or a checkout in development
    return next((str(path) for path in candidates if path.exists()), name)


def main(args: list[str] | None = None) -> SANMCLI:
    """Run the command line.

    Args:
        args: arguments as a list; None reads the process's own.

    Returns:
        The LightningCLI, with ``trainer``, ``model`` and ``datamodule``, after the command has run.
    """
    sys.path.insert(0, os.getcwd())  # a console script could not import the user's own modules otherwise
    if args is None:
        sys.argv[1:] = _with_packaged_configs(sys.argv[1:])
    else:
        args = _with_packaged_configs(args)
    return SANMCLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,  # a run that nobody seeded can still be repeated
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"callbacks": [RunRecord()]},
        args=args,
    )


def entry_point() -> None:
    """Run the command line; a mistake in the input ends with its sentence and exit status 2, not with a traceback.

    ``SANM_TRACEBACK=1`` shows the traceback.
    """
    mistakes = (ValueError, FileNotFoundError, MisconfigurationException)
    try:
        main()
    except mistakes as error:
        if os.environ.get("SANM_TRACEBACK"):
            raise
        while isinstance(error.__cause__, mistakes):  # the parser wraps the sentence in the whole configuration
            error = error.__cause__
        print(f"sanm: {error}\n(SANM_TRACEBACK=1 shows where)", file=sys.stderr)
        sys.exit(2)
