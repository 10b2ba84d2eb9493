"""A training is one run of W&B: which one, and when it is another."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_echat.tracking.identity import (
    FILE,
    continues,
    identify,
    identity_of_this_command,
    read_identity,
    trial_folder,
    write_identity,
)

FOLDER = Path("runs/quickstart/understanding")


def test_a_run_is_grouped_and_named_by_its_folders():
    found = identify(FOLDER, job_type="understanding", goes_on=False, environment={})
    assert (found.group, found.job_type, found.name) == ("quickstart", "understanding", "quickstart/understanding")


def test_what_goes_on_keeps_its_id_and_what_begins_draws_one(tmp_path):
    first = identify(tmp_path, job_type="empathy", goes_on=True, environment={})
    write_identity(tmp_path, first)
    assert identify(tmp_path, job_type="empathy", goes_on=True, environment={}) == first
    assert identify(tmp_path, job_type="empathy", goes_on=False, environment={}).id != first.id


def test_what_the_environment_says_wins(tmp_path):
    write_identity(tmp_path, identify(tmp_path, job_type="empathy", goes_on=False, environment={}))
    given = {"WANDB_RUN_ID": "mine", "WANDB_RUN_GROUP": "study", "WANDB_JOB_TYPE": "trial", "WANDB_SWEEP_ID": "s"}
    found = identify(tmp_path, job_type="empathy", goes_on=True, environment=given)
    assert (found.id, found.group, found.job_type, found.name) == ("mine", "study", "trial", "")
    assert "WANDB_NAME" not in found.environment()


def test_a_damaged_file_is_no_identity(tmp_path):
    (tmp_path / FILE).write_text("{")
    assert read_identity(tmp_path) is None


@pytest.mark.parametrize(
    ("ckpt_path", "environment", "goes_on"),
    [
        (None, {}, False),
        ("last", {}, True),
        ("runs/quickstart/understanding/checkpoints/step=4.ckpt", {}, True),
        ("runs/other/checkpoints/last.ckpt", {}, False),
        # torchrun --max-restarts starts the same command anew after a fault.
        (None, {"TORCHELASTIC_RESTART_COUNT": "0"}, False),
        (None, {"TORCHELASTIC_RESTART_COUNT": "1"}, True),
    ],
)
def test_a_training_goes_on_where_it_is_told_to_or_restarted(ckpt_path, environment, goes_on):
    assert continues(ckpt_path, folder=FOLDER, environment=environment) is goes_on


def test_a_trial_of_an_agent_writes_to_a_folder_of_its_own():
    assert trial_folder(FOLDER, {"WANDB_RUN_ID": "t1"}) == FOLDER
    agent = {"WANDB_RUN_ID": "t1", "WANDB_SWEEP_ID": "s"}
    assert trial_folder(FOLDER, agent) == FOLDER / "t1"
    # Further ranks are started with the folder that the first has set.
    assert trial_folder(FOLDER / "t1", agent) == FOLDER / "t1"


def test_the_next_command_is_not_taken_for_this_one(monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    monkeypatch.setenv("WANDB_RUN_GROUP", "study")
    with identity_of_this_command():
        os.environ |= {"WANDB_RUN_ID": "a", "WANDB_RUN_GROUP": "b"}
    assert "WANDB_RUN_ID" not in os.environ and os.environ["WANDB_RUN_GROUP"] == "study"
