"""What the model hears while it trains: it answers the validation sets, and its words and labels are scored."""

from __future__ import annotations

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from callbacks.answering import AnsweringStage, AnswerMetrics, log_validation, named_sets
from lightning_echat.contracts import GeneratedReply
from lightning_echat.metrics import UNPARSED, UnderstandingMetrics, parse_answer
from lightning_echat.tokens.paralinguistics import LABEL_SETS


class ParalinguisticAccuracy(AnswerMetrics):
    """Logs accuracy and macro-F1 per label set, word error rate and think-parse rate of every validation set.

    Keys: `val/<set>/accuracy/<label set>`, `val/<set>/macro_f1/<label set>`, `val/<set>/majority_baseline/<label set>`,
    `val/<set>/wer`, `val/<set>/think_parse_rate`; a set without answers of a kind has no such key. Confusion matrices
    go to W&B as images under `val/<set>/confusion/<label set>`.

    Args:
        max_batches: Batches of each set, on each rank, that are answered. Answering costs far more than a loss.
    """

    def __init__(self, *, max_batches: int = 8) -> None:
        super().__init__(max_batches=max_batches)
        self._metrics: dict[str, UnderstandingMetrics] = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start empty. Every rank has every set's metrics, whatever it will see of them."""
        if not trainer.sanity_checking:
            self._metrics = {key: UnderstandingMetrics(device=pl_module.device) for key in named_sets(trainer)}

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was added, over all ranks."""
        if trainer.sanity_checking:
            return
        for key, metrics in self._metrics.items():
            log_validation(pl_module, {f"{key}/{what}": value for what, value in metrics.compute().items()})
            for label_set, matrix in metrics.confusions().items():
                _log_confusion(trainer, f"{key}/confusion/{label_set}", matrix, label_set)

    def _add(self, stage: AnsweringStage, replies: list[GeneratedReply], *, key: str) -> None:
        fmt = stage.dialogue_tokenizer.prompt_set.thinking
        answers = [parse_answer(reply, fmt=fmt) for reply in replies]
        self._metrics[key].update([reply.reference for reply in replies], answers)


def _log_confusion(trainer: Trainer, key: str, matrix: Tensor, label_set: str) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and trainer.is_global_zero:
            logger.log_image(key, [draw_confusion(matrix, label_set=label_set)], step=trainer.global_step)


def draw_confusion(matrix: Tensor, *, label_set: str) -> NDArray[np.uint8]:
    """[classes, classes + 1] counts -> [height, width, 3] image: rows true, columns answered, labels that occur."""
    labels = LABEL_SETS[label_set]
    met = [i for i in range(len(labels)) if matrix[i].any() or matrix[:, i].any()]
    shown = matrix[met][:, [*met, len(labels)]].numpy()
    figure = Figure(figsize=(1.6 + 0.6 * shown.shape[1], 1.2 + 0.5 * shown.shape[0]), dpi=100, layout="constrained")
    # The figure is drawn without pyplot, whose state is global.
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(shown / shown.sum(axis=1, keepdims=True).clip(min=1), cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_xticks(range(shown.shape[1]), [*(labels[i] for i in met), UNPARSED], rotation=45, ha="right")
    axes.set_yticks(range(shown.shape[0]), [labels[i] for i in met])
    axes.set(xlabel="answered", ylabel="true", title=label_set)
    for (row, column), count in np.ndenumerate(shown):
        axes.text(column, row, str(count), ha="center", va="center")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
