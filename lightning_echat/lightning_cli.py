"""LightningCLI as `echat fit|validate|test|predict` uses it: any stage, any data module, both named in YAML."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

from lightning_echat.command_errors import (
    ParseProblem,
    RaisesProblems,
    SetupError,
    check_config_files,
    explain_parse_error,
    innermost,
    one_line,
)
from lightning_echat.contracts import UserError
from lightning_echat.tracking.identity import (
    continues,
    identify,
    identity_of_this_command,
    trial_folder,
    write_identity,
)

STOPPED = 255
"""Exit code that W&B is told of a run that was asked to end: it reads "killed" there, neither finished nor failed."""


class EChatArgumentParser(RaisesProblems, LightningArgumentParser):
    """Lightning's parser, whose errors are raised instead of printed."""


class RunFolderConfig(SaveConfigCallback):
    """Keeps the resolved configuration: in the run's own folder, and in the W&B run where there is one.

    Lightning's own callback writes to the logger's folder, which several runs share, and refuses the second run.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file of this command; Lightning calls this on rank 0 only."""
        text = self.parser.dump(self.config, skip_unset=False)
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        # What was trained stays readable when the run is scored later with other settings.
        name = "config.yaml" if stage == "fit" else f"config_{stage}.yaml"
        (folder / name).write_text(text, encoding="utf-8")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update(yaml.safe_load(text), allow_val_change=True)


class EChatCLI(LightningCLI):
    """A stage and a data module in subclass mode; what both must agree on is given once, under the model."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the tokens of the data to those of the model."""
        parser.link_arguments("model.init_args.tokens", "data.init_args.tokens")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and say in one line what is wrong."""
        words = list(args) if isinstance(args, list) else sys.argv[1:]
        files = check_config_files(words)
        _refuse_linked_tokens(words, files)
        try:
            super().parse_arguments(parser, args)
        except ParseProblem as problem:
            keys = self._subcommand_parsers[words[0]].get_defaults().keys()
            raise SetupError(explain_parse_error(str(problem), known_keys=keys, files=files)) from problem

    def before_instantiate_classes(self) -> None:
        """Give everything that a run writes its place in the run's own folder, unless YAML names another.

        W&B stages media there too, and before a logger exists: `wandb sync` needs them unmoved.
        """
        trainer = self.config[str(self.subcommand)].trainer
        folder = trial_folder(Path(trainer.default_root_dir), os.environ)
        trainer.default_root_dir = str(folder)
        os.environ.setdefault("WANDB_DATA_DIR", str(folder.absolute() / ".wandb-data"))
        for part, option, place in (("logger", "save_dir", folder), ("callbacks", "dirpath", folder / "checkpoints")):
            entries = trainer[part] if isinstance(trainer[part], list) else [trainer[part]]
            for entry in entries:
                init_args = getattr(entry, "init_args", None)
                if init_args is not None and option in init_args and init_args[option] in (None, "."):
                    init_args[option] = str(place)
        self._tell_wandb_who_runs(folder)

    def _tell_wandb_who_runs(self, folder: Path) -> None:
        config = self.config[str(self.subcommand)]
        loggers = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
        if not any(str(getattr(logger, "class_path", "")).endswith("WandbLogger") for logger in loggers):
            return
        trains = self.subcommand == "fit"
        identity = identify(
            folder,
            job_type=_stage_name(config.model) if trains else str(self.subcommand),
            goes_on=trains and continues(config.ckpt_path, folder=folder, environment=os.environ),
            environment=os.environ,
        )
        os.environ.update(identity.environment())
        if trains and rank_zero_only.rank == 0:
            write_identity(folder, identity)

    def instantiate_classes(self) -> None:
        """Build everything; what a constructor refuses is the user's to mend."""
        try:
            super().instantiate_classes()
        except (UserError, ValueError, OSError, MisconfigurationException) as error:
            raise SetupError(one_line(f"cannot build the configuration: {innermost(str(error))}")) from error

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as leaving:
            # Lightning ends a graceful Ctrl-C with exit code 1.
            if isinstance(leaving.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from leaving
            raise


def _stage_name(model: Namespace) -> str:
    """UnderstandingStage -> understanding."""
    return model.class_path.rpartition(".")[2].removesuffix("Stage").lower()


@contextmanager
def _told_how_it_ended() -> Iterator[None]:
    """End the W&B run with what became of it; left alone, it would read finished however the process leaves."""
    how, code = "failed", 1
    try:
        yield
        how, code = "finished", 0
    except (SystemExit, KeyboardInterrupt):
        how, code = "stopped", STOPPED
        raise
    finally:
        if wandb.run is not None:
            wandb.run.summary["ended"] = how
            wandb.finish(exit_code=code)
            # Its service goes on writing after that, and keeps this command's settings for the next.
            wandb.teardown()


def _refuse_linked_tokens(words: list[str], files: list[Path]) -> None:
    """The target of a link is overwritten without a word, so a value given there would be lost."""
    given = [word for word in words if word.startswith("--data.init_args.tokens")]
    for file in files:
        data = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("data")
        arguments = data.get("init_args") if isinstance(data, dict) else None
        given += [str(file)] if isinstance(arguments, dict) and "tokens" in arguments else []
    if given:
        raise SetupError(
            f"{given[0]}: tokens are given once, as model.init_args.tokens; the data takes them from there"
        )


def _quiet() -> None:
    """Silence what a user of ours can neither change nor use: remarks of libraries about each other."""
    for remark in (
        r".*isinstance\(treespec, LeafSpec\)",
        r".*is set, but there is no last checkpoint available",
        r"LightningCLI's args parameter is intended",
        # A set without answers of a kind, or a rank without a set's dialogues: the figure is NaN and left out.
        r"The ``compute`` method of metric \w+ was called before",
    ):
        warnings.filterwarnings("ignore", message=remark)
    # "GPU available: False", tips for a vendor's logger.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def run_lightning(args: list[str]) -> None:
    """Run `fit`, `validate`, `test` or `predict`."""
    with identity_of_this_command(), _told_how_it_ended():
        _command_line(EChatCLI, args)


class _ParsesOnly(EChatCLI):
    """Stops once the arguments are parsed: nothing is seeded, built or run."""

    def _set_seed(self) -> None: ...

    def before_instantiate_classes(self) -> None: ...

    def instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...


def resolve_lightning(args: list[str]) -> dict[str, Any]:
    """Parse a command of `run_lightning` without running it; all its settings, defaults included, as plain values.

    Raises:
        SetupError: It is wrong.
    """
    parsed = _command_line(_ParsesOnly, args)
    subcommand = str(parsed.subcommand)
    text = parsed._parser(subcommand).dump(parsed.config[subcommand], skip_unset=False)
    settings = yaml.safe_load(text)
    # The names of the files say nothing that their contents have not said.
    settings.pop("config", None)
    return settings


def _command_line(kind: type[EChatCLI], args: list[str]) -> EChatCLI:
    _quiet()
    return kind(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=EChatArgumentParser,
        save_config_callback=RunFolderConfig,
        seed_everything_default=0,
        # Without a folder of its own a run would write into the current one.
        trainer_defaults={"default_root_dir": "runs/unnamed"},
        auto_configure_optimizers=False,
        # The command line's own words go unrepeated: Lightning launches further ranks with them, and warns otherwise.
        args=None if args == sys.argv[1:] else args,
    )
