"""The tasks a dialogue can be turned into. A task is an entry of this table and a few options, no `if` elsewhere."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from lightning_echat.contracts import UserError
from lightning_echat.tokens.paralinguistics import LABEL_SETS
from lightning_echat.tokens.thinking import ThinkingForm

TaskKind = Literal[
    "transcribe",
    "transcribe_and_label",
    "label",
    "speech_to_text",
    "speech_to_speech",
    "text_to_text",
    "text_to_speech",
]
SpeechLayout = Literal["sequential", "interleaved"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskTraits:
    """What a kind of task reads and writes.

    Attributes:
        listens: The query is speech; otherwise it is text.
        converses: The target is a reply, so earlier turns are history and thinking is possible.
        speaks: The target holds speech codes, scored by the softmax over text and speech together.
        labels: The target lists labels.
        transcribes: The target repeats the query's words.
    """

    listens: bool = False
    converses: bool = False
    speaks: bool = False
    labels: bool = False
    transcribes: bool = False


TASKS: dict[TaskKind, TaskTraits] = {
    "transcribe": TaskTraits(listens=True, transcribes=True),
    "transcribe_and_label": TaskTraits(listens=True, transcribes=True, labels=True),
    "label": TaskTraits(listens=True, labels=True),
    "speech_to_text": TaskTraits(listens=True, converses=True),
    "speech_to_speech": TaskTraits(listens=True, converses=True, speaks=True),
    "text_to_text": TaskTraits(converses=True),
    "text_to_speech": TaskTraits(speaks=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DialogueTask:
    """One task with its options.

    Attributes:
        kind: Which entry of `TASKS`.
        labels: For the labelling kinds, the label sets asked for, in the order written.
        thinking: For replies to speech, the form of thinking that precedes the reply.
        layout: For spoken targets, whether speech follows the text or is interleaved with it.
    """

    kind: TaskKind
    labels: tuple[str, ...] = ()
    thinking: ThinkingForm = "none"
    layout: SpeechLayout = "sequential"

    def __post_init__(self) -> None:
        """Refuse contradictory options."""
        if self.traits.labels != bool(self.labels):
            need = "needs labels, for instance [emotion, age]" if self.traits.labels else "takes no labels"
            raise UserError(f"task {self.kind}: {need}")
        if unknown := [name for name in self.labels if name not in LABEL_SETS]:
            raise UserError(f"task {self.kind}: unknown label set {unknown[0]!r}; known: {', '.join(LABEL_SETS)}")
        if self.thinking != "none" and not (self.traits.listens and self.traits.converses):
            raise UserError(f"task {self.kind}: thinking goes with speech_to_text and speech_to_speech only")
        if self.layout != "sequential" and not self.traits.speaks:
            raise UserError(f"task {self.kind}: layout {self.layout} goes with spoken targets only")

    @property
    def traits(self) -> TaskTraits:
        """What the kind reads and writes."""
        return TASKS[self.kind]

    @property
    def name(self) -> str:
        """Kind and options in one word: the key of prompts, counters and metrics, without the label sets."""
        parts = [self.kind]
        if self.thinking != "none":
            parts.append(f"{self.thinking}_thinking")
        if self.layout != "sequential":
            parts.append(self.layout)
        return ".".join(parts)


def task_from_name(name: str, *, labels: tuple[str, ...] = ()) -> DialogueTask:
    """A task from its name (see `DialogueTask.name`) and its label sets, which only the labelling kinds look at.

    Raises:
        UserError: There is no such task, with the nearest that there is.
    """
    if name not in ALL_TASK_NAMES:
        near = difflib.get_close_matches(name, ALL_TASK_NAMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(ALL_TASK_NAMES)}"
        raise UserError(f"unknown task {name!r}; {hint}")
    kind, *options = name.split(".")
    kinds: dict[str, TaskKind] = {known: known for known in TASKS}
    known_kind = kinds[kind]
    thinking: ThinkingForm = "none"
    if "label_thinking" in options:
        thinking = "label"
    elif "natural_thinking" in options:
        thinking = "natural"
    return DialogueTask(
        kind=known_kind,
        labels=labels if TASKS[known_kind].labels else (),
        thinking=thinking,
        layout="interleaved" if "interleaved" in options else "sequential",
    )


def traits_of(task_name: str) -> TaskTraits:
    """The traits of a task known by name only, as metrics and the decoder know it."""
    kind = task_name.split(".")[0]
    if kind not in TASKS:
        raise ValueError(f"unknown task {task_name!r}; known: {', '.join(TASKS)}")
    return TASKS[kind]


ALL_TASK_NAMES: tuple[str, ...] = (
    "transcribe",
    "transcribe_and_label",
    "label",
    *(f"speech_to_text{thinking}" for thinking in ("", ".label_thinking", ".natural_thinking")),
    *(
        f"speech_to_speech{thinking}{layout}"
        for thinking in ("", ".label_thinking", ".natural_thinking")
        for layout in ("", ".interleaved")
    ),
    "text_to_text",
    "text_to_speech",
    "text_to_speech.interleaved",
)
"""Every task name there is; a prompt set has an entry for each."""
