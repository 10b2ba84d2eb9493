"""Drawings of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure as Drawing

from lightning_echat.studies.importance import Importance, as_numbers
from lightning_echat.studies.search import Trial
from lightning_echat.studies.sweep_table import short, short_names


def draw_parallel_coordinates(
    trials: Sequence[Trial], parameters: Mapping[str, Mapping[str, Any]], *, metric: str, goal: str
) -> Drawing:
    """A line a trial across an axis a parameter, and the metric at the end; the better, the darker.

    Trials that were stopped early are dashed; those without a value are left out, and counted in the title.
    """
    used = [trial for trial in trials if trial.best is not None]
    names = list(parameters)
    drawing = Drawing(figsize=(1.9 * (len(names) + 1) + 1.2, 4.4), layout="constrained")
    axes = drawing.add_subplot()
    axes.set_title(
        f"{len(used)} trials" + (f"; {len(trials) - len(used)} without a value" if len(used) < len(trials) else ""),
        fontsize=9,
    )
    ends = short_names(names)
    axes.set_xticks(range(len(names) + 1), [*(ends[name] for name in names), metric], fontsize=8)
    axes.set_yticks([])
    axes.set_xlim(-0.3, len(names) + 0.6)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    if not used:
        return drawing
    columns = [
        _Axis([t.parameters.get(name) for t in used], logarithmic=_logarithmic(parameters[name])) for name in names
    ]
    values = _Axis([trial.best for trial in used], logarithmic=False)
    for place, axis in enumerate([*columns, values]):
        axes.axvline(place, color="0.75", linewidth=0.8)
        for height, text in axis.labels:
            axes.text(place + 0.03, height, text, fontsize=7, va="center")
    goodness = 1.0 - values.heights if goal == "minimize" else values.heights
    colors = mpl.colormaps["viridis_r"]
    for row in np.argsort(goodness):
        line = [*(column.heights[row] for column in columns), values.heights[row]]
        style = "--" if used[row].state == "stopped" else "-"
        axes.plot(range(len(line)), line, style, color=colors(0.15 + 0.85 * goodness[row]), linewidth=1.2, alpha=0.85)
    return drawing


def _logarithmic(distribution: Mapping[str, Any]) -> bool:
    return "log" in str(distribution.get("distribution", ""))


class _Axis:
    """Values as heights between 0 and 1, and what to write beside them."""

    def __init__(self, values: Sequence[Any], *, logarithmic: bool) -> None:
        numbers = as_numbers(values)
        scaled = np.log(numbers) if logarithmic and (numbers > 0).all() else numbers
        low, width = scaled.min(), np.ptp(scaled)
        self.heights = (scaled - low) / width if width else np.full(len(values), 0.5)
        distinct = dict(zip(self.heights.tolist(), map(short, values), strict=True))
        # Every value of a choice, the ends of a range.
        kept = sorted(distinct) if len(distinct) <= 6 else [min(distinct), max(distinct)]
        self.labels = [(height, distinct[height]) for height in kept]


def draw_importance(found: Importance) -> Drawing:
    """Bars of permutation importance, the largest on top."""
    ends = short_names(list(found.shares))
    order = sorted(found.shares, key=lambda name: found.shares[name])
    drawing = Drawing(figsize=(5.6, 0.42 * len(order) + 1.1), layout="constrained")
    axes = drawing.add_subplot()
    axes.barh([ends[name] for name in order], [found.shares[name] for name in order], color="#3b82f6")
    axes.set_xlim(0, 1)
    axes.set_xlabel("permutation importance (shares of 1)", fontsize=8)
    axes.set_title(f"forest explains {found.explained:.0%} of unseen trials' variance", fontsize=9)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return drawing
