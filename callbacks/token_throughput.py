"""How fast training is, and what it waits for."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.flop_counter import FlopCounterMode

from callbacks.batch_tally import BatchSums, BatchTally
from lightning_echat.contracts import PackedBatch, UserError
from lightning_echat.parallel import first_of_group

PEAK_FLOPS: dict[str, float] = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Part of a GPU's name -> dense bf16 FLOP/s, as the maker states them. The first entry that fits counts."""


class TokenThroughput(Callback):
    """Logs speed over windows of optimizer steps, summed over ranks: what one job achieves.

    Keys: `perf/steps_per_second`, `perf/tokens_per_second` (padding not counted), `perf/supervised_tokens_per_second`,
    `perf/audio_seconds_per_second`, `perf/padding_share`, `perf/data_wait_share` and, on a GPU of the table under
    16-bit precision, `perf/mfu`. Validations, checkpoints and the first batch of a run are no part of any window.

    MFU counts the floating-point operations of the first batch, forward and backward as they happen (frozen parts,
    LoRA, recomputation), and credits them to ids that are not padding. Under tensor parallelism attention counts
    for one rank's heads only, so MFU is a little low.

    Args:
        every_n_steps: Optimizer steps a window.
    """

    def __init__(self, *, every_n_steps: int = 50) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise UserError(f"TokenThroughput: every_n_steps must be at least 1, not {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._clock = StepClock()
        self._tally = BatchTally()
        self._window_start: int | None = None
        self._peak: float | None = None
        self._flop_counter: FlopCounterMode | None = None
        self._flops_per_position = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing is measured before the first batch has warmed everything up."""
        self._window_start = None
        self._peak = peak_flops(pl_module.device, precision=str(trainer.precision))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PackedBatch, batch_idx: int
    ) -> None:
        """The wait for the batch is over."""
        self._clock.start_batch(time.perf_counter())
        if self._window_start is None and self._peak is not None:
            self._flop_counter = FlopCounterMode(display=False)
            self._flop_counter.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PackedBatch, batch_idx: int
    ) -> None:
        """Count the batch, and log when the window is full."""
        self._read_flops(batch)
        if first_of_group(trainer):
            self._tally.add(batch)
        steps = 0 if self._window_start is None else trainer.global_step - self._window_start
        window_ends = steps >= self.every_n_steps or self._window_start is None
        if window_ends and pl_module.device.type == "cuda":
            # The host runs ahead of the GPU; a window ends when its work is done.
            torch.cuda.synchronize(pl_module.device)
        self._clock.end_batch(time.perf_counter())
        if window_ends:
            if steps:
                self._log(trainer, pl_module.device, steps)
            self._open_window(trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is not training time."""
        self._clock.interrupt()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Neither is writing a checkpoint."""
        self._clock.interrupt()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no counter behind that an error kept open."""
        self._close_flop_counter()

    def _open_window(self, step: int) -> None:
        self._window_start = step
        self._tally = BatchTally()
        self._clock.reset()

    def _close_flop_counter(self) -> float:
        """Stop counting operations and return how many there were."""
        if self._flop_counter is None:
            return 0.0
        self._flop_counter.__exit__(None, None, None)
        flops = float(self._flop_counter.get_total_flops())
        self._flop_counter = None
        return flops

    def _read_flops(self, batch: PackedBatch) -> None:
        if self._flop_counter is not None:
            self._flops_per_position = self._close_flop_counter() / batch.input_ids.numel()

    def _log(self, trainer: Trainer, device: torch.device, steps: int) -> None:
        times = torch.tensor([self._clock.elapsed, self._clock.waited], dtype=torch.float64, device=device)
        # Windows end at the same step on every rank, so all of them come here together.
        sums = BatchSums.of(trainer.strategy.reduce(self._tally.tensor(device), reduce_op="sum"))
        elapsed, waited = trainer.strategy.reduce(times, reduce_op="sum").tolist()
        seconds = elapsed / trainer.world_size
        values = {
            "perf/steps_per_second": steps / seconds,
            "perf/tokens_per_second": sums.tokens / seconds,
            "perf/supervised_tokens_per_second": sums.supervised / seconds,
            "perf/audio_seconds_per_second": sums.audio_seconds / seconds,
            "perf/padding_share": sums.padding_share,
            "perf/data_wait_share": waited / elapsed,
        }
        if self._peak is not None:
            values["perf/mfu"] = sums.tokens * self._flops_per_position / (elapsed * self._peak)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)


class StepClock:
    """Adds up the time of batches and of the waits before them, leaving out interrupted waits."""

    def __init__(self) -> None:
        self.elapsed = 0.0
        self.waited = 0.0
        self._last = 0.0
        self._running = False

    def reset(self) -> None:
        """Forget the sums; the wait that is under way counts."""
        self.elapsed = self.waited = 0.0

    def start_batch(self, now: float) -> None:
        """A batch is there."""
        if self._running:
            self.elapsed += now - self._last
            self.waited += now - self._last
        self._last = now

    def end_batch(self, now: float) -> None:
        """The batch is done and the next is waited for."""
        self.elapsed += now - self._last
        self._last = now
        self._running = True

    def interrupt(self) -> None:
        """Something else than waiting for data happens before the next batch."""
        self._running = False


def peak_flops(device: torch.device, *, precision: str) -> float | None:
    """Dense 16-bit FLOP/s of the device; None where the device or the precision has no entry to be measured by."""
    if device.type != "cuda" or "16" not in precision:
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
