"""A dataset of training batches that goes on exactly from any of them, run in torch's worker processes.

What is read and how it becomes batches is a worker's, a state machine whose state is numbers and references.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from os.path import commonprefix
from typing import Any, Protocol

from torch.utils.data import IterableDataset, get_worker_info

from lightning_echat.contracts import PackedBatch, UserError, VoiceBatch
from lightning_echat.data.mixture import SourceConfig
from lightning_echat.data.remote import ShardAccess
from lightning_echat.data.shard_deal import Deal, ShardOrder, parts_for
from lightning_echat.data.shards import expand_shards
from lightning_echat.data.stream_items import StreamEnd, StreamFailure
from lightning_echat.data.stream_state import Position, WorkerState


class StreamConfig(Protocol):
    """What the configs of all streams have: the seed of every draw, which of how many processes reads, and how."""

    @property
    def seed(self) -> int: ...  # noqa: D102
    @property
    def rank(self) -> int: ...  # noqa: D102
    @property
    def world_size(self) -> int: ...  # noqa: D102
    @property
    def access(self) -> ShardAccess: ...  # noqa: D102


class BatchWorker(Protocol):
    """Batches of one worker of one rank."""

    def next_batch(self) -> PackedBatch | VoiceBatch | None:
        """The next batch, None at the end."""
        ...

    def state(self) -> WorkerState:
        """What goes on after the last batch."""
        ...

    def end(self, number: int) -> StreamEnd:
        """What worker `number` hands over when there is no next batch."""
        ...


class ResumableStream(IterableDataset[Any]):
    """Batches from sources; endless as long as one of them is repeated.

    Args:
        config: What every stream of a run shares.
        sources: What is read.

    Attributes:
        shards: Of each source, in the order that deals number.
        position: Where the next pass over the stream begins; set by the loader.
    """

    def __init__(self, config: StreamConfig, *, sources: Sequence[SourceConfig]) -> None:
        super().__init__()
        self.config = config
        self.sources = list(sources)
        self.shards = [expand_shards(source.shards, access=config.access) for source in sources]
        self.position: Position | None = None

    def worker(self, *, consumer: int, orders: Sequence[ShardOrder], state: WorkerState | None) -> BatchWorker:
        """One worker's batches.

        Args:
            consumer: Number of the worker over all ranks.
            orders: The sequence of work of each source.
            state: Where this one goes on, None to begin.
        """
        raise NotImplementedError

    def made_by(self, *, workers: int) -> dict[str, str]:
        """Everything that decides the batches besides the number of ranks, as a user sets it -> its value."""
        raise NotImplementedError

    def lists_of_shards(self) -> dict[str, str]:
        """The part of `made_by` that names shards. Their folder may move."""
        # Character by character, as a path may be an address.
        root = len(commonprefix([path.rpartition("/")[0] for shards in self.shards for path in shards]))  # noqa: RUF071
        listed = {
            source.name: (len(shards), digest("\n".join(path[root:] for path in shards)))
            for source, shards in zip(self.sources, self.shards, strict=True)
        }
        return {f"list of shards of source {name!r}": f"{number} ({of})" for name, (number, of) in listed.items()}

    @property
    def finite(self) -> bool:
        """Whether the stream ends."""
        return not any(source.repeat for source in self.sources)

    def seed_of(self, source: SourceConfig) -> str:
        """What every draw of a source is seeded with."""
        return f"{self.config.seed}/{source.name}"

    def start(self, *, workers: int, passes: int = 0) -> Position:
        """Where a pass begins, with that many workers a rank."""
        consumers = self.config.world_size * workers
        deals = tuple(Deal(parts=parts_for(len(shards), consumers), epoch=passes) for shards in self.shards)
        return Position(deals=deals, workers=(None,) * workers, passes=passes)

    def orders(self, deals: Sequence[Deal], *, consumers: int) -> list[ShardOrder]:
        """The sequence of work of each source."""
        return [
            ShardOrder(
                deal,
                num_shards=len(self.shards[place]),
                consumers=consumers,
                seed=self.seed_of(source),
                repeat=source.repeat,
            )
            for place, (source, deal) in enumerate(zip(self.sources, deals, strict=True))
        ]

    def epochs(self, position: Position) -> dict[str, float]:
        """How often each source has been read, as the mean over this rank's workers."""
        workers = len(position.workers)
        consumers = self.config.world_size * workers
        first = self.config.rank * workers
        means = {}
        for place, order in enumerate(self.orders(position.deals, consumers=consumers)):
            items = [places[place].item for places in position.places]
            before = [order.epochs_before(item * consumers + first + number) for number, item in enumerate(items)]
            means[self.sources[place].name] = sum(before) / workers
        return means

    def __iter__(self) -> Iterator[PackedBatch | VoiceBatch | StreamEnd | StreamFailure]:
        """Batches of the worker that asks, each with (worker, state after it); a `StreamFailure` for a `UserError`."""
        info = get_worker_info()
        workers = info.num_workers if info else 1
        position = self.position or self.start(workers=workers)
        # Torch asks its worker 0 first; here the turn is that of whoever comes next.
        number = ((info.id if info else 0) + position.next_worker) % workers
        try:
            worker = self.worker(
                consumer=self.config.rank * workers + number,
                orders=self.orders(position.deals, consumers=self.config.world_size * workers),
                state=position.workers[number],
            )
            while (batch := worker.next_batch()) is not None:
                batch.position = (number, worker.state())
                yield batch
            while True:
                yield worker.end(number)
        except UserError as error:
            yield StreamFailure(str(error))


def digest(text: str) -> str:
    """A few letters that tell one text from another."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
