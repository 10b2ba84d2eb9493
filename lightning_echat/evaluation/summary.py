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
from lightning_echat.metrics import UNPARSED, EnglishWordErrorRate, LabelAccuracy
from lightning_echat.nn.token2wav.kmeans import CODE_RATE
from lightning_echat.tokens.paralinguistics import LABEL_SETS


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


def summarize_understanding(records: Sequence[AnswerRecord]) -> dict[str, Any]:
    """WER, label accuracies beside their majority baselines, and confusion matrices, for each set of items."""
    sets = list(dict.fromkeys(record.item.set_name for record in records))
    summaries = [
        _summarize_understanding_set([record for record in records if record.item.set_name == name], set_name=name)
        for name in sets
    ]
    if not summaries:
        return _summarize_understanding_set([], set_name="")
    others = {name: summary for name, summary in zip(sets[1:], summaries[1:], strict=True)}
    return {**summaries[0], "other_sets": others} if others else summaries[0]


def summarize_thinking(records: Sequence[AnswerRecord]) -> dict[str, Any]:
    """Of the answers that had to think: how often the thinking can be read in full, and how often it is right."""
    thinking = [record for record in records if record.answer.thinks]
    accuracy = {name: label_scores(thinking, name)["accuracy"] for name in _asked_sets(thinking)}
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
    """Scores by category with intervals, the same for each control, and the paired difference from it."""
    judge = _only_judge([*records, *(record for answers in controls.values() for record in answers)])
    summary = {"judge": judge, "items": len(records), **_category_scores(records, seed=seed)}
    summary["controls"] = {
        name: {
            "items": len(answers),
            **_category_scores(answers, seed=seed),
            "difference": _paired_differences(records, answers, seed=seed),
        }
        for name, answers in controls.items()
    }
    return summary


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


def word_error_rate(records: Sequence[AnswerRecord]) -> float:
    """Corpus WER of the answers that had to repeat the words; one without a transcript has heard nothing."""
    metric = EnglishWordErrorRate()
    pairs = [
        (record.answer.transcript or "", record.item.transcript)
        for record in records
        if record.answer.transcribes and record.item.transcript
    ]
    metric.update([heard for heard, _ in pairs], [said for _, said in pairs])
    return float(metric.compute())


def label_scores(records: Sequence[AnswerRecord], label_set: str) -> dict[str, Any]:
    """`accuracy`, `macro_f1`, `majority_baseline` and `confusion` of a label set, over the answers that had to name it.

    The confusion matrix is {"labels", "predicted", "counts"}: rows the truth, columns what was answered, without labels
    that never occur; its last column counts the answers that name no label of the set.
    """
    metric = LabelAccuracy(label_set)
    asked = _asked(records, label_set)
    metric.update(
        [record.answer.labels.get(label_set) for record in asked], [record.item.labels[label_set] for record in asked]
    )
    scores = metric.compute()
    return {
        **{name: float(scores[name]) for name in ("accuracy", "macro_f1", "majority_baseline")},
        "confusion": _trimmed(scores["confusion"].numpy(), LABEL_SETS[label_set]),
    }


def _trimmed(counts: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """A confusion matrix with its names, without rows of no items and without columns of labels that nobody met."""
    rows = [place for place in range(len(labels)) if counts[place].any()]
    columns = [place for place in range(len(labels)) if counts[place].any() or counts[:, place].any()]
    return {
        "labels": [labels[place] for place in rows],
        "predicted": [*(labels[place] for place in columns), UNPARSED],
        "counts": counts[np.ix_(rows, [*columns, len(labels)])].tolist(),
    }


def write_report_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write `report.json`: what has no data is null, and the file is never seen half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    text = json.dumps(nan_as_none(dict(report)), indent=2, ensure_ascii=False, allow_nan=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def _summarize_understanding_set(records: Sequence[AnswerRecord], *, set_name: str) -> dict[str, Any]:
    scores = {name: label_scores(records, name) for name in _asked_sets(records)}
    by_label_set = {
        figure: {name: found[figure] for name, found in scores.items()}
        for figure in ("accuracy", "macro_f1", "majority_baseline", "confusion")
    }
    return {
        "set": set_name,
        "items": len(records),
        "unfinished": sum(not record.finished for record in records),
        "wer": word_error_rate(records),
        **by_label_set,
    }


def _asked(records: Sequence[AnswerRecord], label_set: str) -> list[AnswerRecord]:
    """The answers that had to name a label of this set, and whose truth is known."""
    return [record for record in records if label_set in record.answer.asked_labels and label_set in record.item.labels]


def _asked_sets(records: Sequence[AnswerRecord]) -> list[str]:
    return [name for name in LABEL_SETS if _asked(records, name)]


def _only_judge(records: Sequence[AnswerRecord]) -> str | None:
    """The judge of all answers, None where there are none. Scores of two judges never meet in one table."""
    judges = {record.judge for record in records}
    if len(judges) > 1 or any(record.score is None for record in records):
        raise ValueError(f"every answer must be scored, by one judge; found: {sorted(judges)} (see score_records)")
    return judges.pop() if judges else None


def _category_scores(records: Sequence[AnswerRecord], *, seed: int) -> dict[str, Any]:
    """[score, low, high] by category, the number of items behind each, and the share of replies on topic."""
    scores = {name: _scores_in(records, name) for name in CATEGORIES}
    return {
        **{name: list(bootstrap_interval(list(found.values()), seed=seed)) for name, found in scores.items()},
        "items_in_category": {name: len(found) for name, found in scores.items()},
        "on_topic": _mean([record.score.on_topic for record in records if record.score is not None]),
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
