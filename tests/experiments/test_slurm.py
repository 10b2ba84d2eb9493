"""experiments/trainer/slurm.sbatch under a stand-in for SLURM. With a real training: test_launching.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.slurm_stub import SlurmStub, filled_in

SCRIPT = Path(__file__).parents[2] / "experiments/trainer/slurm.sbatch"
ECHAT = """#!/bin/bash
echo "$@" > "$SLURM_STUB/called$SLURM_PROCID"
echo start >> "$SLURM_STUB/started$SLURM_PROCID"
[ "$SLURM_PROCID" = 0 ] && exit 0
exit $(sed -n "$(wc -l < "$SLURM_STUB/started$SLURM_PROCID")p" "$SLURM_STUB/codes")
"""


WAITING = """#!/bin/bash
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0
trap 'exit 143' TERM
touch "$SLURM_STUB/ready$SLURM_PROCID"
while true; do sleep 0.02; done
"""


def run(folder: Path, *codes: int) -> tuple[SlurmStub, list[int]]:
    """A job whose last task leaves with these codes at its starts, one after the other."""
    slurm = SlurmStub(folder / "slurm", {"PATH": os.environ["PATH"]}, {"echat": ECHAT})
    (slurm.folder / "codes").write_text("".join(f"{code}\n" for code in codes))
    script = filled_in(SCRIPT, folder / "job.sbatch", nodes=2, ntasks_per_node=1)
    return slurm, slurm.sbatch(script, "--config", "a b.yaml", within=30)


@pytest.mark.parametrize("failed", [143, 1, 137], ids=["preempted", "failed", "killed"])
def test_a_job_that_was_stopped_or_failed_on_one_rank_is_queued_again(tmp_path, failed):
    slurm, codes = run(tmp_path, failed, failed, 0)
    assert codes == [failed, failed, 0]
    called = (slurm.folder / "called1").read_text()
    assert called == "fit --config a b.yaml --trainer.num_nodes 2 --trainer.devices 1 --ckpt_path last\n"


def test_a_mistake_in_the_configuration_is_not_tried_again(tmp_path):
    assert run(tmp_path, 2, 0)[1] == [2]


def test_a_job_that_fails_every_time_comes_to_an_end(tmp_path):
    assert run(tmp_path, *[1] * 30)[1] == [1] * 21


def test_a_job_whose_shell_is_told_to_stop_too_waits_for_its_ranks_and_is_queued_again(tmp_path):
    slurm = SlurmStub(tmp_path / "slurm", {"PATH": os.environ["PATH"]}, {"echat": WAITING})
    script = filled_in(SCRIPT, tmp_path / "job.sbatch", nodes=1, ntasks_per_node=2)
    running = [slurm.folder / name for name in ("ready0", "ready1", "tasks")]
    codes = slurm.sbatch(script, ends_soon=lambda: all(file.exists() for file in running), within=30)
    assert codes == [143, 0]
