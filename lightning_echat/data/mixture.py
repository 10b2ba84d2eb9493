"""A weighted mixture of sources, each with its tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TypeVar

from lightning_echat.contracts import UserError
from lightning_echat.tokens.tasks import DialogueTask, SpeechLayout, TaskKind
from lightning_echat.tokens.thinking import ThinkingForm

Drawn = TypeVar("Drawn")


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
        weight: Share among the sources, relative, counted in dialogues.
        repeat: Start over when all has been read. False drops the source then, and the others share its weight.
        name: How reports call it.
    """

    shards: list[str]
    tasks: list[TaskConfig]
    weight: float = 1.0
    repeat: bool = True
    name: str = "data"


def check_sources(sources: Sequence[SourceConfig]) -> None:
    """Raise `UserError` for a mixture that cannot be drawn from, or that would end before training does."""
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
    if not any(source.repeat for source in sources):
        raise UserError("no train source has repeat: true; ranks would run dry at different steps")


def _check_weight(weight: float, what: str) -> None:
    if not 0 < weight < float("inf"):
        raise UserError(f"{what}: weight is {weight:g}; give a positive number, or leave the entry out")


@dataclass(slots=True)
class Mixture(Iterator[Drawn]):
    """Draws from several iterators in given shares. Endless as long as one of them is.

    The shares hold for what comes out: an iterator that skips unusable samples on its way is simply asked for longer.

    Attributes:
        sources: What is drawn from.
        weights: Their shares, relative.
        random: Decides; nothing else does.
    """

    sources: list[Iterator[Drawn]]
    weights: list[float]
    random: Random
    _alive: list[int] = field(init=False)

    def __post_init__(self) -> None:
        """All sources are there at first."""
        self._alive = list(range(len(self.sources)))

    def __next__(self) -> Drawn:
        """The next item of a source drawn by weight among those that have not ended."""
        while self._alive:
            place = self.random.choices(self._alive, [self.weights[i] for i in self._alive])[0]
            try:
                return next(self.sources[place])
            except StopIteration:
                self._alive.remove(place)
        raise StopIteration


def draw_task(tasks: Sequence[TaskConfig], *, random: Random) -> DialogueTask:
    """One of a source's tasks, by weight."""
    if len(tasks) == 1:
        return tasks[0].task
    return random.choices(tasks, [task.weight for task in tasks])[0].task
