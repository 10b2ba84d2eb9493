"""The tiny model trained for two optimizer steps on ready batches, on one process or several, to be compared."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import DataLoader, IterableDataset

from lightning_echat.contracts import PackedBatch
from lightning_echat.data.batching import collate
from lightning_echat.nn.echat_model import NetworkConfig
from lightning_echat.stages.base import AuxiliaryWeights, EChatStage
from lightning_echat.stages.empathy import EmpathyStage
from lightning_echat.testing import dummy_tokenized, tiny_network_config
from lightning_echat.tokens.dialogue_template import DialogueTokenizer, TokensConfig
from lightning_echat.tokens.tasks import task_from_name

MICRO_BATCHES = [
    # Two optimizer steps of two micro-batches on two ranks. What a rank has in a step differs in every way: number of
    # dialogues, length, kind of target, audio or none, nothing at all.
    ["speech_to_speech.label_thinking", "transcribe_and_label", "label"],
    ["text_to_text"],
    ["text_to_speech", "text_to_speech"],
    ["speech_to_text.natural_thinking"],
    ["label"],
    ["text_to_text", "text_to_text", "text_to_text"],
    ["speech_to_speech.interleaved", "transcribe"],
    [],
]


class _Rest(IterableDataset):
    """What is left of a list from one place on. Without a length, as streams are."""

    def __init__(self, batches: list[PackedBatch], first: int) -> None:
        self.batches, self.first = batches, first

    def __iter__(self) -> Iterator[PackedBatch]:
        yield from self.batches[self.first :]


class Listed(LightningDataModule):
    """Ready batches, dealt out to the ranks in turn.

    Args:
        batches: For training.
        validation: One set of them, in which every rank has equally many.
        first: Of a rank's training batches, where a run goes on.
    """

    def __init__(self, batches: list[PackedBatch], validation: list[PackedBatch] | None = None, first: int = 0) -> None:
        super().__init__()
        self.batches, self.validation, self.first = batches, validation or [], first
        self.validation_names = ["dialogue"] if validation else []

    def train_dataloader(self) -> DataLoader[PackedBatch]:
        return self._own(self.batches, self.first)

    def val_dataloader(self) -> list[DataLoader[PackedBatch]]:
        return [self._own(self.validation)] if self.validation else []

    def _own(self, batches: list[PackedBatch], first: int = 0) -> DataLoader[PackedBatch]:
        assert self.trainer is not None
        share = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        own = batches[share["rank"] :: share["num_replicas"]]
        return DataLoader(_Rest(own, first), batch_size=None)


class Record(Callback):
    """Each rank writes down each batch (summed loss, supervised ids, dialogues), and metrics and weights at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses: list[tuple[float, int]] = []
        self.keys: list[list[str]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PackedBatch, batch_idx: int
    ) -> None:
        self.losses.append((float(outputs["loss"]), batch.num_supervised))
        self.keys.append([reference.key for reference in batch.references])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = get_model_state_dict(pl_module, options=StateDictOptions(full_state_dict=True))
        self.folder.mkdir(exist_ok=True, parents=True)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        seen = {"losses": self.losses, "keys": self.keys, "metrics": metrics, "weights": weights}
        torch.save(seen, self.folder / f"rank{trainer.global_rank}.pt")


def make_stage(tokens: TokensConfig, *, network: NetworkConfig | None = None, **options: Any) -> EChatStage:
    torch.manual_seed(0)
    options = {"optimizer": partial(torch.optim.SGD, lr=0.05), **options}
    network = network or tiny_network_config(auxiliary_labels=("age", "emotion"))
    if network.auxiliary_labels:
        options.setdefault("auxiliary", AuxiliaryWeights(ctc=0.3, text_ctc=0.5, labels=2.0))
    return EmpathyStage(tokens=tokens, network=network, **options)


def make_trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "enable_checkpointing": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**quiet, **defaults, **options})


def train(
    stage: EChatStage,
    batches: list[PackedBatch],
    folder: Path,
    *callbacks: Callback,
    validation: list[PackedBatch] | None = None,
    first: int = 0,
    ckpt_path: Path | None = None,
    **options: Any,
) -> Trainer:
    """Train, and leave rank<n>.pt of `Record` in the folder."""
    trainer = make_trainer(folder, Record(folder), *callbacks, **options)
    trainer.fit(stage, datamodule=Listed(batches, validation, first), ckpt_path=ckpt_path)
    return trainer


def recorded(folder: Path, *, window: int = 1) -> tuple[list[float], dict[str, Tensor]]:
    """The loss per supervised id of each optimizer step over all ranks, and the weights at the end."""
    ranks = [torch.load(file) for file in sorted(folder.glob("rank*.pt"))]
    steps = len(ranks[0]["losses"]) // window
    curve = []
    for step in range(steps):
        seen = [pair for rank in ranks for pair in rank["losses"][step * window : (step + 1) * window]]
        # Lightning has divided each loss by the window.
        curve.append(window * sum(loss for loss, _ in seen) / max(1, sum(count for _, count in seen)))
    return curve, ranks[0]["weights"]


def batches_of(tokenizer: DialogueTokenizer) -> tuple[list[PackedBatch], list[PackedBatch]]:
    """The micro-batches, and the same dialogues as one batch a step."""
    number = 0
    micro, dialogues = [], []
    for names in MICRO_BATCHES:
        dialogues.append([])
        for name in names:
            task = task_from_name(name, labels=("age",))
            dialogues[-1].append(dummy_tokenized(tokenizer, task, number=number, exchanges=1 + number % 2))
            number += 1
        micro.append(collate(dialogues[-1], padding=tokenizer.vocabulary.padding))
    whole = [collate(list(chain(*dialogues[at : at + 4])), padding=tokenizer.vocabulary.padding) for at in (0, 4)]
    return micro, whole


class TinyData(Listed):
    """`Listed` for the command line: the micro-batches, from the optimizer step on at which a run was saved."""

    def __init__(self, tokens: TokensConfig) -> None:
        micro, _ = batches_of(DialogueTokenizer.from_config(tokens))
        super().__init__(micro, validation=micro[:4])

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {"first": self.trainer.global_step * self.trainer.accumulate_grad_batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.first = state_dict["first"]


class KillOnce(Callback):
    """Kills one rank, the first time that a run has made two steps and comes to the moment.

    Args:
        mark: A file that remembers it.
        moment: In the third step; in the saving after it, with this rank's shard on disk and others' not waited for;
            or in the validation after the second.
        rank: Which.
    """

    def __init__(self, mark: Path, moment: Literal["step", "checkpoint", "validation"] = "step", rank: int = 1) -> None:
        self.mark, self.moment, self.rank = mark, moment, rank

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._kill("step", trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._kill("validation", trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        written = FileSystemWriter.write_data

        def write_and_die(*args: Any) -> Any:
            result = written(*args)
            self._kill("checkpoint", trainer)
            return result

        if trainer.global_step == 3:
            patched: Any = FileSystemWriter
            patched.write_data = write_and_die

    def _kill(self, moment: str, trainer: Trainer) -> None:
        here = trainer.global_step >= 2 and trainer.global_rank == self.rank and not self.mark.exists()
        if here and moment == self.moment:
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class WaitOnce(Callback):
    """The first time that a run comes to its third step, says so with a file and waits until that is gone."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        own = self.mark.with_name(f"{self.mark.name}{trainer.global_rank}")
        done = own.with_name(f"{own.name}.done")
        if trainer.global_step == 2 and not done.exists():
            done.touch()
            own.touch()
            while own.exists():
                time.sleep(0.1)
