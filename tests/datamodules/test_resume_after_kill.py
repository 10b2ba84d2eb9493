"""A real training on two ranks with reading processes, killed in the middle, goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy

from callbacks.data_health import DataHealth
from callbacks.stage_checkpoint import StageCheckpoint
from datamodules.spoken_dialogue import SpokenDialogueDataModule
from lightning_echat.contracts import PackedBatch
from lightning_echat.data.batching import BatchingConfig
from lightning_echat.data.mixture import SourceConfig, TaskConfig
from lightning_echat.testing import tiny_tokens_config, write_dummy_shards
from lightning_echat.tokens.dialogue_template import TokensConfig
from tests.ranks import run_on_ranks, statuses_of_ranks
from tests.tiny_training import make_stage, make_trainer

STEPS, KILLED_AFTER, SAVED_AT = 7, 5, 4


class Note(Callback):
    """Writes down each batch at once: step, keys, and the loss to the bit. Kills rank 1 after so many steps."""

    def __init__(self, file: Path, kill_after: int = 0) -> None:
        self.file, self.kill_after = file, kill_after

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PackedBatch, batch_idx: int
    ) -> None:
        line = [batch_idx, [reference.key for reference in batch.references], float(outputs["loss"]).hex()]
        with self.file.with_suffix(f".{trainer.global_rank}").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if 0 < self.kill_after == trainer.global_step and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def train(tokens: TokensConfig, shards: Path, folder: Path, kill_after: int = 0) -> None:
    """Two micro-batches a step, a checkpoint every second step, and a validation after the third."""
    saved = folder / "checkpoints" / "last.ckpt"
    saving = StageCheckpoint(dirpath=saved.parent, save_last="link", save_top_k=1, every_n_train_steps=2)
    trainer = make_trainer(
        folder,
        saving,
        DataHealth(),
        Note(folder / "batches", kill_after),
        max_steps=STEPS,
        max_epochs=-1,
        accumulate_grad_batches=2,
        val_check_interval=6,
        check_val_every_n_epoch=None,
        enable_checkpointing=True,
        strategy=DDPStrategy(),
        devices=2,
    )
    data = SpokenDialogueDataModule(
        tokens=tokens,
        root=str(shards),
        train=[
            SourceConfig(name="a", shards=["a"], tasks=[TaskConfig(kind="speech_to_text", thinking="label")]),
            SourceConfig(name="b", shards=["b"], tasks=[TaskConfig(kind="label", labels=("age",))]),
        ],
        validation={"b": SourceConfig(shards=["b"], tasks=[TaskConfig(kind="transcribe")])},
        batching=BatchingConfig(tokens_per_batch=400, max_ids=300, pool=6, shuffle=4),
        num_workers=1,
    )
    torch.manual_seed(0)
    stage = make_stage(tokens, optimizer=partial(torch.optim.AdamW, lr=0.01))
    trainer.fit(stage, datamodule=data, ckpt_path=saved if saved.exists() else None, weights_only=True)


def batches(folder: Path, rank: int) -> list[list[Any]]:
    return [json.loads(line) for line in (folder / f"batches.{rank}").read_text().splitlines()]


def test_a_killed_run_goes_on_with_the_batches_and_losses_that_would_have_followed(tmp_path):
    """Samples lost or repeated, dropout drawn anew, or counts that forget what other ranks had read."""
    tokens = tiny_tokens_config(tmp_path / "tokenizer")
    write_dummy_shards(tmp_path / "a", shards=3, samples_per_shard=5)
    write_dummy_shards(tmp_path / "b", shards=1, samples_per_shard=4, first=500)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    run_on_ranks(train, tokens, tmp_path, whole)
    statuses = statuses_of_ranks(train, tokens, tmp_path, killed, KILLED_AFTER, within=60)
    assert statuses[1] == -signal.SIGKILL and statuses[0] != 0
    for rank in (0, 1):
        # The batch after the last step is on its way when the other rank dies.
        assert batches(killed, rank)[: 2 * SAVED_AT] == batches(whole, rank)[: 2 * SAVED_AT]
        (killed / f"batches.{rank}").unlink()
    run_on_ranks(train, tokens, tmp_path, killed)
    for rank in (0, 1):
        assert batches(killed, rank) == batches(whole, rank)[2 * SAVED_AT :]
    health = [json.loads((folder / "data_health.json").read_text()) for folder in (whole, killed)]
    assert health[0] == health[1] and health[0]["samples"] > 0
