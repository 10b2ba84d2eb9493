"""A stage that answers by heart, and batches without a network behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_echat.contracts import IGNORE_INDEX, DialogueReference, GeneratedReply, PackedBatch
from lightning_echat.tokens.paralinguistics import LABEL_SETS
from lightning_echat.tokens.thinking import ThinkingFormat


def reference(key: str, *, task: str = "transcribe_and_label", **fields: Any) -> DialogueReference:
    return DialogueReference(key=key, task=task, **fields)


def make_batch(
    references: Sequence[DialogueReference] = (),
    *,
    tokens: int = 6,
    padding: int = 2,
    supervised: int = 3,
    frames: int = 50,
    health: dict[str, int] | None = None,
) -> PackedBatch:
    """One row of `tokens` ids and `padding`, of which the first `supervised` are supervised, and one clip."""
    ids = torch.zeros(1, tokens + padding, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[0, :supervised] = 1
    documents = torch.zeros_like(ids)
    documents[0, :tokens] = 1
    one = torch.ones(1, dtype=torch.long)
    return PackedBatch(
        input_ids=ids,
        labels=labels,
        speech_scored=torch.zeros_like(ids, dtype=torch.bool),
        position_ids=torch.arange(tokens + padding)[None],
        document_ids=documents,
        log_mels=torch.zeros(1, frames, 80),
        log_mel_lengths=one * frames,
        clip_rows=one * 0,
        clip_starts=one * 0,
        clip_lengths=one,
        clip_labels=torch.full((1, len(LABEL_SETS)), IGNORE_INDEX),
        clip_characters=torch.zeros(1, 0, dtype=torch.long),
        clip_character_lengths=one * 0,
        clip_transcript_ids=torch.zeros(1, 0, dtype=torch.long),
        clip_transcript_lengths=one * 0,
        references=list(references),
        health=health or {},
    )


class FakeStage(LightningModule):
    """Says what it was told to say for a key. Its loss is 8, 7, 6, … as steps go by."""

    def __init__(self, texts: dict[str, str] | None = None, *, codes: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        self.texts = texts or {}
        self.codes = codes or {}
        self.answered: list[PackedBatch] = []
        self.weight = torch.nn.Linear(4, 4, bias=False)
        self.dialogue_tokenizer = SimpleNamespace(prompt_set=SimpleNamespace(thinking=ThinkingFormat()))

    def answers(self, batch: PackedBatch) -> list[GeneratedReply]:
        self.answered.append(batch)
        none = torch.empty(0, dtype=torch.long)
        return [
            GeneratedReply(
                reference=r, text_ids=[], text=self.texts.get(r.key, ""), speech_codes=self.codes.get(r.key, none)
            )
            for r in batch.references
        ]

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        self.log("train/loss", 8.0 - self.global_step)
        return self.weight(torch.ones(batch.input_ids.numel(), 4)).sum()

    def validation_step(self, batch: PackedBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class FakeData(LightningDataModule):
    """Lists of ready batches."""

    def __init__(
        self, *, train: Sequence[PackedBatch] = (), validation: Mapping[str, Sequence[PackedBatch]] | None = None
    ) -> None:
        super().__init__()
        self.batches = list(train)
        self.validation = dict(validation or {})

    @property
    def validation_names(self) -> list[str]:
        return list(self.validation)

    def train_dataloader(self) -> DataLoader[PackedBatch]:
        return _loader(self.batches)

    def val_dataloader(self) -> list[DataLoader[PackedBatch]]:
        return [_loader(batches) for batches in self.validation.values()]


def _loader(batches: Sequence[PackedBatch]) -> DataLoader[PackedBatch]:
    return DataLoader(list(batches), batch_size=None, shuffle=False)  # type: ignore[arg-type]


def make_trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    """A quiet CPU trainer whose run folder is `folder`."""
    settings: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "max_epochs": 1,
    }
    return Trainer(accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), **{**settings, **options})
