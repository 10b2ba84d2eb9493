"""Dual thinking, written and parsed: what the model writes about the query before it answers.

Two forms hold the same facts. The label form lists them under names:

    <think>words: could you find a quiet cafe ; age: <old> ; gender: <female> ; emotion: <sad> ; event: <cough>
    ; reply: <comforting><think end>

The natural form says them in a sentence:

    <think>an old woman says: could you find a quiet cafe. the voice sounds sad and coughs. i will sound comforting.
    <think end>

A corpus may bring its own natural-language thinking; it is used as it is and parsed as far as these words go. The
wording is data (`ThinkingFormat`), so that a prompt set can carry another language or a released model's form.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lightning_echat.tokens.paralinguistics import LABEL_SETS, REPLY_EMOTIONS, write_label

ThinkingForm = Literal["none", "label", "natural"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingFormat:
    """The wording of the label form.

    Attributes:
        open, close: Markers around the thinking, in both forms.
        transcript: Introduces the words heard.
        fields: Label set -> what introduces its label, in the order written.
        reply_emotion: Introduces the emotion chosen for the reply.
        separator: Stands between the parts.
        ending: A closing remark before the marker, if the form has one.
        spellings: Label set (or reply_emotion) -> spelling in lower case -> label: how a model that was trained
            elsewhere writes labels. They are read, never written.
    """

    open: str = "<think>"
    close: str = "<think end>"
    transcript: str = "words: "
    fields: Mapping[str, str] = field(default_factory=lambda: {name: f"{name}: " for name in LABEL_SETS})
    reply_emotion: str = "reply: "
    separator: str = " ; "
    ending: str = ""
    spellings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedThinking:
    """What a written thinking says.

    Attributes:
        transcript: The words heard, None where none were found.
        labels: Label set -> label, only labels that exist.
        reply_emotion: The emotion chosen for the reply, None where none was found.
        reply: The text after the thinking; the whole text where there is no thinking.
        written: The thinking as it stands, without markers; empty where there is none.
        well_formed: True when both markers stand once and in order, words and reply emotion were found, and in the
            label form every field that occurs holds a known label.
    """

    transcript: str | None
    labels: dict[str, str]
    reply_emotion: str | None
    reply: str
    written: str
    well_formed: bool


_NOUNS = {
    ("child", "female"): "a girl",
    ("child", "male"): "a boy",
    ("child", None): "a child",
    ("adult", "female"): "a woman",
    ("adult", "male"): "a man",
    ("adult", None): "an adult",
    ("old", "female"): "an old woman",
    ("old", "male"): "an old man",
    ("old", None): "an old person",
    (None, "female"): "a female voice",
    (None, "male"): "a male voice",
    (None, None): "someone",
}
_EVENTS = {
    "none": "makes no other sound",
    "cough": "coughs",
    "laugh": "laughs",
    "sneeze": "sneezes",
    "sigh": "sighs",
    "cry": "cries",
    "scream": "screams",
    "throat_clearing": "clears the throat",
    "other": "makes another sound",
}
_SPEAKERS = {noun: (age, gender) for (age, gender), noun in _NOUNS.items()}


def write_label_thinking(
    transcript: str, labels: Mapping[str, str], reply_emotion: str, fmt: ThinkingFormat | None = None
) -> str:
    """Compose the label form, markers included. Labels that are not known are left out."""
    fmt = fmt or ThinkingFormat()
    parts = [fmt.transcript + transcript]
    parts += [intro + write_label(labels[name]) for name, intro in fmt.fields.items() if name in labels]
    parts.append(fmt.reply_emotion + write_label(reply_emotion))
    return fmt.open + fmt.separator.join(parts) + fmt.ending + fmt.close


def write_natural_thinking(transcript: str, labels: Mapping[str, str], reply_emotion: str) -> str:
    """Compose the natural form without markers, as a corpus stores it. Labels that are not known are left out."""
    sentences = [f"{_NOUNS[labels.get('age'), labels.get('gender')]} says: {transcript}."]
    heard = []
    if "emotion" in labels:
        heard.append(f"sounds {labels['emotion']}")
    if "event" in labels:
        heard.append(_EVENTS[labels["event"]])
    if "style" in labels:
        heard.append(f"speaks in {labels['style']} style")
    if heard:
        sentences.append(f"the voice {' and '.join(heard)}.")
    sentences.append(f"i will sound {reply_emotion}.")
    return " ".join(sentences)


def wrap_thinking(thinking: str, fmt: ThinkingFormat | None = None) -> str:
    """Put the markers around natural-language thinking."""
    fmt = fmt or ThinkingFormat()
    return fmt.open + thinking.strip() + fmt.close


def parse_thinking(text: str, fmt: ThinkingFormat | None = None) -> ParsedThinking:
    """Read a written answer back, in whichever form it stands. Any text is accepted; see `well_formed`."""
    fmt = fmt or ThinkingFormat()
    thinking, reply, marked = _split(text, fmt)
    if thinking is None:
        return ParsedThinking(
            transcript=None, labels={}, reply_emotion=None, reply=reply, written="", well_formed=False
        )
    if thinking.startswith(fmt.transcript):
        transcript, labels, emotion, clean = _parse_label_form(thinking.removesuffix(fmt.ending), fmt)
    else:
        transcript, labels, emotion = _parse_natural_form(thinking)
        clean = True
    well_formed = marked and clean and transcript is not None and emotion is not None
    return ParsedThinking(
        transcript=transcript,
        labels=labels,
        reply_emotion=emotion,
        reply=reply,
        written=thinking,
        well_formed=well_formed,
    )


def _split(text: str, fmt: ThinkingFormat) -> tuple[str | None, str, bool]:
    """Thinking (None without an opening marker), reply, and whether both markers stand once and in order."""
    before, opened, rest = text.partition(fmt.open)
    if not opened:
        return None, text.strip(), False
    thinking, closed, reply = rest.partition(fmt.close)
    once = fmt.open not in rest and fmt.close not in reply
    return thinking.strip(), reply.strip(), bool(closed) and once and not before.strip()


def _parse_label_form(thinking: str, fmt: ThinkingFormat) -> tuple[str | None, dict[str, str], str | None, bool]:
    intros = {**{name: intro for name, intro in fmt.fields.items()}, "reply": fmt.reply_emotion}
    # The words come first and may hold a separator themselves, so fields are looked for from the end.
    labels: dict[str, str] = {}
    clean = True
    rest = thinking
    for name in reversed(list(intros)):
        head, found, value = rest.rpartition(fmt.separator + intros[name])
        if not found:
            continue
        rest = head
        label = "_".join(value.strip().strip("<>").lower().split())
        label = fmt.spellings.get("reply_emotion" if name == "reply" else name, {}).get(label, label)
        known = REPLY_EMOTIONS if name == "reply" else LABEL_SETS[name]
        if label in known and name not in labels:
            labels[name] = label
        else:
            clean = False
    reply_emotion = labels.pop("reply", None)
    transcript = rest.removeprefix(fmt.transcript).strip()
    return transcript, labels, reply_emotion, clean


def _parse_natural_form(thinking: str) -> tuple[str | None, dict[str, str], str | None]:
    labels: dict[str, str] = {}
    match = re.match(
        r"(?P<who>[a-z ]+?) says: (?P<words>.*?)\.?"
        r"(?: the voice (?P<heard>[^.:]*)\.)?(?: i will sound (?P<reply>[a-z_]+)\.)?$",
        thinking,
        flags=re.DOTALL,
    )
    if match is None:
        return None, labels, None
    age, gender = _SPEAKERS.get(match["who"], (None, None))
    heard = match["heard"] or ""
    emotion = re.search(r"\bsounds ([a-z_]+)", heard)
    style = re.search(r"\bspeaks in ([a-z_]+) style", heard)
    event = next(
        (label for label, phrase in _EVENTS.items() if heard.endswith(phrase) or f"{phrase} and" in heard), None
    )
    found = {
        "age": age,
        "gender": gender,
        "emotion": emotion[1] if emotion else None,
        "event": event,
        "style": style[1] if style else None,
    }
    labels = {name: label for name, label in found.items() if label is not None and label in LABEL_SETS[name]}
    reply = match["reply"] if match["reply"] in REPLY_EMOTIONS else None
    return match["words"].strip(), labels, reply
