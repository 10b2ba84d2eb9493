"""A SLURM of one machine: reads a batch script's own directives, runs its tasks, signals them, and queues it again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

# Nodes are only numbers here. Tasks get what SLURM tells them; the step ends as its worst task did, as srun does.
_SRUN = """#!/bin/bash
for task in $(seq 0 $((SLURM_NTASKS - 1))); do
  export SLURM_PROCID=$task SLURM_LOCALID=$((task % SLURM_NTASKS_PER_NODE))
  export SLURM_NODEID=$((task / SLURM_NTASKS_PER_NODE))
  "$@" & pids="$pids $!"
done
echo $pids > "$SLURM_STUB/tasks.new" && mv "$SLURM_STUB/tasks.new" "$SLURM_STUB/tasks"
status=0
for pid in $pids; do wait $pid || { code=$?; [ $code -gt $status ] && status=$code; }; done
exit $status
"""
_SCONTROL = """#!/bin/bash
echo "$@" >> "$SLURM_STUB/asked"
"""
_KNOWN = {
    *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time"),
    *("requeue", "open-mode", "signal", "output"),
}


class SlurmStub:
    """Commands on PATH, and a queue of one job.

    Args:
        folder: For what the commands need.
        environment: Of the job, but for SLURM's own.
        commands: Name -> text of further scripts that the job finds on PATH.
    """

    job_id = "4711"

    def __init__(self, folder: Path, environment: dict[str, str], commands: dict[str, str]) -> None:
        self.folder = folder
        folder.mkdir()
        for name, text in {"srun": _SRUN, "scontrol": _SCONTROL, **commands}.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        path = os.pathsep.join([str(folder), environment["PATH"]])
        self.environment = {**environment, "PATH": path, "SLURM_STUB": str(folder)}

    def sbatch(
        self,
        script: Path,
        *words: str,
        ends_soon: Callable[[], bool] = lambda: False,
        then: Callable[[], None] = lambda: None,
        within: float,
    ) -> list[int]:
        """Run a job until nobody asks for it to be queued again; returns its exit codes.

        Args:
            script: The batch file.
            words: Its arguments.
            ends_soon: Whether the job is about to lose its place: the signal that the script asked for is then sent to
                its tasks, and to its shell as on preemption; once.
            then: Called after that.
            within: Seconds that each start may take.
        """
        directives = read_directives(script)
        codes: list[int] = []
        self._ends_soon, self._then = ends_soon, then
        while not codes or self._asked_again(directives):
            codes.append(self._start(["bash", str(script), *words], directives, restarts=len(codes), within=within))
        return codes

    def _start(self, words: list[str], directives: dict[str, str], *, restarts: int, within: float) -> int:
        nodes, each = directives["nodes"], directives["ntasks-per-node"]
        told = {"JOB_ID": self.job_id, "JOB_NAME": directives["job-name"], "NNODES": nodes, "NTASKS_PER_NODE": each}
        told |= {"NTASKS": str(int(nodes) * int(each)), "NODELIST": "127.0.0.1", "RESTART_COUNT": str(restarts)}
        environment = self.environment | {f"SLURM_{name}": value for name, value in told.items()}
        if not restarts:
            # As SLURM does, and the script must do without.
            del environment["SLURM_RESTART_COUNT"]
        number = signal.Signals[f"SIG{directives['signal'].partition('@')[0]}"]
        (self.folder / "tasks").unlink(missing_ok=True)
        ends = time.monotonic() + within
        with (self.folder / f"log{restarts}").open("w") as log:
            job = subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT)
            while job.poll() is None:
                if self._ends_soon():
                    for process in [*self._tasks(), job.pid]:
                        os.kill(process, number)
                    self._ends_soon = lambda: False
                    self._then()
                if time.monotonic() > ends:
                    for process in [*self._tasks(), job.pid]:
                        os.kill(process, signal.SIGKILL)
                time.sleep(0.05)
        return job.returncode

    def _tasks(self) -> list[int]:
        return [int(task) for task in (self.folder / "tasks").read_text().split()]

    def _asked_again(self, directives: dict[str, str]) -> bool:
        """Whether the job was given back to the queue; SLURM refuses that for one that was sent without --requeue."""
        asked = self.folder / "asked"
        if not asked.exists():
            return False
        assert asked.read_text() == f"requeue {self.job_id}\n" and "requeue" in directives
        asked.unlink()
        return True

    def said(self, start: int) -> str:
        """What the job wrote at its nth start."""
        return (self.folder / f"log{start}").read_text()


def read_directives(script: Path) -> dict[str, str]:
    """The script's #SBATCH lines. An option that the stand-in does not know would be ignored without a word."""
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", script.read_text(), flags=re.MULTILINE)
    assert len(lines) == script.read_text().count("\n#SBATCH"), "a directive that cannot be read"
    directives = dict(lines)
    assert directives.keys() <= _KNOWN, f"unknown: {directives.keys() - _KNOWN}"
    return directives


def filled_in(script: Path, copy: Path, **sizes: int) -> Path:
    """A copy of a batch script with other sizes, as its header asks for."""
    text = script.read_text()
    for name, size in sizes.items():
        text, found = re.subn(rf"(?m)^(#SBATCH --{name.replace('_', '-')})=\d+$", rf"\1={size}", text)
        assert found == 1, name
    copy.write_text(text)
    return copy
