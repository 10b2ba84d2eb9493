"""One self-contained HTML page of a study or a sweep, from what its folder holds."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_echat.contracts import UserError
from lightning_echat.evaluation.pages import write_html
from lightning_echat.studies.importance import importance, summary
from lightning_echat.studies.sweep_results import (
    best_trial,
    counts,
    overlay,
    read_sweep,
    trial_head,
    trial_rows,
)
from lightning_echat.studies.sweep_table import short_names

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(slots=True, kw_only=True)
class Part:
    """A section of the page: any of a text, a table, a list, a drawing and code."""

    title: str
    text: str = ""
    head: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    points: list[str] = field(default_factory=list)
    image: str | None = None
    code: str = ""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.text or self.rows or self.points or self.image or self.code)


def is_study_or_sweep(folder: Path) -> bool:
    """Whether `write_page` knows what to do with a folder."""
    return (folder / "sweep.json").is_file() or _is_study(folder)


def _is_study(folder: Path) -> bool:
    return (folder / "results.json").is_file() and (folder / "stages").is_dir()


def write_page(folder: Path, *, out: Path | None = None) -> Path:
    """Write the page and return its path; `report.html` in the folder when `out` is not given.

    Raises:
        UserError: What the folder holds cannot be read.
    """
    title, lead, parts = _sweep_page(folder) if (folder / "sweep.json").is_file() else _study_page(folder)
    shown = [part for part in parts if not part.empty]
    content = {"title": title, "lead": lead, "parts": shown}
    return write_html(out or folder / "report.html", _TEMPLATES / "page.html", content)


def _study_page(folder: Path) -> tuple[str, list[str], list[Part]]:
    try:
        content: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        tables = content["tables"]
        lead = [tables["notes"], tables["how"]]
        parts = [
            Part(title="Results", head=tables["score_head"], rows=tables["scores"]),
            Part(title="Every run, means and intervals", image=_image(folder / "results.svg")),
            Part(title=f"Differences from {tables['compare_to']}", head=tables["head"], rows=tables["differences"]),
            Part(
                title="Not ours",
                text=tables["reference_source"],
                head=["variant", *tables["figures"]],
                rows=tables["reference"],
            ),
            Part(title="Runs without figures", points=tables["failed"]),
            Part(title="Figures that no run has", points=tables["absent"]),
            Part(title="Training loss, mean over seeds", image=_image(folder / "curves.svg")),
        ]
        return content["title"], [line for line in lead if line], parts
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{folder / 'results.json'}: cannot be read ({error}); make it again: echat ablate STUDY --only table"
        ) from error


def _sweep_page(folder: Path) -> tuple[str, list[str], list[Part]]:
    file, trials = read_sweep(folder)
    names = list(file.parameters)
    best = best_trial(file, trials)
    mattered = summary(importance(trials, names), short_names(names)) if file.metric else []
    parts = [
        Part(title="Best parameters", code=overlay(file, best) if best is not None else ""),
        Part(title="Trials, best first", head=trial_head(file), rows=trial_rows(file, trials)),
        Part(title="Failed", points=[f"{t.name}: {t.reason}" for t in trials if t.state == "failed"]),
        Part(title="All trials", image=_image(folder / "parallel_coordinates.svg")),
        Part(title="What mattered", text=mattered[0] if mattered else "", image=_image(folder / "importance.svg")),
    ]
    return f"Sweep {file.path.stem}", [counts(file, trials)], parts


def _image(path: Path) -> str | None:
    """A drawing inside the page; None where there is none."""
    if not path.is_file():
        return None
    return f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"
