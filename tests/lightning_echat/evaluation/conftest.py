"""Answers made by hand, for the tests of the evaluation."""

from collections.abc import Callable

import pytest
import torch

from lightning_echat.contracts import DialogueReference, GeneratedReply
from lightning_echat.evaluation.records import AnswerRecord, record_of
from lightning_echat.tokens.thinking import write_label_thinking

LABELS = {"age": "old", "gender": "female", "emotion": "sad", "event": "cough"}


@pytest.fixture
def make_record() -> Callable[..., AnswerRecord]:
    """An answer to a query with `labels`, whose thinking names `heard` (by default the truth)."""

    def make(
        key: str = "d1",
        *,
        labels: dict[str, str] | None = None,
        heard: dict[str, str] | None = None,
        text: str | None = None,
        transcript: str = "Where is my blue key?",
        words: str | None = None,
        reply: str = "madam, let us look for my blue key.",
        set_name: str = "held-out voices",
        finished: bool = True,
        codes: int = 0,
        task: str = "speech_to_speech.label_thinking",
    ) -> AnswerRecord:
        labels = LABELS if labels is None else labels
        if text is None:
            text = write_label_thinking(words or transcript, labels if heard is None else heard, "comforting") + reply
        generated = GeneratedReply(
            reference=DialogueReference(
                key=key,
                task=task,
                transcript=transcript,
                labels=labels,
                asked_labels=tuple(labels),
                reply_emotion="comforting",
            ),
            text_ids=[1, 2],
            text=text,
            speech_codes=torch.zeros(codes, dtype=torch.long),
            finished=finished,
            timings={"total": 0.5},
        )
        return record_of(generated, set_name=set_name)

    return make
