"""What every reader of shards shares: stored samples to dialogues whose audio is still bytes, each with its place."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

from lightning_echat.contracts import SampleRejected
from lightning_echat.data.decoding import ParsedDialogue
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.remote import ShardAccess
from lightning_echat.data.shards import ShardPart, read_samples, read_shard
from lightning_echat.data.tar_samples import StoredSample


class PlacedDialogue(NamedTuple):
    """A dialogue up to one of its exchanges, with its place in the shard."""

    ordinal: int
    exchange: int
    parsed: ParsedDialogue


class ShardReader:
    """Shards to placed dialogues; what of a stored sample can be used, `_exchanges` says.

    Args:
        access: How shards behind a URL are reached.
        max_skip_share: Share of skipped samples past which a run stops.

    Attributes:
        counter: What was read, kept and skipped.
        remedy: Ends the message of a run that finds nothing to use.
    """

    remedy = ""

    def __init__(self, *, access: ShardAccess, max_skip_share: float) -> None:
        self.counter = SkipCounter()
        self._access, self._max_skip_share = access, max_skip_share

    def parse(
        self, part: ShardPart, *, source: str, start: int = 0, counter: SkipCounter | None = None
    ) -> Iterator[PlacedDialogue]:
        """The dialogues of a shard, one for each exchange, audio still encoded; unusable ones are counted.

        Args:
            part: Which shard, and which of its dialogues.
            source: Goes into the dialogues.
            start: Place in the shard to begin at.
            counter: In place of the reader's own.
        """
        counter = self.counter if counter is None else counter
        stored = None
        for stored in read_shard(part, start=start, counter=counter, access=self._access):
            yield from self._exchanges(stored, source, counter)
        if stored is None and start == part.part == 0:
            counter.notice("empty shard", shard=part.path)

    def parse_again(self, shard: str, ordinals: Collection[int], *, source: str) -> Iterator[PlacedDialogue]:
        """The dialogues at certain places of a shard, as `parse` yields them."""
        for stored in read_samples(shard, sorted(ordinals), counter=self.counter, access=self._access):
            yield from self._exchanges(stored, source, self.counter)

    def _exchanges(self, stored: StoredSample, source: str, counter: SkipCounter) -> Iterator[PlacedDialogue]:
        """What is used of a sample, numbered from 0 on, the same at every reading; the rest is counted."""
        raise NotImplementedError

    def _skip(self, error: SampleRejected, counter: SkipCounter, *, shard: str, key: str) -> None:
        counter.reject(error, shard=shard, key=key)
        counter.check(max_share=self._max_skip_share)
