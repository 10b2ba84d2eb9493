"""What training and the recipe left in a run folder, for the report of its evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def what_the_run_left(out: Path) -> dict[str, Any]:
    """Stages, data and seconds from the files that training and the recipe left below `out`."""
    stages: dict[str, Any] = {}
    data: dict[str, Any] = {}
    for file in sorted(out.glob("*/stage_summary.json"), key=lambda f: f.stat().st_mtime):
        # What a recipe moved aside was trained with other settings and is not part of this run.
        if file.parent.suffix == ".stale":
            continue
        summary = json.loads(file.read_text())
        stages[file.parent.name] = {k: summary[k] for k in ("seconds", "steps", "loss_first", "loss_last")}
        health = file.with_name("data_health.json")
        if health.is_file():
            data[file.parent.name] = json.loads(health.read_text())
    steps = [json.loads(file.read_text()) for file in sorted(out.glob(".recipe/*.json"))]
    seconds = sum(step["seconds"] for step in steps if step.get("seconds"))
    peak = max((step.get("peak_memory_bytes", 0) for step in steps), default=0)
    return {
        "seconds": seconds or sum(stage["seconds"] for stage in stages.values()),
        "peak_memory_bytes": peak or None,
        "stages": stages,
        "data": _total_health(data),
    }


def _total_health(per_stage: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The data section: totals over the stages, and each stage's own counts."""
    skipped: dict[str, int] = {}
    for health in per_stage.values():
        for reason, count in health.get("skipped", {}).items():
            skipped[reason] = skipped.get(reason, 0) + count
    positions = sum(health.get("positions", 0) for health in per_stage.values())
    padding = sum(health.get("positions", 0) * (health.get("padding_share") or 0.0) for health in per_stage.values())
    return {
        "samples": sum(health.get("samples", 0) for health in per_stage.values()),
        "skipped": skipped,
        "padding_share": padding / positions if positions else None,
        "stages": per_stage,
    }
