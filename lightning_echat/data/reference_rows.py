"""One row of the public implementation's data -> a dialogue in the form of docs/data_format.md.

A row is a text, a recording, a task tag and `extra`; what the text means follows from the tag. Nothing is made up: a
row that lacks what its task needs is rejected with the reason, and audio that is missing stays missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_echat.contracts import SampleRejected
from lightning_echat.data.reference_tags import ANSWER_MARK, REPLY_EMOTION, LabelReader, ReferenceTask
from lightning_echat.data.tar_samples import SCHEMA

AudioReader = Callable[[], bytes]
"""Reads a recording only when the task needs it; `SampleRejected` where it cannot."""

MAIN_AUDIO = "wav"
_BOUNDED_CODES = 4097
"""The codebook and its boundary: what rows mean that do not give `speech_token_num`."""
_HEARD = {"age": "age", "gender": "gender", "caption": "event", "q_emotion": "emotion"}
"""Fields of `extra` -> label sets of the query."""
_LASTING = ("age", "gender")
"""Label sets that hold for every turn of a speaker."""
_LEADING_TAG = re.compile(r"\s*<([^<>]{1,40})>")
_CLOSING_TAGS = re.compile(r"(?:\s*<[^<>]+>)+\s*$")
_TIMES = re.compile(r"\s*<\s*[\d.]+\s*,\s*[\d.]+\s*>\s*")
_TURN_FIELD = re.compile(r"(?:wav|txt)_(\d{1,4})")
_THINK_END = "<think end>"


@dataclass(slots=True, kw_only=True)
class ReferenceFields:
    """What one row holds, whichever format it stood in.

    Attributes:
        values: `txt`, `txt_1`, …, `speaker`, `speech_token` as they stand.
        extra: The row's `extra`.
        audio: "wav", "wav_1", … -> how to read it.
    """

    values: Mapping[str, Any]
    extra: Mapping[str, Any]
    audio: Mapping[str, AudioReader]


def read_extra(value: object) -> dict[str, Any]:
    """`extra` as an object; it may stand as JSON text. `SampleRejected` where it is neither."""
    if isinstance(value, (str, bytes)):
        try:
            value = json.loads(value) if value.strip() else {}
        except (ValueError, RecursionError) as error:
            raise SampleRejected("broken JSON", f"extra: {error}") from error
    if value is not None and not isinstance(value, dict):
        raise SampleRejected("broken row", f"extra is {type(value).__name__}")
    return value or {}


@dataclass(slots=True, kw_only=True)
class RowConverter:
    """Rows to sidecars and audio. One for a reader, as it collects the spellings that it does not know.

    Attributes:
        labels: How labels are spelled.
        reply_emotion: Emotion of replies that carry no tag, empty to leave them without.
    """

    labels: LabelReader
    reply_emotion: str = ""

    def convert(self, fields: ReferenceFields, task: ReferenceTask) -> tuple[dict[str, Any], dict[str, bytes]]:
        """The sidecar, and the audio that its turns name.

        Raises:
            SampleRejected: The row lacks what its task needs, or contradicts itself.
        """
        turns = {
            "understand": self._understand,
            "answer": self._answer,
            "speak": self._speak,
            "write": self._write,
        }[task.family](fields, task)
        members: dict[str, bytes] = {}
        for number, turn in enumerate(turns):
            if (reader := turn.pop("read", None)) is not None:
                turn["audio"] = f"{number}.audio"
                members[turn["audio"]] = reader()
        sidecar: dict[str, Any] = {"schema": SCHEMA, "task": task.tag, "turns": turns}
        speaker = str(fields.values.get("speaker") or "").strip()
        if speaker.casefold() not in ("", "none", "null"):
            sidecar["speaker"] = speaker
        return sidecar, members

    def _understand(self, fields: ReferenceFields, task: ReferenceTask) -> list[dict[str, Any]]:
        text = _text(fields.values, "txt")
        labels = self._heard(fields)
        if task.labels:
            text, tags = _split_tags(text, words=task.words)
            labels |= self.labels.read_tags(tags, task.labels)
        text = _without_times(text) if task.words else ""
        if task.words and not text:
            raise SampleRejected("no transcript")
        if not task.words and not any(name in labels for name in task.labels):
            raise SampleRejected("no known label", f"txt is {_text(fields.values, 'txt')[:60]!r}")
        words = text or _text(fields.extra, "q_txt")
        return [_user(words, labels, read=_recording(fields, MAIN_AUDIO))]

    def _answer(self, fields: ReferenceFields, task: ReferenceTask) -> list[dict[str, Any]]:
        words = _text(fields.extra, "q_txt") or _text(fields.extra, "question")
        text = _text(fields.values, "txt")
        if task.words:
            heard, mark, text = text.partition(ANSWER_MARK)
            if not mark:
                raise SampleRejected("no answer mark", f"txt of {task.tag} reads TRANSCRIPT{ANSWER_MARK}REPLY")
            words = heard.strip()
        labels = self._heard(fields)
        lasting = {name: label for name, label in labels.items() if name in _LASTING}
        turns: list[dict[str, Any]] = []
        for number in _history(fields):
            turns.append(_user("", lasting, read=_recording(fields, f"wav_{number}")))
            turns.append(self._reply(_text(fields.values, f"txt_{number}"), _codes(fields, f"_{number}")))
        codes = _codes(fields, "")
        if task.speaks and codes is None:
            raise SampleRejected("no speech codes", f"{task.tag} needs extra.speech_token")
        reply = self._reply(text, codes)
        if thinking := _text(fields.extra, "think_str"):
            reply["thinking"] = thinking
        return [*turns, _user(words, labels, read=_recording(fields, MAIN_AUDIO)), reply]

    def _speak(self, fields: ReferenceFields, task: ReferenceTask) -> list[dict[str, Any]]:
        """The text is asked for in writing and spoken by the assistant; the row's recording plays no part."""
        codes = _codes(fields, "")
        if codes is None:
            raise SampleRejected("no speech codes", f"{task.tag} needs extra.speech_token")
        reply = self._reply(_text(fields.values, "txt"), codes)
        return [{"role": "user", "text": reply["text"]}, reply]

    def _write(self, fields: ReferenceFields, task: ReferenceTask) -> list[dict[str, Any]]:
        question = _text(fields.extra, "question")
        if not question:
            raise SampleRejected("no query text", f"{task.tag} needs extra.question")
        return [{"role": "user", "text": question}, self._reply(_text(fields.values, "txt"), None)]

    def _reply(self, text: str, codes: list[int] | None) -> dict[str, Any]:
        """An assistant's turn: the tag before the text is how it sounds."""
        thinking, ended, rest = text.partition(_THINK_END)
        text = rest.strip() if ended else text
        tag = _LEADING_TAG.match(text)
        emotion = self.labels.read(REPLY_EMOTION, tag[1]) if tag else None
        words = text[tag.end() :].strip() if tag else text
        if not words:
            raise SampleRejected("no reply text")
        reply: dict[str, Any] = {"role": "assistant", "text": words}
        if emotion or self.reply_emotion:
            reply["labels"] = {"emotion": emotion or self.reply_emotion}
        if ended:
            reply["thinking"] = thinking.strip().removeprefix("<think>").strip()
        if codes is not None:
            reply["codes"] = codes
        return reply

    def _heard(self, fields: ReferenceFields) -> dict[str, str]:
        """Labels of the query that `extra` names."""
        found = {name: self.labels.read(name, fields.extra.get(key)) for key, name in _HEARD.items()}
        return {name: label for name, label in found.items() if label is not None}


def _user(text: str, labels: Mapping[str, str], *, read: AudioReader) -> dict[str, Any]:
    return {"role": "user", "text": text, "labels": dict(labels), "read": read}


def _recording(fields: ReferenceFields, name: str) -> AudioReader:
    if name not in fields.audio:
        raise SampleRejected("missing audio", f"the row has no {name}")
    return fields.audio[name]


def _text(values: Mapping[str, Any], name: str) -> str:
    """A text in one line, empty where there is none."""
    value = values.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise SampleRejected("broken row", f"{name} is {type(value).__name__}")
    return " ".join(line.strip() for line in value.splitlines()).strip()


def _split_tags(text: str, *, words: bool) -> tuple[str, list[str]]:
    """The words, and the tags behind them. A text that is only a label may do without brackets."""
    found = _CLOSING_TAGS.search(text)
    if found is None:
        return (text, []) if words else ("", [text] if text else [])
    return text[: found.start()].strip(), re.findall(r"<([^<>]+)>", found[0])


def _without_times(text: str) -> str:
    """Aligned words without their `<start, end>`: Latin words apart, Chinese characters together."""
    pieces = [piece for piece in _TIMES.split(text) if piece]
    joined = pieces[0] if pieces else ""
    for piece in pieces[1:]:
        joined += (" " if joined[-1].isascii() and piece[0].isascii() else "") + piece
    return joined.strip()


def _history(fields: ReferenceFields) -> range:
    """Numbers of the earlier exchanges, from 1."""
    names = [*fields.values, *fields.audio]
    numbers = {int(found[1]) for name in names if (found := _TURN_FIELD.fullmatch(name))}
    expected = range(1, len(numbers) + 1)
    if numbers != set(expected):
        raise SampleRejected("gap in history", f"turns {sorted(numbers)}; they are numbered from 1")
    spoken = {name for name in fields.extra if re.fullmatch(r"speech_token_\d+", name)}
    if stray := sorted(spoken - {f"speech_token_{number}" for number in expected}):
        raise SampleRejected("mismatched speech codes", f"extra.{stray[0]} of {len(numbers)} earlier turns")
    return expected


def _codes(fields: ReferenceFields, suffix: str) -> list[int] | None:
    """The speech codes of a turn, None where it has none. They end where the boundary begins."""
    name = f"speech_token{suffix}"
    codes = fields.extra.get(name) or fields.values.get(name)
    if not codes:
        return None
    bounded = fields.extra.get("speech_token_num", _BOUNDED_CODES)
    if not isinstance(codes, list) or not isinstance(bounded, int):
        raise SampleRejected("bad speech codes", f"{name} is {type(codes).__name__}, a list of numbers is due")
    if strange := [code for code in codes if type(code) is not int or not 0 <= code < bounded - 1]:
        raise SampleRejected("bad speech codes", f"{name} holds {str(strange[0])[:40]}; codes are 0 to {bounded - 2}")
    return codes
