"""One consumer's way through one source: its share of the shards, in order, through a shuffle buffer.

The buffer holds dialogues; what is kept of it is where they come from, and they are read again to go on.
"""

from __future__ import annotations

import hashlib
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple, TypedDict

import numpy as np

from lightning_echat.contracts import UserError
from lightning_echat.data.decoding import ParsedDialogue
from lightning_echat.data.mixture import SourceConfig
from lightning_echat.data.shard_deal import Place, ShardOrder, Work
from lightning_echat.data.shard_reader import ShardReader
from lightning_echat.data.shards import ShardPart

_BARREN_ROUNDS = 4
"""Times that a repeating source may be read through without finding one dialogue before the run stops."""


class SampleRef(NamedTuple):
    """Where a dialogue comes from: shard of the source, place in it, exchange, and the epoch it was read in.

    `check` is what it is told by (`ParsedDialogue.check`).
    """

    shard: int
    ordinal: int
    exchange: int
    epoch: int
    check: int


class Drawn(NamedTuple):
    """A dialogue and where it comes from."""

    ref: SampleRef
    parsed: ParsedDialogue


class SourceState(TypedDict):
    """What continues a `SourceReader` exactly.

    Attributes:
        place: Of `Place`.
        draws: From the buffer so far, which seed the next.
        barren: Parts of shards in a row that gave nothing.
        held: `SampleRef`s in the buffer, in its order, as 32-bit numbers.
    """

    place: tuple[int, ...]
    draws: int
    barren: int
    held: bytes


Dialogues = Mapping[tuple[int, int, int], ParsedDialogue]
"""(shard, ordinal, exchange) -> dialogue."""


def pack_refs(rows: Iterable[tuple[int, ...]]) -> bytes:
    """Tuples of equal length as 32-bit numbers, each of their bytes by columns, so that a file compresses the zeros."""
    rows = list(rows)
    if not rows:
        return b""
    numbers = np.fromiter(chain.from_iterable(rows), dtype="<i4")
    return numbers.view(np.uint8).reshape(len(rows), -1).T.tobytes()


def pack_ref(row: tuple[int, ...]) -> bytes:
    """One tuple as 32-bit numbers, for `join_refs`."""
    return struct.pack(f"<{len(row)}i", *row)


def join_refs(rows: Sequence[bytes]) -> bytes:
    """What `pack_refs` gives, of tuples packed one by one: a tenth of the time, for what every state holds."""
    if not rows:
        return b""
    return np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(len(rows), -1).T.tobytes()


def unpack_refs(data: bytes, *, width: int) -> list[tuple[int, ...]]:
    """What `pack_refs` was given."""
    columns = np.frombuffer(data, dtype=np.uint8).reshape(4 * width, -1)
    return [tuple(row) for row in np.ascontiguousarray(columns.T).view(np.int32).tolist()]


def read_refs(
    refs: Iterable[SampleRef], reader: ShardReader, *, source: SourceConfig, shards: list[str]
) -> dict[tuple[int, int, int], ParsedDialogue]:
    """The dialogues that a checkpoint refers to. Reads only the shards they are in, and counts nothing.

    Raises:
        UserError: A shard no longer holds one of them, or another in its place.
    """
    wanted: dict[int, dict[tuple[int, int], int]] = defaultdict(dict)
    for ref in refs:
        wanted[ref.shard][ref.ordinal, ref.exchange] = ref.check
    found: dict[tuple[int, int, int], ParsedDialogue] = {}
    with reader.counter.ignoring():
        for shard, places in sorted(wanted.items()):
            ordinals = {ordinal for ordinal, _ in places}
            for ordinal, exchange, parsed in reader.parse_again(shards[shard], ordinals, source=source.name):
                if (ordinal, exchange) in places:
                    if parsed.check != places[ordinal, exchange]:
                        raise gone(shards[shard], ordinal, what="is another one now")
                    found[shard, ordinal, exchange] = parsed
            missing = [place for place in places if (shard, *place) not in found]
            if missing:
                raise gone(shards[shard], min(missing)[0])
    return found


def gone(shard: str, ordinal: int, *, what: str = "is no longer there or usable") -> UserError:
    """The shard is not what it was when the checkpoint was written."""
    return UserError(
        f"{shard}: sample {ordinal}, which the checkpoint refers to, {what}; put the shard back as it was, or "
        "begin a new run from the checkpoint's weights with model.init_args.init_from"
    )


class SourceReader:
    """Dialogues of one source in the order in which one consumer draws them.

    Args:
        source: Its name and shards' patterns.
        shards: Paths, in the order that the deal numbers.
        reader: Reads and counts.
        order: The sequence of work.
        consumer: Whose share of it.
        seed: Decides the draws.
        size: Dialogues in the shuffle buffer.
    """

    def __init__(
        self,
        source: SourceConfig,
        shards: list[str],
        reader: ShardReader,
        *,
        order: ShardOrder,
        consumer: int,
        seed: str,
        size: int,
    ) -> None:
        self.source = source
        self.shards = shards
        self._reader = reader
        self._order = order
        self._consumer = consumer
        self._seed = f"{seed}/shuffle/{consumer}"
        self._size = size
        self._place = Place()
        self._draws = 0
        self._barren = 0
        self._buffer: list[Drawn] = []
        self._stored = self._read()

    @property
    def draws(self) -> int:
        """Dialogues drawn so far."""
        return self._draws

    def state(self) -> SourceState:
        """What goes on from here."""
        held = pack_refs(drawn.ref for drawn in self._buffer)
        return SourceState(place=tuple(self._place), draws=self._draws, barren=self._barren, held=held)

    def resume(self, state: SourceState, dialogues: Dialogues) -> None:
        """Go on from a state. `dialogues` holds at least what the state refers to (see `held_refs`)."""
        self._place = Place(*state["place"])
        self._draws, self._barren = state["draws"], state["barren"]
        self._buffer = [Drawn(ref, dialogues[ref[:3]]) for ref in held_refs(state)]

    def draw(self) -> Drawn | None:
        """A dialogue drawn from the buffer, None when the source has ended."""
        while len(self._buffer) < self._size and (stored := next(self._stored, None)) is not None:
            self._buffer.append(stored)
        if not self._buffer:
            return None
        digest = hashlib.blake2b(f"{self._seed}/{self._draws}".encode(), digest_size=8).digest()
        place = int.from_bytes(digest) % len(self._buffer)
        self._draws += 1
        self._buffer[place], self._buffer[-1] = self._buffer[-1], self._buffer[place]
        return self._buffer.pop()

    def _read(self) -> Iterator[Drawn]:
        """The dialogues of all work, keeping `_place` at what was last yielded."""
        limit = _BARREN_ROUNDS * max(len(self.shards), self._order.consumers)
        while (work := self._order.work(self._place.item * self._order.consumers + self._consumer)) is not None:
            yield from self._read_part(work)
            self._barren = self._barren + 1 if self._place.ordinal < 0 else 0
            self._place = Place(self._place.item + 1)
            if self._barren >= limit:
                summary = self._reader.counter.summary()
                raise UserError(f"source {self.source.name!r} holds no usable sample: {summary}{self._reader.remedy}")

    def _read_part(self, work: Work) -> Iterator[Drawn]:
        item, ordinal, exchange = self._place
        if ordinal < 0:
            ordinal, exchange = work.ordinal, work.exchange
        path = self.shards[work.shard]
        part = ShardPart(path=path, part=work.part, parts=work.parts)
        placed = self._reader.parse(part, source=self.source.name, start=ordinal)
        # What led up to the last dialogue yielded was counted when it was.
        with self._reader.counter.ignoring():
            for _ in range(exchange):
                if (again := next(placed, None)) is None or again.ordinal != ordinal:
                    raise gone(path, ordinal)
        for ordinal, exchange, parsed in placed:
            self._place = Place(item, ordinal, exchange + 1)
            yield Drawn(SampleRef(work.shard, ordinal, exchange, work.epoch, parsed.check), parsed)


def held_refs(state: SourceState) -> list[SampleRef]:
    """What the buffer of a state holds."""
    return [SampleRef(*ref) for ref in unpack_refs(state["held"], width=len(SampleRef._fields))]
