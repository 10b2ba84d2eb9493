"""A weighted mixture of sources, each with its tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_echat.contracts import UserError
from lightning_echat.tokens.tasks import DialogueTask, SpeechLayout, TaskKind
from lightning_echat.tokens.thinking import ThinkingForm

MixtureUnit = Literal["samples", "tokens"]
"""What the weights of a mixture share out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskConfig:
    """One task of a source, and how often it is drawn among them.

    Attributes:
        kind: Which template.
        labels: For the labelling kinds, the label sets asked for.
        thinking: For replies to speech, the form of thinking.
        layout: For spoken targets, the order of text and speech.
        weight: Share among the source's tasks, relative.
    """

    kind: TaskKind
    labels: tuple[str, ...] = ()
    thinking: ThinkingForm = "none"
    layout: SpeechLayout = "sequential"
    weight: float = 1.0

    @property
    def task(self) -> DialogueTask:
        """The template's own form; `UserError` where the options contradict each other."""
        return DialogueTask(kind=self.kind, labels=tuple(self.labels), thinking=self.thinking, layout=self.layout)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """Shards that belong together, what is learned from them, and their share of the mixture.

    Attributes:
        shards: Patterns (see `expand_shards`).
        tasks: At least one; a validation set has exactly one.
        weight: Share among the sources, relative.
        repeat: Start over when all has been read. False drops the source then, and the others share its weight; where
            no source is repeated, an epoch of training ends with the last of them.
        name: How reports call it.
    """

    shards: list[str]
    tasks: list[TaskConfig]
    weight: float = 1.0
    repeat: bool = True
    name: str = "data"


def check_sources(sources: Sequence[SourceConfig]) -> None:
    """Raise `UserError` for a mixture that cannot be drawn from."""
    if not sources:
        raise UserError("no train sources given")
    names = [source.name for source in sources]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two train sources are named {twice[0]!r}; give each a name of its own")
    for source in sources:
        _check_weight(source.weight, f"source {source.name!r}")
        if not source.tasks:
            raise UserError(f"source {source.name!r} names no task")
        for task in source.tasks:
            _check_weight(task.weight, f"source {source.name!r}, task {task.task.name}")


def _check_weight(weight: float, what: str) -> None:
    if not 0 < weight < float("inf"):
        raise UserError(f"{what}: weight is {weight:g}; give a positive number, or leave the entry out")


class Mixture:
    """Says whose turn it is, so that what has been drawn keeps to the weights, among sources and among their tasks.

    The next is always the one that is farthest behind its share. So every reader is never more than one dialogue off,
    and nothing but the totals must be kept to go on. Only what comes out is counted: a source that skips unusable
    samples on its way is simply asked for longer.

    Args:
        sources: With their tasks and weights.
        by: What the weights share out: dialogues, or their ids, audio included.
        drawn: Totals of an interrupted mixture, source by task.
    """

    def __init__(
        self, sources: Sequence[SourceConfig], *, by: MixtureUnit = "samples", drawn: Sequence[Sequence[int]] = ()
    ) -> None:
        self._sources = [source.weight for source in sources]
        self._tasks = [[task.weight for task in source.tasks] for source in sources]
        self._by = by
        self.drawn = [list(tasks) for tasks in drawn] or [[0] * len(tasks) for tasks in self._tasks]

    def next_source(self, alive: Sequence[int]) -> int:
        """Place of the source, among those in `alive`, whose turn it is."""
        return min(alive, key=lambda place: (sum(self.drawn[place]) + 1) / self._sources[place])

    def next_task(self, source: int) -> int:
        """Place of the task of `source` whose turn it is."""
        weights, drawn = self._tasks[source], self.drawn[source]
        return min(range(len(weights)), key=lambda place: (drawn[place] + 1) / weights[place])

    def add(self, source: int, task: int, *, ids: int) -> None:
        """A dialogue of `ids` ids has been drawn."""
        self.drawn[source][task] += ids if self._by == "tokens" else 1


def asked_shares(sources: Sequence[SourceConfig]) -> dict[str, float]:
    """Share of the mixture asked for by "<source>/<task>", as draws are counted."""
    shares: dict[str, float] = {}
    everything = sum(source.weight for source in sources)
    for source in sources:
        tasks = sum(task.weight for task in source.tasks)
        for task in source.tasks:
            name = f"{source.name}/{task.task.name}"
            shares[name] = shares.get(name, 0.0) + source.weight / everything * task.weight / tasks
    return shares
