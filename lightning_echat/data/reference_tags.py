"""How data of the public implementation spells tasks and labels, in the project's words. The one place that lists it.

Spellings are compared without case, angle brackets and the difference between spaces, hyphens and underscores.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lightning_echat.contracts import SampleRejected
from lightning_echat.tokens.paralinguistics import LABEL_SETS, REPLY_EMOTIONS

REPLY_EMOTION = "reply_emotion"
"""Names the spellings of a reply's emotion, which has other labels than the emotion heard."""

LABEL_SPELLINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "age": {"adult": ("youth", "middle", "middle_age")},
    "gender": {},
    "emotion": {"angry": ("anger",)},
    "event": {"none": ("none", "null"), "scream": ("screaming",)},
    "style": {
        "news": ("新闻科普", "朗读", "科普百科"),
        "horror": ("恐怖故事", "悬疑恐怖"),
        "story": ("童话故事",),
        "service": ("客服",),
        "poetry": ("诗歌散文", "诗歌", "散文"),
        "audiobook": ("有声书", "武侠评书", "小说", "历史", "科幻"),
        "daily": ("日常口语", "对话", "口语"),
        "other": ("其他", "幽默"),
    },
    REPLY_EMOTION: {
        "neutral": ("中立",),
        "happy": ("开心", "愉悦"),
        "sad": ("悲伤", "哭腔"),
        "sorry": ("抱歉",),
        "comforting": ("安慰鼓励",),
        "surprise": ("惊讶",),
        "angry": ("愤怒", "anger"),
        "fear": ("害怕",),
        "disgust": ("厌恶",),
        "shy": ("embarrassed",),
    },
}
"""Label set -> label -> its spellings, besides the project's own name of the label."""

NO_LABEL = ("", "none", "null", "&&")
"""Spellings that say that a label is not known. Of an event, none and null say that there is none."""

LABEL_TAGS = {"EMOTION": "emotion", "STYLE": "style", "CAPTION": "event", "GENDER": "gender", "AGE": "age"}
"""Parts of the task tags that ask for labels -> label set."""

ANSWER_MARK = "<开始回答>"
"""Stands between the words heard and the reply where one text holds both."""

Family = Literal["understand", "answer", "speak", "write"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceTask:
    """What rows with a task tag hold.

    Attributes:
        tag: The tag; two tags that mean the same task part by part are equal.
        family: Understand speech; answer it; speak a text; or answer in writing.
        serves: The project's tasks that the rows are for, for reports.
        words: The text begins with the words heard.
        labels: Label sets that the text names in tags, in this order.
        speaks: The row is of no use without speech codes.
    """

    tag: str
    family: Family
    serves: str
    words: bool = False
    labels: tuple[str, ...] = ()
    speaks: bool = False


_THINKING = "thinking natural where rows have think_str, thinking label where they have labels"
_SPEECH, _TEXT = "speech_to_speech", "speech_to_text"
_CONVERSATION_TASKS = (
    ReferenceTask(tag="<TRANSCRIBE> <S2TCHAT>", family="answer", serves=f"{_TEXT}, transcribe", words=True),
    ReferenceTask(tag="<S2TCHAT>", family="answer", serves=_TEXT),
    ReferenceTask(tag="<S2TCHAT_FAKE>", family="answer", serves=_TEXT),
    ReferenceTask(tag="<S2TCHAT> <THINKER>", family="answer", serves=f"{_TEXT}, {_THINKING}"),
    ReferenceTask(tag="<S2TCHAT> <TEXT2TOKEN>", family="answer", serves=_SPEECH, speaks=True),
    ReferenceTask(tag="<Speech2TEXTandTOKEN>", family="answer", serves=_SPEECH, speaks=True),
    ReferenceTask(tag="<S2TCHAT> <TEXT2TOKEN> <EMOTION>", family="answer", serves=_SPEECH, speaks=True),
    ReferenceTask(tag="<S2TCHAT> <TEXT2TOKEN> <HISTORY>", family="answer", serves=_SPEECH, speaks=True),
    ReferenceTask(tag="<S2TCHAT> <TEXT2TOKEN> <THINK>", family="answer", serves=f"{_SPEECH}, {_THINKING}", speaks=True),
    ReferenceTask(
        tag="<S2TCHAT> <TEXT2TOKEN> <STREAMING>", family="answer", serves=f"{_SPEECH}, layout interleaved", speaks=True
    ),
    ReferenceTask(tag="<TEXT2TOKEN>", family="speak", serves="text_to_speech", speaks=True),
    ReferenceTask(
        tag="<TEXT2TOKEN> <STREAMING>", family="speak", serves="text_to_speech, layout interleaved", speaks=True
    ),
    ReferenceTask(tag="<TEXT2TEXT>", family="write", serves="text_to_text"),
)
"""Tags of understanding are read part by part instead, see `read_task`."""


def _parts(tag: str) -> tuple[str, ...]:
    return tuple(part.strip().upper() for part in re.findall(r"<([^<>]+)>", tag) or [tag])


_BY_PARTS = {_parts(task.tag): task for task in _CONVERSATION_TASKS}
_WORDS = {"TRANSCRIBE", "ALIGN", "PUNCTUATION"}


def read_task(tag: str) -> ReferenceTask:
    """The task that a tag such as `<TRANSCRIBE> <AGE> <GENDER>` names, in any case.

    Raises:
        SampleRejected: There is no such task; the reason names it, so that unknown tags are counted by name.
    """
    parts = _parts(tag)
    if known := _BY_PARTS.get(parts):
        return known
    labels = tuple(LABEL_TAGS[part] for part in parts if part in LABEL_TAGS)
    words = bool(_WORDS & set(parts))
    strange = set(parts) - {*_WORDS, "AUDIO", *LABEL_TAGS}
    if strange or not (labels or words) or ("AUDIO" in parts and "CAPTION" not in parts):
        raise SampleRejected(f"unknown task {tag[:60]}", "the table is lightning_echat/data/reference_tags.py")
    kind = {(True, False): "transcribe", (True, True): "transcribe_and_label", (False, True): "label"}
    serves = kind[words, bool(labels)] + (f", labels [{', '.join(labels)}]" if labels else "")
    serves += " (the times are left out)" if "ALIGN" in parts else ""
    canonical = " ".join(f"<{part}>" for part in parts)
    return ReferenceTask(tag=canonical, family="understand", serves=serves, words=words, labels=labels)


def normal_spelling(tag: str) -> str:
    """A spelling as it is compared: `<THROAT CLEARING>` and `throat-clearing` are the same."""
    return re.sub(r"[\s\-]+", "_", tag.strip().removeprefix("<").removesuffix(">").strip().casefold())


@dataclass(slots=True)
class LabelReader:
    """Spelled labels to labels.

    Attributes:
        extra: Label set -> spelling -> label: spellings of the user's own.
        unknown: Spellings met that are no label of the set asked for, as "label set <spelling>".
    """

    extra: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    _known: dict[str, dict[str, str]] = field(init=False)

    def __post_init__(self) -> None:
        """Turn the table around."""
        self._known = {name: {label: label for label in labels} for name, labels in LABEL_SETS.items()}
        self._known[REPLY_EMOTION] = {label: label for label in REPLY_EMOTIONS}
        for name, labels in LABEL_SPELLINGS.items():
            self._known[name] |= {spelling: label for label, spellings in labels.items() for spelling in spellings}
        for name, spellings in self.extra.items():
            self._known[name] |= {normal_spelling(spelling): label for spelling, label in spellings.items()}

    def read(self, label_set: str, spelled: object) -> str | None:
        """The label, or None where none is known; a spelling that means nothing goes to `unknown`."""
        spelling = normal_spelling(str(spelled)) if spelled is not None else ""
        label = self._known[label_set].get(spelling)
        if label is None and spelling not in NO_LABEL:
            self.unknown.append(f"{label_set} <{spelling[:40]}>")
        return label

    def read_tags(self, tags: Sequence[str], label_sets: Sequence[str]) -> dict[str, str]:
        """Tags in the order in which a task asks for their sets; where the order is another, by what they mean."""
        labels: dict[str, str] = {}
        strays: list[tuple[str, str]] = []
        for place, tag in enumerate(tags):
            asked = label_sets[place] if place < len(label_sets) else label_sets[-1]
            if (label := self._known[asked].get(normal_spelling(tag))) is not None:
                labels[asked] = label
            else:
                strays.append((asked, tag))
        for asked, tag in strays:
            spelling = normal_spelling(tag)
            fitting = [name for name in label_sets if name not in labels and spelling in self._known[name]]
            name = fitting[0] if fitting and spelling not in NO_LABEL else asked
            if (label := self.read(name, tag)) is not None:
                labels.setdefault(name, label)
        return labels

    def take_unknown(self) -> list[str]:
        """What was met since the last call."""
        met, self.unknown = self.unknown, []
        return met
