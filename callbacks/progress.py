"""Progress for people: a bar on a terminal, and in a file or a pipe one plain line now and then."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from callbacks.batch_tally import BatchTally
from lightning_echat.contracts import PackedBatch, UserError


class ProgressBar(RichProgressBar):
    """Lightning's rich bar where standard output is a terminal, and plain lines elsewhere.

    A line reads `understanding  step 120/800  loss 3.214  5230 tokens/s  eta 0:02:10`; the first word is the name of
    the run's folder.

    Args:
        seconds_between_lines: Of the plain form.
    """

    def __init__(self, *, seconds_between_lines: float = 10.0) -> None:
        super().__init__(refresh_rate=4)
        if seconds_between_lines <= 0:
            raise UserError(f"ProgressBar: seconds_between_lines must be positive, not {seconds_between_lines:g}")
        self.seconds_between_lines = seconds_between_lines
        self._lines: _Lines | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the form, now that standard output is what it will be."""
        super().setup(trainer, pl_module, stage)
        self._lines = None
        if not sys.stdout.isatty():
            self.disable()
            if trainer.is_global_zero:
                self._lines = _Lines(Path(trainer.default_root_dir).name, every=self.seconds_between_lines)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        if self._lines is not None:
            self._lines.start(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PackedBatch, batch_idx: int
    ) -> None:
        """Move the bar, or write a line when it is time."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._lines is not None:
            last = 0 < trainer.max_steps <= trainer.global_step
            self._lines.trained(batch, step=trainer.global_step, steps=trainer.max_steps, last=last, trainer=trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Move the bar, or say that a long validation is alive."""
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        if self._lines is not None and not trainer.sanity_checking:
            self._lines.validated(batch_idx, dataloader_idx)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The metrics of the bar without the run's id, which tells nobody anything."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


class _Lines:
    """The plain form: what to say and when."""

    def __init__(self, name: str, *, every: float) -> None:
        self._name = name
        self._every = every
        self._tally = BatchTally()
        self._wrote_at = self._started_at = time.monotonic()
        self._first_step = 0

    def start(self, step: int) -> None:
        self._wrote_at = self._started_at = time.monotonic()
        self._first_step = step

    def trained(self, batch: PackedBatch, *, step: int, steps: int, last: bool, trainer: Trainer) -> None:
        self._tally.add(batch)
        since = time.monotonic() - self._wrote_at
        if since < self._every and not last:
            return
        parts = [f"step {step}/{steps}" if steps > 0 else f"step {step}"]
        if (loss := trainer.callback_metrics.get("train/loss")) is not None:
            parts.append(f"loss {float(loss):.3f}")
        parts.append(f"{self._tally.read().tokens / max(since, 1e-9):.0f} tokens/s")
        parts.append(self._remaining(step, steps))
        self._write(*parts)

    def validated(self, batch: int, dataloader: int) -> None:
        if time.monotonic() - self._wrote_at >= self._every:
            self._write(f"validating set {dataloader + 1}, batch {batch + 1}")

    def _remaining(self, step: int, steps: int) -> str:
        """Time left at the pace so far, validations included; time gone where no end is set."""
        gone = time.monotonic() - self._started_at
        done = step - self._first_step
        if steps <= 0 or done == 0:
            return f"{_clock(gone)} gone"
        return f"eta {_clock(gone / done * (steps - step))}"

    def _write(self, *parts: str) -> None:
        sys.stdout.write("  ".join([self._name, *parts]) + "\n")
        sys.stdout.flush()
        self._wrote_at = time.monotonic()
        self._tally = BatchTally()


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(max(seconds, 0.0))))
