"""A study as SLURM jobs: one a stage, each waiting for what it reads, and one that makes the tables at the end."""

from __future__ import annotations

import shlex
import stat
from collections.abc import Sequence
from pathlib import Path

from lightning_echat.recipes.fingerprints import dependencies
from lightning_echat.studies.plan import Plan

TABLE = "table"

_JOB = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --output={folder}/%x-%j.out
# Time, partition, GPUs: give them to sbatch, as in SBATCH_OPTIONS of submit.sh, or write them here.
cd {here}
exec {command}
"""

_SUBMIT = """#!/bin/bash
# Submits the jobs of a study in the order of what they read from each other.
#   SBATCH_OPTIONS="--time=12:00:00 --gres=gpu:1" bash submit.sh
set -euo pipefail
declare -A job
submit() {{ # NAME KIND NEEDED...
  local needed=() name=$1 kind=$2; shift 2
  for one in "$@"; do needed+=("${{job[$one]}}"); done
  local after=(); [ ${{#needed[@]}} -eq 0 ] || after=(--dependency="$kind:$(IFS=:; echo "${{needed[*]}}")")
  # A job whose stage before has failed would wait for ever.
  job[$name]=$(sbatch --parsable --kill-on-invalid-dep=yes ${{SBATCH_OPTIONS:-}} ${{after[@]+"${{after[@]}}"}} \\
    "{folder}/$name.sbatch" | cut -d';' -f1)
  echo "$name: job ${{job[$name]}}"
}}
"""


def write_jobs(plan: Plan, folder: Path, *, command: Sequence[str]) -> Path:
    """Write a job a step, and `submit.sh`, which submits them.

    Args:
        plan: What the study runs.
        folder: Where the scripts go.
        command: Words of `echat ablate …` that plan the same study; each job adds `--only STEP`.

    Returns:
        `submit.sh`.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    reads = dependencies(plan.recipe)
    lines = [_SUBMIT.format(folder=folder)]
    for step in plan.recipe.steps:
        _write_job(folder, step.name, [*command, "--only", step.name])
        lines.append(f"submit {shlex.join([step.name, 'afterok', *sorted(reads[step.name])])}\n")
    _write_job(folder, TABLE, [*command, "--only", TABLE])
    # Whatever has failed, the table is made and names it.
    lines.append(f"submit {shlex.join([TABLE, 'afterany', *(step.name for step in plan.recipe.steps)])}\n")
    script = folder / "submit.sh"
    script.write_text("".join(lines), encoding="utf-8")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def _write_job(folder: Path, name: str, command: Sequence[str]) -> None:
    text = _JOB.format(name=name, folder=folder, here=shlex.quote(str(Path.cwd())), command=shlex.join(command))
    (folder / f"{name}.sbatch").write_text(text, encoding="utf-8")
