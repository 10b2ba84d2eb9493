"""What became of the data: how much was read, kept, skipped and why, and how much padding it took."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, Protocol, runtime_checkable

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.batch_tally import BatchSums, BatchTally
from callbacks.run_files import write_run_file
from lightning_echat.contracts import PackedBatch, UserError
from lightning_echat.data.mixture import MixtureUnit
from lightning_echat.data.read_errors import DRAWN, DRAWN_IDS, KEPT, NOTICED, READ, SKIPPED
from lightning_echat.parallel import first_of_group

FILE = "data_health.json"
_BATCHES, _TOKENS, _POSITIONS = "batches", "tokens", "positions"


@runtime_checkable
class Mixing(Protocol):
    """A datamodule that trains on a mixture.

    Attributes:
        mixture_by: What its weights share out.
        asked_shares: "<source>/<task>" -> share asked for.
        epochs: Source -> how often it was read.
    """

    mixture_by: MixtureUnit
    asked_shares: dict[str, float]
    epochs: dict[str, float]


class DataHealth(Callback):
    """Sums the counts that travel with training batches, over all ranks and across resumes.

    Logs `data/read`, `data/kept`, `data/skipped/<reason>`, `data/noticed/<reason>`, `data/drawn/<source>/<task>` and
    `data/drawn_ids/<source>/<task>`, each a total since the run began; `data/drawn_share/<source>/<task>` beside
    `data/asked_share/<source>/<task>`; and `data/epochs/<source>` of rank 0. Writes `data_health.json` into the run's
    folder when training ends or fails: `samples`, `kept`, `skipped`, `noticed`, `drawn`, `drawn_share`, `asked_share`,
    `epochs`, `padding_share` of all `positions`, `batches`, and `complete`, false after a failure, when other ranks can
    no longer be asked for what they read since the last exchange.

    Batches count once their optimizer step is done, as the position of the data does: an accumulation window that was
    broken off comes again whole, and is counted then.

    Args:
        every_n_steps: Optimizer steps between two exchanges among ranks, each followed by a line in the log.
    """

    def __init__(self, *, every_n_steps: int = 50) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise UserError(f"DataHealth: every_n_steps must be at least 1, not {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._totals: Counter[str] = Counter()
        self._pending: Counter[str] = Counter()
        self._tally = BatchTally()
        # Of an accumulation window that has not ended in a step yet.
        self._open: Counter[str] = Counter()
        self._open_tally = BatchTally()
        self._steps = 0
        self._exchanged_at = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count windows from where training starts or goes on."""
        self._exchanged_at = self._steps = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PackedBatch, batch_idx: int
    ) -> None:
        """Add the batch's counts; exchange and log them at the end of a window."""
        if first_of_group(trainer):
            self._open.update(batch.health)
            self._open[_BATCHES] += 1
            self._open_tally.add(batch)
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            self._pending.update(self._open)
            self._tally.merge(self._open_tally)
            self._open, self._open_tally = Counter(), BatchTally()
        if trainer.global_step - self._exchanged_at >= self.every_n_steps:
            self._exchange(trainer)
            self._log(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exchange, as a checkpoint may follow that has to hold every rank's counts."""
        if trainer.state.fn == "fit":
            self._exchange(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log and write the totals."""
        self._exchange(trainer)
        self._log(trainer)
        write_run_file(trainer, FILE, content=self._summary(trainer, complete=True))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what this rank knows. Nothing is exchanged: the other ranks may be gone."""
        if trainer.state.fn == "fit":
            write_run_file(trainer, FILE, content=self._summary(trainer, complete=False))

    def state_dict(self) -> dict[str, Any]:
        """The totals of all ranks, which save together."""
        totals = self._totals.copy()
        for counts in _all_ranks(self._own()):
            totals.update(counts)
        return {"totals": dict(totals)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._totals = Counter(state_dict["totals"])

    def _own(self) -> Counter[str]:
        """What this rank has counted and not exchanged, without an open window."""
        sums = self._tally.read()
        return self._pending + Counter({_TOKENS: sums.tokens, _POSITIONS: sums.positions})

    def _exchange(self, trainer: Trainer) -> None:
        """Move what every rank has counted into the totals, which are the same on all of them."""
        for counts in _all_ranks(self._own()):
            self._totals.update(counts)
        self._pending = Counter()
        self._tally = BatchTally()
        self._exchanged_at = trainer.global_step

    def _log(self, trainer: Trainer) -> None:
        values = {
            f"data/{_metric_name(key)}": float(count)
            for key, count in self._totals.items()
            if key not in (_BATCHES, _TOKENS, _POSITIONS)
        }
        for name, shares in _mixture(trainer, self._totals).items():
            values |= {f"data/{_metric_name(f'{name}/{key}')}": share for key, share in shares.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def _summary(self, trainer: Trainer, *, complete: bool) -> dict[str, Any]:
        counts = self._totals + self._own()
        sums = BatchSums(tokens=counts[_TOKENS], positions=counts[_POSITIONS])
        return {
            "samples": counts[READ],
            "kept": counts[KEPT],
            "skipped": _under(counts, SKIPPED),
            "noticed": _under(counts, NOTICED),
            "drawn": _under(counts, DRAWN),
            **_mixture(trainer, counts),
            "padding_share": sums.padding_share,
            "positions": counts[_POSITIONS],
            "batches": counts[_BATCHES],
            "complete": complete,
        }


def _mixture(trainer: Trainer, counts: Counter[str]) -> dict[str, dict[str, float]]:
    """What was drawn beside what was asked for, in the unit of the mixture, and how often each source was read."""
    data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it
    if not isinstance(data, Mixing):
        return {}
    drawn = _under(counts, DRAWN_IDS if data.mixture_by == "tokens" else DRAWN)
    total = max(sum(drawn.values()), 1)
    shares = {name: drawn.get(name, 0) / total for name in data.asked_shares}
    return {"drawn_share": shares, "asked_share": data.asked_shares, "epochs": data.epochs}


def _all_ranks(counts: Counter[str]) -> list[dict[str, int]]:
    """Every rank's counts. Their keys differ between ranks, so they travel as objects; they are small and rare."""
    if not (dist.is_available() and dist.is_initialized()):
        return [dict(counts)]
    gathered: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, dict(counts))
    return gathered


def _under(counts: Counter[str], prefix: str) -> dict[str, int]:
    return {key.removeprefix(prefix): count for key, count in sorted(counts.items()) if key.startswith(prefix)}


def _metric_name(key: str) -> str:
    """Reasons are phrases; metric names hold no spaces."""
    return re.sub(r"\s+", "_", key.lower())
