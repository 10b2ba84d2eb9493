"""Training batches from a mixture of sources: one worker's as a state machine, and the stream of all of them.

Every draw follows from the seed and from what is drawn: the task and the augmentation of a dialogue from where it is
stored and from its epoch, the order of shards from the epoch, a draw from a buffer from its number. So a state is made
of numbers and references, and whoever has it goes on exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from random import Random

from lightning_echat.contracts import PackedBatch, TokenizedDialogue, UserError
from lightning_echat.data.augmentation import AugmentationConfig
from lightning_echat.data.batching import Window, pack_rows
from lightning_echat.data.decoding import ParsedDialogue
from lightning_echat.data.dialogue_stream import DialogueReader, ReadingConfig
from lightning_echat.data.mixture import Mixture, MixtureUnit, SourceConfig
from lightning_echat.data.resumable_stream import ResumableStream, digest
from lightning_echat.data.shard_deal import ShardOrder
from lightning_echat.data.source_reader import SampleRef, SourceReader, gone, held_refs, join_refs, pack_ref, read_refs
from lightning_echat.data.stream_items import StreamEnd
from lightning_echat.data.stream_state import Waiting, WorkerState, waiting_refs

_UNUSABLE_IN_A_ROW = 1000
"""Dialogues of one source rejected without a usable one between them before the run stops."""


class TrainingWorker:
    """Batches of one worker of one rank.

    Args:
        stream: Settings and sources.
        reader: Reads and counts.
        consumer: Number of the worker over all ranks.
        orders: The sequence of work of each source.
        state: Where this one goes on, None to begin.
    """

    def __init__(
        self,
        stream: TrainingStream,
        reader: DialogueReader,
        *,
        consumer: int,
        orders: Sequence[ShardOrder],
        state: WorkerState | None,
    ) -> None:
        self._stream = stream
        self._reader = reader
        self._tasks = [[task.task for task in source.tasks] for source in stream.sources]
        self._mixture = Mixture(stream.sources, by=stream.mixture_by, drawn=state["drawn"] if state else ())
        self._unusable = list(state["unusable"]) if state else [0] * len(stream.sources)
        self._alive = list(range(len(stream.sources)))
        self._window: Window[bytes] = Window(stream.config.batching)
        self._sources = [
            SourceReader(
                source,
                stream.shards[place],
                reader,
                order=orders[place],
                consumer=consumer,
                seed=stream.seed_of(source),
                size=stream.config.batching.shuffle,
            )
            for place, source in enumerate(stream.sources)
        ]
        if state:
            reader.counter.resume(state["counts"])
            self._refill(state)

    def next_batch(self) -> PackedBatch | None:
        """The next batch, None when all sources have ended and nothing waits any more."""
        while not self._window.full and self._draw():
            pass
        rows = self._window.take()
        if not rows:
            return None
        batch = pack_rows(rows, padding=self._reader.padding, mel_bins=self._stream.config.tokens.mel_bins)
        batch.health = self._reader.counter.take()
        return batch

    def end(self, number: int) -> StreamEnd:
        """What is handed over when there is no next batch."""
        return StreamEnd(number, self._reader.counter.take(), self._reader.padding)

    def state(self) -> WorkerState:
        """What goes on after the last batch. Costs 0.2 ms with the buffers of the defaults."""
        return WorkerState(
            sources=[source.state() for source in self._sources],
            drawn=[list(tasks) for tasks in self._mixture.drawn],
            unusable=list(self._unusable),
            window=join_refs([entry.tag for entry in self._window.entries]),
            counts=dict(self._reader.counter.counts),
        )

    def _refill(self, state: WorkerState) -> None:
        """Read again what the buffers and the window held."""
        waiting = waiting_refs(state)
        dialogues: dict[tuple[int, SampleRef], ParsedDialogue] = {}
        for place, (source, held) in enumerate(zip(self._sources, state["sources"], strict=True)):
            refs = held_refs(held) + [entry.ref for entry in waiting if entry.source == place]
            found = read_refs(refs, self._reader, source=source.source, shards=source.shards)
            source.resume(held, found)
            dialogues.update({(place, ref): found[ref[:3]] for ref in refs})
        with self._reader.counter.ignoring():
            for entry in waiting:
                dialogue = self._tokenize(entry, dialogues[entry.source, entry.ref])
                if dialogue is None:
                    raise gone(self._sources[entry.source].shards[entry.ref.shard], entry.ref.ordinal)
                self._window.add(dialogue, pack_ref(entry))

    def _draw(self) -> bool:
        """Add the mixture's next dialogue to the window. False when every source has ended."""
        while self._alive:
            place = self._mixture.next_source(self._alive)
            if self._draw_from(place):
                return True
            self._alive.remove(place)
        return False

    def _draw_from(self, place: int) -> bool:
        """Add the next usable dialogue of a source to the window. False when it has ended."""
        source = self._sources[place]
        while (drawn := source.draw()) is not None:
            entry = Waiting(place, self._mixture.next_task(place), *drawn.ref)
            dialogue = self._tokenize(entry, drawn.parsed)
            if dialogue is not None:
                self._unusable[place] = 0
                self._keep(entry, dialogue)
                return True
            self._unusable[place] += 1
            if self._unusable[place] >= _UNUSABLE_IN_A_ROW:
                task = self._tasks[place][entry.task].name
                summary = self._reader.counter.summary()
                raise UserError(f"source {source.source.name!r} gives no usable sample for task {task}: {summary}")
        return False

    def _keep(self, entry: Waiting, dialogue: TokenizedDialogue) -> None:
        ids = len(dialogue.input_ids)
        self._mixture.add(entry.source, entry.task, ids=ids)
        name = self._stream.sources[entry.source].name
        self._reader.counter.draw(f"{name}/{self._tasks[entry.source][entry.task].name}", ids=ids)
        self._window.add(dialogue, pack_ref(entry))

    def _tokenize(self, entry: Waiting, parsed: ParsedDialogue) -> TokenizedDialogue | None:
        seed = self._stream.seed_of(self._stream.sources[entry.source])
        random = Random(f"{seed}/{entry.epoch}/{entry.shard}/{entry.ordinal}/{entry.exchange}")
        return self._reader.tokenize(parsed, self._tasks[entry.source][entry.task], random=random)


class TrainingStream(ResumableStream):
    """Batches from a mixture of sources; endless as long as one of them is repeated.

    Args:
        config: What every stream of a run shares.
        sources: The mixture.
        mixture_by: What its weights share out.
        augmentation: Altering of mels.
    """

    config: ReadingConfig

    def __init__(
        self,
        config: ReadingConfig,
        *,
        sources: Sequence[SourceConfig],
        mixture_by: MixtureUnit = "samples",
        augmentation: AugmentationConfig | None = None,
    ) -> None:
        super().__init__(config, sources=sources)
        self.mixture_by: MixtureUnit = mixture_by
        self.augmentation = augmentation

    def worker(self, *, consumer: int, orders: Sequence[ShardOrder], state: WorkerState | None) -> TrainingWorker:
        """See `ResumableStream`."""
        # A worker's own reader: tokenizers do not travel between processes.
        reader = DialogueReader(self.config, augmentation=self.augmentation)
        return TrainingWorker(self, reader, consumer=consumer, orders=orders, state=state)

    def made_by(self, *, workers: int) -> dict[str, str]:
        """Everything that decides the batches besides the number of ranks, as a user sets it -> its value."""
        settings: dict[str, object] = {"data.seed": self.config.seed, "data.num_workers": workers}
        settings |= {f"data.{name}": getattr(self.config, name) for name in ("expand_history", "max_seconds")}
        settings |= {f"data.batching.{name}": value for name, value in asdict(self.config.batching).items()}
        settings |= {"data.augmentation": self.augmentation, "data.mixture_by": self.mixture_by}
        settings["names of the train sources"] = ", ".join(source.name for source in self.sources)
        settings |= {f"tokens.{name}": value for name, value in asdict(self.config.tokens).items()}
        settings |= self.lists_of_shards()
        for source in self.sources:
            settings |= {f"{name} of source {source.name!r}": getattr(source, name) for name in ("weight", "repeat")}
            settings[f"tasks of source {source.name!r}"] = digest(repr(source.tasks))
        # Moved files are the same files, and validation changes no training batch.
        unimportant = ("tokens.tokenizer", "data.batching.validation_rows")
        return {name: str(value) for name, value in settings.items() if name not in unimportant}
