"""Stored answers: everything a model answered, on disk, so that scoring is a step that can be run again.

The answers to one set of items are a JSON-lines file, a header and then one answer a line, with the audio beside it in
`audio/`. While answers come in, the file is called NAME.jsonl.partial; it gets its final name when all are there.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import soundfile
from torch import Tensor

from lightning_echat.contracts import SAMPLE_RATE, GeneratedReply, UserError
from lightning_echat.evaluation.items import EvaluationItem, item_of
from lightning_echat.evaluation.judging import Judge, JudgedReply, JudgeScore
from lightning_echat.evaluation.scores import ScoreFile, read_scores, score_keys, write_scores
from lightning_echat.metrics import ParsedAnswer, parse_answer
from lightning_echat.tokens.speech_codes import repetition_rate
from lightning_echat.tokens.thinking import ThinkingFormat, parse_thinking

SCHEMA = 2

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class AnswerRecord:
    """One answer of a model to one item, with everything that scoring and a report need.

    Attributes:
        item: What was asked.
        text: What the model wrote, thinking included, as it wrote it.
        answer: The same, parsed.
        thinking: The thinking as it stands, without markers; empty where there is none.
        codes: Speech codes of the reply.
        repetition: Share of its runs of four codes that repeat an earlier one (`speech_codes.repetition_rate`).
        finished: False when a length limit cut the answer short.
        timings: Seconds by name, of the whole batch that the answer was part of.
        query_audio, reply_audio: Wav files relative to the records' folder, None where none was stored.
        query_seconds, reply_seconds: Their durations, None where none was stored.
        heard_key: Key of the item whose voice was heard, where a control played another one's.
        checkpoint: SHA-256 of the weights that answered.
        seed: Of the sampling.
        label_probabilities: Label set -> label -> probability, what the model gave each label where it named one.
        judge, score: Who scored the reply and how. They stand in a file of their own (`scores`), never in this one;
            a judge without a score could not be read.
    """

    item: EvaluationItem
    text: str
    answer: ParsedAnswer
    thinking: str = ""
    codes: int = 0
    repetition: float = 0.0
    finished: bool = True
    timings: dict[str, float] = field(default_factory=dict)
    query_audio: str | None = None
    reply_audio: str | None = None
    query_seconds: float | None = None
    reply_seconds: float | None = None
    heard_key: str = ""
    checkpoint: str = ""
    seed: int = 0
    label_probabilities: dict[str, dict[str, float]] = field(default_factory=dict)
    judge: str = ""
    score: JudgeScore | None = None


def record_of(
    generated: GeneratedReply, *, set_name: str, fmt: ThinkingFormat | None = None, item: EvaluationItem | None = None
) -> AnswerRecord:
    """The record of an answer.

    Args:
        generated: What the model wrote.
        set_name: The evaluation set that the question belongs to.
        fmt: The wording of thinking, that of the prompt set that the model was trained with.
        item: What was asked, as its set describes it; without it what the dialogue itself tells.
    """
    answer = parse_answer(generated, fmt=fmt)
    posed = item_of(generated.reference, set_name=set_name)
    if item is not None:
        posed = dataclasses.replace(item, task=generated.reference.task)
    return AnswerRecord(
        item=posed,
        text=generated.text,
        answer=answer,
        thinking=parse_thinking(generated.text, fmt).written if answer.thinks else "",
        codes=int(generated.speech_codes.numel()),
        repetition=repetition_rate(generated.speech_codes),
        finished=generated.finished,
        timings=dict(generated.timings),
    )


def score_records(records: Sequence[AnswerRecord], *, judge: Judge, folder: Path = Path()) -> list[AnswerRecord]:
    """The same answers, scored by `judge`; earlier scores are replaced.

    Args:
        records: Answers.
        judge: Who scores.
        folder: Where the answers are stored; the judge may keep a record of its own there.
    """
    replies = [
        JudgedReply(
            key=f"{record.item.set_name}/{record.item.key}",
            transcript=record.item.transcript,
            labels=record.item.labels,
            categories=record.item.categories,
            reply=record.answer.reply,
            reply_audio=folder / record.reply_audio if record.reply_audio else None,
        )
        for record in records
    ]
    scores = judge.score_all(replies, folder=folder)
    return [
        dataclasses.replace(record, judge=judge.name, score=score)
        for record, score in zip(records, scores, strict=True)
    ]


class RecordWriter:
    """Writes answers as they come and survives being killed: opened again, it goes on where it stopped.

    Use as a context manager. Leaving it without an error gives the file its final name; leaving with one keeps what is
    there for the next run, which asks `done` which keys it may skip.
    """

    def __init__(self, folder: Path, *, name: str, made_by: str) -> None:
        """Open the answers `name` in `folder`.

        Args:
            folder: Where the file and its `audio` folder go.
            name: The file's name without extension; the audio files begin with it too.
            made_by: What decides the answers: checkpoint, set, seed, decoding. Answers made by anything else are
                not continued but begun anew.
        """
        self.final = folder / f"{name}.jsonl"
        self.name = name
        self.made_by = made_by
        self.done: set[str] = set()
        self._partial = folder / f"{name}.jsonl.partial"
        self._stream: TextIO | None = None

    def __enter__(self) -> RecordWriter:
        (self.final.parent / "audio").mkdir(parents=True, exist_ok=True)
        kept = self._kept_lines()
        _write_lines(self._partial, [self._header(), *kept])
        self.done = {json.loads(line)["item"]["key"] for line in kept}
        self._stream = self._partial.open("a", encoding="utf-8")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._stream is None:
            return
        self._stream.close()
        self._stream = None
        if kind is None:
            self._partial.replace(self.final)

    def write(self, record: AnswerRecord, *, query: Tensor | None = None, reply: Tensor | None = None) -> AnswerRecord:
        """Append an answer and store its waveforms ([samples] at `SAMPLE_RATE`); returns the record as stored."""
        if self._stream is None:
            raise RuntimeError("a RecordWriter writes inside its `with` block only")
        if record.item.key in self.done:
            raise ValueError(f"{self.final}: the answer to {record.item.key!r} is there already")
        stored = dataclasses.replace(record)
        if query is not None:
            stored.query_audio, stored.query_seconds = self._write_audio(query, role="query")
        if reply is not None:
            stored.reply_audio, stored.reply_seconds = self._write_audio(reply, role="reply")
        self._stream.write(_as_line(stored) + "\n")
        self._stream.flush()
        self.done.add(record.item.key)
        return stored

    def _header(self) -> str:
        return json.dumps({"schema": SCHEMA, "made_by": self.made_by})

    def _kept_lines(self) -> list[str]:
        """Whole answers of an earlier run of the same making; a line that a kill tore is dropped and redone."""
        earlier = self._partial if self._partial.exists() else self.final
        if not earlier.exists():
            return []
        # A kill leaves a line without its newline, so that what follows the last newline is torn or empty.
        header, *lines = earlier.read_text(encoding="utf-8").split("\n")[:-1] or [""]
        if header == self._header():
            return lines
        log.warning("%s holds answers made by something else; they are replaced", earlier)
        self.final.unlink(missing_ok=True)
        for audio in (self.final.parent / "audio").glob(f"{self.name}-[0-9][0-9][0-9][0-9][0-9]-*.wav"):
            audio.unlink()
        return []

    def _write_audio(self, waveform: Tensor, *, role: str) -> tuple[str, float]:
        """Write a wav under the number of its record: keys may hold what file names may not."""
        relative = Path("audio") / f"{self.name}-{len(self.done):05d}-{role}.wav"
        path = self.final.parent / relative
        partial = path.with_suffix(".wav.partial")
        soundfile.write(partial, waveform.detach().cpu().numpy(), SAMPLE_RATE, format="WAV", subtype="PCM_16")
        partial.replace(path)
        return relative.as_posix(), waveform.shape[-1] / SAMPLE_RATE


def rescore_records(path: Path, *, judge: Judge) -> list[AnswerRecord]:
    """Score a file of answers, again or for the first time, and keep the scores beside it (see `scores`)."""
    records = score_records(read_records(path), judge=judge, folder=path.parent)
    scores = dict(zip(score_keys(records), (record.score for record in records), strict=True))
    write_scores(path, ScoreFile(judge=judge.name, made_by=read_made_by(path), scores=scores))
    return records


def read_records(path: Path, *, judge: str | None = None) -> list[AnswerRecord]:
    """Read answers back, with the scores of `judge`, or of the one that scored last.

    Scores of answers that have been replaced since are left out.

    Raises:
        UserError: The file is not there, is not a file of answers, or is of another schema.
    """
    lines = _read_lines(path)
    records = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            records.append(_record_from(json.loads(line)))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: not an answer record ({error})") from error
    scored = read_scores(path, judge=judge)
    if scored is None or scored.made_by != read_made_by(path):
        return records
    keyed = zip(score_keys(records), records, strict=True)
    return [
        dataclasses.replace(record, judge=scored.judge, score=scored.scores[key]) if key in scored.scores else record
        for key, record in keyed
    ]


def read_made_by(path: Path) -> str:
    """What made the answers of a file, as `RecordWriter` was told."""
    return str(json.loads(_read_lines(path)[0])["made_by"])


def is_finished(path: Path, *, made_by: str) -> bool:
    """Whether a file holds all answers that `made_by` stands for."""
    if not path.is_file():
        return False
    try:
        return read_made_by(path) == made_by
    except UserError:
        return False  # Of another schema or damaged: it is made anew.


def _read_lines(path: Path) -> list[str]:
    """The lines of a records file, its header checked."""
    try:
        # Not splitlines: it also breaks at characters that a text inside the JSON may hold.
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        header = json.loads(lines[0])
        schema = header["schema"]
    except (IndexError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a file of answer records, its first line is no header") from error
    if schema != SCHEMA:
        raise UserError(f"{path}: records of schema {schema}; this version reads schema {SCHEMA}")
    return lines


def _as_line(record: AnswerRecord) -> str:
    """A record as one line of JSON, which knows no NaN."""
    row = dataclasses.asdict(record)
    del row["judge"], row["score"]
    return json.dumps(nan_as_none(row), ensure_ascii=False, allow_nan=False)


def nan_as_none(value: Any) -> Any:
    """The same nested value with every NaN replaced by None, as JSON has no word for it."""
    if isinstance(value, dict):
        return {key: nan_as_none(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [nan_as_none(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _record_from(row: dict[str, Any]) -> AnswerRecord:
    item = EvaluationItem(**row.pop("item"))
    answer = row.pop("answer")
    answer = ParsedAnswer(**{**answer, "asked_labels": tuple(answer["asked_labels"])})
    return AnswerRecord(item=item, answer=answer, **row)


def _write_lines(path: Path, lines: list[str]) -> None:
    """Write a text file under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.writelines(f"{line}\n" for line in lines)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
