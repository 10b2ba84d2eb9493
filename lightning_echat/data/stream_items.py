"""What travels from worker processes to the loader besides batches."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StreamFailure:
    """A user's mistake that a worker met; travels as an item, as torch wraps a worker's exception in a traceback."""

    message: str


@dataclass(frozen=True, slots=True)
class StreamHealth:
    """What was counted after a worker's last batch; the loader adds it up and hands it to nobody."""

    counts: dict[str, int]


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """A training worker has nothing left. It repeats this as often as it is asked, so that all keep their turns.

    Attributes:
        worker: Which.
        counts: What was counted since its last batch.
        padding: The id that an empty batch holds.
    """

    worker: int
    counts: dict[str, int]
    padding: int
