"""Validation batches: every dialogue exactly once over all ranks, in the same number of batches on each."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from torch.utils.data import IterableDataset, get_worker_info

from lightning_echat.contracts import PackedBatch, UserError
from lightning_echat.data.batching import collate
from lightning_echat.data.dialogue_stream import DialogueReader, ReadingConfig
from lightning_echat.data.mixture import SourceConfig
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.shards import ShardPart, expand_shards
from lightning_echat.data.stream_items import StreamFailure, StreamHealth


class ValidationStream(IterableDataset[PackedBatch]):
    """Every dialogue of a set exactly once over all ranks and workers, in a fixed order, unaltered.

    Dialogue i belongs to rank i % world size, and the k-th batch of a rank to worker k % workers, in which order torch
    asks them. All ranks take the same number of batches: where dialogues are lacking or unusable a batch is smaller,
    or empty (one position of padding), but it is there.
    """

    def __init__(self, config: ReadingConfig, *, source: SourceConfig, name: str) -> None:
        super().__init__()
        if len(source.tasks) != 1:
            raise UserError(f"validation set {name!r} names {len(source.tasks)} tasks; make a set for each task")
        self.config = config
        self.source = source
        self.name = name
        self.task = source.tasks[0].task
        self.shards = expand_shards(source.shards, access=config.access)

    def __iter__(self) -> Iterator[PackedBatch | StreamHealth | StreamFailure]:
        """Batches, then what was counted since; a `StreamFailure` instead of a `UserError`."""
        info = get_worker_info()
        try:
            # A worker's own reader: tokenizers do not travel between processes.
            reader = DialogueReader(self.config)
            for batch in self._batches(reader, worker=info.id if info else 0, workers=info.num_workers if info else 1):
                batch.health = reader.counter.take()
                yield batch
            yield StreamHealth(reader.counter.take())
        except UserError as error:
            yield StreamFailure(str(error))

    def _batches(self, reader: DialogueReader, *, worker: int, workers: int) -> Iterator[PackedBatch]:
        """What one worker of this rank contributes."""
        rows, ranks = self.config.batching.validation_rows, self.config.world_size
        # All ranks and workers read past the same broken sidecars; one of them counts.
        counter = reader.counter if self.config.rank == worker == 0 else SkipCounter()
        everything = (
            placed.parsed
            for path in self.shards
            for placed in reader.parse(ShardPart(path=path), source=self.name, counter=counter)
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
