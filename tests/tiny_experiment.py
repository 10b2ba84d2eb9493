"""`echat fit` of the tiny model as YAML, with W&B and what belongs to it, for tests that look at the runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from lightning_echat.testing import tiny_network_config
from lightning_echat.tokens.dialogue_template import TokensConfig

STAGES = "lightning_echat.stages"


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
    arguments = {"tokens": asdict(tokens), "network": asdict(tiny_network_config())}
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
