"""Training batches of utterances, which go on exactly from any of them as those of dialogues do."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from lightning_echat.contracts import UserError, Utterance, VoiceBatch
from lightning_echat.data.mixture import SourceConfig
from lightning_echat.data.resumable_stream import ResumableStream
from lightning_echat.data.shard_deal import ShardOrder
from lightning_echat.data.source_reader import SampleRef, SourceReader, gone, held_refs, pack_refs, read_refs
from lightning_echat.data.stream_items import StreamEnd
from lightning_echat.data.stream_state import Waiting, WorkerState, waiting_refs
from lightning_echat.data.utterances import collate_utterances
from lightning_echat.data.voice_stream import VoiceReader, VoiceReadingConfig

_BATCHES_AT_ONCE = 16
"""Batches whose utterances are drawn together and sorted by length, so that little of a batch is padding."""
_UNUSABLE_IN_A_ROW = 1000
"""Utterances rejected without a usable one between them before the run stops."""


class VoiceWorker:
    """Batches of one worker of one rank.

    Args:
        stream: Settings and shards.
        consumer: Number of the worker over all ranks.
        order: The sequence of work.
        state: Where this one goes on, None to begin.
    """

    def __init__(
        self, stream: VoiceTrainingStream, *, consumer: int, order: ShardOrder, state: WorkerState | None
    ) -> None:
        (source,) = stream.sources
        self._config, self._seed, self._consumer = stream.config, stream.seed_of(source), consumer
        self._reader = VoiceReader(stream.config)
        self._source = SourceReader(
            source,
            stream.shards[0],
            self._reader,
            order=order,
            consumer=consumer,
            seed=self._seed,
            size=stream.config.shuffle,
        )
        self._ready: list[tuple[SampleRef, Utterance]] = []
        self._unusable = state["unusable"][0] if state else 0
        if state:
            self._reader.counter.resume(state["counts"])
            self._refill(state)

    def next_batch(self) -> VoiceBatch:
        """The next batch; there always is one."""
        rows = self._config.rows
        if len(self._ready) < rows:
            self._prepare()
        taken, self._ready = self._ready[:rows], self._ready[rows:]
        length = self._config.segment_codes
        # As long on every rank, so that a mean over ranks is one over samples.
        samples = int(length * self._config.samples_per_code) if length else 0
        batch = collate_utterances([self._cut(utterance, ref) for ref, utterance in taken], samples=samples)
        batch.health = self._reader.counter.take()
        return batch

    def state(self) -> WorkerState:
        """What goes on after the last batch."""
        return WorkerState(
            sources=[self._source.state()],
            drawn=[],
            unusable=[self._unusable],
            window=pack_refs(Waiting(0, 0, *ref) for ref, _ in self._ready),
            counts=dict(self._reader.counter.counts),
        )

    def end(self, number: int) -> StreamEnd:
        """Asked of every worker; this one has no end."""
        return StreamEnd(number, self._reader.counter.take(), 0)

    def _refill(self, state: WorkerState) -> None:
        """Read again what the buffer held and what was ready."""
        held, ready = state["sources"][0], [entry.ref for entry in waiting_refs(state)]
        found = read_refs(held_refs(held) + ready, self._reader, source=self._source.source, shards=self._source.shards)
        self._source.resume(held, found)
        with self._reader.counter.ignoring():
            for ref in ready:
                utterance = self._reader.utterance(found[ref[:3]], ref.exchange)
                if utterance is None:
                    raise gone(self._source.shards[ref.shard], ref.ordinal)
                self._ready.append((ref, utterance))

    def _prepare(self) -> None:
        """Draw utterances for several batches: those of a batch of similar length, the batches in any order."""
        rows = self._config.rows
        random = Random(f"{self._seed}/batches/{self._consumer}/{self._source.draws}")
        while len(self._ready) < rows * _BATCHES_AT_ONCE:
            self._ready.append(self._draw())
        self._ready.sort(key=lambda entry: len(entry[1].codes))
        batches = [self._ready[start : start + rows] for start in range(0, len(self._ready), rows)]
        random.shuffle(batches)
        # One that is not full goes last, where the next ones join it.
        batches.sort(key=lambda batch: len(batch) < rows)
        self._ready = [entry for batch in batches for entry in batch]

    def _draw(self) -> tuple[SampleRef, Utterance]:
        while True:
            drawn = self._source.draw()
            assert drawn is not None, "the source repeats"
            utterance = self._reader.utterance(drawn.parsed, drawn.ref.exchange)
            if utterance is not None:
                self._unusable = 0
                return drawn.ref, utterance
            self._unusable += 1
            if self._unusable >= _UNUSABLE_IN_A_ROW:
                raise UserError(f"the shards hold no usable reply: {self._reader.counter.summary()}")

    def _cut(self, utterance: Utterance, ref: SampleRef) -> Utterance:
        length = self._config.segment_codes
        if length is None or len(utterance.codes) <= length:
            return utterance
        random = Random(f"{self._seed}/{ref.epoch}/{ref.shard}/{ref.ordinal}/{ref.exchange}")
        start = random.randrange(len(utterance.codes) - length + 1)
        first = int(start * self._config.samples_per_code)
        samples = int(length * self._config.samples_per_code)
        waveform = utterance.waveform[first : first + samples]
        return Utterance(utterance.codes[start : start + length], waveform, utterance.speaker)


class VoiceTrainingStream(ResumableStream):
    """Batches of utterances without end, shuffled, every utterance once an epoch over all ranks.

    Args:
        config: See there.
        source: The shards; its tasks and weight mean nothing here.
    """

    config: VoiceReadingConfig

    def __init__(self, config: VoiceReadingConfig, *, source: SourceConfig) -> None:
        super().__init__(config, sources=[source])

    def worker(self, *, consumer: int, orders: Sequence[ShardOrder], state: WorkerState | None) -> VoiceWorker:
        """See `ResumableStream`."""
        return VoiceWorker(self, consumer=consumer, order=orders[0], state=state)

    def made_by(self, *, workers: int) -> dict[str, str]:
        """Everything that decides the batches besides the number of ranks, as a user sets it -> its value."""
        names = ("seed", "sample_rate", "code_rate", "rows", "segment_codes", "shuffle", "max_seconds")
        settings = {f"data.{name}": str(getattr(self.config, name)) for name in names}
        return {**settings, "data.num_workers": str(workers), **self.lists_of_shards()}
