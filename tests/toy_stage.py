"""A stage and its data in a few lines, for what tests ask of the command line and never of the network."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_echat.contracts import UserError


@dataclass
class ToyTokens:
    tokenizer: str
    size: int = 4


@dataclass
class ToyEncoder:
    layers: int = 2


@dataclass
class ToyOptions:
    top: int = 3
    names: list[str] = field(default_factory=list)


class ToyStage(LightningModule):
    def __init__(
        self,
        tokens: ToyTokens,
        encoder: ToyEncoder = ToyEncoder(),  # noqa: B008 - never changed
        optimizer: OptimizerCallable = torch.optim.AdamW,
        width: int = 3,
        refuse: bool = False,
        interrupt: bool = False,
        mode: Literal["fast", "slow"] = "fast",
        options: ToyOptions | None = None,
    ) -> None:
        super().__init__()
        if refuse:
            raise UserError(f"width {width} does not suit")
        self.linear = torch.nn.Linear(4, 2)
        self.optimizer_callable = optimizer
        self.interrupt = interrupt

    def training_step(self, batch: Tensor) -> Tensor:
        if self.interrupt:
            os.kill(os.getpid(), signal.SIGINT)
        return self.linear(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer_callable(self.parameters())


class _Rows(IterableDataset):
    def __init__(self, broken: bool) -> None:
        self.broken = broken

    def __iter__(self) -> Iterator[Tensor]:
        yield torch.ones(4)
        if self.broken:
            raise UserError("shard a.tar is no tar file; make it again with echat data pack")
        yield torch.ones(4)


class ToyData(LightningDataModule):
    def __init__(self, tokens: ToyTokens, shards: list[str], workers: int = 0, broken: bool = False) -> None:
        super().__init__()
        self.workers, self.broken = workers, broken

    def train_dataloader(self) -> DataLoader:
        return DataLoader(_Rows(self.broken), batch_size=1, num_workers=self.workers)


CALLS: list[tuple] = []


def toy_command(checkpoint: str, audio: list[str], json: bool = False, options: ToyOptions = ToyOptions()) -> None:  # noqa: B008
    """A plain command.

    Args:
        checkpoint: Which.
        audio: What.
        json: How.
        options: More.
    """
    CALLS.append((checkpoint, audio, json, options))


def failing_command(kind: str) -> None:
    """Fail in one of the ways that a user can cause."""
    if kind == "user":
        raise UserError("source 'b' is empty: no shard in runs/b")
    if kind == "file":
        open("missing.wav").close()  # noqa: PTH123
    if kind == "folder":
        open("/").close()  # noqa: PTH123
    if kind == "interrupt":
        raise KeyboardInterrupt
    if kind == "wrapped":
        raise RuntimeError(
            "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
            '  File "x.py", line 1\nlightning_echat.contracts.UserError: no audio in a.tar/d-3\n'
        )
    raise RuntimeError("a bug of ours")
