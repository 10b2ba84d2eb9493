"""What `echat predict` leaves: every answer as a JSON line."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.answering import answering_stage
from lightning_echat.contracts import GeneratedReply, PackedBatch, UserError
from lightning_echat.metrics import parse_answer
from lightning_echat.parallel import data_share, first_of_group
from lightning_echat.tokens.thinking import ThinkingFormat


class PredictionWriter(Callback):
    """Writes `predictions/<set>-<share>-of-<shares>.jsonl` into the run's folder, a file for each rank's share.

    A line holds `key`, `source`, `shard` and `task` of the dialogue, what was asked (`transcript`, `labels`), the
    answer as written (`text`, `speech_codes`, `finished`), and as read (`answer`: `transcript`, `labels`,
    `reply_emotion`, `reply`, `well_formed`). A file has its name only once it is complete.
    """

    def __init__(self) -> None:
        super().__init__()
        self._files: dict[Path, IO[str]] = {}
        self._names: list[str] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a file for every set; one that no dialogue falls to stays empty."""
        answering_stage(pl_module, callback=self)
        self._files = {}
        if not first_of_group(trainer):
            return
        names = getattr(getattr(trainer, "datamodule", None), "test_names", None)
        if not names:
            raise UserError("predictions are named after sets; use a datamodule that lists test_names")
        self._names = list(names)
        folder = Path(trainer.default_root_dir) / "predictions"
        folder.mkdir(parents=True, exist_ok=True)
        share, shares = data_share(trainer)
        for name in names:
            path = folder / f"{name.replace('/', '_')}-{share:05d}-of-{shares:05d}.jsonl"
            self._files[path] = path.with_suffix(".partial").open("w", encoding="utf-8")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: PackedBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the answers of the batch."""
        if self._files:
            fmt = answering_stage(pl_module, callback=self).dialogue_tokenizer.prompt_set.thinking
            file = list(self._files.values())[dataloader_idx]
            file.writelines(json.dumps(_line(reply, fmt), ensure_ascii=False) + "\n" for reply in outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the files their names."""
        for path, file in self._files.items():
            file.close()
            path.with_suffix(".partial").replace(path)
        if trainer.is_global_zero:
            sys.stdout.write(f"{Path(trainer.default_root_dir) / 'predictions'}: {', '.join(self._names)}\n")
        self._files = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave what there is as `.partial`."""
        for file in self._files.values():
            file.close()
        self._files = {}


def _line(reply: GeneratedReply, fmt: ThinkingFormat) -> dict[str, Any]:
    asked = reply.reference
    answer = asdict(parse_answer(reply, fmt=fmt))
    return {
        **{name: getattr(asked, name) for name in ("key", "source", "shard", "task", "transcript", "labels")},
        "text": reply.text,
        "speech_codes": reply.speech_codes.tolist(),
        "finished": reply.finished,
        "answer": {name: answer[name] for name in ("transcript", "labels", "reply_emotion", "reply", "well_formed")},
    }
