"""What W&B does where nobody has said otherwise."""

from __future__ import annotations

import os

WANDB_DEFAULTS = {
    "WANDB_MODE": "offline",
    # Offline runs would still look up the error reporter's host.
    "WANDB_ERROR_REPORTING": "false",
    # W&B keeps 15 s of metrics in memory only; a run that is killed loses them.
    "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "1",
    # Errors still show; where the offline run lies is the run's folder, and docs/wandb.md says how to sync it.
    "WANDB_SILENT": "true",
}


def set_wandb_defaults() -> None:
    """Set the variables that are not set. Commands call it before they import what reads them."""
    for name, value in WANDB_DEFAULTS.items():
        os.environ.setdefault(name, value)
