"""The `echat` command: where model, data and trainer meet, and nothing else happens.

`fit`, `validate`, `test` and `predict` are LightningCLI. Every other command is a plain function with typed arguments,
found through a table that names it, so that `echat --help` imports nothing heavy.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser  # pyright: ignore[reportPrivateImportUsage]

from lightning_echat import __version__
from lightning_echat.command_errors import (
    ParseProblem,
    RaisesProblems,
    SetupError,
    check_config_files,
    explain_exception,
    explain_lost_rank,
    explain_parse_error,
    nearest,
)
from lightning_echat.tracking.defaults import set_wandb_defaults


@dataclass(frozen=True, slots=True)
class Command:
    """An entry of `echat --help`.

    Attributes:
        summary: One line.
        function: `module:name` of a plain function; empty for what LightningCLI runs.
        positional: The argument that may be given without its name.
    """

    summary: str
    function: str = ""
    positional: str = ""


COMMANDS: dict[str, Command] = {
    "fit": Command("train a stage: echat fit --config experiments/….yaml"),
    "validate": Command("score a checkpoint on the validation sets"),
    "test": Command("score a checkpoint on the test sets"),
    "predict": Command("write a checkpoint's answers"),
    "data synthesize": Command(
        "make the quickstart's spoken-dialogue corpus on this machine", "lightning_echat.corpus.synthesize:synthesize"
    ),
    "data benchmark": Command(
        "make the benchmark's item set on this machine", "lightning_echat.corpus.benchmark:benchmark"
    ),
    "data items": Command(
        "turn another benchmark's items into an item set",
        "lightning_echat.evaluation.adapters.convert:items",
        "source",
    ),
    "data pack": Command("turn your own dialogues and audio into shards", "lightning_echat.corpus.pack:pack"),
    "data tokenize": Command(
        "add speech codes to shards, on many processes", "lightning_echat.corpus.tokenize:tokenize"
    ),
    "data inspect": Command(
        "print a sample exactly as the model will see it", "lightning_echat.data.inspection:inspect", "shards"
    ),
    "data verify": Command(
        "check shards and count what would be skipped, and why", "lightning_echat.data.verify:verify", "shards"
    ),
    "data batch-size": Command(
        "find the largest batch that trains under a configuration",
        "lightning_echat.data.batch_size:batch_size",
        "configs",
    ),
    "convert from-reference": Command(
        "bring released OSUM-EChat weights in", "lightning_echat.checkpoints.from_reference:from_reference"
    ),
    "convert to-hf": Command(
        "write a checkpoint as a Hugging Face folder", "lightning_echat.checkpoints.hugging_face:to_hf", "checkpoint"
    ),
    "convert from-hf": Command(
        "write the YAML that starts a stage from such a folder",
        "lightning_echat.checkpoints.hugging_face:from_hf",
        "folder",
    ),
    "convert consolidate": Command(
        "write a sharded checkpoint as one file", "lightning_echat.checkpoints.consolidate:consolidate", "checkpoint"
    ),
    "convert token2wav": Command(
        "join a trained flow and vocoder into a folder that speaks",
        "lightning_echat.checkpoints.token2wav:token2wav",
        "flow",
    ),
    "chat": Command("answer one or several wav files in text and speech", "lightning_echat.evaluation.chat:chat"),
    "evaluate": Command("run the benchmark on a checkpoint", "lightning_echat.evaluation.evaluate:evaluate"),
    "evaluate score": Command(
        "score stored answers again, by any judge", "lightning_echat.evaluation.scoring:score", "run"
    ),
    "evaluate compare": Command(
        "compare two runs, paired over common items", "lightning_echat.evaluation.compare:compare", "runs"
    ),
    "evaluate speech": Command(
        "word errors and quality of wav files against their texts",
        "lightning_echat.evaluation.evaluate_speech:evaluate_speech",
        "listed",
    ),
    "evaluate resynthesis": Command(
        "what speech codes and token-to-speech lose, heard by a recogniser",
        "lightning_echat.evaluation.resynthesis:resynthesis",
        "shards",
    ),
    "sync": Command("send what was trained offline to W&B", "lightning_echat.tracking.sync:sync", "folder"),
    "report": Command("write one HTML page of a run, a study or a sweep", "lightning_echat.cli:report", "run"),
    "run": Command("run a recipe: its steps in order, reusing what is unchanged", "lightning_echat.cli:run", "recipe"),
    "ablate": Command(
        "run a study: variants of an experiment, compared over seeds", "lightning_echat.cli:ablate", "study"
    ),
    "sweep": Command("run a W&B sweep file here, with no account", "lightning_echat.cli:sweep", "file"),
}
_LIGHTNING_COMMANDS = tuple(name for name, command in COMMANDS.items() if not command.function)


class _CommandParser(RaisesProblems, ArgumentParser):
    """Parser of a plain function's arguments."""


def main(args: list[str] | None = None) -> None:
    """Run one `echat` command.

    Args:
        args: What follows `echat`; the command line's own without it.
    """
    args = sys.argv[1:] if args is None else list(args)
    try:
        _dispatch(args)
    except KeyboardInterrupt:
        _leave("interrupted", code=130)
    except (Exception, BaseExceptionGroup) as error:
        if (line := explain_lost_rank(error, rank=_rank())) is not None:
            sys.stderr.write(f"echat: {line}\n")
            raise SystemExit(1) from error
        line = explain_exception(error)
        if line is None:
            raise
        if os.environ.get("ECHAT_DEBUG"):
            traceback.print_exception(error)
        _leave(f"error: {line}", code=2, same_on_every_rank=isinstance(error, SetupError))


def _dispatch(args: list[str]) -> None:
    """Find the command and run it."""
    if args[:1] == ["--version"]:
        _say(f"echat {__version__}")
        return
    if not args or args[0] in ("-h", "--help", "help"):
        _say(_overview())
        return
    group = [command for command in COMMANDS if command.startswith(f"{args[0]} ")]
    if group and (len(args) == 1 or args[1] in ("-h", "--help")):
        _say(_overview(group))
        return
    name = _command_of(args)
    # A checkout's own classes, and a user's, are named by path in YAML; a console script does not see its folder.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    if name in _LIGHTNING_COMMANDS:
        _run_lightning(args)
    else:
        _run_function(name, args[len(name.split()) :])


def _command_of(args: list[str]) -> str:
    """The command that `args` begins with."""
    name = next((" ".join(args[:words]) for words in (2, 1) if " ".join(args[:words]) in COMMANDS), None)
    if name is None:
        words = args[:2] if any(command.startswith(f"{args[0]} ") for command in COMMANDS) else args[:1]
        raise SetupError(f"unknown command {' '.join(words)!r}{nearest(' '.join(words), COMMANDS)} (echat --help)")
    return name


def _overview(names: list[str] | None = None) -> str:
    shown = names or list(COMMANDS)
    width = max(len(name) for name in shown)
    lines = [f"  {name:<{width}}  {COMMANDS[name].summary}" for name in shown]
    return "\n".join(["usage: echat COMMAND [options]    (echat COMMAND --help for its options)", "", *lines])


def run(recipe: Path, set: list[str] | None = None, only: str | None = None, fresh: bool = False) -> None:
    """Run the steps of a recipe in order; a step whose settings, inputs and code are unchanged is reused.

    Args:
        recipe: YAML file with the steps.
        set: KEY=VALUE, a variable of the recipe; may be given several times.
        only: Run this step alone.
        fresh: Run steps again although nothing changed.
    """
    from lightning_echat.recipes.run_recipe import run_recipe

    run_recipe(recipe, run_command=main, overrides=set or [], only=only, fresh=fresh)


def report(run: Path, out: Path | None = None) -> None:
    """Make one self-contained HTML page of a run, a study or a sweep.

    Args:
        run: The folder that make quickstart, training, echat evaluate, echat ablate or echat sweep wrote.
        out: Where the page goes; report.html in the folder when not given.
    """
    from lightning_echat.evaluation.report_page import report as report_run
    from lightning_echat.studies.page import is_study_or_sweep, write_page

    _say(str(write_page(run, out=out) if is_study_or_sweep(run) else report_run(run, out=out)))


def ablate(
    study: Path,
    set: list[str] | None = None,
    seeds: list[int] | None = None,
    parallel: int = 1,
    threads: int = 1,
    only: str | None = None,
    slurm: Path | None = None,
) -> None:
    """Train every variant of a study with every seed, stages that variants share once, and compare them in a table.

    Args:
        study: YAML file with the base experiment and the variants.
        set: KEY=VALUE, a variable of the study; may be given several times.
        seeds: Instead of the file's; may be given several times.
        parallel: How many stages are trained at a time, each in a process of its own.
        threads: Of each of them.
        only: Run this step alone, or make the "table" of what is there, whatever code has made it.
        slurm: Folder that takes SLURM jobs which do the same; nothing is run then.
    """
    from lightning_echat.studies.ablate import ablate as run_study

    run_study(
        study,
        run_command=main,
        resolve=resolve,
        overrides=set or [],
        seeds=seeds or [],
        parallel=parallel,
        threads=threads,
        only=only,
        slurm=slurm,
    )


def sweep(
    file: Path,
    trials: int | None = None,
    parallel: int = 1,
    threads: int = 1,
    out: Path | None = None,
    seed: int = 0,
) -> None:
    """Run an ordinary W&B sweep file on this machine with W&B's own search engine, and no account.

    Args:
        file: The sweep file, which `wandb sweep` takes as well.
        trials: How many; the file's run_cap where not given, or all of a grid.
        parallel: How many trials are trained at a time.
        threads: Of each of them.
        out: Folder of the sweep; runs/sweeps/NAME where not given.
        seed: Of the search.
    """
    from lightning_echat.studies.sweep import sweep as run_sweep

    run_sweep(
        file,
        run_command=main,
        resolve=resolve,
        trials=trials,
        parallel=parallel,
        threads=threads,
        out=out,
        seed=seed,
    )


def resolve(args: list[str]) -> Any:
    """Parse an `echat` command without running it.

    Args:
        args: What would follow `echat`.

    Returns:
        All its settings, defaults included, as plain values.

    Raises:
        SetupError: It is wrong.
    """
    name = _command_of(args)
    if name in _LIGHTNING_COMMANDS:
        _prepare_lightning()
        from lightning_echat.lightning_cli import resolve_lightning

        return resolve_lightning(args)
    parser, values = _parse_function(name, args[len(name.split()) :])
    return yaml.safe_load(parser.dump(values, skip_validation=True))


def _run_lightning(args: list[str]) -> None:
    _prepare_lightning()
    from lightning_echat.lightning_cli import run_lightning

    run_lightning(args)


def _prepare_lightning() -> None:
    """Set what the libraries read when they are imported."""
    set_wandb_defaults()
    # Lightning's own use of the parser, which no user of ours can change.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


def _run_function(name: str, args: list[str]) -> None:
    """Parse the arguments of a plain function by its signature, and call it."""
    parser, values = _parse_function(name, args)
    arguments = dict(parser.instantiate(values).items())
    arguments.pop("config", None)
    _load(COMMANDS[name].function)(**arguments)


def _parse_function(name: str, args: list[str]) -> tuple[ArgumentParser, Any]:
    """A parser by the signature of a plain function, and what it makes of the arguments."""
    function = _load(COMMANDS[name].function)
    files = check_config_files(args)
    parser = _CommandParser(prog=f"echat {name}", description=COMMANDS[name].summary)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file with any of the options below")
    parser.add_function_arguments(function, fail_untyped=True)
    try:
        values = parser.parse_args(_plain_flags(args, function, COMMANDS[name].positional))
    except ParseProblem as problem:
        known = parser.get_defaults().keys()
        raise SetupError(explain_parse_error(str(problem), known_keys=known, files=files)) from problem
    return parser, values


def _load(target: str) -> Callable[..., None]:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _plain_flags(args: list[str], function: Callable[..., None], positional: str) -> list[str]:
    """What people type -> what the parser takes.

    `recipe.yaml` for `--recipe recipe.yaml`, `--json` for `--json=true`, `--speech-tokenizer` for `--speech_tokenizer`,
    and a list option several times, as in `--audio a.wav --audio b.wav`.
    """
    hints = {f"--{key}": hint for key, hint in get_type_hints(function).items()}
    if positional and args and not args[0].startswith("-"):
        # A list takes all words up to the first option, anything else takes one.
        until = next((i for i, word in enumerate(args) if word.startswith("-")), len(args))
        taken = args[:until] if _takes_list(hints[f"--{positional}"]) else args[:1]
        args = [*(f"--{positional}={word}" for word in taken), *args[len(taken) :]]
    plain: list[str] = []
    collected: dict[str, list[str]] = {}
    words = list(args)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if (
            flag.startswith("--")
            and flag not in hints
            and (ours := flag.replace("-", "_").replace("__", "--", 1)) in hints
        ):
            flag, word = ours, ours + equals + value
        if hints.get(flag) is bool and not equals:
            plain.append(f"{flag}={words.pop(0) if words[:1] in (['true'], ['false']) else 'true'}")
        elif flag in hints and _takes_list(hints[flag]) and (equals or words):
            value = value if equals else words.pop(0)
            if value.startswith("["):
                plain.append(f"{flag}={value}")
            else:
                collected.setdefault(flag, []).append(value)
        else:
            plain.append(word)
    return plain + [f"{flag}={json.dumps(values)}" for flag, values in collected.items()]


def _takes_list(hint: Any) -> bool:
    return get_origin(hint) is list or any(get_origin(option) is list for option in getattr(hint, "__args__", ()))


def _leave(line: str, *, code: int, same_on_every_rank: bool = True) -> None:
    """One line on stderr, and the end. A mistake that every rank finds is told by rank 0; any other names its rank."""
    rank = _rank()
    if rank == 0 or not same_on_every_rank:
        sys.stderr.write(f"echat: {f'rank {rank}: ' if rank else ''}{line}\n")
    raise SystemExit(code)


def _rank() -> int:
    return next((int(os.environ[key]) for key in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if key in os.environ), 0)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
