"""The drawings of a report page, as SVG text that takes the colour of the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from lightning_echat.evaluation.items import CATEGORIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#14b8a6", "#ec4899", "#84cc16")
"""Readable on white and on near-black."""

_INK = "#123457"  # Drawn with, then replaced by currentColor, which SVG from matplotlib cannot say itself.

Series = tuple[np.ndarray, np.ndarray]
"""Steps and values."""


def draw_curves(curves: Mapping[str, Series], *, name: str, logarithmic: bool = False) -> str:
    """Lines over the training step. `name` must differ from drawing to drawing on a page."""
    figure = Figure(figsize=(6.4, 3.0 + 0.09 * len(curves)), layout="constrained")
    axes = figure.add_subplot()
    for index, (label, (steps, values)) in enumerate(curves.items()):
        marker = "o" if len(steps) < 30 else None
        color = COLORS[index % len(COLORS)]
        style = "-" if index < len(COLORS) else "--"
        axes.plot(steps, values, style, color=color, marker=marker, markersize=3, linewidth=1.6, label=label)
    if logarithmic:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    _dress(figure, axes)
    # Below the axes: inside, a legend of a dozen names would lie on the lines.
    figure.legend(fontsize=8, frameon=False, labelcolor=_INK, ncols=2, loc="outside lower center")
    return _as_svg(figure, name=name)


def draw_scores(scores: Mapping[str, Mapping[str, Sequence[float | None]]], *, name: str) -> str:
    """Bars with intervals: system -> category -> [score, low, high], 0 to 100. What has no data has no bar."""
    figure = Figure(figsize=(6.4, 3.3), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / max(len(scores), 1)
    for index, (system, by_category) in enumerate(scores.items()):
        label: str | None = system.replace("_", " ")
        for place, category in enumerate(CATEGORIES):
            mean, low, high = by_category.get(category) or (None, None, None)
            if mean is None:
                continue
            x = place - 0.4 + width * (index + 0.5)
            axes.bar(x, mean, width * 0.92, color=COLORS[index % len(COLORS)], label=label)
            label = None  # Named once, or the legend would name the system five times.
            if low is not None and high is not None:
                axes.errorbar(x, mean, [[mean - low], [high - mean]], color=_INK, capsize=3, linewidth=1.1)
    axes.set_xticks(range(len(CATEGORIES)), CATEGORIES)
    axes.set_ylim(0, 104)
    axes.set_yticks(range(0, 101, 20))
    _dress(figure, axes)
    if axes.patches:
        # Outside the axes: scores may reach the top anywhere.
        figure.legend(fontsize=8, frameon=False, labelcolor=_INK, ncols=4, loc="outside lower center")
    return _as_svg(figure, name=name)


def draw_reliability(tables: Mapping[str, Sequence[Mapping[str, float]]], *, name: str) -> str:
    """Accuracy over confidence, a line a label set, beside the diagonal on which a calibrated model stands.

    `tables` is label set -> bins with `confidence`, `accuracy` and `items`; a larger point holds more answers.
    """
    figure = Figure(figsize=(4.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle=":")
    for index, (label, rows) in enumerate(tables.items()):
        color = COLORS[index % len(COLORS)]
        confidence, accuracy = ([row[key] for row in rows] for key in ("confidence", "accuracy"))
        items = sum(row["items"] for row in rows)
        axes.plot(confidence, accuracy, color=color, linewidth=1.2, label=label)
        axes.scatter(confidence, accuracy, [6 + 60 * row["items"] / items for row in rows], color=color)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("probability of the label named")
    _dress(figure, axes)
    figure.legend(fontsize=8, frameon=False, labelcolor=_INK, ncols=4, loc="outside lower center")
    return _as_svg(figure, name=name)


def _dress(figure: Figure, axes: Axes) -> None:
    """No box, no background, a faint grid, and everything that is ink in one colour."""
    figure.patch.set_alpha(0.0)
    axes.patch.set_alpha(0.0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(_INK)
    axes.tick_params(which="both", colors=_INK, labelsize=8)
    axes.xaxis.label.set(color=_INK, fontsize=8)
    axes.grid(axis="y", color=_INK, alpha=0.15, linewidth=0.7)
    axes.set_axisbelow(True)


def _as_svg(figure: Figure, *, name: str) -> str:
    """The figure as an `<svg>` element that can stand beside others on one page."""
    buffer = io.StringIO()
    # Text stays text: smaller, selectable, in the page's font. The salt makes ids the same from run to run.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'font: [^;"]*?([0-9.]+px)[^;"]*', r"font: \1 system-ui, sans-serif", svg)
    # Matplotlib numbers its elements alike in every figure; only ids that something refers to are kept, made unique.
    used = set(re.findall(r"#([A-Za-z][\w.-]*)", svg))
    prefix = re.sub(r"\W", "-", name)
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'((?:href="|url\()#)', rf"\g<1>{prefix}-", svg)
    # Without a size of its own the drawing takes the width of its place on the page.
    opening, rest = svg.split(">", 1)
    return re.sub(r' (?:width|height)="[^"]*"', "", opening) + ">" + rest
