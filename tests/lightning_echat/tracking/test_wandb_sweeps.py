"""`wandb sweep` and `wandb agent`, the real ones, train with `echat fit` against the stand-in for W&B's server."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_echat.tokens.dialogue_template import TokensConfig
from tests.tiny_experiment import write_experiment
from tests.wandb_commands import stopping_early, wandb_command
from tests.wandb_stub import WandbStub, running_stub

# As a file: Lightning starts further ranks by the name of the program.
ECHAT = str(Path(sys.executable).with_name("echat"))
pytestmark = pytest.mark.slow


@pytest.fixture
def stub() -> Iterator[WandbStub]:
    with running_stub() as server:
        yield server


def sweep(stub: WandbStub, folder: Path, config: Path, **settings: Any) -> str:
    """Create a sweep over an experiment and let an agent finish it; what the agent said."""
    content = {
        "method": "grid",
        "metric": {"name": "train/loss", "goal": "minimize"},
        "parameters": {"seed_everything": {"values": [3, 4]}, "trainer.gradient_clip_val": {"values": [0.5, 1.0]}},
        "command": ["${env}", ECHAT, "fit", "--config", str(config), "--config", "${args_json_file}"],
        **settings,
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(content))
    wandb_command(stub, folder, "sweep", "--project", "p", "sweep.yaml")
    (name,) = stub.sweeps
    return wandb_command(stub, folder, "agent", f"tester/p/{name}")


@pytest.mark.parametrize("devices", [1, 2])
def test_an_agent_trains_each_trial_with_its_parameters_in_a_folder_of_its_own(
    tmp_path, tokens: TokensConfig, stub: WandbStub, devices: int
):
    config = write_experiment(tmp_path / "talk", tokens, devices=devices, strategy="auto", max_steps=2)
    trials = [("sweep1-0", 3, 0.5), ("sweep1-1", 4, 1.0)][: 3 - devices]
    said = sweep(stub, tmp_path, config, run_cap=len(trials))
    assert sorted(stub.runs) == [name for name, _, _ in trials], said
    for name, seed, clip in trials:
        run = stub.runs[name]
        assert (run.given["sweep"], run.exit_code, run.summary["ended"]) == ("sweep1", 0, "finished"), said
        assert run.config["seed_everything"] == seed and run.config["trainer"]["gradient_clip_val"] == clip
        assert len(run.series("train/loss")) == 2
        # A plain number: what the sweep's search reads.
        assert run.summary["train/loss"] == run.series("train/loss")[-1]
        assert (tmp_path / "talk" / name / "checkpoints" / "last.ckpt").exists()
    assert stub.unknown == []


@pytest.mark.parametrize("devices", [1, 2])
def test_a_trial_that_is_stopped_early_saves_and_reads_stopped(
    tmp_path, tokens: TokensConfig, stub: WandbStub, devices: int
):
    config = write_experiment(tmp_path / "talk", tokens, devices=devices, max_steps=100_000)
    began = time.monotonic()
    with stopping_early(stub, "train/loss", after=3):
        said = sweep(stub, tmp_path, config, run_cap=1)
    run = stub.runs["sweep1-0"]
    assert (run.summary["ended"], run.exit_code) == ("stopped", 255), said
    assert (tmp_path / "talk" / "sweep1-0" / "checkpoints" / "last.ckpt").exists()
    assert time.monotonic() - began < 300
