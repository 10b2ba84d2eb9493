"""One step of a recipe as a process of its own, and what is remembered of it.

Steps run in processes forked from one that has imported the heavy libraries once. The state on disk is right at every
moment, however this process ends.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

import psutil

from lightning_echat.contracts import UserError
from lightning_echat.recipes.recipe_file import Step

RunCommand = Callable[[list[str]], None]
"""Runs one `echat` command, in a child process: a function that a module holds under its name."""

PRELOADED = ("lightning_echat.lightning_cli", "torchaudio", "wandb")
"""Imported once, before children are forked."""

START_METHOD = "forkserver"
"""How: from a process that has no threads yet."""

_SAMPLING_SECONDS = 5.0
"""Between two looks at the memory in use: reading the shared pages of many processes costs a core for a moment."""


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


def is_current(step: Step, state: StepState | None, fingerprint: str) -> bool:
    """Whether the step can be reused."""
    if state is None or state.status != "done" or state.fingerprint != fingerprint:
        return False
    return all(path.exists() for path in step.outputs)


def state_to_continue(step: Step, state: StepState | None, fingerprint: str) -> StepState | None:
    """The state to continue from, if any. What other settings left to resume from is moved to FOLDER.stale."""
    if state and state.status == "unfinished" and state.fingerprint == fingerprint:
        return state
    folder = step.resumable_folder
    if folder and folder.exists():
        stale = stale_folder(folder)
        shutil.rmtree(stale, ignore_errors=True)
        folder.rename(stale)
    return None


def stale_folder(folder: Path) -> Path:
    """Where what other settings have left is moved to."""
    return folder.with_name(folder.name + ".stale")


class RunningStep:
    """A step that runs in a child process.

    Args:
        out: The run's folder, which keeps the state.
        step: What to run.
        fingerprint: What it is run with.
        resumed: State of the interrupted attempt that it continues.
        run_command: Runs the command.
        log: File that takes what the child prints; None leaves it on this process's own output.
        shares_memory_with: Process whose tree is measured; the child itself when not given.
    """

    def __init__(
        self,
        out: Path,
        step: Step,
        *,
        fingerprint: str,
        resumed: StepState | None,
        run_command: RunCommand,
        log: Path | None = None,
        shares_memory_with: int | None = None,
    ) -> None:
        self.step = step
        self._out = out
        self._fingerprint = fingerprint
        self._before = resumed.seconds if resumed else 0.0
        self._peak = resumed.peak_memory_bytes if resumed else 0
        self._began = time.monotonic()
        self._started = _now()
        self._exit_code: int | None = None
        self._sampled = 0.0
        write_state(out, step.name, self.state)
        self.child = _start(run_command, list(step.command), log, lock=_state_file(out, step.name, "lock"))
        self._measured = shares_memory_with or self.child.pid

    @property
    def state(self) -> StepState:
        """As it is now."""
        return StepState(
            fingerprint=self._fingerprint,
            status="done" if self._exit_code == 0 else "unfinished",
            seconds=round(self._before + self.seconds, 2),
            started=self._started,
            finished="" if self._exit_code is None else _now(),
            exit_code=self._exit_code,
            peak_memory_bytes=self._peak,
            command=self.step.command,
        )

    @property
    def seconds(self) -> float:
        """Of this attempt."""
        return time.monotonic() - self._began

    def wait(self, timeout: float = _SAMPLING_SECONDS) -> bool:
        """Whether it has ended, after `timeout` seconds at most; looks at its memory now and then."""
        self.child.join(timeout=timeout)
        if time.monotonic() - self._sampled >= _SAMPLING_SECONDS and self._measured is not None:
            self._sampled = time.monotonic()
            self._peak = max(self._peak, _tree_memory(self._measured))
        return not self.child.is_alive()

    def finish(self) -> StepState:
        """Take the exit code of a child that has ended, end one that has not, and write the state."""
        ended = not self.child.is_alive()
        if not ended:
            end_processes([self.child])
        self._exit_code = self.child.exitcode if ended else None
        if missing := [path for path in self.step.outputs if self._exit_code == 0 and not path.exists()]:
            self._exit_code = None
            write_state(self._out, self.step.name, self.state)
            raise UserError(f"step {self.step.name!r} succeeded but did not make {missing[0]}")
        write_state(self._out, self.step.name, self.state)
        return self.state


def _start(run_command: RunCommand, args: list[str], log: Path | None, *, lock: Path) -> BaseProcess:
    context = multiprocessing.get_context(START_METHOD)
    context.set_forkserver_preload(list(PRELOADED))
    child = context.Process(target=_in_child, args=(run_command, args, log, lock))
    sys.stdout.flush()
    child.start()
    return child


def _in_child(run_command: RunCommand, args: list[str], log: Path | None, lock: Path) -> None:
    _end_with_parent()
    # Held until this process is gone: one that a killed run has left may still be saving into the same folder.
    held = lock.open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as stream:
            for number in (1, 2):
                os.dup2(stream.fileno(), number)
    # Lightning launches further ranks with the words of the command line, so they must be this step's.
    sys.argv[1:] = args
    run_command(args)


def _end_with_parent() -> None:
    """Have the system end this process when the one that it is forked from does, as when all are killed.

    It would go on writing into a folder that the next run works in.
    """
    if sys.platform == "linux":
        parent_death_signal = 1
        ctypes.CDLL(None).prctl(parent_death_signal, int(signal.SIGTERM))


def end_processes(children: Sequence[BaseProcess]) -> None:
    """Let interrupted children save what they want to, all at the same time; then insist."""
    # After Ctrl-C in a terminal they have been told already, and a second signal would cut their shutdown short.
    _join(children, seconds=3)
    for insist in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        for child in children:
            if child.is_alive() and child.pid is not None:
                os.kill(child.pid, insist)
        _join(children, seconds=10)


def _join(children: Sequence[BaseProcess], *, seconds: float) -> None:
    until = time.monotonic() + seconds
    for child in children:
        child.join(timeout=max(0.0, until - time.monotonic()))


def _tree_memory(pid: int) -> int:
    """Bytes held by a process and its descendants, shared pages counted once where the system tells."""
    total = 0
    try:
        top = psutil.Process(pid)
        processes = [top, *top.children(recursive=True)]
    except psutil.Error:
        return 0
    for process in processes:
        try:
            memory = process.memory_full_info()
            total += getattr(memory, "pss", memory.rss)
        except psutil.Error:
            # It ended between the listing and the look.
            continue
    return total


def _state_file(out: Path, name: str, ending: str) -> Path:
    return out / ".recipe" / f"{name}.{ending}"


def read_state(out: Path, name: str) -> StepState | None:
    """What is remembered of a step; None where nothing is, or what is there cannot be read."""
    try:
        content = json.loads(_state_file(out, name, "json").read_text(encoding="utf-8"))
        return StepState(**{**content, "command": tuple(content["command"])})
    except (FileNotFoundError, json.JSONDecodeError, TypeError, KeyError):
        # An unreadable state costs a run of the step, never a wrong reuse.
        return None


def write_state(out: Path, name: str, state: StepState) -> None:
    """Remember a step; a reader sees the old state or the new one, never half of it."""
    path = _state_file(out, name, "json")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
    partial.replace(path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
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
def terminated_as_exit() -> Iterator[None]:
    """Leave by an exception on SIGTERM, so that the running step is stopped and its state written."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
