"""Steps side by side: each as soon as what it reads is there, over a given number of processes."""

from __future__ import annotations

import multiprocessing.connection
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning_echat.contracts import UserError
from lightning_echat.recipes.fingerprints import dependencies
from lightning_echat.recipes.recipe_file import Recipe, Step
from lightning_echat.recipes.step_run import (
    RunCommand,
    RunningStep,
    end_processes,
    is_current,
    read_state,
    state_to_continue,
)

Status = Literal["waiting", "running", "done", "reused", "failed", "blocked"]


@dataclass(slots=True, kw_only=True)
class Progress:
    """Where a step stands.

    Attributes:
        status: "reused" was done by an earlier call, "blocked" waits for a step that failed.
        seconds: Spent on it, over all attempts.
        reason: Why it failed or cannot run.
    """

    status: Status = "waiting"
    seconds: float = 0.0
    reason: str = ""


Watch = Callable[[Mapping[str, Progress]], None]
"""Is called at least every second, and whenever a step starts or ends."""


def log_file(out: Path, step: str) -> Path:
    """What a step printed."""
    return out / "logs" / f"{step}.log"


def run_steps(
    recipe: Recipe,
    prints: Mapping[str, str],
    *,
    parallel: int,
    run_command: RunCommand,
    watch: Watch,
    only: Sequence[str] | None = None,
) -> dict[str, Progress]:
    """Run every step that is not current. A step that fails stops those that read from it, and no others.

    Args:
        recipe: The steps; each comes after what it reads.
        prints: Their fingerprints.
        parallel: Steps at a time.
        run_command: Runs one command, in a child process.
        watch: Is shown how it goes.
        only: Run these alone; what they read must be there.

    Returns:
        How each ended.
    """
    run = _Run(recipe, prints, run_command)
    wanted = [step for step in recipe.steps if only is None or step.name in only]
    running: list[RunningStep] = []
    try:
        while True:
            running += run.start(wanted, free=parallel - len(running))
            watch(run.progress)
            if not running:
                return run.progress
            multiprocessing.connection.wait([step.child.sentinel for step in running], timeout=1.0)
            for step in [step for step in running if step.wait(timeout=0)]:
                running.remove(step)
                run.end(step)
            for step in running:
                run.progress[step.step.name].seconds = step.state.seconds
    finally:
        end_processes([step.child for step in running])
        for step in running:
            step.finish()


class _Run:
    """The book-keeping of `run_steps`."""

    def __init__(self, recipe: Recipe, prints: Mapping[str, str], run_command: RunCommand) -> None:
        self._out = recipe.out
        self._prints = prints
        self._reads = dependencies(recipe)
        self._run_command = run_command
        self.progress = {step.name: self._found(step) for step in recipe.steps}

    def _found(self, step: Step) -> Progress:
        state = read_state(self._out, step.name)
        seconds = state.seconds if state else 0.0
        if is_current(step, state, self._prints[step.name]):
            return Progress(status="reused", seconds=seconds)
        return Progress()

    def start(self, wanted: Sequence[Step], *, free: int) -> list[RunningStep]:
        """Start what can be, on `free` processes."""
        started: list[RunningStep] = []
        for step in wanted:
            progress = self.progress[step.name]
            if progress.status != "waiting":
                continue
            before = {name: self.progress[name].status for name in self._reads[step.name]}
            if failed := [name for name, status in before.items() if status in ("failed", "blocked")]:
                progress.status, progress.reason = "blocked", f"needs {failed[0]}"
            elif len(started) < free and all(status in ("done", "reused") for status in before.values()):
                started.append(self._start(step))
                progress.status = "running"
        return started

    def _start(self, step: Step) -> RunningStep:
        fingerprint = self._prints[step.name]
        resumed = state_to_continue(step, read_state(self._out, step.name), fingerprint)
        log = log_file(self._out, step.name)
        if resumed is None:
            log.unlink(missing_ok=True)
        return RunningStep(
            self._out, step, fingerprint=fingerprint, resumed=resumed, run_command=self._run_command, log=log
        )

    def end(self, running: RunningStep) -> None:
        """Take down how a step ended."""
        progress = self.progress[running.step.name]
        try:
            state = running.finish()
        except UserError as error:
            progress.status, progress.reason = "failed", str(error)
            return
        progress.seconds = state.seconds
        code = state.exit_code or 0
        if code:
            how = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
            progress.status = "failed"
            progress.reason = f"{how}: {last_line(log_file(self._out, running.step.name))}"
        else:
            progress.status = "done"


def last_line(log: Path) -> str:
    """The last line with words in a log; of a progress bar that rewrites its line, the newest state of it."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - 4096))
            text = stream.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines()]
    return next((line for line in reversed(lines) if line), "")
