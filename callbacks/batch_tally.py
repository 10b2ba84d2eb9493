"""What a run of batches held: ids, supervised ids, padding, seconds of speech."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_echat.contracts import IGNORE_INDEX, PackedBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSums:
    """Totals over batches.

    Attributes:
        tokens: Ids that are not padding.
        positions: All ids, padding included.
        supervised: Ids that carry a target.
        audio_seconds: Input speech.
    """

    tokens: int = 0
    positions: int = 0
    supervised: int = 0
    audio_seconds: float = 0.0

    @classmethod
    def of(cls, sums: Tensor) -> BatchSums:
        """From what `BatchTally.tensor` gives, or from such tensors added up over ranks."""
        tokens, positions, supervised, frames = sums.tolist()
        return cls(tokens=int(tokens), positions=int(positions), supervised=int(supervised), audio_seconds=frames / 100)

    @property
    def padding_share(self) -> float:
        """Padding among all positions, NaN before the first batch."""
        return 1 - self.tokens / self.positions if self.positions else float("nan")


class BatchTally:
    """Adds up batches on their own device: reading a count there would make every step wait for it."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, batch: PackedBatch) -> None:
        """Count a batch."""
        counted = torch.stack(
            [
                (batch.document_ids > 0).sum(),
                torch.tensor(batch.input_ids.numel(), device=batch.document_ids.device),
                (batch.labels != IGNORE_INDEX).sum(),
                batch.log_mel_lengths.sum(),
            ]
        )
        self._sums = counted if self._sums is None else self._sums + counted

    def merge(self, other: BatchTally) -> None:
        """Add what another has counted."""
        if other._sums is not None:
            self._sums = other._sums if self._sums is None else self._sums + other._sums

    def tensor(self, device: torch.device) -> Tensor:
        """[4] int64 sums, to be added up over ranks."""
        return torch.zeros(4, dtype=torch.int64, device=device) if self._sums is None else self._sums.to(device)

    def read(self) -> BatchSums:
        """The totals; waits for the device."""
        return BatchSums() if self._sums is None else BatchSums.of(self._sums)
