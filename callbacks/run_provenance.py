"""What it takes to run a run again: `provenance.json`, and the same in the logger's configuration."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

import lightning_echat
from callbacks.run_files import write_run_file
from lightning_echat.data.reference_data import files_of_unit
from lightning_echat.data.shards import expand_shards
from lightning_echat.evaluation.machine import machine_facts, package_versions

FILE = "provenance.json"
_CONFIG = "config.yaml"


class RunProvenance(Callback):
    """Records, as training starts, what the run is made of.

    `config_sha256` (of the resolved `config.yaml` in the run's folder), `git` (commit, and whether the tree differs
    from it), `packages`, `machine` (no host name), `shards` (paths and sizes of the training shards: how many, and a
    hash), `seed`, `world_size` and `command`. What cannot be known is null.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the record. Not in `setup`: there the resolved configuration need not be written yet."""
        if not trainer.is_global_zero:
            return
        record = collect(trainer)
        write_run_file(trainer, FILE, content=record)
        for logger in trainer.loggers:
            logger.log_hyperparams({"provenance": record})


def collect(trainer: Trainer) -> dict[str, Any]:
    """Everything that is known of the run about to start."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    return {
        "config_sha256": _file_hash(Path(trainer.default_root_dir) / _CONFIG),
        "git": git_state(Path(lightning_echat.__file__)),
        "packages": package_versions(),
        "machine": machine_facts(),
        "shards": _training_shards(trainer),
        "seed": int(seed) if seed else None,
        "world_size": trainer.world_size,
        "command": sys.argv,
    }


def git_state(file: Path) -> dict[str, Any] | None:
    """Commit of the repository that tracks `file` and whether anything differs from it; None where none does."""
    # An installed package may lie inside somebody else's repository, which does not track it.
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None
    return {"commit": _git(file.parent, "rev-parse", "HEAD"), "dirty": bool(_git(file.parent, "status", "--porcelain"))}


def shard_list_hash(shards: Iterable[str]) -> str:
    """A hash of names and sizes in order: other data or another order gives another hash, another folder does not."""
    files = [file for shard in shards for file in files_of_unit(shard)]
    lines = [f"{file.name} {file.stat().st_size}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _training_shards(trainer: Trainer) -> dict[str, Any] | None:
    """Count and hash of the shards of a datamodule that lists its training sources."""
    sources = getattr(getattr(trainer, "datamodule", None), "train", None)
    if not sources:
        return None
    shards = [shard for source in sources for shard in expand_shards(source.shards)]
    return {"count": len(shards), "sha256": shard_list_hash(shards)}


def _file_hash(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _git(folder: Path, *words: str) -> str | None:
    """What a git command prints; None where git or the repository is missing, or it fails."""
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
