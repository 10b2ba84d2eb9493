"""`echat sweep`: the trials of a W&B sweep file, on this machine, with no account."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import yaml
from rich.console import Console

from lightning_echat.contracts import UserError
from lightning_echat.recipes.fingerprints import code_fingerprint, hash_of
from lightning_echat.recipes.recipe_file import Step
from lightning_echat.recipes.step_run import (
    RunCommand,
    RunningStep,
    alone_in,
    end_processes,
    read_state,
    state_to_continue,
    terminated_as_exit,
)
from lightning_echat.studies.page import write_page
from lightning_echat.studies.run_steps import last_line, log_file
from lightning_echat.studies.search import Search, Trial
from lightning_echat.studies.sweep_file import Resolve, SweepFile, check_with_parser, doubt_about_metric, load_sweep
from lightning_echat.studies.sweep_results import write_sweep_results
from lightning_echat.studies.sweep_table import shown
from lightning_echat.studies.trial_metrics import metric_history

_LOOKING_SECONDS = 3.0
_GRACE_SECONDS = 30.0
"""What a stopped trial has to save, as under `wandb agent`."""


def sweep(
    path: Path,
    *,
    run_command: RunCommand,
    resolve: Resolve,
    trials: int | None = None,
    parallel: int = 1,
    threads: int = 1,
    out: Path | None = None,
    seed: int = 0,
) -> None:
    """See `echat sweep`.

    Args:
        path: The sweep file.
        run_command: Runs one `echat` command, in a child process: a function that a module holds under its name.
        resolve: Parses one `echat` command: words -> all its settings.
        trials: How many; the file's run_cap, or until the search is exhausted, where neither is given.
        parallel: Trials at a time.
        threads: Of each of them.
        out: Folder of the sweep; runs/sweeps/NAME where not given.
        seed: Of the search.

    Raises:
        UserError: The file is wrong.
        SystemExit: No trial came to an end: code 1.
    """
    if parallel < 1 or threads < 1 or (trials is not None and trials < 1):
        raise UserError("--trials, --parallel and --threads are at least 1")
    file = load_sweep(path)
    number = trials or file.content.get("run_cap")
    if number is None and file.content["method"] != "grid":
        raise UserError(f"--trials is missing: a {file.content['method']} search has no end of its own")
    out = out or Path("runs/sweeps") / path.stem
    console = Console(highlight=False)
    settings = check_with_parser(file, resolve=resolve, scratch=out)
    if doubt := doubt_about_metric(file, settings):
        console.print(doubt, markup=False, soft_wrap=True)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    run = SweepRun(file, out, run_command=run_command, seed=seed, log=console)
    try:
        with alone_in(out), terminated_as_exit(), shown(file, console) as watch:
            run.go(number=number, parallel=parallel, watch=watch)
    except KeyboardInterrupt:
        sys.stderr.write(f"\nstopped; the same command continues ({out})\n")
        raise
    console.print(write_sweep_results(file, run.trials, out), markup=False, soft_wrap=True)
    console.print(f"{write_page(out)}", markup=False, soft_wrap=True)
    failed = [trial for trial in run.trials if trial.state == "failed"]
    for trial in failed:
        sys.stderr.write(f"echat: {trial.name} failed: {trial.reason}\n")
    if len(failed) == len(run.trials):
        raise SystemExit(1)


class SweepRun:
    """The trials of a sweep, on disk at every moment.

    Args:
        file: The sweep.
        out: Its folder.
        run_command: Runs one command, in a child process.
        seed: Of the search.
        log: Where remarks go.

    Raises:
        UserError: The folder holds the trials of another sweep file or seed.
    """

    def __init__(self, file: SweepFile, out: Path, *, run_command: RunCommand, seed: int, log: Console) -> None:
        self._file = file
        self._out = out
        self._run_command = run_command
        self._search = Search(file.content, seed=seed)
        self._code = code_fingerprint()[:12]
        self._console = log
        self._made_by = {"sweep": _hash_of_search(file), "seed": seed}
        self._stopping: dict[str, float] = {}
        self.trials = self._stored()

    def go(self, *, number: int | None, parallel: int, watch: Callable[[Sequence[Trial]], None]) -> None:
        """Run trials until there are `number`, or the search is exhausted.

        What an earlier call has left running is continued first.
        """
        running: list[RunningStep] = []
        unfinished = [trial for trial in self.trials if trial.state == "running"]
        looked = 0.0
        try:
            while True:
                while len(running) < parallel and (trial := self._next(unfinished, number)) is not None:
                    running.append(self._start(trial))
                watch(self.trials)
                if not running:
                    return
                time.sleep(0.2)
                for step in [step for step in running if step.wait(timeout=0)]:
                    running.remove(step)
                    self._end(step)
                if time.monotonic() - looked > _LOOKING_SECONDS:
                    looked = time.monotonic()
                    self._look(running)
        finally:
            end_processes([step.child for step in running])
            for step in running:
                step.finish()
            self._store()

    def _next(self, unfinished: list[Trial], number: int | None) -> Trial | None:
        if unfinished:
            return unfinished.pop(0)
        if number is not None and len(self.trials) >= number:
            return None
        parameters = self._search.suggest(self.trials)
        if parameters is None:
            return None
        trial = Trial(name=f"t{len(self.trials):04d}", parameters=parameters, code=self._code)
        self.trials.append(trial)
        self._store()
        return trial

    def _start(self, trial: Trial) -> RunningStep:
        folder = self.folder(trial)
        values = self._out / "parameters" / f"{trial.name}.json"
        values.parent.mkdir(parents=True, exist_ok=True)
        values.write_text(json.dumps(trial.parameters, indent=1), encoding="utf-8")
        words = (
            *self._file.words(trial.parameters, values),
            f"--trainer.default_root_dir={folder}",
            "--ckpt_path=last",
        )
        step = Step(name=trial.name, command=words, resumable_folder=folder)
        fingerprint = hash_of([self._code, *words, json.dumps(trial.parameters)])
        return RunningStep(
            self._out,
            step,
            fingerprint=fingerprint,
            resumed=state_to_continue(step, read_state(self._out, step.name), fingerprint),
            run_command=functools.partial(_in_group, self._run_command, self._out.name),
            log=log_file(self._out, step.name),
        )

    def _look(self, running: Sequence[RunningStep]) -> None:
        """Read what the running trials have logged, and stop those that hyperband gives up."""
        steps = {step.step.name: step for step in running}
        for trial in self.trials:
            if trial.name in steps:
                self._read(trial)
                trial.seconds = steps[trial.name].state.seconds
        self._store()
        for name in self._search.to_stop(self.trials) - set(self._stopping):
            self._stopping[name] = time.monotonic()
            _signal(steps.get(name), signal.SIGTERM)
        for name, since in self._stopping.items():
            if name in steps and time.monotonic() - since > _GRACE_SECONDS:
                _signal(steps[name], signal.SIGKILL)

    def _end(self, step: RunningStep) -> None:
        """Take down how a trial ended: what hyperband has stopped is not finished, whatever its exit code."""
        trial = next(trial for trial in self.trials if trial.name == step.step.name)
        state = step.finish()
        self._read(trial)
        trial.seconds = state.seconds
        if trial.name in self._stopping:
            trial.state = "stopped"
        elif state.exit_code != 0:
            trial.state = "failed"
            trial.reason = f"exit code {state.exit_code}: {last_line(log_file(self._out, trial.name))}"
        elif self._file.metric and not trial.history:
            trial.state = "failed"
            trial.reason = f"it logged no finite {self._file.metric}"
        else:
            trial.state = "finished"
        self._store()

    def _read(self, trial: Trial) -> None:
        trial.history = metric_history(self.folder(trial), self._file.metric)
        if trial.history:
            trial.best = (min if self._file.goal == "minimize" else max)(trial.history)

    def folder(self, trial: Trial) -> Path:
        """Where a trial trains."""
        return self._out / "trials" / trial.name

    def _stored(self) -> list[Trial]:
        path = self._out / "sweep.json"
        if not path.is_file():
            return []
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["made_by"] != self._made_by:
            raise UserError(f"{self._out} holds the trials of another sweep file or seed; give another folder by --out")
        trials = [Trial(**entry) for entry in content["trials"]]
        if others := [trial for trial in trials if trial.code != self._code and trial.state != "running"]:
            self._console.print(f"{len(others)} trials were made by other code", markup=False)
        return trials

    def _store(self) -> None:
        self._out.mkdir(parents=True, exist_ok=True)
        content = {
            "made_by": self._made_by,
            "file": str(self._file.path),
            "sweep": self._file.content,
            "trials": [asdict(trial) for trial in self.trials],
        }
        partial = self._out / "sweep.json.partial"
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
        partial.replace(self._out / "sweep.json")


def _hash_of_search(file: SweepFile) -> str:
    """What decides the trials: everything in the file but how many there are."""
    content = {key: value for key, value in file.content.items() if key not in ("run_cap", "name", "description")}
    return hashlib.sha256(yaml.safe_dump(content).encode()).hexdigest()


def _in_group(run_command: RunCommand, group: str, words: list[str]) -> None:
    """Run a trial whose W&B run, if any, belongs to the sweep."""
    os.environ["WANDB_RUN_GROUP"] = group
    run_command(words)


def _signal(step: RunningStep | None, number: signal.Signals) -> None:
    if step is not None and step.child.is_alive() and step.child.pid is not None:
        os.kill(step.child.pid, number)
