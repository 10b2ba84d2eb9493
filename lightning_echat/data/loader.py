"""Torch's loader over our streams: worker processes that end in one line, add up their counts and take turns."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info

from lightning_echat.contracts import PackedBatch, UserError
from lightning_echat.data.batch_memory import HandedBatch
from lightning_echat.data.batching import collate
from lightning_echat.data.ranks import Ranks
from lightning_echat.data.read_errors import NOTICED, SkipCounter
from lightning_echat.data.resumable_stream import ResumableStream
from lightning_echat.data.stream_items import StreamEnd, StreamFailure, StreamHealth
from lightning_echat.data.stream_state import Position
from lightning_echat.data.training_stream import TrainingStream
from lightning_echat.data.validation_stream import ValidationStream


class WorkerLoader(DataLoader[PackedBatch]):
    """What all loaders share.

    Workers end with each pass. They are started once in a training without end, and those of several validation sets
    would fill the memory if they stayed.

    Attributes:
        health: Totals over all batches handed out so far.
    """

    health: SkipCounter

    def __init__(self, stream: Any, *, num_workers: int, pin_memory: bool = False) -> None:
        super().__init__(
            stream,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=pin_memory,
            collate_fn=_handed_over,
            worker_init_fn=_start_worker,
            # A fork has imported everything, and ends when its trainer is killed; a fork server's children do not.
            multiprocessing_context="fork" if num_workers else None,
        )
        self.health = SkipCounter()

    def _items(self) -> Iterator[Any]:
        """What the workers yield, in turn; their `StreamFailure` as the `UserError` it was."""
        for item in super().__iter__():
            if isinstance(item, StreamFailure):
                raise UserError(item.message)
            yield item.batch() if isinstance(item, HandedBatch) else item


class ValidationLoader(WorkerLoader):
    """One pass after the other over a validation set.

    Args:
        stream: The set.
        num_workers: Reading processes; 0 reads in this one.
        pin_memory: For a GPU.
    """

    def __init__(self, stream: ValidationStream, *, num_workers: int, pin_memory: bool = False) -> None:
        super().__init__(stream, num_workers=num_workers, pin_memory=pin_memory)

    def __iter__(self) -> Iterator[PackedBatch]:  # type: ignore[override]  # torch names its own iterator class
        """One pass over the set."""
        for item in self._items():
            self.health.merge(item.counts if isinstance(item, StreamHealth) else item.health)
            if isinstance(item, PackedBatch):
                yield item


class PredictionBatches:
    """A loader's passes as an iterable of no other kind: to predict, Lightning would build any `DataLoader` anew."""

    def __init__(self, loader: ValidationLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[PackedBatch]:
        """One pass over the set."""
        return iter(self._loader)


class TrainingLoader(WorkerLoader):
    """Training batches, packed or of utterances, that carry the position after them; it goes on from any of those.

    Iterating again goes on after the last batch handed out; what workers had prepared beyond it is read once more.

    Args:
        stream: The mixture, or the utterances.
        num_workers: Reading processes; 0 reads in this one.
        ranks: The processes of the job.
        position: Where to begin, None for the beginning.
        pin_memory: For a GPU.

    Attributes:
        stream: As given.
        position: After the last batch handed out.
    """

    stream: ResumableStream
    position: Position

    def __init__(
        self,
        stream: ResumableStream,
        *,
        num_workers: int,
        ranks: Ranks | None = None,
        position: Position | None = None,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(stream, num_workers=num_workers, pin_memory=pin_memory)
        self.stream = stream
        self._ranks = ranks or Ranks()
        self._workers = max(num_workers, 1)
        self._padding = 0
        self.position = position or stream.start(workers=self._workers)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names its own iterator class
        """Batches from `position` on: without end, or to the end of a pass over sources that are not repeated."""
        batches = self._own_batches()
        for batch in self._in_step(batches) if self.stream.finite else batches:
            self.position = batch.position
            yield batch

    def _own_batches(self) -> Iterator[Any]:
        """This rank's batches, to the end of its last worker."""
        position = self.stream.position = self.position
        ended: set[int] = set()
        for item in self._items():
            if isinstance(item, StreamEnd):
                self.health.merge(item.counts)
                self._padding = item.padding
                ended.add(item.worker)
                if len(ended) == self._workers:
                    return
            else:
                position = item.position = position.after(*item.position)
                self.health.merge(item.health)
                yield item

    def _in_step(self, batches: Iterator[PackedBatch]) -> Iterator[PackedBatch]:
        """As many batches on every rank: one that has run dry goes on with empty ones until all have.

        Each is handed out once it is known whether another follows, as after the last the next pass begins.
        """
        held: PackedBatch | None = None
        while (batch := self._next_in_step(batches, held)) is not None:
            if held is not None:
                yield held
            held = batch
        if held is None:
            raise UserError(f"the train sources hold no usable sample: {self.health.summary()}")
        held.position = self.stream.start(workers=self._workers, passes=self.position.passes + 1)
        yield held

    def _next_in_step(self, batches: Iterator[PackedBatch], held: PackedBatch | None) -> PackedBatch | None:
        """This rank's next batch, an empty one while only others have one, None when nobody has."""
        batch, failure = None, ""
        try:
            batch = next(batches, None)
        except UserError as error:
            failure = str(error)
        has_batch, has_failed = self._ranks.any_of(batch is not None, bool(failure))
        if has_failed:
            # All stop, rather than wait for the one that has.
            raise UserError(failure or "the training data of another rank failed; its own line says why")
        if batch is None and has_batch:
            batch = self._empty_batch(held.position if held else self.position)
        return batch

    def _empty_batch(self, position: Position) -> PackedBatch:
        assert isinstance(self.stream, TrainingStream), "only a mixture ends"
        batch = collate([], padding=self._padding, mel_bins=self.stream.config.tokens.mel_bins)
        batch.health = {f"{NOTICED}step without a sample": 1}
        self.health.merge(batch.health)
        batch.position = position
        return batch


def _handed_over(item: Any) -> Any:
    """What a worker process sends for an item; torch calls this there, and in this process where there are none."""
    return HandedBatch.of(item) if isinstance(item, PackedBatch) and get_worker_info() else item


def _start_worker(worker: int) -> None:
    # Each worker is one core's worth; more threads would fight the trainer for the others.
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_the_trainer, daemon=True).start()


def _end_with_the_trainer() -> None:
    """End this process once the trainer is gone.

    Torch's worker notices a killed trainer too, but then waits for ever to hand over what it had prepared: it holds
    the other end of that pipe itself.
    """
    trainer = multiprocessing.parent_process()
    while trainer is not None and os.getppid() == trainer.pid:
        time.sleep(1)
    os._exit(1)
