"""`echat evaluate score`: a judge reads the stored answers of a run, and report.json is brought up to date.

Nothing here needs the model that answered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_echat.contracts import UserError
from lightning_echat.data.files import write_json
from lightning_echat.evaluation.adapters.metrics import benchmark_figures
from lightning_echat.evaluation.answering import DIALOGUES, UNDERSTANDING
from lightning_echat.evaluation.items import CATEGORIES
from lightning_echat.evaluation.judging import Judge, make_judge
from lightning_echat.evaluation.records import read_records, rescore_records
from lightning_echat.evaluation.scores import file_name, judges_of
from lightning_echat.evaluation.summary import summarize, summarize_empathy, systems_of, write_report_json

ANSWERS = "evaluation"
"""Folder of the answers in a run folder."""

_RUN_FILE = "run.json"


def score(run: Path, *, judge: str = "rubric", judge_args: dict[str, Any] | None = None, seed: int = 0) -> None:
    """Score stored answers, again or by another judge, and bring RUN/report.json up to date.

    Args:
        run: The folder that echat evaluate wrote.
        judge: Who scores replies: rubric, llm, or the path of a class.
        judge_args: Arguments of the judge, for instance '{base_url: "http://localhost:8000/v1", model: NAME}'.
        seed: Of the bootstrap intervals.
    """
    chosen = make_judge(judge, judge_args)
    if not (run / ANSWERS / _RUN_FILE).is_file():
        raise UserError(f"{run} holds no {ANSWERS}/{_RUN_FILE}; give a folder that echat evaluate has finished")
    path = run / "report.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    sections = score_run(run, judge=chosen, seed=seed)
    write_report_json(path, {**report, **sections, "seed": seed})


def write_run_facts(run: Path, facts: Mapping[str, Any]) -> None:
    """Keep what decided the answers of a run beside them."""
    write_json(run / ANSWERS / _RUN_FILE, content=dict(facts))


def read_run_facts(run: Path) -> dict[str, Any]:
    """What `write_run_facts` kept, empty where there is nothing yet."""
    path = run / ANSWERS / _RUN_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error}); delete it and evaluate again") from error


def score_run(run: Path, *, judge: Judge, seed: int) -> dict[str, Any]:
    """Score the replies and controls of a run, and make the sections of its report."""
    folder, facts = run / ANSWERS, read_run_facts(run)
    answered = [DIALOGUES, *facts["controls"]]
    for name in answered:
        rescore_records(folder / f"{name}.jsonl", judge=judge)
    understanding = [
        record
        for entry in facts["sets"]
        for record in read_records(folder / f"{UNDERSTANDING}{file_name(entry['name'])}.jsonl")
    ]
    sections = summarize(
        understanding=understanding,
        dialogues=read_records(folder / f"{DIALOGUES}.jsonl", judge=judge.name),
        controls={name: read_records(folder / f"{name}.jsonl", judge=judge.name) for name in facts["controls"]},
        seed=seed,
    )
    sections["empathy"]["controls_left_out"] = facts["controls_left_out"]
    if others := _other_judges(folder, facts["controls"], but=judge.name, seed=seed):
        sections["other_judges"] = others
    if figures := benchmark_figures(read_records(folder / f"{DIALOGUES}.jsonl")):
        sections["benchmarks"] = figures
    sections["items_skipped"] = facts["items_skipped"]
    _print_table(sections["empathy"])
    return sections


def _other_judges(folder: Path, controls: Sequence[str], *, but: str, seed: int) -> dict[str, Any]:
    """The empathy section of each judge that scored the same answers before."""
    sections: dict[str, Any] = {}
    for judge in judges_of(folder / f"{DIALOGUES}.jsonl"):
        records = {name: read_records(folder / f"{name}.jsonl", judge=judge) for name in (DIALOGUES, *controls)}
        # Answers that were made anew since have no scores of this judge.
        scored = {name: found for name, found in records.items() if all(record.judge == judge for record in found)}
        if judge != but and DIALOGUES in scored:
            dialogues = scored.pop(DIALOGUES)
            sections[judge] = summarize_empathy(dialogues, controls=scored, seed=seed)
    return sections


def _print_table(empathy: Mapping[str, Any]) -> None:
    """The scores as people read them."""
    table = Table(title=f"{empathy['judge']}, {empathy['items']} items, 95 % intervals", title_justify="left")
    table.add_column("", no_wrap=True)
    for category in CATEGORIES:
        table.add_column(category)
    systems = systems_of(empathy)
    for name, found in systems.items():
        table.add_row(name.replace("_", " "), *(_interval(found[category]) for category in CATEGORIES))
    console = Console()
    console.print(table)
    for name, why in empathy["controls_left_out"].items():
        console.print(f"control {name} left out: {why}", highlight=False, soft_wrap=True)
    for name, found in systems.items():
        if found["unparsed"]:
            line = f"{name}: {found['unparsed']} of {found['items']} answers of the judge could not be read"
            console.print(line, highlight=False, soft_wrap=True)


def _interval(triple: Sequence[float]) -> str:
    mean, low, high = triple
    if mean != mean:
        return "no data"
    return f"{mean:.1f}" if low != low else f"{mean:.1f}\n{low:.1f} to {high:.1f}"
