"""The sweep files that are shipped, as they are, under the real `wandb sweep` and `wandb agent`.

What a small machine cannot have is replaced where a user would replace it: the data, the weights to start from, and the
overlay that says what a trial runs on. The sweep file, its command line and the experiment it names stay.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_echat.testing import save_tiny_checkpoint, tiny_model, tiny_network_config, write_dummy_shards
from lightning_echat.tokens.dialogue_template import TokensConfig
from tests.wandb_commands import stopping_early, wandb_command
from tests.wandb_stub import WandbStub, running_stub

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow


@pytest.fixture
def stub() -> Iterator[WandbStub]:
    with running_stub() as server:
        yield server


def write_overlay(path: Path, **content: Any) -> None:
    """Through JSON's types: tuples have no plain YAML."""
    path.write_text(yaml.safe_dump(json.loads(json.dumps(content))))


@pytest.fixture
def checkout(tmp_path: Path, tokens: TokensConfig) -> Path:
    """A folder like a checkout after the stages before, with a model and data for which a step takes no time."""
    for name in ("experiments", "sweeps"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for source in ("understanding", "dialogue", "text"):
        for split in ("train", "validation"):
            write_dummy_shards(tmp_path / "data" / source / split, shards=1, samples_per_shard=12)
    for stage in ("generation_tts", "generation_s2s"):
        save_tiny_checkpoint(tmp_path / "runs" / stage / "checkpoints/last.ckpt", tiny_model(tokens), tokens)
    write_overlay(
        tmp_path / "experiments/trainer/gpu.yaml",
        trainer={
            "accelerator": "cpu",
            "devices": 1,
            # One pass of a few steps, whatever number of steps the sweep asks for.
            "max_epochs": 1,
            "limit_train_batches": 4,
            "accumulate_grad_batches": 1,
            "val_check_interval": 2,
            "limit_val_batches": 1,
        },
        model={
            "init_args": {
                "tokens": asdict(tokens),
                "network": asdict(tiny_network_config()),
                "decoding": {"max_text_ids": 8, "max_speech_ids": 8},
            }
        },
        data={
            "init_args": {
                "num_workers": 0,
                "batching": {"tokens_per_batch": 2000, "max_ids": 700, "pool": 8, "shuffle": 4},
            }
        },
    )
    return tmp_path


def agent(stub: WandbStub, folder: Path, file: str) -> str:
    """One trial of a sweep file; what the agent said."""
    wandb_command(stub, folder, "sweep", "--project", "p", f"sweeps/{file}.yaml")
    (name,) = stub.sweeps
    return wandb_command(stub, folder, "agent", "--count", "1", f"tester/p/{name}")


@pytest.mark.parametrize("file", ["understanding", "generation", "empathy"])
def test_a_shipped_sweep_runs_as_it_is_and_its_metric_is_logged(checkout: Path, stub: WandbStub, file: str):
    said = agent(stub, checkout, file)
    (run,) = stub.runs.values()
    sweep = yaml.safe_load((checkout / f"sweeps/{file}.yaml").read_text())
    assert stub.sweeps["sweep1"].config == sweep
    assert (run.exit_code, run.summary.get("ended")) == (0, "finished"), said
    metric = sweep["metric"]["name"]
    # A plain number, which is what the search reads, and one for each validation, which is what hyperband counts.
    assert len(run.series(metric)) == 2 and run.summary[metric] == run.series(metric)[-1]
    for path, value in stub.sweeps["sweep1"].trials[run.name].items():
        resolved: Any = run.config
        for part in path.split("."):
            resolved = resolved[part]
        assert resolved == value or path == "data.init_args.train"
    assert stub.unknown == []


def test_the_quickstart_s_sweep_runs_as_it_is_and_a_trial_that_is_given_up_reads_stopped(
    tmp_path: Path, tokens: TokensConfig, stub: WandbStub
):
    for name in ("experiments", "sweeps"):
        shutil.copytree(ROOT / name, tmp_path / name)
    corpus = tmp_path / "runs/quickstart/corpus"
    for split in ("train", "validation"):
        write_dummy_shards(corpus / split, shards=1, samples_per_shard=24)
    shutil.copytree(tokens.tokenizer, tmp_path / "runs/quickstart/audio/tokenizer")
    metric = "val/understanding/loss/text"
    with stopping_early(stub, metric, after=1):
        said = agent(stub, tmp_path, "quickstart")
    (run,) = stub.runs.values()
    assert (run.summary.get("ended"), run.exit_code) == ("stopped", 255), said
    assert 1 <= len(run.series(metric)) < 6
    assert (tmp_path / "runs/sweeps/quickstart" / run.name / "checkpoints/last.ckpt").exists()
    assert stub.unknown == []
