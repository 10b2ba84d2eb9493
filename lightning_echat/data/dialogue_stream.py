"""The reader: shards -> dialogues -> mels -> ids -> batches, as torch datasets and the loader over them.

Who reads what follows from (seed, world size, worker count) alone, so the same three give the same batches. A training
stream never ends and a validation stream yields every dialogue exactly once over all ranks, in the same number of
batches on each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from random import Random
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_echat.contracts import DialogueSample, PackedBatch, SampleRejected, TokenizedDialogue, UserError
from lightning_echat.data.augmentation import AugmentationConfig
from lightning_echat.data.batching import BatchingConfig, batch_rows, collate, pack_rows
from lightning_echat.data.clip_features import ClipFeatures
from lightning_echat.data.decoding import ParsedDialogue, parse_dialogue, with_audio
from lightning_echat.data.mixture import Mixture, SourceConfig, draw_task
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.remote import LOCAL, ShardAccess
from lightning_echat.data.shards import ShardPart, expand_shards, read_shard, training_parts
from lightning_echat.tokens.dialogue_template import DialogueTokenizer, TokensConfig
from lightning_echat.tokens.tasks import DialogueTask

_BARREN_ROUNDS = 4
"""Times that a repeating source may be read through without finding one dialogue before the run stops."""
_UNUSABLE_IN_A_ROW = 1000
"""Dialogues of one source rejected without a usable one between them before the run stops."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingConfig:
    """What every stream of a run shares.

    Attributes:
        tokens: What data and model agree on.
        batching: See there.
        seed: Decides every draw.
        rank, world_size: Which of how many processes reads.
        expand_history: Each exchange of a longer dialogue is a sample of its own, with what precedes as history.
        max_skip_share: Share of skipped samples past which a run stops.
        max_seconds: Longest clip; longer ones are skipped and counted.
        mels_on_device: Batches carry waveforms, to be made mels by `clip_features.make_log_mels`.
        access: How shards behind a URL are reached.
    """

    tokens: TokensConfig
    batching: BatchingConfig = field(default_factory=BatchingConfig)
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    expand_history: bool = True
    max_skip_share: float = 0.05
    max_seconds: float = 30.0
    mels_on_device: bool = False
    access: ShardAccess = LOCAL


class DialogueReader:
    """Stored dialogues to tokenized ones. Holds what is built once: tokenizer, filter bank, counters."""

    def __init__(self, config: ReadingConfig, *, augmentation: AugmentationConfig | None = None) -> None:
        self.config = config
        self.counter = SkipCounter()
        self.tokenizer = DialogueTokenizer.from_config(config.tokens)
        self.padding = self.tokenizer.vocabulary.padding
        self._features = ClipFeatures(
            mel_bins=config.tokens.mel_bins, on_device=config.mels_on_device, augmentation=augmentation
        )

    def parse(self, part: ShardPart, *, source: str, counter: SkipCounter | None = None) -> Iterator[ParsedDialogue]:
        """The dialogues of a shard, history expanded, audio still encoded; unusable ones are counted in `counter`."""
        counter = self.counter if counter is None else counter
        for stored in read_shard(part, counter=counter, access=self.config.access):
            try:
                parsed = parse_dialogue(stored, source=source)
            except SampleRejected as error:
                self._skip(error, counter, shard=stored.shard, key=stored.key)
                continue
            yield from parsed.prefixes() if self.config.expand_history else [parsed]

    def tokenize(
        self, parsed: ParsedDialogue, task: DialogueTask, *, random: Random | None = None
    ) -> TokenizedDialogue | None:
        """The dialogue as the model sees it, or None, and counted, where it cannot be used.

        Args:
            parsed: What `parse` yields.
            task: Which template.
            random: Draws augmentation and wording; without it nothing is altered and the first wording is used.
        """
        try:
            sample = self.with_mels(parsed, task, random=random)
            choice = random.randrange(2**16) if random else 0
            dialogue = self.tokenizer.tokenize(sample, task, choice=choice)
            self._features.complete(dialogue, sample, heard_turns(sample, task), random=random)
            if len(dialogue.input_ids) > self.config.batching.max_ids:
                raise SampleRejected("longer than max_ids", f"{len(dialogue.input_ids)} ids")
        except SampleRejected as error:
            self._skip(error, self.counter, shard=parsed.sample.shard, key=parsed.sample.key)
            return None
        self.counter.keep()
        return dialogue

    def with_mels(self, parsed: ParsedDialogue, task: DialogueTask, *, random: Random | None = None) -> DialogueSample:
        """The dialogue with audio and mel of the turns that the task hears, altered where `random` is given.

        Raises:
            SampleRejected: Audio is unusable.
        """
        heard = heard_turns(parsed.sample, task)
        sample = with_audio(parsed, turns=heard, max_seconds=self.config.max_seconds, counter=self.counter)
        return self._features.with_mels(sample, heard, random=random)

    def _skip(self, error: SampleRejected, counter: SkipCounter, *, shard: str, key: str) -> None:
        counter.reject(error, shard=shard, key=key)
        counter.check(max_share=self.config.max_skip_share)


def heard_turns(sample: DialogueSample, task: DialogueTask) -> list[int]:
    """Places of the turns that the task listens to: all the user's in a conversation, else the last one."""
    if not task.traits.listens:
        return []
    places = [place for place, turn in enumerate(sample.turns) if turn.role == "user"]
    return places if task.traits.converses else places[-1:]


@dataclass(frozen=True, slots=True)
class StreamFailure:
    """A user's mistake that a worker met; travels as an item, as torch wraps a worker's exception in a traceback."""

    message: str


@dataclass(frozen=True, slots=True)
class StreamHealth:
    """What was counted after a worker's last batch; the loader adds it up and hands it to nobody."""

    counts: dict[str, int]


class _Stream(IterableDataset[PackedBatch]):
    """What both streams share: batches, or the failure that ended them."""

    def __init__(self, config: ReadingConfig) -> None:
        super().__init__()
        self.config = config
        # Shared with the workers, which may outlive a pass and must not repeat the one before.
        self._passes = torch.zeros(1, dtype=torch.long).share_memory_()

    def start_pass(self) -> None:
        """Called by the loader, in its process, before each pass over the stream."""
        self._passes += 1

    @property
    def passes(self) -> int:
        """Passes begun before this one."""
        return max(int(self._passes) - 1, 0)

    def __iter__(self) -> Iterator[Any]:
        """Batches, then what was counted since; a `StreamFailure` instead of a `UserError`."""
        info = get_worker_info()
        try:
            reader = self.reader()
            for batch in self.batches(reader, worker=info.id if info else 0, workers=info.num_workers if info else 1):
                batch.health = reader.counter.take()
                yield batch
            yield StreamHealth(reader.counter.take())
        except UserError as error:
            yield StreamFailure(str(error))

    def reader(self) -> DialogueReader:
        """A worker's own reader: tokenizers do not travel between processes."""
        return DialogueReader(self.config)

    def batches(self, reader: DialogueReader, *, worker: int, workers: int) -> Iterator[PackedBatch]:
        """What one worker of this rank contributes."""
        raise NotImplementedError


class TrainingStream(_Stream):
    """Endless batches from a mixture of sources.

    `resume_step` enters every seed: a run that goes on from a checkpoint draws a new order, not the old one again.
    """

    def __init__(
        self,
        config: ReadingConfig,
        *,
        sources: Sequence[SourceConfig],
        augmentation: AugmentationConfig | None = None,
        resume_step: int = 0,
    ) -> None:
        super().__init__(config)
        self.sources = list(sources)
        self.shards = [expand_shards(source.shards, access=config.access) for source in sources]
        self.augmentation = augmentation
        self.resume_step = resume_step

    def reader(self) -> DialogueReader:
        """A reader that augments."""
        return DialogueReader(self.config, augmentation=self.augmentation)

    def batches(self, reader: DialogueReader, *, worker: int, workers: int) -> Iterator[PackedBatch]:
        """What one worker of this rank contributes."""
        config = self.config
        consumer = config.rank * workers + worker
        consumers = config.world_size * workers
        seed = f"{config.seed}/{self.resume_step}/{self.passes}"
        streams = [
            self._source(place, reader, consumer=consumer, consumers=consumers, seed=f"{seed}/{source.name}")
            for place, source in enumerate(self.sources)
        ]
        mixture = Mixture(streams, [source.weight for source in self.sources], Random(f"{seed}/mixture/{consumer}"))
        random = Random(f"{seed}/batches/{consumer}")
        for rows in batch_rows(mixture, config=config.batching, random=random):
            yield pack_rows(rows, padding=reader.padding, mel_bins=config.tokens.mel_bins)

    def _source(
        self, place: int, reader: DialogueReader, *, consumer: int, consumers: int, seed: str
    ) -> Iterator[TokenizedDialogue]:
        """The usable dialogues of one source, each with a task drawn for it."""
        source = self.sources[place]
        random = Random(f"{seed}/{consumer}")
        parts = training_parts(
            self.shards[place], consumer=consumer, consumers=consumers, seed=seed, repeat=source.repeat
        )
        limit = _BARREN_ROUNDS * max(len(self.shards[place]), consumers)
        stored = _until_barren(parts, reader, source=source.name, limit=limit)
        unusable = 0
        for parsed in _shuffled(stored, size=self.config.batching.shuffle, random=random):
            task = draw_task(source.tasks, random=random)
            dialogue = reader.tokenize(parsed, task, random=random)
            unusable = 0 if dialogue is not None else unusable + 1
            if dialogue is not None:
                reader.counter.draw(f"{source.name}/{task.name}")
                yield dialogue
            elif unusable >= _UNUSABLE_IN_A_ROW:
                raise UserError(f"source {source.name!r} gives no usable sample: {reader.counter.summary()}")


def _until_barren(
    parts: Iterator[ShardPart], reader: DialogueReader, *, source: str, limit: int
) -> Iterator[ParsedDialogue]:
    """The dialogues of all parts; `UserError` after `limit` parts in which nothing was found usable at all."""
    barren = 0
    for part in parts:
        barren += 1
        for parsed in reader.parse(part, source=source):
            barren = 0
            yield parsed
        if barren >= limit:
            raise UserError(f"source {source!r} holds no usable sample: {reader.counter.summary()}")


def _shuffled(stored: Iterator[ParsedDialogue], *, size: int, random: Random) -> Iterator[ParsedDialogue]:
    """A buffer of `size` dialogues, from which each next one is drawn at random."""
    buffer: list[ParsedDialogue] = []
    for parsed in stored:
        if len(buffer) < size:
            buffer.append(parsed)
            continue
        place = random.randrange(size)
        drawn, buffer[place] = buffer[place], parsed
        yield drawn
    random.shuffle(buffer)
    yield from buffer


class ValidationStream(_Stream):
    """Every dialogue of a set exactly once over all ranks and workers, in a fixed order, unaltered.

    Dialogue i belongs to rank i % world size, and the k-th batch of a rank to worker k % workers, in which order torch
    asks them. All ranks take the same number of batches: where dialogues are lacking or unusable a batch is smaller,
    or empty (one position of padding), but it is there.
    """

    def __init__(self, config: ReadingConfig, *, source: SourceConfig, name: str) -> None:
        super().__init__(config)
        if len(source.tasks) != 1:
            raise UserError(f"validation set {name!r} names {len(source.tasks)} tasks; make a set for each task")
        self.source = source
        self.name = name
        self.task = source.tasks[0].task
        self.shards = expand_shards(source.shards, access=config.access)

    def batches(self, reader: DialogueReader, *, worker: int, workers: int) -> Iterator[PackedBatch]:
        """What one worker of this rank contributes."""
        rows, ranks = self.config.batching.validation_rows, self.config.world_size
        # All ranks and workers read past the same broken sidecars; one of them counts.
        counter = reader.counter if self.config.rank == worker == 0 else SkipCounter()
        everything = (
            parsed
            for path in self.shards
            for parsed in reader.parse(ShardPart(path=path), source=self.name, counter=counter)
        )
        # Reading past what belongs to others costs a tenth of decoding it.
        batch_number = -1
        while slot := list(islice(everything, rows * ranks)):
            batch_number += 1
            if batch_number % workers == worker:
                dialogues = [reader.tokenize(parsed, self.task) for parsed in slot[self.config.rank :: ranks]]
                usable = [dialogue for dialogue in dialogues if dialogue is not None]
                yield collate(usable, padding=reader.padding, mel_bins=self.config.tokens.mel_bins)
        if batch_number < 0:
            raise UserError(f"validation set {self.name!r} holds no usable sample: {counter.summary()}")


class DialogueLoader(DataLoader[PackedBatch]):
    """Torch's loader over a stream, which raises a worker's `UserError` as one and adds up what was counted.

    Attributes:
        health: Totals over all batches handed out so far.
    """

    health: SkipCounter

    @classmethod
    def over(cls, stream: _Stream, *, num_workers: int, pin_memory: bool = False) -> DialogueLoader:
        """A loader that hands out the stream's batches as they are.

        Training keeps its workers; those of a validation set end with each pass, as several sets would fill the memory.
        """
        loader = cls(
            stream,
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=num_workers > 0 and isinstance(stream, TrainingStream),
            pin_memory=pin_memory,
            collate_fn=_as_it_is,
            worker_init_fn=_single_thread,
        )
        loader.health = SkipCounter()
        return loader

    def __iter__(self) -> Iterator[PackedBatch]:  # type: ignore[override]  # torch names its own iterator class
        """One pass over the stream."""
        assert isinstance(self.dataset, _Stream)
        self.dataset.start_pass()
        for item in super().__iter__():
            if isinstance(item, StreamFailure):
                raise UserError(item.message)
            self.health.merge(item.counts if isinstance(item, StreamHealth) else item.health)
            if isinstance(item, PackedBatch):
                yield item


def _as_it_is(item: Any) -> Any:
    return item


def _single_thread(worker: int) -> None:
    # Each worker is one core's worth; more threads would fight the trainer for the others.
    torch.set_num_threads(1)
