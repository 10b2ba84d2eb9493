"""What generated answers cost in validation while a network trains, sharded or not.

    python -m benchmarks.evaluation_cost
    torchrun --standalone --nproc-per-node 2 -m benchmarks.evaluation_cost --strategy fsdp

Trains a few steps with random weights, then validates with ParalinguisticAccuracy and EmpathyEvaluation, which share
one generation. Answers of random weights run to the limit, so the ids written are those asked for. The first training
step and the first validation batch are not timed; in the latter, what collective calls bring is counted instead.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from benchmarks.networks import SIZES, network_of, tokens_of
from benchmarks.train_step import dialogues, strategy_of
from callbacks.empathy_evaluation import EmpathyEvaluation
from callbacks.paralinguistic_accuracy import ParalinguisticAccuracy
from lightning_echat.contracts import PackedBatch
from lightning_echat.decoding import DecodingConfig
from lightning_echat.stages.empathy import EmpathyStage
from lightning_echat.testing import dummy_batch
from lightning_echat.tokens.dialogue_template import DialogueTokenizer
from lightning_echat.tokens.tasks import task_from_name

TASKS = ("transcribe_and_label", "speech_to_text.label_thinking")
_STEPS = 4


class CountGathered(TorchDispatchMode):
    """Bytes that all-gathers bring to this rank from others."""

    def __init__(self) -> None:
        super().__init__()
        self.received = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "allgather" in func._opname:
            world = torch.distributed.get_world_size()
            flat = tree_leaves(args[0])
            self.received += sum(t.nbytes for t in flat if isinstance(t, Tensor)) * (world - 1) / world
        return func(*args, **(kwargs or {}))


class MeasureAnswers(Callback):
    """Stands before the callbacks that answer, and so sees when a batch's loss is there and they begin."""

    def __init__(self) -> None:
        self.seconds = {"train": 0.0, "loss": 0.0, "answers": 0.0}
        self.gathered = {"loss": 0.0, "answers": 0.0}
        self.batches = 0
        self._since = 0.0
        self._counting: CountGathered | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx:
            self.seconds["train"] += (time.perf_counter() - self._since) / (_STEPS - 1)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._answered()
        if batch_idx == 0:
            self._counting = CountGathered()
            self._counting.__enter__()
        self._since = time.perf_counter()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        now = time.perf_counter()
        if self._counting is not None:
            self.gathered["loss"] = self._counting.received
        else:
            self.seconds["loss"] += now - self._since
        self._since, self.batches = now, batch_idx + 1

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._answered()

    def _answered(self) -> None:
        """The batch before has its answers by now."""
        if self._counting is not None:
            self._counting.__exit__(None, None, None)
            self.gathered["answers"] = self._counting.received - self.gathered["loss"]
            self._counting = None
        elif self.batches:
            self.seconds["answers"] += time.perf_counter() - self._since


class Dialogues(LightningDataModule):
    """The same rows in every step, and a validation set whose batches hold a dialogue of each task."""

    validation_names = ("dialogue",)

    def __init__(self, tokenizer: DialogueTokenizer, *, rank: int, row_length: int, batches: int) -> None:
        super().__init__()
        self.trained = [dialogues(tokenizer, rows=1, row_length=row_length, seed=rank)] * _STEPS
        tasks = [task_from_name(name, labels=("age",)) for name in TASKS]
        self.validated = [dummy_batch(tokenizer, tasks, first=10 * (rank + n)) for n in range(batches)]

    def train_dataloader(self) -> DataLoader[PackedBatch]:
        return DataLoader(self.trained, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[PackedBatch]:
        return DataLoader(self.validated, batch_size=None)  # type: ignore[arg-type]


def measure(*, size: str, strategy: str, batches: int, text_ids: int, row_length: int) -> dict[str, Any]:
    """Train and validate on this rank; what it saw."""
    gpu = torch.cuda.is_available()
    compute = "bfloat16" if gpu else "float32"
    with tempfile.TemporaryDirectory() as folder:
        tokens = tokens_of(SIZES[size], Path(folder))
        tokenizer = DialogueTokenizer.from_config(tokens)
        torch.manual_seed(0)
        stage = EmpathyStage(
            tokens=tokens,
            network=network_of(SIZES[size], recompute=False),
            optimizer=partial(torch.optim.AdamW, lr=1e-4),
            decoding=DecodingConfig(max_text_ids=text_ids),
        )
        measuring = MeasureAnswers()
        trainer = Trainer(
            accelerator="gpu" if gpu else "cpu",
            devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")),
            strategy=strategy_of(strategy, compute=compute),
            precision="bf16-mixed" if gpu and strategy != "fsdp" else "32-true",
            max_steps=_STEPS,
            val_check_interval=_STEPS,
            num_sanity_val_steps=0,
            callbacks=[measuring, ParalinguisticAccuracy(max_batches=batches), EmpathyEvaluation(max_batches=batches)],
            default_root_dir=folder,
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            logger=False,
        )
        rank = int(os.environ.get("RANK", "0"))
        trainer.fit(stage, datamodule=Dialogues(tokenizer, rank=rank, row_length=row_length, batches=batches))
    timed = batches - 1
    seconds = {name: spent / (1 if name == "train" else timed) for name, spent in measuring.seconds.items()}
    parameters = sum(parameter.numel() for parameter in stage.parameters())
    return {"seconds": seconds, "gathered": measuring.gathered, "parameters": parameters}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--strategy", choices=("single", "ddp", "fsdp"), default="single")
    parser.add_argument(
        "--batches", type=int, default=4, help="of the validation set, for each rank; the first warms up"
    )
    parser.add_argument("--text_ids", type=int, default=32, help="that an answer is long")
    parser.add_argument("--row_length", type=int, default=256, help="ids of the row that a step trains on")
    options = parser.parse_args()
    if options.batches < 2:
        parser.error("--batches must be at least 2")
    found = measure(**vars(options))
    if int(os.environ.get("RANK", "0")):
        return
    seconds, gathered = found["seconds"], found["gathered"]
    about = {**vars(options), "processes": int(os.environ.get("WORLD_SIZE", "1")), "torch": torch.__version__}
    share = seconds["answers"] / (seconds["answers"] + seconds["loss"])
    sys.stdout.write(
        f"{json.dumps(about)}\n"
        f"training step                    {seconds['train']:8.3f} s\n"
        f"validation batch, loss           {seconds['loss']:8.3f} s   gathered {gathered['loss'] / 1e6:9.1f} MB\n"
        f"validation batch, {len(TASKS)} answers      {seconds['answers']:8.3f} s   "
        f"gathered {gathered['answers'] / 1e6:9.1f} MB\n"
        f"answers: {share:.0%} of validation, {seconds['answers'] / seconds['train']:.1f} training steps a batch, "
        f"{gathered['answers'] / (4 * found['parameters']):.1f} times the weights gathered\n"
    )


if __name__ == "__main__":
    main()
