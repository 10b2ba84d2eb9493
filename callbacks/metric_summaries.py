"""What W&B's page of a run shows of each metric: its best value, not merely its last."""

from __future__ import annotations

import os

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.run_lineage import wandb_run
from lightning_echat.tracking.metric_table import best_values


class MetricSummaries(Callback):
    """Has W&B keep the best and the last value of every metric of quality, by the direction of the metric table.

    A trial of a sweep is left alone: a sweep reads the plain last value, which W&B would replace.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell W&B before the first value."""
        run = wandb_run(trainer) if trainer.is_global_zero else None
        if run is None or os.environ.get("WANDB_SWEEP_ID"):
            return
        sets = getattr(getattr(trainer, "datamodule", None), "validation_names", None) or []
        for key, best in best_values(list(sets)).items():
            run.define_metric(key, step_metric="trainer/global_step", step_sync=True, summary=f"{best},last")
