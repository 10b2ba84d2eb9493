"""What a run has logged so far, from the files of its CSVLogger."""

from __future__ import annotations

import csv
import math
from pathlib import Path


def metric_series(folder: Path, metric: str) -> dict[int, float]:
    """Step -> finite value of a metric, in the order of steps.

    A resumed run goes over some steps again and has a file for each attempt; each step counts once, with its latest
    value. A row that is being written is left for the next look.
    """
    points: dict[int, float] = {}
    for file in sorted(folder.rglob("metrics.csv"), key=lambda file: file.stat().st_mtime):
        with file.open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                try:
                    step, value = int(float(row.get("step") or "nan")), float(row.get(metric) or "nan")
                except ValueError:
                    continue
                if math.isfinite(value):
                    points[step] = value
    return dict(sorted(points.items()))


def metric_history(folder: Path, metric: str) -> list[float]:
    """The values of `metric_series`."""
    return list(metric_series(folder, metric).values())
