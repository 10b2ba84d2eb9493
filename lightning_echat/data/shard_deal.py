"""Who reads which part of which shard, and what is left to read when the number of readers changes.

A consumer is one worker process of one rank. All consumers step through one sequence of work, each epoch's own shuffle
of the shards after the other, and consumer c of C takes the elements c, c + C, c + 2C, … So an epoch is read once
among them all, and the place of each is one number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple


class Work(NamedTuple):
    """A part of a shard: the dialogues whose place leaves the remainder `part` divided by `parts`.

    Attributes:
        epoch: In which pass over the source.
        shard: Place in the source's list.
        part, parts: See above.
        ordinal, exchange: Begin with the dialogue at place `ordinal`, of which `exchange` exchanges are done.
    """

    epoch: int
    shard: int
    part: int
    parts: int
    ordinal: int = 0
    exchange: int = 0


class Place(NamedTuple):
    """How far a consumer is: working on its `item`-th piece of work, at `ordinal` with `exchange` exchanges done.

    An `ordinal` of -1 says that the piece has given nothing yet.
    """

    item: int = 0
    ordinal: int = -1
    exchange: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Deal:
    """The sequence of work: what an earlier deal left over, the rest of an epoch, then whole epochs.

    Attributes:
        parts: Into how many parts the shards of `epoch` are cut.
        epoch, start: The sequence goes on with this epoch's order, from its element `start`.
        left: What comes before.
    """

    parts: int
    epoch: int = 0
    start: int = 0
    left: tuple[Work, ...] = ()


def parts_for(num_shards: int, consumers: int) -> int:
    """Parts to cut each shard into, so that no consumer lacks a source, which would bend the weights of a mixture."""
    return -(-consumers // num_shards)


class ShardOrder:
    """A deal's sequence, element by element. Holds the order of one epoch.

    Args:
        deal: The sequence.
        num_shards: Shards of the source.
        consumers: Ranks times workers.
        seed: Decides the order of every epoch.
        repeat: Whether epochs follow the deal's own.
    """

    def __init__(self, deal: Deal, *, num_shards: int, consumers: int, seed: str, repeat: bool) -> None:
        self.deal = deal
        self.consumers = consumers
        self._num_shards = num_shards
        self._later_parts = parts_for(num_shards, consumers)
        self._seed = seed
        self._repeat = repeat
        self._shuffled: tuple[int, list[int]] = (-1, [])

    def work(self, index: int) -> Work | None:
        """The element at `index`, None past the end of a source that is not repeated."""
        if index < len(self.deal.left):
            return self.deal.left[index]
        epoch, element, parts = self.locate(index)
        if epoch != self.deal.epoch and not self._repeat:
            return None
        if epoch != self._shuffled[0]:
            order = list(range(self._num_shards * parts))
            Random(f"{self._seed}/shards/{epoch}").shuffle(order)
            self._shuffled = (epoch, order)
        shard, part = divmod(self._shuffled[1][element], parts)
        return Work(epoch, shard, part, parts)

    @property
    def epoch_length(self) -> int:
        """Elements of the deal's own epoch, read or not."""
        return self._num_shards * self.deal.parts

    def locate(self, index: int) -> tuple[int, int, int]:
        """Epoch, element of its order and parts of the sequence's element `index`, which must not be left over."""
        deal = self.deal
        element = index - len(deal.left) + deal.start
        if element < self.epoch_length:
            return deal.epoch, element, deal.parts
        later, element = divmod(element - self.epoch_length, self._num_shards * self._later_parts)
        return deal.epoch + 1 + later, element, self._later_parts

    def epochs_before(self, index: int) -> float:
        """Epochs that lie before the sequence's element `index`, with the fraction of the one it stands in."""
        if index < len(self.deal.left):
            return float(self.deal.left[index].epoch)
        epoch, element, parts = self.locate(index)
        if epoch != self.deal.epoch and not self._repeat:
            return float(self.deal.epoch + 1)
        return epoch + element / (self._num_shards * parts)


def redeal(order: ShardOrder, places: Sequence[Place]) -> Deal:
    """The deal of everything that consumers at `places`, one for each of `order.consumers`, have not read yet.

    Consumers go at different speeds, so up to the farthest one the rest is a list; behind it lies untouched order.
    """
    consumers = order.consumers
    left: list[Work] = []
    unread = []
    for consumer, place in enumerate(places):
        index = place.item * consumers + consumer
        work = order.work(index)
        if work is not None:
            begun = {} if place.ordinal < 0 else {"ordinal": place.ordinal, "exchange": place.exchange}
            left.append(work._replace(**begun))
        unread.append(index + consumers)
    end = max(max(unread) - consumers + 1, len(order.deal.left))
    # Along the sequence, not consumer by consumer, so that each epoch is shuffled once.
    for index in range(min(unread), end):
        work = order.work(index) if index >= unread[index % consumers] else None
        if work is not None:
            left.append(work)
    return _rest(order, left, end)


def _rest(order: ShardOrder, left: list[Work], end: int) -> Deal:
    """What is left over, then the sequence from `end` on; a source that is not repeated stays in its epoch."""
    epoch, start, parts = order.locate(end)
    if order.work(end) is None:
        # The epoch's order is used up, and nothing follows it.
        epoch, start, parts = order.deal.epoch, order.epoch_length, order.deal.parts
    return Deal(parts=parts, epoch=epoch, start=start, left=tuple(left))
