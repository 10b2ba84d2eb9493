"""What the callbacks that look at answers share: who answers, the names of the sets, how figures are logged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol, cast

from lightning.pytorch import LightningModule, Trainer

from lightning_echat.contracts import GeneratedReply, PackedBatch, UserError
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


def validation_names(trainer: Trainer) -> list[str]:
    """The validation sets in dataloader order, the same on every rank."""
    names = getattr(getattr(trainer, "datamodule", None), "validation_names", None)
    if not names:
        raise UserError("validation metrics are named after sets; use a datamodule that lists validation_names")
    return list(names)


def log_validation(pl_module: LightningModule, values: Mapping[str, float]) -> None:
    """Log figures that all ranks agree on, at the end of a validation. What is NaN has no data and is left out."""
    for name, value in values.items():
        if not math.isnan(value):
            # Every rank holds the same value: the mean over ranks changes nothing and spares Lightning's warning.
            pl_module.log(name, value, sync_dist=True, rank_zero_only=False)
