"""Reads what a run folder holds: the report, the curves of its stages, and the stored answers."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_echat.contracts import UserError
from lightning_echat.evaluation.records import AnswerRecord, read_records
from lightning_echat.evaluation.report_plots import Series

_NOT_A_METRIC = frozenset({"step", "epoch", ""})


@dataclass(slots=True, kw_only=True)
class RunFolder:
    """What was found in a run folder; a part that is missing is empty.

    Attributes:
        path: The folder.
        report: The content of `report.json`.
        curves: Stage (its folder) -> metric -> steps and values, from every `metrics.csv`.
        answers: Name of the answers (dialogues, text_only, …) -> records, from `evaluation/*.jsonl`.
    """

    path: Path
    report: dict[str, Any]
    curves: dict[str, dict[str, Series]]
    answers: dict[str, list[AnswerRecord]]


def read_run(path: Path) -> RunFolder:
    """Read a run folder.

    Raises:
        UserError: It is not there, holds nothing that a run leaves, or a file in it cannot be read.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give the folder of a run")
    run = RunFolder(
        path=path,
        report=_read_report(path / "report.json"),
        curves=_read_curves(path),
        answers={file.stem: read_records(file) for file in sorted((path / "evaluation").glob("*.jsonl"))},
    )
    if not (run.report or run.curves or run.answers):
        raise UserError(f"{path}: not a run folder, it has no report.json, no metrics.csv and no evaluation/*.jsonl")
    return run


def _read_report(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a report, it holds no object")
    return content


def _read_curves(path: Path) -> dict[str, dict[str, Series]]:
    """Curves by stage. A stage that was resumed has several files; they continue one another."""
    points: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for file in sorted(path.rglob("metrics.csv"), key=lambda file: file.stat().st_mtime):
        folders = file.relative_to(path).parent.parts
        # What a CSVLogger calls its own folder says nothing about the stage.
        named = [name for name in folders if not re.fullmatch(r"version_\d+|metrics", name)]
        stage = "/".join(named) or path.resolve().name
        with file.open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                _add_row(points[stage], row, file=file)
    return {stage: {name: _as_series(found) for name, found in metrics.items()} for stage, metrics in points.items()}


def _add_row(metrics: dict[str, dict[int, float]], row: dict[str, str | None], *, file: Path) -> None:
    """Add the values of one row. Where a resumed run went over a step again, the later value stands."""
    try:
        step = int(float(row.get("step") or "nan"))
        values = {name: float(text) for name, text in row.items() if text and name not in _NOT_A_METRIC}
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: a row is not numbers as a CSVLogger writes them ({error})") from error
    for name, value in values.items():
        if math.isfinite(value):
            metrics[name][step] = value


def _as_series(points: dict[int, float]) -> Series:
    steps = sorted(points)
    return np.asarray(steps), np.asarray([points[step] for step in steps])
