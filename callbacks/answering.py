"""What the callbacks that look at answers share: who answers, the names of the sets, how figures are logged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_echat.contracts import GeneratedReply, PackedBatch, UserError
from lightning_echat.parallel import first_of_group
from lightning_echat.stages.evaluated_sets import set_keys
from lightning_echat.tokens.prompts import PromptSet


class _Tokenizer(Protocol):
    @property
    def prompt_set(self) -> PromptSet: ...


class AnsweringStage(Protocol):
    """The part of `EChatStage` that these callbacks use."""

    @property
    def dialogue_tokenizer(self) -> _Tokenizer:
        """Holds the prompt set, which holds the wording of thinking."""
        ...

    def answers(self, batch: PackedBatch) -> list[GeneratedReply]:
        """One reply per reference of the batch, in their order; the last batch's are remembered."""
        ...


def answering_stage(pl_module: LightningModule, *, callback: object) -> AnsweringStage:
    """The module as one that answers; refuses one that cannot, rather than measure nothing."""
    if not callable(getattr(pl_module, "answers", None)):
        name, module = type(callback).__name__, type(pl_module).__name__
        raise UserError(f"{name} needs a stage that answers, which {module} does not; take {name} out")
    return cast(AnsweringStage, pl_module)


class ValidationCallback(Callback):
    """Base of callbacks that look at validation sets: in `echat test` they do the same with its sets."""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As in validation."""
        self.on_validation_start(trainer, pl_module)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: PackedBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """As in validation."""
        self.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As in validation."""
        self.on_validation_epoch_end(trainer, pl_module)


class AnswerMetrics(ValidationCallback):
    """Base of callbacks that measure the answers to the first batches of every validation set, or to every test set.

    Args:
        max_batches: Batches of each validation set, on each rank, that are answered. A test set is answered whole.
    """

    def __init__(self, *, max_batches: int) -> None:
        super().__init__()
        if max_batches < 1:
            raise UserError(f"{type(self).__name__}: max_batches must be at least 1, not {max_batches}")
        self.max_batches = max_batches

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that does not answer."""
        answering_stage(pl_module, callback=self)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: PackedBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Answer the batch and add the answers. Every rank answers, as generation may be collective."""
        enough = batch_idx >= self.max_batches and not trainer.testing
        if trainer.sanity_checking or enough or not self._due():
            return
        stage = answering_stage(pl_module, callback=self)
        replies = stage.answers(batch)
        if first_of_group(trainer):
            self._add(stage, replies, key=named_sets(trainer)[dataloader_idx])

    def _due(self) -> bool:
        """Whether this validation is measured: the same on every rank."""
        return True

    def _add(self, stage: AnsweringStage, replies: list[GeneratedReply], *, key: str) -> None:
        """Add the answers to a batch to what is measured of its set, whose figures begin with `key`."""
        raise NotImplementedError


def named_sets(trainer: Trainer) -> list[str]:
    """See `set_keys`; refuses a datamodule that names none."""
    if not (keys := set_keys(trainer)):
        raise UserError("metrics are named after sets; use a datamodule that lists validation_names")
    return keys


def log_validation(pl_module: LightningModule, values: Mapping[str, float]) -> None:
    """Log figures that all ranks agree on, at the end of a validation. What is NaN has no data and is left out."""
    for name, value in values.items():
        if not math.isnan(value):
            # Every rank holds the same value: the mean over ranks changes nothing and spares Lightning's warning.
            pl_module.log(name, value, sync_dist=True, rank_zero_only=False)
