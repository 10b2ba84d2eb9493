"""The files that callbacks leave in the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lightning_echat.data.files import write_json
from lightning_echat.evaluation.records import nan_as_none


def write_run_file(trainer: Trainer, name: str, *, content: dict[str, Any]) -> None:
    """Write a JSON file into the run's folder, from rank 0. What is not a number becomes null."""
    if trainer.is_global_zero:
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / name, content=nan_as_none(content))
