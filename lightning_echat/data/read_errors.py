"""Counting what is read, kept and skipped, so that nothing is lost in silence."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from lightning_echat.contracts import SampleRejected, UserError

_LOG = logging.getLogger(__name__)

READ, KEPT, SKIPPED, NOTICED, DRAWN, DRAWN_IDS = "read", "kept", "skipped/", "noticed/", "drawn/", "drawn_ids/"
"""The keys, or beginnings of keys, of every count. READ is always KEPT plus everything SKIPPED."""

_MIN_READ_TO_JUDGE = 50
"""Samples to have read before the share of skips says anything."""


class SkipCounter:
    """Counts of one reader; counters of several readers are merged by adding.

    Attributes:
        counts: Totals since the counter was made, under the keys above.
        examples: Count key -> the first shard and key it happened to.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self._reported: Counter[str] = Counter()

    def keep(self) -> None:
        """A sample was read and can be used."""
        self.counts[READ] += 1
        self.counts[KEPT] += 1

    def skip(self, reason: str, *, shard: str = "", key: str = "", detail: str = "") -> None:
        """A sample was read and cannot be used."""
        self.counts[READ] += 1
        self._count(SKIPPED + reason, shard, key, detail)

    def reject(self, error: SampleRejected, *, shard: str, key: str) -> None:
        """`skip` with the reason and the detail of `error`."""
        self.skip(error.reason, shard=shard, key=key, detail=str(error).removeprefix(error.reason).removeprefix(": "))

    def notice(self, reason: str, *, shard: str = "", key: str = "", detail: str = "") -> None:
        """Something is odd that costs no sample by itself, or an unknown number of them (a damaged tar)."""
        self._count(NOTICED + reason, shard, key, detail)

    def draw(self, name: str, *, ids: int) -> None:
        """A mixture took a dialogue of `ids` ids for `name`."""
        self.counts[DRAWN + name] += 1
        self.counts[DRAWN_IDS + name] += ids

    @contextmanager
    def ignoring(self) -> Iterator[None]:
        """What happens inside is not counted: it was, before the run was interrupted."""
        before = self.counts.copy()
        yield
        self.counts = before

    def resume(self, counts: Mapping[str, int]) -> None:
        """Go on from the totals of an interrupted reader, all of which have been reported."""
        self.counts = Counter(counts)
        self._reported = self.counts.copy()

    def merge(self, other: SkipCounter | Mapping[str, int]) -> None:
        """Add another counter, or the counts that travelled with a batch (these carry no examples)."""
        if isinstance(other, SkipCounter):
            self.counts.update(other.counts)
            self.examples = {**other.examples, **self.examples}
        else:
            self.counts.update(other)

    def take(self) -> dict[str, int]:
        """The counts since the last call: what travels with a batch."""
        since = {key: count - self._reported[key] for key, count in self.counts.items()}
        self._reported = self.counts.copy()
        return {key: count for key, count in since.items() if count}

    @property
    def skipped(self) -> dict[str, int]:
        """Reason -> samples skipped, most frequent first."""
        return self._under(SKIPPED)

    @property
    def noticed(self) -> dict[str, int]:
        """What was noticed -> how often, most frequent first."""
        return self._under(NOTICED)

    @property
    def skip_share(self) -> float:
        """Skipped samples among those read, 0 when none was read."""
        return sum(self.skipped.values()) / self.counts[READ] if self.counts[READ] else 0.0

    def check(self, *, max_share: float) -> None:
        """Raise `UserError` once more than `max_share` of the samples were skipped."""
        if self.counts[READ] >= _MIN_READ_TO_JUDGE and self.skip_share > max_share:
            raise UserError(
                f"{self.summary()}: more than max_skip_share {max_share:g}; "
                "mend the shards (echat data verify lists every defect) or raise max_skip_share"
            )

    def summary(self) -> str:
        """One line: how many of how many were skipped, why, and the first example of each reason."""
        total = sum(self.skipped.values())
        line = f"{total} of {self.counts[READ]} samples would be skipped" if total else f"{self.counts[READ]} samples"
        parts = [f"{count} {reason}{self._first(SKIPPED + reason)}" for reason, count in self.skipped.items()] + [
            f"noticed {count} {what}{self._first(NOTICED + what)}" for what, count in self.noticed.items()
        ]
        return f"{line}: {', '.join(parts)}" if parts else line

    def _count(self, key: str, shard: str, sample: str, detail: str) -> None:
        self.counts[key] += 1
        if key not in self.examples:
            where = " ".join(part for part in (shard, sample) if part)
            self.examples[key] = f"{where}: {detail}" if detail else where
            # Once a reason, so that a log is neither silent nor flooded.
            _LOG.warning("%s, first at %s", key, self.examples[key])

    def _first(self, key: str) -> str:
        return f" (first: {self.examples[key]})" if self.examples.get(key) else ""

    def _under(self, prefix: str) -> dict[str, int]:
        return {key.removeprefix(prefix): n for key, n in self.counts.most_common() if key.startswith(prefix)}
