"""A rank that dies, is told to stop or cannot write ends the others with a line: none waits for ever."""

from __future__ import annotations

import errno
import os
import resource
import signal
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.checkpoint import filesystem

from lightning_echat.command_errors import explain_lost_rank
from lightning_echat.contracts import UserError
from lightning_echat.nn.sharded_files import REST
from lightning_echat.nn.weights import latest_checkpoint, load_trained
from lightning_echat.parallel import ShardedStrategy
from lightning_echat.tokens.dialogue_template import DialogueTokenizer, TokensConfig
from tests.ranks import statuses_of_ranks
from tests.sharded_training import (
    LIMIT,
    names,
    saving,
)
from tests.tiny_training import Listed, batches_of, make_stage, make_trainer


class KillMe(Callback):
    """Kills one rank in the middle of its second step."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step == 1 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


class StopMe(Callback):
    """Sends one rank the signal that takes a job away, in its first step."""

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if trainer.global_step == 0 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class FullDisk(Callback):
    """From the second step on, writing of shards fails on one rank.

    Args:
        how: The kernel's limit of a file's size, which torch's own writer runs into; the error of a full disk; or that
            error where rank 0 writes what is no shard, before anything else.
    """

    def __init__(self, how: Literal["limit", "error", "rest"]) -> None:
        self.how = how
        self.rank = 0 if how == "rest" else 1

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step != 2 or trainer.global_rank != self.rank:
            return
        if self.how == "limit":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        elif self.how == "rest":
            torch.save = partial(save_but, REST)
        else:
            patched: Any = filesystem
            patched._write_item = no_space


def save_but(name: str, content: Any, target: Any, *args: Any, _save: Any = torch.save, **options: Any) -> None:
    if isinstance(target, Path) and target.name == name:
        no_space()
    _save(content, target, *args, **options)


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def train_disturbed(
    tokens: TokensConfig, folder: Path, disturbance: Callback, limit: timedelta, async_saving: bool = False
) -> None:
    micro, _ = batches_of(DialogueTokenizer.from_config(tokens))
    rank = os.environ["RANK"]
    trainer = make_trainer(
        folder,
        disturbance,
        saving(folder / "checkpoints"),
        enable_checkpointing=True,
        strategy=ShardedStrategy(timeout=limit, async_saving=async_saving),
        devices=2,
    )
    try:
        trainer.fit(make_stage(tokens), datamodule=Listed(micro))
    except Exception as error:
        line = str(error) if isinstance(error, UserError) else explain_lost_rank(error, rank=int(rank))
        (folder / f"said{rank}").write_text(str(line), encoding="utf-8")
        raise SystemExit(3) from error


def test_a_rank_that_is_killed_ends_the_others_with_a_line(tmp_path, tokens):
    """Not after the half hour that is torch's default."""
    statuses = statuses_of_ranks(train_disturbed, tokens, tmp_path, KillMe(), timedelta(seconds=60), within=240)
    assert statuses == [3, -signal.SIGKILL]
    said = (tmp_path / "said0").read_text()
    assert said.startswith("rank 0 was left alone") and "all_reduce" in said, said
    assert latest_checkpoint(tmp_path).name == "last.ckpt"


def test_a_job_that_is_asked_to_stop_saves_first(tmp_path, tokens):
    """One rank is told; all finish the step, save together and leave with 143."""
    assert statuses_of_ranks(train_disturbed, tokens, tmp_path, StopMe(), LIMIT, within=240) == [143, 143]
    assert names(tmp_path) == ["epoch=0-step=1.ckpt", "last.ckpt"]


@pytest.mark.parametrize("background", [False, True], ids=["waiting", "in the background"])
@pytest.mark.parametrize(
    ("how", "said"),
    [("limit", "File too large"), ("error", "No space left on device"), ("rest", "No space left on device")],
)
def test_a_full_disk_on_one_rank_ends_all_and_leaves_what_was_saved(tmp_path, tokens, background, how, said):
    """A rank that fails to write alone would leave the others waiting, or its half checkpoint in place of a whole."""
    disk = FullDisk(how)
    assert statuses_of_ranks(train_disturbed, tokens, tmp_path, disk, LIMIT, background, within=240) == [3, 3]
    for rank in (0, 1):
        line = (tmp_path / f"said{rank}").read_text()
        assert line.startswith("cannot save checkpoint") and f"rank {disk.rank}: " in line and said in line, line
    assert names(tmp_path) == ["epoch=0-step=1.ckpt", "last.ckpt"]
    assert load_trained(tmp_path).step == 1
