"""The tiny model trained over several processes in every way, and compared with one process."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from callbacks.empathy_evaluation import EmpathyEvaluation
from callbacks.paralinguistic_accuracy import ParalinguisticAccuracy
from callbacks.stage_checkpoint import StageCheckpoint
from lightning_echat.contracts import PackedBatch
from lightning_echat.decoding import DecodingConfig
from lightning_echat.nn.echat_model import NetworkConfig
from lightning_echat.nn.speech_language_model import LoRAConfig
from lightning_echat.parallel import ShardedStrategy
from lightning_echat.stages.base import EChatStage
from lightning_echat.testing import dummy_batch, tiny_network_config
from lightning_echat.tokens.dialogue_template import DialogueTokenizer, TokensConfig
from lightning_echat.tokens.tasks import task_from_name
from tests.tiny_training import batches_of, make_stage, recorded, train

ADAM = partial(torch.optim.AdamW, lr=0.01)
LIMIT = timedelta(seconds=300)
"""More than any test waits: what hangs is seen by that, and not after it."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training: how it is spread, and what of the network trains.

    Attributes:
        sharding: Options of `ShardedStrategy`; None for DDP.
        again: Parts whose layers are computed again in backward.
        lora: Whether the language model is adapted by LoRA.
        compiled: Whether blocks are compiled.
        trainable: Patterns of what trains.
        tolerance: Of the curve and of the weights.
    """

    sharding: dict[str, Any] | None = field(default_factory=dict)
    again: tuple[str, ...] = ()
    lora: bool = False
    compiled: bool = False
    trainable: tuple[str, ...] = ("*",)
    tolerance: float = 1e-5

    def network(self) -> NetworkConfig:
        lora = LoRAConfig(rank=4, dropout=0.0) if self.lora else None
        config = tiny_network_config(auxiliary_labels=("age", "emotion"), lora=lora)
        again = {part: replace(getattr(config, part), gradient_checkpointing=True) for part in self.again}
        return replace(config, **again)

    def train(self, tokens: TokensConfig, folder: Path, *, alone: bool = False, world: int = 2) -> None:
        micro, whole = batches_of(DialogueTokenizer.from_config(tokens))
        stage = make_stage(tokens, network=self.network(), trainable=list(self.trainable), compile_blocks=self.compiled)
        options: dict[str, Any] = {"gradient_clip_val": 0.5}
        if not alone:
            strategy = DDPStrategy(timeout=LIMIT) if self.sharding is None else sharding(**self.sharding)
            groups = world // (self.sharding or {}).get("tensor_parallel", 1)
            options |= {"strategy": strategy, "devices": world, "accumulate_grad_batches": 4 // groups}
        train(stage, whole if alone else micro, folder, **options)


def sharding(**options: Any) -> ShardedStrategy:
    return ShardedStrategy(timeout=LIMIT, **options)


def train_cases(tokens: TokensConfig, folder: Path, cases: dict[str, Case], world: int = 2) -> None:
    for name, case in cases.items():
        case.train(tokens, folder / name, world=world)


def compare_with_one_process(tokens: TokensConfig, folder: Path, cases: dict[str, Case], *, window: int) -> None:
    ones: dict[Any, tuple[list[float], dict[str, Tensor]]] = {}
    for name, case in cases.items():
        alike = (case.lora, case.trainable)
        if alike not in ones:
            one = folder / f"one, as {name}"
            replace(case, again=(), compiled=False).train(tokens, one, alone=True)
            ones[alike] = recorded(one)
        curve, weights = ones[alike]
        spread, ends = recorded(folder / name, window=window)
        assert spread == pytest.approx(curve, rel=case.tolerance), name
        assert ends.keys() == weights.keys()
        for key, tensor in weights.items():
            close = {"atol": case.tolerance, "rtol": case.tolerance, "msg": lambda m, n=f"{name}: {key}": f"{n}: {m}"}
            torch.testing.assert_close(ends[key], tensor, **close)


class KeepAnswers(Callback):
    """Each rank writes down what its model answers in validation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answers: dict[str, Any] = {}

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PackedBatch, batch_idx: int, *_: Any
    ) -> None:
        assert isinstance(pl_module, EChatStage)
        for reply in pl_module.answers(batch):
            key = f"{trainer.global_step} {reply.reference.key}"
            self.answers[key] = (reply.text_ids, reply.speech_codes.tolist(), reply.finished)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        self.folder.mkdir(exist_ok=True, parents=True)
        torch.save({"answers": self.answers, "metrics": metrics}, self.folder / f"answers{trainer.global_rank}.pt")


def train_and_answer(
    tokens: TokensConfig, folder: Path, *, alone: bool = False, strategy: ShardedStrategy | None = None
) -> None:
    tokenizer = DialogueTokenizer.from_config(tokens)
    micro, whole = batches_of(tokenizer)
    spoken, written = task_from_name("text_to_speech"), task_from_name("speech_to_text.label_thinking")
    heard = task_from_name("transcribe_and_label", labels=("age",))
    # Rank 0 writes long text and then speech; rank 1 speech, and then it has nothing to answer.
    tasks = [[written, heard], [spoken], [spoken, written], []]
    validation = [dummy_batch(tokenizer, each, first=10 * n) for n, each in enumerate(tasks)]
    decoding = DecodingConfig(max_text_ids=20, max_speech_ids=12)
    strategy = strategy or sharding()
    window = 2 * strategy.tensor_parallel
    spread: dict[str, Any] = {"strategy": strategy, "devices": 2, "accumulate_grad_batches": window}
    train(
        make_stage(tokens, decoding=decoding),
        whole if alone else micro,
        folder,
        ParalinguisticAccuracy(),
        EmpathyEvaluation(),
        KeepAnswers(folder),
        validation=validation,
        val_check_interval=1 if alone else window,
        check_val_every_n_epoch=None,
        **({} if alone else spread),
    )


def saving(folder: Path) -> StageCheckpoint:
    return StageCheckpoint(dirpath=folder, save_last="link", save_top_k=-1, every_n_train_steps=1)


def train_part(
    tokens: TokensConfig,
    folder: Path,
    *,
    world: int,
    strategy: ShardedStrategy | None,
    ckpt_path: Path | None = None,
    callbacks: tuple[Callback, ...] = (),
) -> None:
    """Two steps with saving, or the second of them from a checkpoint of the first."""
    micro, whole = batches_of(DialogueTokenizer.from_config(tokens))
    accumulate = 4 * strategy.tensor_parallel // world if strategy else 1
    spread: dict[str, Any] = {"strategy": strategy, "devices": world} if strategy else {"devices": 1}
    train(
        make_stage(tokens, optimizer=ADAM),
        micro if strategy else whole,
        folder,
        *callbacks,
        *([] if ckpt_path else [saving(folder / "checkpoints")]),
        first=accumulate if ckpt_path else 0,
        ckpt_path=ckpt_path,
        max_steps=2,
        accumulate_grad_batches=accumulate,
        enable_checkpointing=ckpt_path is None,
        **spread,
    )


def same_ends(first: Path, second: Path, *, tolerance: float, windows: tuple[int, int] = (2, 2)) -> None:
    (curve, weights), (other, others) = (recorded(f, window=w) for f, w in zip((first, second), windows, strict=True))
    assert other[-1] == pytest.approx(curve[-1], rel=max(tolerance, 1e-12))
    for key, tensor in weights.items():
        torch.testing.assert_close(others[key], tensor, atol=tolerance, rtol=tolerance)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())
