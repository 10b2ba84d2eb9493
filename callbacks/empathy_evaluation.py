"""How well replies honour the voice they answer, while the model trains: the rubric judge on the validation sets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from torchmetrics import SumMetric

from callbacks.answering import AnsweringStage, AnswerMetrics, log_validation, named_sets
from lightning_echat.contracts import GeneratedReply
from lightning_echat.evaluation.items import CATEGORIES
from lightning_echat.evaluation.judging import JudgeScore
from lightning_echat.evaluation.rubric import DEFAULT_RUBRIC, RubricJudge
from lightning_echat.metrics import MeanScore, parse_answer
from lightning_echat.tokens.tasks import traits_of
from lightning_echat.tokens.thinking import ThinkingFormat


class EmpathyEvaluation(AnswerMetrics):
    """Logs the rubric judge's scores (0 to 100) of the validation sets whose task is a conversation.

    Keys: `val/<set>/empathy/<category>` for the categories of `evaluation.items`, `val/<set>/empathy/mean` over all
    replies to queries that carry a cue, and `val/<set>/empathy/count`, how many those are. A set without such replies
    has no such key.

    Args:
        max_batches: Batches of each set, on each rank, that are answered.
        rubric: Name of a shipped rubric, or path of a YAML file.
    """

    def __init__(self, *, max_batches: int = 8, rubric: str = DEFAULT_RUBRIC) -> None:
        super().__init__(max_batches=max_batches)
        self.judge = RubricJudge(rubric)
        self._sums: dict[str, _ScoreSums] = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start empty. Every rank has every set's sums, whatever it will see of them."""
        if not trainer.sanity_checking:
            self._sums = {key: _ScoreSums(pl_module.device) for key in named_sets(trainer)}

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the means over all ranks."""
        if trainer.sanity_checking:
            return
        for key, sums in self._sums.items():
            values = sums.compute()
            log_validation(pl_module, {f"{key}/empathy/{what}": value for what, value in values.items()})

    def _add(self, stage: AnsweringStage, replies: list[GeneratedReply], *, key: str) -> None:
        fmt = stage.dialogue_tokenizer.prompt_set.thinking
        judged = [self._judge(reply, fmt) for reply in replies if traits_of(reply.reference.task).converses]
        self._sums[key].update([score for score in judged if not math.isnan(score.total)])

    def _judge(self, reply: GeneratedReply, fmt: ThinkingFormat) -> JudgeScore:
        asked = reply.reference
        return self.judge.score(asked.transcript, labels=asked.labels, reply=parse_answer(reply, fmt=fmt).reply)


class _ScoreSums:
    """Mean per category, mean over all, and the number of replies, of one set."""

    def __init__(self, device: torch.device) -> None:
        self._categories = {category: MeanScore().to(device) for category in CATEGORIES}
        self._all = MeanScore().to(device)
        self._count = SumMetric().to(device)

    def update(self, scores: Sequence[JudgeScore]) -> None:
        for category, metric in self._categories.items():
            metric.update([score.by_category[category] for score in scores if category in score.by_category])
        self._all.update([score.total for score in scores])
        self._count.update(len(scores))

    def compute(self) -> dict[str, float]:
        """Name -> value over all ranks, NaN without replies."""
        values = {category: float(metric.compute()) for category, metric in self._categories.items()}
        return {**values, "mean": float(self._all.compute()), "count": float(self._count.compute()) or math.nan}
