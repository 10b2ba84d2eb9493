"""Evaluation items: what was asked, what can be heard in it, and the categories it is scored in.

The categories are those of EChat-eval. An item set may name the category of each item. Where it does not, a query
counts in each category whose cue it carries, and in `multi` when it carries an emotion and a sound event at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_echat.contracts import DialogueReference

CUES: tuple[str, ...] = ("emotion", "age", "gender", "event")
"""The label sets that a reply can honour, each a category of its own."""

CATEGORIES: tuple[str, ...] = (*CUES, "multi")

NO_CUE: dict[str, frozenset[str]] = {
    "emotion": frozenset({"neutral", "other"}),
    "event": frozenset({"none", "other"}),
}
"""Labels that ask nothing of a reply: nothing was heard, or nothing that a reply could be held to."""


@dataclass(slots=True, kw_only=True)
class EvaluationItem:
    """One query of an evaluation set.

    Attributes:
        key: Names the item within its set.
        set_name: The evaluation set.
        task: The template that was asked.
        categories: Where its reply is scored, in the order of `CATEGORIES`.
        transcript: The words of the query.
        labels: Label set -> label of the query; only what is known.
        reply, reply_emotion: The reference reply, empty where there is none.
        speaker, voice_type: Whose voice asks, where known.
        source: Where the voice comes from, for instance "held-out voices"; figures are also given by source.
        language: en or zh, which decides how words are counted.
        extra: Anything else that a benchmark says about its item, as text.
    """

    key: str
    set_name: str
    task: str
    transcript: str
    categories: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    reply: str = ""
    reply_emotion: str = ""
    speaker: str = ""
    voice_type: str = ""
    source: str = ""
    language: str = "en"
    extra: dict[str, str] = field(default_factory=dict)


def present_cues(labels: Mapping[str, str]) -> tuple[str, ...]:
    """The label sets of `labels` that ask something of a reply: age, gender, an emotion, a sound event."""
    return tuple(cue for cue in CUES if cue in labels and labels[cue] not in NO_CUE.get(cue, frozenset()))


def categories_of(labels: Mapping[str, str]) -> list[str]:
    """The categories that a query with these labels is scored in."""
    cues = present_cues(labels)
    multi = "emotion" in cues and "event" in cues
    return [*cues, "multi"] if multi else list(cues)


def item_of(reference: DialogueReference, *, set_name: str) -> EvaluationItem:
    """The item that a dialogue of an evaluation set poses."""
    return EvaluationItem(
        key=reference.key,
        set_name=set_name,
        task=reference.task,
        transcript=reference.transcript,
        categories=categories_of(reference.labels),
        labels=dict(reference.labels),
        reply=reference.reply,
        reply_emotion=reference.reply_emotion,
        speaker=reference.speaker,
        voice_type=reference.voice_type,
    )
