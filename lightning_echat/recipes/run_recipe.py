"""`echat run`: the steps of a recipe in order, reusing what is unchanged."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lightning_echat.contracts import UserError
from lightning_echat.recipes.fingerprints import code_fingerprint, fingerprints
from lightning_echat.recipes.recipe_file import Recipe, Step, load_recipe
from lightning_echat.recipes.step_run import (
    RunCommand,
    RunningStep,
    StepState,
    alone_in,
    is_current,
    read_state,
    stale_folder,
    state_to_continue,
    terminated_as_exit,
)


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
    with alone_in(recipe.out), terminated_as_exit():
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


def _prepare(step: Step, state: StepState | None, fingerprint: str, console: Console) -> StepState | None:
    """See `state_to_continue`; says what was moved aside."""
    folder = step.resumable_folder
    was_there = folder is not None and folder.exists()
    resumed = state_to_continue(step, state, fingerprint)
    if folder is not None and was_there and not folder.exists():
        console.print(f"    {folder} belongs to other settings: moved to {stale_folder(folder)}")
    return resumed


def _run_step(
    out: Path, step: Step, fingerprint: str, resumed: StepState | None, run_command: RunCommand
) -> tuple[StepState, float]:
    """Run one command in a child; its state, and the seconds of this attempt."""
    running = RunningStep(
        out,
        step,
        fingerprint=fingerprint,
        resumed=resumed,
        run_command=run_command,
        shares_memory_with=os.getpid(),
    )
    try:
        while not running.wait():
            continue
    except KeyboardInterrupt:
        sys.stderr.write(f"\nstopped in step {step.name!r}; the same command continues it\n")
        raise
    finally:
        state = running.finish()
    return state, running.seconds


def _stop_on_failure(step: Step, state: StepState) -> None:
    code = state.exit_code or 0
    if code == 0:
        return
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    sys.stderr.write(f"echat: error: step {step.name!r} {how}; once mended, the same command continues from it\n")
    raise SystemExit(128 - code if code < 0 else code)


def _report(recipe: Recipe, spent: float, console: Console) -> None:
    states = [state for step in recipe.steps if (state := read_state(recipe.out, step.name))]
    peak = max(states, key=lambda state: state.peak_memory_bytes, default=None)
    total = sum(state.seconds for state in states)
    memory = f", peak memory {_gigabytes(peak)}" if peak else ""
    console.print(f"{recipe.out}: {total:.0f} s in all steps, {spent:.0f} s of them now{memory}")


def _gigabytes(state: StepState) -> str:
    return f"{state.peak_memory_bytes / 2**30:.1f} GB"
