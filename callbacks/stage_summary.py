"""How a stage went, in a few numbers and a curve: `stage_summary.json`."""

from __future__ import annotations

import math
import time
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.run_files import write_run_file
from lightning_echat.contracts import UserError

FILE = "stage_summary.json"


class StageSummary(Callback):
    """Follows the training loss as it is logged and writes a summary when training ends or fails, across resumes.

    The file holds `steps`, `seconds` (validations included), `loss_first` (mean over the first 1 % of what was
    logged), `loss_last` (over the last 5 %), `curve` ([step, loss] pairs) and `complete`, false after a failure.

    Args:
        metric: The training metric to follow; taken at the Trainer's logging steps, where stages log it.
    """

    def __init__(self, *, metric: str = "train/loss") -> None:
        super().__init__()
        self.metric = metric
        self._curve = LossCurve()
        self._seconds_before = 0.0
        self._started: float | None = None
        self._seen_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()
        self._seen_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the loss of a logging step, once however many batches the step has."""
        step = trainer.global_step
        if step != self._seen_step and step % cast(Any, trainer).log_every_n_steps == 0:
            self._curve.add(step, self._value(trainer, pl_module))
        self._seen_step = step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the summary."""
        write_run_file(trainer, FILE, content=self._summary(trainer, complete=True))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what there is."""
        if self._started is not None:
            write_run_file(trainer, FILE, content=self._summary(trainer, complete=False))

    def state_dict(self) -> dict[str, Any]:
        """The curve and the time spent so far."""
        return {"curve": self._curve.buckets, "per_bucket": self._curve.per_bucket, "seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the run stopped."""
        self._curve = LossCurve(buckets=state_dict["curve"], per_bucket=state_dict["per_bucket"])
        self._seconds_before = state_dict["seconds"]

    def _value(self, trainer: Trainer, pl_module: LightningModule) -> float:
        if self.metric not in trainer.callback_metrics:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise UserError(
                f"StageSummary follows {self.metric!r}, which {type(pl_module).__name__} does not log; it logs {logged}"
            )
        return float(trainer.callback_metrics[self.metric])

    def _seconds(self) -> float:
        return self._seconds_before + (time.perf_counter() - self._started if self._started is not None else 0.0)

    def _summary(self, trainer: Trainer, *, complete: bool) -> dict[str, Any]:
        return {
            "steps": trainer.global_step,
            "seconds": round(self._seconds(), 2),
            "loss_first": self._curve.first(0.01),
            "loss_last": self._curve.last(0.05),
            "curve": self._curve.points(),
            "complete": complete,
        }


class LossCurve:
    """A loss over steps in bounded memory: means over buckets, which double their width when there are too many.

    Args:
        buckets: [last step, sum, count] of each bucket.
        per_bucket: Losses that a bucket holds once it is full.
    """

    MAX_BUCKETS = 1024

    def __init__(self, *, buckets: list[list[float]] | None = None, per_bucket: int = 1) -> None:
        self.buckets = buckets or []
        self.per_bucket = per_bucket

    def add(self, step: int, loss: float) -> None:
        """Append a loss; one that is not a number stays one, as a curve that hides it would lie."""
        if self.buckets and self.buckets[-1][2] < self.per_bucket:
            last = self.buckets[-1]
            self.buckets[-1] = [step, last[1] + loss, last[2] + 1]
            return
        self.buckets.append([step, loss, 1])
        if len(self.buckets) > self.MAX_BUCKETS:
            self._halve()

    def points(self) -> list[tuple[int, float]]:
        """[last step, mean loss] of every bucket."""
        return [(int(step), total / count) for step, total, count in self.buckets]

    def first(self, share: float) -> float:
        """Mean over the first `share` of the buckets, at least one; NaN without any."""
        return _mean(self.buckets[: self._some(share)])

    def last(self, share: float) -> float:
        """Mean over the last `share` of the buckets, at least one; NaN without any."""
        return _mean(self.buckets[-self._some(share) :])

    def _some(self, share: float) -> int:
        return max(1, round(share * len(self.buckets)))

    def _halve(self) -> None:
        pairs = zip(self.buckets[0::2], [*self.buckets[1::2], None], strict=False)
        self.buckets = [a if b is None else [b[0], a[1] + b[1], a[2] + b[2]] for a, b in pairs]
        self.per_bucket *= 2


def _mean(buckets: list[list[float]]) -> float:
    count = sum(bucket[2] for bucket in buckets)
    return sum(bucket[1] for bucket in buckets) / count if count else math.nan
