"""What one row of a batch has written and may write next: thinking, text, then speech, or text and speech in turn.

The order is that of the templates (`tokens.dialogue_template`): text until the end of text, then speech from boundary
to boundary; interleaved rows take some of each in turn once their thinking is closed, and whichever ends first leaves
the rest to the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lightning_echat.tokens.dialogue_template import DialogueTokenizer
from lightning_echat.tokens.speech_codes import SPEECH_CHUNK, TEXT_CHUNK
from lightning_echat.tokens.tasks import task_from_name

Phase = Literal["thinking", "text", "speech"]
PHASES: tuple[Phase, ...] = ("thinking", "text", "speech")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyLimits:
    """Where a row ends at the latest, and how interleaved rows take turns.

    Attributes:
        text: Text ids, thinking and end of text included, after which a row is cut short.
        thinking: Of these, ids of thinking after which a row is cut short; 0 for no limit of its own.
        speech: Speech ids, boundaries included, after which a row is cut short.
        text_chunk, speech_chunk: Ids of each kind in a turn.
    """

    text: int
    thinking: int
    speech: int
    text_chunk: int = TEXT_CHUNK
    speech_chunk: int = SPEECH_CHUNK


@dataclass(slots=True, kw_only=True)
class Written:
    """The ids of a row, in the order written, and the phase of each."""

    ids: list[int] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)


class ReplyWriter:
    """The state of one row. It lives on the host: a step costs a few microseconds a row.

    Args:
        task: Name of the row's task.
        tokenizer: Ids, and the wording that closes the thinking.
        limits: Where the row ends at the latest.
    """

    def __init__(self, task: str, tokenizer: DialogueTokenizer, limits: ReplyLimits) -> None:
        known = task_from_name(task, labels=_ANY_LABELS)
        self.written = Written()
        self.text_done = known.kind == "text_to_speech" and known.layout == "sequential"
        self.speech_done = not known.traits.speaks
        self.cut = False
        self._tokenizer = tokenizer
        self._limits = limits
        self._interleaved = known.layout == "interleaved"
        self._thinking = known.thinking != "none"
        self._writes_speech = self.text_done
        self._counts = {"thinking": 0, "text": 0, "speech": 0}
        self._in_chunk = 0

    @property
    def done(self) -> bool:
        """Nothing more to write."""
        return self.cut or (self.text_done and self.speech_done)

    @property
    def phase(self) -> Phase:
        """What the next id belongs to."""
        if self._writes_speech:
            return "speech"
        return "thinking" if self._thinking else "text"

    @property
    def forced_id(self) -> int | None:
        """The next id where there is no choice: speech opens with the boundary, so none can end before it began."""
        opens = self._writes_speech and self._counts["speech"] == 0
        return self._tokenizer.vocabulary.speech_boundary if opens else None

    def write(self, id: int) -> None:
        """Take the next id, which must be of the kind that `phase` names."""
        vocabulary, phase = self._tokenizer.vocabulary, self.phase
        self.written.ids.append(id)
        self.written.phases.append(phase)
        self._counts[phase] += 1
        if phase == "speech":
            self.speech_done |= id == vocabulary.speech_boundary and self._counts["speech"] > 1
        else:
            self.text_done |= id == vocabulary.end_of_text
        self._in_chunk += 1
        if phase == "thinking" and (self.text_done or self._closes_thinking(id)):
            self._thinking = False
            self._in_chunk = 0
        self.cut = self._is_cut()
        self._take_turns()

    def _is_cut(self) -> bool:
        counts, limits = self._counts, self._limits
        text = counts["thinking"] + counts["text"]
        return (
            (not self.text_done and text >= limits.text)
            or (not self.speech_done and counts["speech"] >= limits.speech)
            or (self._thinking and 0 < limits.thinking <= counts["thinking"])
        )

    def _closes_thinking(self, id: int) -> bool:
        """Whether the marker is complete. It may be any ids in a pretrained tokenizer, so text tells."""
        close = self._tokenizer.prompt_set.thinking.close
        piece = self._tokenizer.spell_id(id)
        # Most ids cannot complete it: they lack its last character, and are not a part of one.
        if close[-1] not in piece and "\ufffd" not in piece:
            return False
        # An id spells at least one byte, so the marker that the last id completes is among so many.
        return close in self._tokenizer.decode(self.written.ids[-max(16, len(close.encode())) :])

    def _take_turns(self) -> None:
        """Decide whether the next id is speech."""
        full = self._in_chunk >= (self._limits.speech_chunk if self._writes_speech else self._limits.text_chunk)
        wanted = self._writes_speech ^ (self._interleaved and not self._thinking and full)
        wanted = (wanted or self.text_done) and not self.speech_done
        if wanted != self._writes_speech:
            self._in_chunk = 0
        self._writes_speech = wanted


_ANY_LABELS = ("age",)
"""Which labels a task asks for changes nothing here, but a labelling task has some."""
