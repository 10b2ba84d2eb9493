"""Drawings of a study."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure as Drawing

from lightning_echat.studies.results import StudyResults
from lightning_echat.studies.trial_metrics import metric_series

COLORS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#14b8a6", "#ec4899", "#84cc16")
"""Readable on white and on near-black."""


def draw_study(results: StudyResults) -> Drawing:
    """A panel a figure: a point for each run, the mean over seeds and its interval for each variant."""
    figures, variants = results.study.figures, results.study.variants
    columns = min(3, len(figures))
    rows = math.ceil(len(figures) / columns)
    drawing = Drawing(figsize=(3.4 * columns + 1.6, (0.36 * len(variants) + 1.0) * rows), layout="constrained")
    for place, figure in enumerate(figures):
        axes = drawing.add_subplot(rows, columns, place + 1)
        for row, variant in enumerate(variants):
            color = COLORS[row % len(COLORS)]
            values = [v for v in results.values(variant.name, figure.name).values() if not math.isnan(v)]
            axes.plot(values, [row] * len(values), "o", color=color, alpha=0.45, markersize=4)
            found = results.estimate(variant.name, figure.name)
            width = None if math.isnan(found.half_width) else found.half_width
            axes.errorbar([found.mean], [row], xerr=width, fmt="D", color=color, capsize=3, markersize=5)
        axes.set_yticks(range(len(variants)), [v.name for v in variants] if place % columns == 0 else [])
        axes.set_ylim(len(variants) - 0.5, -0.5)
        axes.set_title(f"{figure.name} ({figure.better} is better)", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(axis="x", alpha=0.2)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return drawing


def draw_learning_curves(results: StudyResults) -> Drawing:
    """A panel a trained stage: the training loss, mean over seeds; variants that share a stage share its line."""
    stages = [stage.name for stage in results.study.stages[:-1]]
    drawing = Drawing(figsize=(4.4 * max(len(stages), 1), 3.6), layout="constrained")
    for place, stage in enumerate(stages):
        axes = drawing.add_subplot(1, len(stages), place + 1)
        for row, (variants, curves) in enumerate(_curves_of(results, stage).items()):
            steps = sorted(set.intersection(*(set(curve) for curve in curves)))
            means = [sum(curve[step] for curve in curves) / len(curves) for step in steps]
            axes.plot(steps, means, color=COLORS[row % len(COLORS)], label=";\n".join(variants), linewidth=1.4)
        axes.set_title(stage, fontsize=9)
        axes.set_xlabel("optimizer step", fontsize=8)
        axes.tick_params(labelsize=8)
        if axes.lines:
            axes.legend(fontsize=7, frameon=False)
    return drawing


def _curves_of(results: StudyResults, stage: str) -> dict[tuple[str, ...], list[dict[int, float]]]:
    """Variants that share a stage -> its loss curve for each seed."""
    users: dict[str, list[str]] = {}
    for run in results.runs:
        if stage in run.steps:
            users.setdefault(run.steps[stage], []).append(run.variant)
    curves: dict[tuple[str, ...], list[dict[int, float]]] = {}
    for step, variants in users.items():
        if curve := metric_series(results.study.out / "stages" / step, "train/loss"):
            curves.setdefault(tuple(variants), []).append(curve)
    return curves


def save_drawing(drawing: Drawing, path: Path) -> None:
    """Write a drawing as PNG and SVG beside each other; `path` without its ending."""
    for ending in ("png", "svg"):
        partial = path.with_name(f"{path.name}.partial.{ending}")
        drawing.savefig(partial, dpi=150)
        partial.replace(path.with_suffix(f".{ending}"))
