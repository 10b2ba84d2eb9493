"""Dialogues to listen to while the model trains: a W&B table a validation set."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from callbacks.answering import ValidationCallback, answering_stage, named_sets
from lightning_echat.contracts import SAMPLE_RATE, GeneratedReply, PackedBatch, SampleRejected, UserError
from lightning_echat.data.query_audio import read_query_audio
from lightning_echat.evaluation.rubric import DEFAULT_RUBRIC, RubricJudge
from lightning_echat.metrics import ParsedAnswer, parse_answer
from lightning_echat.nn.token2wav.interface import Token2Wav, load_token2wav
from lightning_echat.tokens.paralinguistics import LABEL_SETS
from lightning_echat.tokens.tasks import traits_of
from lightning_echat.tokens.thinking import ThinkingFormat

_LOG = logging.getLogger(__name__)

COLUMNS = [
    "key",
    "task",
    "query",
    "labels",
    "transcript",
    "heard labels",
    "heard words",
    "thinking",
    "reply",
    "reply audio",
    "reference reply",
    "score",
]


class DialoguePanel(ValidationCallback):
    """Logs the first dialogues of every validation set to W&B as a table `val/<set>/dialogues`.

    A row holds the query to listen to, its labels and words, what the model heard, its thinking, its reply in words and
    as audio, and the rubric judge's score. A query that cannot be read again has an empty cell.

    Args:
        rows: Dialogues of each set, all from its first batch.
        every_n_validations: One table for so many validations, beginning with the first.
        token2wav: Folder of what turns speech codes into a waveform, where it is not `tokens.speech_tokenizer` of the
            stage; with neither there is no reply audio.
        rubric: Name of a shipped rubric, or path of a YAML file.
    """

    def __init__(
        self,
        *,
        rows: int = 4,
        every_n_validations: int = 1,
        token2wav: str | None = None,
        rubric: str = DEFAULT_RUBRIC,
    ) -> None:
        super().__init__()
        if rows < 1 or every_n_validations < 1:
            raise UserError("DialoguePanel: rows and every_n_validations must be at least 1")
        self.rows = rows
        self.every_n_validations = every_n_validations
        self.token2wav = token2wav
        self.judge = RubricJudge(rubric)
        self._decoder: Token2Wav | None = None
        self._validations = 0
        self._tables: dict[str, list[list[Any]]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse to start where nothing could be shown."""
        answering_stage(pl_module, callback=self)
        if not _wandb_loggers(trainer) and not getattr(trainer, "fast_dev_run", False):
            raise UserError("DialoguePanel writes W&B tables; give trainer.logger a WandbLogger or take it out")
        folder = self.token2wav or getattr(getattr(pl_module, "tokens", None), "speech_tokenizer", None)
        if folder and trainer.is_global_zero:
            self._decoder = load_token2wav(Path(folder))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: PackedBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Answer the first batch of a set. Every rank answers, as generation may be collective; rank 0 keeps rows."""
        if trainer.sanity_checking or batch_idx > 0 or self._validations % self.every_n_validations:
            return
        stage = answering_stage(pl_module, callback=self)
        replies = stage.answers(batch)
        if trainer.is_global_zero and _wandb_loggers(trainer):
            fmt = stage.dialogue_tokenizer.prompt_set.thinking
            key = named_sets(trainer)[dataloader_idx]
            self._tables[key] = [self._row(reply, fmt) for reply in replies[: self.rows]]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the tables."""
        if trainer.sanity_checking:
            return
        self._validations += 1
        for key, rows in self._tables.items():
            for logger in _wandb_loggers(trainer):
                logger.log_table(f"{key}/dialogues", columns=list(COLUMNS), data=rows, step=trainer.global_step)
        self._tables = {}

    def state_dict(self) -> dict[str, Any]:
        """How many validations there were, so that a resumed run keeps the rhythm."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._validations = state_dict["validations"]

    def _row(self, reply: GeneratedReply, fmt: ThinkingFormat) -> list[Any]:
        asked = reply.reference
        answer = parse_answer(reply, fmt=fmt)
        return [
            asked.key,
            asked.task,
            _query_cell(reply),
            _words(asked.labels),
            asked.transcript,
            _words(answer.labels),
            answer.transcript or "",
            _thinking(reply, answer, fmt),
            answer.reply,
            self._reply_cell(reply, answer),
            asked.reply,
            self._score(reply, answer),
        ]

    def _reply_cell(self, reply: GeneratedReply, answer: ParsedAnswer) -> wandb.Audio | None:
        if self._decoder is None or reply.speech_codes.numel() == 0:
            return None
        waveform = self._decoder.decode(reply.speech_codes.cpu())
        return _audio(waveform, self._decoder.sample_rate, caption=answer.reply or reply.reference.key)

    def _score(self, reply: GeneratedReply, answer: ParsedAnswer) -> float | None:
        asked = reply.reference
        if not traits_of(asked.task).converses:
            return None
        total = self.judge.score(asked.transcript, labels=asked.labels, reply=answer.reply).total
        return None if math.isnan(total) else total


def _wandb_loggers(trainer: Trainer) -> list[WandbLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def _query_cell(reply: GeneratedReply) -> wandb.Audio | None:
    asked = reply.reference
    if not traits_of(asked.task).listens:
        return None
    try:
        waveform = read_query_audio(asked)
    except SampleRejected as problem:
        _LOG.warning("dialogue panel: the query of %s cannot be played: %s", asked.key, problem)
        return None
    return _audio(waveform, SAMPLE_RATE, caption=asked.transcript or asked.key)


def _audio(waveform: Tensor, sample_rate: int, *, caption: str) -> wandb.Audio:
    # Audio without a caption cannot be read back from a table (wandb 0.31).
    return wandb.Audio(waveform.detach().cpu().float().numpy(), sample_rate=sample_rate, caption=caption)


def _thinking(reply: GeneratedReply, answer: ParsedAnswer, fmt: ThinkingFormat) -> str:
    """The thinking as it was written, without markers; all that was written where it was never closed."""
    return reply.text.partition(fmt.close)[0].replace(fmt.open, "").strip() if answer.thinks else ""


def _words(labels: Mapping[str, str]) -> str:
    """Labels in one order, so that two cells can be compared at a glance."""
    return ", ".join(f"{name}: {labels[name]}" for name in LABEL_SETS if name in labels)
