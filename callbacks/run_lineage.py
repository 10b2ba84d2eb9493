"""Which weights a stage started from and which it made, in W&B and in `lineage.json`."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from lightning_echat.contracts import UserError
from lightning_echat.nn.weights import latest_checkpoint
from lightning_echat.tracking.lineage import (
    Lineage,
    StageModel,
    declare_input,
    log_model,
    model_at,
    model_of,
    read_lineage,
    write_lineage,
)

_LOG = logging.getLogger(__name__)


class RunLineage(Callback):
    """Records the stage's `init_from` as training starts and logs its last checkpoint as an artifact when it ends.

    Online the input is declared at once. Offline it stands under `lineage` in the run's configuration, and `echat sync`
    declares it. Without a W&B logger only `lineage.json` is written, from rank 0. A run that is stopped or fails logs
    no artifact; the one that continues it does.

    Args:
        upload: Send the weights themselves along with their description.
    """

    def __init__(self, *, upload: bool = False) -> None:
        super().__init__()
        self.upload = upload

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record what the stage starts from."""
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        init_from = getattr(pl_module, "init_from", None)
        before = read_lineage(folder)
        lineage = Lineage(started_from=model_at(init_from) if init_from else None)
        if lineage.started_from == before.started_from:
            lineage = replace(lineage, declared=before.declared)
        if lineage.started_from and (run := wandb_run(trainer)):
            run.config.update({"lineage": asdict(lineage.started_from)}, allow_val_change=True)
            if not lineage.declared:
                lineage = replace(lineage, declared=_declare(run, lineage.started_from))
        folder.mkdir(parents=True, exist_ok=True)
        write_lineage(folder, lineage)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the stage made. Not in `on_train_end`, where the last checkpoint need not be written yet."""
        folder = Path(trainer.default_root_dir)
        if not trainer.is_global_zero or not _saves(trainer, folder):
            return
        run = wandb_run(trainer)
        identity = {"run_id": run.id, "project": run.project} if run else {"run_id": "", "project": ""}
        model = model_of(folder, step=trainer.global_step, **identity)
        if run:
            log_model(run, model, upload=self.upload)
        write_lineage(folder, replace(read_lineage(folder), made=model))


def wandb_run(trainer: Trainer) -> Any:
    """The W&B run of the first logger that has one, on rank 0; None where there is none, or it is disabled."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and isinstance(logger.experiment, wandb.Run):
            return None if logger.experiment.disabled else logger.experiment
    return None


def _saves(trainer: Trainer, folder: Path) -> bool:
    """Whether this training has left a checkpoint in its folder."""
    if not trainer.checkpoint_callbacks:
        return False
    try:
        latest_checkpoint(folder)
    except UserError:
        return False
    return True


def _declare(run: Any, model: StageModel) -> bool:
    """Whether W&B could be told of the input."""
    if not model.artifact or run.offline:
        return False
    try:
        declare_input(run, model)
    except (wandb.errors.CommError, wandb.errors.UsageError, ValueError) as error:
        _LOG.warning(
            "W&B does not know %s, from which this stage started (%s); `echat sync` declares it once it is there",
            model.artifact,
            error,
        )
        return False
    return True
