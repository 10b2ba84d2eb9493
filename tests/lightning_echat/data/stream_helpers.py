"""Loaders over small corpora, and what to compare their batches by."""

import hashlib
from itertools import islice

from lightning_echat.data.batching import BatchingConfig
from lightning_echat.data.dialogue_stream import ReadingConfig
from lightning_echat.data.loader import TrainingLoader, ValidationLoader
from lightning_echat.data.mixture import SourceConfig, TaskConfig
from lightning_echat.data.training_stream import TrainingStream
from lightning_echat.data.validation_stream import ValidationStream
from lightning_echat.tokens.tasks import TaskKind

BATCHING = BatchingConfig(tokens_per_batch=1500, max_ids=700, pool=16, shuffle=8, validation_rows=3)


def source(folder, *, name: str = "a", kind: TaskKind = "transcribe", **options) -> SourceConfig:
    return SourceConfig(**{"name": name, "shards": [str(folder)], "tasks": [TaskConfig(kind=kind)], **options})


def reading(tokens, **options) -> ReadingConfig:
    return ReadingConfig(**{"tokens": tokens, "batching": BATCHING, **options})


def training(tokens, sources, *, workers: int = 0, position=None, ranks=None, **options) -> TrainingLoader:
    own = {name: options.pop(name) for name in ("augmentation", "mixture_by") if name in options}
    stream = TrainingStream(reading(tokens, **options), sources=sources, **own)
    return TrainingLoader(stream, num_workers=workers, position=position, ranks=ranks)


def validating(tokens, folder, *, workers: int = 0, **options) -> ValidationLoader:
    stream = ValidationStream(reading(tokens, **options), source=source(folder), name="v")
    return ValidationLoader(stream, num_workers=workers)


def keys(batches) -> list[str]:
    return [reference.key for batch in batches for reference in batch.references]


def digest(batches) -> str:
    """Of all that a model or a metric would see."""
    everything = hashlib.sha256()
    for batch in batches:
        for field in ("input_ids", "labels", "document_ids", "log_mels", "clip_starts"):
            everything.update(getattr(batch, field).numpy().tobytes())
        everything.update(repr((batch.references, sorted(batch.health.items()))).encode())
    return everything.hexdigest()


def some(loader: TrainingLoader, count: int = 12):
    return list(islice(loader, count))
