"""Lightning's ModelCheckpoint, which also keeps the very end of training and saves before it gives way."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

_STOPPED_BY_SIGTERM = 128 + signal.SIGTERM


class StageCheckpoint(ModelCheckpoint):
    """Saves as ModelCheckpoint does, once more when training ends between two savings, and when it is asked to stop.

    ModelCheckpoint leaves the steps after the last multiple of `every_n_train_steps` unsaved, and the next stage would
    begin without them.

    SIGTERM (preemption, a time limit) lets the step finish, saves and exits with 143; so does Ctrl-C, with 130, where
    several ranks train together: saving is collective, so all must stop at the same step. A second Ctrl-C stops at
    once. Arguments are ModelCheckpoint's; `save_on_exception` counts on a single rank only, as a rank that fails alone
    finds nobody to save with.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._handlers: dict[signal.Signals, Any] = {}
        self._asked_by: signal.Signals | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for signals. Lightning's own handler makes a collective call from wherever the signal finds it."""
        super().on_train_start(trainer, pl_module)

        def ask(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and self._asked_by == signal.SIGINT:
                raise KeyboardInterrupt
            self._asked_by = signal.Signals(number)
            if callable(tell := getattr(pl_module, "ask_to_stop", None)):
                tell()
            if trainer.is_global_zero:
                again = "; Ctrl-C again to stop at once" if number == signal.SIGINT else ""
                sys.stderr.write(f"echat: {self._asked_by.name}: finishing the step, then saving{again}\n")

        self._asked_by = None
        for number in (signal.SIGTERM, signal.SIGINT) if trainer.world_size > 1 else (signal.SIGTERM,):
            self._handlers[number] = signal.signal(number, ask)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save on schedule; save and stop where the ranks have agreed to."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if getattr(pl_module, "stopping", self._asked_by is not None):
            self._save_now(trainer)
            if self._asked_by == signal.SIGINT:
                raise KeyboardInterrupt
            raise SIGTERMException(_STOPPED_BY_SIGTERM)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save unless the last step is saved already."""
        self._save_now(trainer)
        super().on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what one rank has; several cannot."""
        if trainer.world_size == 1:
            super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _save_now(self, trainer: Trainer) -> None:
        if self._last_global_step_saved != trainer.global_step:
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
