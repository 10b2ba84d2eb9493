import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from lightning_echat.testing import write_dummy_shards

TRAINER = """
import os, signal, sys
import psutil
from lightning_echat.testing import tiny_tokens_config
from tests.lightning_echat.data.stream_helpers import source, training
from pathlib import Path
tokens = tiny_tokens_config(Path(sys.argv[2]))
batches = iter(training(tokens, [source(sys.argv[1])], workers=2))
next(batches)
print(*(child.pid for child in psutil.Process().children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_trainer_that_is_killed(tmp_path):
    """Otherwise every preempted job leaves readers behind, which hold its memory."""
    folder = write_dummy_shards(tmp_path / "shards", shards=2)
    out = tmp_path / "pids"
    with out.open("w") as file:
        command = [sys.executable, "-c", TRAINER, str(folder), str(tmp_path / "tokenizer")]
        subprocess.run(command, stdout=file, cwd=Path(__file__).parents[3], timeout=120, check=False)
    workers = [int(pid) for pid in out.read_text().split()]
    assert len(workers) == 2
    # Torch itself looks every five seconds.
    limit = time.monotonic() + 4
    while any(map(_runs, workers)) and time.monotonic() < limit:
        time.sleep(0.1)
    left = [pid for pid in workers if _runs(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def _runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
