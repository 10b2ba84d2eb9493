"""Drawings of a study."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure as Drawing

from lightning_echat.studies.results import StudyResults

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


def save_drawing(drawing: Drawing, path: Path) -> None:
    """Write a drawing as PNG and SVG beside each other; `path` without its ending."""
    for ending in ("png", "svg"):
        partial = path.with_name(f"{path.name}.partial.{ending}")
        drawing.savefig(partial, dpi=150)
        partial.replace(path.with_suffix(f".{ending}"))
