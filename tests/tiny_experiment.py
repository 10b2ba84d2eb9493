"""`echat fit` of the tiny model as YAML, with W&B and what belongs to it, for tests that look at the runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import wandb
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_echat.testing import tiny_network_config
from lightning_echat.tokens.dialogue_template import TokensConfig

STAGES = "lightning_echat.stages"
MEASURING = (
    {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"},
    {"class_path": "callbacks.paralinguistic_accuracy.ParalinguisticAccuracy"},
    {"class_path": "callbacks.empathy_evaluation.EmpathyEvaluation"},
    {"class_path": "callbacks.dialogue_panel.DialoguePanel"},
    {"class_path": "callbacks.token_throughput.TokenThroughput", "init_args": {"every_n_steps": 1}},
    {"class_path": "callbacks.data_health.DataHealth", "init_args": {"every_n_steps": 1}},
    {"class_path": "callbacks.metric_summaries.MetricSummaries"},
    {"class_path": "callbacks.alerts.Alerts"},
)
"""Every callback that logs."""


def write_experiment(
    folder: Path, tokens: TokensConfig, *callbacks: dict[str, Any], stage: str = "empathy", **trainer: Any
) -> Path:
    """A stage of four optimizer steps that saves and logs at each, below `folder`; returns the YAML file."""
    saving = {"save_last": "link", "save_top_k": -1, "every_n_train_steps": 1}
    logger = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"project": "p", "resume": "allow"}}
    settings = {
        "default_root_dir": str(folder),
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 4,
        "log_every_n_steps": 1,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": [logger],
        "callbacks": [
            {"class_path": "callbacks.stage_checkpoint.StageCheckpoint", "init_args": saving},
            {"class_path": "callbacks.run_lineage.RunLineage"},
            *callbacks,
        ],
    }
    arguments = {
        "tokens": asdict(tokens),
        "network": asdict(tiny_network_config()),
        "decoding": {"max_text_ids": 4, "max_speech_ids": 4},
    }
    config = {
        "trainer": {**settings, **trainer},
        "model": {"class_path": f"{STAGES}.{stage}.{stage.title()}Stage", "init_args": arguments},
        "data": {"class_path": "tests.tiny_training.TinyData"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f"{folder.name}.yaml"
    # Through JSON's types: tuples have no plain YAML.
    path.write_text(yaml.safe_dump(json.loads(json.dumps(config))))
    return path


class LogTable(Callback):
    """Logs a table with a sound, an image and an alert after each validation, as the real callbacks do."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            run: Any = trainer.loggers[0].experiment
            step = trainer.global_step
            sound = wandb.Audio(np.full(800, step / 10, dtype=np.float32), sample_rate=8000, caption=f"step {step}")
            table = wandb.Table(columns=["step", "sound"], data=[[step, sound]])
            image = wandb.Image(np.full((2, 2, 3), step, dtype=np.uint8))
            run.log({"val/table": table, "val/image": image, "trainer/global_step": step})
            run.alert(title="Validated", text=f"step {step}")
