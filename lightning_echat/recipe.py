"""Recipes: `echat` commands in order, each reused while nothing that it depends on has changed.

    vars:
      out: runs/example                     # the run's folder; state is kept in its .recipe/
      budget: short
      steps: {by: budget, short: 100, long: 900}
    steps:
      - name: corpus
        command: [data, synthesize, --out, "${vars.out}/corpus"]
        outputs: ["${vars.out}/corpus"]
      - name: understanding
        command: [fit, --config, experiments/understanding.yaml, --trainer.max_steps, "${vars.steps}"]
        inputs: ["${vars.out}/corpus"]
        outputs: ["${vars.out}/understanding/checkpoints/last.ckpt"]
        resumable_folder: "${vars.out}/understanding"

A step is reused when its fingerprint is the stored one and its outputs exist. The fingerprint covers the command, the
content of the files that the command or `inputs` name, the fingerprints of the steps that make its inputs, the
source of this project and the versions of what it computes with. So any edit of the source runs every step again: a
figure in the report never comes from older code.

`resumable_folder` is what an interrupted step continues from. It is kept when the interrupted run had the same
fingerprint, and moved to FOLDER.stale otherwise, so that a run never resumes from other settings.

Steps run in processes of their own, forked from one that has imported the heavy libraries once.
"""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import psutil
import yaml
from rich.console import Console

from lightning_echat.contracts import UserError

RunCommand = Callable[[list[str]], None]

_PRELOADED = ("lightning_echat.lightning_cli", "torchaudio", "wandb")
_SOURCES = ("lightning_echat", "datamodules", "callbacks")
_COMPUTES_WITH = ("torch", "lightning", "transformers")
_SAMPLING_SECONDS = 5.0
"""Between two looks at the memory in use: reading the shared pages of many processes costs a core for a moment."""
_STEP_KEYS = ("name", "command", "inputs", "outputs", "resumable_folder")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One command of a recipe.

    Attributes:
        name: How state, `--only` and messages call it.
        command: Arguments of `echat`.
        inputs: Files and folders it reads, made by earlier steps or by the user.
        outputs: Files and folders that exist once it has succeeded.
        resumable_folder: What an interrupted run of it continues from.
    """

    name: str
    command: tuple[str, ...]
    inputs: tuple[Path, ...] = ()
    outputs: tuple[Path, ...] = ()
    resumable_folder: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Steps, and the folder of the run."""

    out: Path
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepState:
    """What is remembered of a step, in OUT/.recipe/NAME.json.

    Attributes:
        fingerprint: What it was run with.
        status: "unfinished" from the start until it has succeeded.
        seconds: Time spent, over all the attempts that continued one another.
        started, finished: ISO times of the last attempt.
        exit_code: Of the last attempt; None while it runs.
        peak_memory_bytes: Of the whole tree of processes, shared pages counted once.
        command: As it was run.
    """

    fingerprint: str
    status: Literal["unfinished", "done"]
    seconds: float = 0.0
    started: str = ""
    finished: str = ""
    exit_code: int | None = None
    peak_memory_bytes: int = 0
    command: tuple[str, ...] = ()


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and fill in its variables.

    Args:
        path: YAML file.
        overrides: KEY=VALUE pairs that replace variables.

    Raises:
        UserError: The recipe or an override is wrong.
    """
    if not path.is_file():
        raise UserError(f"no recipe {str(path)!r}")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("steps"), list):
        raise UserError(f"{path}: a recipe holds vars and a list of steps")
    _refuse_unknown(content, ("vars", "steps"), f"{path}:")
    variables = _variables(content.get("vars") or {}, overrides, path)
    steps = tuple(_step(entry, variables, path) for entry in content["steps"])
    names = [step.name for step in steps]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{path}: two steps are called {repeated!r}")
    return Recipe(out=Path(variables["out"]), steps=steps)


def _variables(given: Mapping[str, Any], overrides: Sequence[str], path: Path) -> dict[str, str]:
    values = dict(given)
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"--set {override}: give KEY=VALUE")
        _refuse_unknown({name: value}, list(values), f"--set {override}: {path} has variables {', '.join(values)};")
        values[name] = value
    if "out" not in values:
        raise UserError(f"{path}: vars.out is missing, the folder of the run")
    filled: dict[str, str] = {}
    for name, value in values.items():
        # A variable may use those above it, so there are no circles.
        where = f"{path}: vars.{name}"
        filled[name] = _fill(_choose(value, filled, where) if isinstance(value, dict) else _text(value), filled, where)
    return filled


def _choose(choices: Mapping[str, Any], variables: Mapping[str, str], where: str) -> str:
    """{by: budget, short: 100, long: 900} -> 900, where budget is long."""
    by = str(choices.get("by", ""))
    if by not in variables:
        raise UserError(f"{where}: a choice names the variable above it that decides, as in {{by: budget, short: 1}}")
    known = [str(name) for name in choices if name != "by"]
    if variables[by] not in known:
        raise UserError(f"{by}={variables[by]}: {where} knows {', '.join(known)}")
    return _text({str(name): value for name, value in choices.items()}[variables[by]])


def _step(entry: Any, variables: Mapping[str, str], path: Path) -> Step:
    if not isinstance(entry, dict) or not entry.get("name") or not isinstance(entry.get("command"), list):
        raise UserError(f"{path}: every step has a name and a command (a list of words), not {entry!r}")
    where = f"{path}: step {entry['name']!r}"
    _refuse_unknown(entry, _STEP_KEYS, f"{where}:")
    if not re.fullmatch(r"[\w-]+", entry["name"]):
        raise UserError(f"{where}: a name is letters, digits, - and _")

    def filled(key: str) -> list[str]:
        return [_fill(_text(word), variables, f"{where}, {key}") for word in entry.get(key) or []]

    folder = entry.get("resumable_folder")
    return Step(
        name=entry["name"],
        command=tuple(filled("command")),
        inputs=tuple(map(Path, filled("inputs"))),
        outputs=tuple(map(Path, filled("outputs"))),
        resumable_folder=Path(_fill(folder, variables, where)) if folder else None,
    )


def _refuse_unknown(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise UserError(f"{where} unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _fill(text: str, variables: Mapping[str, str], where: str) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in variables:
            raise UserError(f"{where}: no variable {match[1]!r}; there are {', '.join(variables) or 'none above it'}")
        return variables[match[1]]

    return re.sub(r"\$\{vars\.(\w+)\}", value, text)


def fingerprints(recipe: Recipe, *, code: str) -> dict[str, str]:
    """Step name -> what decides whether it must run again. Reads files and changes nothing.

    Args:
        recipe: The steps in order.
        code: Stands for the project's source and its libraries, see `code_fingerprint`.

    Raises:
        UserError: A step reads what neither exists nor is made before it.
    """
    prints: dict[str, str] = {}
    makers: dict[Path, str] = {}
    for step in recipe.steps:
        parts = [code, *step.command]
        for path in map(_path_in, step.command):
            parts += [prints[name] for name in _makers_of(path, makers)]
            # Words that are files: configs, prompt sets, recordings. What lies in the run's folder the run has made.
            if _is_file(path) and not path.absolute().is_relative_to(recipe.out.absolute()):
                parts.append(_content_hash(path))
        for path in step.inputs:
            if names := _makers_of(path, makers):
                parts += [prints[name] for name in names]
            elif path.exists():
                parts.append(_content_hash(path))
            else:
                raise UserError(f"step {step.name!r} reads {path}, which neither exists nor is made by an earlier step")
        prints[step.name] = _hash(parts)
        makers.update({path: step.name for path in step.outputs})
    return prints


def _path_in(word: str) -> Path:
    """The path that a word of a command may be: `x.yaml`, or the value of `--config=x.yaml`."""
    return Path(word.partition("=")[2] or word)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        # Some words are too long for a path.
        return False


def _makers_of(path: Path, makers: Mapping[Path, str]) -> list[str]:
    """The steps one of whose outputs `path` is, lies in, or holds."""
    path = path.absolute()
    absolute = {made.absolute(): name for made, name in makers.items()}
    return [name for made, name in absolute.items() if path.is_relative_to(made) or made.is_relative_to(path)]


def _hash(parts: Sequence[str]) -> str:
    # JSON keeps the parts apart: ["ab", "c"] is not ["a", "bc"].
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _content_hash(path: Path) -> str:
    """Of a file its bytes; of a folder the names and sizes in it, as a corpus is too large to read at every start."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return _hash(
        [f"{file.relative_to(path)} {file.stat().st_size}" for file in sorted(path.rglob("*")) if file.is_file()]
    )


def code_fingerprint() -> str:
    """The project's own source, and the versions of what it computes with."""
    parts = [f"{name} {version(name)}" for name in _COMPUTES_WITH]
    for package in _SOURCES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            files = sorted(
                path for path in Path(folder).rglob("*") if path.suffix in (".py", ".yaml", ".html", ".json")
            )
            parts += [f"{package} {file.relative_to(folder)} {_content_hash(file)}" for file in files]
    return _hash(parts)


def run_recipe(
    path: Path,
    *,
    run_command: RunCommand,
    overrides: Sequence[str] = (),
    only: str | None = None,
    fresh: bool = False,
) -> None:
    """Run what must be run.

    Args:
        path: The recipe.
        run_command: Runs one `echat` command, in a child process: a function that a module holds under its name.
        overrides: KEY=VALUE pairs that replace variables.
        only: Run this step alone.
        fresh: Run steps again although nothing changed.

    Raises:
        UserError: The recipe is wrong.
        SystemExit: A step failed; the code is the step's.
    """
    recipe = load_recipe(path, overrides)
    names = [step.name for step in recipe.steps]
    if only is not None and only not in names:
        raise UserError(f"--only {only}: no such step; there are {', '.join(names)}")
    prints = fingerprints(recipe, code=code_fingerprint())
    console = Console(highlight=False)
    spent = 0.0
    with _alone_in(recipe.out), _terminated_as_exit():
        for number, step in enumerate(recipe.steps, start=1):
            if only not in (None, step.name):
                continue
            label = f"[bold]{number}/{len(names)} {step.name:<{max(map(len, names))}}[/bold]"
            state = read_state(recipe.out, step.name)
            if state and not fresh and is_current(step, state, prints[step.name]):
                console.print(f"{label}  reused (took {state.seconds:.0f} s)")
                continue
            resumed = _prepare(step, None if fresh else state, prints[step.name], console)
            console.print(f"{label}  {'continuing' if resumed else 'running'}")
            state, seconds = _run_step(recipe.out, step, prints[step.name], resumed, run_command)
            spent += seconds
            _stop_on_failure(step, state)
            console.print(f"{label}  done in {state.seconds:.0f} s, peak memory {_gigabytes(state)}")
    _report(recipe, spent, console)


def is_current(step: Step, state: StepState, fingerprint: str) -> bool:
    """Whether the step can be reused."""
    same = state.status == "done" and state.fingerprint == fingerprint
    return same and all(path.exists() for path in step.outputs)


def _prepare(step: Step, state: StepState | None, fingerprint: str, console: Console) -> StepState | None:
    """The state to continue from, if any. What other settings left to resume from is moved aside."""
    if state and state.status == "unfinished" and state.fingerprint == fingerprint:
        return state
    folder = step.resumable_folder
    if folder and folder.exists():
        stale = folder.with_name(folder.name + ".stale")
        shutil.rmtree(stale, ignore_errors=True)
        folder.rename(stale)
        console.print(f"    {folder} belongs to other settings: moved to {stale}")
    return None


def _run_step(
    out: Path, step: Step, fingerprint: str, resumed: StepState | None, run_command: RunCommand
) -> tuple[StepState, float]:
    """Run one command in a child. The state on disk is right at every moment, however this process ends."""
    began = time.monotonic()
    started = _now()
    before = resumed.seconds if resumed else 0.0
    peak = resumed.peak_memory_bytes if resumed else 0
    exit_code: int | None = None

    def state() -> StepState:
        return StepState(
            fingerprint=fingerprint,
            status="done" if exit_code == 0 else "unfinished",
            seconds=round(before + time.monotonic() - began, 2),
            started=started,
            finished="" if exit_code is None else _now(),
            exit_code=exit_code,
            peak_memory_bytes=peak,
            command=step.command,
        )

    write_state(out, step.name, state())
    child = _start(run_command, list(step.command))
    try:
        while child.is_alive():
            child.join(timeout=_SAMPLING_SECONDS)
            peak = max(peak, _tree_memory())
        exit_code = child.exitcode
    except KeyboardInterrupt:
        sys.stderr.write(f"\nstopped in step {step.name!r}; the same command continues it\n")
        raise
    finally:
        _end(child)
        write_state(out, step.name, state())
    if missing := [path for path in step.outputs if exit_code == 0 and not path.exists()]:
        raise UserError(f"step {step.name!r} succeeded but did not make {missing[0]}")
    return state(), time.monotonic() - began


def _start(run_command: RunCommand, args: list[str]) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    child = context.Process(target=_in_child, args=(run_command, args))
    sys.stdout.flush()
    child.start()
    return child


def _in_child(run_command: RunCommand, args: list[str]) -> None:
    # Lightning launches further ranks with the words of the command line, so they must be this step's.
    sys.argv[1:] = args
    run_command(args)


def _end(child: BaseProcess) -> None:
    """Let an interrupted child save what it wants to; then insist."""
    # After Ctrl-C in a terminal the child has been told already, and a second signal would cut its shutdown short.
    child.join(timeout=3)
    for insist in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        if not child.is_alive() or child.pid is None:
            return
        os.kill(child.pid, insist)
        child.join(timeout=10)


def _stop_on_failure(step: Step, state: StepState) -> None:
    code = state.exit_code or 0
    if code == 0:
        return
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    sys.stderr.write(f"echat: error: step {step.name!r} {how}; once mended, the same command continues from it\n")
    raise SystemExit(128 - code if code < 0 else code)


def _tree_memory() -> int:
    """Bytes held by this process and its descendants, shared pages counted once where the system tells."""
    total = 0
    own = psutil.Process()
    for process in (own, *own.children(recursive=True)):
        try:
            memory = process.memory_full_info()
            total += getattr(memory, "pss", memory.rss)
        except psutil.Error:
            # It ended between the listing and the look.
            continue
    return total


def _report(recipe: Recipe, spent: float, console: Console) -> None:
    states = [state for step in recipe.steps if (state := read_state(recipe.out, step.name))]
    peak = max(states, key=lambda state: state.peak_memory_bytes, default=None)
    total = sum(state.seconds for state in states)
    memory = f", peak memory {_gigabytes(peak)}" if peak else ""
    console.print(f"{recipe.out}: {total:.0f} s in all steps, {spent:.0f} s of them now{memory}")


def _gigabytes(state: StepState) -> str:
    return f"{state.peak_memory_bytes / 2**30:.1f} GB"


def read_state(out: Path, name: str) -> StepState | None:
    """What is remembered of a step; None where nothing is, or what is there cannot be read."""
    try:
        content = json.loads((out / ".recipe" / f"{name}.json").read_text(encoding="utf-8"))
        return StepState(**{**content, "command": tuple(content["command"])})
    except (FileNotFoundError, json.JSONDecodeError, TypeError, KeyError):
        # An unreadable state costs a run of the step, never a wrong reuse.
        return None


def write_state(out: Path, name: str, state: StepState) -> None:
    """Remember a step; a reader sees the old state or the new one, never half of it."""
    path = out / ".recipe" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
    partial.replace(path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Refuse a second recipe in the same folder: both would write the same files."""
    path = out / ".recipe" / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another echat run works in {out}") from error
        yield


@contextmanager
def _terminated_as_exit() -> Iterator[None]:
    """Leave by an exception on SIGTERM, so that the running step is stopped and its state written."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
