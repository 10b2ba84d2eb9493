"""What was heard: word and character errors, labels, and how sure the model was of them, by set and by source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_echat.evaluation.calibration import calibration
from lightning_echat.evaluation.records import AnswerRecord
from lightning_echat.evaluation.text_units import characters_of, count_errors, words_of
from lightning_echat.metrics import UNPARSED, LabelAccuracy
from lightning_echat.tokens.paralinguistics import LABEL_SETS


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


def _summarize_understanding_set(records: Sequence[AnswerRecord], *, set_name: str) -> dict[str, Any]:
    """The figures of a set, and the same for each source where there are several."""
    sources = list(dict.fromkeys(record.item.source for record in records))
    figures = {"set": set_name, **_figures(records)}
    if len(sources) > 1 or any(sources):
        figures["by_source"] = {
            source or "not named": _figures([record for record in records if record.item.source == source])
            for source in sources
        }
    return figures


def _figures(records: Sequence[AnswerRecord]) -> dict[str, Any]:
    scores = {name: label_scores(records, name) for name in asked_sets(records)}
    by_label_set = {
        figure: {name: found[figure] for name, found in scores.items()}
        for figure in ("accuracy", "macro_f1", "majority_baseline", "confusion")
    }
    found = {
        "items": len(records),
        "unfinished": sum(not record.finished for record in records),
        "wer": word_error_rate(records),
        "cer": character_error_rates(records),
        **by_label_set,
    }
    sure = {name: label_calibration(records, name) for name in scores}
    if any(entry["items"] for entry in sure.values()):
        found["calibration"] = sure
    return found


def word_error_rate(records: Sequence[AnswerRecord]) -> float:
    """Corpus WER of the English answers that had to repeat the words; without a transcript nothing was heard."""
    pairs = _transcripts(records, language="en")
    return count_errors([words_of(heard) for heard, _ in pairs], [words_of(said) for _, said in pairs]).rate


def character_error_rates(records: Sequence[AnswerRecord]) -> dict[str, float]:
    """Language -> corpus CER, for the languages that occur."""
    rates = {}
    for language in dict.fromkeys(record.item.language for record in records):
        if pairs := _transcripts(records, language=language):
            heard = [characters_of(text, language=language) for text, _ in pairs]
            rates[language] = count_errors(heard, [characters_of(text, language=language) for _, text in pairs]).rate
    return rates


def _transcripts(records: Sequence[AnswerRecord], *, language: str) -> list[tuple[str, str]]:
    """(heard, said) of the answers in a language that had to repeat the words."""
    return [
        (record.answer.transcript or "", record.item.transcript)
        for record in records
        if record.answer.transcribes and record.item.transcript and record.item.language == language
    ]


def label_calibration(records: Sequence[AnswerRecord], label_set: str) -> dict[str, Any]:
    """How sure the model was of a label set, over the answers that name one; `unscored` are those that do not."""
    asked = _asked(records, label_set)
    scored = [record for record in asked if label_set in record.label_probabilities]
    found = calibration(
        [record.label_probabilities[label_set] for record in scored],
        [record.item.labels[label_set] for record in scored],
    )
    return {**found, "unscored": len(asked) - len(scored)}


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


def _asked(records: Sequence[AnswerRecord], label_set: str) -> list[AnswerRecord]:
    """The answers that had to name a label of this set, and whose truth is known."""
    return [record for record in records if label_set in record.answer.asked_labels and label_set in record.item.labels]


def asked_sets(records: Sequence[AnswerRecord]) -> list[str]:
    """The label sets that some answer had to name."""
    return [name for name in LABEL_SETS if _asked(records, name)]
