"""`echat ablate`: run a study, or write its jobs, and make its table."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console

from lightning_echat.contracts import UserError
from lightning_echat.recipes.fingerprints import code_fingerprint, dependencies, fingerprints
from lightning_echat.recipes.step_run import RunCommand, alone_in, is_current, read_state, terminated_as_exit
from lightning_echat.studies import tables
from lightning_echat.studies.live_table import log_folder, shown
from lightning_echat.studies.page import write_page
from lightning_echat.studies.plan import Plan, Resolve, plan_study
from lightning_echat.studies.plots import draw_learning_curves, draw_study, save_drawing
from lightning_echat.studies.results import StudyResults, as_json, collect
from lightning_echat.studies.run_steps import Progress, run_steps
from lightning_echat.studies.slurm import TABLE, write_jobs
from lightning_echat.studies.study_file import load_study
from lightning_echat.studies.summary_run import log_summary


def ablate(
    path: Path,
    *,
    run_command: RunCommand,
    resolve: Resolve,
    overrides: Sequence[str] = (),
    seeds: Sequence[int] = (),
    parallel: int = 1,
    threads: int = 1,
    only: str | None = None,
    slurm: Path | None = None,
) -> None:
    """See `echat ablate`.

    Args:
        path: The study.
        run_command: Runs one `echat` command, in a child process: a function that a module holds under its name.
        resolve: Parses one `echat` command: words -> all its settings.
        overrides: KEY=VALUE pairs that replace variables.
        seeds: Instead of the file's.
        parallel: Stages trained at a time.
        threads: Of each of them.
        only: One step, or "table".
        slurm: Folder that takes the jobs; nothing is run then.

    Raises:
        UserError: The study is wrong.
        SystemExit: A run failed: code 1, once all others and the table are made.
    """
    if parallel < 1 or threads < 1:
        raise UserError("--parallel and --threads are at least 1")
    console = Console(highlight=False)
    study = load_study(path, overrides, seeds)
    plan = plan_study(study, resolve=resolve)
    prints = fingerprints(plan.recipe, code=code_fingerprint())
    reads = dependencies(plan.recipe)
    counts = f"{len(plan.runs)} runs, {len(plan.recipe.steps)} stages to train or score"
    console.print(f"{study.title}: {counts}", markup=False, soft_wrap=True)
    if slurm is not None:
        again = [_own_command(), "ablate", str(path), *(f"--set={pair}" for pair in overrides)]
        again += [f"--seeds={seed}" for seed in seeds] + [f"--threads={threads}"]
        console.print(f"bash {write_jobs(plan, slurm, command=again)}", markup=False, soft_wrap=True)
        return
    names = [step.name for step in plan.recipe.steps]
    if only not in (None, TABLE, *names):
        raise UserError(f"--only {only}: no such step; there are {', '.join([*names, TABLE])}")
    if only == TABLE:
        progress = _found(plan)
    else:
        progress = _run(plan, prints, console, run_command, parallel=parallel, threads=threads, only=only)
    if only not in (None, TABLE) and progress[only].status in ("waiting", "blocked"):
        raise UserError(f"--only {only}: what it reads is not made yet; run {', '.join(sorted(reads[only]))} first")
    if only in (None, TABLE):
        results = collect(study, plan, progress)
        write_results(results, study.out)
        console.print(tables.as_markdown(results), markup=False, soft_wrap=True)
    _leave_on_failure(progress, plan)


def _run(
    plan: Plan,
    prints: Mapping[str, str],
    console: Console,
    run_command: RunCommand,
    *,
    parallel: int,
    threads: int,
    only: str | None,
) -> dict[str, Progress]:
    # Read when the libraries are imported, in the process that all steps are forked from.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    out = plan.recipe.out
    # Jobs of a cluster share the folder, and none runs a step of another.
    alone = alone_in(out) if only is None else nullcontext()
    try:
        with alone, terminated_as_exit(), shown(plan, console) as watch:
            return run_steps(
                plan.recipe,
                prints,
                parallel=parallel,
                run_command=run_command,
                watch=watch,
                only=None if only is None else [only],
            )
    except KeyboardInterrupt:
        sys.stderr.write(f"\nstopped; the same command continues ({out})\n")
        raise


def _own_command() -> str:
    """`echat` of this environment, which a job's shell need not have activated."""
    beside = Path(sys.executable).with_name("echat")
    return str(beside) if beside.is_file() else "echat"


def _found(plan: Plan) -> dict[str, Progress]:
    """What is there, whatever code has made it."""
    progress: dict[str, Progress] = {}
    for step in plan.recipe.steps:
        state = read_state(plan.recipe.out, step.name)
        current = state is not None and is_current(step, state, state.fingerprint)
        failed = state is not None and state.exit_code not in (0, None)
        progress[step.name] = Progress(
            status="reused" if current else "failed" if failed else "waiting",
            seconds=state.seconds if state else 0.0,
            reason=f"exit code {state.exit_code}" if state and failed else "",
        )
    return progress


def write_results(results: StudyResults, out: Path) -> None:
    """Write `results.md`, `.csv`, `.tex`, `.json`, `.png` and `.svg`, `curves`, the page and the W&B run."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "md": tables.as_markdown(results),
        "csv": tables.as_csv(results),
        "tex": tables.as_latex(results),
        "json": json.dumps({**as_json(results), "tables": tables.as_values(results)}, indent=1, ensure_ascii=False)
        + "\n",
    }
    for ending, text in texts.items():
        partial = out / f"results.{ending}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(out / f"results.{ending}")
    save_drawing(draw_study(results), out / "results")
    save_drawing(draw_learning_curves(results), out / "curves")
    write_page(out)
    log_summary(results, out)


def _leave_on_failure(progress: Mapping[str, Progress], plan: Plan) -> None:
    failed = [(name, one.reason) for name, one in progress.items() if one.status == "failed"]
    for name, reason in failed:
        sys.stderr.write(f"echat: error: {name}: {reason} (all of it in {log_folder(plan)}/{name}.log)\n")
    if failed:
        raise SystemExit(1)
