"""A run that is killed keeps what it logged, and one on several ranks is one run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lightning_echat.cli import main
from lightning_echat.tracking.defaults import WANDB_DEFAULTS
from tests.ranks import run_on_ranks
from tests.tiny_experiment import write_experiment
from tests.wandb_log import pieces, read_piece, records
from tests.wandb_stub import running_stub

ROOT = Path(__file__).parents[3]
LOGS_FOREVER = """
import sys, time
from lightning_echat.tracking.defaults import set_wandb_defaults
set_wandb_defaults()
import wandb
run = wandb.init(project="p", dir=sys.argv[1])
while True:
    run.log({"time": time.time(), "trainer/global_step": 0})
    print("logged", flush=True)
    time.sleep(0.05)
"""


def test_sigkill_loses_at_most_the_last_second_and_the_rest_can_be_sent(tmp_path, monkeypatch):
    """The process and W&B's own service are killed together, as when a machine goes down."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"WANDB_DATA_DIR": str(tmp_path / "data"), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", LOGS_FOREVER, str(tmp_path)]
    process = subprocess.Popen(words, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "logged\n"
    time.sleep(3)
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    assert any("wandb-core" in " ".join(each.cmdline()) for each in family)
    killed_at = time.time()
    for each in family:
        each.send_signal(signal.SIGKILL)
    process.wait()
    (path,) = pieces(tmp_path)
    times = [value for _, value in read_piece(records(path)).series("time")]
    # Half a second more than W&B promises, for a machine that is busy.
    assert killed_at - times[-1] < 1.5
    with running_stub() as stub:
        for name, value in {**stub.environment(tmp_path), "WANDB_DATA_DIR": str(tmp_path / "data")}.items():
            monkeypatch.setenv(name, value)
        main(["sync", str(tmp_path)])
        (run,) = stub.runs.values()
        assert run.series("time") == times and len(times) > 10
        assert stub.unknown == []


def _fit(config: str, environment: dict[str, str]) -> None:
    os.environ |= environment
    main(["fit", "--config", config])


@pytest.mark.slow
def test_two_ranks_are_one_run(tmp_path, tokens):
    """Exactly one, with the losses of every step; no empty one beside it."""
    config = write_experiment(tmp_path / "run", tokens, devices=2, strategy="ddp", max_steps=2)
    run_on_ranks(_fit, str(config), WANDB_DEFAULTS)
    (path,) = pieces(tmp_path / "run")
    assert len(read_piece(records(path)).series("train/loss")) == 2
    assert len(list((tmp_path / "run" / "wandb").glob("*run-*-*"))) == 1
