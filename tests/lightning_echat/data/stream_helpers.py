"""Loaders over small corpora, and what to compare their batches by."""

import hashlib
import io
from collections.abc import Iterator
from itertools import chain, cycle, islice
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from lightning_echat.data import resumable_stream
from lightning_echat.data.batching import BatchingConfig
from lightning_echat.data.dialogue_stream import ReadingConfig
from lightning_echat.data.loader import TrainingLoader, ValidationLoader
from lightning_echat.data.mixture import SourceConfig, TaskConfig
from lightning_echat.data.stream_state import Position, from_checkpoint, to_checkpoint
from lightning_echat.data.training_stream import TrainingStream
from lightning_echat.data.validation_stream import ValidationStream
from lightning_echat.tokens.tasks import TaskKind

BATCHING = BatchingConfig(tokens_per_batch=1500, max_ids=700, pool=16, shuffle=8, validation_rows=3)


class InTurn(TrainingLoader):
    """A loader whose workers run in this process, in the order in which torch asks its own."""

    def _items(self) -> Iterator[Any]:
        workers = []
        for number in range(self._workers):
            info = SimpleNamespace(id=number, num_workers=self._workers)
            with mock.patch.object(resumable_stream, "get_worker_info", return_value=info):
                items = iter(self.stream)
                workers.append(chain([next(items)], items))
        for items in cycle(workers):
            yield next(items)


def source(folder, *, name: str = "a", kind: TaskKind = "transcribe", **options) -> SourceConfig:
    return SourceConfig(**{"name": name, "shards": [str(folder)], "tasks": [TaskConfig(kind=kind)], **options})


def reading(tokens, **options) -> ReadingConfig:
    return ReadingConfig(**{"tokens": tokens, "batching": BATCHING, **options})


def streaming(tokens, sources, **options) -> TrainingStream:
    own = {name: options.pop(name) for name in ("augmentation", "mixture_by") if name in options}
    return TrainingStream(reading(tokens, **options), sources=sources, **own)


def training(
    tokens, sources, *, workers: int = 0, position=None, ranks=None, kind=TrainingLoader, **options
) -> TrainingLoader:
    return kind(streaming(tokens, sources, **options), num_workers=workers, position=position, ranks=ranks)


def validating(tokens, folder, *, workers: int = 0, **options) -> ValidationLoader:
    stream = ValidationStream(reading(tokens, **options), source=source(folder), name="v")
    return ValidationLoader(stream, num_workers=workers)


def stored(positions: list[Position], made_by: dict[str, str]) -> dict[str, Any]:
    """What a file gives back of the checkpoint of these positions."""
    file = io.BytesIO()
    torch.save(to_checkpoint(positions, made_by), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def restored(positions: list[Position], made_by: dict[str, str]) -> list[Position]:
    """Positions after their way through a file."""
    return from_checkpoint(stored(positions, made_by), made_by)


def keys(batches) -> list[str]:
    return [reference.key for batch in batches for reference in batch.references]


def digest(batches) -> str:
    """Of all that a model or a metric would see."""
    return hashlib.sha256("".join(digests(batches)).encode()).hexdigest()


def digests(batches) -> list[str]:
    """One a batch."""
    found = []
    for batch in batches:
        one = hashlib.sha256()
        for field in ("input_ids", "labels", "document_ids", "log_mels", "clip_starts"):
            one.update(getattr(batch, field).numpy().tobytes())
        one.update(repr((keys([batch]), sorted(batch.health.items()))).encode())
        found.append(one.hexdigest())
    return found


def some(loader: TrainingLoader, count: int = 12):
    return list(islice(loader, count))
