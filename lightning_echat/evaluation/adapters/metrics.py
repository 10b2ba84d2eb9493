"""The rule-based figures of other benchmarks, over the stored replies to their items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_echat.evaluation.adapters import voicebench
from lightning_echat.evaluation.records import AnswerRecord


def benchmark_figures(records: Sequence[AnswerRecord]) -> dict[str, Any]:
    """Benchmark (as `extra.benchmark` of its items names it) -> its figures, for those that rules alone can score."""
    figures: dict[str, Any] = {}
    names = dict.fromkeys(record.item.extra.get("benchmark", "") for record in records)
    for name in names:
        kind = voicebench.KINDS.get(name.removeprefix(f"{voicebench.NAME}/"), "")
        asked = [record for record in records if record.item.extra.get("benchmark") == name]
        replies = [record.answer.reply for record in asked]
        if kind == "choice":
            references = [record.item.extra.get("reference", "") for record in asked]
            figures[name] = voicebench.choice_accuracy(replies, references)
        elif kind == "refusal":
            figures[name] = voicebench.refusal_rate(replies)
    return figures
