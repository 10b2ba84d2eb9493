"""From stored answers to the figures of `report.json`.

No answer is dropped: one that was cut short or cannot be parsed counts as wrong for everything that it should have
said. Only what has no reference is left out, and what has no data is NaN, in JSON null.
The metrics are those that callbacks log while a model trains.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_echat.evaluation.bootstrap import bootstrap_interval
from lightning_echat.evaluation.items import CATEGORIES
from lightning_echat.evaluation.records import AnswerRecord, nan_as_none
from lightning_echat.evaluation.understanding import asked_sets, label_scores, summarize_understanding, word_error_rate
from lightning_echat.nn.token2wav.kmeans import CODE_RATE


def summarize(
    *,
    understanding: Sequence[AnswerRecord],
    dialogues: Sequence[AnswerRecord],
    controls: Mapping[str, Sequence[AnswerRecord]],
    seed: int,
) -> dict[str, Any]:
    """The `understanding`, `thinking`, `empathy` and `speech` sections of `report.json`.

    Args:
        understanding: Answers to understanding tasks. Of several sets, the first is the section's own and the others
            stand under `other_sets`.
        dialogues: Answers to dialogue tasks, scored.
        controls: Name of a control ("text_only": the model reads the words and hears nothing) -> its answers to the
            same dialogue items, scored by the same judge.
        seed: Of the bootstrap.
    """
    return {
        "understanding": summarize_understanding(understanding),
        "thinking": summarize_thinking(dialogues),
        "empathy": summarize_empathy(dialogues, controls=controls, seed=seed),
        "speech": summarize_speech(dialogues),
    }


def summarize_thinking(records: Sequence[AnswerRecord]) -> dict[str, Any]:
    """Of the answers that had to think: how often the thinking can be read in full, and how often it is right."""
    thinking = [record for record in records if record.answer.thinks]
    accuracy = {name: label_scores(thinking, name)["accuracy"] for name in asked_sets(thinking)}
    choices = [
        record.answer.reply_emotion == record.item.reply_emotion for record in thinking if record.item.reply_emotion
    ]
    if choices:
        accuracy["reply_emotion"] = _mean(choices)
    return {
        "items": len(thinking),
        "parse_rate": _mean([record.answer.well_formed for record in thinking]),
        "accuracy": accuracy,
        "wer": word_error_rate(thinking),
    }


def summarize_empathy(
    records: Sequence[AnswerRecord],
    *,
    controls: Mapping[str, Sequence[AnswerRecord]],
    seed: int,
) -> dict[str, Any]:
    """Scores by category with intervals, by source too; the same of each control, and the paired difference from it."""
    judge = _only_judge([*records, *(record for answers in controls.values() for record in answers)])
    summary = {"judge": judge, "items": len(records), **_category_scores(records, seed=seed)}
    sources = list(dict.fromkeys(record.item.source for record in records))
    if len(sources) > 1:
        parts = {source: [record for record in records if record.item.source == source] for source in sources}
        summary["by_source"] = {
            source or "not named": {"items": len(part), **_category_scores(part, seed=seed)}
            for source, part in parts.items()
        }
    summary["controls"] = {
        name: {
            "items": len(answers),
            **_category_scores(answers, seed=seed),
            "difference": _paired_differences(records, answers, seed=seed),
        }
        for name, answers in controls.items()
    }
    return summary


def systems_of(empathy: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Name -> scores of everything that stands in the table: the model, the model by source, its controls."""
    by_source = {f"model, {source}": found for source, found in (empathy.get("by_source") or {}).items()}
    return {"model": empathy, **by_source, **(empathy.get("controls") or {})}


def summarize_speech(records: Sequence[AnswerRecord]) -> dict[str, Any]:
    """How much was spoken, and how many answers were cut short or stayed silent.

    `truncation_rate` is the share of answers that a length limit cut short, `repetition_rate` and `seconds_per_reply`
    are means over the answers that have speech.
    """
    spoken = [record for record in records if record.codes > 0]
    return {
        "items": len(records),
        "replies": len(spoken),
        "without_speech": len(records) - len(spoken),
        "unfinished": sum(not record.finished for record in records),
        "truncation_rate": _mean([not record.finished for record in records]),
        "repetition_rate": _mean([record.repetition for record in spoken]),
        "seconds_per_reply": _mean([record.codes / CODE_RATE for record in spoken]),
        "speech_codes": sum(record.codes for record in spoken),
        "waveforms": sum(record.reply_seconds is not None for record in records),
        "seconds_of_audio": sum(record.reply_seconds or 0.0 for record in records),
    }


def write_report_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write `report.json`: what has no data is null, and the file is never seen half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    text = json.dumps(nan_as_none(dict(report)), indent=2, ensure_ascii=False, allow_nan=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def _only_judge(records: Sequence[AnswerRecord]) -> str | None:
    """The judge of all answers, None where there are none. Scores of two judges never meet in one table."""
    judges = {record.judge for record in records}
    if len(judges) > 1 or "" in judges:
        raise ValueError(f"every answer must be scored, by one judge; found: {sorted(judges)} (see score_records)")
    return judges.pop() if judges else None


def _category_scores(records: Sequence[AnswerRecord], *, seed: int) -> dict[str, Any]:
    """[score, low, high] by category and dimension, the items behind each, what has no score, the share on topic."""
    scores = {name: _scores_in(records, name) for name in CATEGORIES}
    scored = [record.score for record in records if record.score is not None]
    dimensions = dict.fromkeys(name for score in scored for name in score.per_dimension)
    return {
        **{name: list(bootstrap_interval(list(found.values()), seed=seed)) for name, found in scores.items()},
        "items_in_category": {name: len(found) for name, found in scores.items()},
        "dimensions": {
            name: list(
                bootstrap_interval(
                    [score.per_dimension[name] for score in scored if name in score.per_dimension], seed=seed
                )
            )
            for name in dimensions
        },
        "unparsed": len(records) - len(scored),
        "on_topic": _mean([score.on_topic for score in scored if score.on_topic is not None]),
    }


def _scores_in(records: Sequence[AnswerRecord], category: str) -> dict[tuple[str, str], float]:
    """(set, key) -> score of the records that count in a category."""
    return {
        (record.item.set_name, record.item.key): record.score.by_category[category]
        for record in records
        if record.score is not None and category in record.score.by_category
    }


def _paired_differences(
    records: Sequence[AnswerRecord], control: Sequence[AnswerRecord], *, seed: int
) -> dict[str, list[float]]:
    """[mean difference, low, high] by category, over the items that both answered.

    Paired, because how hard an item is then cancels out: the interval is narrower than the two of its parts.
    """
    differences = {}
    for category in CATEGORIES:
        ours, theirs = _scores_in(records, category), _scores_in(control, category)
        paired = [ours[key] - theirs[key] for key in ours if key in theirs]
        differences[category] = list(bootstrap_interval(paired, seed=seed))
    return differences


def _mean(values: Sequence[float | bool]) -> float:
    return float(np.mean(values)) if values else math.nan
