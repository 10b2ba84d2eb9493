"""What a sweep ends with: the table, the best parameters as YAML, and what mattered."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_echat.contracts import UserError
from lightning_echat.studies.importance import importance, summary
from lightning_echat.studies.plots import save_drawing
from lightning_echat.studies.search import Trial
from lightning_echat.studies.sweep_file import SweepFile
from lightning_echat.studies.sweep_plots import draw_importance, draw_parallel_coordinates
from lightning_echat.studies.sweep_table import ranked, short, short_names

_STATES = ("finished", "stopped", "failed", "running")


def write_sweep_results(file: SweepFile, trials: Sequence[Trial], out: Path) -> str:
    """Write `results.md`, `results.csv`, `best.yaml`, and the drawings as PNG and SVG.

    Returns:
        The Markdown.
    """
    found = importance(trials, list(file.parameters)) if file.metric else None
    best = best_trial(file, trials)
    text = as_markdown(file, trials, summary(found, short_names(list(file.parameters))), out)
    _write(out / "results.md", text)
    _write(out / "results.csv", as_csv(file, trials))
    if best is not None:
        _write(out / "best.yaml", overlay(file, best))
    if file.metric:
        drawing = draw_parallel_coordinates(trials, file.parameters, metric=file.metric, goal=file.goal)
        save_drawing(drawing, out / "parallel_coordinates")
    if found is not None:
        save_drawing(draw_importance(found), out / "importance")
    return text


def best_trial(file: SweepFile, trials: Sequence[Trial]) -> Trial | None:
    """The best of those that were not broken off by a fault; None where none has a value."""
    able = [trial for trial in trials if trial.best is not None and trial.state != "failed"]
    return ranked(able, file.goal)[0] if able else None


def overlay(file: SweepFile, trial: Trial) -> str:
    """The parameters of a trial as YAML for `--config`, after the experiment's own files."""
    configs = [
        word
        for before, word in zip(file.content["command"], file.content["command"][1:], strict=False)
        if before in ("--config", "-c") and not str(word).startswith("${")
    ]
    command = " ".join(["echat fit", *(f"--config {name}" for name in configs), "--config best.yaml"])
    head = (
        f"# {file.path}: the best of its trials is {trial.name}, {file.metric} {trial.best:.6g}.\n"
        f"# Use it after the experiment:\n"
        f"#   {command}\n"
    )
    return head + yaml.safe_dump(nested(trial.parameters), sort_keys=False)


def nested(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1, "a.c": 2} -> {"a": {"b": 1, "c": 2}}."""
    tree: dict[str, Any] = {}
    for name, value in parameters.items():
        *folders, last = name.split(".")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value
    return tree


def counts(file: SweepFile, trials: Sequence[Trial]) -> str:
    """How many trials of each state, and what they cost."""
    states = {state: sum(trial.state == state for trial in trials) for state in _STATES}
    told = ", ".join(f"{count} {state}" for state, count in states.items() if count)
    return (
        f"{file.path}, {file.content['method']} search: {len(trials)} trials, {told}; "
        f"{sum(trial.seconds for trial in trials) / 60:.1f} minutes of work. Of every trial the best logged value "
        "counts, as in W&B's own search; a stopped trial was given up by hyperband."
    )


def trial_head(file: SweepFile) -> list[str]:
    """Heads of the table of trials."""
    ends = short_names(list(file.parameters))
    value = f"best {file.metric}" if file.metric else "value"
    return ["trial", "state", value, "logged", "minutes", *(ends[name] for name in file.parameters)]


def trial_rows(file: SweepFile, trials: Sequence[Trial]) -> list[list[str]]:
    """A row a trial, best first."""
    return [
        [
            trial.name,
            trial.state,
            "–" if trial.best is None else f"{trial.best:.4g}",
            str(len(trial.history)),
            f"{trial.seconds / 60:.1f}",
            *(short(trial.parameters.get(name)) for name in file.parameters),
        ]
        for trial in ranked(trials, file.goal)
    ]


def as_markdown(file: SweepFile, trials: Sequence[Trial], remarks: Sequence[str], out: Path) -> str:
    """The table of trials, and what mattered."""
    failed = [f"- {trial.name}: {trial.reason}" for trial in trials if trial.state == "failed"]
    best = best_trial(file, trials)
    head = trial_head(file)
    rows = [head, ["---"] * len(head), *trial_rows(file, trials)]
    lines = [
        f"# Sweep {file.path.stem}",
        "",
        counts(file, trials),
        "",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        *([f"Best: {best.name}, `{out / 'best.yaml'}`.", ""] if best is not None else []),
        *(["Failed:", "", *failed, ""] if failed else []),
        *(remarks if file.metric else []),
    ]
    return "\n".join(lines) + "\n"


def as_csv(file: SweepFile, trials: Sequence[Trial]) -> str:
    """A row a trial."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = list(file.parameters)
    writer.writerow(["trial", "state", "best", "logged", "seconds", *names, "reason"])
    for trial in trials:
        values = [trial.parameters.get(name) for name in names]
        best = "" if trial.best is None else trial.best
        writer.writerow(
            [trial.name, trial.state, best, len(trial.history), f"{trial.seconds:.1f}", *values, trial.reason]
        )
    return stream.getvalue()


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def read_sweep(out: Path) -> tuple[SweepFile, list[Trial]]:
    """The sweep that a folder holds.

    Raises:
        UserError: It cannot be read.
    """
    try:
        content: dict[str, Any] = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
        metric = content["sweep"].get("metric") or {}
        file = SweepFile(
            path=Path(content["file"]),
            content=content["sweep"],
            metric=metric.get("name", ""),
            goal=metric.get("goal", "minimize"),
        )
        return file, [Trial(**entry) for entry in content["trials"]]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{out / 'sweep.json'}: cannot be read ({error})") from error
