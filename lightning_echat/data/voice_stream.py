"""Spoken replies with their codes, from the shards that the language model trains on: what token-to-speech learns from.

A training stream never ends, so every rank has as many batches as it asks for; a validation stream gives every rank the
same number. A resumed run draws other utterances than an uninterrupted one would: there is no state but the epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import count, islice
from random import Random

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset, get_worker_info

from lightning_echat.contracts import SampleRejected, UserError, VoiceBatch
from lightning_echat.data.decoding import ParsedDialogue, decode_waveform, parse_dialogue
from lightning_echat.data.loader import WorkerLoader
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.remote import LOCAL, ShardAccess
from lightning_echat.data.shard_deal import Deal, ShardOrder, parts_for
from lightning_echat.data.shards import ShardPart, expand_shards, read_shard
from lightning_echat.data.stream_items import StreamFailure, StreamHealth

_MAX_DIFFERENCE = 2
"""Codes by which audio and codes may differ in length: what `echat data tokenize` allows."""
_BARREN_ROUNDS = 2
"""Times that the shards may be read through without one usable utterance before the run stops."""


@dataclass(frozen=True, kw_only=True)
class VoiceReadingConfig:
    """How utterances are read.

    Attributes:
        sample_rate: Hz of the waveforms.
        code_rate: Codes a second.
        codebook_size: Codes that are known; None for any.
        rows: Utterances of a batch.
        segment_codes: Length of the stretch that is cut out of each at random; None takes it whole.
        max_seconds: Longer utterances are skipped and counted.
        shuffle: Utterances that a training batch is drawn from; those of a batch are of similar length.
        max_skip_share: Share of unusable utterances past which a run stops.
        seed: Decides every draw.
        rank, world_size: Which of how many processes reads.
        access: How shards behind a URL are reached.
    """

    sample_rate: int
    code_rate: float = 25.0
    codebook_size: int | None = None
    rows: int = 16
    segment_codes: int | None = None
    max_seconds: float = 20.0
    shuffle: int = 256
    max_skip_share: float = 0.05
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    access: ShardAccess = field(default=LOCAL)

    def __post_init__(self) -> None:
        if self.rows < 1 or self.shuffle < 1 or self.max_seconds <= 0 or (self.segment_codes or 1) < 1:
            raise UserError("data: rows, shuffle, segment_codes and max_seconds must be positive")

    @property
    def samples_per_code(self) -> Fraction:
        """Exactly."""
        return Fraction(self.sample_rate) / Fraction(self.code_rate)


@dataclass(slots=True)
class Utterance:
    """[codes] int64 and the [samples] float32 that they stand for."""

    codes: Tensor
    waveform: Tensor


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
                    utterance = self._utterance(parsed, number)
                except SampleRejected as error:
                    counter.reject(error, shard=stored.shard, key=stored.key)
                    counter.check(max_share=self.config.max_skip_share)
                else:
                    counter.keep()
                    yield utterance

    def _utterance(self, parsed: ParsedDialogue, number: int) -> Utterance:
        codes, audio = parsed.sample.turns[number].speech_codes, parsed.audio[number]
        if codes is None or audio is None or not len(codes):
            raise SampleRejected("reply without codes" if audio is not None else "reply without audio")
        if self.config.codebook_size is not None and int(codes.max()) >= self.config.codebook_size:
            raise UserError(
                f"{parsed.sample.shard} {parsed.sample.key} holds speech code {int(codes.max())}, and the model knows "
                f"{self.config.codebook_size}; give the codebook_size that the shards were tokenized with"
            )
        waveform = decode_waveform(audio, max_seconds=self.config.max_seconds, sample_rate=self.config.sample_rate)
        if abs(len(waveform) / self.config.samples_per_code - len(codes)) > _MAX_DIFFERENCE:
            raise SampleRejected("codes and audio differ in length", f"{len(codes)} codes, {len(waveform)} samples")
        return Utterance(codes, _of_length(waveform, int(len(codes) * self.config.samples_per_code)))

    def _cut(self, utterance: Utterance, random: Random) -> Utterance:
        length = self.config.segment_codes
        if length is None or len(utterance.codes) <= length:
            return utterance
        start = random.randrange(len(utterance.codes) - length + 1)
        first = int(start * self.config.samples_per_code)
        samples = int(length * self.config.samples_per_code)
        return Utterance(utterance.codes[start : start + length], utterance.waveform[first : first + samples])

    def _collate(self, utterances: list[Utterance]) -> VoiceBatch:
        codes, waveforms = [u.codes for u in utterances], [u.waveform for u in utterances]
        if not utterances:
            codes, waveforms = [torch.zeros(0, dtype=torch.long)], [torch.zeros(0)]
        if self.config.segment_codes is not None and self.training:
            samples = int(self.config.segment_codes * self.config.samples_per_code)
            # As long on every rank, so that a mean over ranks is one over samples.
            waveforms[0] = torch.cat([waveforms[0], torch.zeros(max(0, samples - len(waveforms[0])))])
        return VoiceBatch(
            codes=pad_sequence(codes, batch_first=True)[: len(utterances)],
            code_lengths=torch.tensor([len(u.codes) for u in utterances], dtype=torch.long),
            waveforms=pad_sequence(waveforms, batch_first=True)[: len(utterances)],
            lengths=torch.tensor([len(u.waveform) for u in utterances], dtype=torch.long),
        )


class VoiceLoader(WorkerLoader):
    """Batches of a `VoiceStream`, whose counts are added up."""

    def __iter__(self) -> Iterator[VoiceBatch]:  # type: ignore[override]  # torch names its own iterator class
        """One pass, which for training has no end."""
        for item in self._items():
            self.health.merge(item.counts if isinstance(item, StreamHealth) else item.health)
            if isinstance(item, VoiceBatch):
                yield item


def _of_length(waveform: Tensor, samples: int) -> Tensor:
    return torch.nn.functional.pad(waveform[:samples], (0, max(0, samples - len(waveform))))


def _nothing(counter: SkipCounter) -> str:
    return f"the shards hold no reply with audio and codes: {counter.summary()}; add codes with echat data tokenize"
