"""Tells somebody who is not looking: a loss that is no number, a run that stands still, data that is thrown away."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import wandb
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.run_lineage import wandb_run
from lightning_echat.contracts import PackedBatch, UserError
from lightning_echat.data.read_errors import READ, SKIPPED

_LOG = logging.getLogger(__name__)
_LOOKS_A_SPAN = 10
"""How often the watchdog looks within the span after which it speaks."""


class Alerts(Callback):
    """Alerts once for each of three kinds: a line in the log, and a W&B alert, which offline arrives with the sync.

    - A training metric is not a number or infinite, at a logging step.
    - No optimizer step, and no batch of a validation, was finished for `stall_minutes`. A thread on rank 0 watches;
      once training moves again it may speak again.
    - More than `skip_share` of the samples that rank 0's readers have read were skipped, once they are
      `samples_to_judge`.

    Training goes on whatever is said. Costs nothing that waits for a device: metrics are read where they are logged.

    Args:
        stall_minutes: Of standing still; 0 for no watching.
        skip_share: Of samples, 0 to 1.
        samples_to_judge: Samples read before their share says anything.
    """

    def __init__(self, *, stall_minutes: float = 10.0, skip_share: float = 0.05, samples_to_judge: int = 200) -> None:
        super().__init__()
        if stall_minutes < 0 or not 0 <= skip_share <= 1:
            raise UserError("Alerts: stall_minutes must not be negative, and skip_share must lie between 0 and 1")
        self.stall_minutes = stall_minutes
        self.skip_share = skip_share
        self.samples_to_judge = samples_to_judge
        self._said: set[str] = set()
        self._counts: Counter[str] = Counter()
        self._seen_step = 0
        self._watchdog: _Watchdog | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch."""
        self._said.clear()
        self._counts.clear()
        if trainer.is_global_zero and self.stall_minutes:
            # The run is looked up now: a thread must not be the first to ask for it.
            run = wandb_run(trainer)
            self._watchdog = _Watchdog(60 * self.stall_minutes, tell=lambda text: _tell(run, "Run stands still", text))
            self._watchdog.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PackedBatch, batch_idx: int
    ) -> None:
        """Look at what was logged and at what came with the batch."""
        if not trainer.is_global_zero:
            return
        if self._watchdog:
            self._watchdog.moved(f"step {trainer.global_step}")
        self._counts.update(batch.health)
        self._check_skips(trainer)
        self._check_numbers(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """A validation moves too."""
        if self._watchdog:
            self._watchdog.moved(f"validation at step {trainer.global_step}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop watching, also after an error."""
        if self._watchdog:
            self._watchdog.end()
            self._watchdog = None

    def _check_numbers(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if step == self._seen_step or step % cast(Any, trainer).log_every_n_steps:
            return
        self._seen_step = step
        logged = {key: float(v) for key, v in trainer.callback_metrics.items() if key.startswith("train/")}
        if wrong := [f"{key} is {value}" for key, value in logged.items() if not math.isfinite(value)]:
            self._once(trainer, "Loss is not a number", f"{', '.join(wrong)} at step {step}")

    def _check_skips(self, trainer: Trainer) -> None:
        read = self._counts[READ]
        reasons = Counter({key: n for key, n in self._counts.items() if key.startswith(SKIPPED)})
        skipped = reasons.total()
        if read >= self.samples_to_judge and skipped > self.skip_share * read:
            worst, _ = reasons.most_common(1)[0]
            text = f"{skipped} of {read} samples were skipped, most for {worst.removeprefix(SKIPPED)!r}"
            self._once(trainer, "Data is skipped", f"{text}; see data_health.json and `echat data verify`")

    def _once(self, trainer: Trainer, title: str, text: str) -> None:
        if title not in self._said:
            self._said.add(title)
            _tell(wandb_run(trainer), title, text)


def _tell(run: Any, title: str, text: str) -> None:
    _LOG.warning("%s: %s", title, text)
    if run is not None:
        run.alert(title=title, text=text, level=wandb.AlertLevel.WARN)


class _Watchdog:
    """Speaks once when nothing has moved for so many seconds, and again only after something has."""

    def __init__(self, seconds: float, *, tell: Callable[[str], None]) -> None:
        self._seconds = seconds
        self._tell = tell
        self._last = ("the start", time.monotonic())
        self._spoken = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="echat-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def moved(self, where: str) -> None:
        self._last = (where, time.monotonic())
        self._spoken = False

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._seconds / _LOOKS_A_SPAN):
            where, at = self._last
            if not self._spoken and time.monotonic() - at > self._seconds:
                self._spoken = True
                self._tell(f"nothing was finished for {self._seconds / 60:g} minutes since {where}")
