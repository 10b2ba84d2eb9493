"""`wandb sweep`, `wandb agent` and the rest as a user types them, sent to the stand-in for W&B's server."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.wandb_stub import WandbStub

ROOT = Path(__file__).parents[1]


def wandb_command(stub: WandbStub, folder: Path, *words: str) -> str:
    """Run one of W&B's commands in a folder; everything that it says."""
    # As after `source .venv/bin/activate`: trials are started by the name echat.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **stub.environment(folder)}
    environment |= {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "wandb", *words]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        said, _ = process.communicate(timeout=400)
    finally:
        # An agent that is killed leaves its trials behind.
        for child in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
            child.kill()
        process.kill()
    assert process.returncode == 0, said
    return said


@contextmanager
def stopping_early(stub: WandbStub, metric: str, *, after: int) -> Iterator[None]:
    """The server gives every trial up once it has logged a metric so often, as hyperband does."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            with stub.lock:
                stub.stop |= {run.name for run in stub.runs.values() if len(run.series(metric)) >= after}

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
