"""One self-contained HTML page of a run folder: figures, curves, tables, and dialogues to listen to."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from lightning_echat.evaluation.items import CATEGORIES
from lightning_echat.evaluation.pages import write_html
from lightning_echat.evaluation.records import AnswerRecord
from lightning_echat.evaluation.report_plots import Series, draw_curves, draw_reliability, draw_scores
from lightning_echat.evaluation.run_folder import RunFolder, read_run
from lightning_echat.evaluation.summary import systems_of

TEMPLATES = Path(__file__).parent / "templates"

DIALOGUES_SHOWN = 8
"""Dialogues on a page: their audio is inside it, and a page that mails and opens quickly is worth more than all."""

_POINTS_DRAWN = 300

_SECTIONS = frozenset(
    {"seconds", "machine", "versions", "stages", "understanding", "thinking", "empathy", "speech", "data"}
    | {"other_judges", "benchmarks", "items_skipped"}
)
"""Parts of a report that have a place of their own on the page; all others are listed as they are."""


def report(run: Path, *, out: Path | None = None) -> Path:
    """Make one HTML page of a run folder.

    Args:
        run: The folder that `make quickstart`, training or `echat evaluate` wrote.
        out: Where the page goes; `report.html` in the run folder when not given.

    Returns:
        The path of the page.
    """
    return write_report(run, out=out)


def write_report(run_dir: Path, *, out: Path | None = None) -> Path:
    """Write the page of a run folder and return its path. Parts that the run lacks are named on the page.

    Raises:
        UserError: The folder is not a run.
    """
    run = read_run(run_dir)
    target = out or run_dir / "report.html"
    filters = {"figure": _figure, "percent": _percent, "score": _score, "duration": _duration}
    return write_html(target, TEMPLATES / "report.html", _page_content(run), filters=filters)


def _page_content(run: RunFolder) -> dict[str, Any]:
    """Everything that the template shows."""
    report = run.report
    empathy = report.get("empathy") or {}
    systems = systems_of(empathy) if empathy else {}
    return {
        "title": run.path.resolve().name,
        "report": report,
        "other_facts": {key: value for key, value in report.items() if key not in _SECTIONS},
        "categories": CATEGORIES,
        "systems": systems,
        "score_plot": draw_scores(_scores(systems), name="scores") if systems else None,
        "reliability": _reliability(report.get("understanding") or {}),
        "stages": _stages(run),
        "dialogues": _dialogues(run, controls=set(empathy.get("controls") or {})),
    }


def _scores(systems: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {system: {name: found[name] for name in CATEGORIES if name in found} for system, found in systems.items()}


def _reliability(understanding: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each set whose answers say how sure the model was: its drawing and its errors of calibration."""
    sets = {understanding.get("set", ""): understanding, **(understanding.get("other_sets") or {})}
    drawn = []
    for name, figures in sets.items():
        scored = {label: found for label, found in (figures.get("calibration") or {}).items() if found["reliability"]}
        if scored:
            tables = {label: found["reliability"] for label, found in scored.items()}
            svg = draw_reliability(tables, name=f"reliability-{name}")
            drawn.append({"name": name, "svg": svg, "calibration": scored})
    return drawn


def _stages(run: RunFolder) -> list[dict[str, Any]]:
    """For each stage that left curves: its drawings, and the last value of what is not drawn."""
    order = list(run.report.get("stages") or {})
    places = {name: [order.index(part) for part in name.split("/") if part in order] for name in run.curves}
    names = sorted(run.curves, key=lambda name: (places[name] or [len(order)], name))
    stages = []
    for name in names:
        curves = run.curves[name]
        losses = {key: _thinned(series) for key, series in curves.items() if "loss" in key}
        scores = {key: series for key, series in curves.items() if _is_empathy_score(key)}
        rates = {key: series for key, series in curves.items() if _is_validation_rate(key, series)}
        drawn = [("Loss", losses), ("Validation", rates), ("Empathy of validation replies, 0 to 100", scores)]
        shown = {key for _, found in drawn for key in found}
        rest = {key: values[-1] for key, (_, values) in curves.items() if key not in shown}
        plots = [
            {
                "title": title,
                "svg": draw_curves(
                    found, name=f"{name}-{title}", logarithmic=title == "Loss" and _spans_decades(found)
                ),
            }
            for title, found in drawn
            if found
        ]
        stages.append({"name": name, "plots": plots, "rest": dict(sorted(rest.items()))})
    return stages


def _is_validation_rate(name: str, series: Series) -> bool:
    """Accuracies, error and parse rates: what a validation logs and what one axis can hold.

    Macro-F1 runs along the accuracy and would hide it.
    """
    values = series[1]
    drawn_elsewhere = "loss" in name or "/macro_f1/" in name or "/empathy/" in name
    return name.startswith("val") and not drawn_elsewhere and bool((values >= 0).all() and (values <= 1).all())


def _is_empathy_score(name: str) -> bool:
    return name.startswith("val") and "/empathy/" in name and not name.endswith("/count")


def _spans_decades(curves: Mapping[str, Series]) -> bool:
    """Whether a linear axis would flatten most of what is drawn."""
    values = np.concatenate([series[1] for series in curves.values()])
    return bool(values.min() > 0 and values.max() / values.min() > 30)


def _thinned(series: Series) -> Series:
    """A long curve as means over equal runs of points: what one can see of it, in a page of sensible size."""
    steps, values = series
    if len(steps) <= _POINTS_DRAWN:
        return series
    parts = np.array_split(np.arange(len(steps)), _POINTS_DRAWN)
    return np.asarray([steps[part[-1]] for part in parts]), np.asarray([values[part].mean() for part in parts])


def _dialogues(run: RunFolder, *, controls: set[str]) -> list[dict[str, Any]]:
    """A few scored answers, evenly spaced through the set: never picked by how good they are."""
    scored = [
        record
        for name, records in run.answers.items()
        if name not in controls
        for record in records
        if record.score is not None
    ]
    audible = [record for record in scored if record.reply_audio] or scored
    if not audible:
        return []
    places = np.linspace(0, len(audible) - 1, min(DIALOGUES_SHOWN, len(audible))).round().astype(int)
    return [_dialogue(audible[place], folder=run.path / "evaluation") for place in places]


def _dialogue(record: AnswerRecord, *, folder: Path) -> dict[str, Any]:
    return {
        "record": record,
        "query_audio": _as_data_uri(record.query_audio, folder=folder),
        "reply_audio": _as_data_uri(record.reply_audio, folder=folder),
        "wrong_labels": {name for name, label in record.item.labels.items() if record.answer.labels.get(name) != label},
    }


def _as_data_uri(audio: str | None, *, folder: Path) -> str | None:
    """The wav inside the page; None where there is none, or where it was deleted since."""
    if audio is None or not (folder / audio).is_file():
        return None
    return f"data:audio/wav;base64,{base64.b64encode((folder / audio).read_bytes()).decode()}"


def _is_missing(value: Any) -> bool:
    return value is None or isinstance(value, jinja2.Undefined) or (isinstance(value, float) and math.isnan(value))


def _figure(value: Any) -> str:
    """A number as people read it."""
    if _is_missing(value):
        return "no data"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}"
    return f"{int(value):,}" if isinstance(value, int | float) else str(value)


def _percent(value: Any) -> str:
    return "no data" if _is_missing(value) else f"{100 * value:.1f} %"


def _score(value: Any) -> str:
    return "–" if _is_missing(value) else f"{value:.1f}"


def _duration(seconds: Any) -> str:
    if _is_missing(seconds):
        return "no data"
    minutes, rest = divmod(round(float(seconds)), 60)
    return f"{minutes} min {rest} s" if minutes else f"{float(seconds):.1f} s"
