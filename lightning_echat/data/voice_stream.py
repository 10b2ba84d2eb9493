"""Spoken replies with their codes, from the shards that the language model trains on: what token-to-speech learns from.

Read here, in validation one pass after the other, in as many batches on every rank. `voice_training` makes training
batches of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from torch.utils.data import IterableDataset, get_worker_info

from lightning_echat.contracts import SampleRejected, UserError, Utterance, VoiceBatch
from lightning_echat.data.decoding import ParsedDialogue, parse_dialogue
from lightning_echat.data.loader import WorkerLoader
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.remote import LOCAL, ShardAccess
from lightning_echat.data.shard_reader import PlacedDialogue, ShardReader
from lightning_echat.data.shards import ShardPart, expand_shards
from lightning_echat.data.stream_items import StreamFailure, StreamHealth
from lightning_echat.data.tar_samples import StoredSample
from lightning_echat.data.utterances import UtteranceConfig, collate_utterances, read_utterance, what_lacks


@dataclass(frozen=True, kw_only=True)
class VoiceReadingConfig(UtteranceConfig):
    """How utterances are read into batches.

    Attributes:
        rows: Utterances of a batch.
        segment_codes: Length of the stretch that is cut out of each at random; None takes it whole.
        shuffle: Utterances that training draws from.
        max_skip_share: Share of unusable utterances past which a run stops.
        seed: Decides every draw.
        rank, world_size: Which of how many processes reads.
        access: How shards behind a URL are reached.
    """

    rows: int = 16
    segment_codes: int | None = None
    shuffle: int = 256
    max_skip_share: float = 0.05
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    access: ShardAccess = field(default=LOCAL)

    def __post_init__(self) -> None:
        if self.rows < 1 or self.shuffle < 1 or self.max_seconds <= 0 or (self.segment_codes or 1) < 1:
            raise UserError("data: rows, shuffle, segment_codes and max_seconds must be positive")


class VoiceReader(ShardReader):
    """Stored dialogues to utterances: an exchange is a reply with codes and audio."""

    remedy = "; add codes with echat data tokenize"

    def __init__(self, config: VoiceReadingConfig) -> None:
        super().__init__(access=config.access, max_skip_share=config.max_skip_share)
        self.config = config

    def utterance(self, parsed: ParsedDialogue, exchange: int) -> Utterance | None:
        """A reply as it sounds, None, and counted, where it cannot be used."""
        sample = parsed.sample
        try:
            utterance = read_utterance(parsed, _replies(parsed)[exchange], self.config)
        except SampleRejected as error:
            self._skip(error, self.counter, shard=sample.shard, key=sample.key)
            return None
        if self.config.speaker_size and utterance.speaker is None:
            self.counter.notice("reply without speaker embedding", shard=sample.shard, key=sample.key)
        self.counter.keep()
        return utterance

    def _exchanges(self, stored: StoredSample, source: str, counter: SkipCounter) -> Iterator[PlacedDialogue]:
        try:
            parsed = parse_dialogue(stored, source=source)
        except SampleRejected as error:
            self._skip(error, counter, shard=stored.shard, key=stored.key)
            return
        for number, turn in enumerate(parsed.sample.turns):
            if turn.role == "assistant" and (lacking := what_lacks(parsed, number)):
                self._skip(SampleRejected(lacking), counter, shard=stored.shard, key=stored.key)
        for exchange in range(len(_replies(parsed))):
            yield PlacedDialogue(stored.ordinal, exchange, parsed)


class VoiceStream(IterableDataset[VoiceBatch]):
    """Batches of a validation: each utterance once, whole and in order.

    Args:
        config: See there.
        shards: Patterns, as for every stream.
    """

    def __init__(self, config: VoiceReadingConfig, *, shards: list[str]) -> None:
        super().__init__()
        self.config = config
        self.shards = expand_shards(shards, access=config.access)

    def __iter__(self) -> Iterator[VoiceBatch | StreamHealth | StreamFailure]:
        """Batches, then what was counted since; a `StreamFailure` instead of a `UserError`."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        reader = VoiceReader(self.config)
        # Everybody reads everything, and one counts.
        counter = reader.counter if self.config.rank == worker == 0 else SkipCounter()
        try:
            for batch in self._batches(reader, worker, workers):
                batch.health = counter.take()
                yield batch
            yield StreamHealth(counter.take())
        except UserError as error:
            yield StreamFailure(str(error))

    def _batches(self, reader: VoiceReader, worker: int, workers: int) -> Iterator[VoiceBatch]:
        ranks = self.config.world_size
        everything = self._utterances(reader)
        number = -1
        while slot := list(islice(everything, self.config.rows * ranks)):
            number += 1
            if number % workers == worker:
                # A last batch without utterances is there all the same, so that all ranks have as many.
                yield collate_utterances(slot[self.config.rank :: ranks])
        if number < 0:
            summary = reader.counter.summary()
            raise UserError(f"the shards hold no reply with audio and codes: {summary}{reader.remedy}")

    def _utterances(self, reader: VoiceReader) -> Iterator[Utterance]:
        for path in self.shards:
            for placed in reader.parse(ShardPart(path=path), source=""):
                if (utterance := reader.utterance(placed.parsed, placed.exchange)) is not None:
                    yield utterance


class VoiceLoader(WorkerLoader):
    """Batches of a `VoiceStream`, whose counts are added up."""

    def __iter__(self) -> Iterator[VoiceBatch]:  # type: ignore[override]  # torch names its own iterator class
        """One pass."""
        for item in self._items():
            self.health.merge(item.counts if isinstance(item, StreamHealth) else item.health)
            if isinstance(item, VoiceBatch):
                yield item


def _replies(parsed: ParsedDialogue) -> list[int]:
    """The turns that exchanges are numbered by."""
    turns = enumerate(parsed.sample.turns)
    return [number for number, turn in turns if turn.role == "assistant" and not what_lacks(parsed, number)]
