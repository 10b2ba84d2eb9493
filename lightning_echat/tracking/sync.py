"""`echat sync`: what was trained offline goes to W&B, with the lineage that W&B takes online only."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import wandb

from lightning_echat.contracts import UserError
from lightning_echat.tracking.identity import read_identity
from lightning_echat.tracking.lineage import FILE, StageModel, declare_input, read_lineage, write_lineage


def sync(folder: Path) -> None:
    """Send the offline W&B runs below a folder, oldest first, and declare what each stage started from.

    A run that is there already is not sent again. Several pieces of one run, as restarts leave them, become one run.

    Args:
        folder: A run's folder, or one above several.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a run, or one above several")
    pieces = sorted(folder.rglob("offline-run-*/run-*.wandb"), key=lambda path: path.parent.name)
    stages = [path.parent for path in sorted(folder.rglob(FILE))]
    if not pieces and not stages:
        raise UserError(f"{folder}: holds no offline W&B run")
    # What trains offline by default must not keep this command from W&B, whose log goes where its runs are.
    environment = {**os.environ, "WANDB_MODE": "online", "WANDB_DIR": str(folder.absolute())}
    new = [piece for piece in pieces if not _marker(piece).exists()]
    for pieces_of_runs in _rounds(new):
        for piece in pieces_of_runs:
            _say(f"sending {piece.parent}")
        _send(pieces_of_runs, environment)
    declared = sum(_declare(stage) for stage in stages)
    _say(f"{len(new)} sent, {len(pieces) - len(new)} were there already; {declared} inputs of stages declared")


def _rounds(pieces: list[Path]) -> list[list[Path]]:
    """Pieces that may be sent at once: no two of one run, whose order is the order of its history."""
    runs: dict[str, list[Path]] = defaultdict(list)
    for piece in pieces:
        runs[piece.name].append(piece)
    return [[piece for piece in each if piece] for each in zip_longest(*runs.values())]


def _send(pieces: list[Path], environment: dict[str, str]) -> None:
    """Send pieces with W&B's own command, whose exit code says little: its marker says that one is there."""
    words = [sys.executable, "-m", "wandb", "sync", *(str(piece.parent) for piece in pieces)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    for piece in pieces:
        if not _marker(piece).exists():
            said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            raise UserError(f"{piece.parent} was not sent: {said[-1] if said else f'exit code {done.returncode}'}")


def _marker(piece: Path) -> Path:
    return piece.with_name(f"{piece.name}.synced")


def _declare(stage: Path) -> bool:
    """Whether W&B was told now what a stage started from."""
    lineage, identity = read_lineage(stage), read_identity(stage)
    model = lineage.started_from
    if lineage.declared or identity is None or model is None or not model.artifact:
        return False
    project = lineage.made.project if lineage.made else model.project
    _declare_for(f"{project}/{identity.id}", model, stage)
    write_lineage(stage, replace(lineage, declared=True))
    return True


def _declare_for(run: str, model: StageModel, stage: Path) -> None:
    try:
        declare_input(wandb.Api().run(run), model)
    except (wandb.errors.CommError, wandb.errors.UsageError, ValueError) as error:
        raise UserError(f"{stage} started from {model.artifact}, which W&B does not know: {error}") from error


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
