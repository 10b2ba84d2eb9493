"""Spoken replies with their codes, from the shards that the language model trains on: what token-to-speech learns from.

A training stream never ends, so every rank has as many batches as it asks for; a validation stream gives every rank the
same number. A resumed run draws other utterances than an uninterrupted one would: there is no state but the epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from random import Random

from torch.utils.data import IterableDataset, get_worker_info

from lightning_echat.contracts import SampleRejected, UserError, Utterance, VoiceBatch
from lightning_echat.data.decoding import parse_dialogue
from lightning_echat.data.loader import WorkerLoader
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.remote import LOCAL, ShardAccess
from lightning_echat.data.shard_deal import Deal, ShardOrder, parts_for
from lightning_echat.data.shards import ShardPart, expand_shards, read_shard
from lightning_echat.data.stream_items import StreamFailure, StreamHealth
from lightning_echat.data.utterances import UtteranceConfig, collate_utterances, read_utterance

_BARREN_ROUNDS = 2
"""Times that the shards may be read through without one usable utterance before the run stops."""


@dataclass(frozen=True, kw_only=True)
class VoiceReadingConfig(UtteranceConfig):
    """How utterances are read into batches.

    Attributes:
        rows: Utterances of a batch.
        segment_codes: Length of the stretch that is cut out of each at random; None takes it whole.
        shuffle: Utterances that a training batch is drawn from; those of a batch are of similar length.
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


class VoiceStream(IterableDataset[VoiceBatch]):
    """Batches of utterances.

    Args:
        config: See there.
        shards: Patterns, as for every stream.
        training: Shuffled and without end; otherwise each utterance once, whole and in order.
        salt: Changes the order, for instance the step that a run goes on from.
    """

    def __init__(self, config: VoiceReadingConfig, *, shards: list[str], training: bool, salt: str = "") -> None:
        super().__init__()
        self.config = config
        self.shards = expand_shards(shards, access=config.access)
        self.training = training
        self.salt = salt

    def __iter__(self) -> Iterator[VoiceBatch | StreamHealth | StreamFailure]:
        """Batches, then what was counted since; a `StreamFailure` instead of a `UserError`."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        counter = SkipCounter()
        try:
            stream = self._training if self.training else self._validation
            batches = stream(counter, worker, workers)
            for batch in batches:
                batch.health = counter.take()
                yield batch
            yield StreamHealth(counter.take())
        except UserError as error:
            yield StreamFailure(str(error))

    def _training(self, counter: SkipCounter, worker: int, workers: int) -> Iterator[VoiceBatch]:
        consumer = self.config.rank * workers + worker
        random = Random(f"{self.config.seed}/{self.salt}/voice/{consumer}")
        utterances = self._endless(counter, consumer, self.config.world_size * workers)
        while True:
            # Of similar length, so that little of a batch is padding.
            pool = sorted(islice(utterances, max(self.config.shuffle, self.config.rows)), key=lambda u: len(u.codes))
            batches = [pool[start : start + self.config.rows] for start in range(0, len(pool), self.config.rows)]
            random.shuffle(batches)
            for batch in batches:
                if len(batch) == self.config.rows:
                    yield self._collate([self._cut(utterance, random) for utterance in batch])

    def _endless(self, counter: SkipCounter, consumer: int, consumers: int) -> Iterator[Utterance]:
        """This consumer's share of one epoch after the other."""
        order = ShardOrder(
            Deal(parts=parts_for(len(self.shards), consumers)),
            num_shards=len(self.shards),
            consumers=consumers,
            seed=f"{self.config.seed}/{self.salt}/voice",
            repeat=True,
        )
        barren, limit = 0, _BARREN_ROUNDS * max(len(self.shards), consumers)
        for index in count(consumer, consumers):
            work = order.work(index)
            assert work is not None
            barren += 1
            part = ShardPart(path=self.shards[work.shard], part=work.part, parts=work.parts)
            for utterance in self._utterances(part, counter):
                barren = 0
                yield utterance
            if barren >= limit:
                raise UserError(_nothing(counter))

    def _validation(self, counter: SkipCounter, worker: int, workers: int) -> Iterator[VoiceBatch]:
        ranks = self.config.world_size
        # Everybody reads everything, and one counts.
        counting = counter if self.config.rank == worker == 0 else SkipCounter()
        everything = (u for path in self.shards for u in self._utterances(ShardPart(path=path), counting))
        number = -1
        while slot := list(islice(everything, self.config.rows * ranks)):
            number += 1
            if number % workers == worker:
                # A last batch without utterances is there all the same, so that all ranks have as many.
                yield self._collate(slot[self.config.rank :: ranks])
        if number < 0:
            raise UserError(_nothing(counting))

    def _utterances(self, part: ShardPart, counter: SkipCounter) -> Iterator[Utterance]:
        """The usable replies of a shard; those that cannot be used are counted by reason."""
        for stored in read_shard(part, counter=counter, access=self.config.access):
            try:
                parsed = parse_dialogue(stored)
            except SampleRejected as error:
                counter.reject(error, shard=stored.shard, key=stored.key)
                continue
            for number, turn in enumerate(parsed.sample.turns):
                if turn.role != "assistant":
                    continue
                try:
                    utterance = read_utterance(parsed, number, self.config)
                except SampleRejected as error:
                    counter.reject(error, shard=stored.shard, key=stored.key)
                    counter.check(max_share=self.config.max_skip_share)
                else:
                    counter.keep()
                    yield utterance

    def _cut(self, utterance: Utterance, random: Random) -> Utterance:
        length = self.config.segment_codes
        if length is None or len(utterance.codes) <= length:
            return utterance
        start = random.randrange(len(utterance.codes) - length + 1)
        first = int(start * self.config.samples_per_code)
        samples = int(length * self.config.samples_per_code)
        return Utterance(utterance.codes[start : start + length], utterance.waveform[first : first + samples])

    def _collate(self, utterances: list[Utterance]) -> VoiceBatch:
        if self.config.segment_codes is None or not self.training:
            return collate_utterances(utterances)
        # As long on every rank, so that a mean over ranks is one over samples.
        return collate_utterances(utterances, samples=int(self.config.segment_codes * self.config.samples_per_code))


class VoiceLoader(WorkerLoader):
    """Batches of a `VoiceStream`, whose counts are added up."""

    def __iter__(self) -> Iterator[VoiceBatch]:  # type: ignore[override]  # torch names its own iterator class
        """One pass, which for training has no end."""
        for item in self._items():
            self.health.merge(item.counts if isinstance(item, StreamHealth) else item.health)
            if isinstance(item, VoiceBatch):
                yield item


def _nothing(counter: SkipCounter) -> str:
    return f"the shards hold no reply with audio and codes: {counter.summary()}; add codes with echat data tokenize"
